"""Entries of the dataset json whose images or captions are rows, in SimpleTuner's files and here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from simpletuner.helpers.configuration.schema.base import as_json
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.row_keys import Range

if TYPE_CHECKING:
    from conftest import Json, Workspace

HUB: Json = {"id": "a", "type": "huggingface", "dataset_name": "owner/name"}


def loaded(workspace: Workspace, entry: Json) -> tuple[DatasetConfig, dict[str, tuple[str, str]]]:
    """The dataset, and (outcome, ours) of each decision."""
    workspace.datasets = [entry]
    run = workspace.load()
    (dataset,) = run.datasets
    decisions = {each.key.removeprefix("a."): (each.outcome, each.ours) for each in run.decisions}
    return dataset, decisions


def test_an_entry_of_the_hub_needs_its_name_alone(workspace: Workspace) -> None:
    dataset, decisions = loaded(workspace, HUB)
    assert (dataset.source, dataset.folder, dataset.place) == ("huggingface", None, "owner/name")
    assert dataset.needs_download
    assert dataset.needs_row_captions
    assert decisions == {}


def test_rows_do_not_inherit_a_source_of_captions_in_files(workspace: Workspace) -> None:
    workspace.config["caption_strategy"] = "textfile"
    dataset, _ = loaded(workspace, HUB)
    assert dataset.caption_strategy is None


def test_simpletuners_entry_of_the_hub_is_understood_key_by_key(workspace: Workspace) -> None:
    entry = HUB | {
        "metadata_backend": "huggingface",
        "caption_strategy": "huggingface",
        "split": "test",
        "revision": "main",
        "cache_dir": "cache/hub",
        "num_proc": 16,
        "max_num_samples": 5,
        "image_column": "Image",
        "huggingface": {
            "dataset_name": "owner/name",
            "image_column": "Image",
            "caption_column": ["short", "meta.long"],
            "fallback_caption_column": "tags",
            "file_extension": "jpg",
            "cache_dir": "x",
            "streaming": "true",
            "width_column": "w",
            "height_column": "h",
            "auto_load": True,
            "composite_image_config": {},
            "description_column": None,
            "filter_func": {
                "quality_thresholds": {"clip": 0.3},
                "quality_column": "q",
                "collection": ["photo"],
                "min_width": 512,
                "min_height": 256,
            },
        },
    }
    dataset, decisions = loaded(workspace, entry)
    assert (dataset.caption_strategy, dataset.split, dataset.revision) == ("table", "test", "main")
    assert (dataset.image_column, dataset.caption_column) == ("Image", ("short", "meta.long"))
    assert (dataset.fallback_caption_column, dataset.streaming) == ("tags", True)
    assert dataset.row_filter == {
        "q.clip": Range(min=0.3),
        "collection": ("photo",),
        "w": Range(min=512),
        "h": Range(min=256),
    }
    outcomes = {key: outcome for key, (outcome, _) in decisions.items()}
    unread = "cache_dir num_proc metadata_backend huggingface.file_extension huggingface.cache_dir "
    unread += "huggingface.width_column huggingface.height_column huggingface.auto_load "
    unread += "huggingface.composite_image_config"
    hoisted = "dataset_name image_column caption_column fallback_caption_column streaming"
    assert outcomes == {
        **dict.fromkeys(unread.split(), "no effect"),
        **{f"huggingface.{key}": "translated" for key in hoisted.split()},
        "filter_func": "translated",
    }


def test_simpletuners_csv_entry_is_a_table(workspace: Workspace) -> None:
    workspace.text("list.csv", "address,words\n")
    entry = {
        "id": "a",
        "type": "csv",
        "csv_file": "list.csv",
        "csv_url_column": "address",
        "csv_caption_column": "words",
        "csv_cache_dir": "cache/csv",
        "caption_strategy": "csv",
        "hash_filenames": True,
        "metadata_backend": "csv",
    }
    dataset, decisions = loaded(workspace, entry)
    assert (dataset.type, dataset.table_file) == ("table", workspace.folder / "list.csv")
    assert (dataset.image_column, dataset.caption_column) == ("address", ("words",))
    assert decisions["csv_file"] == ("translated", 'table_file: "list.csv"')
    assert {key for key, (outcome, _) in decisions.items() if outcome == "no effect"} == {
        "csv_cache_dir",
        "hash_filenames",
        "metadata_backend",
    }


@pytest.mark.parametrize("strategy", [{"caption_strategy": "parquet"}, {}], ids=["named", "left out"])
def test_captions_of_a_folder_come_from_a_table(workspace: Workspace, strategy: Json) -> None:
    workspace.text("captions.parquet", "")
    parquet = {
        "path": "captions.parquet",
        "filename_column": "id",
        "caption_column": "cogvlm_caption",
        "fallback_caption_column": "tags",
        "width_column": "width",
        "height_column": "height",
        "identifier_includes_extension": False,
    }
    entry = {"id": "a", "instance_data_dir": "images", "metadata_backend": "parquet", "parquet": parquet}
    dataset, decisions = loaded(workspace, entry | strategy)
    assert dataset.parquet is not None
    assert dataset.parquet.path == workspace.folder / "captions.parquet"
    assert (dataset.parquet.filename_column, dataset.parquet.caption_column) == ("id", ("cogvlm_caption",))
    ours = ("width_column", "height_column", "identifier_includes_extension")
    assert decisions.keys() == {"metadata_backend", *(f"parquet.{key}" for key in ours)}


def test_a_table_of_captions_that_are_not_asked_for_has_no_effect(workspace: Workspace) -> None:
    workspace.text("captions.parquet", "")
    entry = {"id": "a", "instance_data_dir": "images", "caption_strategy": "textfile"}
    dataset, decisions = loaded(workspace, entry | {"parquet": {"path": "captions.parquet"}})
    assert dataset.parquet is None
    assert decisions["parquet"][0] == "no effect"


@pytest.mark.parametrize(
    ("entry", "pattern"),
    [
        ({"type": "huggingface"}, "dataset_name  required, but missing"),
        ({"type": "csv"}, "table_file  required, but missing"),
        ({}, "instance_data_dir  required, but missing"),
        ({"type": "csv", "table_file": "data.json"}, r"table_file  .*must be one of \.csv, "),
        ({"type": "csv", "table_file": "none.csv"}, r'table_file  "none.csv": not found'),
        (HUB | {"dataset_name": "a/b/c"}, 'dataset_name  "a/b/c": must be owner/name'),
        (HUB | {"dataset_name": "./none"}, 'dataset_name  "./none": not found'),
        (HUB | {"dataset_name": "data.json"}, 'dataset_name  "data.json": is a file. .*table_file'),
        (HUB | {"caption_strategy": "textfile"}, "caption_strategy  .*no files lie beside rows"),
        (HUB | {"instance_data_dir": "images"}, 'instance_data_dir  "images": a dataset of the hub has none'),
        (HUB | {"streaming": True}, "max_num_samples  required by streaming"),
        (HUB | {"parquet": {"path": "a.csv"}}, "parquet  names captions of other images"),
        (HUB | {"row_filter": {"a": {"least": 1}}}, r"row_filter\.a\.limits\.least +unknown key"),
        (HUB | {"row_filter": 3}, "row_filter  3: must be an object"),
        (HUB | {"huggingface": "owner/name"}, 'huggingface  "owner/name": must be an object'),
        (HUB | {"huggingface": {"split": "a"}, "split": "b"}, r'huggingface\.split  "a", but split .*"b"'),
        (HUB | {"huggingface": {"image_colunm": "a"}}, r"huggingface\.image_colunm  unknown .*image_column"),
        (HUB | {"huggingface": {"description_column": "a"}}, r"huggingface\.description_column  known from"),
        (
            HUB | {"huggingface": {"composite_image_config": {"enabled": True}}},
            r"huggingface\.composite_image_config  known from .*images of their own",
        ),
        (HUB | {"filter_func": {"lambda": "x"}}, "filter_func  .*cannot be translated. Set row_filter"),
        ({"instance_data_dir": "images", "split": "train"}, 'split  "train": belongs to "type": "hugging'),
        ({"instance_data_dir": "images", "dataset_name": "a/b"}, 'dataset_name  "a/b": belongs to'),
        ({"instance_data_dir": "images", "parquet": {"pth": "a.csv"}}, r"parquet\.pth +unknown key.*path"),
    ],
    ids=str,
)
def test_what_is_wrong_with_an_entry_of_rows_is_named(
    workspace: Workspace, entry: Json, pattern: str
) -> None:
    workspace.text("a.csv", "")
    message = workspace.dataset_problems({"id": "a", **entry}, number=2 if "pth" in str(entry) else 1)
    assert re.search(pattern, message), message


@pytest.mark.parametrize(
    "keys", [{}, {"caption_column": "a, b"}, {"row_filter": {"a": [1, "x", True], "b": {"min": 2}}}]
)
def test_an_entry_of_rows_can_be_written_and_read_again(workspace: Workspace, keys: dict[str, Any]) -> None:
    (workspace.folder / "set").mkdir()
    for entry in (HUB, HUB | {"dataset_name": "set"}):
        dataset, _ = loaded(workspace, entry | keys)
        again, _ = loaded(workspace, json.loads(json.dumps(as_json(dataset))))
        assert again == dataset
    assert not dataset.needs_download


def test_masks_and_references_may_be_rows(workspace: Workspace) -> None:
    workspace.text("masks.csv", "path\n")
    masks = {"id": "m", "conditioning_type": "mask", "type": "csv", "csv_file": "masks.csv"}
    workspace.datasets = [HUB | {"conditioning_data": "m"}, masks]
    run = workspace.load()
    assert [each.table_file for each in run.conditioning] == [workspace.folder / "masks.csv"]


def test_the_entries_of_the_documentation_load(workspace: Workspace, repository: Path) -> None:
    workspace.text("photos.csv", "")
    workspace.text("captions.parquet", "")
    workspace.image_folder("photos")
    page = (repository / "documentation" / "tables-and-hub-datasets.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        (entry,) = json.loads(block)
        dataset, decisions = loaded(workspace, entry)
        assert dataset.id == entry["id"]
        assert decisions == {}


def test_paths_in_a_table_do_not_begin_at_a_url(workspace: Workspace) -> None:
    (workspace.folder / "list.csv").write_text("path,caption\na.png,a\n")
    entry: Json = {"id": "a", "type": "csv", "table_file": "list.csv", "instance_data_dir": "s3://bucket/a"}
    message = workspace.dataset_problems(entry)
    assert "a.instance_data_dir" in message
    assert "must be a folder on this machine" in message
