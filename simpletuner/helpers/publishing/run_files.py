"""Reads the output folder of a run for its model card and its upload; missing files are left out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.helpers.configuration.text.secrets import without_secrets
from simpletuner.helpers.errors import PublishError
from simpletuner.helpers.io.redaction import hide_named
from simpletuner.helpers.io.run_folder import (
    ADAPTER_FILE,
    COMFYUI_FILE,
    CONFIG_FILE,
    GRID_FILE,
    RUN_MANIFEST_FILE,
    UPLOAD_FOLDER,
    VALIDATION_FOLDER,
    checkpoint_folder,
    checkpoint_folders,
    image_file,
    validation_step_folders,
)
from simpletuner.helpers.io.safetensors_file import read_metadata
from simpletuner.helpers.publishing.privacy import without_paths


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFiles:
    """What an output folder holds for people elsewhere: no path, no access token."""

    folder: Path
    config: Mapping[str, Any]
    """The resolved configuration; names in place of paths."""
    manifest: Mapping[str, Any]
    """The content of run.json; empty for runs of earlier versions."""
    adapter: Path
    """The final adapter, else that of the newest checkpoint."""
    adapter_name: str
    """Path of the adapter in a repository."""
    header: Mapping[str, str]
    """The texts in the adapter's header; names in place of paths."""
    checkpoints: Mapping[str, Path]
    """Path in a repository -> adapter of a checkpoint that waits for its upload."""

    @property
    def comfyui(self) -> Path | None:
        """The export for ComfyUI, if there is one."""
        file = self.folder / COMFYUI_FILE
        return file if file.exists() else None

    @property
    def grids(self) -> dict[int, Path]:
        """Step -> grid of its validation images, oldest first."""
        folders = validation_step_folders(self.folder / VALIDATION_FOLDER)
        return {step: folder / GRID_FILE for step, folder in folders if (folder / GRID_FILE).exists()}

    @property
    def images(self) -> list[tuple[Mapping[str, Any], Path]]:
        """Prompt and image of the newest validation that has a grid."""
        if not self.grids:
            return []
        folder = list(self.grids.values())[-1].parent
        files = [(each, image_file(folder, str(each.get("name")))) for each in self.manifest.get("shots", [])]
        return [(prompt, file) for prompt, file in files if file.exists()]


def read_run(folder: Path) -> RunFiles:
    """Read an output folder.

    Raises:
        PublishError: It is no output folder of a run, or the run has saved no adapter.
    """
    config, manifest = (_json(folder / name) for name in (CONFIG_FILE, RUN_MANIFEST_FILE))
    if not config:
        raise PublishError(f"{folder} holds no readable {CONFIG_FILE}. Give the output_dir of a run.")
    hide_named(json.dumps(config))  # the paths of the run hold the values
    waiting = {_in_repository(path): path for path in waiting_adapters(folder)}
    saved = [(step, path / ADAPTER_FILE) for step, path in checkpoint_folders(folder)]
    newest = {_name(step): path for step, path in saved if path.exists()}
    adapters = {ADAPTER_FILE: folder / ADAPTER_FILE} if (folder / ADAPTER_FILE).exists() else {}
    candidates = adapters or dict(reversed(newest.items())) or dict(reversed(waiting.items()))
    if not candidates:
        raise PublishError(f"{folder} holds no adapter yet: neither {ADAPTER_FILE} nor a checkpoint.")
    name, adapter = next(iter(candidates.items()))
    return RunFiles(
        folder=folder,
        config=without_paths(without_secrets(config)),
        manifest=without_paths(without_secrets(manifest)),
        adapter=adapter,
        adapter_name=name,
        header=without_paths(read_metadata(adapter, error=PublishError)),
        checkpoints=waiting,
    )


def waiting_folder(folder: Path, step: int) -> Path:
    """Where the adapter of a checkpoint waits for its upload, so that the checkpoint may be removed."""
    return folder / UPLOAD_FOLDER / str(Path(_name(step)).parent)


def waiting_adapters(folder: Path) -> list[Path]:
    """The adapters of checkpoints that wait for their upload, oldest first."""
    folders = checkpoint_folders(folder / UPLOAD_FOLDER)
    return [path / ADAPTER_FILE for _, path in folders if (path / ADAPTER_FILE).exists()]


def _in_repository(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _name(step: int) -> str:
    return f"{checkpoint_folder(Path(), step)}/{ADAPTER_FILE}"


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
