"""Exported files in the loaders of others: every layer arrives, and does what the live adapter does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel
from lycoris import create_lycoris_from_weights
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from simpletuner.helpers.adapters.files.export import ExportOptions, export_adapter, export_live
from simpletuner.helpers.adapters.network import LycorisAdapter, load_adapter
from simpletuner.helpers.adapters.tlora import mask
from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.io.faults import StorageError
from simpletuner.helpers.io.run_folder import ADAPTER_FILE
from simpletuner.helpers.models import registry
from simpletuner.helpers.models.sdxl.spec import SPEC
from tests.integration.attached import command
from tests.integration.tiny_pipelines import attach, load
from tests.integration.tiny_runs import TinyRun, tiny_model

STOCK = diffusers.StableDiffusionXLPipeline
FAMILIES = registry.specs()


def make_unet() -> UNet2DConditionModel:
    """SDXL's own blocks and layers per block, 32 wide, so that its original names apply."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        norm_num_groups=8,
    ).eval()


def make_pipeline() -> Any:
    pipeline = load(tiny_model(), STOCK)
    pipeline.unet = make_unet()
    return pipeline


def predict(unet: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    latents, tokens = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 64, generator=generator)
    conditions = {"text_embeds": torch.ones(2, 32), "time_ids": torch.ones(2, 6)}
    with torch.no_grad():
        output = unet(
            latents, 500, encoder_hidden_states=tokens, added_cond_kwargs=conditions, return_dict=False
        )
    return output[0]


def saved(pipeline: Any, folder: Path, **options: Any) -> tuple[LycorisAdapter, Path]:
    """A file of an adapter whose factors are off their start; convolutions are among its layers."""
    preset = {"target_module": ["Attention", "ResnetBlock2D", "Downsample2D", "Upsample2D"]}
    adapter = attach(pipeline, apply_preset=preset, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    file = folder / "adapter.safetensors"
    adapter.save(file, metadata={"model_family": "sdxl", "base_model": "tiny", "trigger_words": "sks"})
    return adapter, file


def live(pipeline: Any, adapter: LycorisAdapter, *, timestep: int) -> tuple[Tensor, Tensor]:
    """The prediction with the adapter at a timestep's ranks, and without it."""
    assert adapter.schedule is not None
    mask.set_mask(adapter.schedule, [timestep], group=adapter.group)
    with_adapter = predict(pipeline.unet)
    mask.clear_mask(adapter.group)
    adapter.detach()
    return with_adapter, predict(pipeline.unet)


def close(result: Tensor, expected: Tensor, *, base: Tensor) -> bool:
    """Whether a result is off by less than 1e-5 of what the adapter changes."""
    effect = (expected - base).norm()
    assert effect > 1e-3 * base.norm(), "the adapter changes nothing"
    return bool((result - expected).norm() < 1e-5 * effect + 2e-6 * base.norm())


@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
@pytest.mark.parametrize(
    "options",
    [
        {"tlora_init": "random", "sig_type": "last"},
        {"tlora_init": "weight", "sig_type": "principal", "linear_alpha": 4.0},
        {"tlora_init": "vanilla", "multiplier": 0.5},
        {"linear_alpha": 3.0, "multiplier": 0.5},
    ],
    ids=["random", "weight", "vanilla", "scaled"],
)
def test_stock_diffusers_loads_every_layer_and_predicts_what_the_live_adapter_does(
    options: dict[str, Any], layout: Any, tmp_path: Path
) -> None:
    pipeline = make_pipeline()
    adapter, file = saved(pipeline, tmp_path, **options)
    num_layers = adapter.num_layers
    expected, base = live(pipeline, adapter, timestep=400)
    (exported,) = export_adapter(
        file, tmp_path / "out.safetensors", ExportOptions(layout=layout, timestep=400), families=FAMILIES
    )
    assert len(exported.errors) == num_layers
    assert max(exported.errors.values()) < 1e-7, "the rounding of a scale in float32"
    pipeline.load_lora_weights(str(tmp_path), weight_name="out.safetensors")
    assert sum(isinstance(module, LoraLayer) for module in pipeline.unet.modules()) == num_layers
    assert close(predict(pipeline.unet), expected, base=base)


def test_stock_peft_loads_the_diffusers_layout(tmp_path: Path) -> None:
    pipeline = make_pipeline()
    adapter, file = saved(pipeline, tmp_path)
    expected, base = live(pipeline, adapter, timestep=0)
    output = tmp_path / "out.safetensors"
    export_adapter(file, output, ExportOptions(), families=FAMILIES)
    tensors = {key.removeprefix("unet."): tensor for key, tensor in load_file(output).items()}
    paths = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    unet = inject_adapter_in_model(LoraConfig(r=16, lora_alpha=16, target_modules=paths), make_unet())
    outcome = set_peft_model_state_dict(unet, tensors)
    assert not outcome.unexpected_keys
    assert sum(isinstance(module, LoraLayer) for module in unet.modules()) == adapter.num_layers
    assert close(predict(unet), expected, base=base)


def test_lycoris_loads_its_own_layout_as_a_plain_lora(tmp_path: Path) -> None:
    pipeline = make_pipeline()
    adapter, file = saved(pipeline, tmp_path)
    expected, base = live(pipeline, adapter, timestep=400)
    output = tmp_path / "out.safetensors"
    options = ExportOptions(layout="lycoris", timestep=400)
    export_adapter(file, output, options, families=FAMILIES)
    network, _ = create_lycoris_from_weights(1.0, str(output), pipeline.unet)
    assert {type(module).__name__ for module in network.loras} == {"LoConLayer"}
    assert len(network.loras) == adapter.num_layers
    network.apply_to()
    assert close(predict(pipeline.unet), expected, base=base)


def test_bands_are_files_that_each_hold_the_rank_of_their_middle(tmp_path: Path) -> None:
    pipeline = make_pipeline()
    adapter, file = saved(pipeline, tmp_path)
    written = export_adapter(file, tmp_path / "out.safetensors", ExportOptions(bands=3), families=FAMILIES)
    names = ["out-t0000-0332.safetensors", "out-t0333-0666.safetensors", "out-t0667-1000.safetensors"]
    assert [each.file.name for each in written] == names
    assert adapter.schedule is not None
    assert [each.active_rank for each in written] == [adapter.schedule.rank_at(t) for t in (166, 499, 833)]
    for each in written:
        with safe_open(each.file, "pt") as content:
            assert content.metadata()["timesteps"] == str(list(each.timesteps or ()))
    expected, base = live(pipeline, adapter, timestep=499)
    pipeline.load_lora_weights(str(tmp_path), weight_name=names[1])
    assert close(predict(pipeline.unet), expected, base=base)


def test_export_that_may_not_overwrite_writes_no_band_if_one_exists(tmp_path: Path) -> None:
    _, file = saved(make_pipeline(), tmp_path)
    (tmp_path / "out-t0333-0666.safetensors").write_text("mine")
    options = ExportOptions(bands=3)
    with pytest.raises(StorageError, match="out-t0333-0666"):
        export_adapter(file, tmp_path / "out.safetensors", options, families=FAMILIES, overwrite=False)
    assert [each.name for each in tmp_path.glob("out-*")] == ["out-t0333-0666.safetensors"]
    assert (tmp_path / "out-t0333-0666.safetensors").read_text() == "mine"


def test_layers_of_another_rank_keep_theirs_through_the_diffusers_layout(tmp_path: Path) -> None:
    pipeline = make_pipeline()
    preset = {
        "target_module": ["Attention"],
        "name_algo_map": {"mid_block.*to_q": {"linear_dim": 4, "linear_alpha": 2}},
    }
    adapter = attach(pipeline, apply_preset=preset)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    file = tmp_path / "adapter.safetensors"
    adapter.save(file, metadata={"model_family": "sdxl"})
    expected, base = live(pipeline, adapter, timestep=700)
    (exported,) = export_adapter(
        file, tmp_path / "out.safetensors", ExportOptions(timestep=700), families=FAMILIES
    )
    assert min(exported.ranks) < max(exported.ranks)
    pipeline.load_lora_weights(str(tmp_path), weight_name="out.safetensors")
    assert close(predict(pipeline.unet), expected, base=base)


def test_export_of_a_file_that_was_loaded_and_saved_again_is_the_same(tmp_path: Path) -> None:
    _, file = saved(make_pipeline(), tmp_path)
    again = load_adapter(make_unet(), file)
    again.save(tmp_path / "again.safetensors", metadata={"model_family": "sdxl"})
    for name in ("adapter", "again"):
        export_adapter(
            tmp_path / f"{name}.safetensors",
            tmp_path / f"{name}-out.safetensors",
            ExportOptions(),
            families=FAMILIES,
        )
    first, second = (load_file(tmp_path / f"{name}-out.safetensors") for name in ("adapter", "again"))
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def test_file_of_stock_lycoris_is_exported_from_the_adapter_on_its_base(tmp_path: Path) -> None:
    pipeline = make_pipeline()
    _, file = saved(pipeline, tmp_path, tlora_init="weight", sig_type="principal", multiplier=0.5)
    bare = {
        key: tensor
        for key, tensor in load_file(file).items()
        if not key.endswith(("schedule",)) and "base_" not in key
    }
    save_file(bare, tmp_path / "bare.safetensors")
    with pytest.raises(AdapterError, match="export_live"):
        export_adapter(
            tmp_path / "bare.safetensors", tmp_path / "x.safetensors", ExportOptions(), families=FAMILIES
        )
    pipeline = make_pipeline()
    adapter = load_adapter(pipeline.unet, tmp_path / "bare.safetensors")
    output = tmp_path / "out.safetensors"
    (exported,) = export_live(
        adapter, output, ExportOptions(timestep=400), family=SPEC, metadata={"base_model": "tiny"}
    )
    assert not any(exported.errors.values())
    with safe_open(output, "pt") as content:
        assert content.metadata()["base_model"] == "tiny"
    expected, base = live(pipeline, adapter, timestep=400)
    pipeline.load_lora_weights(str(tmp_path), weight_name="out.safetensors")
    assert close(predict(pipeline.unet), expected, base=base)


@pytest.mark.parametrize("multiplier", [1.0, 0.5])
def test_attached_adapter_and_its_file_give_the_same_export(multiplier: float, tmp_path: Path) -> None:
    adapter, file = saved(make_pipeline(), tmp_path, multiplier=multiplier)
    adapter.set_strength(0.3)
    options = ExportOptions(layout="kohya")
    export_live(adapter, tmp_path / "live.safetensors", options, family=SPEC)
    export_adapter(file, tmp_path / "file.safetensors", options, families=FAMILIES)
    first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("live", "file"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def test_command_writes_the_file_and_says_how_far_it_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, file = saved(make_pipeline(), tmp_path)
    output = tmp_path / "small.safetensors"
    arguments = (
        "--output",
        output,
        "--format",
        "kohya",
        "--form",
        "truncated",
        "--dtype",
        "bf16",
        "--per-layer",
    )
    assert command(monkeypatch, "export", file, *arguments) == 0
    out = capsys.readouterr().out
    assert str(output) in out
    assert "rank 8" in out
    assert "error" in out
    assert len(out.splitlines()) == 1 + adapter.num_layers
    assert re.search(
        r"^\d\.\de-\d\d down_blocks\.1\.attentions\.0\.transformer_blocks\.0\.attn1\.to_q$", out, re.M
    )
    tensors = load_file(output)
    assert {tensor.dtype for key, tensor in tensors.items() if not key.endswith("alpha")} == {torch.bfloat16}
    assert all(key.startswith("lora_unet_") for key in tensors)
    with safe_open(output, "pt") as content:
        header = content.metadata()
    assert header["trigger_words"] == "sks"
    assert "tlora_config" not in header, "a plain LoRA follows no schedule"
    assert command(monkeypatch, "export", file, *arguments) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert command(monkeypatch, "export", file, *arguments, "--overwrite") == 0


@pytest.mark.parametrize("lora_type", ["lycoris", "standard"])
def test_run_leaves_a_comfyui_file_beside_its_adapter_when_asked(lora_type: str, tmp_path: Path) -> None:
    training = TinyRun(tmp_path, keys={"lora_format": "comfyui", "lora_type": lora_type})
    assert training.run(max_train_steps=1) == 0
    output = training.output_dir / "pytorch_lora_weights_comfyui.safetensors"
    tensors = load_file(output)
    assert all(key.startswith("lora_unet_input_blocks") or "_block" in key for key in tensors)
    own = load_file(training.output_dir / ADAPTER_FILE)
    suffix = ".alpha" if lora_type == "lycoris" else ".lora_A.weight"
    count = sum(key.endswith(suffix) for key in own)
    assert sum(key.endswith(".lora_down.weight") for key in tensors) == count
