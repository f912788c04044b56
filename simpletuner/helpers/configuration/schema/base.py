"""The frozen base of every section, and the field types that also read what users write as text."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo
from pydantic_core import PydanticCustomError

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


def holds_text(section: type[Section], key: str) -> bool:
    """Whether a key takes free text, in which an environment variable may be a secret; choices are not."""
    return _mentions(section.model_fields[key].annotation, (str, Path))


def _mentions(annotation: object, kinds: tuple[type, ...]) -> bool:
    return annotation in kinds or any(_mentions(each, kinds) for each in get_args(annotation))


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
