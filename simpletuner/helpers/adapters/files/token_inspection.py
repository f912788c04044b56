"""Summarise a file with the embeddings of a new token: its word, and the embeddings of each text encoder."""

from __future__ import annotations

import json
from dataclasses import dataclass

from simpletuner.helpers.adapters.files import adapter_file, embeddings
from simpletuner.helpers.io.names import printable


@dataclass(frozen=True, kw_only=True)
class TokenInspection:
    """Summary of one file."""

    file: str
    bytes: int
    token: str | None
    """None if the file does not name it."""
    initializer: str | None
    embeddings: dict[str, tuple[int, int]]
    """Text encoder -> number of embeddings and their width."""
    norms: dict[str, float]
    """Text encoder -> mean length of its embeddings."""
    dtypes: tuple[str, ...]
    training: dict[str, str]
    """The other entries of the header."""

    def as_json(self) -> str:
        """The summary as a json object."""
        return json.dumps(vars(self), indent=2, ensure_ascii=False)

    def text(self) -> str:
        """The summary as text."""
        lines = [
            ("File", f"{self.file}, {self.bytes / 1e6:.1f} MB, {', '.join(self.dtypes)}"),
            ("New token", self.token),
            ("Started from", self.initializer),
            *(
                (name, f"{number} of width {width}, mean length {self.norms[name]:.3g}")
                for name, (number, width) in self.embeddings.items()
            ),
            *sorted(self.training.items()),
        ]
        shown = [(printable(name), printable(value)) for name, value in lines if value]
        longest = max(len(name) for name, _ in shown)
        return "\n".join(f"{name:<{longest}}  {value}" for name, value in shown)


def inspect_token(stored: adapter_file.AdapterFile) -> TokenInspection:
    """Summarise a file that `embeddings.write` wrote."""
    rows = {name: stored.tensors[key] for name, key in embeddings.KEYS.items() if key in stored.tensors}
    shown = (embeddings.TOKEN_KEY, embeddings.INITIALIZER_KEY, "format")
    return TokenInspection(
        file=str(stored.path),
        bytes=stored.path.stat().st_size,
        token=stored.metadata.get(embeddings.TOKEN_KEY),
        initializer=stored.metadata.get(embeddings.INITIALIZER_KEY),
        embeddings={name: (each.shape[0], each.shape[-1]) for name, each in rows.items()},
        norms={name: float(each.float().norm(dim=-1).mean()) for name, each in rows.items()},
        dtypes=tuple(sorted({str(each.dtype).removeprefix("torch.") for each in rows.values()})),
        training={key: value for key, value in stored.metadata.items() if key not in shown},
    )
