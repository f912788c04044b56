"""CPU seconds of merging and resizing LoRAs of SDXL's size, and of one 3072x3072 layer.

python tests/benchmarks/bench_merging.py [--quick]
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time

import torch
from safetensors.torch import save_file

from simpletuner.helpers.adapters.files.adapter_file import PATHS_KEY, layer_name
from simpletuner.helpers.adapters.files.lora_conversion import truncated_product
from simpletuner.helpers.adapters.files.low_rank import Keep, truncated_dense
from simpletuner.helpers.adapters.files.merge_terms import MergeOptions
from simpletuner.helpers.adapters.files.merging import merge_adapters
from simpletuner.helpers.adapters.files.resizing import ResizeOptions, resize_adapter
from simpletuner.helpers.models import registry

BLOCKS, RANK, WIDTH = 70, 16, 3072
# (out, in) of the linear layers in one of SDXL's 1280-wide blocks.
LAYERS = {
    **dict.fromkeys(("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q"), (1280, 1280)),
    **dict.fromkeys(("attn2.to_k", "attn2.to_v"), (1280, 2048)),
    "attn2.to_out.0": (1280, 1280),
    "ff.net.0.proj": (10240, 1280),
    "ff.net.2": (1280, 5120),
}


def save_lora(file: Path, *, blocks: int) -> Path:
    """A LoRA of random weights."""
    tensors, paths = {}, {}
    for block in range(blocks):
        for name, (rows, columns) in LAYERS.items():
            path = f"mid_block.attentions.0.transformer_blocks.{block}.{name}"
            paths[layer_name(path)] = path
            tensors[f"{layer_name(path)}.lora_down.weight"] = torch.randn(RANK, columns)
            tensors[f"{layer_name(path)}.lora_up.weight"] = torch.randn(rows, RANK)
    save_file(tensors, file, metadata={"model_family": "sdxl", PATHS_KEY: json.dumps(paths)})
    return file


def timed(name: str, work: Callable[[], object]) -> None:
    """Print the CPU seconds of a call."""
    started = process_time()
    work()
    print(f"| {name} | {process_time() - started:.4f} |", flush=True)


def main() -> None:
    """Time each task once; a first small decomposition is not counted."""
    is_quick = "--quick" in sys.argv[1:]
    blocks, width = (1, 64) if is_quick else (BLOCKS, WIDTH)
    families = registry.specs()
    print("| task | CPU time, s |\n|---|---|")
    torch.linalg.svd(torch.randn(8, 8, dtype=torch.float64))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        first, second = (save_lora(folder / f"{name}.safetensors", blocks=blocks) for name in "ab")
        output = folder / "out"
        for name, options in (
            ("merge", MergeOptions(weights=(0.7, 0.3))),
            ("merge --rank 16 --dtype bf16", MergeOptions(weights=(0.7, 0.3), rank=16, dtype="bf16")),
        ):

            def merge(options: MergeOptions = options) -> None:
                merge_adapters([first, second], output, options, families=families, overwrite=True)

            timed(f"{name}, {len(LAYERS) * blocks} layers", merge)
        resized = ResizeOptions(keep=Keep(rank=8))
        timed(
            "resize --rank 8",
            lambda: resize_adapter(first, output, resized, families=families, overwrite=True),
        )
    for rank in (16, 64):
        a, b = torch.randn(rank, width), torch.randn(width, rank)
        timed(f"resize of one layer of rank {rank}", lambda a=a, b=b: truncated_product(a, b, lambda _: 8))
    dense = torch.randn(width, width)
    timed("all singular values of a dense layer", lambda: torch.linalg.svd(dense.double()))
    timed("extraction of a dense layer", lambda: truncated_dense(dense, Keep(rank=16)))


if __name__ == "__main__":
    main()
