"""Presets fit their cards, are valid, and have the values of their sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simpletuner.helpers.estimating.estimate import estimate
from simpletuner.helpers.models import registry
from simpletuner.helpers.new_run.presets import (
    KEPT_FREE,
    NO_CARD,
    PURPOSES,
    fitting,
    models,
    nearest,
    num_steps,
)
from simpletuner.helpers.new_run.summary import GIB, preset_lines, run_of
from simpletuner.helpers.new_run.texts import Texts

WITH_CARD = [name for name, model in models().items() if model.smallest != NO_CARD]
PAGE = Path("documentation/presets.md")


@pytest.mark.parametrize("name", WITH_CARD)
def test_every_preset_is_valid_and_leaves_a_part_of_its_card(name: str) -> None:
    model, too_large = models()[name], {}
    for purpose in PURPOSES:
        for card in model.cards:
            found = estimate(run_of(model, purpose, card, specs=registry.specs()))
            assert found is not None, "a published model has an estimate"
            if found.peak_device_bytes > (1 - KEPT_FREE) * card * GIB:
                too_large[purpose, card] = found.peak_device_bytes / GIB
    assert not too_large


def test_the_embedded_models_presets_are_valid() -> None:
    model = models()["embedded"]
    runs = [run_of(model, purpose, NO_CARD, specs=registry.specs()) for purpose in PURPOSES]
    assert [run.data.resolution for run in runs] == [64, 64]


@pytest.mark.parametrize("name", WITH_CARD)
def test_a_larger_card_gets_no_coarser_weights(name: str) -> None:
    bits = {"nf4-bnb": 4, "int8-torchao": 8, "no_change": 16}
    model = models()[name]
    cells = [model.settings("subject", card) for card in sorted(model.cards)]
    on_card = [each for each in cells if not each.get("enable_group_offload")]
    precisions = [bits[each.get("base_model_precision", "no_change")] for each in on_card]
    assert precisions == sorted(precisions)


@pytest.mark.parametrize(
    ("memory", "card"),
    [
        (0, None),
        (7.4, None),
        (8, 8),
        (11.0, 8),
        (12, 12),
        (15.0, 16),
        (22.5, 24),
        (22.0, 16),
        (47.5, 48),
        (140, 80),
    ],
)
def test_a_card_takes_the_presets_of_the_largest_named_memory_that_it_has(
    memory: float, card: int | None
) -> None:
    assert models()["klein-9b"].card_for(memory) == card


def test_a_model_without_a_preset_for_a_card_names_what_is_nearest() -> None:
    dev = models()["flux2-dev"]
    assert dev.card_for(16) is None
    assert nearest(dev, 16) == "klein-9b 16 GB, flux2-dev 24 GB"
    assert [each.name for each in fitting(0)] == ["embedded"]
    assert [each.name for each in fitting(16)] == ["embedded", "sdxl", "flux-dev", "klein-4b", "klein-9b"]
    assert [each.name for each in fitting(24)] == list(models())


@pytest.mark.parametrize(
    ("num_images", "time", "steps"),
    [
        (1, "usual", 800),
        (1, "short", 400),
        (1, "long", 1600),
        (26, "usual", 800),
        (40, "usual", 1200),
        (41, "short", 616),
    ],
)
def test_steps_grow_with_many_images_and_with_the_time(num_images: int, time: str, steps: int) -> None:
    assert num_steps(models()["sdxl"].purposes["subject"], num_images=num_images, time=time) == steps


@pytest.mark.parametrize(
    ("model", "example"), [("sdxl", "sdxl-tlora-paper"), ("flux-dev", "flux-dev-tlora-vanilla")]
)
def test_a_subject_is_trained_as_by_the_papers_recipe(model: str, example: str, repository: Path) -> None:
    folder = repository / "config" / "examples" / example
    preset = models()[model].purposes["subject"]
    adapter = json.loads((folder / "lycoris_tlora.json").read_text(encoding="utf-8"))
    adapter.pop("tlora_schedule", None)  # floor, the default
    assert dict(preset.lycoris) == adapter
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert preset.steps == config["max_train_steps"]
    card = models()[model].card_for(48)
    assert card is not None
    settings = models()[model].settings("subject", card)
    for key in ("optimizer", "optimizer_config", "learning_rate", "lr_scheduler", "train_batch_size"):
        assert settings.get(key) == config.get(key)


def test_ranks_are_halved_at_the_highest_noise() -> None:
    for model in models().values():
        for preset in model.purposes.values():
            lycoris = preset.lycoris
            assert 2 * lycoris["tlora_min_rank"] == lycoris["linear_dim"] == lycoris["linear_alpha"]


@pytest.mark.slow
def test_the_page_has_the_table_of_presets(repository: Path) -> None:
    table = "\n".join(preset_lines(Texts("en"), specs=registry.specs()))
    assert f"```text\n{table}\n```" in (repository / PAGE).read_text(encoding="utf-8")


def test_caption_and_prompts_are_those_of_the_purpose() -> None:
    run = run_of(models()["sdxl"], "style", 12, specs=registry.specs())
    assert run.validation.prompts[0].text == "a lighthouse by the sea in sks"
    assert [each.instance_prompt for each in run.datasets] == ["a picture in sks"]
