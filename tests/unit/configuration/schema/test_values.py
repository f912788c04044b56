"""Values written as a line of text."""

from __future__ import annotations

import pytest

from simpletuner.helpers.configuration.schema.values import (
    hub_repository,
    optimizer_arguments,
    optimizer_problem,
    sizes,
    trackers,
)
from simpletuner.helpers.contracts import Size


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (512, ["512x512"]),
        ("512", ["512x512"]),
        ("1024x768", ["1024x768"]),
        ("1024x1024,768X1344", ["1024x1024", "768x1344"]),
        ([64, "128x64"], ["64x64", "128x64"]),
        (" 64 x 32 , ", ["64x32"]),
        ("", []),
        (None, []),
    ],
)
def test_sizes_are_read_as_width_by_height(written: object, expected: list[str]) -> None:
    assert [str(size) for size in sizes(written)] == expected


def test_the_first_number_of_a_size_is_the_width() -> None:
    assert sizes("100x200") == (Size(height=200, width=100),)


@pytest.mark.parametrize("written", ["abc", "12x", "x12", "1x2x3", True, "0", "9000", "64;64", 1.5, [[64]]])
def test_what_is_no_size_is_refused(written: object) -> None:
    with pytest.raises(ValueError, match="must be"):
        sizes(written)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("none", ()),
        (None, ()),
        ("", ()),
        ("wandb", ("wandb",)),
        ("Wandb, tensorboard,wandb", ("wandb", "tensorboard")),
        (["wandb", "none"], ("wandb",)),
    ],
)
def test_trackers_are_a_list_without_none_or_repetition(written: object, expected: tuple[str, ...]) -> None:
    assert trackers(written) == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("weight_decay=1e-4,eps=1e-8", {"weight_decay": 1e-4, "eps": 1e-8}),
        ("betas=0.9,0.95,eps=1", {"betas": (0.9, 0.95), "eps": 1}),
        ("betas=(0.9, 0.95)", {"betas": (0.9, 0.95)}),
        ("beta2=0.99", {"betas": (0.9, 0.99)}),
        ({"beta1": "0.8", "beta2": 0.9}, {"betas": (0.8, 0.9)}),
        ({"betas": [0.5, 0.6]}, {"betas": (0.5, 0.6)}),
        ("betas=[0.9]", {"betas": (0.9,)}),
        ("betas=0.9,", {"betas": 0.9}),
        ("decouple=true,safeguard_warmup=False", {"decouple": True, "safeguard_warmup": False}),
        ("", {}),
        (None, {}),
    ],
)
def test_optimizer_arguments_become_python_values(written: object, expected: dict[str, object]) -> None:
    read = optimizer_arguments(written, betas=(0.9, 0.999))
    assert read == expected
    assert [type(value) for value in read.values()] == [type(value) for value in expected.values()]


@pytest.mark.parametrize(
    "written", ["weight_decay", "=1", "eps=1,eps=2", 3, {"a": {}}, "betas=0.9,0.95,beta1=0.8"]
)
def test_malformed_optimizer_arguments_are_refused(written: object) -> None:
    with pytest.raises(ValueError, match=r"must be|twice|values must|lists must"):
        optimizer_arguments(written, betas=(0.9, 0.999))


def test_single_betas_take_the_place_of_the_defaults_of_their_optimizer() -> None:
    assert optimizer_arguments("beta1=0.5", betas=(0.9, 0.99)) == {"betas": (0.5, 0.99)}
    assert optimizer_arguments("beta3=0.5", betas=(0.9, 0.99)) == {"beta3": 0.5}
    assert optimizer_arguments("beta3=0.5", betas=(0.9, 0.99, 0.999)) == {"betas": (0.9, 0.99, 0.5)}
    assert optimizer_arguments("beta1=0.5", betas=()) == {"beta1": 0.5}


@pytest.mark.parametrize(
    ("optimizer", "arguments", "text"),
    [
        ("adamw", {"weight_decya": 1}, "Did you mean weight_decay?"),
        ("adamw", {"d_coef": 1.0}, "d_coef is no argument of adamw."),
        ("adamw", {"lr": 1e-3}, "Use the key learning_rate."),
        ("adamw", {"eps": -1.0}, "eps must be a number of at least 0."),
        ("adamw", {"eps": "small"}, "eps must be a number of at least 0."),
        ("adamw", {"weight_decay": True}, "weight_decay must be a number of at least 0."),
        ("adamw", {"betas": (0.9,)}, "betas must be two numbers"),
        ("adamw", {"betas": (0.9, 1.0)}, "betas must be two numbers"),
        ("prodigy", {"decouple": 1}, "decouple must be true or false."),
        ("prodigy", {"d0": 0}, "d0 must be a number above 0."),
        ("came", {"betas": (0.9, 0.99)}, "betas must be three numbers"),
        ("adafactor", {"beta1": 1.0}, "beta1 must be a number from 0 to below 1."),
        ("bnb-adamw8bit", {"min_8bit_size": 0}, "min_8bit_size must be a whole number of at least 1."),
        ("bnb-adamw8bit", {"min_8bit_size": 4096.5}, "min_8bit_size must be a whole number of at least 1."),
        ("prodigyplus", {"prodigy_steps": 1.5}, "prodigy_steps must be a whole number of at least 0."),
        ("prodigyplus", {"betas": (0.0, 0.99)}, "beta1 must be above 0"),
        ("lion", {"eps": 1e-8}, "eps is no argument of lion."),
    ],
)
def test_arguments_that_an_optimizer_cannot_take_are_named(
    optimizer: str, arguments: dict[str, bool | int | float | str | tuple[float, ...]], text: str
) -> None:
    assert text in str(optimizer_problem(optimizer, arguments))


def test_every_wrong_argument_is_named() -> None:
    text = str(optimizer_problem("came", {"eps": 1e-8, "weight_decay": -1}))
    assert "eps2" in text
    assert "weight_decay must" in text


def test_arguments_of_their_own_optimizer_are_no_problem() -> None:
    assert optimizer_problem("adamw", {"betas": (0.9, 0.99), "weight_decay": 0, "eps": 1e-6}) is None
    assert optimizer_problem("prodigy", {"d_coef": 2.0, "use_bias_correction": True}) is None
    assert optimizer_problem("prodigyplus", {"prodigy_steps": 0, "betas": (0.5, 0.99)}) is None
    assert optimizer_problem("adamw", {"betas": (0.0, 0.99)}) is None


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("me/my-cat", "me/my-cat"),
        (" my_cat.v2 ", "my_cat.v2"),
        ("https://huggingface.co/me/my-cat", "me/my-cat"),
        ("https://huggingface.co/me/my-cat/tree/main?x=1#y", "me/my-cat"),
        ("http://www.huggingface.co/models/me/cat/", "me/cat"),
        ("hf.co/me/cat", "me/cat"),
        ("HTTPS://HuggingFace.co/cat", "cat"),
        ("", None),
        (None, None),
    ],
)
def test_a_repository_is_read_by_its_name_or_its_address(written: object, expected: str | None) -> None:
    assert hub_repository(written) == expected


@pytest.mark.parametrize(
    "written",
    [
        *("a b", "a/b/c", "a--b", "me/a..b", "-a", "a-", "me/.a", "me/a.", "a.git", "\u00e4", "me/", "/cat"),
        "a" * 97,
        "https://example.com/me/cat",
        "https://huggingface.co/datasets/me/cat--dog",
    ],
)
def test_a_repository_that_the_hub_refuses_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match=r"must|at most"):
        hub_repository(written)


def test_the_rules_of_repositories_are_those_of_the_client() -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    for name in (
        "a b",
        "a--b",
        "a..b",
        "-a",
        "a-",
        ".a",
        "a.",
        "a.git",
        "me/-a",
        "a" * 97,
        "a_",
        "_a",
        "me/a_b.c-d",
    ):
        try:
            validate_repo_id(name)
            is_valid = True
        except HFValidationError:
            is_valid = False
        try:
            assert (hub_repository(name) == name) == is_valid, name
        except ValueError:
            assert not is_valid, name
