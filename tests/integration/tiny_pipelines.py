"""Pipelines over the tiny SDXL model, and the file of an adapter that was as if trained."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simpletuner.helpers.adapters.network import LycorisAdapter
from simpletuner.helpers.models.sdxl.pipeline import StableDiffusionXLPipeline
from simpletuner.helpers.models.sdxl.spec import SPEC
from tests.integration.attached import attach_tlora, move_off_start
from tests.integration.tiny_runs import tiny_model


def load(model: Path, kind: Any = StableDiffusionXLPipeline) -> Any:
    pipeline = kind.from_pretrained(model, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def attach(pipeline: Any, **options: Any) -> LycorisAdapter:
    return attach_tlora(pipeline.unet, SPEC, **options)


def sample(pipeline: Any, **options: Any) -> np.ndarray:
    options = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "np"} | options
    if "image" not in options:
        options = {"height": 64, "width": 64} | options
    prompt = {} if "prompt_embeds" in options else {"prompt": "a photo of sks cat"}
    generator = torch.Generator().manual_seed(5)
    return pipeline(**prompt, generator=generator, **options).images[0]


@functools.cache
def trained_adapter_file(**options: Any) -> Path:
    """An adapter file of rank 8 (options are keys of the lycoris json) whose factors are off their start."""
    adapter = attach(load(tiny_model()), **options)
    move_off_start(adapter, by=0.1)
    file = Path(tempfile.mkdtemp(prefix="tiny_adapter_")) / "pytorch_lora_weights.safetensors"
    adapter.save(file, metadata={"base_model": str(tiny_model()), "model_family": "sdxl"})
    return file
