"""What `simpletuner compare` compares: the checkpoints of runs, single checkpoints, adapter files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from simpletuner.helpers.adapters.files.finding import RUNS, find_model
from simpletuner.helpers.checkpointing.checkpoints import current_checkpoints
from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.io.json_files import read_object
from simpletuner.helpers.io.paths import portable
from simpletuner.helpers.io.run_folder import (
    ADAPTER_FILE,
    CONFIG_FILE,
    RUN_MANIFEST_FILE,
    SUMMARY_FILE,
    adapter_in,
    checkpoint_folders,
    model_files,
)

SETTINGS = (
    "validation_negative_prompt",
    "validation_resolution",
    "validation_num_inference_steps",
    "validation_guidance",
    "validation_guidance_real",
    "validation_guidance_rescale",
    "validation_no_cfg_until_timestep",
    "num_validation_images",
    "validation_noise_scheduler",
    "validation_reference_images",
)
"""Keys of a run's configuration that its images are compared with."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One adapter file, or a whole model."""

    file: Path
    """The file; or the folder of a whole denoiser."""
    run: Path | None = None
    """The output_dir of its run, if it stands in one."""
    step: int | None = None
    """Optimiser steps before it, if they are known."""
    name: str = ""
    """Of the run or the file, unique among those of other runs."""

    @property
    def title(self) -> str:
        """Name and step."""
        return self.name if self.step is None else f"{self.name}, step {self.step:,}"


def find_contenders(paths: Iterable[Path], *, newest: int | None = None) -> list[Contender]:
    """The contenders of every argument, each once, in their order.

    Args:
        paths: Output folders or names of runs, checkpoints, adapter files or folders of these.
        newest: Number of checkpoints of each run, the newest; None for all.

    Raises:
        AdapterError: A path does not exist, or has no adapter.
    """
    found: dict[Path, Contender] = {}
    for path in paths:
        for each in _of_path(portable(path), newest=newest):
            found.setdefault(each.file.resolve(), each)
    return _named(list(found.values()))


def validation_settings(run: Path) -> dict[str, object]:
    """Keys of the validation section by a run's configuration; empty if that is gone."""
    config = read_object(run / CONFIG_FILE)
    values = {key: config[key] for key in SETTINGS if config.get(key) not in (None, [])}
    seed = config.get("validation_seed")
    if seed is None:
        seed = config.get("seed")
    return values if seed is None else values | {"validation_seed": seed}


def run_prompts(run: Path) -> list[str]:
    """The distinct prompts of a run's validation images; empty if its files are gone."""
    images = read_object(run / RUN_MANIFEST_FILE).get("shots")
    found = (
        [each.get("prompt") for each in images if isinstance(each, dict)] if isinstance(images, list) else []
    )
    return [*dict.fromkeys(prompt for prompt in found if isinstance(prompt, str) and prompt)]


def _of_path(path: Path, *, newest: int | None) -> list[Contender]:
    if path.is_file():
        return [_placed(path, path.parent)]
    folder = path if path.is_dir() else RUNS / path
    if not folder.is_dir():
        raise AdapterError(f"{path}: no such file. Give the folder or name of a run, or an adapter file.")
    is_one = folder in dict(checkpoint_folders(folder.parent)).values() or _is_denoiser(folder)
    if is_one and (found := _weights(folder)) is not None:
        return [_placed(found, folder)]
    contenders = [] if is_one else _of_run(folder)
    if contenders:
        return contenders if newest is None else contenders[-newest:]
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return [Contender(file, name=f"{folder.name}/{file.stem}") for file in files]
    state = " It has no checkpoint yet." if (folder / CONFIG_FILE).exists() else ""
    raise AdapterError(
        f"{folder}: no {ADAPTER_FILE}, no checkpoint with one and no other .safetensors.{state} Give the "
        "output_dir of a run, or an adapter file."
    )


def _of_run(folder: Path) -> list[Contender]:
    """The checkpoints of a run, oldest first, then its final weights where no checkpoint has their step."""
    is_token = read_object(folder / CONFIG_FILE).get("model_type") == "embedding"
    checkpoints: list[tuple[Path, int | None]] = [
        (each.path, each.step) for each in reversed(current_checkpoints(folder))
    ]
    last = _finished_step(folder)
    if last not in {step for _, step in checkpoints}:
        checkpoints.append((folder, last))
    return [
        Contender(found, run=folder, step=step)
        for each, step in checkpoints
        if (found := _weights(each, is_token=is_token)) is not None
    ]


def _weights(folder: Path, *, is_token: bool = False) -> Path | None:
    if (file := adapter_in(folder, is_token=is_token)) is not None:
        return file
    if _is_denoiser(folder):
        return folder
    weights = model_files(folder)
    return weights[0].parent if weights else None


def _is_denoiser(folder: Path) -> bool:
    return find_model(folder) == folder


def _placed(file: Path, folder: Path) -> Contender:
    """A contender with the run that it stands in."""
    steps = {each: step for step, each in checkpoint_folders(folder.parent)}
    if folder in steps:
        return Contender(file, run=folder.parent, step=steps[folder])
    if (folder / CONFIG_FILE).exists() and file.name == ADAPTER_FILE:
        return Contender(file, run=folder, step=_finished_step(folder))
    return Contender(file, name=file.stem)


def _finished_step(run: Path) -> int | None:
    step = read_object(run / SUMMARY_FILE).get("step")
    return step if isinstance(step, int) else None


def _named(contenders: list[Contender]) -> list[Contender]:
    """With the names of their runs: of the folder, or its path where two runs have one name."""
    runs = {each.run.resolve(): each.run for each in contenders if each.run is not None}
    names = [folder.name for folder in runs]
    return [
        each
        if each.run is None
        else replace(
            each,
            name=each.run.resolve().name if names.count(each.run.resolve().name) == 1 else str(each.run),
        )
        for each in contenders
    ]
