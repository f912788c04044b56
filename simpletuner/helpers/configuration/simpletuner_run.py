"""The files of a SimpleTuner run in the names of this program, with a decision for every key."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import JsonValue

from simpletuner.helpers.choices.precisions import PRECISIONS, UNCHANGED
from simpletuner.helpers.configuration.load import KEYS, display
from simpletuner.helpers.configuration.loading.config_forms import read_config
from simpletuner.helpers.configuration.loading.dataset_file import translate_entry
from simpletuner.helpers.configuration.loading.known_values import UNSUPPORTED_VALUES
from simpletuner.helpers.configuration.loading.layers import merge_layers
from simpletuner.helpers.configuration.loading.lycoris_file import complete_lycoris
from simpletuner.helpers.configuration.schema.base import PathContext
from simpletuner.helpers.configuration.text.decisions import Decision
from simpletuner.helpers.configuration.text.placeholders import Environment
from simpletuner.helpers.configuration.text.problems import Problems
from simpletuner.helpers.configuration.text.reading import read_json
from simpletuner.helpers.contracts import ModelSpec

_DATASETS, _LYCORIS = "data_backend_config", "lycoris_config"


@dataclass(frozen=True)
class TranslatedRun:
    """A SimpleTuner run in our names; `not translated` decisions name the keys that were left out."""

    config: dict[str, JsonValue]
    """config.json, without data_backend_config and lycoris_config."""
    datasets: list[dict[str, JsonValue]]
    """The dataset json; empty if there is none."""
    lycoris: dict[str, JsonValue] | None
    """The lycoris json; None if there is none."""
    decisions: tuple[Decision, ...]
    """One for every key of the three files, and for what was added."""


def translate_run(path: Path, *, families: Mapping[str, ModelSpec]) -> TranslatedRun:
    """Translate a config.json, config.env, config.toml or Web-UI export, and the files that it names.

    Args:
        path: The file.
        families: Name -> spec of every model family.

    Raises:
        ConfigError: A file cannot be read, or is not of its form.
    """
    problems = Problems()
    source = display(path)
    content, decisions = read_config(path, source=source, problems=problems)
    if not isinstance(content, dict) and not len(problems):
        problems.add(source, "", "must hold an object, {...}.")
    problems.raise_if_any()
    assert isinstance(content, dict), "a problem was raised otherwise"
    # What cannot be translated stands in the decisions; placeholders stay as they are written.
    environment = Environment({}, Problems())
    layers = merge_layers(content, (), KEYS, file=source, environment=environment, families=families)
    config = {key: raw.value for key, raw in layers.raw.items()}
    decisions += layers.decisions
    decisions += _refused_values(config)
    context = PathContext(config_folder=Path(os.path.abspath(path)).parent)
    names = {key: str(config.get(key, "")) for key in ("model_family", "output_dir")}
    files = {
        key: _content(config.pop(key, None), replace(context, names=names), problems)
        for key in (_DATASETS, _LYCORIS)
    }
    problems.raise_if_any()
    datasets: list[dict[str, JsonValue]] = []
    entries = files[_DATASETS]
    for index, entry in enumerate(entries if isinstance(entries, list) else ()):
        if isinstance(entry, dict):
            values, found = translate_entry(entry, prefix=f"{entry.get('id', index)}.", inherited=config)
            datasets.append(values)
            decisions += found
    lycoris = files[_LYCORIS]
    if isinstance(lycoris, dict):
        precision = str(config.get("base_model_precision", UNCHANGED))
        chosen = precision if precision in PRECISIONS else UNCHANGED
        added, found = complete_lycoris(lycoris, precision=chosen)
        lycoris = lycoris | added
        decisions += found
    decided = {each.key for each in decisions}
    same = [Decision(key, value, "same", f"{key}", "") for key, value in config.items() if key not in decided]
    return TranslatedRun(
        config, datasets, lycoris if isinstance(lycoris, dict) else None, (*same, *decisions)
    )


def _refused_values(config: dict[str, JsonValue]) -> list[Decision]:
    """Take out the values that are known from SimpleTuner and not supported here."""
    refused = {
        key: UNSUPPORTED_VALUES[key, str(value)]
        for key, value in config.items()
        if (key, str(value)) in UNSUPPORTED_VALUES
    }
    return [Decision(key, config.pop(key), "not translated", "", advice) for key, advice in refused.items()]


def _content(value: JsonValue, context: PathContext, problems: Problems) -> JsonValue:
    """The content of a file that a key names, or the value itself where it stands in the key's place."""
    if not isinstance(value, str):
        return value
    path = context.input_path(context.expand(value))
    return None if path is None else read_json(path, source=display(path), problems=problems)
