"""A tiny CLIP model in transformers' layout."""

from __future__ import annotations

from pathlib import Path

from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPVisionConfig

from simpletuner.helpers.models.tiny_parts import (
    CLIP_END,
    clip_text_config,
    fill_weights,
    make_clip_tokenizer,
)


def save_tiny_clip(folder: Path) -> Path:
    """Write a CLIP model of two small towers with its tokenizer and image processor; the same every time."""
    tokenizer = make_clip_tokenizer(pad=CLIP_END)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=16,
    )
    text = clip_text_config(tokenizer, width=16)
    model = CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    )
    fill_weights(model, seed=3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )
    return folder
