"""The section of config.json on new tokens of the text encoders (textual inversion)."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AfterValidator, BeforeValidator, model_validator

from simpletuner.helpers.configuration.schema.base import (
    Count,
    OptionalText,
    PositiveNumber,
    Section,
    contradiction,
    none_word,
)

_MOST_CHARACTERS = 64
_MOST_VECTORS = 64


def _one_word(token: str | None) -> str | None:
    """The token, if it is one printable word.

    Raises:
        ValueError: It is not.
    """
    if token is None:
        return None
    if not token.isprintable() or any(each.isspace() or each == "," for each in token):
        raise ValueError("must be one word without spaces and commas, such as <my-cat>.")
    if len(token) > _MOST_CHARACTERS:
        raise ValueError(f"has {len(token)} characters. Use at most {_MOST_CHARACTERS}.")
    return token


def _few(number: int) -> int:
    if number > _MOST_VECTORS:
        raise ValueError(f"must be at most {_MOST_VECTORS}: a prompt has room for 75 tokens.")
    return number


class NewTokenConfig(Section):
    """A new token (textual inversion): a word whose embeddings are trained beside an adapter, or alone."""

    placeholder_token: Annotated[OptionalText, AfterValidator(_one_word)] = None
    """New word for the text encoders, as captions and prompts have it, such as <my-cat>. Its embeddings are
    trained beside the adapter, or alone with model_type embedding. Captions are then encoded in every step
    instead of cached. The other keys need it."""
    initializer_token: OptionalText = None
    """Known word whose embeddings the new ones start from, such as cat. Required by placeholder_token."""
    num_vectors: Annotated[Count, AfterValidator(_few)] = 1
    """Embeddings of the new token in each text encoder: each takes the room of one token in a prompt."""
    embedding_lr: Annotated[PositiveNumber | None, BeforeValidator(none_word)] = None
    """Learning rate of the embeddings. null is learning_rate."""

    @model_validator(mode="after")
    def _belongs_to_a_token(self) -> Self:
        key = "placeholder_token"
        if self.placeholder_token is not None:
            if self.initializer_token is None or not self.initializer_token.strip():
                text = f"required by {key}. Give a known word that is close to what the token stands for."
                raise contradiction("initializer_token", text, key)
            return self
        fields = NewTokenConfig.model_fields
        for name in ("initializer_token", "num_vectors", "embedding_lr"):
            if dict(self)[name] != fields[name].default:
                text = f"has an effect with {key} only. Give the new token, or remove this key."
                raise contradiction(name, text, key)
        return self


def token_names(placeholder: str, num_vectors: int) -> tuple[str, ...]:
    """Names of the embeddings of a token in a tokenizer, as diffusers gives them and expands prompts by."""
    return (placeholder, *(f"{placeholder}_{number}" for number in range(1, num_vectors)))
