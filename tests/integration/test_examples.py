"""Every example configuration trains, on the tiny model of its family.

What changes is size and number of steps, and what a toy cannot have: ranks above 16, and a text encoder in 4
bits, whose blocks of 64 weights are longer than its rows; there it is 8.
"""

from __future__ import annotations

import functools
import json
import math
import tempfile
from pathlib import Path

import pytest

from simpletuner.helpers.adapters.files.embeddings import read
from simpletuner.helpers.adapters.files.inspection import inspect
from simpletuner.helpers.configuration.examples import copy_example, examples
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.configuration.schema.sections import RunConfig
from simpletuner.helpers.models import registry
from simpletuner.helpers.models.flux.tiny import save_tiny_flux
from simpletuner.helpers.models.flux2.tiny import save_tiny_flux2
from simpletuner.helpers.training.build import build_trainer
from tests.integration.tiny_runs import reset_accelerate, tiny_model

LARGEST_RANK = 16
ALGORITHMS = {"tlora": "T-LoRA", "lora": "LoRA in diffusers' format", "lokr": "LoKr"}
"""Part of an example's name -> what its file is."""
OVERRIDES = {
    "resolution": 64,
    "max_train_steps": 2,
    "validation_num_inference_steps": 1,
}


@functools.cache
def model_of(family: str, *, told_guidance: bool) -> Path:
    """The tiny model of a kind, made once per process."""
    if family == "sdxl":
        return tiny_model()
    folder = Path(tempfile.mkdtemp(prefix=f"tiny_{family}_"))
    if family == "flux":
        save_tiny_flux(folder, has_guidance=told_guidance)
    else:
        save_tiny_flux2(folder, klein=not told_guidance)
    return folder


def shrunk(config: Path, folder: Path) -> RunConfig:
    """A copied example as it runs here; its lycoris json is rewritten."""
    keys = json.loads(config.read_text())
    encoders_in_8_bits = {
        key: "int8-torchao" for key in keys if key.startswith("text_encoder_") and keys[key] == "nf4-bnb"
    }
    changed = {
        **OVERRIDES,
        **encoders_in_8_bits,
        "pretrained_model_name_or_path": model_of(
            keys["model_family"], told_guidance=keys.get("model_flavour") in ("dev", "kontext")
        ),
        **{name: folder / name for name in ("output_dir", "cache_dir_vae", "cache_dir_text")},
    }
    if "lycoris_config" in keys:
        file = config.parent / keys["lycoris_config"]
        lycoris = json.loads(file.read_text())
        if lycoris["algo"] == "tlora":
            rank = min(lycoris["linear_dim"], LARGEST_RANK)
            lycoris |= {"linear_dim": rank, "linear_alpha": rank, "tlora_min_rank": rank // 2}
        file.write_text(json.dumps(lycoris))
    overrides = [f"{key}={value}" for key, value in changed.items()]
    return load_config(config, overrides=overrides, families=registry.specs())


# PEFT says that it could not fold such a layer, which is not asked of it.
@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated:UserWarning")
@pytest.mark.parametrize("name", examples())
def test_an_example_trains_and_leaves_its_adapter_and_pictures(
    name: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    config = shrunk(copy_example(name, tmp_path / "config"), tmp_path)
    reset_accelerate()
    assert build_trainer(config).run() == 0
    output = config.checkpoint.output_dir
    log = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in log] == [1, 2]
    assert all(math.isfinite(step["loss"]) for step in log)
    assert (output / "validation" / "step-2" / "grid.png").is_file()
    if config.model.is_full:
        assert (output / "unet" / "diffusion_pytorch_model.safetensors").is_file()
        return
    if not config.model.has_adapter:
        assert read(output / "learned_embeds.safetensors").token == config.new_tokens.placeholder_token
        return
    file = inspect(output / "pytorch_lora_weights.safetensors")
    assert file.algorithm == next(ALGORITHMS[part] for part in name.split("-") if part in ALGORITHMS)
    assert file.model_family == config.model.model_family
