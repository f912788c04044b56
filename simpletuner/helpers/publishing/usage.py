"""Commands and Python code that generate a run's first validation image with its adapter."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from simpletuner.helpers.contracts import ModelSpec

FAMILY = "model_family"
Config = Mapping[str, Any]
"""The resolved configuration."""
Manifest = Mapping[str, Any]
"""The content of run.json; empty for runs of earlier versions."""


def sample_command(config: Config, manifest: Manifest, *, adapter: str, model: str | None = None) -> str:
    """The `simpletuner sample` command, of several lines.

    Args:
        config: The run's.
        manifest: The run's.
        adapter: The adapter file.
        model: The base model, where the file's header does not name it.
    """
    image = example_image(config, manifest)
    real = config.get("validation_guidance_real") or 1.0
    options = {
        "--adapter": adapter,
        "--model": model,
        "--prompt": image["prompt"],
        "--size": f"{image['width']}x{image['height']}",
        "--steps": image["steps"],
        "--guidance": f"{image['guidance']:g}",
        "--guidance-real": f"{real:g}" if real > 1 else None,
        "--seed": image["seed"],
        "--strength": f"{image['strength']:g}" if image["strength"] != 1 else None,
        "--negative": config.get("validation_negative_prompt") or None,
        "--scheduler": config.get("validation_noise_scheduler"),
    }
    given = [(name, value) for name, value in options.items() if value is not None]
    given[1:1] = [("--reference", name) for name in image["references"]]
    parts = [f"{name} {shlex.quote(str(value))}" for name, value in given]
    return " \\\n  ".join(["simpletuner sample", *parts])


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFiles:
    """Python expressions of the paths of a run's files."""

    adapter: str | None
    """None for a new token that was trained alone."""
    embedding: str | None = None
    """Of the run's new token; None without one."""


def pipeline_code(
    config: Config,
    manifest: Manifest,
    *,
    model: str,
    files: WeightFiles,
    spec: ModelSpec | None,
    imports: str = "",
) -> str:
    """Python code that loads the base model's pipeline, the adapter and the new token, and saves image.png.

    Args:
        config: The run's.
        manifest: The run's.
        model: Folder or repository of the base model.
        files: The run's.
        spec: The family; None if it is unknown.
        imports: A further line of imports from other packages.
    """
    image, is_flow = example_image(config, manifest), spec is not None and _is_flow(spec)
    load = "load_peft_into_pipeline" if config.get("lora_type") == "standard" else "load_into_pipeline"
    loaders = {load: files.adapter, "load_embeddings_into_pipeline": files.embedding}
    loaded = {name: file for name, file in loaders.items() if file is not None}
    loading = {key: config[key] for key in ("revision", "variant") if config.get(key)}
    lines = [
        "import torch",
        *_diffusers_imports(image),
        *([imports] if imports else []),
        "",
        f"from simpletuner.helpers.adapters.inference import {', '.join(sorted(loaded))}",
        "",
        *_pipeline(model, loading),
        *_scheduler(config, is_flow=is_flow),
        *(f"{name}(pipeline, {file}{_strength_argument(image)})" for name, file in loaded.items()),
        *_image(config, image, is_flow=is_flow),
    ]
    return "\n".join(lines)


def diffusers_code(
    config: Config, manifest: Manifest, *, model: str, source: str, files: WeightFiles, spec: ModelSpec | None
) -> str:
    """Python code for a LoRA and a new token that diffusers loads by itself.

    Args:
        config: The run's.
        manifest: The run's.
        model: Folder or repository of the base model.
        source: Repository or folder of the LoRA.
        files: The run's.
        spec: The family; None if it is unknown.
    """
    image, is_flow = example_image(config, manifest), spec is not None and _is_flow(spec)
    loading = {key: config[key] for key in ("revision", "variant") if config.get(key)}
    lines = [
        "import torch",
        *_diffusers_imports(image),
        *(["from safetensors.torch import load_file"] if files.embedding else []),
        "",
        *_pipeline(model, loading),
        *_scheduler(config, is_flow=is_flow),
        *([] if files.adapter is None else _diffusers_loading(image, source=source, file=files.adapter)),
        *([] if files.embedding is None else _token_loading(config, files.embedding)),
        *_image(config, image, is_flow=is_flow),
    ]
    return "\n".join(lines)


def whole_model_code(
    config: Config, manifest: Manifest, *, model: str, folder: str, spec: ModelSpec | None
) -> str:
    """Python code that puts a trained denoiser into the base model's pipeline; `folder` is the denoiser's."""
    image, is_flow = example_image(config, manifest), spec is not None and _is_flow(spec)
    name = "transformer" if spec is None else spec.denoiser_name
    loading = {key: config[key] for key in ("revision", "variant") if config.get(key)}
    device, dtype, *pipeline = _pipeline(model, loading)
    lines = [
        "import torch",
        "from diffusers import AutoModel, DiffusionPipeline",
        "",
        device,
        dtype,
        f"{name} = AutoModel.from_pretrained({folder!r}, torch_dtype=dtype)",
        *pipeline[:-1],
        f"    {name}={name},",
        pipeline[-1],
        *_scheduler(config, is_flow=is_flow),
        *_image(config, image, is_flow=is_flow),
    ]
    return "\n".join(lines)


def export_command(folder: str) -> str:
    """The `simpletuner export` command that writes a whole model as a single file."""
    return f"simpletuner export {shlex.quote(folder)} --output model.safetensors"


def example_image(config: Config, manifest: Manifest) -> dict[str, Any]:
    """Prompt, references, size, seed, strength and sampling of the first validation image.

    What there is not is close to training.
    """
    prompt: Mapping[str, Any] = next(iter(manifest.get("shots", [])), {})
    prompts = [
        each["instance_prompt"]
        for each in config.get("data_backend_config", [])
        if each.get("instance_prompt") and teaches(each)
    ]
    captions = [text for each in manifest.get("datasets", []) for _, text in each["captions"]]
    sizes = [prompt.get("size"), *config.get("validation_resolution", ()), "1024x1024"]
    width, height = next(str(size) for size in sizes if size).split("x")
    seeds = [prompt.get("seed"), config.get("validation_seed"), config.get("seed"), 0]
    strengths = [prompt.get("strength"), config.get("validation_lycoris_strength"), 1.0]
    texts = [prompt.get("prompt"), config.get("validation_prompt"), *prompts, *captions, "a photo"]
    return {
        "prompt": next(text for text in texts if text),
        "references": [str(name) for name in prompt.get("references", ())],
        "width": int(width),
        "height": int(height),
        "steps": config.get("validation_num_inference_steps", 30),
        "guidance": config.get("validation_guidance", 7.5),
        "seed": next(seed for seed in seeds if seed is not None),
        "strength": float(next(strength for strength in strengths if strength is not None)),
    }


def teaches(dataset: Mapping[str, Any]) -> bool:
    """Whether an entry's images are trained as what the adapter is for."""
    return not dataset.get("is_regularisation_data") and dataset.get("dataset_type") != "eval"


def _strength_argument(image: Mapping[str, Any]) -> str:
    return f", strength={image['strength']:g}" if image["strength"] != 1 else ""


def _diffusers_imports(image: Mapping[str, Any]) -> list[str]:
    utils = ["from diffusers.utils import load_image"] if image["references"] else []
    return ["from diffusers import DiffusionPipeline", *utils]


def _references(image: Mapping[str, Any]) -> list[str]:
    loaded = [f"load_image({name!r})" for name in image["references"]]
    return (
        [f"    image={loaded[0] if len(loaded) == 1 else '[' + ', '.join(loaded) + ']'},"] if loaded else []
    )


def _token_loading(config: Config, file: str) -> list[str]:
    """Lines that load a new token with diffusers alone."""
    token = str(config.get("placeholder_token"))
    loading = [
        line
        for key, number in (("clip_l", ""), ("clip_g", "_2"))
        for line in (
            "pipeline.load_textual_inversion(",
            f"    embeddings[{key!r}],",
            f"    token={token!r},",
            f"    text_encoder=pipeline.text_encoder{number},",
            f"    tokenizer=pipeline.tokenizer{number},",
            ")",
        )
    ]
    return [
        f"embeddings = load_file({file})",
        *loading,
        "# Else some models take the new token for the end of the prompt.",
        "pipeline.text_encoder_2.text_model.eos_token_id = pipeline.tokenizer_2.eos_token_id",
    ]


def _diffusers_loading(image: Mapping[str, Any], *, source: str, file: str) -> list[str]:
    if image["strength"] == 1:
        return [f"pipeline.load_lora_weights({source!r}, weight_name={file})"]
    return [
        f"pipeline.load_lora_weights({source!r}, weight_name={file}, adapter_name='adapter')",
        f"pipeline.set_adapters('adapter', {image['strength']:g})",
    ]


def _pipeline(model: str, loading: Mapping[str, object]) -> list[str]:
    return [
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        'dtype = torch.bfloat16 if device == "cuda" else torch.float32',
        "pipeline = DiffusionPipeline.from_pretrained(",
        f"    {model!r},",
        "    dtype=dtype,",
        *(f"    {key}={value!r}," for key, value in loading.items()),
        ").to(device)",
    ]


def _image(config: Config, image: Mapping[str, Any], *, is_flow: bool) -> list[str]:
    return [
        "image = pipeline(",
        f"    prompt={image['prompt']!r},",
        *_references(image),
        *_negative(config, is_flow=is_flow),
        f"    width={image['width']},",
        f"    height={image['height']},",
        f"    num_inference_steps={image['steps']},",
        f"    guidance_scale={image['guidance']},",
        f"    generator=torch.Generator().manual_seed({image['seed']}),",
        ").images[0]",
        'image.save("image.png")',
    ]


def _scheduler(config: Config, *, is_flow: bool) -> list[str]:
    """Lines that give the pipeline the run's scheduler settings where they differ from the model's."""
    changes = {key: config[key] for key in ("prediction_type", "rescale_betas_zero_snr") if config.get(key)}
    if is_flow:
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


def _negative(config: Config, *, is_flow: bool) -> list[str]:
    """The negative prompt, for pipelines with a second guidance pass."""
    negative = config.get("validation_negative_prompt")
    if not is_flow:
        return [f"    negative_prompt={negative!r},"] if negative else []
    real = config.get("validation_guidance_real") or 1.0
    return [f"    negative_prompt={negative!r},", f"    true_cfg_scale={real},"] if real > 1 else []


def _is_flow(spec: ModelSpec) -> bool:
    return "flow_matching" in spec.prediction_types
