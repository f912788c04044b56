"""Each change of a caption, and what stays in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest

from simpletuner.helpers.choices.captions import CAPTION_STEPS
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.data.caption_steps import (
    CaptionDraw,
    Tags,
    caption_dropped,
    filtered,
    prefixed,
    shuffled,
    suffixed,
    tags_dropped,
    tags_of,
    wildcards_drawn,
)
from simpletuner.helpers.randomness import mix

Config = Callable[..., DatasetConfig]


@pytest.fixture
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("images")

    def made(**keys: Any) -> DatasetConfig:
        return DatasetConfig.model_validate({"id": "x", "instance_data_dir": str(folder), **keys})

    return made


def draw(number: int = 0, *, seed: int = 1, image: str = "a.png") -> CaptionDraw:
    return CaptionDraw(seed, number, (image, 0))


def test_the_steps_stand_in_the_order_in_which_they_are_taken() -> None:
    assert list(CAPTION_STEPS) == [
        "filter",
        "prefix",
        "suffix",
        "wildcard",
        "tag dropout",
        "shuffle",
        "caption dropout",
    ]


@pytest.mark.parametrize("step", CAPTION_STEPS.values(), ids=lambda step: step.name)
def test_a_step_is_off_by_default_and_leaves_captions_alone(config: Config, step: Any) -> None:
    plain = config()
    assert not getattr(plain, step.switch)
    if step.name != "wildcard":  # its switch alone keeps it from being called
        caption = "a cat,on  a {mat|rug}. "
        expected = caption.strip() if step.name in ("prefix", "suffix") else caption
        assert step.load()(caption, plain, draw()) == expected


@pytest.mark.parametrize(
    ("entries", "caption", "expected"),
    [
        (["a photo of "], "a photo of a cat", "a cat"),
        (["cat"], "a cat and a cat", "a and a"),
        (["^The image shows a(n)? "], "The image shows an apple", "apple"),
        ([r"\(c\)"], "a cat (c) 2020", "a cat 2020"),
        (["a ?"], "a", ""),
        (["s/cat/dog/"], "a cat", "a dog"),
        (["s/cat/dog"], "a cat", "a dog"),
        (["s/cat/dog/g"], "cat cat", "dog dog"),
        ([r"s/(\w+) cat/cat of \1/"], "tabby cat", "cat of tabby"),
        ([r"s/and\/or/or/"], "this and/or that", "this or that"),
        ([r"s/or/and\/or/"], "this or that", "this and/or that"),
        (["s/cat/dog/", "dog"], "a cat on", "a on"),
        (["dog"], "a  cat ", "a  cat "),
    ],
)
def test_filters_remove_and_replace(config: Config, entries: list[str], caption: str, expected: str) -> None:
    found = filtered(caption, config(caption_filter_list=entries), draw())
    assert found == expected


def test_prefix_and_suffix_stand_around_the_caption(config: Config) -> None:
    both = config(caption_prefix="sks, ", caption_suffix=", best")
    assert prefixed("a cat", both, draw()) == "sks, a cat"
    assert suffixed("a cat", both, draw()) == "a cat , best"
    assert (prefixed("", both, draw()), suffixed("", both, draw())) == ("sks,", ", best")


def test_a_wildcard_gives_each_alternative_equally_often(config: Config) -> None:
    counts = Counter(
        wildcards_drawn("a {red|blue|} {cat|dog}", config(), draw(number)) for number in range(3000)
    )
    colors, animals = ("red ", "blue ", ""), ("cat", "dog")
    assert counts.keys() == {f"a {color}{animal}" for color in colors for animal in animals}
    assert all(400 < count < 600 for count in counts.values())


def test_each_wildcard_is_drawn_by_itself(config: Config) -> None:
    texts = {wildcards_drawn("{a|b} {a|b}", config(), draw(number)) for number in range(40)}
    assert texts == {"a a", "a b", "b a", "b b"}


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("{{a|b}}", "{a|b}"),
        ("a {{ b", "a { b"),
        ("{one} cat", "one cat"),
        ("an open { brace", "an open { brace"),
        ("{{{cat}}}", "{cat}"),
    ],
)
def test_double_braces_are_plain_ones(config: Config, caption: str, expected: str) -> None:
    assert wildcards_drawn(caption, config(), draw()) == expected


@pytest.mark.parametrize(
    ("split_on", "caption", "tags"),
    [
        ("comma", "a cat,  mat ,, rug,", ("a cat", "mat", "rug")),
        ("space", " a  cat\nmat ", ("a", "cat", "mat")),
        ("period", "A cat. It is 2.5 m long. Red.", ("A cat", "It is 2.5 m long", "Red")),
    ],
)
def test_tags_end_at_their_separator(
    config: Config, split_on: str, caption: str, tags: tuple[str, ...]
) -> None:
    assert tags_of(caption, config(caption_shuffle={"split_on": split_on}).caption_shuffle) == Tags((), tags)


@pytest.mark.parametrize(
    ("shuffle", "caption", "expected"),
    [
        ({"position_start": 1}, "a, b, c", Tags(("a",), ("b", "c"))),
        ({"position_start": 9}, "a, b", Tags(("a", "b"), ())),
        ({"keep_separator": "|||"}, "a, b ||| c, d", Tags(("a", "b"), ("c", "d"))),
        ({"keep_separator": "|||"}, "a ||| b, c ||| d, e", Tags(("a",), ("b", "c"), ("d", "e"))),
        ({"keep_separator": "|||", "position_start": 1}, "a, b", Tags(("a",), ("b",))),
    ],
)
def test_first_and_last_tags_stay_in_place(
    config: Config, shuffle: dict[str, object], caption: str, expected: Tags
) -> None:
    assert tags_of(caption, config(caption_shuffle=shuffle).caption_shuffle) == expected


def test_shuffled_orders_keep_the_first_tags_and_lose_none(config: Config) -> None:
    own = config(
        caption_shuffle={"enable": True, "count": 400, "position_start": 1, "include_original": False}
    )
    counts = Counter(shuffled("sks, a, b, c", own, draw(number)) for number in range(400))
    assert counts.keys() == {f"sks, {', '.join(order)}" for order in permutations("abc")}
    assert all(40 < count < 95 for count in counts.values())


def test_the_orders_are_counted_and_repeat(config: Config) -> None:
    own = config(caption_shuffle={"enable": True, "count": 2})
    caption = "a,b, c, d, e, f"
    texts = [shuffled(caption, own, draw(number)) for number in range(9)]
    assert texts[:3] == texts[3:6] == texts[6:]
    assert texts[0] == caption, "the first order is the caption as it stands"
    assert len(set(texts)) == 3
    without = config(caption_shuffle={"enable": True, "count": 2, "include_original": False})
    others = [shuffled(caption, without, draw(number)) for number in range(9)]
    assert others[:2] == others[2:4]
    assert len(set(others)) == 2
    assert others[1] == texts[1], "an order has its number, whatever the others"


def test_orders_depend_on_seed_and_image_alone(config: Config) -> None:
    own = config(caption_shuffle={"enable": True, "count": 50, "include_original": False})
    caption = ", ".join("abcdefgh")

    def orders(dataset: DatasetConfig, **keys: Any) -> list[str]:
        return [shuffled(caption, dataset, draw(number, **keys)) for number in range(20)]

    assert orders(own) == orders(own)
    assert orders(own) != orders(own, seed=2)
    assert orders(own) != orders(own, image="b.png")
    seeded = config(caption_shuffle={"enable": True, "count": 50, "include_original": False, "seed": 2})
    assert orders(seeded) == orders(seeded, seed=3) == orders(own, seed=2)


def test_the_separator_of_kept_tags_is_in_no_caption(config: Config) -> None:
    for enable in (False, True):
        own = config(caption_shuffle={"enable": enable, "keep_separator": "|||"})
        for number in range(3):
            text = shuffled("a, b ||| c, d ||| e", own, draw(number))
            assert "|" not in text
            assert text.startswith("a, b, ")
            assert text.endswith(", e")
    assert shuffled("a,b", config(caption_shuffle={"keep_separator": "|||"}), draw()) == "a,b"


def test_sentences_end_with_their_period(config: Config) -> None:
    own = config(
        caption_shuffle={"enable": True, "count": 30, "split_on": "period", "include_original": False}
    )
    texts = {shuffled("One. Two.", own, draw(number)) for number in range(30)}
    assert texts == {"One. Two.", "Two. One."}


def test_tag_dropout_drops_its_share_and_no_kept_tag(config: Config) -> None:
    own = config(caption_tag_dropout_rate=0.25, caption_shuffle={"position_start": 2})
    texts = [tags_dropped("k1, k2, a, b, c, d", own, draw(number)) for number in range(2000)]
    assert all(text.startswith("k1, k2") for text in texts)
    counts = Counter(tag for text in texts for tag in text.split(", "))
    assert all(1400 < counts[tag] < 1600 for tag in "abcd")
    assert len(set(texts)) == 16, "each tag is dropped by itself"


def test_tag_dropout_leaves_the_separator_for_the_shuffle(config: Config) -> None:
    own = config(caption_tag_dropout_rate=1.0, caption_shuffle={"keep_separator": "|||"})
    assert tags_dropped("a ||| b, c ||| d", own, draw()) == "a |||  ||| d"
    assert tags_dropped("a ||| b", own, draw()) == "a ||| "
    assert shuffled("a |||  ||| d", own, draw()) == "a, d"


def test_captions_are_dropped_by_the_sample_and_as_before_the_key_existed(config: Config) -> None:
    own = config(caption_dropout_probability=0.3)
    dropped = [not caption_dropped("a", own, CaptionDraw(7, index)) for index in range(500)]
    assert dropped == [mix(7, "caption dropout", index) < 0.3 * 2**63 for index in range(500)]
    assert 120 < sum(dropped) < 180
