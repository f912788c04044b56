"""A model that no library knows: transformer, text encoder and pipeline as a library would ship them.

Shapes: B batch, C latent channels, h w latent height and width, N image tokens, L text tokens, D text width.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import CogView4LoraLoaderMixin, PeftAdapterMixin
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

PATCH = 2
PIXELS_PER_LATENT = 8


class LoomAttention(nn.Module):
    """Self-attention of image and text tokens together."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q, self.to_k = nn.Linear(width, width), nn.Linear(width, width)
        self.to_v, self.to_out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        parts = (layer(tokens) for layer in (self.to_q, self.to_k, self.to_v))
        heads = [rearrange(part, "b n (k d) -> b k n d", k=self.num_heads) for part in parts]
        return self.to_out(rearrange(scaled_dot_product_attention(*heads), "b k n d -> b n (k d)"))


class LoomFeedForward(nn.Module):
    """Two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down(gelu(self.up(tokens)))


class LoomBlock(nn.Module):
    """Attention, then feed-forward, each added to what comes in."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention, self.feed_forward = LoomAttention(width, num_heads), LoomFeedForward(width)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm_1(tokens))
        return tokens + self.feed_forward(self.norm_2(tokens))


class LoomTransformer2DModel(PeftAdapterMixin, ModelMixin, ConfigMixin):
    """The velocity at a noise level, from noised latents and text."""

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self, latent_channels: int = 4, width: int = 32, num_heads: int = 2, text_width: int = 16
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH**2 * latent_channels, width)
        self.embed_text = nn.Linear(text_width, width)
        self.embed_time = nn.Linear(width, width)
        self.blocks = nn.ModuleList(LoomBlock(width, num_heads) for _ in range(2))
        self.out = nn.Linear(width, PATCH**2 * latent_channels)
        self.gradient_checkpointing = False

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """[B, C, h, w] at [B] noise levels in [0, 1] with [B, L, D] -> [B, C, h, w]."""
        image = rearrange(hidden_states, "b c (h p) (w q) -> b h w (c p q)", p=PATCH, q=PATCH)
        height, width = image.shape[1:3]
        time = get_timestep_embedding(1000 * timestep, self.config.width).to(image.dtype)
        places = (1000 * torch.arange(size, device=image.device) / size for size in (height, width))
        rows, columns = (get_timestep_embedding(each, self.config.width).to(image.dtype) for each in places)
        image = (self.embed(image) + rows[:, None] + columns).flatten(1, 2)  # [B, N, width]
        tokens = torch.cat([self.embed_text(encoder_hidden_states), image], dim=1)
        tokens = tokens + self.embed_time(time)[:, None]
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens)
            else:
                tokens = block(tokens)
        velocity = self.out(tokens[:, encoder_hidden_states.shape[1] :])
        return rearrange(velocity, "b (h w) (c p q) -> b c (h p) (w q)", h=height, p=PATCH, q=PATCH)


class LoomTextEncoder(ModelMixin, ConfigMixin):
    """A vector for each word, found by a hash of the word; no tokenizer is needed."""

    @register_to_config
    def __init__(self, num_tokens: int = 8, num_words: int = 256, width: int = 16) -> None:
        super().__init__()
        self.words = nn.Embedding(num_words, width)

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """[B, L, D]; the first vector stands for no word."""
        length, num_words = self.config.num_tokens, self.config.num_words
        ids = torch.zeros(len(prompts), length, dtype=torch.int64, device=self.device)
        for row, prompt in zip(ids, prompts, strict=True):
            for place, word in enumerate(prompt.split()[:length]):
                row[place] = 1 + zlib.crc32(word.encode()) % (num_words - 1)
        embedded: Tensor = self.words(ids)
        return embedded


class LoomPipeline(DiffusionPipeline, CogView4LoraLoaderMixin):
    """Images from encoded text."""

    def __init__(
        self,
        vae: AutoencoderKL | None,
        text_encoder: LoomTextEncoder | None,
        transformer: LoomTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae, text_encoder=text_encoder, transformer=transformer, scheduler=scheduler
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=PIXELS_PER_LATENT)

    @torch.no_grad()
    def __call__(
        self,
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor,
        *,
        height: int,
        width: int,
        num_inference_steps: int,
        sigmas: list[float],
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
    ) -> ImagePipelineOutput:
        """One image; guidance takes a second call of the transformer."""
        assert len(sigmas) == num_inference_steps
        shape = (1, self.vae.config.latent_channels, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
        latents = torch.randn(shape, generator=generator).to(prompt_embeds)
        self.scheduler.set_timesteps(sigmas=sigmas, device=latents.device)
        self.scheduler.set_begin_index(0)
        for step, timestep in enumerate(self.scheduler.timesteps):
            time = timestep.expand(1).to(latents.dtype) / 1000
            velocity = self.transformer(latents, timestep=time, encoder_hidden_states=prompt_embeds)
            if guidance_scale > 1:
                away = self.transformer(latents, timestep=time, encoder_hidden_states=negative_prompt_embeds)
                velocity = away + guidance_scale * (velocity - away)
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                callback_on_step_end(self, step, timestep, {})
        decoded = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
        return ImagePipelineOutput(images=self.image_processor.postprocess(decoded))
