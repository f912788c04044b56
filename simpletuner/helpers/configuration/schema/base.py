"""The frozen base of every section, and field types that also read text."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    JsonValue,
    SecretStr,
    ValidationInfo,
)
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError, core_schema

import simpletuner
from simpletuner.helpers.choices.registry import Choice, Registry
from simpletuner.helpers.contracts import Size
from simpletuner.helpers.io.paths import has_drive, portable, with_slashes
from simpletuner.helpers.io.redaction import placeholder_of

NUM_TIMESTEPS = 1000
"""Timesteps of every model: keys that are timesteps lie in [0, 1000]."""
HIDDEN_SECRET = "***"
"""Stands for a secret of the configuration in everything that is shown or written."""
_NONE_WORDS = frozenset({"", "none", "null"})
_PACKAGE = Path(simpletuner.__file__).parent
_DEMO = ("simpletuner", "demo")
_ESCAPED = re.compile(r"[\b\f\n\r\t]")
"""What JSON makes of a backslash before some letters."""
_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")


class Section(BaseModel):
    """A part of the configuration: frozen, without unknown keys; the text below a field describes it."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        protected_namespaces=(),
    )


class LateSection(Section):
    """A section that is only a base of others, so that a validator of its own is not built."""

    model_config = ConfigDict(defer_build=True)


@dataclass(frozen=True)
class PathContext:
    """Start of relative paths, and values of the names in braces."""

    working_directory: Path = field(default_factory=Path.cwd)
    config_folder: Path | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    """Name -> text that replaces {name}."""

    def expand(self, text: str) -> str:
        """The text with every {name} replaced.

        Raises:
            ValueError: A name is unknown.
        """

        def replace(match: re.Match[str]) -> str:
            name = match.group(1)
            if name not in self.names:
                known = ", ".join(f"{{{known}}}" for known in sorted(self.names)) or "none"
                raise ValueError(f"{{{name}}} is unknown here. Known placeholders: {known}.")
            return self.names[name]

        return _PLACEHOLDER.sub(replace, text)

    def input_path(self, text: str) -> Path | None:
        """Absolute path of an existing file or folder, from the working directory first; None if missing.

        simpletuner/demo is found from everywhere, in the package. Backslashes separate folders if nothing has
        the name as it is written.
        """
        folders = [self.working_directory, *([self.config_folder] if self.config_folder else [])]
        candidates = []
        for spelling in dict.fromkeys((text, with_slashes(text))):
            relative = _expand_home(spelling)
            package = [_PACKAGE.parent] if relative.parts[:2] == _DEMO else []
            candidates += [folder / relative for folder in (*folders, *package)]
        return next((Path(os.path.abspath(path)) for path in candidates if path.exists()), None)

    def output_path(self, text: str) -> Path:
        """Absolute path in the working directory."""
        return Path(os.path.abspath(portable(self.working_directory / _expand_home(text))))


def contradiction(key: str, text: str, *others: str) -> PydanticCustomError:
    """An error of a section, shown at `key`; it is also about the keys in `others`."""
    return PydanticCustomError("contradiction", "{text}", {"key": key, "text": text, "keys": (key, *others)})


def admits_none(section: type[Section], key: str) -> bool:
    """Whether null is a value of the key; otherwise null means that the key is missing."""
    return type(None) in get_args(section.model_fields[key].annotation)


@dataclass(frozen=True, eq=False)
class OneOf:
    """Annotation of a text: a name in a registry, including names registered later."""

    registry: Registry[Any]

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Check the name, then validate as text."""
        return core_schema.no_info_before_validator_function(self._name, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """The names registered now."""
        return {"type": "string", "enum": list(self.registry)}

    def _name(self, value: object) -> str:
        record: Choice | None = self.registry.named(value)
        if record is None:
            raise PydanticKnownError("literal_error", {"expected": ", ".join(map(repr, self.registry))})
        return record.name


def registry_of(section: type[Section], key: str) -> Registry[Any] | None:
    """The registry of a key's values, for a single value, an optional value or a list."""
    field = section.model_fields[key]
    return _registry_in((field.annotation, *field.metadata))


def _registry_in(annotations: tuple[object, ...]) -> Registry[Any] | None:
    for each in annotations:
        registry = each.registry if isinstance(each, OneOf) else _registry_in(get_args(each))
        if registry is not None:
            return registry
    return None


def choices_in(section: Section) -> Iterator[tuple[str, Choice]]:
    """(key, record) of every choice in a section."""
    for key, value in section:
        registry = registry_of(type(section), key)
        if registry is not None:
            names = value if isinstance(value, tuple) else (value,)
            yield from ((key, registry[name]) for name in names if name is not None)


def holds_text(section: type[Section], key: str) -> bool:
    """Whether a key takes free text, in which an environment variable may be a secret."""
    types = (str, Path, SecretStr)
    return registry_of(section, key) is None and _mentions(section.model_fields[key].annotation, types)


def takes_empty_text(section: type[Section], key: str) -> bool:
    """Whether an empty text may be a value of a key; else it means that the key is left out."""
    return registry_of(section, key) is None and _mentions(section.model_fields[key].annotation, (str,))


def _mentions(annotation: object, types: tuple[type, ...]) -> bool:
    return annotation in types or any(_mentions(each, types) for each in get_args(annotation))


def as_json(section: Section) -> dict[str, JsonValue]:
    """The values of a section as json; validating it gives an equal section, but for its secrets."""
    return {key: _plain(value) for key, value in section}


def _plain(value: object) -> JsonValue:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Section):
        return as_json(value)
    if isinstance(value, SecretStr):
        return placeholder_of(value.get_secret_value()) or HIDDEN_SECRET
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    assert isinstance(value, Path | Size), f"no json form of {type(value).__name__}"
    return str(value)


def path_context(info: ValidationInfo) -> PathContext:
    """The context of the validation; default: the working directory."""
    return info.context if isinstance(info.context, PathContext) else PathContext()


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number.")
    return value


def _whole_number(value: object) -> object:
    value = _number(value)
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+(\.\d*)?[eE][+-]?\d+\s*", value):
        number = float(value)
        if not number.is_integer():
            raise ValueError("must be a whole number.")
        return int(number)
    return value


def _at_most(largest: int) -> Callable[[int], int]:
    """A check that the reference page does not show: it refuses slips, such as 10^30 steps."""

    def check(value: int) -> int:
        if abs(value) > largest:
            raise ValueError(f"must be at most {largest}." if value > 0 else f"must be at least {-largest}.")
        return value

    return check


def _expand_home(text: str) -> Path:
    try:
        return Path(f"~/{text[2:]}" if text.startswith("~\\") else text).expanduser()
    except RuntimeError as error:
        raise ValueError("the user after ~ has no home folder. Write the whole path.") from error


def none_word(value: object) -> object:
    """None for the words that stand for it."""
    return None if isinstance(value, str) and value.strip().lower() in _NONE_WORDS else value


def _none_word_or_zero(value: object) -> object:
    value = none_word(value)
    return None if value is not False and value in (0, "0", "0.0") else value


def _empty_to_none(value: object) -> object:
    return None if isinstance(value, str) and not value.strip() else value


def _text(value: object) -> str:
    if not isinstance(value, (str, Path)):
        raise ValueError("must be a path, as text.")
    if not str(value).strip() or "\x00" in str(value):
        raise ValueError("must be a path.")
    return str(value)


def input_file(value: object, info: ValidationInfo) -> Path:
    """The absolute path of an existing file.

    Raises:
        ValueError: There is none.
    """
    path = _existing(value, info)
    if path.is_dir():
        raise ValueError("is a folder. Give the path of a file.")
    return path


def input_folder(value: object, info: ValidationInfo) -> Path:
    """The absolute path of an existing folder.

    Raises:
        ValueError: There is none.
    """
    path = _existing(value, info)
    if not path.is_dir():
        raise ValueError("is a file. Give the path of a folder.")
    return path


def _existing(value: object, info: ValidationInfo) -> Path:
    text = _text(value)
    if "://" in text:
        raise ValueError("remote storage is not supported. Copy it to this machine and give its path.")
    context = path_context(info)
    try:
        path = context.input_path(context.expand(text))
    except OSError as error:
        raise ValueError(f"cannot be opened: {error.strerror}.") from error
    if path is None:
        folders = dict.fromkeys(
            [context.working_directory, context.config_folder or context.working_directory]
        )
        advice = " In JSON a backslash is written twice; / works too." if _ESCAPED.search(text) else ""
        raise ValueError(f"not found from {' or from '.join(map(str, folders))}.{advice}")
    return path


def _output(value: object, info: ValidationInfo) -> Path:
    text, context = _text(value), path_context(info)
    if "://" in text:
        raise ValueError("remote storage is not supported. Give a folder on this machine.")
    if has_drive(text) and os.name != "nt":
        raise ValueError("is a path of Windows. Give a folder on this machine.")
    return context.output_path(context.expand(text))


def _in_list(value: object) -> object:
    """One path is a list of one; no word is a list of none."""
    value = none_word(value)
    return [] if value is None else [value] if isinstance(value, str | Path) else value


def _names(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


Number = Annotated[float, BeforeValidator(_number)]
PositiveNumber = Annotated[float, Field(gt=0), BeforeValidator(_number)]
NonNegativeNumber = Annotated[float, Field(ge=0), BeforeValidator(_number)]
Share = Annotated[float, Field(ge=0, le=1), BeforeValidator(_number)]
PositiveShare = Annotated[float, Field(gt=0, le=1), BeforeValidator(_number)]
OptionalShare = Annotated[Share | None, BeforeValidator(none_word)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_number)]
Whole = Annotated[int, BeforeValidator(_whole_number), AfterValidator(_at_most(2**63 - 1))]
Seed = Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(_whole_number)]
Timestep = Annotated[int, Field(ge=0, le=NUM_TIMESTEPS), BeforeValidator(_whole_number)]
OptionalSeed = Annotated[Seed | None, BeforeValidator(none_word)]
Decimals = Annotated[int, Field(ge=0, le=9), BeforeValidator(_whole_number)]
Count = Annotated[int, Field(ge=1), BeforeValidator(_whole_number), AfterValidator(_at_most(2**31 - 1))]
CountOrZero = Annotated[int, Field(ge=0), BeforeValidator(_whole_number), AfterValidator(_at_most(2**31 - 1))]
OptionalPositiveNumber = Annotated[PositiveNumber | None, BeforeValidator(_none_word_or_zero)]
OptionalNumber = Annotated[Number | None, BeforeValidator(_none_word_or_zero)]
OptionalNonNegativeNumber = Annotated[NonNegativeNumber | None, BeforeValidator(none_word)]
OptionalCount = Annotated[Count | None, BeforeValidator(_none_word_or_zero)]
OptionalWhole = Annotated[Whole | None, BeforeValidator(none_word)]
OptionalText = Annotated[str | None, BeforeValidator(_empty_to_none)]
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
InputFile = Annotated[Path, BeforeValidator(input_file)]
InputFolder = Annotated[Path, BeforeValidator(input_folder)]
OutputPath = Annotated[Path, BeforeValidator(_output)]
InputFiles = Annotated[tuple[InputFile, ...], BeforeValidator(_in_list)]
OptionalInputFile = Annotated[InputFile | None, BeforeValidator(none_word)]
OptionalOutputPath = Annotated[OutputPath | None, BeforeValidator(none_word)]
