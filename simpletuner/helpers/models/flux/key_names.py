"""What the original Flux.1 checkpoint calls the layers of the transformer, for tools outside diffusers."""

from __future__ import annotations

from simpletuner.helpers.models.block_names import BlockNames, Names, joined, swap_scale_shift

_DOUBLE: Names = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    **joined("img_attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    **joined("txt_attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_SINGLE: Names = {
    "norm.linear": "modulation.lin",
    # The MLP is four times as wide as the model.
    **joined("linear1", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", shares=(1, 1, 1, 4)),
    "proj_out": "linear2",
}
_OUTSIDE: Names = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "norm_out.linear": swap_scale_shift("final_layer.adaLN_modulation.1"),
    "proj_out": "final_layer.linear",
}

original_name = BlockNames(
    model="Flux.1's transformer",
    blocks={
        "transformer_blocks": ("double_blocks", _DOUBLE),
        "single_transformer_blocks": ("single_blocks", _SINGLE),
    },
    outside=_OUTSIDE,
).original
