"""The benchmark's likeness, plans, fingerprints and statistics."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simpletuner.demo.characters import draw_character, random_character
from simpletuner.demo.comparison.concepts import CONCEPTS, SUBJECT, View
from simpletuner.demo.comparison.likeness import likeness
from simpletuner.demo.comparison.plan import FULL, LORA, PLANS, QUICK, STANDARD
from simpletuner.demo.comparison.run import Benchmark, run_config
from simpletuner.demo.comparison.statistics import (
    Curves,
    at_equal,
    collect,
    common_likenesses,
    difference,
    estimate,
)
from simpletuner.demo.scenes import Background, draw_background
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.models import registry


@pytest.mark.parametrize("name", CONCEPTS)
def test_likeness_is_high_for_the_character_itself_and_low_for_others(name: str) -> None:
    concept = CONCEPTS[name]
    own = [
        likeness(concept.draw(view), concept.character) for view in (concept.trained, *concept.other_views(4))
    ]
    rng = np.random.default_rng(0)
    background = Background("white", "striped")
    characters = [
        draw_character(random_character(rng), place="at the top", background=background) for _ in range(10)
    ]
    strangers = [likeness(character, concept.character) for character in characters]
    assert min(own) > 0.9
    assert max(strangers) < 0.5
    assert likeness(draw_background(background), concept.character) == 0


def test_wrong_colours_and_missing_parts_lower_the_likeness() -> None:
    concept = CONCEPTS["robot"]
    parts = concept.character.parts
    swapped = replace(concept.character, parts=tuple(replace(part, rgb=part.rgb[::-1]) for part in parts))
    headless = replace(concept.character, parts=parts[2:5])
    whole = likeness(concept.draw(concept.trained), concept.character)
    for other in (swapped, headless):
        assert (
            likeness(replace(concept, character=other).draw(concept.trained), concept.character) < whole - 0.2
        )


@pytest.mark.parametrize("name", CONCEPTS)
def test_evaluation_views_share_neither_place_nor_colour_with_the_training_image(name: str) -> None:
    concept = CONCEPTS[name]
    views = concept.other_views(12)
    assert len({str(view) for view in views}) == 12
    assert views == concept.other_views(12)
    for view in views:
        assert view.place != concept.trained.place
        assert view.background.colour != concept.trained.background.colour
        assert View.parse(concept.draw(view)) == view


def test_caption_of_the_training_image_is_the_name_alone(tmp_path: Path) -> None:
    concept = CONCEPTS["horned"]
    concept.save_dataset(tmp_path)
    assert (tmp_path / "toy.txt").read_text() == SUBJECT + "\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["toy.png", "toy.txt"]


def test_contenders_differ_in_initialisation_and_rank_mask_only() -> None:
    configs = [contender.lycoris(16) for contender in FULL.contenders]
    differing = {"algo", "tlora_init", "sig_type", "tlora_min_rank", "tlora_schedule"}
    alike = [{key: value for key, value in each.items() if key not in differing} for each in configs]
    assert all(each == alike[0] for each in alike)
    assert len({json.dumps(each, sort_keys=True) for each in configs}) == len(configs)
    masked = {
        contender.name: contender.lycoris(16).get("tlora_min_rank") for contender in STANDARD.contenders
    }
    assert masked == {
        "LoRA": None,
        "Vanilla T-LoRA": 8,
        "Ortho-LoRA": 16,
        "T-LoRA": 8,
    }


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_configuration_of_every_run_is_valid(plan: Any, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    benchmark = Benchmark(tmp_path, model, plan)
    wanted = {(run.contender, run.rank): run for run in plan.runs()}
    for run in wanted.values():
        CONCEPTS[run.concept].save_dataset(tmp_path / "picture")
        file = tmp_path / "config.json"
        file.write_text(json.dumps(run_config(benchmark, run, folder=tmp_path)))
        config = load_config(file, families=registry.specs())
        assert all(step % config.checkpoint.checkpoint_step_interval == 0 for step in plan.steps)
        assert set(plan.unequal) <= set(plan.steps)
        assert config.training.max_train_steps == plan.steps[-1]
        assert config.checkpoint.checkpoints_total_limit is None


def test_result_is_valid_for_its_own_plan_and_model_only(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights.safetensors").write_bytes(b"one")
    benchmark = Benchmark(tmp_path, model, QUICK)
    run = next(QUICK.runs())
    assert benchmark.load(run) is None
    benchmark.results.mkdir()
    record = {"fingerprint": benchmark.fingerprint(run)}
    benchmark.result_file(run).write_text(json.dumps(record))
    assert benchmark.load(run) == record
    assert replace(benchmark, plan=replace(QUICK, learning_rate=1.0)).load(run) is None
    (model / "weights.safetensors").write_bytes(b"two")
    assert benchmark.load(run) is None


def _curves(concept: list[list[float]], alignment: list[list[float]]) -> Curves:
    values = {"concept": np.array(concept), "alignment": np.array(alignment)}
    keys = tuple(("toy", seed) for seed in range(len(concept)))
    return Curves(steps=tuple(range(len(concept[0]))), keys=keys, values=values)


def test_interval_contains_the_mean_and_shrinks_with_runs() -> None:
    rng = np.random.default_rng(0)
    few, many = estimate(rng.normal(5, 1, 10)), estimate(rng.normal(5, 1, 1000))
    assert few.low < few.mean < few.high
    assert many.high - many.low < (few.high - few.low) / 3
    assert many.high - many.low == pytest.approx(2 * 1.96 / 1000**0.5, rel=0.1)


def test_intervals_contain_the_true_mean_at_their_confidence() -> None:
    rng = np.random.default_rng(1)
    found = [estimate(rng.normal(0, 1, 15)) for _ in range(200)]
    assert 0.86 < np.mean([each.low <= 0 <= each.high for each in found]) < 0.99


def test_differences_are_paired() -> None:
    shared = np.random.default_rng(0).normal(0, 10, 15)
    found = difference(shared + 1, shared)
    assert (found.low, found.mean, found.high) == pytest.approx((1, 1, 1))


def test_contenders_are_compared_at_equal_likeness() -> None:
    one = _curves([[0.0, 0.5, 1.0]] * 4, [[1.0, 0.8, 0.2]] * 4)
    found = at_equal(one, "alignment", likeness=0.75)
    assert found is not None
    assert found.mean == pytest.approx(0.5)
    assert at_equal(one, "alignment", likeness=1.5) is None
    other = _curves([[0.1, 0.2, 0.5]] * 4, [[1.0, 0.9, 0.6]] * 4)
    assert common_likenesses([one, other]) == pytest.approx([0.2, 0.3, 0.4])


def test_results_have_the_same_order_for_every_contender() -> None:
    def record(concept: str, seed: int, value: float) -> dict[str, Any]:
        point = {"step": 0, "concept": value, "loss": {"0-500": 2 * value}}
        return {"run": {"concept": concept, "seed": seed}, "points": [point]}

    curves = collect([record("b", 0, 3.0), record("a", 1, 2.0), record("a", 0, 1.0)])
    assert curves.keys == (("a", 0), ("a", 1), ("b", 0))
    assert curves.at("concept", 0).tolist() == [1, 2, 3]
    assert curves.at("loss 0-500", 0).tolist() == [2, 4, 6]


def test_first_runs_of_a_plan_hold_all_contenders() -> None:
    first = [run.contender for run in STANDARD.runs()][: len(STANDARD.contenders)]
    assert first == list(STANDARD.contenders)
    assert first[0] is LORA
