"""What a Flux.2 model's folder says of it; test_family_contract.py has what all families share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from simpletuner.helpers.configuration.schema.model import ModelConfig
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models import hub
from simpletuner.helpers.models.flux2.components import DEV, KLEIN, Flux2Components, find_components
from simpletuner.helpers.models.loading import ModelSource, find_component

Flux2Folder = Callable[[str], Path]


def components_of(folder: Path, **changes: object) -> Flux2Components:
    values = {"model_family": "flux2", "pretrained_model_name_or_path": str(folder), **changes}
    return find_components(ModelConfig.model_validate(values))


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_find_components_tells_dev_klein_and_distilled_klein_apart(tiny: Flux2Folder) -> None:
    dev, klein, distilled = (
        components_of(tiny(f"flux2-{variant}")) for variant in ("dev", "klein", "distilled")
    )
    assert (dev.variant, dev.has_guidance, dev.is_distilled) == (DEV, True, False)
    assert (klein.variant, klein.has_guidance, klein.is_distilled) == (KLEIN, False, False)
    assert (distilled.variant, distilled.has_guidance, distilled.is_distilled) == (KLEIN, False, True)
    assert dev.denoiser.folder == tiny("flux2-dev") / "transformer"


@pytest.mark.parametrize(("variant", "flavour"), [("klein", "dev"), ("dev", "klein-base-4b")])
def test_find_components_refuses_a_flavour_of_the_other_variant(
    tiny: Flux2Folder, variant: str, flavour: str
) -> None:
    with pytest.raises(ModelError, match=f"model_flavour is {flavour}"):
        components_of(tiny(f"flux2-{variant}"), model_flavour=flavour)


def test_find_components_takes_a_configuration_that_is_silent_on_guidance_for_one_with_it(
    copied: Flux2Folder,
) -> None:
    """As diffusers does: the key is younger than the first published dev."""
    folder = copied("flux2-dev")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    del config["guidance_embeds"]
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    assert components_of(folder).has_guidance
    assert not components_of(copied("flux2-klein")).has_guidance


def test_find_components_reads_the_width_of_a_language_model_beside_a_vision_tower(
    copied: Flux2Folder,
) -> None:
    folder = copied("flux2-dev")
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    edit(folder / "text_encoder" / "config.json", text_config=config["text_config"] | {"hidden_size": 64})
    with pytest.raises(ModelError, match=r"joint_attention_dim .* 48,.* 192"):
        components_of(folder)


def test_the_chat_template_is_among_the_files_that_are_downloaded(
    monkeypatch: pytest.MonkeyPatch, tiny: Flux2Folder
) -> None:
    asked: list[str] = []

    def downloaded(_: str, *, patterns: Sequence[str], **__: object) -> Path:
        asked.extend(patterns)
        return tiny("flux2-klein")

    monkeypatch.setattr(hub, "cached", lambda *_, **__: None)
    monkeypatch.setattr(hub, "downloaded", downloaded)
    component = find_component("tokenizer", ModelSource("owner/name"), component_type="tokenizer")
    assert "tokenizer/chat_template.jinja" in asked
    assert tiny("flux2-klein") / "tokenizer" / "chat_template.jinja" in component.files
