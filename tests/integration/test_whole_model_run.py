"""Runs of model_type full: exact on resume, one copy of the weights in a checkpoint, loadable results."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from simpletuner.cli import app
from simpletuner.helpers.errors import ConfigError, PublishError
from simpletuner.helpers.io.run_folder import ADAPTER_FILE, checkpoint_folder
from simpletuner.helpers.models.registry import specs
from simpletuner.helpers.publishing.card import write_card
from simpletuner.helpers.publishing.publish import publish
from simpletuner.helpers.reporting.html_report.folder import read_run
from simpletuner.helpers.sampling.validation_sampler import ValidationSampler
from tests.integration.family_runs import MODELS
from tests.integration.test_several_processes import train
from tests.integration.test_validation import PICTURES
from tests.integration.tiny_runs import TinyRun

pytestmark = pytest.mark.usefixtures("shared_caches")

FULL: dict[str, object] = {
    "model_type": "full",
    "lora_type": "standard",
    "lycoris_config": None,
    "mixed_precision": "bf16",
    "lr_scheduler": "constant",
    "learning_rate": 1e-4,
    "checkpoint_step_interval": 2,
}
FAMILIES = [name for name in MODELS if name != "flux2-dev"]


def run_of(family: str, folder: Path, **keys: object) -> TinyRun:
    run = MODELS[family].run(folder)
    run.keys |= FULL | keys
    return run


def model_in(run: TinyRun, name: str = "") -> dict[str, Tensor]:
    folder = run.output_dir / (name or denoiser_of(run))
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def denoiser_of(run: TinyRun) -> str:
    return specs()[str(run.keys["model_family"])].denoiser_name


def are_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_resumed_run_ends_bit_for_bit_as_one_without_a_stop(family: str, tmp_path: Path) -> None:
    keys = {"use_ema": True, "gradient_accumulation_steps": 2}
    whole, stopped = (run_of(family, tmp_path / name, **keys) for name in ("whole", "stopped"))
    with whole.trainer(max_train_steps=4) as trainer:
        trainer.run()
        expected = trainer.state_digest()
        assert trainer.weight_optimizer is not None
        assert trainer.weight_optimizer.num_steps() == 4
        assert {weight.dtype for weight in trainer.trainable.parameters()} == {torch.bfloat16}
    for steps in (2, 4):
        with stopped.trainer(max_train_steps=steps) as trainer:
            trainer.run()
            digest, size = trainer.state_digest(), trainer.state.num_bytes
    assert digest == expected
    name = denoiser_of(whole)
    for folder in (name, f"{name}_ema"):
        assert are_equal(model_in(whole, folder), model_in(stopped, folder))
    assert not are_equal(model_in(whole), model_in(whole, f"{name}_ema"))
    checkpoint = checkpoint_folder(stopped.output_dir, 4)
    assert are_equal(model_in(stopped), model_in(stopped, f"{checkpoint.name}/{name}"))
    assert sum(file.stat().st_size for file in checkpoint.rglob("*.safetensors")) == pytest.approx(
        size, rel=0.2
    )
    assert not list(stopped.output_dir.rglob(ADAPTER_FILE))
    _is_used_as_a_model(whole, tmp_path / "other")


def _is_used_as_a_model(run: TinyRun, folder: Path) -> None:
    """As a part of another run's model, and by diffusers alone."""
    name = denoiser_of(run)
    trained = str(run.output_dir / name)
    stock: Any = AutoModel.from_pretrained(trained, torch_dtype=torch.bfloat16)
    family = next(
        key
        for key, each in MODELS.items()
        if each.folder() == Path(str(run.keys["pretrained_model_name_or_path"]))
    )
    other = run_of(family, folder, **{f"pretrained_{name}_model_name_or_path": trained})
    with other.trainer(max_train_steps=1) as trainer:
        assert are_equal(trainer.trainable.state_dict(), stock.state_dict())


@pytest.fixture(params=["bf16", "no"])
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_fused_backward_pass_trains_the_same_bit_for_bit(precision: str, tmp_path: Path) -> None:
    keys = {"max_grad_norm": 0.01, "grad_clip_method": "value"}
    weights, norms = [], []
    for name, starts in {
        "apart": [(3, False)],
        "fused": [(3, True)],
        "both": [(2, False), (3, True)],
    }.items():
        run = run_of("flux", tmp_path / name, mixed_precision=precision, **keys)
        for steps, is_fused in starts:
            with run.trainer(max_train_steps=steps, fused_backward_pass=is_fused) as trainer:
                trainer.run()
        weights.append(model_in(run))
        norms.append([line["grad_norm"] for line in run.log()])
    assert are_equal(weights[0], weights[1])
    assert are_equal(weights[0], weights[2])
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)


def test_layer_filter_trains_its_weights_only_and_names_what_it_does_not_find(tmp_path: Path) -> None:
    run = run_of("flux", tmp_path, layer_filter=["^single_transformer_blocks", r"norm_out\.linear\.bias"])
    with run.trainer(max_train_steps=2) as trainer:
        before = {name: value.clone() for name, value in trainer.trainable.state_dict().items()}
        trainer.run()
        after = trainer.trainable.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(
        name.startswith("single_transformer_blocks") or name == "norm_out.linear.bias" for name in moved
    )
    assert any(name.startswith("single_transformer_blocks.1.") for name in moved)
    with (
        pytest.raises(ConfigError, match=r"layer_filter.*down_blocks"),
        run.trainer(layer_filter="down_blocks,single_transformer_blocks", output_dir=str(tmp_path / "other")),
    ):
        pass


def test_base_images_are_those_of_the_base_model_even_if_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keys = PICTURES | {"learning_rate": 0.05}
    first, second = (run_of("sdxl", tmp_path / name, **keys) for name in ("first", "second"))
    first.run(max_train_steps=2)
    (image,) = (first.output_dir / "validation" / "base").glob("*.png")
    with monkeypatch.context() as patch:
        patch.setattr(ValidationSampler, "generate_base", lambda *_: None)
        second.run(max_train_steps=2)
    assert "AssertionError" not in caplog.text
    assert not (second.output_dir / "validation" / "base").exists()
    second.run(max_train_steps=3)
    (later,) = (second.output_dir / "validation" / "base").glob("*.png")
    assert later.read_bytes() == image.read_bytes()
    trained = [
        file for file in (first.output_dir / "validation" / "step-2").glob("*.png") if file.name != "grid.png"
    ]
    assert trained[0].read_bytes() != image.read_bytes()


def test_report_and_card_name_the_folder_and_damage_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of("sdxl", tmp_path, max_train_steps=2, checkpoints_total_limit=1)
    run.run()
    assert read_run(run.output_dir).adapter == run.output_dir / "unet"
    page = (run.output_dir / "report.html").read_text()
    assert "AutoModel.from_pretrained" in page
    card = write_card(run.output_dir, families=specs()).read_text()
    assert "full-fine-tune" in card
    assert "AutoModel.from_pretrained(&#x27;unet&#x27;" in card or "AutoModel.from_pretrained('unet'" in card
    assert "lora" not in card.lower()
    with pytest.raises(PublishError):
        publish(run.output_dir, families=specs())
    summary = json.loads((run.output_dir / "finished.json").read_text())
    assert (summary["model"], Path(summary["adapter"]).name) == ("unet", "unet")
    (weights,) = (run.output_dir / "unet").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with caplog.at_level(logging.WARNING):
        assert run.run() == 0
    assert "checksum" in caplog.text
    run.run(max_train_steps=3)
    assert [each.name for each in run.output_dir.glob("checkpoint-*")] == ["checkpoint-3"]


def test_sample_takes_the_run_of_a_whole_model(tmp_path: Path) -> None:
    run = run_of("sdxl", tmp_path, max_train_steps=2, learning_rate=0.05)
    run.run()
    arguments = ["sample", str(run.output_dir), "--prompt", "a cat", "--size", "64x64", "--steps", "1"]
    images = []
    for name, model in (
        ("trained", run.output_dir),
        ("checkpoint", run.output_dir / "checkpoint-2" / "unet"),
    ):
        arguments[1] = str(model)
        result = CliRunner().invoke(app, [*arguments, "--dtype", "fp32", "--output", str(tmp_path / name)])
        assert result.exit_code == 0, result.output
        images += [np.asarray(Image.open(file)) for file in (tmp_path / name).glob("*.png")]
    assert np.array_equal(*images)
    refused = CliRunner().invoke(app, [*arguments, "--strength", "0.5"])
    assert isinstance(refused.exception, ConfigError)


def test_checkpoint_with_a_damaged_model_is_passed_over(tmp_path: Path) -> None:
    run = run_of("flux", tmp_path)
    run.run(max_train_steps=4)
    (weights,) = (checkpoint_folder(run.output_dir, 4) / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with run.trainer(max_train_steps=5) as trainer:
        assert trainer.progress.step == 2


@pytest.mark.parametrize("optimizer", ["adafactor", "prodigy", "adamw_schedulefree", "bnb-adamw8bit", "muon"])
def test_optimisers_resume_exactly_over_whole_weights(optimizer: str, tmp_path: Path) -> None:
    if optimizer in ("prodigy", "adamw_schedulefree", "bnb-adamw8bit"):
        pytest.importorskip(
            {"prodigy": "prodigyopt", "bnb-adamw8bit": "bitsandbytes"}.get(optimizer, "pytorch_optimizer")
        )
    keys: dict[str, object] = {"optimizer": optimizer, "checkpoint_step_interval": 1}
    if optimizer == "bnb-adamw8bit":
        keys["optimizer_config"] = "min_8bit_size=16"
    runs = [run_of("flux", tmp_path / name, **keys) for name in ("whole", "stopped")]
    digests = []
    for run, ends in zip(runs, ((2,), (1, 2)), strict=True):
        for steps in ends:
            with run.trainer(max_train_steps=steps) as trainer:
                trainer.run()
                digest = trainer.state_digest()
        digests.append(digest)
    assert digests[0] == digests[1]
    assert are_equal(*(model_in(run) for run in runs))


def test_two_processes_keep_the_same_bf16_weights(tmp_path: Path) -> None:
    run = run_of("flux", tmp_path, max_train_steps=3)
    train(run, num_processes=2, train_batch_size=1)
    start, first, second = (
        load_file(run.folder / f"{name}.safetensors") for name in ("start-0", "end-0", "end-1")
    )
    assert are_equal(first, second)
    assert not are_equal(start, first)


def test_two_processes_train_what_one_trains_with_the_same_samples(tmp_path: Path) -> None:
    keys: dict[str, object] = {"max_train_steps": 2, "mixed_precision": "no", "optimizer_config": "eps=1e-3"}
    two, one = (run_of("flux", tmp_path / name, **keys) for name in ("two", "one"))
    two.num_images = one.num_images = 4
    for run in (two, one):
        run.__post_init__()
    train(two, num_processes=2, train_batch_size=1)
    train(one, num_processes=1, train_batch_size=2)
    start, first, second = (
        load_file(two.folder / f"{name}.safetensors") for name in ("start-0", "end-0", "end-1")
    )
    expected = load_file(one.folder / "end-0.safetensors")
    assert are_equal(first, second)
    moved = sum(float((expected[key] - start[key]).norm() ** 2) for key in start) ** 0.5
    apart = sum(float((expected[key] - first[key]).norm() ** 2) for key in start) ** 0.5
    assert apart < 1e-3 * moved
