"""New tokens of text encoders (textual inversion): embeddings of their own beside the frozen ones.

Shapes: B prompts, L tokens, N new tokens, D width of a text encoder.
Source: Gal et al., An Image is Worth One Word, arXiv:2208.01618.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from simpletuner.helpers.adapters.files import embeddings
from simpletuner.helpers.adapters.files.embeddings import Embeddings
from simpletuner.helpers.adapters.files.text_layers import OUTER
from simpletuner.helpers.adapters.trainable import (
    FULL_STRENGTH,
    ParameterGroup,
    Trainable,
    refuse_other_state,
)
from simpletuner.helpers.choices.algorithms import NEW_TOKEN
from simpletuner.helpers.configuration.schema.new_tokens import NewTokenConfig, token_names
from simpletuner.helpers.errors import AdapterError, ConfigError
from simpletuner.helpers.io.names import counted, printable
from simpletuner.helpers.io.run_folder import EMA_EMBEDDING_FILE, EMBEDDING_FILE

TOKENS = "new_token"
"""Name of the parameter group."""


@dataclass(frozen=True, slots=True)
class TextPart:
    """A text encoder of transformers and its tokenizer."""

    encoder: Any
    tokenizer: Any

    @property
    def width(self) -> int:
        """D."""
        return int(self.encoder.config.hidden_size)

    def ids_of(self, text: str) -> list[int]:
        """The tokens of a text, without first and last one."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)


class TokenEmbedding(nn.Module):
    """The token embedding of a text encoder with new tokens, whose embeddings stay float32.

    Args:
        base: The token embedding of the model; it may have new tokens too.
        rows: [N, D], of the new tokens.
        start: [N, D], what they are at strength 0.
        first_id: Of the new tokens, which follow each other.
    """

    def __init__(self, base: nn.Module, rows: Tensor, *, start: Tensor, first_id: int) -> None:
        super().__init__()
        self.base, self.first_id, self.strength = base, first_id, FULL_STRENGTH
        # Behind the base: transformers takes the dtype of a model from its first weight.
        self._rows = nn.ParameterList([rows.float().clone()])
        self.register_buffer("start", start.float().clone(), persistent=False)

    @property
    def rows(self) -> nn.Parameter:
        """[N, D], the embeddings of the new tokens."""
        rows: nn.Parameter = self._rows[0]
        return rows

    def forward(self, ids: Tensor) -> Tensor:
        """[B, L] token ids to [B, L, D] in the base's dtype."""
        own = ids - self.first_id
        is_new = (own >= 0) & (own < len(self.rows))
        known: Tensor = self.base(ids.masked_fill(is_new, 0))
        new = functional.embedding(own.masked_fill(~is_new, 0), self._at_strength())
        return torch.where(is_new[..., None], new.to(known.dtype), known)

    def set_strength(self, strength: float) -> None:
        """Interpolate between the start, at 0, and the embeddings, at 1."""
        self.strength = strength

    def _at_strength(self) -> Tensor:
        if self.strength == FULL_STRENGTH:
            return self.rows
        return torch.lerp(cast("Tensor", self.start), self.rows, self.strength)


class NewToken(Trainable):
    """A token whose embeddings are trained in every text encoder, from those of a known word.

    Args:
        parts: The text encoders by their names in diffusers. Layers that are trained too come first: PEFT
            freezes what it finds.
        config: The token.

    Raises:
        ConfigError: The token is known already, or the initializer has more tokens than there are embeddings.
    """

    algorithm = NEW_TOKEN.name

    def __init__(self, parts: Mapping[str, TextPart], config: NewTokenConfig) -> None:
        assert config.placeholder_token is not None
        assert config.initializer_token is not None
        self.config = config
        try:
            starts = {
                name: initial_rows(part, config.initializer_token, config.num_vectors)
                for name, part in parts.items()
            }
            self.embeddings = {
                name: add_token(part, config.placeholder_token, starts[name], start=starts[name])
                for name, part in parts.items()
            }
        except AdapterError as error:
            raise ConfigError(str(error)) from error
        self.num_layers = len(parts)
        self._encoders = {name: part.encoder for name, part in parts.items()}

    @property
    def file_names(self) -> tuple[str, str]:
        """The files of the embeddings."""
        return EMBEDDING_FILE, EMA_EMBEDDING_FILE

    def groups(self) -> list[ParameterGroup]:
        """The embeddings of each text encoder, without weight decay: it would pull them away from words."""
        return [
            ParameterGroup(
                name=TOKENS,
                parameters=[each.rows for each in self.embeddings.values()],
                learning_rate=self.config.embedding_lr,
                weight_decay=0.0,
            )
        ]

    def set_strength(self, strength: float) -> None:
        """Interpolate between the initializer, at 0, and the trained embeddings, at 1."""
        for each in self.embeddings.values():
            each.set_strength(strength)

    def state_dict(self) -> dict[str, Tensor]:
        """The embeddings by the name of the text encoder."""
        return {name: each.rows.detach() for name, each in self.embeddings.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of `state_dict`.

        Raises:
            AdapterError: A tensor is missing, unknown or of another shape.
        """
        refuse_other_state(state, own=self.state_dict())
        for name, each in self.embeddings.items():
            each.rows.copy_(state[name])

    def save(self, path: Path, *, metadata: Mapping[str, str]) -> None:
        """Write the embeddings, as kohya's scripts and ComfyUI name them.

        Raises:
            AdapterError: An embedding is not finite; nothing is written.
            StorageError: The file cannot be written.
        """
        embeddings.write(path, self.state_dict(), metadata=metadata)

    def detach(self) -> None:
        """Give every text encoder its own embedding back; the tokenizers keep the token."""
        for name, each in self.embeddings.items():
            self._encoders[name].set_input_embeddings(each.base)


def attach_embeddings(
    parts: Mapping[str, TextPart], stored: Embeddings, *, strength: float = FULL_STRENGTH
) -> list[TokenEmbedding]:
    """Add the token of a file to text encoders and their tokenizers.

    At another strength than 1 the embeddings lie on the line from those of the initializer, where the file
    names one.

    Args:
        parts: The text encoders by their names in diffusers.
        stored: The file.
        strength: 1 as trained, 0 the initializer.

    Returns:
        What was added to each text encoder that the file is for.

    Raises:
        AdapterError: The token is known already, or the file is for another model.
    """
    widths = {name: part.width for name, part in parts.items()}
    fitting = {name: stored.of_encoder(name, width=widths[name], widths=widths) for name in parts}
    found = {name: rows for name, rows in fitting.items() if rows is not None}
    if not found:
        raise AdapterError(f"{stored.path}: the model has no text encoder that it is for.")
    added = []
    for name, rows in found.items():
        part, start = parts[name], rows
        if stored.initializer is not None:
            start = initial_rows(part, stored.initializer, len(rows))
        added.append(add_token(part, stored.token, rows, start=start))
        added[-1].set_strength(strength)
    return added


def initial_rows(part: TextPart, initializer: str, num_vectors: int) -> Tensor:
    """[N, D] float32: the embeddings of the initializer's tokens, again and again.

    Raises:
        AdapterError: It is unknown, or has more tokens than there are embeddings.
    """
    ids, shown = part.ids_of(initializer), printable(initializer)
    if not ids or part.tokenizer.unk_token_id in ids:
        raise AdapterError(f"initializer_token {shown}: the tokenizer does not know it. Name a known word.")
    if len(ids) > num_vectors:
        raise AdapterError(
            f"initializer_token {shown}: {len(ids)} tokens for {counted(num_vectors, 'embedding')}. Set "
            f"num_vectors to {len(ids)}, or name a word that is one token."
        )
    chosen = torch.tensor([ids[index % len(ids)] for index in range(num_vectors)])
    with torch.no_grad():
        rows: Tensor = part.encoder.get_input_embeddings()(chosen.to(part.encoder.device))
    return rows.float()


def add_token(part: TextPart, token: str, rows: Tensor, *, start: Tensor) -> TokenEmbedding:
    """Add a token of N embeddings to a text encoder and its tokenizer.

    Its names in the tokenizer are those of diffusers, which expands prompts by them: the token, token_1, ...

    Args:
        part: The text encoder.
        token: The word.
        rows: [N, D], its embeddings.
        start: [N, D], its embeddings at strength 0.

    Raises:
        AdapterError: The tokenizer knows it.
    """
    names = token_names(token, len(rows))
    _refuse_known(part, names)
    part.tokenizer.add_tokens(list(names))
    first_id = int(part.tokenizer.convert_tokens_to_ids(token))
    base, device = part.encoder.get_input_embeddings(), part.encoder.device
    embedding = TokenEmbedding(base, rows.to(device), start=start.to(device), first_id=first_id)
    part.encoder.set_input_embeddings(embedding)
    # Where a configuration names a wrong end of text, transformers pools at the highest id: the new token's.
    inner = dict(part.encoder.named_children()).get(OUTER, part.encoder)
    inner.eos_token_id = part.tokenizer.eos_token_id
    return embedding


def _refuse_known(part: TextPart, names: Sequence[str]) -> None:
    """Check that the tokenizer knows none of a token's names, and no other token that begins like it."""
    token, vocabulary = names[0], part.tokenizer.get_vocab()
    known = [each for each in names if each in vocabulary or len(part.ids_of(each)) == 1]
    known += [
        each
        for each in part.tokenizer.added_tokens_encoder
        if each.startswith(token) or token.startswith(each)
    ]
    if known:
        raise AdapterError(
            f"placeholder_token {printable(token)}: the tokenizer knows {printable(known[0])} already. "
            "Choose a word that it does not know, such as <my-cat>."
        )
