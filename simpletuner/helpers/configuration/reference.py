"""The page that describes every configuration key, made from the sections themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from pydantic import JsonValue

from simpletuner.helpers.choices.algorithms import ALGORITHMS
from simpletuner.helpers.choices.optimizers import OPTIMIZERS
from simpletuner.helpers.choices.registry import Registry
from simpletuner.helpers.configuration.load import COMPUTED_KEYS, SECTIONS
from simpletuner.helpers.configuration.loading.dataset_file import INHERITED, TextCacheEntry
from simpletuner.helpers.configuration.loading.known_keys import (
    ALIASES,
    CONFIG_KEYS,
    DATASET_KEYS,
    LYCORIS_KEYS,
    PRESET_KEYS,
    Unsupported,
)
from simpletuner.helpers.configuration.loading.known_values import UNSUPPORTED_VALUES
from simpletuner.helpers.configuration.schema.base import Section, registry_of
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.lycoris import (
    COMPUTED_FIELDS,
    LayerArguments,
    LycorisConfig,
    TargetPreset,
    algorithm_arguments,
)
from simpletuner.helpers.contracts import ModelSpec

_INTRODUCTION = """\
# Configuration reference

Made by `simpletuner config-reference --output documentation/config-reference.md` from the code that reads the
configuration; do not edit it by hand.

A run is described by three json files: `config.json`, the dataset json that its `data_backend_config`
names, and for LyCORIS adapters the lycoris json that its `lycoris_config` names. `simpletuner validate`
checks all three and lists every mistake at once.

- A key may be written with or without leading dashes: `"seed"` or `"--seed"`.
- Numbers, `true` and `false` may be written as texts: `"1e-4"`, `"true"`.
- `null` means that a key is not given, where it is no value of its own.
- Precedence: defaults, then the file, then the command line (`key=value`, `--key=value`, `--key value`, and
  `--key` alone for true).
- Paths are relative to the working directory, or to the folder of `config.json` for what is only there.
  What is written is relative to the working directory.
- `{env:VAR}` in a text is replaced by an environment variable. The value appears in no message and in no file
  that is written; the placeholder does.
- In paths, `{model_family}` and `{output_dir}` are replaced, in the dataset json also `{id}`.
- The configuration that a run used is written to `config.resolved.json` in `output_dir` and in every
  checkpoint. It holds the lycoris json and the dataset json and can itself be given to `--config`.
"""

_KIND_NAMES = {"boolean": "true, false", "integer": "whole number", "number": "number", "string": "text"}
_BOUNDS = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}
_LARGEST_SHOWN = 2**53
_Schema = Mapping[str, JsonValue]


def reference(families: Mapping[str, ModelSpec]) -> str:
    """The whole page as markdown.

    Args:
        families: Name -> facts of every model family.
    """
    parts = [_INTRODUCTION, "## config.json\n"]
    for section in SECTIONS:
        parts += [_section(section, leaving_out=COMPUTED_KEYS), *_choices(section)]
    parts += [_optimizers(), _families(families)]
    parts += ["## Dataset json\n", "An array of objects, one per dataset.\n"]
    parts += [
        _section(DatasetConfig),
        f"Inherited from config.json: {_codes(INHERITED)}.\n",
        _section(TextCacheEntry),
    ]
    parts += [
        "## Lycoris json\n",
        _section(LycorisConfig, leaving_out=COMPUTED_FIELDS),
        *_choices(LycorisConfig),
        _section(TargetPreset),
    ]
    parts += [_section(algorithm_arguments()), _algorithms(), _section(LayerArguments)]
    parts += ["## Prompt library\n", _PROMPT_LIBRARY, _other_names(), _not_supported()]
    return "\n".join(parts)


_PROMPT_LIBRARY = """\
The json that `user_prompt_library` names: an object of name and prompt, or of name and
`{"prompt": "...", "adapter_strength": 0.8}`. A name may be used once; it names the pictures.
"""


def _section(section: type[Section], *, leaving_out: Iterable[str] = ()) -> str:
    schema = cast("_Schema", section.model_json_schema(mode="validation"))
    properties = cast("Mapping[str, _Schema]", schema["properties"])
    required = cast("list[str]", schema.get("required", []))
    definitions = cast("Mapping[str, _Schema]", schema.get("$defs", {}))
    lines = [
        f"### {section.__name__}\n",
        f"{section.__doc__}\n",
        "| key | values | default | meaning |",
        "|---|---|---|---|",
    ]
    for key, each in properties.items():
        if key not in set(leaving_out):
            default = _default(each, required=key in required)
            meaning = str(each.get("description", "")).replace("\n", " ").replace("|", "\\|")
            lines.append(f"| `{key}` | {_kind(each, definitions)} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _default(schema: _Schema, *, required: bool) -> str:
    if required:
        return "see text" if "Default:" in str(schema.get("description")) else "**required**"
    if "default" not in schema or "Default:" in str(schema.get("description")):
        return "see text"
    default = schema["default"]
    # A nested section is not given by default.
    return "{}" if isinstance(default, dict) else f"`{json.dumps(default)}`"


def _kind(schema: _Schema, definitions: Mapping[str, _Schema]) -> str:
    if "$ref" in schema:
        name = str(schema["$ref"]).rpartition("/")[2]
        return "width x height" if name == "Size" else name
    if "anyOf" in schema:
        each = [_kind(option, definitions) for option in cast("list[_Schema]", schema["anyOf"])]
        return ", ".join(dict.fromkeys(each))
    if "enum" in schema:
        return ", ".join(f"`{choice}`" for choice in cast("list[str]", schema["enum"]))
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = schema.get("type")
    if kind == "array":
        items = schema.get("items")
        return f"list of {_kind(cast('_Schema', items), definitions)}" if isinstance(items, dict) else "list"
    if kind == "object":
        return "object"
    if kind == "null":
        return "`null`"
    if str(schema.get("format", "")).endswith("path"):
        return "path"
    bounds = [
        text.format(schema[name]) for name, text in _BOUNDS.items() if _is_worth_saying(schema.get(name))
    ]
    return " ".join([_KIND_NAMES.get(str(kind), str(kind)), ", ".join(bounds)]).strip()


def _is_worth_saying(bound: JsonValue) -> bool:
    return isinstance(bound, int | float) and bound < _LARGEST_SHOWN


def _choices(section: type[Section]) -> Iterator[str]:
    """A table of values for each choice of a section; keys that share their values share a table."""
    keys: dict[int, tuple[Registry[Any], list[str]]] = {}
    for key in section.model_fields:
        registry = registry_of(section, key)
        if registry is not None:
            keys.setdefault(id(registry), (registry, []))[1].append(key)
    for registry, names in keys.values():
        lines = [f"Values of {_codes(names)}:\n", "| value | meaning | pip extra |", "|---|---|---|"]
        for name, record in registry.items():
            values = " or ".join(f"`{each}`" for each in (name, *record.aliases))
            lines.append(f"| {values} | {record.summary} | {f'`{record.extra}`' if record.extra else ''} |")
        yield "\n".join(lines) + "\n"


def _optimizers() -> str:
    lines = ["Keys of `optimizer_config`, and default of `learning_rate`:\n"]
    lines += [
        f"- `{name}`: {_codes(record.arguments)}; {record.default_learning_rate:g}"
        for name, record in OPTIMIZERS.items()
    ]
    return "\n".join(lines) + "\n"


def _families(families: Mapping[str, ModelSpec]) -> str:
    lines = ["### Model families\n"]
    for name, spec in sorted(families.items()):
        lines += [
            f"`{name}`: resolution {spec.default_resolution}, aspect_bucket_alignment "
            f"{spec.pixel_alignment} (a multiple of {spec.minimum_alignment}), prediction_type "
            f"{_codes(spec.prediction_types)}, "
            f"peft_lora_target_modules {_codes(_abbreviated(spec.lora_targets))}, "
            f"validation_guidance {spec.default_guidance:g}.\n",
            *_preset_lines(spec),
            "| model_flavour | repository |",
            "|---|---|",
            *(
                f"| `{flavour}`{' (default)' if flavour == spec.default_flavour else ''} | {repository} |"
                for flavour, repository in spec.flavours.items()
            ),
            "",
        ]
    return "\n".join(lines)


def _preset_lines(spec: ModelSpec) -> list[str]:
    if not spec.lora_presets:
        return []
    lines = [f"| {spec.lora_preset_key} | layers |", "|---|---|"]
    return [*lines, *(f"| `{name}` | {_codes(layers)} |" for name, layers in spec.lora_presets.items()), ""]


def _abbreviated(names: Iterable[str]) -> list[str]:
    """The names, those that differ in the number of a block once, with N in its place."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in names))


def _algorithms() -> str:
    lines = ["Which algorithm takes which:\n"]
    lines += [f"- `{algo}`: {_codes(sorted(record.arguments))}" for algo, record in ALGORITHMS.items()]
    return "\n".join(lines) + "\n"


def _other_names() -> str:
    lines = ["## Other names\n", "| also accepted | key |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{old}` | `{new}` |" for old, new in ALIASES.items())]) + "\n"


def _not_supported() -> str:
    parts = [
        "## Known from SimpleTuner, not supported here\n",
        "These end a run with a message that says what to do, except where the value asks for what happens "
        "anyway (`false`, `null`, `0`, an empty text).\n",
    ]
    tables = {
        "config.json": CONFIG_KEYS,
        "Dataset json": DATASET_KEYS,
        "Lycoris json": LYCORIS_KEYS,
        "apply_preset of the lycoris json": PRESET_KEYS,
    }
    for title, table in tables.items():
        parts += [f"### {title}\n", _advice_table(table)]
    by_advice: dict[tuple[str, str], list[str]] = {}
    for (key, value), advice in UNSUPPORTED_VALUES.items():
        by_advice.setdefault((key, advice), []).append(value)
    lines = ["### Values\n", "| key | values | what to do |", "|---|---|---|"]
    lines += [f"| `{key}` | {_codes(values)} | {advice} |" for (key, advice), values in by_advice.items()]
    return "\n".join([*parts, *lines]) + "\n"


def _advice_table(table: Mapping[str, Unsupported]) -> str:
    by_advice: dict[str, list[str]] = {}
    for key, entry in table.items():
        by_advice.setdefault(entry.advice, []).append(key)
    lines = ["| keys | what to do |", "|---|---|"]
    return (
        "\n".join([*lines, *(f"| {_codes(keys)} | {advice} |" for advice, keys in by_advice.items())]) + "\n"
    )


def _codes(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
