"""The files of a SimpleTuner run in the names of this program, with a decision for every key."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import JsonValue

from simpletuner.helpers.choices.precisions import PRECISIONS, UNCHANGED
from simpletuner.helpers.configuration.load import KEYS, display
from simpletuner.helpers.configuration.loading.conditioning import (
    SERVANTS,
    conditions_of,
    is_conditioning,
)
from simpletuner.helpers.configuration.loading.config_forms import read_config
from simpletuner.helpers.configuration.loading.dataset_file import translate_entry
from simpletuner.helpers.configuration.loading.defaults import CHOICE, THEIRS, their_flavour
from simpletuner.helpers.configuration.loading.known_values import UNSUPPORTED_VALUES
from simpletuner.helpers.configuration.loading.layers import merge_layers
from simpletuner.helpers.configuration.loading.lycoris_file import complete_lycoris
from simpletuner.helpers.configuration.schema.base import PathContext
from simpletuner.helpers.configuration.schema.values import is_off
from simpletuner.helpers.configuration.text.decisions import Decision
from simpletuner.helpers.configuration.text.placeholders import Environment
from simpletuner.helpers.configuration.text.problems import Problems, shown
from simpletuner.helpers.configuration.text.reading import read_json
from simpletuner.helpers.contracts import ModelSpec

_DATASETS, _LYCORIS = "data_backend_config", "lycoris_config"
_NO_TARGETS = frozenset(
    {
        "type",
        "aws_bucket_name",
        "dataset_type",
        "conditioning_type",
        "source_dataset_id",
    }
)
"""Keys of a dataset that, where they are refused, say that its images are no plain training targets."""


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
    context = replace(context, names=names)
    entries = _content(_DATASETS, config, context, problems=problems, decisions=decisions)
    lycoris = _content(_LYCORIS, config, context, problems=problems, decisions=decisions)
    problems.raise_if_any()
    decisions = [*_same(content, config, decisions), *decisions, *_with_their_defaults(config)]
    datasets: list[dict[str, JsonValue]] = []
    if isinstance(entries, list):
        datasets, found = _datasets(entries, inherited=config)
        decisions += found
    if not isinstance(lycoris, dict):
        return TranslatedRun(config, datasets, None, tuple(decisions))
    decisions += _same(lycoris, lycoris, [], prefix="lycoris.")
    precision = str(config.get("base_model_precision", UNCHANGED))
    added, found = complete_lycoris(lycoris, precision=precision if precision in PRECISIONS else UNCHANGED)
    return TranslatedRun(config, datasets, lycoris | added, (*decisions, *found))


def _with_their_defaults(config: dict[str, JsonValue]) -> Iterator[Decision]:
    """Choose SimpleTuner's defaults, and name the model of its flavour."""
    flavour = str(config.get("model_flavour"))
    if their_flavour(flavour) != flavour:
        config["model_flavour"] = their_flavour(flavour)
        ours, text = f"model_flavour: {shown(config['model_flavour'])}", "Another model under the same name."
        yield Decision("model_flavour", flavour, "translated", ours, text)
    if CHOICE not in config:
        config[CHOICE] = THEIRS
        text = "Keys that the file leaves out have SimpleTuner's values."
        yield Decision(CHOICE, None, "translated", f"{CHOICE}: {shown(THEIRS)}", text)


def _datasets(
    entries: list[JsonValue], *, inherited: Mapping[str, object]
) -> tuple[list[dict[str, JsonValue]], list[Decision]]:
    """The entries in our names, without those whose images must not be trained on as they stand."""
    kept: list[dict[str, JsonValue]] = []
    decisions: list[Decision] = []
    conditions = conditions_of(entries)
    left_out: set[str] = set()
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            continue
        prefix = f"{entry.get('id', index)}."
        values, found = translate_entry(entry, prefix=prefix, inherited=inherited)
        found += _refused_values(values, prefix=prefix)
        refused = {each.key.removeprefix(prefix) for each in found if each.outcome == "not translated"}
        is_mask = is_conditioning(values) and not refused & _NO_TARGETS and "conditioning_type" in values
        serves = bool(conditions.owners(str(entry.get("id")))) or is_conditioning(entry)
        if refused & _NO_TARGETS or (serves and not is_mask):
            text = "The entry is left out: its images would be trained on as they stand."
            found.append(Decision(f"{prefix}id", entry.get("id"), "not translated", "", text))
            left_out.add(str(entry.get("id")))
        else:
            kept.append(values)
        decisions += [*_same(entry, values, found, prefix=prefix), *found]
    for values in kept:
        if not is_off(values.get(SERVANTS)) and left_out & set(
            conditions.given.get(str(values.get("id")), ())
        ):
            text = "The entry that it names is left out."
            decisions.append(
                Decision(f"{values.get('id')}.{SERVANTS}", values.pop(SERVANTS), "not translated", "", text)
            )
    return kept, decisions


def _same(
    given: Mapping[str, JsonValue],
    ours: Mapping[str, JsonValue],
    decisions: list[Decision],
    *,
    prefix: str = "",
) -> list[Decision]:
    """A decision for each key of a file that stays as it is."""
    decided = {each.key for each in decisions}
    names = dict.fromkeys(key.removeprefix("--") for key in given)
    return [
        Decision(f"{prefix}{key}", ours[key], "same", f"{key}: {shown(ours[key])}", "")
        for key in names
        if key in ours and f"{prefix}{key}" not in decided
    ]


def _refused_values(values: dict[str, JsonValue], *, prefix: str = "") -> list[Decision]:
    """Take out the values that are known from SimpleTuner and not supported here."""
    refused = {
        key: UNSUPPORTED_VALUES[key, str(value)]
        for key, value in values.items()
        if (key, str(value)) in UNSUPPORTED_VALUES
    }
    return [
        Decision(f"{prefix}{key}", values.pop(key), "not translated", "", advice)
        for key, advice in refused.items()
    ]


def _content(
    key: str,
    config: dict[str, JsonValue],
    context: PathContext,
    *,
    problems: Problems,
    decisions: list[Decision],
) -> JsonValue:
    """Take the key of a file out of config; the content of the file, or the value in its place."""
    value = config.pop(key, None)
    if not isinstance(value, str):
        return value
    filled = str(Environment(os.environ, Problems()).fill(value, source="", key=key))
    path = context.input_path(context.expand(filled))
    if path is None:
        decisions.append(Decision(key, value, "not translated", "", "The file is not found."))
        return None
    decisions.append(Decision(key, value, "translated", f"{key}: a file beside config.json", ""))
    return read_json(path, source=display(path), problems=problems)
