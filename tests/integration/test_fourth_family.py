"""A family of one folder and one registry line, outside the package, through the path of every run.

The folder is what documentation/adding-a-family.md shows.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from simpletuner.helpers.adapters.tlora.layer import TLoraLayer
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.configuration.schema.model import ModelConfig
from simpletuner.helpers.configuration.schema.noise import NoiseConfig
from simpletuner.helpers.configuration.schema.sections import PrecisionConfig, ValidationConfig
from simpletuner.helpers.contracts import Batch, NoisyBatch, Size, TextEmbeds
from simpletuner.helpers.errors import ConfigError, ModelError
from simpletuner.helpers.io.run_folder import ADAPTER_FILE
from simpletuner.helpers.models import registry
from simpletuner.helpers.models.family import FamilyContext, ModelFamily
from simpletuner.helpers.sampling.sample_command import SampleRequest, sample
from tests.integration.tiny_runs import TinyRun

BLOCK = re.compile(r"<!-- file: (\w+\.py) -->\n```python\n(.+?)```", re.DOTALL)
FILES = {"spec.py", "family.py", "components.py", "pipeline.py", "tiny.py"}
ADAPTERS = {
    "T-LoRA": {"lora_type": "lycoris", "learning_rate": 0.02},
    "LoRA": {"lora_type": "standard", "lora_rank": 4, "lora_alpha": 8, "learning_rate": 0.02},
}
PROMPT = "picture number 1"
PICTURES = {
    "validation_disable": False,
    "validation_prompt": PROMPT,
    "validation_num_inference_steps": 3,
    "validation_step_interval": 0,
}


def write_family(page: Path, folder: Path) -> None:
    """The folder of the family, as the page has it."""
    blocks = dict(BLOCK.findall(page.read_text(encoding="utf-8")))
    assert blocks.keys() == FILES
    folder.mkdir()
    for name, code in blocks.items():
        (folder / name).write_text(code, encoding="utf-8")
    (folder / "__init__.py").write_text('"""Loom."""\n')
    shutil.copy(Path(__file__).with_name("fourth_family_model.py"), folder / "model.py")


@pytest.fixture(scope="module")
def outside(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on sys.path that holds the family, and the registry with its line."""
    root = tmp_path_factory.mktemp("outside")
    write_family(repository / "documentation" / "adding-a-family.md", root / "loom")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root)
        patch.setitem(registry.FAMILIES, "loom", "loom.family:Loom")
        yield root
    for name in [each for each in sys.modules if each.partition(".")[0] == "loom"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def model(outside: Path) -> Path:
    from loom.tiny import save_tiny_loom

    save_tiny_loom(outside / "tiny")
    return outside / "tiny"


@pytest.fixture(params=ADAPTERS)
def run(request: pytest.FixtureRequest, tmp_path: Path, model: Path) -> TinyRun:
    keys = {"model_family": "loom", "pretrained_model_name_or_path": str(model), "train_batch_size": 2}
    return TinyRun(tmp_path / "run", keys=keys | ADAPTERS[request.param])


def make_family(model: Path, **changes: Any) -> ModelFamily:
    context = FamilyContext(
        model=ModelConfig(model_family="loom", pretrained_model_name_or_path=str(model)),
        noise=NoiseConfig(),
        precision=PrecisionConfig(),
        device=torch.device("cpu"),
        weight_dtype=torch.float32,
    )
    return registry.load_family("loom")(replace(context, **changes))


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_run_trains_checkpoints_and_resumes_bit_identical(run: TinyRun, tmp_path: Path) -> None:
    whole = TinyRun(tmp_path / "whole", keys=run.keys)
    assert whole.run() == 0
    assert run.run(max_train_steps=3) == 0
    assert run.run() == 0
    assert run.log() == whole.log()
    ours, theirs = (load_file(each.output_dir / ADAPTER_FILE) for each in (run, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_both_adapters_are_on_every_attention_layer_and_only_one_follows_the_noise(run: TinyRun) -> None:
    with run.trainer() as trainer:
        assert trainer.trainable.num_layers == 2 * 4
        layers = [module for module in trainer.denoiser.modules() if isinstance(module, TLoraLayer)]
        stats = trainer.train_step(next(iter(trainer.data.batches())))
    is_tlora = run.keys["lora_type"] == "lycoris"
    assert len(layers) == (8 if is_tlora else 0)
    ranks = [RankSchedule(8, min_rank=2).rank_at(timestep) for timestep in stats.timesteps]
    assert stats.active_rank == (np.mean(ranks) if is_tlora else None)


def test_adapter_reloads_to_the_picture_of_the_last_validation(run: TinyRun, tmp_path: Path) -> None:
    assert run.run(**PICTURES) == 0
    (trained,) = (run.output_dir / "validation" / "step-4").glob("00-*.png")
    (base,) = (run.output_dir / "validation" / "base").glob("*.png")
    request = SampleRequest(
        adapter=run.output_dir / ADAPTER_FILE,
        prompts=[PROMPT],
        model={},
        validation={"validation_num_inference_steps": 3, "validation_resolution": "64", "validation_seed": 7},
        dtype="fp32",
        options={},
    )
    (again,) = sample(request, output=tmp_path, families=registry.specs())
    assert np.abs(pixels(trained) - pixels(base)).max() > 4
    assert np.abs(pixels(again) - pixels(trained)).max() <= 1


def test_gradient_checkpointing_trains_the_same(run: TinyRun, tmp_path: Path) -> None:
    plain = TinyRun(tmp_path / "plain", keys=run.keys)
    assert run.run(gradient_checkpointing=True) == plain.run(gradient_checkpointing=False) == 0
    ours, theirs = (load_file(each.output_dir / ADAPTER_FILE) for each in (run, plain))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in theirs)


def test_configuration_knows_the_family_by_its_spec(run: TinyRun) -> None:
    assert registry.load_family("loom").spec is registry.specs()["loom"]
    config = run.config()
    assert config.validation.validation_guidance == 3.0
    assert config.adapter.peft_lora_target_modules == ("to_q", "to_k", "to_v", "to_out")
    assert run.config(snr_gamma=5).noise.snr_gamma is None
    without = {name: spec for name, spec in registry.specs().items() if name != "loom"}
    with pytest.raises(ConfigError, match="not a model family here"):
        load_config(run.folder / "config.json", families=without)


def test_target_that_matches_nothing_names_the_familys_classes(tmp_path: Path, model: Path) -> None:
    run = TinyRun(tmp_path, keys={"model_family": "loom", "pretrained_model_name_or_path": str(model)})
    run.lycoris["apply_preset"] = {"target_module": ["Attention", "LoomAtention"]}
    with pytest.raises(ConfigError, match="LoomAttention instead of LoomAtention"):
        run.run()


def test_sample_depends_on_its_position_and_not_on_its_batch(model: Path) -> None:
    family = make_family(model)
    family.load_text_encoders()
    text, denoiser = family.encode_prompts(["a dog", "a cat"]), family.load_denoiser()
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def predicted(rows: list[int]) -> torch.Tensor:
        noisy = family.add_noise(latents[rows], sample_indices=[5 + row for row in rows], seed=1)
        assert noisy.timesteps == tuple(int(np.float32(sigma) * 1000) for sigma in noisy.sigmas or ())
        stacked = TextEmbeds.stack([text[row] for row in rows])
        batch = Batch(latents=latents[rows], text=stacked, samples=(), sample_indices=())
        return family.predict(denoiser, noisy, batch)

    together = predicted([0, 1])
    assert together.shape == latents.shape
    assert together.dtype == torch.float32
    for row in range(2):
        torch.testing.assert_close(predicted([row])[0], together[row], rtol=1e-4, atol=1e-5)


def test_training_and_pictures_tell_the_transformer_the_same_noise_levels(model: Path) -> None:
    family = make_family(model)
    family.load_text_encoders()
    (text,), denoiser = family.encode_prompts(["a dog"]), family.load_denoiser()
    told: list[float] = []
    denoiser.register_forward_pre_hook(
        lambda *call: told.append(float(call[2]["timestep"])), with_kwargs=True
    )
    validation = ValidationConfig(validation_num_inference_steps=4, validation_guidance=1.0)
    inputs: Any = family.pipeline_inputs(text, text, validation=validation, size=Size(64, 64))
    family.make_pipeline(denoiser)(**inputs, height=64, width=64, num_inference_steps=4)
    in_pictures = told.copy()
    told.clear()
    for sigma in inputs["sigmas"]:
        zeros = torch.zeros(1, 4, 8, 8)
        noisy = NoisyBatch(zeros, target=zeros, timesteps=(0,), weight=torch.ones(1), sigmas=(sigma,))
        family.predict(denoiser, noisy, Batch(latents=zeros, text=text, samples=(), sample_indices=()))
    assert told == in_pictures
    assert told[0] == 1.0
    assert told[2] == pytest.approx(0.75)  # half way, shifted by 3


def test_identities_change_with_what_changes_an_encoding(model: Path) -> None:
    here, half = make_family(model), make_family(model, weight_dtype=torch.bfloat16)
    tiled = make_family(model, precision=PrecisionConfig(vae_enable_tiling=True))
    assert here.text_identity != half.text_identity
    assert here.vae_identity == half.vae_identity != tiled.vae_identity


def test_model_of_another_family_is_refused(model: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    index = broken / "model_index.json"
    index.write_text(index.read_text().replace("LoomPipeline", "WarpPipeline"))
    with pytest.raises(ModelError, match=r"WarpPipeline.*Loom needs LoomPipeline"):
        make_family(broken)


def test_spec_is_read_without_torch(outside: Path) -> None:
    code = "import sys; from loom.spec import SPEC; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=outside, check=False).returncode == 0
