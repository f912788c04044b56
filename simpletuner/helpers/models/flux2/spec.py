"""What Flux.2 is, as plain data; read before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from simpletuner.helpers.contracts import ModelSpec, TargetAlias
from simpletuner.helpers.models.flux2.key_names import original_name
from simpletuner.helpers.models.key_groups import (
    FLOW_KEYS,
    GUIDANCE_KEYS,
    TRANSFORMER_KEYS,
    single_file,
    unused_guidance_keys,
)


@dataclass(frozen=True, slots=True)
class Flux2Flavour:
    """What sets one Flux.2 apart from another."""

    repository: str
    has_guidance: bool
    """Whether the transformer is told a guidance scale."""


FLAVOURS: Mapping[str, Flux2Flavour] = {
    "dev": Flux2Flavour("black-forest-labs/FLUX.2-dev", has_guidance=True),
    "klein-base-4b": Flux2Flavour("black-forest-labs/FLUX.2-klein-base-4B", has_guidance=False),
    "klein-base-9b": Flux2Flavour("black-forest-labs/FLUX.2-klein-base-9B", has_guidance=False),
    "klein-4b": Flux2Flavour("black-forest-labs/FLUX.2-klein-4B", has_guidance=False),
    "klein-9b": Flux2Flavour("black-forest-labs/FLUX.2-klein-9B", has_guidance=False),
}
MOST_SINGLE_BLOCKS = 48
"""Of dev; Klein has 20 and 24."""


def problems(values: Mapping[str, object]) -> Mapping[str, str]:
    """Key -> what is wrong with its value for Flux.2."""
    found: dict[str, str] = {}
    flavour = FLAVOURS.get(str(values.get("model_flavour")))
    if flavour is not None and not flavour.has_guidance:
        found |= unused_guidance_keys(values, instead="dev")
    return found | single_file(values, "pretrained_vae_model_name_or_path", what="Flux.2's VAE is")


SPEC = ModelSpec(
    name="flux2",
    flavours={name: flavour.repository for name, flavour in FLAVOURS.items()},
    default_flavour="klein-base-4b",
    prediction_types=("flow_matching",),
    pixel_alignment=16,
    minimum_alignment=16,
    default_resolution=1024,
    lora_targets=(
        *("to_k", "to_q", "to_v", "to_out.0"),
        *("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"),
        "to_qkv_mlp_proj",
        # By their whole paths: "to_out" alone is also the list around a double block's "to_out.0".
        *(f"single_transformer_blocks.{index}.attn.to_out" for index in range(MOST_SINGLE_BLOCKS)),
    ),
    denoiser_name="transformer",
    own_keys=FLOW_KEYS | GUIDANCE_KEYS | TRANSFORMER_KEYS,
    default_guidance=4.0,
    num_text_encoders=1,
    problems=problems,
    target_aliases={
        # A single block's attention and feed-forward layers are joined, and its class is an attention's.
        "Attention": TargetAlias(modules=("Flux2Attention", "Flux2ParallelSelfAttention")),
        "FeedForward": TargetAlias(modules=("Flux2FeedForward",)),
    },
    original_name=original_name,
)
