"""What differs between a checkpoint and the run that goes on from it: logged, and written for the report."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.helpers.configuration.schema.compiling import CompileConfig
from simpletuner.helpers.configuration.schema.evaluation import EvaluationConfig
from simpletuner.helpers.configuration.schema.sections import (
    CheckpointConfig,
    ValidationConfig,
)
from simpletuner.helpers.configuration.schema.tracking import TrackingConfig
from simpletuner.helpers.io.atomic import JsonValue, write_json
from simpletuner.helpers.io.json_files import read_object
from simpletuner.helpers.io.redaction import redacted
from simpletuner.helpers.io.run_folder import CHANGES_FILE, COMPATIBILITY_FILE, CONFIG_FILE

if TYPE_CHECKING:
    from simpletuner.helpers.checkpointing.checkpoints import Checkpoint
    from simpletuner.helpers.configuration.schema.sections import RunConfig

logger = logging.getLogger(__name__)

DATA_PART = "data"
"""Part of a checkpoint's compatibility file that may change; see `TrainingData.facts`, `hidden_facts`."""
_EVALUATED = {"num_eval_images", "eval_timesteps", "eval_dataset_id"}
"""Evaluations before and after a change of these measure something else."""
# Without effect on training, or refused on resume when they differ.
_IGNORED = {
    *CheckpointConfig.model_fields,
    *(EvaluationConfig.model_fields.keys() - _EVALUATED),
    *CompileConfig.model_fields,
    *TrackingConfig.model_fields,
    *ValidationConfig.model_fields,
    "cache_dir_text",
    "cache_dir_vae",
    "ema_adapter_file",
    "ema_validation",
    "lycoris_config",
    "text_encoder_batch_size",
    "vae_batch_size",
}
_DATASETS = "data_backend_config"

Values = Mapping[str, JsonValue]


def record_changes(output_dir: Path, resumed: Checkpoint | None, *, resolved: Values, data: Values) -> None:
    """Log what changed since the checkpoint, one line a key, and note it at its step for the report.

    Args:
        output_dir: Of the run.
        resumed: The checkpoint that the run goes on from; None at step 0.
        resolved: The configuration, as in the checkpoint's CONFIG_FILE.
        data: The training data and the hidden settings, as in the DATA_PART of its COMPATIBILITY_FILE.

    Raises:
        StorageError: The file cannot be written.
    """
    step = 0 if resumed is None else resumed.step
    earlier = [each for each in load_changes(output_dir) if each["step"] < step]
    lines = [] if resumed is None else changes_since(resumed, resolved=resolved, data=data)
    for line in lines:
        logger.warning("Changed since step %d: %s", step, line)
    new: list[dict[str, Any]] = [{"step": step, "changes": lines}] if lines else []
    if earlier or new or (output_dir / CHANGES_FILE).exists():
        write_json(output_dir / CHANGES_FILE, [*earlier, *new])


def hidden_facts(config: RunConfig) -> Values:
    """A digest of each setting that holds the value of an environment variable, to find changes by."""
    return {
        f"{redacted(key)}, digest": hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        for key, value in _flat(config.filled())
        if (text := json.dumps(value)) != redacted(text)
    }


def changes_since(checkpoint: Checkpoint, *, resolved: Values, data: Values) -> list[str]:
    """One line for each key that differs; keys that earlier versions did not save are left out."""
    saved_data = read_object(checkpoint.path / COMPATIBILITY_FILE).get(DATA_PART, {})
    saved = {**dict(_flat(read_object(checkpoint.path / CONFIG_FILE))), **saved_data}
    now = {**dict(_flat(json.loads(json.dumps(resolved)))), **data}
    return [
        f"{key}: {_shown(saved[key])} before, {_shown(now[key])} now"
        for key in sorted(saved.keys() & now.keys())
        if saved[key] != now[key]
    ]


def load_changes(output_dir: Path) -> list[dict[str, Any]]:
    """{"step", "changes"} of each start that changed something, by step; [] for a missing or damaged file."""
    try:
        content = json.loads((output_dir / CHANGES_FILE).read_bytes())
        return [{"step": int(each["step"]), "changes": list(map(str, each["changes"]))} for each in content]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _flat(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(key, value) of what has an effect on training; keys of a dataset follow its id."""
    for key, value in config.items():
        if key == _DATASETS and isinstance(value, list):
            for dataset in value:
                owner = f"dataset {dataset.get('id')}"
                yield from (
                    (f"{owner}, {name}", each) for name, each in dataset.items() if name not in _IGNORED
                )
        elif key not in _IGNORED:
            yield key, value


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)[:200]
