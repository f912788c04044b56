"""Places of images, the values of `type` in the dataset json."""

from __future__ import annotations

from dataclasses import dataclass

from simpletuner.helpers.choices.registry import Choice, Registry


@dataclass(frozen=True, kw_only=True)
class ImageSourceChoice(Choice):
    """A kind of source; `build` names a function (entry of the dataset json) -> ImageSource."""

    schemes: tuple[str, ...] = ()
    """Schemes of URLs in instance_data_dir that pick it by themselves."""
    needs_folder: bool = False
    """Whether instance_data_dir is a folder on this machine, which must hold an image."""
    holds_archives: bool = False
    """Whether instance_data_dir names tar archives, in a folder or at a URL that another record opens."""
    holds_rows: bool = False
    """Whether its images are rows of a table, which may hold their captions too."""


_SOURCES = "simpletuner.helpers.data.sources"

IMAGE_SOURCES = Registry(
    ImageSourceChoice(
        name="local",
        summary="A folder on this machine.",
        build=f"{_SOURCES}.local:local_folder",
        needs_folder=True,
    ),
    ImageSourceChoice(
        name="webdataset",
        summary="Tar archives.",
        build=f"{_SOURCES}.tar:tar_archives",
        holds_archives=True,
    ),
    ImageSourceChoice(
        name="table",
        summary="The rows of a csv, jsonl or parquet file: paths, URLs or bytes of images.",
        aliases=("csv", "tsv", "jsonl", "parquet"),
        build=f"{_SOURCES}.rows:table_rows",
        holds_rows=True,
    ),
    ImageSourceChoice(
        name="huggingface",
        summary="A split of a dataset of the Hugging Face hub, or of such a dataset on this machine.",
        build=f"{_SOURCES}.hub:hub_rows",
        package="datasets",
        extra="datasets",
        holds_rows=True,
    ),
    ImageSourceChoice(
        name="s3",
        summary="A bucket of S3 or of a server with its protocol: s3://bucket/folder, or the aws_ keys.",
        aliases=("aws",),
        build=f"{_SOURCES}.remote:remote_folder",
        package="s3fs",
        extra="s3",
        schemes=("s3", "s3a"),
    ),
    ImageSourceChoice(
        name="gcs",
        summary="A bucket of Google Cloud Storage: gs://bucket/folder.",
        build=f"{_SOURCES}.remote:remote_folder",
        package="gcsfs",
        extra="gcs",
        schemes=("gs", "gcs"),
    ),
    ImageSourceChoice(
        name="azure",
        summary="A container of Azure Blob Storage: az://container/folder.",
        build=f"{_SOURCES}.remote:remote_folder",
        package="adlfs",
        extra="azure",
        schemes=("az", "abfs", "abfss"),
    ),
    ImageSourceChoice(
        name="sftp",
        summary="A folder of a server that is reached by ssh: sftp://server/folder.",
        build=f"{_SOURCES}.remote:remote_folder",
        package="sshfs",
        extra="sftp",
        schemes=("sftp", "ssh"),
    ),
    ImageSourceChoice(
        name="http",
        summary="A folder of a web server with index pages: https://server/folder.",
        build=f"{_SOURCES}.remote:remote_folder",
        package="aiohttp",
        extra="http",
        schemes=("http", "https"),
    ),
)
