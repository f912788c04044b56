"""Values that name a model: a folder, a .safetensors file or a repository."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, ValidationInfo

from simpletuner.helpers.configuration.schema.base import path_context

FILE_SUFFIX = ".safetensors"


def _model_source(value: object, info: ValidationInfo) -> object:
    if not isinstance(value, str | Path) or not str(value).strip():
        raise ValueError("must be the folder or repository of a model, as text.")
    text = path_context(info).expand(str(value))
    if text.lower().endswith((".ckpt", ".pt", ".pth", ".bin", ".gguf")):
        raise ValueError(
            "must be a folder in diffusers' layout or a .safetensors file: pickles can run code, and GGUF is "
            "for inference."
        )
    path = path_context(info).input_path(text)
    if path is not None and path.is_file() and path.suffix != FILE_SUFFIX:
        raise ValueError("is a file. Give a folder in diffusers' layout, or a .safetensors file.")
    if path is not None:
        return str(path)
    if text.startswith((".", "/", "~")) or text.count("/") != 1 or ":" in text or "\\" in text:
        raise ValueError("not found. Give an existing folder or file, or a repository written owner/name.")
    return text


ModelSource = Annotated[str, BeforeValidator(_model_source)]
OptionalModelSource = Annotated[ModelSource | None, BeforeValidator(lambda value: value or None)]
