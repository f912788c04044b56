"""Sizes of text encoders and VAEs against the real classes, without their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from simpletuner.helpers.choices.precisions import PRECISIONS, UNCHANGED
from simpletuner.helpers.models.component_memory import VAE_WEIGHTS, TextEncoder, vae_working_bytes
from simpletuner.helpers.models.registry import memory_of
from tests.benchmarks.blocks import LivePeak

MIXED, FLOAT32 = 2, 4
EDGE = 512


def qwen(hidden: int, intermediate: int, *, ties: bool) -> nn.Module:
    config = Qwen3Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151_936,
        tie_word_embeddings=ties,
    )
    return Qwen3ForCausalLM(config)


def mistral() -> nn.Module:
    text = {
        "model_type": "mistral",
        "hidden_size": 5120,
        "intermediate_size": 32_768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131_072,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 1540,
        "patch_size": 14,
    }
    config = Mistral3Config(
        text_config=text, vision_config=vision, spatial_merge_size=2, tie_word_embeddings=False
    )
    return Mistral3ForConditionalGeneration(config)


def clip_l() -> nn.Module:
    return CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))


def clip_bigg() -> nn.Module:
    config = CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        projection_dim=1280,
    )
    return CLIPTextModelWithProjection(config)


def t5() -> nn.Module:
    config = T5Config(
        d_model=4096,
        d_ff=10_240,
        num_layers=24,
        num_heads=64,
        d_kv=64,
        feed_forward_proj="gated-gelu",
        vocab_size=32_128,
    )
    return T5EncoderModel(config)


# (family, flavour, place) -> the real model.
ENCODERS: dict[tuple[str, str, int], Callable[[], nn.Module]] = {
    ("sdxl", "base-1.0", 0): clip_l,
    ("sdxl", "base-1.0", 1): clip_bigg,
    ("flux", "dev", 0): clip_l,
    ("flux", "dev", 1): t5,
    ("flux2", "klein-base-4b", 0): lambda: qwen(2560, 9728, ties=True),
    ("flux2", "klein-base-9b", 0): lambda: qwen(4096, 12_288, ties=False),
    ("flux2", "dev", 0): mistral,
}


def record(family: str, flavour: str, place: int) -> TextEncoder:
    memory = memory_of(family)
    assert memory is not None
    return memory.TEXT_ENCODERS[flavour][place]


@pytest.mark.parametrize(
    ("which", "make"),
    ENCODERS.items(),
    ids=lambda each: "-".join(map(str, each)) if isinstance(each, tuple) else "",
)
def test_a_text_encoder_has_the_weights_of_its_record(
    which: tuple[str, str, int], make: Callable[[], nn.Module]
) -> None:
    with torch.device("meta"):
        real = make()
    found = record(*which)
    numbers = {id(weight): weight.numel() for weight in real.parameters()}  # tied weights count once
    assert found.num_weights == pytest.approx(sum(numbers.values()), rel=1e-4)
    embeddings = [each.weight for each in real.modules() if isinstance(each, nn.Embedding)]
    assert sum(weight.numel() for weight in embeddings) <= found.kept_weights < found.num_weights / 2


@pytest.mark.parametrize("which", [("sdxl", "base-1.0", 0), ("sdxl", "base-1.0", 1), ("flux", "dev", 1)])
def test_encoding_takes_about_what_is_counted(which: tuple[str, str, int]) -> None:
    found = record(*which)
    with torch.device("meta"):
        real = ENCODERS[which]().to(torch.bfloat16).requires_grad_(False).eval()
        tokens = torch.zeros(1, found.tokens, dtype=torch.long)
    peak = LivePeak([tokens, *real.parameters()])
    with torch.no_grad(), peak:
        real(tokens, output_hidden_states=True)
    assert 0.8 < found.working_bytes(1, bytes_per_number=MIXED) / peak.num_bytes < 1.6


def test_a_quantised_text_encoder_keeps_its_embeddings() -> None:
    found = record("flux", "dev", 1)
    sizes = {
        name: round(found.weight_bytes(PRECISIONS[name], unquantised=MIXED) / 1e9, 1) for name in PRECISIONS
    }
    # documentation/memory.md, T5-XXL.
    assert sizes == {UNCHANGED: 9.5, "int8-torchao": 5.9, "fp8-torchao": 5.9, "nf4-bnb": 4.1}


CHANNELS: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
VAES: dict[str, Callable[[], Any]] = {
    "sdxl": lambda: AutoencoderKL(latent_channels=4, **CHANNELS),
    "flux": lambda: AutoencoderKL(
        latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, **CHANNELS
    ),
    "flux2": AutoencoderKLFlux2,
}


@pytest.mark.parametrize("family", VAES)
def test_a_vae_takes_what_is_counted(family: str) -> None:
    with torch.device("meta"):
        vae = VAES[family]().requires_grad_(False)
        latents = torch.zeros(1, vae.config.latent_channels, EDGE // 8, EDGE // 8)
        pixels = torch.zeros(1, 3, EDGE, EDGE)
    assert sum(weight.numel() for weight in vae.parameters()) == pytest.approx(VAE_WEIGHTS, rel=0.01)
    assert vae.config.latent_channels == memory_of(family).LATENT_CHANNELS  # type: ignore[union-attr]
    for decodes, run, values in ((True, vae.decode, latents), (False, vae.encode, pixels)):
        assert _peak(vae, run, values) == pytest.approx(
            vae_working_bytes(EDGE * EDGE, decodes=decodes, tiles=False), rel=0.01
        )


def _peak(vae: Any, run: Callable[[Tensor], Any], values: Tensor) -> int:
    peak = LivePeak([values, *vae.parameters()])
    with torch.no_grad(), peak:
        run(values)
    return peak.num_bytes


def test_tiling_bounds_what_a_vae_takes_of_large_images() -> None:
    large, tile = 4096 * 4096, 1024 * 1024
    assert vae_working_bytes(large, decodes=True, tiles=True) == vae_working_bytes(
        tile, decodes=True, tiles=False
    )
    assert vae_working_bytes(tile // 4, decodes=True, tiles=True) < vae_working_bytes(
        tile, decodes=True, tiles=True
    )
