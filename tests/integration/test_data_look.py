"""`simpletuner data look` on folders with every problem."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from simpletuner.cli import app
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.data.dataset import TrainingData
from simpletuner.helpers.errors import ConfigError, DataError
from simpletuner.helpers.io.faults import StorageError
from simpletuner.helpers.io.redaction import redact_terminal
from simpletuner.helpers.models import registry
from simpletuner.helpers.reporting.data_page.findings import KINDS
from simpletuner.helpers.reporting.data_page.look import LookedDataset, look
from simpletuner.helpers.training.plan import plan_lines
from tests.integration.data_folders import JAPANESE, NAME, save, scene, write_problems, write_run
from tests.integration.synthetic_run import Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def run(config: Path, *arguments: str) -> Result:
    command = ["data", "look", str(config), "--output", str(config.parent / "data.html"), *arguments]
    return CliRunner().invoke(app, command, catch_exceptions=False)


def looked_at(config: Path, *triggers: str) -> list[LookedDataset]:
    loaded = load_config(config, families=registry.specs())
    return look(loaded, registry.specs()["sdxl"], triggers=triggers)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The problems, looked at once."""
    folder = tmp_path_factory.mktemp("problems")
    config = write_problems(folder)
    before = set(folder.rglob("*"))
    result = run(config)
    assert result.exit_code == 0, result.output
    assert set(folder.rglob("*")) - before == {folder / "data.html"}, "nothing is written but the page"
    (folder / "output.txt").write_text(result.stdout, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return (folder / "data.html").read_text(encoding="utf-8")


def findings(page: Page) -> dict[str, set[str]]:
    """Name of an image -> the kinds of its findings, as the page's cards have them."""
    return {str(each["data-name"]): set(str(each["data-kinds"]).split()) for each in page.all("figure")}


def test_the_page_has_each_problem_at_its_image(html: str) -> None:
    assert findings(Page(html)) == {
        "first.png": {"duplicate"},
        "copy.png": {"duplicate"},
        "pixels.tif": {"duplicate"},
        "large.png": {"near"},
        "small.png": {"near", "enlarged"},
        "soft.png": {"blurred", "trigger"},
        "grey.png": {"blank", "uncaptioned"},
        NAME: {"cut", "repeated"},
        "same caption.png": {"repeated"},
        "0.png": {"trigger"},
        "1.png": {"trigger", "masked"},
    }
    assert set.union(*findings(Page(html)).values()) == set(KINDS), "a kind is not tried"


def test_files_that_are_left_out_are_listed_with_the_reason(html: str) -> None:
    text = Page(html).text
    left_out = text[text.index("Left out:") :]
    for name in ("damaged.png", "no image.png", "alone.txt"):
        assert name in left_out
    assert "Left out: 3 files" in text


def test_names_and_captions_are_text_not_html(html: str) -> None:
    page = Page(html)
    assert NAME in page.text
    assert JAPANESE in page.text
    assert NAME not in html
    assert len(page.scripts) == 1


def test_the_page_loads_nothing_from_elsewhere(html: str) -> None:
    page = Page(html)
    assert all(str(each["src"]).startswith("data:image/jpeg;base64,") for each in page.all("img"))
    assert "default-src 'none'" in html
    assert not re.search(r"https?://", html)


def test_buckets_draws_and_batches_are_those_of_the_run(folder: Path, html: str) -> None:
    cats, dogs = looked_at(folder / "config.json")
    (bucket,) = cats.buckets
    assert (bucket.size, bucket.num_images, bucket.draws_per_epoch, bucket.batches_per_epoch) == (
        "128x128",
        9,
        18,
        9,
    )
    assert [each.num_images for each in dogs.buckets] == [1], "the black mask leaves its image out"
    assert "18" in Page(html).text


def test_held_out_images_and_their_copies_are_marked_and_in_no_batch(tmp_path: Path) -> None:
    for number in range(3):
        save(scene(number), tmp_path / "cats" / f"{number}.png", "sks")
    save(scene(7), tmp_path / "others" / "7.png", "sks")
    shutil.copy(tmp_path / "cats" / "0.png", tmp_path / "others" / "copy.png")
    entries = (
        {"id": "cats", "instance_data_dir": "cats"},
        {"id": "others", "instance_data_dir": "others", "dataset_type": "eval"},
    )
    config = write_run(tmp_path, *entries)
    cats, others = looked_at(config)
    assert [each.is_held_out for each in cats.images] == [True, False, False]
    assert [each.is_held_out for each in others.images] == [True, True]
    assert [each.num_images for each in cats.buckets] == [2]
    assert others.buckets == ()
    assert run(config).exit_code == 0
    cards = Page((tmp_path / "data.html").read_text(encoding="utf-8")).text
    assert cards.count("; held out") == 3


def test_images_are_cut_as_training_cuts_them(tmp_path: Path) -> None:
    for seed in range(4):
        save(scene(seed, 300, 128), tmp_path / "images" / f"{seed}.png", "a caption")
    config = write_run(
        tmp_path, {"id": "cats", "instance_data_dir": "images", "crop": True, "crop_style": "random"}
    )
    loaded = load_config(config, families=registry.specs())
    data = TrainingData(
        loaded.datasets,
        loaded.data,
        seed=loaded.training.seed,
        batch_size=2,
        pixel_alignment=registry.specs()["sdxl"].pixel_alignment,
    )
    (looked,) = looked_at(config)
    assert tuple(each.planned.sample for each in looked.images) == data.samples
    assert len({each.planned.sample.crop_top_left for each in looked.images}) > 1
    assert sum(each.batches_per_epoch for each in looked.buckets) == data.batches_per_epoch


def test_a_thumbnail_is_the_cut(tmp_path: Path) -> None:
    halves = Image.new("RGB", (256, 128), "red")
    halves.paste("blue", (0, 0, 128, 128))
    save(halves, tmp_path / "images" / "a.png", "x")
    dataset = {"id": "cats", "instance_data_dir": "images", "crop": True, "crop_style": "corner"}
    assert run(write_run(tmp_path, dataset)).exit_code == 0
    (image,) = Page((tmp_path / "data.html").read_text(encoding="utf-8")).all("img")
    data = base64.b64decode(str(image["src"]).partition(",")[2])
    with Image.open(io.BytesIO(data)) as thumbnail:
        assert thumbnail.size == (128, 128)
        red, _, blue = thumbnail.resize((1, 1)).getpixel((0, 0))
    assert (red < 10, blue > 240) == (True, True), "the left half, in the top left corner"


def test_the_terminal_counts_the_findings(folder: Path) -> None:
    lines = (folder / "output.txt").read_text(encoding="utf-8").splitlines()
    assert re.search(r"data\.html: 11 images, 11 with findings; 3 files left out\.", lines[0])
    assert dict(reversed(line.split(maxsplit=1)) for line in lines[1:])["Duplicates"] == "3"


def test_a_page_that_exists_is_kept_unless_overwrite_is_given(folder: Path) -> None:
    with pytest.raises(StorageError, match="exists already"):
        run(folder / "config.json")
    assert run(folder / "config.json", "--overwrite").exit_code == 0


def test_a_dataset_that_a_run_refuses_is_named_and_the_others_are_shown(tmp_path: Path) -> None:
    save(scene(1), tmp_path / "good" / "a.png", "sks")
    save(scene(2), tmp_path / "latin" / "b.png")
    (tmp_path / "latin" / "b.txt").write_bytes("Möwe".encode("latin-1"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "c.png").write_bytes(b"x")
    names = ("good", "latin", "broken")
    result = run(write_run(tmp_path, *({"id": each, "instance_data_dir": each} for each in names)))
    assert result.exit_code == 1
    assert "b.txt" in result.stdout
    assert "c.png" in result.stdout
    page = Page((tmp_path / "data.html").read_text(encoding="utf-8"))
    assert set(findings(page)) == {"a.png"}
    assert "b.txt" in page.text
    assert "c.png" in page.text


@pytest.mark.parametrize("cause", ["eval_share", "copies"])
def test_a_dataset_that_is_held_out_whole_is_refused_as_by_the_run(tmp_path: Path, cause: str) -> None:
    for number in range(3):
        save(scene(number), tmp_path / "cats" / f"{number}.png", "sks")
    save(scene(7), tmp_path / "others" / "7.png", "sks")
    cats: dict[str, object] = {"id": "cats", "instance_data_dir": "cats"}
    entries: list[dict[str, object]] = [cats | {"eval_share": 0.9999}]
    if cause == "copies":
        entries = [cats, cats | {"id": "held", "dataset_type": "eval"}]
    config = write_run(tmp_path, *entries, {"id": "others", "instance_data_dir": "others"})
    loaded = load_config(config, families=registry.specs())
    with pytest.raises(DataError) as refused:
        list(plan_lines(loaded, registry.specs()["sdxl"]))
    first, *rest = looked_at(config)
    assert first.problem == str(refused.value)
    assert not any(each.problem for each in rest)
    result = run(config)
    assert result.exit_code == 1
    assert f"  {refused.value}" in result.stdout.splitlines()


def test_batches_of_datasets_that_follow_each_other_are_not_summed(tmp_path: Path) -> None:
    for number in range(5):
        save(scene(number), tmp_path / ("cats" if number < 2 else "dogs") / f"{number}.png", "sks")
    config = write_run(
        tmp_path,
        {"id": "cats", "instance_data_dir": "cats", "end_step": 2},
        {"id": "dogs", "instance_data_dir": "dogs", "start_step": 3},
        train_batch_size=1,
    )
    assert [sum(each.batches_per_epoch for each in own.buckets) for own in looked_at(config)] == [2, 3]
    assert run(config).exit_code == 0
    page = (tmp_path / "data.html").read_text(encoding="utf-8")
    assert "<dt>batches per epoch</dt><dd>2, then 3</dd>" in page


def test_a_look_at_archives_writes_its_page_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simpletuner.helpers.data.sources.tar_index._RACY_NS", -1)
    for kind in ("images", "references"):
        save(scene(1), tmp_path / kind / "a.png", "sks")
        (tmp_path / f"{kind} packed").mkdir()
        with tarfile.open(tmp_path / f"{kind} packed" / "0.tar", "w") as archive:
            archive.add(tmp_path / kind / "a.png", "a.png")
    mask = {"dataset_type": "conditioning", "conditioning_type": "mask"}
    config = write_run(
        tmp_path,
        {
            "id": "cats",
            "type": "webdataset",
            "instance_data_dir": "images packed",
            "conditioning_data": "masks",
        },
        {"id": "masks", "type": "webdataset", "instance_data_dir": "references packed", **mask},
        cache_dir_vae=str(tmp_path / "cache"),
    )
    before = set(tmp_path.rglob("*"))
    assert run(config).exit_code == 0
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "data.html"}


def test_a_dataset_whose_every_image_is_damaged_is_named(tmp_path: Path) -> None:
    save(scene(1), tmp_path / "images" / "a.png")
    data = (tmp_path / "images" / "a.png").read_bytes()
    (tmp_path / "images" / "a.png").write_bytes(data[:-200])
    result = run(write_run(tmp_path, {"id": "cats", "instance_data_dir": "images"}))
    assert result.exit_code == 1
    assert "cats" in result.stdout


def test_a_value_of_the_environment_is_never_in_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "v3ry s3cret"
    monkeypatch.setenv("DATA_SECRET", secret)
    save(scene(1), tmp_path / f"images {secret}" / f"{secret}.png", f"a photo of {secret}, sky, tree")
    redact_terminal()
    dataset = {"id": "cats", "instance_data_dir": "images {env:DATA_SECRET}"}
    result = run(write_run(tmp_path, dataset))
    assert result.exit_code == 0
    html = (tmp_path / "data.html").read_text(encoding="utf-8")
    assert "s3cret" not in html
    assert "{env:DATA_SECRET}" in html


def test_a_limit_shows_images_with_findings_first_and_says_what_is_missing(tmp_path: Path) -> None:
    for seed in range(5):
        save(scene(seed), tmp_path / "images" / f"{seed}.png", f"caption {seed}" if seed != 3 else "")
    config = write_run(tmp_path, {"id": "cats", "instance_data_dir": "images"})
    assert run(config, "--limit", "2").exit_code == 0
    page = Page((tmp_path / "data.html").read_text(encoding="utf-8"))
    assert list(findings(page)) == ["3.png", "0.png"]
    assert "2 of 5 images" in page.text


def test_references_are_beside_their_image_and_a_damaged_one_leaves_it_out(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(scene(ord(name)), tmp_path / "images" / f"{name}.png", name)
        save(scene(ord(name) + 9), tmp_path / "sources" / f"{name}.png")
    data = (tmp_path / "sources" / "b.png").read_bytes()
    (tmp_path / "sources" / "b.png").write_bytes(data[: len(data) // 2])
    config = write_run(
        tmp_path,
        {
            "id": "pairs",
            "instance_data_dir": "images",
            "conditioning_data": "sources",
            "conditioning": {"type": "canny", "low_threshold": 100, "high_threshold": 200},
        },
        {
            "id": "sources",
            "dataset_type": "conditioning",
            "conditioning_type": "reference_strict",
            "instance_data_dir": "sources",
        },
        model_family="flux2",
        conditioning_multidataset_sampling="combined",
    )
    (looked,) = look(load_config(config, families=registry.specs()), registry.specs()["flux2"])
    (image,) = looked.images
    assert [each.title for each in image.measures.thumbnails] == ["image", "sources", "canny"]
    (damaged,) = looked.skipped
    assert damaged.path == "b.png"
    assert "its reference b.png" in damaged.reason


def test_a_copy_may_have_a_near_duplicate_too(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(scene(1), tmp_path / "images" / f"{name}.png", name)
    save(scene(1).point(lambda value: max(0, value - 10)), tmp_path / "images" / "c.png", "c")
    (looked,) = looked_at(write_run(tmp_path, {"id": "cats", "instance_data_dir": "images"}))
    kinds = [set(each.findings) for each in looked.images]
    assert kinds == [{"duplicate", "near"}, {"duplicate", "near"}, {"near"}]
    assert len({each.group for each in looked.images}) == 1


def test_each_caption_of_an_image_should_have_the_trigger(tmp_path: Path) -> None:
    save(scene(1), tmp_path / "images" / "a.png", "sks cat\na dog\nSKS, again")
    (looked,) = looked_at(write_run(tmp_path, {"id": "cats", "instance_data_dir": "images"}), "sks")
    (image,) = looked.images
    assert image.findings == {"trigger": '1 of its 3 captions and variants lacks "sks".'}


@pytest.mark.parametrize("strategy", ["json", "metadata"])
def test_captions_of_json_files_and_tables_are_shown(tmp_path: Path, strategy: str) -> None:
    save(scene(1), tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.json").write_text(json.dumps({"caption": f"json {JAPANESE}"}))
    row = {"file_name": "a.png", "text": f"metadata {JAPANESE}"}
    (tmp_path / "images" / "metadata.jsonl").write_text(json.dumps(row))
    config = write_run(tmp_path, {"id": "cats", "instance_data_dir": "images", "caption_strategy": strategy})
    assert run(config).exit_code == 0
    assert f"{strategy} {JAPANESE}" in Page((tmp_path / "data.html").read_text(encoding="utf-8")).text


def test_a_trigger_without_a_text_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--trigger"):
        run(folder / "config.json", "--overwrite", "--trigger", "sks", "--trigger", " ")


def test_a_trigger_that_is_given_stands_for_instance_prompt(folder: Path) -> None:
    cats, _ = looked_at(folder / "config.json", "猫")
    without = {each.planned.sample.path for each in cats.images if "trigger" in each.findings}
    assert "soft.png" not in without
    assert "first.png" in without


def test_one_file_in_two_datasets_is_no_duplicate(tmp_path: Path) -> None:
    save(scene(1), tmp_path / "images" / "a.png", "x")
    sizes = ({"id": f"at {size}", "instance_data_dir": "images", "resolution": size} for size in (64, 128))
    for looked in looked_at(write_run(tmp_path, *sizes)):
        assert [set(each.findings) for each in looked.images] == [set()]


def test_a_copy_names_the_other_file_in_both_datasets_and_never_itself(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(scene(1), tmp_path / "images" / f"{name}.png", name)
    sizes = ({"id": f"at {size}", "instance_data_dir": "images", "resolution": size} for size in (64, 128))
    for looked in looked_at(write_run(tmp_path, *sizes)):
        first, second = (each.findings["duplicate"] for each in looked.images)
        assert first == "Its bytes are those of b.png (at 64) and b.png (at 128)."
        assert second == "Its bytes are those of a.png (at 64) and a.png (at 128)."


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_finding_selects_its_images_in_a_browser(tmp_path: Path, html: str) -> None:
    probe = """{
const seen = [];
onerror = (message) => { seen.push(message); };
document.querySelector('a[data-kind="near"]').click();
const shown = [...document.querySelectorAll(".cards figure:not([hidden])")].map((each) => each.dataset.name);
const form = document.getElementById("filter");
form.elements.kind.value = "";
form.elements.order.value = "sharpness";
form.elements.order.dispatchEvent(new Event("change"));
const first = document.querySelector(".cards figure").dataset.name;
document.title = JSON.stringify({ seen, shown, first, wide: document.documentElement.scrollWidth });
}"""
    digest = base64.b64encode(hashlib.sha256(probe.encode()).digest()).decode()
    probed = html.replace("script-src", f"script-src 'sha256-{digest}'", 1)
    (tmp_path / "page.html").write_text(probed.replace("</body>", f"<script>{probe}</script></body>"))
    dumped = subprocess.run(
        [
            str(CHROMIUM),
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            *("--no-first-run", "--virtual-time-budget=3000", "--window-size=1000,800", "--dump-dom"),
            f"--user-data-dir={tmp_path / 'profile'}",
            (tmp_path / "page.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    title = dumped.partition("<title>")[2].partition("</title>")[0]
    found = json.loads(Page(f"<p>{title}</p>").text)
    assert found["seen"] == []
    assert sorted(found["shown"]) == ["large.png", "small.png"]
    assert found["first"] == "grey.png"
    assert found["wide"] <= 1000
