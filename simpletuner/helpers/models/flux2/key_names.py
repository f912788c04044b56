"""What the original Flux.2 checkpoint calls the layers of the transformer, for tools outside diffusers."""

from __future__ import annotations

from simpletuner.helpers.models.block_names import BlockNames, Names, joined, swap_scale_shift

_DOUBLE: Names = {
    **joined("img_attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    **joined("txt_attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
# Queries, keys, values and MLP are one layer in diffusers too.
_SINGLE: Names = {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}
_OUTSIDE: Names = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "norm_out.linear": swap_scale_shift("final_layer.adaLN_modulation.1"),
    "proj_out": "final_layer.linear",
}

original_name = BlockNames(
    model="Flux.2's transformer",
    blocks={
        "transformer_blocks": ("double_blocks", _DOUBLE),
        "single_transformer_blocks": ("single_blocks", _SINGLE),
    },
    outside=_OUTSIDE,
).original
