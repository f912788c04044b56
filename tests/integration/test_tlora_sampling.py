"""Bundled SDXL pipelines with a T-LoRA adapter: the right ranks at every step, and none left behind."""

from __future__ import annotations

import json
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from lycoris import create_lycoris_from_weights
from lycoris.modules.tlora import TLoraModule
from PIL import Image
from safetensors.torch import load_file, save_file

from simpletuner.helpers.adapters.network import LycorisAdapter, load_adapter
from simpletuner.helpers.adapters.pipeline import MaskedDenoising, schedules_of
from simpletuner.helpers.adapters.tlora import mask
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule
from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.models.sdxl.pipeline import (
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from tests.integration.tiny_pipelines import attach, load, sample, trained_adapter_file
from tests.integration.tiny_runs import tiny_model

SCHEDULE = RankSchedule(8, min_rank=2)
CONFIG = {"max_rank": 8, "min_rank": 2, "alpha": 1.0}
SCHEDULERS = [
    EulerDiscreteScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
    DDIMScheduler,
]
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def model() -> Path:
    return tiny_model()


@pytest.fixture(scope="module")
def adapter_file() -> Path:
    return trained_adapter_file()


def record_steps(
    pipeline: Any, adapter: LycorisAdapter, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[int, int]]:
    """(timestep handed to scheduler.step, open ranks in the denoiser call before it) of each step."""
    steps: list[tuple[int, int]] = []
    open_ranks: list[int] = []

    def look(*_: object) -> None:
        current = mask.current_mask(adapter.group, 8)
        assert current is not None
        assert current.shape == (1, 8)
        open_ranks.append(int(current.sum()))

    pipeline.unet.conv_in.register_forward_hook(look)
    step = pipeline.scheduler.step

    def watched(output: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append((int(timestep), open_ranks[-1]))
        assert mask.current_mask(adapter.group, 8) is None, "the mask outlived the denoiser call"
        return step(output, timestep, *args, **kwargs)

    monkeypatch.setattr(pipeline.scheduler, "step", watched)
    return steps


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("strength", [None, 0.3, 1.0], ids=lambda value: f"strength {value}")
def test_every_step_opens_the_ranks_of_the_timestep_it_removes(
    scheduler: Any, strength: float | None, model: Path, adapter_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = (
        [StableDiffusionXLPipeline]
        if strength is None
        else [
            StableDiffusionXLImg2ImgPipeline,
            StableDiffusionXLInpaintPipeline,
        ]
    )
    for kind in kinds:
        pipeline = load(model, kind)
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
        adapter = load_adapter(pipeline.unet.eval(), adapter_file)
        pipeline._tlora_config = adapter.tlora_config
        steps = record_steps(pipeline, adapter, monkeypatch)
        options: dict[str, Any] = {"num_inference_steps": 7}
        if strength is not None:
            options |= {"image": PICTURE, "strength": strength}
        if kind is StableDiffusionXLInpaintPipeline:
            options |= {"mask_image": PICTURE.convert("L")}
        sample(pipeline, **options)
        assert len(steps) >= 2
        assert len({rank for _, rank in steps}) > 1 or strength == 0.3
        assert steps == [(timestep, SCHEDULE.rank_at(timestep)) for timestep, _ in steps]


@pytest.mark.parametrize(
    ("options", "ranks"),
    [({}, (8, 4)), ({"algo": "tlokr", "linear_dim": 3, "extra": {"factor": 8}}, (3, 2))],
    ids=["tlora", "tlokr"],
)
def test_every_step_has_the_scale_and_the_own_schedule_of_each_layer(
    model: Path, options: dict[str, Any], ranks: tuple[int, int]
) -> None:
    # FeedForward alone has its own minimum; the factor is each layer's rank over its active ranks.
    own = {"FeedForward": {"dim": ranks[1], "tlora_min_rank": 1}}
    preset = {"target_module": ["Attention"], "module_algo_map": own}
    pipeline = load(model)
    adapter = attach(pipeline, tlora_scale="active", apply_preset=preset, **options)
    pipeline._tlora_config = adapter.tlora_config
    rows: dict[str, list[list[float]]] = {"attn": [], "ff": []}
    for layer in adapter.lycoris_network.loras:
        part = "attn" if "attn1_to_q" in layer.lora_name else "ff" if "ff_net_2" in layer.lora_name else None
        if part is not None and not rows[part]:
            rows[part].append([])
            layer.register_forward_pre_hook(
                lambda layer, _, part=part: rows[part].append(
                    layer._group.current(layer.ranks).values.tolist()[0]
                )
            )
    timesteps: list[int] = []
    sample(
        pipeline,
        callback_on_step_end=lambda _pipe, _step, timestep, kwargs: timesteps.append(int(timestep)) or kwargs,
    )
    assert len(timesteps) == 4
    for part, schedule in {
        "attn": RankSchedule(ranks[0], min_rank=2, scale="active"),
        "ff": RankSchedule(ranks[1], min_rank=1, scale="active"),
    }.items():
        assert rows[part][1:] == [schedule.mask([timestep]).tolist()[0] for timestep in timesteps]


def test_mask_is_gone_after_a_call_that_raises(model: Path, adapter_file: Path) -> None:
    pipeline = load(model)
    adapter = load_adapter(pipeline.unet.eval(), adapter_file)
    pipeline._tlora_config = CONFIG

    def fail(*_: object) -> None:
        raise KeyError("denoiser")

    hook = pipeline.unet.conv_out.register_forward_hook(fail)
    with pytest.raises(KeyError, match="denoiser"):
        sample(pipeline)
    assert mask.current_mask(adapter.group, 8) is None
    hook.remove()
    hooks = len(pipeline.unet._forward_hooks), len(pipeline.unet._forward_pre_hooks)
    assert hooks == (0, 0)
    sample(pipeline)


def test_well_known_recipe_is_masked_and_equals_the_live_adapter(model: Path, adapter_file: Path) -> None:
    pipeline = load(model)
    base = sample(pipeline)
    network, _ = create_lycoris_from_weights(1.0, str(adapter_file), pipeline.unet.eval())
    network.merge_to()
    unmasked = sample(pipeline)
    pipeline._tlora_config = CONFIG
    masked = sample(pipeline)
    live = load(model)
    live._tlora_config = load_adapter(live.unet.eval(), adapter_file).tlora_config
    np.testing.assert_allclose(masked, sample(live), rtol=0, atol=1e-6)
    assert np.abs(masked - unmasked).max() > 1e-3, "the mask changes nothing"
    assert np.abs(masked - base).max() > 1e-3, "the adapter changes nothing"


@pytest.mark.parametrize(("created", "merged"), [(0.5, 1.0), (1.0, 0.5), (0.5, 0.5)])
def test_recipe_multiplies_the_strengths_of_both_calls(
    created: float, merged: float, model: Path, adapter_file: Path
) -> None:
    pipeline, live = load(model), load(model)
    network, _ = create_lycoris_from_weights(created, str(adapter_file), pipeline.unet.eval())
    network.merge_to(merged)
    network.merge_to(merged)  # attached already
    pipeline._tlora_config = live._tlora_config = CONFIG
    load_adapter(live.unet.eval(), adapter_file, strength=created * merged)
    np.testing.assert_allclose(sample(pipeline), sample(live), rtol=0, atol=1e-6)


def test_recipe_carries_the_multiplier_of_the_training(model: Path, tmp_path: Path) -> None:
    pipeline, again, file = load(model), load(model), tmp_path / "a.safetensors"
    adapter = attach(pipeline, multiplier=0.5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    adapter.save(file, metadata={})
    network, _ = create_lycoris_from_weights(1.0, str(file), again.unet.eval())
    network.merge_to()
    pipeline._tlora_config = again._tlora_config = CONFIG
    np.testing.assert_allclose(sample(again), sample(pipeline), rtol=0, atol=1e-5)


def test_schedule_whose_adapter_stock_lycoris_merged_is_refused_with_the_line_to_move(
    model: Path, adapter_file: Path
) -> None:
    pipeline = load(model)
    stored = load_file(adapter_file)
    named = {f"lycoris_{path}".replace(".", "_"): each for path, each in pipeline.unet.named_modules()}
    name = next(key.split(".")[0] for key in stored)
    keys = ("q_layer.weight", "p_layer.weight", "lambda_layer", "alpha")
    stock = TLoraModule.make_module_from_state_dict(
        name, named[name], *(stored[f"{name}.{key}"] for key in keys)
    )
    stock.merge_to(1.0)
    pipeline._tlora_config = CONFIG
    with pytest.raises(AdapterError, match=r"move the import.*create_lycoris_from_weights"):
        sample(pipeline)
    del pipeline._tlora_config
    sample(pipeline)


def test_detached_adapter_leaves_the_pipeline_bit_identical(model: Path, adapter_file: Path) -> None:
    pipeline = load(model)
    before, weights = sample(pipeline), {k: v.clone() for k, v in pipeline.unet.state_dict().items()}
    adapter = load_adapter(pipeline.unet, adapter_file)
    pipeline._tlora_config = adapter.tlora_config
    sample(pipeline)
    pipeline._tlora_config = None
    adapter.detach()
    assert np.array_equal(sample(pipeline), before)
    assert all(torch.equal(value, weights[key]) for key, value in pipeline.unet.state_dict().items())


def test_save_pretrained_of_an_adapted_model_holds_the_base_alone(
    model: Path, adapter_file: Path, tmp_path: Path
) -> None:
    pipeline = load(model)
    load_adapter(pipeline.unet, adapter_file)
    pipeline.unet.save_pretrained(tmp_path / "unet")
    again = type(pipeline.unet).from_pretrained(tmp_path / "unet")
    plain = load(model).unet
    assert again.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_rank": 16}, r"max_rank 16,.* 8\b"),
        ({"rank": 8}, "max_rank .*num_timesteps.*; found rank"),
        ({"max_rank": 8, "alpha": -1.0}, "alpha -1.0 must be"),
    ],
)
def test_config_that_does_not_fit_is_refused_before_any_step(
    config: dict[str, Any], message: str, model: Path, adapter_file: Path
) -> None:
    pipeline = load(model)
    load_adapter(pipeline.unet.eval(), adapter_file)
    pipeline._tlora_config = config
    with pytest.raises(AdapterError, match=message):
        sample(pipeline)


def test_sampling_while_a_backward_is_pending_is_refused_and_leaves_its_mask(
    model: Path, adapter_file: Path
) -> None:
    pipeline = load(model)
    adapter = load_adapter(pipeline.unet.eval(), adapter_file)
    pipeline._tlora_config = adapter.tlora_config
    with adapter.rank_mask_for([500]):
        with pytest.raises(RuntimeError, match="held for a backward"):
            sample(pipeline)
        assert mask.current_mask(adapter.group, 8) is not None


def test_config_for_one_network_leaves_what_another_states(model: Path, adapter_file: Path) -> None:
    pipeline = load(model)
    first, second = attach(pipeline), attach(pipeline, tlora_alpha=2.0, tlora_schedule="inclusive")
    found = schedules_of(pipeline.unet, config=first.tlora_config, scheduler=pipeline.scheduler)
    assert found == {first.group: first.schedule, second.group: second.schedule}
    first.detach()
    found = schedules_of(pipeline.unet, config={"max_rank": 8, "alpha": 1.5}, scheduler=pipeline.scheduler)
    assert found == {second.group: RankSchedule(8, min_rank=2, alpha=1.5, variant="inclusive")}


def test_one_denoiser_in_two_threads_is_refused_and_two_denoisers_are_not(
    model: Path, adapter_file: Path
) -> None:
    pipelines = [load(model), load(model)]
    expected = []
    for pipeline in pipelines:
        pipeline._tlora_config = load_adapter(pipeline.unet.eval(), adapter_file).tlora_config
        expected.append(sample(pipeline))
    found: dict[str, Any] = {}

    def elsewhere(name: str, pipeline: Any) -> None:
        try:
            found[name] = sample(pipeline)
        except RuntimeError as error:
            found[name] = error

    def during_a_step(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            for name, other in (("same", pipelines[0]), ("other", pipelines[1])):
                thread = threading.Thread(target=elsewhere, args=(name, other))
                thread.start()
                thread.join()
        return values

    here = sample(pipelines[0], callback_on_step_end=during_a_step)
    assert isinstance(found["same"], RuntimeError)
    assert "thread" in str(found["same"])
    assert np.array_equal(here, expected[0])
    assert np.array_equal(found["other"], expected[1])


@pytest.fixture(scope="module")
def model_of_two_dtypes(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as SDXL is usually published: its text encoders state and hold float16, the UNet float32."""
    folder = tmp_path_factory.mktemp("two_dtypes") / "model"
    shutil.copytree(model, folder)
    for name in ("text_encoder", "text_encoder_2"):
        config = folder / name / "config.json"
        stated = dict.fromkeys(("dtype", "torch_dtype"), "float16")
        config.write_text(json.dumps(json.loads(config.read_text()) | stated))
        weights = folder / name / "model.safetensors"
        halves = {key: tensor.half() for key, tensor in load_file(weights).items()}
        save_file(halves, weights, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("README.md", "readme"),
        ("documentation/tlora.md", "recipe"),
        ("documentation/tlora.md", "loader"),
        ("documentation/tlora.md", "mixin"),
    ],
)
def test_code_of_the_documentation_runs(
    file: str,
    name: str,
    model_of_two_dtypes: Path,
    adapter_file: Path,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page = (repository / file).read_text()
    block = re.search(rf"<!-- tested: {name} -->\n```python\n(.+?)```", page, re.DOTALL)
    assert block is not None
    code = block[1].replace("stabilityai/stable-diffusion-xl-base-1.0", str(model_of_two_dtypes))
    code = code.replace("output/mine/", "").replace(").images", ", num_inference_steps=2).images")
    code = code.replace('{"max_rank": 64, "min_rank": 32, "alpha": 1.0}', str(CONFIG))
    monkeypatch.chdir(adapter_file.parent)
    names: dict[str, Any] = {}
    exec(compile(code, f"{file} {name}", "exec"), names)
    if name == "mixin":
        assert issubclass(names["MyPipeline"], MaskedDenoising)
    else:
        assert isinstance(names["image"], Image.Image)
