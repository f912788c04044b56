"""The end of a run: its adapter, the ComfyUI export and the summary in the output folder."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from simpletuner.helpers.adapters.files import comfyui, embeddings
from simpletuner.helpers.adapters.files.export import ExportOptions, export_adapter
from simpletuner.helpers.io.atomic import write_bytes
from simpletuner.helpers.io.faults import storage_error
from simpletuner.helpers.io.names import counted
from simpletuner.helpers.io.run_folder import (
    COMFYUI_FILE,
    COMFYUI_FILES,
    CONFIG_FILE,
    METRICS_FILE,
    TENSORBOARD_FOLDER,
    WANDB_FOLDER,
    checkpoint_folder,
    embedding_file,
)
from simpletuner.helpers.publishing.card import write_card
from simpletuner.helpers.reporting.evaluations import lowest_held_out
from simpletuner.helpers.reporting.run_summary import RunSummary

if TYPE_CHECKING:
    from simpletuner.helpers.checkpointing.state import RunState
    from simpletuner.helpers.contracts import ModelSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class FinalFiles:
    """Writes the files of a finished run."""

    output_dir: Path
    state: RunState
    is_main_process: bool
    spec: ModelSpec
    exports_to_comfyui: bool = False

    def save_weights(self) -> None:
        """Write the adapter files and their exports, or the folders of a whole model.

        Every process calls it, to gather sharded weights.
        """
        if self.is_main_process:
            for file in self.state.save_weights(self.output_dir):
                if self.exports_to_comfyui:
                    _export(file, self.spec)
        elif self.state.is_sharded:
            with TemporaryDirectory() as scratch:
                self.state.save_weights(Path(scratch))

    def save_summary(self, *, grid: Path, page: Path | None) -> None:
        """Mark the run as finished, and log the paths of its files."""
        if not self.is_main_process:
            return
        step, ema = self.state.progress.step, self.state.ema
        main, second = (str(self.output_dir / name) for name in self.state.trainable.file_names)
        is_model = self.state.trainable.is_model
        exported = self.output_dir / COMFYUI_FILE if self.exports_to_comfyui else None
        has_token = embeddings.TOKEN_KEY in self.state.metadata  # else a file is of an earlier run
        embedding = embedding_file(Path(main))
        summary = RunSummary(
            step=step,
            adapter=main,
            model=Path(main).name if is_model else None,
            checkpoint=str(checkpoint_folder(self.output_dir, step)),
            metrics=str(self.output_dir / METRICS_FILE),
            config=str(self.output_dir / CONFIG_FILE),
            grid=str(grid) if grid.exists() else None,
            comfyui=None if exported is None else str(exported),
            comfyui_advice=(
                f"after simpletuner export {main} --output model.safetensors"
                if is_model
                else comfyui.advice_for(Path(main), exported=exported)
            ),
            page=None if page is None else str(page),
            card=self._save_card(),
            held_out=lowest_held_out(self.output_dir),
            ema=second if ema is not None and not ema.is_main else None,
            plain=second if ema is not None and ema.is_main else None,
            embedding=str(embedding) if has_token and embedding != Path(main) else None,
            trackers={
                name: str(folder)
                for name in (TENSORBOARD_FOLDER, WANDB_FOLDER)
                if (folder := self.output_dir / name).is_dir()
            },
        )
        summary.sealed(self.output_dir).save(self.output_dir)
        logger.info("Finished %s.", counted(step, "step"))
        summary.show()

    def _save_card(self) -> str | None:
        """Write the model card; None when that failed."""
        try:
            return str(write_card(self.output_dir, families={self.spec.name: self.spec}))
        except Exception as error:  # noqa: BLE001 - named boundary: a card must never end a run
            logger.warning("The model card was not written: %s: %s", type(error).__name__, error)
            return None


def restore_damaged(summary: RunSummary, output_dir: Path, *, checkpoint: Path, spec: ModelSpec) -> None:
    """Write the adapter files of a finished run again from its last checkpoint if they are damaged or gone.

    Raises:
        StorageError: The checkpoint cannot be read, or a file not written.
    """
    damage = summary.damage(output_dir)
    if not damage:
        return
    if summary.model is not None:
        logger.warning(
            "%s: %s. %s has the trained weights: copy that folder.",
            output_dir,
            "; ".join(damage),
            checkpoint / summary.model,
        )
        return
    for name in summary.adapter_files:
        stored = checkpoint / name
        try:
            write_bytes(output_dir / name, stored.read_bytes())
        except OSError as error:
            raise storage_error(stored, error) from error
        if summary.comfyui is not None and name in COMFYUI_FILES:
            _export(output_dir / name, spec)
    summary.sealed(output_dir).save(output_dir)
    logger.warning("%s: %s. Written again from %s.", output_dir, "; ".join(damage), checkpoint.name)


def _export(adapter: Path, spec: ModelSpec) -> None:
    options, families = ExportOptions(layout="comfyui"), {spec.name: spec}
    export_adapter(adapter, adapter.with_name(COMFYUI_FILES[adapter.name]), options, families=families)
