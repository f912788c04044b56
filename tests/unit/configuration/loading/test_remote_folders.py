"""Entries of the dataset json whose images are in remote storage."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.simpletuner_run import translate_run
from simpletuner.helpers.data.phases import even
from simpletuner.helpers.training.plan import warnings_of
from tests.unit.configuration.conftest import SPEC

if TYPE_CHECKING:
    from conftest import Workspace

SECRET = "xyz-sdajkhfhakhfjd"
# The form of SimpleTuner's documentation.
THEIRS = {
    "id": "photos",
    "type": "aws",
    "aws_bucket_name": "something-yummy",
    "aws_region_name": None,
    "aws_endpoint_url": "https://foo.bar/",
    "aws_access_key_id": "wpz-764e9734523434",
    "aws_secret_access_key": SECRET,
    "aws_data_prefix": "",
    "aws_max_pool_connections": 128,
    "cache_dir_vae": "s3prefix/for/vaecache",
}


def loaded(workspace: Workspace, entry: dict[str, object]) -> DatasetConfig:
    workspace.datasets = [entry]
    (dataset,) = workspace.load().datasets
    return dataset


def test_simpletuners_keys_of_s3_become_a_url_and_their_credentials_are_used(workspace: Workspace) -> None:
    dataset = loaded(workspace, THEIRS)
    assert (dataset.type, dataset.source) == ("s3", "s3")
    assert dataset.instance_data_dir == dataset.place == "s3://something-yummy"
    assert dataset.folder is None
    assert dataset.aws_endpoint_url == "https://foo.bar/"
    assert dataset.aws_access_key_id is not None
    assert dataset.aws_access_key_id.get_secret_value() == THEIRS["aws_access_key_id"]
    assert dataset.aws_secret_access_key is not None
    assert dataset.aws_secret_access_key.get_secret_value() == SECRET
    assert dataset.cache_dir_vae == workspace.folder / "s3prefix/for/vaecache"
    assert loaded(workspace, THEIRS | {"aws_data_prefix": "/cats/"}).place == "s3://something-yummy/cats"


def test_what_became_of_the_keys_is_said(workspace: Workspace) -> None:
    workspace.datasets = [THEIRS | {"aws_data_prefix": "cats", "instance_data_dir": "ignored"}]
    found = {each.key: (each.outcome, each.ours) for each in workspace.load().decisions}
    url = 'instance_data_dir: "s3://something-yummy/cats"'
    assert found["photos.aws_bucket_name"] == found["photos.aws_data_prefix"] == ("translated", url)
    assert found["photos.instance_data_dir"] == ("no effect", "")


def test_secrets_are_in_no_file_message_or_representation(workspace: Workspace) -> None:
    dataset = loaded(workspace, THEIRS)
    config = workspace.load()
    texts = [repr(dataset), str(dataset), repr(config), json.dumps(config.filled())]
    texts += [json.dumps(config.resolved()), repr(config.decisions)]
    texts += [
        workspace.dataset_problems(
            THEIRS | {"crop": SECRET, "repeats": THEIRS["aws_access_key_id"]}, number=2
        )
    ]
    assert not [text for text in texts[:-2] if SECRET in text]
    assert SECRET not in texts[-1]
    assert str(THEIRS["aws_access_key_id"]) not in texts[-1]
    (resolved,) = config.resolved()["data_backend_config"]  # type: ignore[misc, union-attr]
    assert resolved["aws_secret_access_key"] == "***"  # type: ignore[index, call-overload]


def test_a_resolved_configuration_is_read_again_without_its_secrets(workspace: Workspace) -> None:
    workspace.datasets = [THEIRS]
    config = workspace.load()
    path = workspace.text("again.json", json.dumps(config.resolved()))
    again = workspace.load_as_written(path=path)
    assert again.datasets[0].aws_secret_access_key is None
    assert again.datasets[0].instance_data_dir == config.datasets[0].instance_data_dir


@pytest.mark.parametrize("value", ["another-secret-of-storage", "x"], ids=["long", "short"])
def test_one_warning_names_the_variables_unless_the_secret_is_one(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    workspace.datasets = [THEIRS, THEIRS | {"id": "others"}]
    (text,) = [each for each in warnings_of(workspace.load(), SPEC, calendar=even(1)) if "aws_" in each]
    assert "photos, others" in text
    assert "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in text
    monkeypatch.setenv("TOY_STORAGE", value)
    workspace.datasets = [THEIRS | {"aws_secret_access_key": "{env:TOY_STORAGE}"}]
    config = workspace.load()
    secret = config.datasets[0].aws_secret_access_key
    assert secret is not None
    assert secret.get_secret_value() == value
    assert not [each for each in warnings_of(config, SPEC, calendar=even(1)) if "aws_" in each]
    assert "{env:TOY_STORAGE}" in json.dumps(config.resolved())


@pytest.mark.parametrize(
    ("url", "source", "place"),
    [
        ("s3://bucket/a b/", "s3", "s3://bucket/a b"),
        ("S3://bucket", "s3", "s3://bucket"),
        ("gs://bucket/x", "gcs", "gs://bucket/x"),
        ("az://container/x", "azure", "az://container/x"),
        ("abfss://container@account/x", "azure", "abfss://***@account/x"),
        ("sftp://me:password@host:2222/x", "sftp", "sftp://***@host:2222/x"),
        ("https://host/{id}", "http", "https://host/photos"),
    ],
    ids=["s3", "S3", "gs", "az", "abfss", "sftp", "https"],
)
def test_a_url_picks_its_storage_and_is_shown_without_credentials(
    workspace: Workspace, url: str, source: str, place: str
) -> None:
    dataset = loaded(workspace, {"id": "photos", "type": "local", "instance_data_dir": url})
    assert (dataset.source, dataset.type, dataset.place) == (source, source, place)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"instance_data_dir": "s3://bucket/x?secret=abcdef"}, r'"s3://bucket/x\?\*\*\*": holds \? or #'),
        ({"instance_data_dir": "s3://key:secret-part@bucket"}, r"\*\*\*@bucket.*holds credentials before @"),
        ({"instance_data_dir": "https:///x"}, "has no bucket or server"),
        ({"instance_data_dir": "gs://bucket", "type": "aws"}, "photos.type .*is a URL of gcs. Remove type"),
        ({"type": "aws"}, "photos.aws_bucket_name .*required with type s3"),
        ({"type": "sftp"}, r"photos.instance_data_dir .*required with type sftp: .*sftp://"),
        (
            {"type": "aws", "aws_bucket_name": "s3://b"},
            "photos.aws_bucket_name .*must be the name of a bucket",
        ),
        (
            {"type": "aws", "aws_bucket_name": "b", "instance_data_dir": "cats"},
            "photos.instance_data_dir .*the folder in the bucket is aws_data_prefix",
        ),
        ({"instance_data_dir": "s3://bucket/{nonsense}"}, "{nonsense} is unknown here"),
    ],
    ids=range(9),
)
def test_a_mistake_in_an_entry_of_storage_is_one_problem(
    workspace: Workspace, changes: dict[str, object], pattern: str
) -> None:
    message = workspace.dataset_problems({"id": "photos"} | changes)
    assert re.search(pattern, message), message
    assert "secret-part" not in message
    assert "abcdef" not in message


def test_keys_of_s3_have_no_effect_on_other_images(workspace: Workspace) -> None:
    workspace.datasets = [THEIRS | {"type": "local", "instance_data_dir": "images"}]
    config = workspace.load()
    found = {each.key for each in config.decisions if each.outcome == "no effect"}
    assert {"photos.aws_bucket_name", "photos.aws_endpoint_url", "photos.aws_secret_access_key"} <= found
    assert config.datasets[0].aws_secret_access_key is None


def test_masks_and_references_may_be_in_storage(workspace: Workspace) -> None:
    masks = THEIRS | {"id": "masks", "conditioning_type": "mask", "aws_data_prefix": "masks"}
    del masks["cache_dir_vae"]
    workspace.datasets = [
        {"id": "photos", "instance_data_dir": "images", "conditioning_data": "masks"},
        masks,
    ]
    (entry,) = workspace.load().conditioning
    assert entry.place == "s3://something-yummy/masks"
    assert entry.aws_secret_access_key is not None


def test_a_migrated_file_has_the_url_and_no_secret(workspace: Workspace) -> None:
    workspace.datasets = [THEIRS | {"aws_data_prefix": "cats"}]
    run = translate_run(workspace.write(), families=workspace.families)
    (entry,) = run.datasets
    assert entry["instance_data_dir"] == "s3://something-yummy/cats"
    assert "aws_bucket_name" not in entry
    assert SECRET not in json.dumps(run.datasets)
    secrets = {each.key for each in run.decisions if each.outcome == "not translated"}
    assert secrets == {"photos.aws_access_key_id", "photos.aws_secret_access_key"}
    assert SECRET not in repr(run.decisions)


def test_the_examples_of_the_documentation_are_valid(
    workspace: Workspace, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUCKET_KEY", "key-of-an-example")
    monkeypatch.setenv("BUCKET_SECRET", "secret-of-an-example")
    page = (repository / "documentation" / "remote-data.md").read_text(encoding="utf-8")
    examples = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    assert len(examples) == 2
    for text in examples:
        workspace.datasets = json.loads(text)
        assert all(each.folder is None for each in workspace.load().datasets)


def test_a_bucket_of_tar_archives_is_given_as_a_url(workspace: Workspace) -> None:
    entry = {"id": "a", "type": "webdataset", "instance_data_dir": "images", "aws_bucket_name": "b"}
    workspace.datasets = [entry]
    assert (
        "a.aws_bucket_name  belongs to type s3. Give the place in instance_data_dir" in workspace.problems()
    )
