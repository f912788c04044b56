"""Which folders are Flux.2 models, and what is said of those that are not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from simpletuner.helpers.configuration.schema.sections import ModelConfig
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models import hub
from simpletuner.helpers.models.flux2.components import DEV, KLEIN, Flux2Parts, find_parts
from simpletuner.helpers.models.loading import ModelSource, find_component

Flux2Folder = Callable[[str], Path]


def parts_of(folder: Path, **changes: object) -> Flux2Parts:
    values = {"model_family": "flux2", "pretrained_model_name_or_path": str(folder), **changes}
    return find_parts(ModelConfig.model_validate(values))


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_find_parts_tells_dev_klein_and_distilled_klein_apart(tiny_flux2: Flux2Folder) -> None:
    dev, klein, distilled = (parts_of(tiny_flux2(kind)) for kind in ("dev", "klein", "distilled"))
    assert (dev.kind, dev.has_guidance, dev.is_distilled) == (DEV, True, False)
    assert (klein.kind, klein.has_guidance, klein.is_distilled) == (KLEIN, False, False)
    assert (distilled.kind, distilled.has_guidance, distilled.is_distilled) == (KLEIN, False, True)
    assert dev.transformer.folder == tiny_flux2("dev") / "transformer"


@pytest.mark.parametrize(("kind", "flavour"), [("klein", "dev"), ("dev", "klein-base-4b")])
def test_find_parts_refuses_a_flavour_of_the_other_kind(
    tiny_flux2: Flux2Folder, kind: str, flavour: str
) -> None:
    with pytest.raises(ModelError, match=f"and model_flavour says {flavour}. Correct model_flavour"):
        parts_of(tiny_flux2(kind), model_flavour=flavour)


def test_find_parts_takes_a_configuration_that_is_silent_on_guidance_for_one_with_it(
    copied_flux2: Flux2Folder,
) -> None:
    """As diffusers does: the key is younger than the first published dev."""
    folder = copied_flux2("dev")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    del config["guidance_embeds"]
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    assert parts_of(folder).has_guidance
    assert not parts_of(copied_flux2("klein")).has_guidance


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_find_parts_names_a_missing_component(copied_flux2: Flux2Folder, component: str) -> None:
    folder = copied_flux2("klein")
    shutil.rmtree(folder / component)
    with pytest.raises(ModelError, match=rf"component {component} is missing: there is no folder"):
        parts_of(folder)


def test_find_parts_refuses_an_sdxl(tiny_sdxl: Path) -> None:
    with pytest.raises(ModelError, match=r"is a model for StableDiffusionXLPipeline.*model_family"):
        parts_of(tiny_sdxl)


@pytest.mark.parametrize(
    ("kind", "component", "key", "value"),
    [
        ("klein", "transformer", "_class_name", "FluxTransformer2DModel"),
        ("klein", "vae", "_class_name", "AutoencoderKL"),
        ("klein", "text_encoder", "architectures", ["Mistral3ForConditionalGeneration"]),
        ("dev", "text_encoder", "architectures", ["Qwen3ForCausalLM"]),
    ],
)
def test_find_parts_refuses_a_component_of_another_architecture(
    copied_flux2: Flux2Folder, kind: str, component: str, key: str, value: object
) -> None:
    folder = copied_flux2(kind)
    edit(folder / component / "config.json", **{key: value})
    named = value[0] if isinstance(value, list) else value
    with pytest.raises(ModelError, match=rf"component {component} .* is {named}, and Flux\.2 .* needs"):
        parts_of(folder)


@pytest.mark.parametrize(
    ("component", "changes", "message"),
    [
        ("transformer", {"in_channels": 128}, "in_channels of transformer is 128"),
        ("vae", {"latent_channels": 32}, "width of a token of 2 x 2 latents is 128"),
        ("transformer", {"joint_attention_dim": 7680}, "joint_attention_dim of transformer is 7680"),
        ("text_encoder", {"hidden_size": 32}, "width of 3 states of the text encoder is 96"),
        ("text_encoder", {"hidden_size": None}, "no number for hidden_size"),
        (
            "text_encoder",
            {"num_hidden_layers": 26},
            "reads the state after layer 27",
        ),
    ],
)
def test_find_parts_refuses_parts_that_do_not_fit(
    copied_flux2: Flux2Folder, component: str, changes: dict[str, object], message: str
) -> None:
    folder = copied_flux2("klein")
    edit(folder / component / "config.json", **changes)
    with pytest.raises(ModelError) as raised:
        parts_of(folder)
    assert message in str(raised.value)


def test_find_parts_reads_the_width_of_a_language_model_beside_a_vision_tower(
    copied_flux2: Flux2Folder,
) -> None:
    folder = copied_flux2("dev")
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    edit(folder / "text_encoder" / "config.json", text_config=config["text_config"] | {"hidden_size": 64})
    with pytest.raises(ModelError, match="width of 3 states of the text encoder is 192"):
        parts_of(folder)


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_find_parts_takes_a_component_from_elsewhere(
    tiny_flux2: Flux2Folder, copied_flux2: Flux2Folder, component: str
) -> None:
    other = copied_flux2("klein") / component
    key = f"pretrained_{component}_model_name_or_path"
    parts = parts_of(tiny_flux2("klein"), **{key: str(other)})
    assert {"transformer": parts.transformer, "vae": parts.vae}[component].folder == other


def test_the_chat_template_is_among_the_files_that_are_downloaded(
    monkeypatch: pytest.MonkeyPatch, tiny_flux2: Flux2Folder
) -> None:
    asked: list[str] = []

    def downloaded(_: str, *, patterns: Sequence[str], **__: object) -> Path:
        asked.extend(patterns)
        return tiny_flux2("klein")

    monkeypatch.setattr(hub, "cached", lambda *_, **__: None)
    monkeypatch.setattr(hub, "downloaded", downloaded)
    component = find_component("tokenizer", ModelSource("owner/name"), kind="tokenizer")
    assert "tokenizer/chat_template.jinja" in asked
    assert tiny_flux2("klein") / "tokenizer" / "chat_template.jinja" in component.files
