"""What each choice of targets adapts, on models of real size without their weights: the tables of lycoris.md.

`python tests/integration/layer_table.py` writes them into the page.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from simpletuner.helpers.adapters.adapter import Adapter
from simpletuner.helpers.adapters.network import LycorisAdapter
from simpletuner.helpers.adapters.peft_lora import PeftAdapter
from simpletuner.helpers.choices.algorithms import ALGORITHMS as RECORDS
from simpletuner.helpers.configuration.schema.adapter import AdapterConfig
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.models.flux import spec as flux
from simpletuner.helpers.models.flux2 import spec as flux2
from simpletuner.helpers.models.sdxl import spec as sdxl

PAGE = Path(__file__).resolve().parents[2] / "documentation" / "lycoris.md"
RANK = 64
GENERIC = (("Attention", "FeedForward"), ("Attention",), ("FeedForward",))
SDXL_UNET = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
KLEIN = {"guidance_embeds": False}
KLEIN_4B = KLEIN | {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
}
KLEIN_9B = KLEIN | {
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
}


class Unfilled(TorchFunctionMode):
    """Leaves new weights as they are: on meta there is nothing to fill, and torch takes long to do so."""

    FILLING = frozenset({nn.init.kaiming_uniform_, Tensor.uniform_})

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.FILLING:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Model:
    """A denoiser of real size, and the class names that users write for it."""

    title: str
    spec: ModelSpec
    flavours: tuple[str, ...]
    kind: Any
    config: Mapping[str, Any]
    classes: tuple[tuple[str, ...], ...]

    @functools.cached_property
    def denoiser(self) -> Any:
        """One for all that leave it as it was."""
        return self.make()

    def make(self, **changes: Any) -> Any:
        """A new one."""
        with torch.device("meta"), Unfilled():
            return self.kind(**{**self.config, **changes}).requires_grad_(False)


_FLUX2_CLASSES = (
    ("Flux2Attention", "Flux2FeedForward", "Flux2ParallelSelfAttention"),
    ("Flux2TransformerBlock", "Flux2SingleTransformerBlock"),
)
MODELS = (
    Model(
        "SDXL",
        sdxl.SPEC,
        ("base-1.0", "base-0.9", "turbo"),
        UNet2DConditionModel,
        SDXL_UNET,
        (("BasicTransformerBlock",),),
    ),
    Model(
        "Flux.1",
        flux.SPEC,
        ("dev", "kontext", "krea", "schnell"),
        FluxTransformer2DModel,
        {"guidance_embeds": True},  # schnell has none; they are among no targets
        (("FluxAttention", "FeedForward"), ("FluxTransformerBlock", "FluxSingleTransformerBlock")),
    ),
    Model("Flux.2 dev", flux2.SPEC, ("dev",), Flux2Transformer2DModel, {}, _FLUX2_CLASSES),
    Model(
        "Flux.2 Klein 4B",
        flux2.SPEC,
        ("klein-4b", "klein-base-4b"),
        Flux2Transformer2DModel,
        KLEIN_4B,
        _FLUX2_CLASSES,
    ),
    Model(
        "Flux.2 Klein 9B",
        flux2.SPEC,
        ("klein-9b", "klein-base-9b"),
        Flux2Transformer2DModel,
        KLEIN_9B,
        _FLUX2_CLASSES,
    ),
)

ALGORITHMS = tuple(RECORDS)
TLORA = {"algo": "tlora", "multiplier": 1.0, "linear_dim": RANK, "linear_alpha": RANK}
HEADS = {
    "layers": ("| model | targets | layers | parameters trained |", "|---|---|---|---|"),
    "algorithms": (
        f"| algorithm | {' | '.join(model.title for model in MODELS)} |",
        "|---|" + "---|" * len(MODELS),
    ),
}


@dataclass(frozen=True)
class Count:
    """What an adapter is made of."""

    layers: int
    parameters: int

    @property
    def text(self) -> str:
        return f"{self.parameters / 1e6:.1f} M"


def lycoris(values: Mapping[str, Any], denoiser: Any, spec: ModelSpec) -> Count:
    """The adapter of a lycoris json; it leaves the denoiser again."""
    own = {key: value for key, value in values.items() if key in LycorisConfig.model_fields}
    extra = {key: value for key, value in values.items() if key not in own}
    config = LycorisConfig.model_validate(own | {"raw": dict(values), "extra": extra})
    with nullcontext() if config.algo == "tlora" else torch.device("meta"):
        return _count(LycorisAdapter.create(denoiser, config, spec=spec, seed=0))


def sides_of(model: Model) -> dict[str, int | None]:
    """Class of a module with linear layers or convolutions -> smaller side of its smallest linear layer."""
    sides: dict[str, int | None] = {}
    for module in model.denoiser.modules():
        inside = [each for each in module.modules() if isinstance(each, nn.Linear | nn.Conv2d)]
        linear = [min(each.weight.shape) for each in inside if isinstance(each, nn.Linear)]
        name = type(module).__name__
        known = sides.get(name)
        if inside:
            sides[name] = min([*linear, *([known] if known is not None else [])], default=None)
    return sides


def standard(targets: Sequence[str], denoiser: Any, spec: ModelSpec) -> Count:
    """The adapter of PEFT target names, on a denoiser that has none."""
    config = AdapterConfig(lora_type="standard", lora_rank=RANK, peft_lora_target_modules=tuple(targets))
    with torch.device("meta"):
        adapter = PeftAdapter(
            denoiser, config, prefix=spec.denoiser_name, default_targets=spec.lora_targets, seed=0
        )
        return _count(adapter)


def _count(adapter: Adapter) -> Count:
    count = Count(adapter.num_layers, sum(parameter.numel() for parameter in adapter.parameters()))
    adapter.detach()
    return count


def counts_of(model: Model) -> dict[str, Count]:
    """Choice of targets, as the table says it -> the adapter of rank 64."""
    counts = {}
    for names in dict.fromkeys((*GENERIC, *model.classes)):
        values = TLORA | {"apply_preset": {"target_module": list(names)}}
        counts[", ".join(f"`{name}`" for name in names)] = lycoris(values, model.denoiser, model.spec)
    presets = {"`standard`": model.spec.lora_targets}
    presets |= {f"`standard`, `{name}`": targets for name, targets in model.spec.lora_presets.items()}
    # PEFT leaves its wrappers behind, so each needs a new one.
    return counts | {key: standard(names, model.make(), model.spec) for key, names in presets.items()}


def layer_rows() -> list[str]:
    """The table of layers and parameters for each choice of targets."""
    rows = []
    for model in MODELS:
        billions = sum(parameter.numel() for parameter in model.denoiser.parameters()) / 1e9
        title = f"{model.title}, {billions:.2f} B"
        for targets, count in counts_of(model).items():
            rows.append(f"| {title} | {targets} | {count.layers} | {count.text} |")
            title = ""
    return rows


def algorithm_rows(jsons: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table of what each algorithm's json trains on each model; none where LyCORIS cannot build it."""
    rows = []
    for algo, values in jsons.items():
        cells = []
        for model in MODELS:
            try:
                cells.append(lycoris(values, model.denoiser, model.spec).text)
            except ConfigError:
                cells.append("none")
        rows.append(f"| `{algo}` | {' | '.join(cells)} |")
    return rows


def table(name: str, rows: list[str]) -> str:
    """A table as it stands in the page, between its marks."""
    return "\n".join((f"<!-- table: {name} -->", *HEADS[name], *rows, "<!-- end -->"))


def jsons_of(page: str) -> list[dict[str, Any]]:
    """Every json of the page in its order."""
    return [json.loads(block) for block in re.findall(r"```json\n(.+?)```", page, re.DOTALL)]


def algorithms_of(page: str) -> dict[str, dict[str, Any]]:
    """Algorithm -> its json, the first on the page that names it."""
    return {values["algo"]: values for values in reversed(jsons_of(page))}


def tables(page: str) -> dict[str, str]:
    """Every table of the page by its name, as it has to be."""
    jsons = algorithms_of(page)
    # LyCORIS copies the weights for it, of which a model without weights has none.
    jsons = {algo: jsons[algo] for algo in ALGORITHMS if algo != "full"}
    return {
        "layers": table("layers", layer_rows()),
        "algorithms": table("algorithms", algorithm_rows(jsons)),
    }


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    for name, right in tables(text).items():
        marks = re.compile(rf"<!-- table: {name} -->.*?<!-- end -->", re.DOTALL)
        text = marks.sub(right.replace("\\", r"\\"), text)
    PAGE.write_text(text, encoding="utf-8")
