"""`simpletuner merge`, `resize` and `extract` as a user types them, on a tiny SDXL model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from simpletuner.helpers.adapters.network import load_adapter
from simpletuner.helpers.models.sdxl.tiny import make_unet
from tests.integration.attached import command
from tests.integration.tiny_pipelines import load, trained_adapter_file
from tests.integration.tiny_runs import deep_model
from tests.unit.adapters.files.foreign.makers import effect_error, lora, original_file
from tests.unit.adapters.files.foreign.test_standard_lora import underscored

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def kohya(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A LoRA of rank 4 with the original names, and its deltas."""
    made = original_file("sdxl", lora, key=underscored("lora_unet_"), alpha=2.0)
    return made.save(tmp_path / "kohya.safetensors"), made.deltas


def test_merge_adds_files_with_the_model_that_names_their_layers(
    kohya: tuple[Path, dict[str, Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, deltas = kohya
    output = tmp_path / "out.safetensors"
    arguments = ("merge", file, file, "--output", output, "--weights=0.5,-2")
    assert command(monkeypatch, *arguments) == 1
    assert "--model" in capsys.readouterr().err
    assert command(monkeypatch, *arguments, "--model", deep_model(), "--per-layer") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{output}: ")
    assert len(printed) == 1 + len(deltas)
    assert all(re.match(r"\d\.\de[-+]\d\d  rank 8 ", line) for line in printed[1:])
    unet = load(deep_model()).unet
    load_adapter(unet, output)
    assert max(effect_error(unet, path, -1.5 * delta) for path, delta in deltas.items()) < 1e-4
    assert command(monkeypatch, *arguments, "--model", deep_model()) == 1
    assert "--overwrite" in capsys.readouterr().err
    options = ("--overwrite", "--rank", 3, "--dtype", "bf16", "--format", "kohya", "--model", deep_model())
    assert command(monkeypatch, *arguments, *options) == 0
    tensors = load_file(output)
    downs = [tensor for key, tensor in tensors.items() if key.endswith(".lora_down.weight")]
    assert {tensor.shape[0] for tensor in downs} == {3}
    assert {tensor.dtype for tensor in downs} == {torch.bfloat16}
    assert all(key.startswith("lora_unet_") for key in tensors)


def test_merge_of_two_tloras_folds_them_where_it_is_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = trained_adapter_file(), tmp_path / "out.safetensors"
    arguments = ("merge", file, file.parent, "--output", output)
    assert command(monkeypatch, *arguments) == 1
    assert "--active-rank" in capsys.readouterr().err
    assert command(monkeypatch, *arguments, "--active-rank", 3) == 0
    ranks = {tensor.shape[0] for key, tensor in load_file(output).items() if ".lora_A." in key}
    assert ranks == {12}
    # min_rank 2 is what timestep 1000 leaves open.
    assert command(monkeypatch, *arguments, "--timestep", 1000, "--overwrite") == 0
    ranks = {tensor.shape[0] for key, tensor in load_file(output).items() if ".lora_A." in key}
    assert ranks == {8}


def test_resize_lowers_the_rank_of_a_file(
    kohya: tuple[Path, dict[str, Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, deltas = kohya
    output = tmp_path / "out.safetensors"
    arguments = ("resize", file, "--output", output, "--model", deep_model())
    assert command(monkeypatch, *arguments) == 1
    assert "--energy" in capsys.readouterr().err
    assert command(monkeypatch, *arguments, "--rank", 2, "--per-layer") == 0
    printed = capsys.readouterr().out.splitlines()
    errors = {line.split()[-1]: float(line.split()[0]) for line in printed[1:]}
    assert errors.keys() == deltas.keys()
    for path, delta in deltas.items():
        values = torch.linalg.svdvals(delta.double().flatten(1))
        assert errors[path] == pytest.approx(float(values[2:].norm() / values.norm()), rel=0.06)
    options = ("--energy", 0.5, "--format", "lycoris", "--dtype", "fp16", "--overwrite")
    assert command(monkeypatch, *arguments, *options) == 0
    downs = {key: each for key, each in load_file(output).items() if key.endswith(".lora_down.weight")}
    assert all(key.startswith("lycoris_") and each.dtype == torch.float16 for key, each in downs.items())
    assert len({each.shape[0] for each in downs.values()}) > 1


def test_extract_writes_the_difference_of_two_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base: Any = load(deep_model()).unet
    tuned = make_unet()
    tuned.load_state_dict(base.state_dict())
    delta = torch.outer(torch.arange(32.0), torch.ones(32)) * 0.01
    with torch.no_grad():
        tuned.get_parameter(f"{LAYER}.weight").add_(delta)
        tuned.get_parameter("conv_in.weight").mul_(1.5)
    tuned.save_pretrained(tmp_path / "tuned" / "unet")
    output = tmp_path / "out.safetensors"
    arguments = ("extract", "--base", deep_model(), "--tuned", tmp_path / "tuned", "--output", output)
    assert command(monkeypatch, *arguments, "--rank", 1, "--per-layer") == 0
    printed = capsys.readouterr().out
    assert re.search(rf"^\d\.\de-\d\d  rank 1 +{LAYER}$", printed, re.M)
    assert re.search(r"^5\.0e-01  left out  conv_in\.weight$", printed, re.M)
    load_adapter(base, output)
    assert effect_error(base, LAYER, delta) < 1e-4
    assert command(monkeypatch, *arguments, "--rank", 1) == 1
    assert "--overwrite" in capsys.readouterr().err
    options = ("--overwrite", "--format", "kohya", "--dtype", "bf16", "--target", "BasicTransformerBlock")
    assert command(monkeypatch, *arguments, "--rank", 2, *options) == 0
    (key,) = [key for key in load_file(output) if key.endswith(".lora_down.weight")]
    assert key.startswith("lora_unet_middle_block")
    assert load_file(output)[key].dtype == torch.bfloat16
    files = [tmp_path / f"{name}.safetensors" for name in ("base", "tuned")]
    unet = deep_model() / "unet" / "diffusion_pytorch_model.safetensors"
    for file, source in zip(files, (unet, tmp_path / "tuned" / "unet" / unet.name), strict=True):
        file.write_bytes(source.read_bytes())
    arguments = ("extract", "--base", files[0], "--tuned", files[1], "--output", output, "--overwrite")
    assert command(monkeypatch, *arguments, "--rank", 1) == 1
    assert "--model" in capsys.readouterr().err
    assert command(monkeypatch, *arguments, "--rank", 1, "--model", deep_model()) == 0
