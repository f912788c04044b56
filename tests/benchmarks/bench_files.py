"""B5: load, save and export an adapter file of about 500 MB against reading its bytes.

python tests/benchmarks/bench_files.py [--quick]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from measure import arguments, report, side_by_side

from simpletuner.helpers.adapters.files.export import ExportOptions, export_adapter
from simpletuner.helpers.adapters.network import LycorisAdapter, load_adapter
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig
from simpletuner.helpers.models import registry
from simpletuner.helpers.models.sdxl.spec import SPEC

WIDTH, RANK, LAYERS = 1280, 64, 380


class Attention(nn.Module):
    """Named as SDXL's, so that the preset finds it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)


def main() -> None:
    """Make the file, then time each way to use it."""
    options = arguments(__doc__)
    width, rank, layers = (32, 4, 4) if options.quick else (WIDTH, RANK, LAYERS)
    options.turns = min(options.turns, 5)
    torch.manual_seed(0)
    model = nn.ModuleList(Attention(width) for _ in range(layers)).requires_grad_(False).eval()
    preset = {"target_module": ["Attention"]}
    values = {"algo": "tlora", "multiplier": 1.0, "linear_dim": rank, "linear_alpha": rank}
    config = LycorisConfig.model_validate(values | {"apply_preset": preset})
    with tempfile.TemporaryDirectory() as folder:
        file, output = Path(folder) / "adapter.safetensors", Path(folder) / "export.safetensors"
        adapter = LycorisAdapter.create(model, config, spec=SPEC, seed=0)
        adapter.save(file, metadata={"model_family": SPEC.name})
        adapter.detach()

        def load() -> None:
            load_adapter(model, file).detach()

        def save() -> None:
            adapter.save(output, metadata={})

        def export() -> None:
            export_adapter(file, output, ExportOptions(), families=registry.specs())

        contenders = {
            "read and check every value": lambda: [t.isfinite().all() for t in load_file(file).values()],
            "load_adapter": load,
            "save": save,
            "export, diffusers": export,
        }
        case = f"{file.stat().st_size / 1e6:.0f} MB, {layers} layers"
        device = torch.device("cpu")
        report(side_by_side("B5", case, contenders, turns=options.turns, device=device), options)


if __name__ == "__main__":
    main()
