"""How problems read."""

from __future__ import annotations

import pytest

from simpletuner.helpers.configuration.text.problems import Problems, nearest, shown, unknown_key
from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.io.redaction import hide


def test_problems_are_listed_by_file_with_aligned_keys() -> None:
    problems = Problems()
    problems.add("config/config.json", "lerning_rate", "unknown key. Did you mean learning_rate?")
    problems.add("lycoris.json", "algo", "required, but missing.")
    problems.add("config/config.json", "seed", "true: must be a whole number.")
    assert problems.message() == (
        "config/config.json: 2 problems\n"
        "  lerning_rate  unknown key. Did you mean learning_rate?\n"
        "  seed          true: must be a whole number.\n"
        "lycoris.json: 1 problem\n"
        "  algo  required, but missing."
    )


def test_the_same_problem_counts_once() -> None:
    problems = Problems()
    for _ in range(2):
        problems.add("a", "key", "text")
    assert len(problems) == 1


def test_no_problem_raises_nothing_and_one_raises_with_exit_code_2() -> None:
    problems = Problems()
    problems.raise_if_any()
    problems.add("a", "key", "text")
    with pytest.raises(ConfigError, match="key") as caught:
        problems.raise_if_any()
    assert caught.value.exit_code == 2


def test_hidden_values_appear_nowhere_in_a_message() -> None:
    problems = Problems()
    hide("s3cret-value", "{env:KEY}")
    problems.add("file-s3cret-value", "a.s3cret-value", "found s3cret-value here")
    assert problems.message() == "file-{env:KEY}: 1 problem\n  a.{env:KEY}  found {env:KEY} here"


def test_a_hidden_value_is_replaced_before_a_long_value_is_cut() -> None:
    secret = "x" * 200
    hide(secret, "{env:KEY}")
    assert shown(secret) == '"{env:KEY}"'
    assert shown({"a": [secret]}) == '{"a": ["{env:KEY}"]}'


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", '"a"'),
        (1.5, "1.5"),
        (None, "null"),
        ("line\nbreak\x1b[31m", '"line\\nbreak\\u001b[31m"'),
        ("\u202eevil", '"\\u202eevil"'),
        ([1, "b"], '[1, "b"]'),
    ],
)
def test_values_are_shown_on_one_line_as_json(value: object, text: str) -> None:
    assert shown(value) == text


def test_long_values_are_cut() -> None:
    assert len(shown("y" * 500)) == 60
    assert shown("y" * 500).endswith(" ...")


@pytest.mark.parametrize(
    ("name", "match"),
    [("lerning_rate", "learning_rate"), ("LEARNING_RATE", "learning_rate"), ("--seeed", "seed")],
)
def test_an_unknown_key_names_the_nearest(name: str, match: str) -> None:
    assert unknown_key(name, ["learning_rate", "seed"]) == f"unknown key. Did you mean {match}?"


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("output_dri", "output_dir"),
        ("learningrate", "learning_rate"),
        ("max_train_step", "max_train_steps"),
        ("max_steps", "max_train_steps"),
        ("sdlx", "sdxl"),
    ],
)
def test_a_misspelling_or_a_word_left_out_is_recognised(name: str, match: str) -> None:
    known = ["output_dir", "learning_rate", "max_train_steps", "lr_scheduler", "sdxl"]
    assert nearest(name, known) == f" Did you mean {match}?"


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("controlnet", "context"),
        ("eval_loss_disable", "validation_disable"),
        ("noise_scheduler", "lr_scheduler"),
        ("noise_scheduler", "validation_noise_scheduler"),
        ("caption_tag_dropout", "caption_strategy"),
        ("caption_tag_dropout", "caption_dropout_probability"),
        ("text_encoder_lr", "text_encoder_4_precision"),
        ("learning_rate_te1", "learning_rate"),
        ("use_ema", "use_dora"),
        ("max_image_size", "minimum_image_size"),
        ("klein", "klein-9b"),
    ],
)
def test_a_name_that_means_something_else_is_never_proposed(name: str, other: str) -> None:
    assert nearest(name, [other]) == ""


def test_a_word_left_out_of_two_known_names_gets_no_guess() -> None:
    assert nearest("batch_size", ["vae_batch_size", "train_batch_size"]) == ""


def test_a_key_that_is_near_nothing_gets_no_guess() -> None:
    assert nearest("zzzz", ["learning_rate", "seed"]) == ""
