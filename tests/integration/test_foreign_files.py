"""Files of other programs in a pipeline: loaders, and the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from simpletuner.helpers.adapters.inference import (
    load_into_pipeline,
    load_peft_into_pipeline,
    remove_from_pipeline,
)
from simpletuner.helpers.adapters.network import load_adapter
from simpletuner.helpers.errors import AdapterError
from tests.integration.attached import command
from tests.integration.flux_pipelines import stock, tiny_flux
from tests.integration.tiny_pipelines import load, sample, trained_adapter_file
from tests.integration.tiny_runs import deep_model
from tests.unit.adapters.files.foreign.makers import lora, original_file, own_file
from tests.unit.adapters.files.foreign.test_standard_lora import OWN_NAMES, underscored
from tests.unit.adapters.files.foreign.test_tlora_of_others import LAYOUTS, build


def kohya(tmp_path: Path) -> Path:
    made = original_file("sdxl", lora, key=underscored("lora_unet_"), alpha=2.0)
    return made.save(tmp_path / "kohya.safetensors")


def diffusers(tmp_path: Path, name: str = "diffusers", **options: Any) -> Path:
    made = own_file("sdxl", lora, key=OWN_NAMES["diffusers unet"], **options)
    return made.save(tmp_path / f"{name}.safetensors")


def test_diffusers_names_give_the_image_of_diffusers_own_loader(tmp_path: Path) -> None:
    file = diffusers(tmp_path)
    ours, theirs = load(deep_model()), load(deep_model())
    base = sample(ours)
    adapter = load_into_pipeline(ours, file)
    assert load_peft_into_pipeline(theirs, file) == "default"
    with_adapter = sample(ours)
    np.testing.assert_allclose(with_adapter, sample(theirs), atol=1e-4)
    assert np.abs(with_adapter - base).max() > 1e-2
    remove_from_pipeline(ours, adapter)
    np.testing.assert_array_equal(sample(ours), base)


def test_loaded_adapters_of_others_stay_active_at_their_strength(tmp_path: Path) -> None:
    first, second = diffusers(tmp_path, "first"), diffusers(tmp_path, "second")
    pipeline, expected = load(deep_model()), load(deep_model())
    pipeline.load_lora_weights(str(tmp_path), weight_name=first.name, adapter_name="default")
    pipeline.set_adapters("default", 0.25)
    assert load_peft_into_pipeline(pipeline, second, strength=0.5) == "default_2"
    assert pipeline.get_list_adapters() == {"unet": ["default", "default_2"]}
    load_into_pipeline(expected, first, strength=0.75)
    np.testing.assert_allclose(sample(pipeline), sample(expected), atol=1e-4)


def test_file_that_diffusers_reads_in_part_leaves_the_pipeline_as_it_was(tmp_path: Path) -> None:
    first = diffusers(tmp_path)
    pipeline = load(deep_model())
    pipeline.load_lora_weights(str(tmp_path), weight_name=first.name, adapter_name="theirs")
    before = sample(pipeline)
    # diffusers counts blocks by the tiny model's layers per block, so some keys match nothing there.
    with pytest.raises(AdapterError, match=r"only \d of its 9 layers"):
        load_peft_into_pipeline(pipeline, kohya(tmp_path))
    assert pipeline.get_list_adapters() == {"unet": ["theirs"]}
    np.testing.assert_allclose(sample(pipeline), before, atol=1e-5)


def test_file_whose_width_diffusers_does_not_know_is_one_line_and_loads_here(tmp_path: Path) -> None:
    made = original_file("flux", lora, key=underscored("lora_unet_"), alpha=2.0)
    file = made.save(tmp_path / "a.safetensors")
    pipeline = stock("FluxPipeline").from_pretrained(tiny_flux())
    with pytest.raises(AdapterError, match="load_into_pipeline") as caught:
        load_peft_into_pipeline(pipeline, file)
    assert str(caught.value).startswith(f"{file}: diffusers cannot load it: ")
    assert "\n" not in str(caught.value)
    assert load_into_pipeline(pipeline, file).num_layers == len(made.deltas)


def pixels(folder: Path) -> np.ndarray:
    return np.asarray(Image.open(next(folder.iterdir()))).astype(int)


@pytest.mark.parametrize("make", [kohya, diffusers])
def test_sample_needs_the_model_of_a_file_that_names_none_and_applies_it(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make(tmp_path)
    arguments = ("--adapter", file, "--prompt", "a cat", "--size", 64, "--steps", 2, "--guidance", 1)
    assert command(monkeypatch, "sample", *arguments, "--output", tmp_path / "none") == 2
    model = ("--family", "sdxl", "--model", deep_model())
    assert command(monkeypatch, "sample", *arguments, *model, "--output", tmp_path / "out") == 0
    pipeline = load(deep_model())
    load_into_pipeline(pipeline, file)
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 64, "width": 64}
    expected = pipeline("a cat", generator=torch.Generator().manual_seed(0), **options).images[0]
    assert np.abs(pixels(tmp_path / "out") - np.asarray(expected)).max() <= 1


def arguments(file: Path, output: Path) -> tuple[object, ...]:
    options = ("--size", 64, "--steps", 2, "--guidance", 1)
    return "--adapter", file, "--prompt", "a cat", *options, "--output", output


@pytest.mark.parametrize("layout", ["kohya", "comfyui", "lycoris", "diffusers"])
def test_own_exports_are_sampled_in_every_layout(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, file = trained_adapter_file(), tmp_path / "out.safetensors"
    fixed = ("--rank", 8, "--format", layout)
    assert command(monkeypatch, "export", source, "--output", file, *fixed) == 0
    assert command(monkeypatch, "sample", *arguments(file, tmp_path / "plain")) == 0
    # The same ranks at every timestep, from the T-LoRA file itself.
    every = ("--schedule", "min_rank=8")
    assert command(monkeypatch, "sample", *arguments(source, tmp_path / "live"), *every) == 0
    assert np.abs(pixels(tmp_path / "plain") - pixels(tmp_path / "live")).max() <= 1
    assert command(monkeypatch, "sample", *arguments(source, tmp_path / "masked")) == 0
    assert np.abs(pixels(tmp_path / "masked") - pixels(tmp_path / "live")).max() > 1


def test_schedule_of_an_export_replaces_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = trained_adapter_file()
    files = [tmp_path / f"{name}.safetensors" for name in ("own", "fixed", "given")]
    at = ("--timestep", 1000)
    assert command(monkeypatch, "export", source, "--output", files[0], *at) == 0
    assert command(monkeypatch, "export", source, "--output", files[1], "--rank", 5) == 0
    assert command(monkeypatch, "export", source, "--output", files[2], *at, "--schedule", "min_rank=5") == 0
    own, fixed, given = map(load_file, files)
    assert {tensor.shape[0] for key, tensor in own.items() if ".lora_A." in key} == {4}
    assert fixed.keys() == given.keys()
    assert all(torch.equal(fixed[key], given[key]) for key in given)


def test_file_of_another_trainer_is_exported_with_its_base_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, deltas = build("sdxl", LAYOUTS["simpletuner checkpoint"])
    source, file = made.save(tmp_path / "source.safetensors"), tmp_path / "out.safetensors"
    assert command(monkeypatch, "export", source, "--output", file) == 1
    assert "--model" in capsys.readouterr().err
    options = ("--model", deep_model(), "--family", "sdxl", "--timestep", 500)
    assert command(monkeypatch, "export", source, "--output", file, *options) == 0
    live, exported = (load(deep_model()).unet.eval() for _ in range(2))
    adapter = load_adapter(live, source)
    load_adapter(exported, file)
    with torch.no_grad(), adapter.rank_mask_for([500]):
        for path in deltas:
            layer = live.get_submodule(path)
            x = torch.randn(1, layer.weight.shape[1], *(6, 6) * (layer.weight.ndim == 4))
            torch.testing.assert_close(exported.get_submodule(path)(x), layer(x), rtol=1e-4, atol=1e-4)


def test_wrong_schedule_on_the_command_line_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = trained_adapter_file()
    assert command(monkeypatch, "sample", *arguments(source, tmp_path / "out"), "--schedule", "rank=3") == 2
    assert "--schedule" in capsys.readouterr().err
    assert (
        command(monkeypatch, "export", source, "--output", tmp_path / "a", "--schedule", "min_rank=99") == 1
    )
    assert "min_rank 99" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
