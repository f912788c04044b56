"""Header entries for other programs: true of the file, and without a path or a file's name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from simpletuner.helpers.adapters.files import adapter_file
from simpletuner.helpers.adapters.files.labels import (
    HASH,
    MOST_TAGS,
    SPECIFICATION,
    labels_of_export,
    labels_of_run,
    tag_counts,
)
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.configuration.schema.sections import RunConfig
from simpletuner.helpers.contracts import Sample, Size
from simpletuner.helpers.io.redaction import hide
from simpletuner.helpers.models import registry
from simpletuner.helpers.models.registry import specs

SIZE = Size(64, 64)
LYCORIS = {"algo": "tlora", "multiplier": 1.0, "linear_dim": 8, "linear_alpha": 4}


def sample(caption: str, path: str = "a.png") -> Sample:
    return Sample("photos", path, caption, SIZE, SIZE, (0, 0), SIZE)


def config(folder: Path, **keys: object) -> RunConfig:
    (folder / "images").mkdir(exist_ok=True)
    (folder / "images" / "a.png").touch()
    dataset = [
        {
            "id": "photos",
            "type": "local",
            "instance_data_dir": str(folder / "images"),
            "instance_prompt": "sks",
        }
    ]
    values = {
        "model_family": "sdxl",
        "lora_type": "lycoris",
        "lycoris_config": LYCORIS,
        "data_backend_config": dataset,
        "output_dir": str(folder / "my-cat"),
        "resolution": 512,
    }
    (folder / "config.json").write_text(json.dumps(values | keys))
    return load_config(folder / "config.json", families=registry.specs())


def labels(run: RunConfig, *captions: str, prediction_type: str | None = "epsilon") -> dict[str, str]:
    samples = [sample(caption) for caption in captions]
    spec = specs()[run.model.model_family]
    return labels_of_run(run, spec, samples=samples, prediction_type=prediction_type)


def test_labels_state_the_model_the_network_and_the_training(tmp_path: Path) -> None:
    found = labels(config(tmp_path), "sks, red hat", "sks, blue hat")
    expected = {
        SPECIFICATION: "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "my-cat",
        "modelspec.resolution": "512x512",
        "modelspec.prediction_type": "epsilon",
        "modelspec.trigger_phrase": "sks",
        "modelspec.license": "openrail++",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "lycoris.kohya",
        "ss_network_args": '{"algo": "tlora"}',
        "ss_network_dim": "8",
        "ss_network_alpha": "4",
        "ss_output_name": "my-cat",
        "ss_sd_model_name": "stabilityai/stable-diffusion-xl-base-1.0",
        "ss_resolution": "(512, 512)",
        "ss_num_train_images": "2",
    }
    assert {key: found[key] for key in expected} == expected
    assert json.loads(found["ss_tag_frequency"]) == {"training": {"sks": 2, "blue hat": 1, "red hat": 1}}
    assert not {"modelspec.date", "ss_v_parameterization", "modelspec.description"} & found.keys()


@pytest.mark.parametrize(
    ("keys", "label", "expected"),
    [
        ({"lora_type": "standard", "lora_rank": 6, "lora_alpha": 3}, "ss_network_dim", "6"),
        ({"lora_type": "standard", "lora_rank": 6, "lora_alpha": 3}, "ss_network_alpha", "6"),
        ({"lora_type": "standard", "lora_rank": 6, "lora_init_type": "pissa"}, "ss_network_dim", "12"),
        ({"lora_type": "standard"}, "ss_network_module", None),
        ({"lycoris_config": LYCORIS | {"multiplier": 0.5}}, "ss_network_alpha", "2"),
        ({"tracker_run_name": "third try"}, "modelspec.title", "third try"),
        ({"hub_model_id": "me/cat-lora", "tracker_run_name": "third try"}, "modelspec.title", "cat-lora"),
        ({"model_card_note": "A cat."}, "modelspec.description", "A cat."),
        (
            {"pretrained_model_name_or_path": "a/b"},
            "modelspec.architecture",
            "stable-diffusion-xl-v1-base/lora",
        ),
        ({"pretrained_model_name_or_path": "a/b"}, "modelspec.license", None),
        ({"model_family": "flux"}, "modelspec.architecture", "flux-1-dev/lora"),
        (
            {"model_family": "flux", "model_flavour": "schnell"},
            "modelspec.architecture",
            "flux-1-schnell/lora",
        ),
        ({"model_family": "flux2", "model_flavour": "klein-9b"}, "ss_base_model_version", "flux2_klein_9b"),
        ({"model_family": "flux2", "pretrained_model_name_or_path": "a/b"}, SPECIFICATION, None),
    ],
)
def test_each_label_follows_the_configuration(
    keys: dict[str, object], label: str, expected: str | None, tmp_path: Path
) -> None:
    if keys.get("lora_type") == "standard":
        keys = keys | {"lycoris_config": None}
    assert labels(config(tmp_path, **keys), prediction_type=None).get(label) == expected


def test_a_model_that_predicts_v_is_labelled_so(tmp_path: Path) -> None:
    found = labels(config(tmp_path), prediction_type="v_prediction")
    assert (found["modelspec.prediction_type"], found["ss_v_parameterization"]) == ("v", "True")


def test_a_date_is_written_only_where_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert labels(config(tmp_path))["modelspec.date"] == "1970-01-02"


def test_no_label_holds_a_path(tmp_path: Path) -> None:
    model = tmp_path / "private" / "finetune"
    model.mkdir(parents=True)
    found = labels(config(tmp_path, pretrained_model_name_or_path=str(model)), "sks")
    assert found["ss_sd_model_name"] == "finetune"
    assert str(tmp_path) not in json.dumps(found)


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        (["1girl, solo", "1girl, hat, hat"], {"1girl": 2, "hat": 1, "solo": 1}),
        (["sks"], {"sks": 1}),
        (["a dog"], {}),
        (["A cat sits on a mat. It is red, and large."], {}),
        (["a cat that sits on the old mat, a hat"], {}),
        (["sks, hat", "a long sentence about a person called Jane"], {}),
        (["", "sks"], {"sks": 1}),
        ([], {}),
    ],
)
def test_tags_are_counted_only_where_captions_are_tags(captions: list[str], expected: dict[str, int]) -> None:
    assert tag_counts([sample(each) for each in captions], triggers=["sks"]) == expected


def test_a_caption_made_of_the_file_name_is_not_counted() -> None:
    assert tag_counts([sample("jane, doe", "x/jane_doe.png"), sample("sks, hat")]) == {"hat": 1, "sks": 1}


def test_the_most_frequent_tags_are_kept() -> None:
    samples = [sample(f"tag{index}, usual") for index in range(MOST_TAGS + 5)]
    counts = tag_counts(samples)
    assert len(counts) == MOST_TAGS
    assert next(iter(counts.items())) == ("usual", MOST_TAGS + 5)


def test_an_export_is_labelled_as_the_lora_that_it_is() -> None:
    stored, spec = {SPECIFICATION: "1.0.0"}, specs()["sdxl"]
    given = {"keeps_names": False, "ranks": [4, 4], "alphas": [4.0, 2.0], "has_other_layers": False}
    found = labels_of_export(stored, spec, **given)  # type: ignore[arg-type]
    assert found == {
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "ss_network_dim": "4",
        "ss_network_alpha": "Dynamic",
        "ss_network_module": "networks.lora",
        "ss_network_args": "{}",
    }
    assert labels_of_export({}, spec, **given) == {}  # type: ignore[arg-type]
    with_others = labels_of_export(stored, spec, **given | {"has_other_layers": True})  # type: ignore[arg-type]
    assert with_others.keys() == {"modelspec.implementation"}


def test_the_hash_is_that_of_the_tensors_alone(tmp_path: Path) -> None:
    tensors = {"a.lora_up.weight": torch.ones(2, 2)}
    for name, title in {"one": "first", "two": "second"}.items():
        metadata = {SPECIFICATION: "1.0.0", "modelspec.title": title}
        adapter_file.write(tmp_path / f"{name}.safetensors", tensors, metadata=metadata)
    data = (tmp_path / "one.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    expected = f"0x{hashlib.sha256(data[start:]).hexdigest()}"
    files = [adapter_file.read(tmp_path / f"{name}.safetensors") for name in ("one", "two")]
    assert [file.metadata[HASH] for file in files] == [expected, expected]
    adapter_file.write(tmp_path / "three.safetensors", tensors, metadata={})
    assert HASH not in adapter_file.read(tmp_path / "three.safetensors").metadata


def test_tags_hold_no_value_of_the_environment(tmp_path: Path) -> None:
    hide("first name, last name", "{env:OWNER}")
    found = labels(config(tmp_path), "sks, first name, last name, red hat", "sks, first name, last name")
    assert "name" not in found["ss_tag_frequency"]
    assert "red hat" in found["ss_tag_frequency"]


def test_names_cut_from_a_value_of_the_environment_stay_hidden(tmp_path: Path) -> None:
    model = tmp_path / "clients" / "clientmodel"
    model.mkdir(parents=True)
    hide(str(model), "{env:MODEL}")
    hide(str(tmp_path / "clients" / "clientfolder"), "{env:OUT}")
    found = labels(
        config(
            tmp_path,
            pretrained_model_name_or_path=str(model),
            output_dir=str(tmp_path / "clients" / "clientfolder"),
        ),
        "sks",
    )
    assert "client" not in json.dumps(found)
    assert found["ss_output_name"] == "{env:OUT}"
