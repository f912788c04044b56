"""Layer names of the original Flux.1 checkpoint, for tools outside diffusers."""

from __future__ import annotations

from simpletuner.helpers.models.block_names import flux_names, joined

original_name = flux_names(
    "Flux.1's transformer",
    embedder="time_text_embed",
    double={
        "norm1.linear": "img_mod.lin",
        "norm1_context.linear": "txt_mod.lin",
        "ff.net.0.proj": "img_mlp.0",
        "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0",
        "ff_context.net.2": "txt_mlp.2",
    },
    single={
        "norm.linear": "modulation.lin",
        # The MLP is four times as wide as the model.
        **joined("linear1", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", shares=(1, 1, 1, 4)),
        "proj_out": "linear2",
    },
    outside={
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    },
).original
