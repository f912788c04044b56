"""Runs of a few steps on the tiny SDXL model: configuration files written as a user writes them."""

from __future__ import annotations

import functools
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from torch import Tensor

from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.models import registry
from simpletuner.helpers.models.sdxl.tiny import save_tiny_sdxl
from simpletuner.helpers.training.build import build_trainer
from simpletuner.helpers.training.trainer import Trainer
from tests.integration import processes
from tests.integration.processes import Running

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.sections import RunConfig

TLORA = {
    "algo": "tlora",
    "multiplier": 1.0,
    "linear_dim": 8,
    "linear_alpha": 8,
    "apply_preset": {"target_module": ["Attention"]},
    "tlora_min_rank": 2,
}


@functools.cache
def tiny_model() -> Path:
    """A tiny SDXL of 32 adapted layers in the diffusers layout, made once per process."""
    folder = Path(tempfile.mkdtemp(prefix="tiny_sdxl_"))
    save_tiny_sdxl(folder, depth=1)
    return folder


@functools.cache
def deep_model() -> Path:
    """The same with two transformer layers a block, for tests that name or count them."""
    folder = Path(tempfile.mkdtemp(prefix="deep_sdxl_"))
    save_tiny_sdxl(folder)
    return folder


@functools.cache
def common_caches() -> Path:
    """A folder for the caches of a process's runs; an entry's key says what it was encoded from."""
    return Path(tempfile.mkdtemp(prefix="caches_"))


@dataclass
class TinyRun:
    """A run in its own folder; keyword arguments are keys of config.json."""

    caches: ClassVar[Path | None] = None
    """Folder of the caches of every run; if None, each has them in its own."""

    folder: Path
    lycoris: dict[str, object] = field(default_factory=lambda: dict(TLORA))
    num_images: int = 3
    keys: dict[str, object] = field(default_factory=dict)
    entry: dict[str, object] = field(default_factory=dict)
    """The dataset's entry, if it is not the folder of images."""

    def __post_init__(self) -> None:
        images = self.folder / "images"
        images.mkdir(parents=True, exist_ok=True)
        for index in range(self.num_images):
            pixels = np.random.default_rng(index).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / f"image{index}.png")
            (images / f"image{index}.txt").write_text(f"picture number {index}")

    @property
    def output_dir(self) -> Path:
        """Where the run writes."""
        return self.folder / "output"

    def config(self, **overrides: object) -> RunConfig:
        """The configuration, from files in the run's folder."""
        caches = self.caches or self.folder / "cache"
        keys: dict[str, object] = {
            "model_family": "sdxl",
            "pretrained_model_name_or_path": str(tiny_model()),
            "lora_type": "lycoris",
            "lycoris_config": "lycoris.json",
            "data_backend_config": "data.json",
            "output_dir": str(self.output_dir),
            "cache_dir_vae": str(caches / "vae"),
            "cache_dir_text": str(caches / "text"),
            "resolution": 64,
            "mixed_precision": "no",
            "max_train_steps": 4,
            "learning_rate": 1e-3,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 2,
            "checkpoint_step_interval": 2,
            "validation_disable": True,
            "seed": 7,
            **self.keys,
            **overrides,
        }
        entry = self.entry or {"type": "local", "instance_data_dir": str(self.folder / "images")}
        (self.folder / "data.json").write_text(json.dumps([{"id": "pictures", **entry}]))
        (self.folder / "lycoris.json").write_text(json.dumps(self.lycoris))
        (self.folder / "config.json").write_text(json.dumps(keys))
        return load_config(self.folder / "config.json", families=registry.specs())

    @contextmanager
    def trainer(self, **overrides: object) -> Iterator[Trainer]:
        """A trainer of the run, closed afterwards."""
        reset_accelerate()
        trainer = build_trainer(self.config(**overrides))
        assert isinstance(trainer, Trainer)
        try:
            yield trainer
        finally:
            trainer.close()

    def run(self, **overrides: object) -> int:
        """Build and run, as the command does; the exit code."""
        reset_accelerate()
        return build_trainer(self.config(**overrides)).run()

    def log(self) -> list[dict[str, Any]]:
        """The lines of the local log, without times and memory, which differ from run to run."""
        lines = (self.output_dir / "metrics.jsonl").read_text().splitlines()
        measured = {"seconds", "memory_mib", "device_memory_mib"}
        return [
            {key: value for key, value in json.loads(line).items() if key not in measured} for line in lines
        ]


def reset_accelerate() -> None:
    """Forget the process-wide state that accelerate keeps from run to run."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def gradients(trainer: Trainer) -> list[Tensor]:
    """The adapter's gradients, and none left behind."""
    found = [parameter.grad for parameter in trainer.trainable.parameters()]
    for parameter in trainer.trainable.parameters():
        parameter.grad = None
    assert all(gradient is not None for gradient in found)
    return [gradient.clone() for gradient in found if gradient is not None]


COMMAND = """
import sys
from pathlib import Path
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.models import registry
from simpletuner.helpers.training.build import build_trainer
trainer = build_trainer(load_config(Path(sys.argv[1]), families=registry.specs()))
code = trainer.run()
if trainer.accelerator.is_main_process:
    print("digest", trainer.state_digest())
sys.exit(code)
"""


def start(run: TinyRun, **keys: object) -> Running:
    """The run as a process of its own."""
    return processes.start(_command(run, **keys), run.folder / "config.json")


def start_pair(run: TinyRun, **keys: object) -> list[Running]:
    """The run on two processes."""
    return processes.start_ranks(_command(run, **keys), run.folder / "config.json")


def _command(run: TinyRun, **keys: object) -> Path:
    run.config(**keys)
    script = run.folder / "command.py"
    script.write_text(COMMAND)
    return script


def wait_for_steps(run: TinyRun, steps: int, *, process: Running) -> None:
    """Return once the log has this many lines."""
    log = run.output_dir / "metrics.jsonl"
    while not log.exists() or log.read_text().count("\n") < steps:
        assert process.is_alive(), process.errors()
        time.sleep(0.005)
