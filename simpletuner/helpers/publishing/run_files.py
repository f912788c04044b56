"""Reads the output folder of a run for its model card and its upload; missing files are left out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from simpletuner.helpers.configuration.text.secrets import without_secrets
from simpletuner.helpers.errors import PublishError
from simpletuner.helpers.io.json_files import read_object
from simpletuner.helpers.io.redaction import hide_named
from simpletuner.helpers.io.run_folder import (
    ADAPTER_FILE,
    COMFYUI_FILE,
    CONFIG_FILE,
    EMA_ADAPTER_FILE,
    EMA_COMFYUI_FILE,
    EMA_EMBEDDING_FILE,
    EMA_FILES,
    EMA_FOLDER,
    EMBEDDING_FILE,
    GRID_FILE,
    RUN_MANIFEST_FILE,
    UPLOAD_FOLDER,
    VALIDATION_FOLDER,
    adapter_in,
    checkpoint_folder,
    checkpoint_folders,
    embedding_file,
    image_file,
    model_files,
    validation_step_folders,
)
from simpletuner.helpers.io.safetensors_file import read_metadata
from simpletuner.helpers.publishing.privacy import without_paths

UPLOADED_FILES = (*EMA_FILES.values(), *reversed(EMA_FILES))
"""Of a checkpoint, the adapter last: it marks the others as complete."""


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
    """Path in a repository -> adapter file of a checkpoint that waits for its upload."""
    model: str | None = None
    """Path of the folder of a whole model, of which `adapter` is a file; None for an adapter."""

    @property
    def comfyui(self) -> Path | None:
        """The export for ComfyUI, if there is one."""
        file = self.folder / COMFYUI_FILE
        return file if file.exists() else None

    @property
    def adapters(self) -> dict[str, Path]:
        """Path in a repository -> file: adapter, export and new token, those of the EMA, and what waits."""
        names = [COMFYUI_FILE, *([EMBEDDING_FILE] if self._has_token else [])]
        if self.config.get("use_ema"):
            names += [EMA_ADAPTER_FILE, EMA_COMFYUI_FILE, *([EMA_EMBEDDING_FILE] if self._has_token else [])]
        beside = {name: self.adapter.with_name(name) for name in names}
        where = PurePosixPath(self.adapter_name)
        found = {str(where.with_name(name)): file for name, file in beside.items() if file.exists()}
        return {self.adapter_name: self.adapter, **found, **self.checkpoints}

    @property
    def embedding(self) -> Path | None:
        """The file of the run's new token, if there is one; the adapter itself if it was trained alone."""
        file = embedding_file(self.adapter)
        return file if self._has_token and file.exists() else None

    @property
    def _has_token(self) -> bool:
        """Whether the run trained a new token; else such a file is of an earlier run in the folder."""
        return self.config.get("placeholder_token") is not None

    @property
    def embedding_name(self) -> str | None:
        """Path in a repository of the file of the run's new token."""
        file = self.embedding
        return None if file is None else str(PurePosixPath(self.adapter_name).with_name(file.name))

    @property
    def has_adapter(self) -> bool:
        """Whether there is an adapter, and not a whole model or a new token alone."""
        return self.model is None and self.adapter != self.embedding

    @property
    def ema_sentence(self) -> str:
        """Which file has the moving average of a run that keeps one, in Markdown; else empty."""
        if self.model is not None:
            return ""
        beside = EMA_FILES[self.adapter.name]
        if not self.config.get("use_ema") or not self.adapter.with_name(beside).exists():
            return ""
        files = self.adapter_name, str(PurePosixPath(self.adapter_name).with_name(beside))
        plain, average = reversed(files) if self.has_average_first else files
        return (
            f"`{plain}` has the weights after the last step, `{average}` their exponential moving average "
            f"(EMA) with decay {self.config.get('ema_decay')}."
        )

    @property
    def has_average_first(self) -> bool:
        """Whether the adapter file has the moving average, and the file beside it the trained weights."""
        return bool(self.config.get("use_ema")) and self.config.get("ema_adapter_file") == "main"

    @property
    def grids(self) -> dict[int, Path]:
        """Step -> grid of its validation images, oldest first."""
        folders = validation_step_folders(self.folder / VALIDATION_FOLDER)
        return {step: folder / GRID_FILE for step, folder in folders if (folder / GRID_FILE).exists()}

    @property
    def images(self) -> list[tuple[Mapping[str, Any], Path]]:
        """Prompt and image of the newest validation that has a grid, of the adapter file's weights."""
        if not self.grids:
            return []
        plain = list(self.grids.values())[-1].parent
        folders = [plain / EMA_FOLDER, plain] if self.has_average_first else [plain, plain / EMA_FOLDER]
        found = []
        for prompt in self.manifest.get("shots", []):
            files = (image_file(folder, str(prompt.get("name"))) for folder in folders)
            found += [(prompt, file) for file in files if file.exists()][:1]
        return found


def read_run(folder: Path) -> RunFiles:
    """Read an output folder.

    Raises:
        PublishError: It is no output folder of a run, or the run has saved no adapter.
    """
    config, manifest = (read_object(folder / name) for name in (CONFIG_FILE, RUN_MANIFEST_FILE))
    if not config:
        raise PublishError(f"{folder} holds no readable {CONFIG_FILE}. Give the output_dir of a run.")
    hide_named(json.dumps(config))  # the paths of the run hold the values
    main = EMBEDDING_FILE if config.get("model_type") == "embedding" else ADAPTER_FILE
    mains = [each for each in waiting_adapters(folder) if each.name == main]
    waiting = {
        _in_repository(adapter.with_name(name)): adapter.with_name(name)
        for adapter in mains
        for name in UPLOADED_FILES
        if adapter.with_name(name).exists()
    }
    saved = [file for _, path in reversed(checkpoint_folders(folder)) if (file := path / main).is_file()]
    newest = {_in_repository(path): path for path in (*saved, *reversed(mains))}
    candidates = {main: folder / main} if (folder / main).is_file() else newest
    folders = [folder, *(path for _, path in reversed(checkpoint_folders(folder)))]
    models = [files[0] for each in folders if (files := model_files(each))]
    if models:
        candidates = {models[0].parent.relative_to(folder).as_posix(): models[0]}
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
        model=name if models else None,
    )


def waiting_folder(folder: Path, step: int) -> Path:
    """Where the adapter of a checkpoint waits for its upload, so that the checkpoint may be removed."""
    return checkpoint_folder(folder / UPLOAD_FOLDER, step)


def waiting_adapters(folder: Path) -> list[Path]:
    """The adapters of checkpoints that wait for their upload, oldest first."""
    folders = checkpoint_folders(folder / UPLOAD_FOLDER)
    return [*filter(None, (adapter_in(path) for _, path in folders))]


def _in_repository(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
