"""Files with the embeddings of a new token (textual inversion).

Keys of the formats that are read, N embeddings of width D each:
    clip_l, clip_g        [N, D] of two text encoders: kohya's scripts, ComfyUI, and this program
    emb_params            [N, D] or [D] of one text encoder: kohya's scripts
    <the token itself>    [N, D] or [D] of one text encoder: diffusers' scripts
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from simpletuner.helpers.adapters.files import adapter_file
from simpletuner.helpers.adapters.files.comfyui import EMBEDDING_KEYS
from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.io.names import printable
from simpletuner.helpers.io.redaction import PLACEHOLDER

KEYS = dict(zip(("text_encoder", "text_encoder_2"), EMBEDDING_KEYS, strict=True))
"""Name of a text encoder in diffusers -> key of its embeddings."""
TOKEN_KEY, INITIALIZER_KEY = "placeholder_token", "initializer_token"
"""Entries of the header."""
_NAMELESS = "emb_params"
_HEADER_PREFIXES = ("ss_", "modelspec.")
"""Of entries that describe an adapter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Embeddings:
    """The embeddings of a new token."""

    path: Path
    token: str
    initializer: str | None
    """The known word that they started from; None in files of other programs."""
    rows: Mapping[str, Tensor]
    """Name of a text encoder in diffusers -> [N, D] float32; "" for a file that names no text encoder."""

    def of_encoder(self, name: str, *, width: int, widths: Mapping[str, int]) -> Tensor | None:
        """The [N, D] embeddings for a text encoder; None if the file has none for it.

        Embeddings that name no text encoder are for the first one of their width.

        Args:
            name: Of the text encoder in diffusers.
            width: Its D.
            widths: D of every text encoder, in order.

        Raises:
            AdapterError: The widths differ.
        """
        rows = self.rows.get(name)
        if rows is None and "" in self.rows:
            rows = self.rows[""]
            first = next((each for each, other in widths.items() if other == rows.shape[1]), None)
            if first is None:
                found = " and ".join(map(str, widths.values()))
                raise AdapterError(
                    f"{self.path}: its embeddings have width {rows.shape[1]}, the model's text encoders "
                    f"{found}. It is for another model."
                )
            return rows if first == name else None
        if rows is not None and rows.shape[1] != width:
            raise AdapterError(
                f"{self.path}: {KEYS[name]} has embeddings of width {rows.shape[1]}, and {name} of the model "
                f"{width}. It is for another model."
            )
        return rows


def read(path: Path, *, token: str | None = None) -> Embeddings:
    """Read the embeddings of a new token.

    Args:
        path: A safetensors file.
        token: The word in prompts; None for that of the file.

    Raises:
        AdapterError: The file is missing, damaged or no file of embeddings, or names no token.
    """
    file = adapter_file.read(path, takes_embeddings=True)
    tensors = file.tensors
    named = {name: tensors[key] for name, key in KEYS.items() if key in tensors}
    stated = file.metadata.get(TOKEN_KEY)
    if named and len(named) == len(tensors):
        rows = named
    elif len(tensors) == 1:
        key, tensor = next(iter(tensors.items()))
        stated = stated or (None if key == _NAMELESS else key)
        rows = {"": tensor}
    else:
        keys = ", ".join(printable(key) for key in sorted(tensors)[:3])
        raise AdapterError(
            f"{path}: no embeddings of a new token, but {keys}. Give a file with "
            f"{' and '.join(KEYS.values())}, {_NAMELESS}, or one tensor under the name of its token."
        )
    word = token or stated
    if word is None or (token is None and PLACEHOLDER.search(word)):
        raise AdapterError(f"{path}: the file does not name its token. Give it as {path.name}=<token>.")
    initializer = file.metadata.get(INITIALIZER_KEY)
    if initializer is not None and PLACEHOLDER.search(initializer):
        initializer = None
    shaped = {name: _matrix(path, name, tensor) for name, tensor in rows.items()}
    return Embeddings(path=path, token=word, initializer=initializer, rows=shaped)


def is_embeddings(file: adapter_file.AdapterFile) -> bool:
    """Whether the content of a file is what `write` writes: embeddings of a new token and no adapter."""
    return set(file.tensors) <= set(KEYS.values())


def write(path: Path, rows: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> None:
    """Write embeddings [N, D] by the name of their text encoder.

    Args:
        path: The file.
        rows: Name of a text encoder in diffusers -> its embeddings.
        metadata: Of the run; entries that describe an adapter are left out.

    Raises:
        AdapterError: A value is not finite; nothing is written.
        StorageError: The file cannot be written.
    """
    own = {key: value for key, value in metadata.items() if not key.startswith(_HEADER_PREFIXES)}
    adapter_file.write(path, {KEYS[name]: each for name, each in rows.items()}, metadata=own)


def _matrix(path: Path, name: str, tensor: Tensor) -> Tensor:
    matrix = tensor[None] if tensor.ndim == 1 else tensor
    if matrix.ndim != 2:
        raise AdapterError(
            f"{path}: {KEYS.get(name, 'its tensor')} has shape {tuple(tensor.shape)}, not [N, D]."
        )
    return matrix.float()
