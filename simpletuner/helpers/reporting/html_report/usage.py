"""Instructions to use the run's adapter: a command line and a Python snippet."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from simpletuner.helpers.models import registry
from simpletuner.helpers.reporting.html_report.folder import RunSnapshot, relative_path
from simpletuner.helpers.reporting.html_report.markup import escape

COMMAND_ID = "use-command"
PYTHON_ID = "use-python"
SWAPPED = tuple(f"pretrained_{part}_model_name_or_path" for part in ("unet", "transformer", "vae", "t5"))
"""Keys that replace a component of the base model."""


def render_usage(run: RunSnapshot) -> str:
    """Command and snippet for the newest adapter; "" before the first one."""
    if run.adapter is None:
        return ""
    where = "" if run.adapter.parent == run.path else f" of {run.adapter.parent.name}, the newest so far"
    blocks = [
        f"<p>The adapter{escape(where)} is <code>{escape(relative_path(run.adapter))}</code>. "
        "The command and the code below generate an image with it, in the working directory of the run.</p>",
        _block(COMMAND_ID, "On the command line", command_line(run)),
        _block(PYTHON_ID, "In Python", python_snippet(run)),
    ]
    for key in SWAPPED:
        if run.config.get(key):
            text = f"This run replaced a component: {key} {relative_path(run.config[key])}."
            blocks.append(f'<p class="note">{escape(text)} Load it into the pipeline too.</p>')
    if run.comfyui is not None:
        blocks.append(f"<p>For ComfyUI: <code>{escape(relative_path(run.comfyui))}</code></p>")
    return "\n".join(blocks)


def command_line(run: RunSnapshot) -> str:
    """The `simpletuner sample` command that generates the run's first validation image."""
    image = _first_image(run)
    options = {
        "--adapter": relative_path(run.adapter or run.path),
        "--prompt": image["prompt"],
        "--size": f"{image['width']}x{image['height']}",
        "--steps": image["steps"],
        "--guidance": f"{image['guidance']:g}",
        "--guidance-real": f"{real:g}"
        if (real := run.config.get("validation_guidance_real") or 1.0) > 1
        else None,
        "--seed": image["seed"],
        "--negative": run.config.get("validation_negative_prompt") or None,
        "--scheduler": run.config.get("validation_noise_scheduler"),
    }
    parts = [f"{name} {shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    return " \\\n  ".join(["simpletuner sample", *parts])


def python_snippet(run: RunSnapshot) -> str:
    """Python code that generates the same image through diffusers."""
    image, config = _first_image(run), run.config
    load = "load_peft_into_pipeline" if config.get("lora_type") == "standard" else "load_into_pipeline"
    loading = {key: config[key] for key in ("revision", "variant") if config.get(key)}
    lines = [
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        f"from simpletuner.helpers.adapters.inference import {load}",
        "",
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        'dtype = torch.bfloat16 if device == "cuda" else torch.float32',
        "pipeline = DiffusionPipeline.from_pretrained(",
        f"    {relative_path(str(config.get('pretrained_model_name_or_path')))!r},",
        "    dtype=dtype,",
        *(f"    {key}={value!r}," for key, value in loading.items()),
        ").to(device)",
        *_scheduler(config),
        f"{load}(pipeline, {relative_path(run.adapter or run.path)!r})",
        "image = pipeline(",
        f"    prompt={image['prompt']!r},",
        *_negative(config),
        f"    width={image['width']},",
        f"    height={image['height']},",
        f"    num_inference_steps={image['steps']},",
        f"    guidance_scale={image['guidance']},",
        f"    generator=torch.Generator().manual_seed({image['seed']}),",
        ").images[0]",
        'image.save("image.png")',
    ]
    return "\n".join(lines)


def _scheduler(config: Mapping[str, Any]) -> list[str]:
    """Lines that give the pipeline the run's scheduler settings where they differ from the model's."""
    changes = {key: config[key] for key in ("prediction_type", "rescale_betas_zero_snr") if config.get(key)}
    if _is_flow(config):
        changes = {}
        if config.get("flow_schedule_auto_shift"):
            changes = {"use_dynamic_shifting": True}
        elif config.get("flow_schedule_shift") is not None:
            changes = {"use_dynamic_shifting": False, "shift": config["flow_schedule_shift"] or 1.0}
    if not changes:
        return []
    given = ", ".join(f"{key}={value!r}" for key, value in changes.items())
    return [
        "pipeline.scheduler = type(pipeline.scheduler).from_config(",
        f"    pipeline.scheduler.config, {given}",
        ")",
    ]


def _negative(config: Mapping[str, Any]) -> list[str]:
    """The negative prompt, for pipelines with a second guidance pass."""
    negative = config.get("validation_negative_prompt")
    if not _is_flow(config):
        return [f"    negative_prompt={negative!r},"] if negative else []
    real = config.get("validation_guidance_real") or 1.0
    return [f"    negative_prompt={negative!r},", f"    true_cfg_scale={real},"] if real > 1 else []


def _is_flow(config: Mapping[str, Any]) -> bool:
    spec = registry.specs().get(str(config.get("model_family")))
    return spec is not None and "flow_matching" in spec.prediction_types


def _first_image(run: RunSnapshot) -> dict[str, Any]:
    """Prompt, size and sampling settings of the first validation image, else of one close to training."""
    config = run.config
    prompt: Mapping[str, Any] = next(iter(run.manifest.get("shots", [])), {})
    prompts = [
        each["instance_prompt"]
        for each in config.get("data_backend_config", [])
        if each.get("instance_prompt")
    ]
    captions = [text for each in run.manifest.get("datasets", []) for _, text in each["captions"]]
    sizes = [prompt.get("size"), *config.get("validation_resolution", ()), "1024x1024"]
    width, height = next(str(size) for size in sizes if size).split("x")
    seeds = [prompt.get("seed"), config.get("validation_seed"), config.get("seed"), 0]
    texts = [prompt.get("prompt"), config.get("validation_prompt"), *prompts, *captions, "a photo"]
    return {
        "prompt": next(text for text in texts if text),
        "width": int(width),
        "height": int(height),
        "steps": config.get("validation_num_inference_steps", 30),
        "guidance": config.get("validation_guidance", 7.5),
        "seed": next(seed for seed in seeds if seed is not None),
    }


def _block(anchor: str, title: str, text: str) -> str:
    return (
        f'<h3>{escape(title)}</h3>\n<div class="code">'
        f'<button type="button" data-copy="{anchor}">Copy</button>'
        f'<pre id="{anchor}"><code>{escape(text)}</code></pre></div>'
    )
