"""Values of environment variables: replaced by their placeholders in each spelling, at each boundary."""

from __future__ import annotations

import html
import io
import json
import logging
import shlex
import sys
import traceback
from pathlib import Path
from typing import cast

import pytest

from simpletuner.helpers.io.logs import configure_logging
from simpletuner.helpers.io.names import one_line_reason
from simpletuner.helpers.io.redaction import (
    RedactingStream,
    hide,
    hide_named,
    redact_terminal,
    redacted,
    redacted_json,
)

SECRET = "hf_very'secret\\value"


@pytest.mark.parametrize(
    "spelling",
    [
        SECRET,
        repr(SECRET),
        json.dumps(SECRET),
        html.escape(SECRET),
        str({"key": SECRET}),
        shlex.quote(SECRET),
    ],
    ids=["plain", "repr", "json", "html", "in a dict", "shell"],
)
def test_a_value_is_hidden_in_each_spelling(spelling: str) -> None:
    hide(SECRET, "{env:KEY}")
    text = redacted(f"found {spelling}.")
    assert "{env:KEY}" in text
    assert "secret" not in text


@pytest.mark.parametrize(
    ("value", "text", "shown"),
    [
        (" padded value\n", "a padded value here", "a {env:KEY} here"),
        ("/mnt/scratch//runs/", "/mnt/scratch/runs/out", "{env:KEY}/out"),
        ("../runs/mine", "/mnt/me/runs/mine/out", "/mnt/me/{env:KEY}/out"),
        ("müller", json.dumps("müller"), '"{env:KEY}"'),
        ("two\nlines", "two\\nlines", "{env:KEY}"),
    ],
    ids=["spaces around", "a path", "a path that leads upwards", "not ASCII", "line feed"],
)
def test_a_value_is_hidden_as_it_stands_in_prompts_and_paths(value: str, text: str, shown: str) -> None:
    hide(value, "{env:KEY}")
    assert redacted(text) == shown


@pytest.mark.parametrize("value", ["", "abc", "\n\n", " a "])
def test_a_value_that_is_too_short_stays(value: str) -> None:
    hide(value, "{env:KEY}")
    assert redacted(f"a {value}, b {value!r}") == f"a {value}, b {value!r}"


def test_home_is_hidden_where_a_value_begins_with_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/mnt/somebody")
    hide("~/models", "{env:KEY}")
    assert redacted("/mnt/somebody/models/a") == "{env:KEY}/a"


def test_of_two_values_the_longer_is_replaced_first_and_placeholders_stay() -> None:
    hide("abcd", "{env:ABCD}")
    hide("abcdefgh", "{env:LONG}")
    hide("LONG", "{env:NAME}")
    text = redacted("abcdefgh abcd LONG")
    assert text == "{env:LONG} {env:ABCD} {env:NAME}"
    assert redacted(text) == text


def test_credentials_of_a_url_are_hidden() -> None:
    assert redacted("see https://me:pass@host/x") == "see https://***@host/x"


def test_json_is_redacted_at_any_depth_but_for_its_keys() -> None:
    hide("secret", "{env:KEY}")
    value = {"secret": ["a secret", ("secret", 1, None, True)]}
    assert redacted_json(value) == {"secret": ["a {env:KEY}", ["{env:KEY}", 1, None, True]]}


def test_a_digest_tells_two_values_apart_and_does_not_show_them() -> None:
    hide("first value", "{env:KEY}")
    hide("other value", "{env:KEY}")
    one, other = (redacted(f"a {name} value", with_digest=True) for name in ("first", "other"))
    assert one != other
    assert one.startswith("a {env:KEY}#")
    assert one == redacted("a first value", with_digest=True)


def test_the_variables_that_a_text_names_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_KEY", "the value")
    monkeypatch.delenv("TOY_MISSING", raising=False)
    hide_named("a {env:TOY_KEY} and {env:TOY_MISSING}")
    assert redacted("the value") == "{env:TOY_KEY}"


def test_a_reason_is_redacted_before_it_is_cut() -> None:
    hide("secret" * 100, "{env:KEY}")
    assert one_line_reason(ValueError("secret" * 100)) == "{env:KEY}"


def test_the_terminal_shows_placeholders_in_logs_messages_and_tracebacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    configure_logging()
    hide("secret value", "{env:KEY}")
    logging.getLogger("simpletuner.test").warning("a %s", "secret value")
    print("a secret value")  # noqa: T201  what is tested
    sys.stderr.writelines(["two ", "secret value\n"])
    try:
        raise OSError(2, "no such file", "/secret value/a")
    except OSError:
        traceback.print_exc()
    assert out.getvalue() == "a {env:KEY}\n"
    assert "secret" not in err.getvalue()
    for line in ("WARNING  a {env:KEY}", "two {env:KEY}", "no such file: '/{env:KEY}/a'"):
        assert f"{line}\n" in err.getvalue()


def test_the_terminal_is_wrapped_once_and_stays_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (tmp_path / "out").open("w", encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdout", file)
        redact_terminal()
        first = sys.stdout
        redact_terminal()
        assert sys.stdout is first
        assert isinstance(cast("object", first), RedactingStream)
        assert first.fileno() == file.fileno()
        assert not first.isatty()
        assert first.write("four") == 4


def test_a_character_that_the_terminal_lacks_is_an_escape() -> None:
    data = io.BytesIO()
    stream = RedactingStream(io.TextIOWrapper(data, encoding="cp1252", write_through=True))
    assert stream.write("\u2265 \udcff \u00e9") == 5
    assert data.getvalue() == b"\\u2265 \\udcff \xe9"
