"""Which settings a resumed run must share with the one that was saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.helpers.checkpointing.fingerprint import resume_fingerprint
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.models import registry


@pytest.mark.parametrize(
    ("override", "is_another_run"),
    [
        ("lora_format=comfyui", False),
        ("learning_rate=0.5", False),
        ("lora_dropout=0.5", False),
        ("lora_rank=3", True),
        ("optimizer=prodigy", True),
    ],
)
def test_what_is_written_or_how_fast_may_change_and_what_is_trained_may_not(
    override: str, is_another_run: bool, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)

    def settings(*overrides: str) -> object:
        given = ("lora_type=standard", *overrides)
        return resume_fingerprint(
            load_config(Path("config/config.json"), overrides=given, families=registry.specs())
        )

    assert (settings(override) != settings()) == is_another_run


def test_value_of_an_environment_variable_is_a_digest_in_texts_and_leaves_choices(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    lycoris = {"algo": "tlora", "multiplier": 1, "linear_dim": 8, "linear_alpha": 8}
    preset = {"target_name": ["{env:TOY_LAYER}"], "target_module": []}
    overrides = [
        f"lycoris_config={json.dumps({**lycoris, 'apply_preset': preset})}",
        "tracker_run_name={env:TOY_RUN}",
    ]
    found = []
    for layer, run in (("to_k.*", "tlora"), ("to_q.*", "another")):
        monkeypatch.setenv("TOY_LAYER", layer)
        monkeypatch.setenv("TOY_RUN", run)
        config = load_config(Path("config/config.json"), overrides=overrides, families=registry.specs())
        found.append(resume_fingerprint(config))
    first, other = found
    assert {key for key in first if first[key] != other[key]} == {"lycoris apply_preset"}
    assert "to_" not in json.dumps(first["lycoris apply_preset"])
    assert first["lycoris algo"] == "tlora"


def test_a_maximum_of_image_sizes_is_part_of_the_fingerprint_when_it_has_an_effect(
    tmp_path: Path,
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    def settings(**keys: object) -> dict[str, object]:
        dataset = {"id": "x", "instance_data_dir": str(tmp_path), "resolution": 64, "crop": True, **keys}
        values = {
            "model_family": "sdxl",
            "pretrained_model_name_or_path": "simpletuner/demo/sdxl",
            "lora_type": "standard",
            "data_backend_config": [dataset],
        }
        (tmp_path / "config.json").write_text(json.dumps(values))
        return resume_fingerprint(load_config(tmp_path / "config.json", families=registry.specs()))

    plain, both = settings(), {"maximum_image_size": 100, "target_downsample_size": 80}
    assert settings(maximum_image_size=100) == plain
    assert settings(**both, crop=False) == plain
    assert settings(**both | {"target_downsample_size": 64}) == plain
    added = {key: value for key, value in settings(**both).items() if key not in plain}
    assert added == {"dataset x, maximum_image_size": 100, "dataset x, target_downsample_size": 80}


def test_strengths_and_rslora_are_part_of_the_fingerprint_where_they_are_set(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    def settings(
        strength: float | None = None, held_out: float | None = None, **keys: object
    ) -> dict[str, object]:
        dataset = {"id": "x", "instance_data_dir": str(tmp_path), "slider_strength": strength}
        others = {"id": "y", "instance_data_dir": str(tmp_path), "dataset_type": "eval"}
        values = {
            "model_family": "sdxl",
            "pretrained_model_name_or_path": "simpletuner/demo/sdxl",
            "lora_type": "standard",
            "data_backend_config": [dataset, others | {"slider_strength": held_out}],
            **keys,
        }
        (tmp_path / "config.json").write_text(json.dumps(values))
        return resume_fingerprint(load_config(tmp_path / "config.json", families=registry.specs()))

    plain = settings()
    assert not {"use_rslora", "slider_lora_target"} & plain.keys()  # checkpoints of older versions lack them
    assert settings(0) == plain
    assert settings(held_out=0.5) == plain, "held-out images are not trained"
    assert settings(0.5) == plain | {"dataset x, slider_strength": 0.5}
    assert settings(use_rslora=True) == plain | {"use_rslora": True}
    assert settings(slider_lora_target=True).keys() == plain.keys()


def test_a_dataset_s_name_from_the_environment_is_a_placeholder_in_the_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (256, 256)).save(tmp_path / "a.png")
    monkeypatch.setenv("NAME_OF_MINE", "hidden-name")
    sizes = {"crop": True, "resolution": 64, "maximum_image_size": 100, "target_downsample_size": 80}
    dataset = {"id": "{env:NAME_OF_MINE}", "instance_data_dir": str(tmp_path), "slider_strength": 1.0}
    values = {
        "model_family": "sdxl",
        "pretrained_model_name_or_path": "simpletuner/demo/sdxl",
        "lora_type": "standard",
        "data_backend_config": [dataset | sizes],
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    found = resume_fingerprint(load_config(tmp_path / "config.json", families=registry.specs()))
    assert found["dataset {env:NAME_OF_MINE}, slider_strength"] == 1.0
    assert found["dataset {env:NAME_OF_MINE}, maximum_image_size"] == 100
    assert "hidden-name" not in json.dumps(found)


def test_the_length_of_prompts_is_part_of_the_fingerprint_unless_it_is_the_default(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)

    def settings(length: int) -> dict[str, object]:
        given = ("lora_type=standard", "validation_compared_config=", f"max_token_length={length}")
        return resume_fingerprint(
            load_config(Path("config/config.json"), overrides=given, families=registry.specs())
        )

    assert "max_token_length" not in settings(75)
    assert settings(150) == settings(75) | {"max_token_length": 150}
