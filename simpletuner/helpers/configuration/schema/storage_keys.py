"""Keys of an entry whose images lie in remote storage, and the URL of their folder."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import BeforeValidator, SecretStr

from simpletuner.helpers.choices.image_sources import IMAGE_SOURCES
from simpletuner.helpers.configuration.schema.base import HIDDEN_SECRET, LateSection, OptionalText, none_word
from simpletuner.helpers.io.redaction import hide

S3 = "s3"
_TAKES_USERS = ("sftp", "ssh", "http", "https", "abfs", "abfss")
"""Schemes in which the part before an @ is a user, or a container."""


def source_of(url: str) -> str | None:
    """Name of the record in IMAGE_SOURCES that the scheme of a URL picks; None for an unknown scheme."""
    scheme = url.partition("://")[0].lower()
    return next((record.name for record in IMAGE_SOURCES.values() if scheme in record.schemes), None)


def folder_url(text: str) -> str:
    """The URL of a folder, without the slash at its end.

    Raises:
        ValueError: It is none; a query, which may be a secret, is shown nowhere.
    """
    scheme, _, rest = text.strip().partition("://")
    if source_of(text) is None:
        known = [each for record in IMAGE_SOURCES.values() for each in record.schemes]
        urls = f", or a URL of {', '.join(f'{each}://' for each in known)}" if known else ""
        raise ValueError(f"{scheme}:// is not supported. Give a folder on this machine{urls}.")
    path, mark, query = rest.partition("?")
    if mark or "#" in path:
        hide(query, HIDDEN_SECRET)
        raise ValueError("holds ? or #. Give the URL of a folder; credentials come from the environment.")
    try:
        parts = urlsplit(f"{scheme}://{rest}")
        host, user = parts.hostname, parts.username
    except ValueError:
        host, user = None, None
    if not host:
        raise ValueError(f"has no bucket or server. Write {scheme}://, its name and the folder.")
    if user is not None and scheme.lower() not in _TAKES_USERS:
        raise ValueError("holds credentials before @. Remove them: they come from the environment.")
    return f"{scheme.lower()}://{rest.rstrip('/')}"


def _secret(value: object) -> object:
    """A secret; none for the sign that stands for one in the files of a run."""
    return None if value == HIDDEN_SECRET else none_word(value)


OptionalSecret = Annotated[SecretStr | None, BeforeValidator(_secret)]


class StorageKeys(LateSection):
    """Keys of S3; other storage has its credentials from its usual files and variables."""

    aws_region_name: OptionalText = None
    """Region of the bucket of type s3. Default: AWS_DEFAULT_REGION, or the files of the aws command."""
    aws_endpoint_url: OptionalText = None
    """Address of a server that speaks S3's protocol. Default: AWS_ENDPOINT_URL, else Amazon's."""
    aws_access_key_id: OptionalSecret = None
    """Key of the bucket, better given as AWS_ACCESS_KEY_ID in the environment. It is *** in all files of a
    run."""
    aws_secret_access_key: OptionalSecret = None
    """Secret of the key, better given as AWS_SECRET_ACCESS_KEY in the environment. It is *** in all files of
    a run."""
