"""Uploads what an output folder has and its repository on the hub has not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from simpletuner.helpers.configuration.schema.values import hub_repository
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.errors import ConfigError, PublishError
from simpletuner.helpers.io.atomic import file_entry, link_or_copy, write_bytes, write_json
from simpletuner.helpers.io.lock import run_lock
from simpletuner.helpers.io.names import counted
from simpletuner.helpers.io.redaction import PLACEHOLDER
from simpletuner.helpers.io.run_folder import (
    CARD_FILE,
    CARD_FOLDER,
    CONFIG_FILE,
    LYCORIS_FILE,
    UPLOAD_FOLDER,
    grid_name,
)
from simpletuner.helpers.io.safetensors_file import read_metadata, with_metadata
from simpletuner.helpers.publishing import hub
from simpletuner.helpers.publishing.card import card_images, write_card
from simpletuner.helpers.publishing.privacy import without_paths
from simpletuner.helpers.publishing.run_files import RunFiles, read_run
from simpletuner.helpers.publishing.state import Uploaded, load_uploaded, note_repository

DEFAULT_NAME = "simpletuner"
SCRATCH_PREFIX = "upload-"
BUSY_REMEDY = "Wait for that upload to end."


@dataclass(frozen=True, slots=True)
class Published:
    """The outcome of an upload."""

    address: str
    files: tuple[str, ...]
    """Paths in the repository of the files that were uploaded; none if it had all of them."""

    def summary(self) -> str:
        """One line for people."""
        if not self.files:
            return f"Nothing to upload: {self.address} has every file."
        return f"Uploaded {counted(len(self.files), 'file')} to {self.address}: {', '.join(self.files)}."


def publish(
    folder: Path,
    *,
    families: Mapping[str, ModelSpec],
    repository: str | None = None,
    public: bool = False,
) -> Published:
    """Upload the adapter of a run, its model card, its settings and its grids, as far as they are missing.

    Args:
        folder: The output folder; its hub folder keeps what was uploaded.
        families: Name -> spec of every model family.
        repository: owner/name, or name; default: the run's hub_model_id, the repository of the last upload,
            or the run's tracker_project_name.
        public: Allow a public repository, and create a new one public; default: the run's model_card_private.

    Raises:
        ConfigError: There is no valid login, it may not write there, or the repository is public against
            model_card_private.
        PublishError: The folder has nothing to upload, or the hub cannot be reached or fails.
        StorageError: Another process uploads this folder, or a file cannot be written.
    """
    # Before anything is made in a folder that is none of a run.
    if read_run(folder).model is not None:
        raise PublishError(
            f"{folder} holds a whole model, which is not uploaded here. Upload it with hf upload, the model "
            f"card of {CARD_FOLDER} too."
        )
    if hub.is_offline():
        raise PublishError("HF_HUB_OFFLINE is set, so nothing is uploaded. Unset it and try again.")
    with run_lock(folder / UPLOAD_FOLDER, remedy=BUSY_REMEDY):
        run, uploaded = read_run(folder), load_uploaded(folder)
        for leftover in (folder / UPLOAD_FOLDER).glob(f"{SCRATCH_PREFIX}*"):
            shutil.rmtree(leftover)  # of an upload that was killed
        name = repository_of(run, given=repository, last=uploaded.last)
        is_private = not public and bool(run.config.get("model_card_private", True))
        opened = hub.with_retries(lambda: hub.open_repository(name, private=is_private))
        note_repository(opened, uploaded)
        card = write_card(folder, families=families, repository=opened.name)
        with TemporaryDirectory(dir=folder / UPLOAD_FOLDER, prefix=SCRATCH_PREFIX) as scratch:
            return _upload(run, card, opened, uploaded=uploaded, scratch=Path(scratch))


def repository_of(run: RunFiles, *, given: str | None, last: str | None) -> str:
    """The name of a run's repository.

    Raises:
        ConfigError: It is no name of a repository.
    """
    name = given or _configured(run) or last or run.config.get("tracker_project_name") or DEFAULT_NAME
    try:
        return str(hub_repository(str(name)))
    except ValueError as error:
        raise ConfigError(f"The repository {name} {error} Give another with --repo.") from error


def _configured(run: RunFiles) -> str:
    """hub_model_id of the run, with the values of environment variables in place of their placeholders."""
    written = str(run.config.get("hub_model_id") or "")
    missing = [name for name in PLACEHOLDER.findall(written) if name not in os.environ]
    if missing:
        raise ConfigError(
            f"hub_model_id is {written}, and the environment variable {missing[0]} is not set. Set it, or "
            "give the repository with --repo."
        )
    return PLACEHOLDER.sub(lambda match: os.environ[match[1]], written)


def files_of(run: RunFiles, card: Path, *, scratch: Path) -> dict[str, Path]:
    """Path in the repository -> file to upload, which stays as it is while the run goes on.

    Raises:
        PublishError: An adapter is no safetensors file.
        StorageError: A file cannot be written.
    """
    adapters = run.adapters
    images = {name: card.parent / name for name in card_images(run)}
    sources = {CARD_FILE: card} | {name: image for name, image in images.items() if image.exists()}
    sources |= {grid_name(step): grid for step, grid in run.grids.items()}
    for name, source in {**adapters, **sources}.items():
        link_or_copy(source, scratch / name)
    for name in adapters:
        _without_paths(scratch / name)
    write_json(scratch / CONFIG_FILE, run.config)
    names = [*adapters, *sources, CONFIG_FILE]
    if isinstance(lycoris := run.config.get("lycoris_config"), Mapping):
        write_json(scratch / LYCORIS_FILE, lycoris)
        names.append(LYCORIS_FILE)
    return {name: scratch / name for name in names}


def _upload(
    run: RunFiles, card: Path, repository: hub.Repository, *, uploaded: Uploaded, scratch: Path
) -> Published:
    files = files_of(run, card, scratch=scratch)
    digests = {name: str(file_entry(file)["sha256"]) for name, file in files.items()}
    missing = uploaded.missing(repository.name, digests)
    if missing:
        message = f"Adapter after {run.header.get('steps', 'unknown')} steps"
        hub.with_retries(
            lambda: hub.commit(repository, {name: files[name] for name in missing}, message=message)
        )
        uploaded.add(repository.name, {name: digests[name] for name in missing})
    for folder in {waiting.parent for waiting in run.checkpoints.values()}:
        shutil.rmtree(folder)
    return Published(repository.address, tuple(missing))


def _without_paths(file: Path) -> None:
    """Replace the paths in the header of an adapter file by names."""
    metadata = read_metadata(file, error=PublishError)
    private = without_paths(metadata)
    if private != metadata:
        write_bytes(file, with_metadata(file, private, error=PublishError))
