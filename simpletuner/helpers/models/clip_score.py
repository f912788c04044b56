"""CLIP score: how well an image follows its prompt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.io.names import one_line_reason
from simpletuner.helpers.models.loading import ModelSource, search

KEY = "pretrained_evaluation_model_name_or_path"
_WEIGHTS = "model*.safetensors"
_FILES = ("*.json", "*.txt", _WEIGHTS)


class ClipScorer:
    """Scores images with a CLIP model, which is in memory only while it scores."""

    def __init__(self, source: str, *, device: torch.device) -> None:
        """Find the model, or download it.

        Args:
            source: A folder with a CLIP model in transformers' layout, or its repository.
            device: Where it computes.

        Raises:
            ModelError: It cannot be found, or has no weights as safetensors.
        """
        folder, is_whole = search(
            ModelSource(source, key=KEY), _FILES, look=lambda root: any(root.glob(_WEIGHTS)) or None
        )
        if not is_whole:
            raise ModelError(
                f"{KEY} {source}: holds no model.safetensors. Name a CLIP model in transformers' layout with "
                "its weights as safetensors."
            )
        self._folder, self._device = folder, device

    @torch.no_grad()
    def scores(self, images: Mapping[str, Path], prompts: Mapping[str, str]) -> dict[str, float]:
        """100 times the cosine between the embeddings of each image and its prompt, 0 where that is negative.

        A prompt longer than the text encoder's limit counts up to it.

        Args:
            images: Name -> file.
            prompts: Name -> prompt, with the same names.

        Raises:
            ModelError: The model cannot be loaded, or lacks weights.

        Source: CLIPScore, arXiv:2104.08718, with the factor 100 in place of 2.5.
        """
        try:
            loaded: Any = CLIPModel.from_pretrained(
                self._folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = CLIPTokenizer.from_pretrained(self._folder)
            processor = CLIPImageProcessorPil.from_pretrained(self._folder)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ModelError(f"{KEY} {self._folder}: {one_line_reason(error)}") from error
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise ModelError(
                f"{KEY} {self._folder}: is no CLIP model, {len(missing)} of its weights are missing, "
                f"{missing[0]} among them. Name a model of text and images."
            )
        model = model.eval().to(self._device)
        found = {}
        for name, file in images.items():
            with Image.open(file) as image:
                pixels = processor(images=[image.convert("RGB")], return_tensors="pt")["pixel_values"]
            tokens = tokenizer(
                [prompts[name]],
                truncation=True,
                max_length=model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            )
            output = model(
                input_ids=tokens["input_ids"].to(self._device),
                attention_mask=tokens["attention_mask"].to(self._device),
                pixel_values=pixels.to(self._device),
            )
            cosine = torch.cosine_similarity(output.image_embeds, output.text_embeds)  # [1]
            found[name] = 100 * max(0.0, float(cosine))
        return found
