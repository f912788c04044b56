"""The adapter file that a user means: the file itself, or the folder of a run or checkpoint."""

from __future__ import annotations

from pathlib import Path

from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.io.paths import portable
from simpletuner.helpers.io.run_folder import ADAPTER_FILE, adapter_in, checkpoint_folders, model_files

CONFIG = "config.json"
"""Of a model in diffusers' layout."""
RUNS = Path("output")
"""A run's folder is found by its name below this one too."""


def find_adapter(path: Path) -> Path:
    """The adapter of a folder: a finished run's, else that of its newest checkpoint.

    Raises:
        AdapterError: There is no such file or folder, or the folder has no adapter.
    """
    path = portable(path)
    if path.is_file():
        return path
    folder = path if path.is_dir() else RUNS / path
    if not folder.is_dir():
        raise AdapterError(f"{path}: no such file. Give an adapter file, or the folder or name of a run.")
    checkpoints = [checkpoint for _, checkpoint in reversed(checkpoint_folders(folder))]
    for candidate in (folder, *checkpoints):
        if (file := adapter_in(candidate)) is not None:
            return file
    if find_model(folder) is not None:
        raise AdapterError(
            f"{folder}: this is a whole model and no adapter. simpletuner sample and export take it; here "
            "give an adapter file, or the output_dir of a run that trained one."
        )
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return others[0]
    found = f" It has {', '.join(file.name for file in others[:5])}: name one." if others else ""
    raise AdapterError(
        f"{folder}: this folder has no {ADAPTER_FILE}, and no checkpoint with one.{found} Give an adapter "
        "file, or the output_dir of a run."
    )


def find_model(path: Path) -> Path | None:
    """The denoiser's folder of a run of model_type full, or of its newest checkpoint; None for anything else.

    A denoiser's folder itself is found too.
    """
    path = portable(path)
    folder = path if path.is_dir() else RUNS / path
    if path.is_file() or not folder.is_dir():
        return None
    if (folder / CONFIG).is_file() and any(folder.glob("*.safetensors")):
        return folder
    checkpoints = [checkpoint for _, checkpoint in reversed(checkpoint_folders(folder))]
    found = (model_files(candidate) for candidate in (folder, *checkpoints))
    return next((files[0].parent for files in found if files), None)
