"""The command `simpletuner estimate`."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from simpletuner import cli

KLEIN = "flux2-klein-4b-tlora"


@pytest.fixture(autouse=True)
def _at_the_root(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["simpletuner", "estimate", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert isinstance(end.value.code, int)
    return end.value.code


def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(monkeypatch, *arguments) == 0
    return capsys.readouterr().out


def test_the_table_has_every_phase_and_what_to_change(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(monkeypatch, capsys, f"config/examples/{KLEIN}", "--card", "RTX 3080")
    head, *rows = text.splitlines()
    assert head.split() == "device memory, GiB captions latents training validation images".split()  # noqa: SIM905
    sums = next(row.split()[1:] for row in rows if row.startswith("  sum"))
    assert len(sums) == 4
    peak = max(sums, key=float)
    verdict = next(row for row in rows if row.startswith("device memory"))
    assert f"{float(peak):.1f} GiB" in verdict
    assert "of 10 GiB: does not fit" in verdict
    assert any("RTX 3080:" in row and "800 steps" in row for row in rows)
    assert any(row.startswith("  base_model_precision=") for row in rows)
    assert any(row.strip().startswith("download:") for row in rows)
    activations = next(row for row in rows if row.startswith("  1024x1024")).split()[1:]
    # As in the column of training, and with the blocks' own activations.
    assert activations[0] == "2.95"
    assert float(activations[2]) > 5 * float(activations[0])


def test_the_page_shows_what_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path("documentation/estimate.md").read_text(encoding="utf-8")
    [command] = re.findall(r"^simpletuner estimate (.+)$", page, re.MULTILINE)
    example = page.partition("\n```\ndevice memory")[2].partition("```")[0]
    text = printed(monkeypatch, capsys, *shlex.split(command))
    lines = {line.rstrip() for line in text.splitlines()}
    assert [line for line in example.splitlines()[1:] if line not in {*lines, "..."}] == []


def test_overrides_change_the_estimate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def peak(*overrides: str) -> int:
        config = f"config/examples/{KLEIN}/config.json"
        found = json.loads(printed(monkeypatch, capsys, "--config", config, "--json", *overrides))
        assert found["changes"] == []
        assert isinstance(found["peak_device_bytes"], int)
        assert found["peak_device_bytes"] == max(
            sum(each.values()) for each in found["device_bytes"].values()
        )
        return found["peak_device_bytes"]

    assert peak("base_model_precision=nf4-bnb") < peak() < peak("--train_batch_size", "8")


def test_json_has_the_changes_and_times(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(printed(monkeypatch, capsys, f"config/examples/{KLEIN}", "--memory", "10", "--json"))
    assert found["memory_gib"] == 10
    assert {"512x512", "768x768", "1024x1024"} == {each["size"] for each in found["activations"]}
    assert found["changes"][-1]["peak_device_bytes"] <= 0.95 * 10 * 2**30
    assert found["seconds"]["RTX 4090"]["step"] < found["seconds"]["RTX 3090"]["step"]
    assert found["steps"] == 800


def test_without_a_card_the_least_memory_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(monkeypatch, capsys)
    assert "fits 8 GiB" in text
    assert "change" not in text
    assert "not estimated in float32" in text


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--card", "Voodoo 2"), "Known: RTX 3060"),
        (("--memory", "inf"), "--memory"),
        (("--memory", "-1"), "--memory"),
        (("--memory", "viel"), "--memory"),
        (("config/absent.json",), "config/absent.json"),
        (("config/examples/demo-lora", "lerning_rate=1"), "learning_rate"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, tuple) else "",
)
def test_what_is_wrong_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], part: str
) -> None:
    assert run(monkeypatch, *arguments) == 2
    assert part in capsys.readouterr().err


def test_validate_has_a_line_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["simpletuner", "validate", f"config/examples/{KLEIN}"])
    with pytest.raises(SystemExit):
        cli.main()
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  memory ")]
    assert "fits 16 GiB" in line
