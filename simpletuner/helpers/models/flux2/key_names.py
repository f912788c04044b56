"""Layer names of the original Flux.2 checkpoint, for tools outside diffusers."""

from __future__ import annotations

from simpletuner.helpers.models.block_names import flux_names

original_name = flux_names(
    "Flux.2's transformer",
    embedder="time_guidance_embed",
    double={
        "ff.linear_in": "img_mlp.0",
        "ff.linear_out": "img_mlp.2",
        "ff_context.linear_in": "txt_mlp.0",
        "ff_context.linear_out": "txt_mlp.2",
    },
    # Diffusers joins queries, keys, values and MLP too.
    single={"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"},
    outside={
        "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
        "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
        "single_stream_modulation.linear": "single_stream_modulation.lin",
    },
).original
