"""SimpleTuner's own files: config.json, config.env, config.toml and exports of its web page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import JsonValue

from simpletuner.helpers.configuration.migration.draft import Draft
from simpletuner.helpers.configuration.migration.paths import Place
from simpletuner.helpers.configuration.simpletuner_run import translate_run
from simpletuner.helpers.contracts import ModelSpec

PROGRAM = "SimpleTuner"
FILES = ("config.json", "config.toml", "config.env")
"""In a folder of SimpleTuner's, in the order in which they count."""
_SIGNS = ("model_family", "data_backend_config", "lora_type")
_INPUTS = ("user_prompt_library", "init_lora", "validation_compared_config")


def is_simpletuner(content: Mapping[str, JsonValue]) -> bool:
    """Whether an object is a configuration of SimpleTuner."""
    inner = content.get("config")
    keys = inner if isinstance(inner, dict) and "_metadata" in content else content
    return any(key.removeprefix("--") in _SIGNS for key in keys)


def read_simpletuner(path: Path, place: Place, specs: Mapping[str, ModelSpec]) -> Draft:
    """The configuration of a run of SimpleTuner.

    Raises:
        ConfigError: A file cannot be read, or is not of its form.
    """
    run = translate_run(path, families=specs)
    draft = Draft(PROGRAM)
    draft.config.update(run.config)
    draft.datasets.extend(run.datasets)
    if run.lycoris is not None:
        draft.set_lycoris(run.lycoris)
    draft.decisions.extend(run.decisions)
    for values, keys in (
        (draft.config, _INPUTS),
        *((entry, ("instance_data_dir",)) for entry in draft.datasets),
    ):
        for key in keys:
            if isinstance(values.get(key), str):
                values[key] = place.path(str(values[key]))
    return draft
