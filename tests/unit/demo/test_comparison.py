"""The benchmark's likeness, plans, fingerprints and statistics."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simpletuner.demo.characters import draw_character, random_character
from simpletuner.demo.comparison import measure
from simpletuner.demo.comparison import publish as comparison_report
from simpletuner.demo.comparison.concepts import CONCEPTS, SUBJECT, View
from simpletuner.demo.comparison.likeness import likeness
from simpletuner.demo.comparison.plan import (
    CONTENDERS,
    FULL,
    LORA,
    PLANS,
    QUICK,
    STANDARD,
    STATIC,
    TLORA,
    VARIANTS,
    Contender,
    Run,
    timestep_weights,
)
from simpletuner.demo.comparison.run import MODEL, Benchmark, run_config, train_and_measure
from simpletuner.demo.comparison.spectrum import participation_ratio
from simpletuner.demo.comparison.statistics import (
    Curves,
    at_equal,
    collect,
    common_likenesses,
    difference,
    estimate,
)
from simpletuner.demo.comparison.timesteps import WeightedTimesteps, draw_timestep
from simpletuner.demo.scenes import Background, draw_background
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.configuration.schema.sections import RunConfig
from simpletuner.helpers.contracts import NoisyBatch
from simpletuner.helpers.models import registry
from simpletuner.helpers.models.diffusion import generator_of
from simpletuner.helpers.models.family import FamilyContext
from simpletuner.helpers.models.sdxl.family import SDXL


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
    differing = {"algo", "tlora_init", "sig_type", "tlora_min_rank", "tlora_schedule", "tlora_scale"}
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


def test_variants_differ_from_their_contender_in_one_thing() -> None:
    ranks = {each.name: each.lycoris(16).get("tlora_min_rank") for each in VARIANTS}
    assert ranks == {
        "T-LoRA min 1": 1,
        "T-LoRA min R/4": 4,
        "T-LoRA min 3R/4": 12,
        "T-LoRA active scale": 8,
        "LoRA weighted timesteps": None,
        "Ortho-LoRA weighted timesteps": 16,
    }
    for one, other in zip([each for each in VARIANTS if each.weighted], (LORA, STATIC), strict=True):
        assert one.lycoris(16) == other.lycoris(16)
    for each in (each for each in VARIANTS if each.is_masked):
        differing = {key for key, value in each.lycoris(16).items() if value != TLORA.lycoris(16)[key]}
        assert len(differing) == 1


def test_variants_are_trained_at_one_rank_of_the_standard_plan_and_never_in_the_quick_one() -> None:
    at_ranks = {run.rank for run in STANDARD.runs() if run.contender in VARIANTS}
    assert at_ranks == {16}
    assert len(list(STANDARD.runs())) == 3 * 5 * (2 * len(CONTENDERS) + len(VARIANTS))
    assert not any(run.contender in VARIANTS or QUICK.is_measured_unmasked(run) for run in QUICK.runs())
    unmasked = {
        (run.contender.name, run.rank) for run in STANDARD.runs() if STANDARD.is_measured_unmasked(run)
    }
    names = ("Vanilla T-LoRA", "T-LoRA", *(each.name for each in VARIANTS if each.is_masked))
    assert unmasked == {(name, 16) for name in names}


def test_timestep_weights_are_the_active_ranks_of_tlora() -> None:
    weights = timestep_weights(16)
    assert [weights[t] for t in (0, 1, 125, 126, 500, 875, 876, 999)] == [16, 15, 15, 14, 12, 9, 8, 8]
    assert len(weights) == 1000


def test_timesteps_are_drawn_exactly_in_proportion_to_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    up_to = np.cumsum([3, 0, 1, 2])
    numbers = iter(range(6))
    monkeypatch.setattr(torch, "randint", lambda high, *_, **__: torch.tensor([next(numbers)]))
    drawn = [draw_timestep(up_to, generator=torch.Generator()) for _ in range(6)]
    assert drawn == [0, 0, 0, 2, 3, 3]


def test_timesteps_follow_the_active_rank() -> None:
    weights = timestep_weights(16)
    up_to = np.cumsum(weights)
    drawn = [draw_timestep(up_to, generator=generator_of(0, "timestep", index)) for index in range(8000)]
    found, _ = np.histogram(drawn, bins=4, range=(0, 1000))
    wanted = np.add.reduceat(weights, [0, 250, 500, 750]) / up_to[-1] * len(drawn)
    assert ((found - wanted) ** 2 / wanted).sum() < 16, "chi-square with 3 degrees of freedom: 1 in 1000"
    assert ((found - len(drawn) / 4) ** 2 / (len(drawn) / 4)).sum() > 100, "and not evenly"


def test_noise_at_weighted_timesteps_is_the_familys_own_where_weights_are_equal(tmp_path: Path) -> None:
    config = _config(Run(LORA, rank=4, concept="robot", seed=0), tmp_path)
    context = FamilyContext(
        model=config.model,
        noise=config.noise,
        precision=config.precision,
        device=torch.device("cpu"),
        weight_dtype=torch.float32,
    )
    latents = torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    own = SDXL(context).add_noise(latents, sample_indices=range(6), seed=3)
    same = WeightedTimesteps(context, weights=[1] * 1000).add_noise(latents, sample_indices=range(6), seed=3)
    assert same.timesteps == own.timesteps
    for one, other in ((same.latents, own.latents), (same.target, own.target), (same.weight, own.weight)):
        assert torch.equal(one, other)
    single = [0] * 700 + [5] + [0] * 299
    fixed = WeightedTimesteps(context, weights=single).add_noise(latents, sample_indices=range(6), seed=3)
    assert fixed.timesteps == (700,) * 6


def test_participation_ratio_counts_the_directions_of_a_delta() -> None:
    def ratio(*values: float) -> float:
        frame, _ = torch.linalg.qr(torch.randn(9, len(values), generator=torch.Generator().manual_seed(0)))
        return participation_ratio(
            torch.diag(torch.tensor(values, dtype=torch.float32)) @ torch.eye(len(values), 5), frame
        )

    assert ratio(2, 2, 2) == pytest.approx(3)
    assert ratio(3, 1) == pytest.approx(10**2 / 82)  # (9 + 1)^2 / (81 + 1)
    assert ratio(3, 1) == pytest.approx(ratio(30, 10))
    assert ratio(7) == pytest.approx(1)
    assert ratio(0, 0) == 0


def test_participation_ratio_needs_no_singular_values() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(6, 4, 3, 3, generator=generator), torch.randn(8, 6, generator=generator)
    squares = torch.linalg.svdvals(b.double() @ a.double().flatten(1)) ** 2
    assert participation_ratio(a, b) == pytest.approx(float(squares.sum() ** 2 / (squares**2).sum()))


def _config(run: Run, folder: Path) -> RunConfig:
    benchmark = Benchmark(folder, MODEL, replace(QUICK, steps=(1,), unequal=(1, 1)))
    CONCEPTS[run.concept].save_dataset(folder / "picture")
    (folder / "config.json").write_text(json.dumps(run_config(benchmark, run, folder=folder)))
    return load_config(folder / "config.json", families=registry.specs())


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


def test_a_masked_run_is_measured_unmasked_too_and_a_weighted_one_draws_its_timesteps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "LOSS_VIEWS", 1)
    monkeypatch.setattr(measure, "NOISES_PER_VIEW", 1)
    drawn: list[int] = []
    own_noise = WeightedTimesteps.add_noise

    def add_noise(self: WeightedTimesteps, *args: Any, **kwargs: Any) -> NoisyBatch:
        noisy = own_noise(self, *args, **kwargs)
        drawn.extend(noisy.timesteps)
        return noisy

    monkeypatch.setattr(WeightedTimesteps, "add_noise", add_noise)
    both = Contender("both", init="random", min_share=0.0, weighted=True)
    plan = replace(
        QUICK,
        contenders=(both,),
        ranks=(8,),
        detailed_rank=8,
        steps=(3,),
        unequal=(3, 3),
        learning_rate=0.02,
        prompts=1,
        neutral=1,
        sampling_steps=2,
    )
    benchmark = Benchmark(tmp_path, MODEL, plan)
    run = Run(both, rank=8, concept="horned", seed=0)
    train_and_measure(benchmark, run)
    up_to = np.cumsum(timestep_weights(8))
    assert drawn == [draw_timestep(up_to, generator=generator_of(0, "timestep", index)) for index in range(6)]
    record = benchmark.load(run)
    assert record is not None
    (base, masked), (same_base, unmasked) = record["points"], record["unmasked"]
    assert base == same_base
    assert all(masked["loss"][band] != unmasked["loss"][band] for band in ("500-800", "800-1000"))
    assert masked["participation"] == unmasked["participation"] == unmasked["participation_noisiest"]
    assert 0 < masked["participation_noisiest"] < masked["participation"]

    monkeypatch.setattr(comparison_report, "plot_trade_off", lambda *_: None)
    groups = comparison_report.finished(benchmark)
    band = "loss 800-1000"
    of_masked, of_unmasked = (float(groups[each, 8].at(band, 3)[0]) for each in (both, both.unmasked))
    assert (of_masked, of_unmasked) == (masked["loss"]["800-1000"], unmasked["loss"]["800-1000"])
    report = comparison_report.publish(benchmark)
    assert report is not None
    column = list(comparison_report.MEASURES).index(band) + 2
    rows = [line.split("|") for line in report.read_text().splitlines() if line.startswith("| both |")]
    shown = [float(row[column].split()[0]) for row in rows if len(row) > column]
    assert round(of_unmasked - of_masked, 3) in shown


def test_first_runs_of_a_plan_hold_all_contenders() -> None:
    first = [run.contender for run in STANDARD.runs()][: len(STANDARD.contenders)]
    assert first == list(STANDARD.contenders)
    assert first[0] is LORA
