"""The frozen base of every section, and the field types that also read what users write as text."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    JsonValue,
    ValidationInfo,
)
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError, core_schema

from simpletuner.helpers.choices.registry import Choice, Registry
from simpletuner.helpers.contracts import Size

_NONE_WORDS = frozenset({"", "none", "null"})
_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")


class Section(BaseModel):
    """A part of the configuration: frozen, no unknown keys, the text under a field describes it."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        protected_namespaces=(),
    )


@dataclass(frozen=True)
class PathContext:
    """Where relative paths start and what the names in braces stand for."""

    working_directory: Path = field(default_factory=Path.cwd)
    config_folder: Path | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    """Name -> text that replaces {name} in a path."""

    def expand(self, text: str) -> str:
        """The text with every {name} replaced.

        Raises:
            ValueError: A name is not known here.
        """

        def replace(match: re.Match[str]) -> str:
            name = match.group(1)
            if name not in self.names:
                known = ", ".join(f"{{{known}}}" for known in sorted(self.names)) or "none"
                raise ValueError(f"{{{name}}} is not known here. Known placeholders: {known}.")
            return self.names[name]

        return _PLACEHOLDER.sub(replace, text)

    def input_path(self, text: str) -> Path | None:
        """The absolute path of what exists under that name, working directory first; None if nothing does."""
        relative = Path(text).expanduser()
        folders = [self.working_directory, *([self.config_folder] if self.config_folder else [])]
        candidates = (folder / relative for folder in folders)
        return next((Path(os.path.abspath(path)) for path in candidates if path.exists()), None)

    def output_path(self, text: str) -> Path:
        """The absolute path of that name in the working directory."""
        return Path(os.path.abspath(self.working_directory / Path(text).expanduser()))


def contradiction(key: str, text: str, *others: str) -> PydanticCustomError:
    """An error of a whole section, shown at one of its keys; `others` are further keys that it is about."""
    return PydanticCustomError("contradiction", "{text}", {"key": key, "text": text, "keys": (key, *others)})


def admits_none(section: type[Section], key: str) -> bool:
    """Whether null is a value of its own for a key; elsewhere it means: not given."""
    return type(None) in get_args(section.model_fields[key].annotation)


@dataclass(frozen=True, eq=False)
class OneOf:
    """Annotation of a text that names a record of a registry, or one that is registered later."""

    registry: Registry[Any]

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        """A text, and before that one of the names."""
        return core_schema.no_info_before_validator_function(self._name, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """The names that are registered now."""
        return {"type": "string", "enum": list(self.registry)}

    def _name(self, value: object) -> str:
        record: Choice | None = self.registry.named(value)
        if record is None:
            raise PydanticKnownError("literal_error", {"expected": ", ".join(map(repr, self.registry))})
        return record.name


def registry_of(section: type[Section], key: str) -> Registry[Any] | None:
    """The registry whose names a key takes, alone, optional or in a list."""
    field = section.model_fields[key]
    return next(
        (found for each in (field.annotation, *field.metadata) if (found := _registry_in(each)) is not None),
        None,
    )


def _registry_in(annotation: object) -> Registry[Any] | None:
    if isinstance(annotation, OneOf):
        return annotation.registry
    found = (_registry_in(each) for each in get_args(annotation))
    return next((registry for registry in found if registry is not None), None)


def choices_in(section: Section) -> Iterator[tuple[str, Choice]]:
    """(key, record) of every choice that a section makes."""
    for key, value in section:
        registry = registry_of(type(section), key)
        if registry is not None:
            names = value if isinstance(value, tuple) else (value,)
            yield from ((key, registry[name]) for name in names if name is not None)


def holds_text(section: type[Section], key: str) -> bool:
    """Whether a key takes free text, in which an environment variable may be a secret; choices are not."""
    return registry_of(section, key) is None and _mentions(section.model_fields[key].annotation, (str, Path))


def _mentions(annotation: object, types: tuple[type, ...]) -> bool:
    return annotation in types or any(_mentions(each, types) for each in get_args(annotation))


def as_json(section: Section) -> dict[str, JsonValue]:
    """The values of a section as json that validates into an equal one."""
    return {key: _plain(value) for key, value in section}


def _plain(value: object) -> JsonValue:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Section):
        return as_json(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    assert isinstance(value, Path | Size), f"no json form of {type(value).__name__}"
    return str(value)


def path_context(info: ValidationInfo) -> PathContext:
    """The context given to the validation, or one that starts at the working directory."""
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


def _none_word(value: object) -> object:
    return None if isinstance(value, str) and value.strip().lower() in _NONE_WORDS else value


def _none_word_or_zero(value: object) -> object:
    value = _none_word(value)
    return None if value is not False and value in (0, "0", "0.0") else value


def _empty_to_none(value: object) -> object:
    return None if isinstance(value, str) and not value.strip() else value


def _text(value: object) -> str:
    if not isinstance(value, (str, Path)):
        raise ValueError("must be a path, written as a text.")
    if not str(value).strip() or "\x00" in str(value):
        raise ValueError("must be a path.")
    return str(value)


def _file(value: object, info: ValidationInfo) -> Path:
    path = _existing(value, info)
    if path.is_dir():
        raise ValueError("is a folder. Give the path of a file.")
    return path


def _folder(value: object, info: ValidationInfo) -> Path:
    path = _existing(value, info)
    if not path.is_dir():
        raise ValueError("is a file. Give the path of a folder.")
    return path


def _existing(value: object, info: ValidationInfo) -> Path:
    text = _text(value)
    if "://" in text:
        raise ValueError("remote storage is not supported here. Copy it to this machine and give its path.")
    context = path_context(info)
    try:
        path = context.input_path(context.expand(text))
    except OSError as error:
        raise ValueError(f"cannot be opened: {error.strerror}.") from error
    if path is None:
        folders = dict.fromkeys(
            [context.working_directory, context.config_folder or context.working_directory]
        )
        raise ValueError(f"not found from {' or from '.join(map(str, folders))}.")
    return path


def _output(value: object, info: ValidationInfo) -> Path:
    text, context = _text(value), path_context(info)
    if "://" in text:
        raise ValueError("remote storage is not supported here. Give a folder on this machine.")
    return context.output_path(context.expand(text))


def _names(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


Number = Annotated[float, BeforeValidator(_number)]
PositiveNumber = Annotated[float, Field(gt=0), BeforeValidator(_number)]
NonNegativeNumber = Annotated[float, Field(ge=0), BeforeValidator(_number)]
Share = Annotated[float, Field(ge=0, le=1), BeforeValidator(_number)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_number)]
Whole = Annotated[int, BeforeValidator(_whole_number)]
Seed = Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(_whole_number)]
Decimals = Annotated[int, Field(ge=0, le=9), BeforeValidator(_whole_number)]
Count = Annotated[int, Field(ge=1), BeforeValidator(_whole_number)]
CountOrZero = Annotated[int, Field(ge=0), BeforeValidator(_whole_number)]
OptionalPositiveNumber = Annotated[PositiveNumber | None, BeforeValidator(_none_word_or_zero)]
OptionalNonNegativeNumber = Annotated[NonNegativeNumber | None, BeforeValidator(_none_word)]
OptionalCount = Annotated[Count | None, BeforeValidator(_none_word_or_zero)]
OptionalWhole = Annotated[Whole | None, BeforeValidator(_none_word)]
OptionalText = Annotated[str | None, BeforeValidator(_empty_to_none)]
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
InputFile = Annotated[Path, BeforeValidator(_file)]
InputFolder = Annotated[Path, BeforeValidator(_folder)]
OutputPath = Annotated[Path, BeforeValidator(_output)]
OptionalInputFile = Annotated[InputFile | None, BeforeValidator(_none_word)]
OptionalOutputPath = Annotated[OutputPath | None, BeforeValidator(_none_word)]
