"""Runs on a quantised denoiser: what they train, what their files say, and where those can be used."""

from __future__ import annotations

import functools
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open

from simpletuner.helpers.adapters.files import adapter_file
from simpletuner.helpers.adapters.network import load_adapter
from simpletuner.helpers.caching.shards import read_index
from simpletuner.helpers.configuration.schema.sections import Precision
from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.io.run_folder import ADAPTER_FILE
from simpletuner.helpers.models.quantisation import quantize_and_move
from tests.integration.processes import wait_for_all
from tests.integration.tiny_runs import TLORA, TinyRun, start_pair, tiny_model

PRECISIONS = ["int8-torchao", "fp8-torchao", "nf4-bnb"]
PICTURES: dict[str, object] = {
    "validation_disable": False,
    "validation_prompt": "a cat",
    "validation_resolution": "64x64",
    "validation_num_inference_steps": 2,
}


def header(run: TinyRun) -> dict[str, Any]:
    with safe_open(run.output_dir / ADAPTER_FILE, framework="pt") as file:
        metadata: dict[str, Any] = file.metadata()
    return metadata


def plain_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(tiny_model() / "unet")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A run on the model as it is."""
    run = TinyRun(tmp_path_factory.mktemp("plain"))
    run.run()
    return run


@pytest.mark.parametrize("precision", PRECISIONS)
def test_adapter_of_a_quantised_base_says_what_the_plain_base_was_and_reloads_onto_it(
    precision: str, plain: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = TinyRun(tmp_path)
    assert run.run(base_model_precision=precision) == 0
    stated, expected = header(run), header(plain)
    assert json.loads(stated[adapter_file.HASH_KEY]) == json.loads(expected[adapter_file.HASH_KEY])
    assert stated["base_model_precision"] == precision
    assert "base_model_precision" not in expected
    losses = [[line["loss"] for line in each.log()] for each in (run, plain)]
    assert losses[0] != losses[1]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=0.01, atol=0)
    with caplog.at_level(logging.WARNING):
        loaded = load_adapter(plain_unet(), run.output_dir / ADAPTER_FILE)
    assert not caplog.records, "the plain base was taken for another one"
    own = adapter_file.read(run.output_dir / ADAPTER_FILE).tensors
    assert all(torch.equal(own[key], tensor) for key, tensor in loaded.network.state_dict().items())


@pytest.mark.parametrize("precision", ["int8-torchao", "nf4-bnb"])
def test_quantised_run_resumes_to_the_same_state(precision: str, tmp_path: Path) -> None:
    keys = {"base_model_precision": precision, "lr_scheduler": "constant"}
    whole, halved = (TinyRun(tmp_path / name, keys=keys) for name in ("whole", "halved"))
    halved.run(max_train_steps=2)
    with whole.trainer() as trainer, halved.trainer(resume_from_checkpoint="latest") as resumed:
        assert resumed.progress.step == 2
        assert trainer.run() == resumed.run() == 0
        assert trainer.state_digest() == resumed.state_digest()


def test_run_goes_on_with_another_precision(tmp_path: Path) -> None:
    run = TinyRun(tmp_path)
    run.run(max_train_steps=2)
    with run.trainer(base_model_precision="int8-torchao", resume_from_checkpoint="latest") as trainer:
        assert trainer.progress.step == 2


def test_every_precision_makes_pictures_of_its_own_base(tmp_path: Path) -> None:
    run = TinyRun(tmp_path)
    for steps, precision in enumerate(["no_change", *PRECISIONS], start=1):
        run.run(max_train_steps=steps, base_model_precision=precision, **PICTURES)
        assert (run.output_dir / "validation" / f"step-{steps}" / "grid.png").is_file()
    pictures = list((run.output_dir / "validation" / "base").glob("*.png"))
    assert len({picture.read_bytes() for picture in pictures}) == len(pictures) == 4


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("keys", [{}, {"use_dora": True}])
def test_peft_lora_of_a_quantised_base_loads_into_a_plain_pipeline(
    precision: str, keys: dict[str, object], tmp_path: Path
) -> None:
    run = TinyRun(tmp_path, keys={"lora_type": "standard", "lora_rank": 4, "base_model_precision": precision})
    run.run(max_train_steps=1, **keys)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_model())
    pipeline.load_lora_weights(run.output_dir / ADAPTER_FILE)
    assert pipeline.get_active_adapters() == ["default_0"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr", "glora", "diag-oft", "boft"])
def test_lycoris_algorithms_in_bypass_mode_train_on_a_quantised_base(
    precision: str, algorithm: str, tmp_path: Path
) -> None:
    lycoris = {key: value for key, value in TLORA.items() if not key.startswith("tlora")}
    run = TinyRun(tmp_path, lycoris={**lycoris, "algo": algorithm, "bypass_mode": True})
    run.run(base_model_precision=precision, max_train_steps=3)
    losses = [line["grad_norm"] for line in run.log()]
    assert all(0 < each < 10 for each in losses)
    load_adapter(plain_unet(), run.output_dir / ADAPTER_FILE)


@functools.cache
def file_of(algorithm: str) -> Path:
    """The file of a run on the plain base, trained once per process."""
    run = TinyRun(
        Path(tempfile.mkdtemp(prefix=f"tiny_{algorithm}_")),
        lycoris={**TLORA, "algo": algorithm, "linear_dim": 4, "linear_alpha": 4},
    )
    del run.lycoris["tlora_min_rank"]
    assert run.run(learning_rate=0.05, lr_scheduler="constant") == 0
    return run.output_dir / ADAPTER_FILE


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr", "glora"])
def test_file_of_an_algorithm_loads_onto_a_quantised_base_and_has_its_effect_there(
    algorithm: str, precision: Precision
) -> None:
    effects = []
    for wanted in ("no_change", precision):
        unet = quantize_and_move(plain_unet(), precision=wanted, device=torch.device("cpu")).eval()
        base = predicted(unet)
        load_adapter(unet, file_of(algorithm))
        effects.append(predicted(unet) - base)
    assert (effects[1] - effects[0]).norm() < 0.3 * effects[0].norm()


# diag-oft rotates the bias too, which an addition to the output leaves alone.
@pytest.mark.parametrize("algorithm", ["full", "ia3", "diag-oft"])
def test_file_of_an_algorithm_that_needs_whole_weights_is_refused_by_a_quantised_base(
    algorithm: str, tmp_path: Path
) -> None:
    run = TinyRun(tmp_path, lycoris={**TLORA, "algo": algorithm})
    del run.lycoris["tlora_min_rank"]
    assert run.run(max_train_steps=1) == 0
    unet = quantize_and_move(plain_unet(), precision="int8-torchao", device=torch.device("cpu"))
    with pytest.raises(AdapterError, match=rf"{algorithm}|layers|base_model_precision no_change"):
        load_adapter(unet, run.output_dir / ADAPTER_FILE)


def predicted(unet: UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    conditions = {"text_embeds": torch.ones(1, 32), "time_ids": torch.ones(1, 6)}
    with torch.no_grad():
        output: torch.Tensor = unet(
            torch.randn(1, 4, 8, 8, generator=generator),
            torch.tensor(500),
            encoder_hidden_states=torch.randn(1, 7, 64, generator=generator),
            added_cond_kwargs=conditions,
        ).sample
    return output


def test_quantised_text_encoder_fills_the_cache_anew(tmp_path: Path) -> None:
    run = TinyRun(tmp_path)
    entries = []
    for index, precision in enumerate(("no_change", "int8-torchao", "no_change")):
        output = str(tmp_path / f"output-{index}")
        run.run(text_encoder_2_precision=precision, output_dir=output, max_train_steps=1)
        shards = (tmp_path / "cache" / "text").glob("shard-*.safetensors")
        entries.append(sum(len(read_index(shard)) for shard in shards))
    assert entries[1] == 2 * entries[0] == entries[2]


def test_two_processes_train_on_a_quantised_base_as_one_does_on_twice_the_batch(tmp_path: Path) -> None:
    one, two = (TinyRun(tmp_path / name, num_images=4) for name in ("one", "two"))
    keys: dict[str, Any] = {"base_model_precision": "int8-torchao", "max_train_steps": 2}
    wait_for_all(start_pair(two, **keys))
    one.run(train_batch_size=2, **keys)
    first, second = (adapter_file.read(each.output_dir / ADAPTER_FILE).tensors for each in (one, two))
    for key, tensor in first.items():
        torch.testing.assert_close(second[key], tensor, rtol=1e-3, atol=1e-4)
