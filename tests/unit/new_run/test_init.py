"""`simpletuner init`: the files that it writes, the questions, and what it refuses."""

from __future__ import annotations

import io
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from simpletuner import cli
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.io.atomic import new_folder
from simpletuner.helpers.io.faults import StorageError
from simpletuner.helpers.models import registry
from simpletuner.helpers.new_run.card import Card, find_card, read_card
from simpletuner.helpers.new_run.questions import Questions, Terminal
from simpletuner.helpers.new_run.texts import Texts
from simpletuner.helpers.new_run.writing import start_command, write_configuration

KEYS = ("images", "purpose", "trigger", "model", "memory", "time", "name")
GIVEN = {"--images": "写真", "--purpose": "subject", "--trigger": "sks toy", "--model": "embedded"}


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with two images, one of them in a subfolder, and a machine without a card."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LANG", "C")
    monkeypatch.delenv("LC_ALL", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("写真/猫.png", "写真/横/猫 2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (96, 64), (200, 90, 40)).save(tmp_path / name)


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["simpletuner", "init", *arguments])
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def _arguments(**others: str) -> list[str]:
    given = GIVEN | {f"--{key}": value for key, value in others.items()}
    return [each for pair in given.items() for each in pair]


def _files() -> list[str]:
    return sorted(path.as_posix() for path in Path("config").rglob("*")) if Path("config").exists() else []


def test_what_is_written_is_valid_and_trains_the_users_images(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, *_arguments()) == 0
    out = capsys.readouterr().out
    names = ["README.md", "config.json", "lycoris_tlora.json", "multidatabackend.json", "prompts.json"]
    assert _files() == ["config/写真", *(f"config/写真/{name}" for name in names)]
    run = load_config(Path("config/写真/config.json"), families=registry.specs())
    assert run.training.max_train_steps == 320
    assert run.checkpoint.checkpoint_step_interval == run.validation.validation_step_interval == 80
    assert run.checkpoint.output_dir == Path("output/写真").absolute()
    (dataset,) = run.datasets
    assert (dataset.folder, dataset.instance_prompt) == (Path("写真").absolute(), "a sks toy")
    assert len(run.validation.prompts) == 4
    assert all("sks toy" in prompt.text for prompt in run.validation.prompts)
    assert "2 in 写真, 1 of them in subfolders" in out
    assert out.splitlines()[-1] == "Start it: simpletuner train 写真"
    monkeypatch.setattr("sys.argv", ["simpletuner", "validate", "写真"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert "valid." in capsys.readouterr().out


def test_the_page_has_the_answers_the_evidence_and_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        _run(monkeypatch, *_arguments(trigger="sks | 'toy'", model="flux-dev", memory="12", name="mine")) == 0
    )
    page = Path("config/mine/README.md").read_text(encoding="utf-8")
    assert "| trigger | `sks \\| 'toy'` |" in page
    assert "arXiv 2507.05964, table 5" in page
    assert "simpletuner train mine" in page
    assert "--size 1024x1024" in page
    assert """--prompt 'a photo of sks | '"'"'toy'"'"''""" in page
    assert "$" not in page


def test_japanese_is_chosen_by_option_or_locale(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, *_arguments(language="ja", name="a")) == 0
    first = capsys.readouterr().out
    monkeypatch.setenv("LANG", "ja_JP.UTF-8")
    assert _run(monkeypatch, *_arguments(name="b")) == 0
    assert capsys.readouterr().out == first.replace("/a", "/b").replace("train a", "train b")
    assert "写真 の 2 枚(うち 1 枚はサブフォルダ内)" in first
    assert "## 値の根拠" in Path("config/b/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("captions", "line", "notes"),
    [
        ({}, '"a sks toy" for every image', 0),
        ({"notes.txt": "of another file"}, '"a sks toy" for every image', 0),
        (
            {"猫.txt": "a sks toy here", "横/猫 2.txt": "a sks toy there"},
            "from text files, for 2 of 2 images",
            0,
        ),
        ({"猫.txt": "a toy"}, "from text files, for 1 of 2 images", 2),
    ],
    ids=["none", "another", "both", "one"],
)
def test_captions_beside_the_images_are_noticed(
    captions: dict[str, str],
    line: str,
    notes: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, text in captions.items():
        Path("写真", name).write_text(text, encoding="utf-8")
    assert _run(monkeypatch, *_arguments()) == 0
    out = capsys.readouterr().out
    assert f"captions      {line}" in out
    assert out.count("  note  ") == notes
    assert ('Captions without "sks toy": 1.' in out) == bool(notes)


def test_a_trigger_that_a_text_encoder_cannot_read_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, *_arguments(trigger="猫", model="sdxl", memory="24", name="a")) == 0
    assert 'SDXL 1.0 splits "猫" into pieces' in capsys.readouterr().out
    assert _run(monkeypatch, *_arguments(trigger="猫", model="klein-4b", memory="24", name="b")) == 0
    assert "pieces" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("left_out", "missing"),
    [
        (list(GIVEN), "--images, --purpose, --trigger, --model, --memory"),
        (["--trigger"], "--trigger"),
        (["--model"], "--model, --memory"),
    ],
    ids=["all", "trigger", "model"],
)
def test_a_pipe_names_the_options_that_are_missing(
    left_out: list[str],
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [each for key, value in GIVEN.items() if key not in left_out for each in (key, value)]
    assert _run(monkeypatch, *given) == 2
    assert f" {missing}. " in capsys.readouterr().err
    assert not _files()


@pytest.mark.parametrize(
    ("option", "value", "part"),
    [
        ("images", "nowhere", "nowhere: there is no such folder"),
        ("images", "", "there is no such folder"),
        ("images", "写真/猫.png", "写真/猫.png: this is a file"),
        ("images", "empty", "empty: no image among 1 files"),
        ("images", "unread", "x.tga: its format is not read here"),
        ("images", "damaged", "no image in"),
        ("images", ".", "run init from another folder"),
        ("images", "..", "run init from another folder"),
        ("images", "x" * 300, "there is no such folder"),
        ("images", "~nobody-here/x", "there is no such folder"),
        ("images", "br{a}ces", "the path has braces"),
        ("name", "default", "trains the demo"),
        ("trigger", "a `b`", "must be one line"),
        ("purpose", "both", "both: unknown. Choose one of subject, style."),
        ("trigger", " ", "must be one line"),
        ("trigger", "{env:HOME}", "must be one line"),
        (
            "model",
            "sdxl",
            "SDXL 1.0 with 0 GB: no preset fits; the smallest is for 8 GB. With this card: embedded",
        ),
        ("memory", "-1", "-1: must be a number of GB"),
        ("memory", "nan", "nan: must be a number of GB"),
        ("time", "9", "9: unknown. Choose one of short, usual, long."),
        ("name", "../a", "for instance a."),
        ("name", ".a", "not hidden"),
        ("name", "taken", "config/taken: exists already"),
        ("name", "trained", "output/trained: exists already"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_a_wrong_value_is_refused_in_one_message_and_nothing_is_written(
    option: str,
    value: str,
    part: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for folder in ("empty", "unread", "damaged", "br{a}ces", "config/taken", "output/trained"):
        Path(folder).mkdir(parents=True)
    for file in ("empty/note.doc", "unread/x.tga", "damaged/a.png"):
        Path(file).touch()
    memory = {"memory": "0"} if option != "memory" else {}
    assert _run(monkeypatch, *_arguments(**memory, **{option: value})) in (1, 2)
    captured = capsys.readouterr()
    assert part in captured.err
    assert "Traceback" not in captured.err
    assert _files() == ["config/taken"]


class Answering:
    """A person who gives these answers, and an empty one (the default) after them."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.said: list[str] = []
        self.asked: list[str] = []

    def ask(self, question: str, default: str | None) -> str:
        self.asked.append(question)
        answer = self.answers.pop(0) if self.answers else ""
        if answer == "^C":
            raise KeyboardInterrupt
        return answer or str(default)

    @property
    def terminal(self) -> Terminal:
        return Terminal(self.said.append, self.ask)


def _questions(person: Answering, **options: str) -> Questions:
    return Questions(dict.fromkeys(KEYS) | options, Texts("en"), person.terminal)


def test_seven_questions_make_a_configuration() -> None:
    person = Answering("写真", "2", "sks style", "24", "flux-dev", "long", "mine")
    answers = _questions(person).answers()
    assert len(person.asked) == 7
    assert (answers.images.count, answers.purpose, answers.model.name, answers.card) == (
        2,
        "style",
        "flux-dev",
        24,
    )
    assert (answers.steps, answers.name, answers.memory) == (1600, "mine", 24)


def test_a_wrong_answer_is_asked_for_again() -> None:
    person = Answering("nowhere", "写真", "", "", "sks", "much", "12 GB", "flux2-dev", "3", "")
    answers = _questions(person).answers()
    assert (answers.purpose, answers.memory, answers.model.name) == ("subject", 12, "flux-dev")
    assert any(line.startswith("nowhere: there is no such folder") for line in person.said)
    assert any(line.startswith("much: must be a number") for line in person.said)
    assert any(line.startswith("Flux.2 dev with 12 GB: no preset fits") for line in person.said)


def test_only_models_that_fit_are_offered_under_their_numbers() -> None:
    person = Answering("写真", "subject", "sks toy", "6")
    answers = _questions(person).answers()
    assert answers.model.name == "embedded"
    assert any(line.startswith("With 6 GB only the embedded model") for line in person.said)
    assert [line.split()[:2] for line in person.said if line.startswith("  ")] == [["1", "embedded"]]


def test_an_option_is_not_asked_for_and_its_mistakes_come_first() -> None:
    person = Answering("写真", "subject", "sks")
    with pytest.raises(ConfigError, match=r"Flux\.2 dev with 16 GB"):
        _questions(person, model="flux2-dev", memory="16").answers()
    assert not person.asked
    answers = _questions(person, model="embedded").answers()
    assert answers.memory == 0
    assert len(person.asked) == 5


@pytest.mark.parametrize("num_answers", range(7))
def test_ctrl_c_at_any_question_leaves_nothing(num_answers: int) -> None:
    person = Answering(*["写真", "1", "sks", "0", "1", "1", "a"][:num_answers], "^C")
    with pytest.raises(KeyboardInterrupt):
        _questions(person).answers()
    assert not _files()


def test_ctrl_c_while_files_are_written_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = _questions(Answering("写真", "1", "sks", "0", "1", "1", "a")).answers()

    def stop(*_: object) -> Iterator[str]:
        assert len(list(Path("config").glob(".*/*"))) == 5
        raise KeyboardInterrupt

    monkeypatch.setattr("simpletuner.helpers.new_run.writing.plan_lines", stop)
    with pytest.raises(KeyboardInterrupt):
        write_configuration(answers, Texts("en"), specs=registry.specs())
    assert not _files()


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "new"

    def write() -> None:
        with new_folder(target) as folder:
            (folder / "mine").touch()
            target.mkdir()
            (target / "theirs").touch()

    with pytest.raises(StorageError, match="exists already"):
        write()
    assert [path.name for path in target.iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.glob(".*")] == []


@pytest.mark.parametrize(
    ("listing", "card"),
    [
        ("24564, NVIDIA GeForce RTX 4090\n", Card("NVIDIA GeForce RTX 4090", 24)),
        ("81559, NVIDIA H100, 80GB\n24564, other\n", Card("NVIDIA H100, 80GB", 79.6)),
        ("[N/A], NVIDIA GB10\n", None),
        ("No devices were found\n", None),
        ("", None),
    ],
    ids=["one", "two", "shared", "none", "empty"],
)
def test_the_first_card_is_read(listing: str, card: Card | None) -> None:
    assert read_card(listing) == card


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
@pytest.mark.parametrize(("code", "found"), [(0, 24), (9, None)], ids=["works", "fails"])
def test_the_driver_is_asked(code: int, found: float | None) -> None:
    tool = Path("bin/nvidia-smi")
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\necho '24564, NVIDIA GeForce RTX 4090'\nexit {code}\n", encoding="utf-8")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    card = find_card()
    assert (card and card.memory) == found
    person = Answering("写真", "subject", "sks")
    answers = _questions(person).answers()
    assert answers.model.name == ("sdxl" if found else "embedded")
    assert any("RTX 4090 with 24.0 GB" in line for line in person.said) == bool(found)
    (question,) = (each for each in person.asked if each.startswith("How long"))
    assert (" min)" in question) == bool(found)


def test_the_start_is_train_sh_where_it_is() -> None:
    assert start_command("my-cat") == "simpletuner train my-cat"
    Path("train.sh").touch()
    assert start_command("my-cat") == "./train.sh my-cat"


def test_settings_of_a_small_card_are_in_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _run(monkeypatch, *_arguments(model="flux-dev", memory="8", name="small")) == 0
    config = json.loads(Path("config/small/config.json").read_text(encoding="utf-8"))
    assert (config["base_model_precision"], config["enable_group_offload"]) == ("int8-torchao", True)


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
@pytest.mark.parametrize(("card", "known"), [("NVIDIA GeForce RTX 4090", True), ("NVIDIA New 1", False)])
def test_the_time_on_a_known_card_is_estimated(
    card: str, known: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = Path("bin/nvidia-smi")
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\necho '24564, {card}'\n", encoding="utf-8")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    assert _run(monkeypatch, *_arguments(model="sdxl")) == 0
    out = capsys.readouterr().out
    assert ("min on NVIDIA GeForce RTX 4090" in out) == known
    assert "of 24 GB at the peak" in out
