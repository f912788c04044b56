"""Building blocks of the tiny models of all families: a word list, byte-pair merges, reproducible weights.

The weights are random and exactly reproducible: integers of a seeded generator and exactly rounded IEEE 754
arithmetic. The last bits of torch's initialisers depend on the processor. The vocabularies are made by hand,
since trainers of tokenizers vary from run to run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import prod, sqrt
from typing import cast

import torch
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTokenizer

WORD_LIST = """
a an and animal at background black blue body brown by camera cat close color dark day dog ear eye eyes face
field fluffy forest fox from front fur ginger green grey head high house image in is it kitten light looking
lying nose of on orange painting person photo photograph picture portrait quality red road room sea sitting
sks sky small sofa soft studio sun tabby the to tree up watercolor whiskers white window with yellow
"""
Pair = tuple[str, str]

CLIP_END_OF_WORD = "</w>"
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_MAX_TOKENS = 77
SPACE = "Ġ"
"""Space before a word in a byte-level vocabulary."""

NUM_WEIGHT_LEVELS = 1 << 16
"""Number of values of a weight between its bounds."""


def fill_weights(module: nn.Module, *, seed: int) -> None:
    """Set every parameter: norms to the identity, biases to zero, the rest uniform within 1/sqrt(fan in)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            if parameter.ndim == 1:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                parameter.copy_(_uniform(parameter.shape, generator=generator))


def make_clip_tokenizer(*, pad: str) -> CLIPTokenizer:
    """A CLIP tokenizer; every byte and every word of the word list is one token."""
    merges = learn_merges(WORD_LIST.split(), end_of_word=CLIP_END_OF_WORD)
    alphabet = byte_alphabet()
    symbols = [*alphabet, *(symbol + CLIP_END_OF_WORD for symbol in alphabet)]
    return CLIPTokenizer(
        vocab=make_vocabulary(symbols, merges=merges, special=(CLIP_START, CLIP_END)),
        merges=cast("list[str]", list(merges)),
        model_max_length=CLIP_MAX_TOKENS,
        pad_token=pad,
    )


def clip_text_config(tokenizer: CLIPTokenizer, *, width: int) -> CLIPTextConfig:
    """Configuration of a three-layer CLIP text encoder; CLIP pools at this tokenizer's end token."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CLIP_MAX_TOKENS,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def byte_alphabet() -> list[str]:
    """The 256 symbols of bytes in a byte-level vocabulary."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def make_vocabulary(
    symbols: Sequence[str], *, merges: Iterable[Pair], special: Sequence[str]
) -> dict[str, int]:
    """Token -> id: symbols, then merges, then special tokens."""
    tokens = dict.fromkeys([*symbols, *("".join(merge) for merge in merges), *special])
    return {token: index for index, token in enumerate(tokens)}


def learn_merges(words: Sequence[str], *, end_of_word: str = "") -> dict[Pair, int]:
    """Byte-pair merges and their ranks that make each word a single token."""
    ranks: dict[Pair, int] = {}
    for word in words:
        while len(parts := _segment(word, ranks, end_of_word)) > 1:
            ranks[parts[0], parts[1]] = len(ranks)
    return ranks


def _segment(word: str, ranks: Mapping[Pair, int], end_of_word: str) -> list[str]:
    """Tokens of a word: join the known pair of lowest rank until there is none."""
    parts = [*word[:-1], word[-1] + end_of_word]
    while known := [(ranks[pair], place) for place, pair in enumerate(pairwise(parts)) if pair in ranks]:
        place = min(known)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def _uniform(shape: torch.Size, *, generator: torch.Generator) -> Tensor:
    """Values on a grid in [-1, 1) divided by sqrt(fan in), from exactly rounded operations only."""
    levels = torch.randint(NUM_WEIGHT_LEVELS, tuple(shape), generator=generator, dtype=torch.int64)
    unit = levels.to(torch.float64) * (2 / NUM_WEIGHT_LEVELS) - 1
    return (unit / sqrt(prod(shape[1:]))).to(torch.float32)
