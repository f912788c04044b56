"""The texts that captions become, their number and its limit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.sections import DataConfig
from simpletuner.helpers.data.caption_variants import (
    MAX_VARIANTS,
    CaptionPlan,
    caption_plan,
    limit_problem,
)

Make = Callable[..., CaptionPlan]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(*, variants: int = 4, seed: int = 1, dropout: float = 0.0, **keys: Any) -> CaptionPlan:
        config = DatasetConfig.model_validate({"id": "x", "instance_data_dir": str(tmp_path), **keys})
        return caption_plan(config, DataConfig(caption_variants=variants), seed=seed, caption_dropout=dropout)

    return made


@pytest.mark.parametrize(
    ("keys", "number"),
    [
        ({}, 1),
        ({"variants": 9, "caption_filter_list": ["x"], "caption_prefix": "p"}, 1),
        ({"enable_wildcard": True}, 4),
        ({"variants": 7, "caption_tag_dropout_rate": 0.1}, 7),
        ({"caption_shuffle": {"enable": True}}, 2),
        ({"caption_shuffle": {"enable": True, "count": 10, "include_original": False}}, 10),
        ({"caption_shuffle": {"enable": False, "count": 10}}, 1),
        ({"caption_shuffle": {"enable": True, "count": 2}, "enable_wildcard": True}, 6),
        ({"caption_shuffle": {"enable": True, "count": 9}, "enable_wildcard": True}, 10),
        ({"caption_shuffle": {"keep_separator": "|||"}}, 1),
        ({"dropout": 0.5, "caption_dropout_probability": 0.2}, 1),
    ],
)
def test_the_number_of_variants_covers_every_order_equally(
    make: Make, keys: dict[str, Any], number: int
) -> None:
    plan = make(**keys)
    assert plan.num_variants == number
    (variants,) = plan.variants(["a, b"], image="a.png")
    assert len(variants) == (number if number > 1 else 1)


def test_steps_are_taken_one_after_the_other(make: Make) -> None:
    plan = make(
        caption_filter_list=["s/cat/{cat|cat}/"],
        caption_prefix="sks,",
        caption_suffix=", end",
        enable_wildcard=True,
        caption_tag_dropout_rate=1.0,
        caption_shuffle={"enable": True, "position_start": 2},
    )
    assert plan.variants(["a cat, mat"], image="a.png") == (("sks, a cat",) * 4,)


def test_variants_depend_on_seed_image_and_caption_alone(make: Make) -> None:
    keys = {"caption_tag_dropout_rate": 0.5, "variants": 20}
    texts, tags = ["a, b, c, d", "a, b, c, d"], make(**keys)
    first = tags.variants(texts, image="a.png")
    assert first == make(**keys, id="y").variants(texts, image="a.png"), "two sizes share their texts"
    assert first[0] != first[1]
    assert first != tags.variants(texts, image="b.png")
    assert first != make(**keys, seed=2).variants(texts, image="a.png")
    assert first[0] == tags.variants(texts[:1], image="a.png")[0]
    assert first[0][:10] == make(**keys | {"variants": 10}).variants(texts, image="a.png")[0]


def test_a_datasets_own_dropout_stands_above_the_runs(make: Make) -> None:
    def share(plan: CaptionPlan) -> float:
        return sum(not plan.of_sample("a", index) for index in range(1000)) / 1000

    assert share(make(dropout=0.0)) == 0
    assert 0.45 < share(make(dropout=0.5)) < 0.55
    assert share(make(dropout=0.5, caption_dropout_probability=0)) == 0
    assert 0.15 < share(make(dropout=0.5, caption_dropout_probability=0.2)) < 0.25


def test_captions_without_tags_are_named(make: Make) -> None:
    plan = make(caption_shuffle={"enable": True, "position_start": 2}, caption_prefix="sks")
    found = plan.tag_problems(
        [("a.png", "a, b, c"), ("b.png", "a cat"), ("c.png", "a, b"), ("d.png", ""), ("e.png", "a dog")]
    )
    assert (found.num_captions, found.unsplit, found.kept) == (5, ("b.png", "d.png", "e.png"), ("c.png",))
    assert not found.is_error
    unsplit, kept = found.lines()
    assert all(part in unsplit for part in ("split_on", "comma", "3 of 5", "b.png; d.png; e.png"))
    assert all(part in kept for part in ("position_start", "1 of 5", "c.png"))


@pytest.mark.parametrize(
    ("keys", "captions", "is_error"),
    [
        ({"caption_shuffle": {"enable": True}}, ["a cat", "a dog"], True),
        ({"caption_shuffle": {"enable": True, "position_start": 3}}, ["a, b, c", "a"], True),
        ({"caption_tag_dropout_rate": 0.1}, ["a cat"], False),
        ({"caption_tag_dropout_rate": 0.1, "caption_shuffle": {"position_start": 1}}, ["a cat", "b"], True),
        ({"caption_shuffle": {"enable": True}}, ["a cat", "a, b"], False),
        ({"caption_shuffle": {"enable": True, "keep_separator": "|||"}}, ["a, b |||", "c, d ||| "], True),
        ({"caption_shuffle": {"enable": True}}, ["", ""], False),
        ({"caption_shuffle": {"enable": True, "split_on": "space"}}, ["a cat"], False),
        ({}, ["a cat"], False),
    ],
)
def test_tags_that_no_caption_has_are_an_error(
    make: Make, keys: dict[str, Any], captions: list[str], is_error: bool
) -> None:
    found = make(**keys).tag_problems([(f"{number}.png", text) for number, text in enumerate(captions)])
    assert found.is_error is is_error
    assert bool(list(found.lines())) is (is_error or (len(set(captions)) > 1 and "a, b" in captions))


def test_more_variants_than_are_encoded_before_training_name_the_keys() -> None:
    assert limit_problem({}) is None
    assert limit_problem({"a": MAX_VARIANTS}) is None
    problem = limit_problem({"a": MAX_VARIANTS, "b": 1}) or ""
    for part in ("100,001", "'a'", "'b'", "caption_variants", "count", "text_cache_ondemand"):
        assert part in problem
