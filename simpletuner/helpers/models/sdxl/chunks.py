"""Prompts beyond CLIP's 75 tokens: each 75 are a chunk, encoded on their own.

Shapes: N chunks, D text width, P pooled width.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

CLIP_TOKENS = 77
"""Tokens of a chunk, with its first and its last one."""
WORD_TOKENS = CLIP_TOKENS - 2


def chunk_ids(tokenizer: Any, prompt: str, *, num_chunks: int) -> Tensor:
    """The tokens of a prompt, [N, 77]: each chunk begins and ends as a prompt does, and is padded as one.

    Tokens after the last chunk are cut off; chunks that the prompt does not reach are those of no prompt.
    """
    words = tokenizer(prompt, add_special_tokens=False).input_ids[: num_chunks * WORD_TOKENS]
    chunks = []
    for start in range(0, num_chunks * WORD_TOKENS, WORD_TOKENS):
        ids = [tokenizer.bos_token_id, *words[start : start + WORD_TOKENS], tokenizer.eos_token_id]
        chunks.append(ids + [tokenizer.pad_token_id] * (CLIP_TOKENS - len(ids)))
    return torch.tensor(chunks)


def encode_chunks(
    pipeline: Any, prompt: str, *, num_chunks: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Encode a prompt to [1, 77 N, D] and pooled [1, P].

    The chunks follow each other with their first and last tokens, and the pooled embedding is the first
    chunk's: so do the programs in which adapters are used, while kohya's scripts keep one first and one last
    token for the whole prompt.

    Args:
        pipeline: Holds both tokenizers and text encoders.
        prompt: Of any length.
        num_chunks: Chunks of every prompt, so that prompts of a batch have equal lengths.
        device: Of the text encoders.
    """
    parts = ((pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2))
    found = [
        encoder(
            # A new token of several embeddings is one word in a prompt.
            chunk_ids(tokenizer, pipeline.maybe_convert_prompt(prompt, tokenizer), num_chunks=num_chunks).to(
                device
            ),
            output_hidden_states=True,
        )
        for tokenizer, encoder in parts
    ]
    # The last layer but one, as SDXL was trained: Podell et al., arXiv:2307.01952, section 2.
    text = torch.cat([each.hidden_states[-2] for each in found], dim=-1)  # [N, 77, D]
    return rearrange(text, "n l d -> 1 (n l) d"), found[1].text_embeds[:1]
