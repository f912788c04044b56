"""The place of tar archives in the dataset json."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from simpletuner.helpers.choices.image_sources import IMAGE_SOURCES, ImageSourceChoice
from simpletuner.helpers.configuration.schema.base import as_json
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.tar_places import expanded, split_place

if TYPE_CHECKING:
    from conftest import Workspace


@pytest.fixture
def shards(workspace: Workspace) -> Path:
    """A folder of archives beside the configuration; their content is read by the run."""
    folder = workspace.folder / "shards"
    folder.mkdir()
    for name in ("a-00.tar", "a-01.tar", "b.TAR"):
        (folder / name).touch()
    (folder / "folder.tar").mkdir()
    return folder


def loaded(workspace: Workspace, place: object, **keys: object) -> DatasetConfig:
    keys = {"id": "photos", "type": "webdataset", "instance_data_dir": place, **keys}
    workspace.datasets = [keys]
    (dataset,) = workspace.load().datasets
    return dataset


def test_a_folder_of_archives_holds_no_images_by_itself(workspace: Workspace, shards: Path) -> None:
    dataset = loaded(workspace, "shards")
    assert (dataset.source, dataset.instance_data_dir, dataset.folder) == ("webdataset", shards, shards)
    assert loaded(workspace, "shards/folder.tar").folder == shards / "folder.tar"
    assert split_place(shards / "folder.tar") == (str(shards / "folder.tar"), "")


@pytest.mark.parametrize("names", ["a-00.tar", "b.TAR", "a-{00..01}.tar", "{a,b}-*.tar", "missing.tar"])
def test_archives_are_named_by_a_pattern(workspace: Workspace, shards: Path, names: str) -> None:
    dataset = loaded(workspace, f"shards/{names}")
    assert dataset.instance_data_dir == f"{shards}/{names}"
    assert (dataset.source, dataset.folder) == ("webdataset", None)
    assert dataset.place == f"{shards}/{names}"
    assert split_place(f"{shards}/{names}") == (str(shards), names)
    assert DatasetConfig.model_validate(as_json(dataset)) == dataset


def test_archives_lie_in_the_working_directory_at_the_root_or_behind_backslashes(
    workspace: Workspace, shards: Path
) -> None:
    assert loaded(workspace, "x.tar").instance_data_dir == f"{workspace.folder}/x.tar"
    assert loaded(workspace, "shards\\a-00.tar").instance_data_dir == f"{shards}/a-00.tar"
    assert split_place(str(loaded(workspace, "/x.tar").instance_data_dir)) == ("/", "x.tar")


def test_archives_at_a_url_are_opened_by_its_scheme_and_stay_archives(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = ImageSourceChoice(name="memory", summary="", build="", schemes=("memory",))
    monkeypatch.setitem(IMAGE_SOURCES, "memory", memory)
    dataset = loaded(workspace, "memory://box/a-{0..2}.tar")
    assert (dataset.source, dataset.folder) == ("webdataset", None)
    assert split_place(str(dataset.instance_data_dir)) == ("memory://box", "a-{0..2}.tar")
    assert dataset.model_copy(update={"type": "local"}).source == "memory"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"instance_data_dir": "nowhere/a.tar"}, '"nowhere/a.tar": not found'),
        ({"instance_data_dir": "shards/a.tar.gz"}, "is compressed, .* give the .tar"),
        ({"instance_data_dir": "shards/a-{0..1}.tgz"}, "is compressed"),
        ({"instance_data_dir": "shards/{3..1}.tar"}, r"\{3\.\.1\}: write \{000\.\.012\}"),
        ({"instance_data_dir": "shards/{1}.tar"}, r"\{1\}: write"),
        ({"instance_data_dir": "shards/{0..9999999}.tar"}, "stands for 10,000,000 names"),
        ({"instance_data_dir": "shards/{0..9999}{0..9999}.tar"}, "stands for 100,000,000 names"),
        ({"instance_data_dir": "config.json"}, "is a file"),
        ({"instance_data_dir": "s3://box/{3..1}.tar"}, "s3"),
        (
            {"type": "local", "instance_data_dir": "shards/a-00.tar"},
            'is a tar archive. Set "type": "webdataset"',
        ),
        (
            {"type": "local", "instance_data_dir": "shards"},
            'holds 3 tar archives: "type": "webdataset" trains',
        ),
        ({"type": "webdatasets", "instance_data_dir": "shards"}, "webdataset"),
        ({"instance_data_dir": "shards", "cache_dir_vae": "shards/cache"}, "is inside instance_data_dir"),
    ],
)
def test_a_mistake_in_the_place_is_refused_with_what_to_do(
    workspace: Workspace, shards: Path, keys: dict[str, object], message: str
) -> None:
    entry = {"id": "photos", "type": "webdataset", **keys}
    text = workspace.dataset_problems(entry, number=2 if keys.get("type") == "webdatasets" else 1)
    assert re.search(message, text), text


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ("a.tar",)),
        ("a-{8..11}.tar", ("a-8.tar", "a-9.tar", "a-10.tar", "a-11.tar")),
        ("a-{008..011}.tar", ("a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar")),
        ("{8..010}.tar", ("008.tar", "009.tar", "010.tar")),
        ("{00..00}.tar", ("00.tar",)),
        ("{a,b}-{0..1}.tar", ("a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar")),
        ("{,b}*.tar", ("*.tar", "b*.tar")),
    ],
)
def test_braces_stand_for_names(pattern: str, names: tuple[str, ...]) -> None:
    assert expanded(pattern) == names
