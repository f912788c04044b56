"""The command blocks of the pages, run in order on the embedded model.

A block after `<!-- tested: configured -->` needs a configuration, one after `<!-- tested: trained -->` what a
run has written; tests/unit/documentation/test_commands.py reads all other blocks.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from simpletuner import cli
from simpletuner.helpers.io.run_folder import ADAPTER_FILE
from tests.integration.tiny_runs import reset_accelerate
from tests.pages import REPOSITORY, Block, blocks, pages

MODEL = "simpletuner/demo/sdxl"
PLACES = {"MODEL": MODEL, "stabilityai/stable-diffusion-xl-base-1.0": MODEL}
"""What a page names -> what is here."""
EMBEDDED: dict[str, object] = {
    "pretrained_model_name_or_path": MODEL,
    "output_dir": "output/mine",
    "resolution": 64,
    "aspect_bucket_alignment": 8,
    "mixed_precision": "no",
    "max_train_steps": 1,
    "validation_num_inference_steps": 1,
    "use_ema": True,
}
RANKS = {"linear_dim": 8, "linear_alpha": 8, "tlora_min_rank": 1}
SMALL = ["--size", "64x64", "--steps", "1"]
"""Of images: SDXL's own size takes minutes on a CPU."""
ALL = [block for page in pages() for block in blocks(page) if not re.search(r"\bja\b", block.page)]
"""Those of the English pages; the blocks of the Japanese ones are the same."""


def _noted(name: str) -> list[Block]:
    return [block for block in ALL if block.note == f"tested: {name}" and block.language == "bash"]


def _folder(path: Path) -> Path:
    """A folder like a clone's, whose config folder is empty."""
    path.mkdir()
    (path / "simpletuner").symlink_to(REPOSITORY / "simpletuner")
    return path


def _prepare(config: Path) -> None:
    """The quickstart's changes for the embedded model, in a copy of an example."""
    for file, values in (("config.json", EMBEDDED), ("lycoris_tlora.json", RANKS)):
        path = config / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _run(words: list[str]) -> None:
    """Run a line of a page; train.sh trains as `simpletuner train` does."""
    env = words.pop(0).removeprefix("ENV=") if words[0].startswith("ENV=") else None
    program, *words = [PLACES.get(word, word) for word in words]
    if program == "./train.sh":
        words = ["train", *([env] if env else []), *words]
    else:
        assert program == "simpletuner", program
    if words[0] == "sample":
        words += SMALL
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["simpletuner", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code == 0, words
    reset_accelerate()
    if words[:2] == ["examples", "copy"]:
        _prepare(Path(words[3]))


def _run_block(block: Block) -> None:
    for line in block.text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            _run(words)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of T-LoRA and LoRA, and their adapter under the names of the pages."""
    folder = _folder(tmp_path_factory.mktemp("trained") / "clone")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for config in ("mine", "other"):
            _run(["simpletuner", "examples", "copy", "sdxl-tlora-paper", f"config/{config}"])
        _run(["simpletuner", "train", "mine"])
        lora = [
            "lora_type=standard",
            "--lora_rank=16",
            "output_dir=output/cat-lora",
            "validation_disable=true",
        ]
        _run(["simpletuner", "train", "other", *lora])
        for name, source in (("cat", "mine"), ("demo-lora", "cat-lora")):
            shutil.copytree(f"output/{source}", f"output/{name}")
        for name in (ADAPTER_FILE, "other.safetensors"):
            shutil.copy(f"output/mine/{ADAPTER_FILE}", name)
    return folder


@pytest.mark.parametrize("block", _noted("configured"), ids=str)
def test_a_block_that_needs_a_configuration_runs(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(_folder(tmp_path / "clone"))
    if "examples copy" not in block.text:
        _run(["simpletuner", "examples", "copy", "sdxl-tlora-paper", "config/mine"])
    _run_block(block)


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({block.page for block in _noted("trained")}))
def test_the_blocks_of_a_page_that_need_a_run_run_one_after_the_other(
    page: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [block for block in _noted("trained") if block.page == page]
    folder = tmp_path / "clone"
    if "examples copy" in found[0].text:
        _folder(folder)
    else:
        shutil.copytree(trained, folder, symlinks=True)
    monkeypatch.chdir(folder)
    for block in found:
        _run_block(block)


def test_there_are_blocks_of_both_kinds() -> None:
    assert len(_noted("configured")) >= 2
    assert len(_noted("trained")) >= 10
