"""Keys of remote storage in an entry of the dataset json: SimpleTuner's aws_ keys become one URL."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import JsonValue

from simpletuner.helpers.choices.image_sources import IMAGE_SOURCES
from simpletuner.helpers.configuration.schema.base import HIDDEN_SECRET
from simpletuner.helpers.configuration.schema.storage_keys import S3, StorageKeys, source_of
from simpletuner.helpers.configuration.schema.values import is_off
from simpletuner.helpers.configuration.text.decisions import Decision, Outcome
from simpletuner.helpers.configuration.text.problems import shown
from simpletuner.helpers.io.redaction import PLACEHOLDER, hide, redacted

BUCKET, PREFIX, FOLDER, TYPE = "aws_bucket_name", "aws_data_prefix", "instance_data_dir", "type"
SECRETS = ("aws_access_key_id", "aws_secret_access_key")
_LOCAL = "local"
_OWN = frozenset({BUCKET, PREFIX, *StorageKeys.model_fields})
_IN_URL = f"The URL of {FOLDER} has bucket and folder."
_NOT_S3 = "The images are not in S3."
_NOWHERE = "unknown"
"""In the URL of an entry that is refused, so that its other keys are checked."""
_IN_ENVIRONMENT = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment: they are not copied."
_LOCAL_CACHE = "Prompt embeds and latents are cached in folders on this machine."


def hide_secrets(values: Mapping[str, JsonValue]) -> None:
    """Keep the secrets of an entry out of messages and logs; values of {env:VARIABLE} are hidden already."""
    for key in SECRETS:
        value = values.get(key)
        if isinstance(value, str) and value not in ("", HIDDEN_SECRET) and redacted(value) == value:
            hide(value, HIDDEN_SECRET)


def with_url(values: Mapping[str, JsonValue]) -> tuple[dict[str, JsonValue], list[Decision]]:
    """An entry of images whose `instance_data_dir` is a URL if they are in storage, and `type` its own.

    Decisions that are "not translated" are mistakes.
    """
    kept = {key: value for key, value in values.items() if key not in _OWN}
    given = {key: value for key, value in values.items() if key in _OWN and not is_off(value)}
    folder, kind = kept.get(FOLDER), IMAGE_SOURCES.named(values.get(TYPE, _LOCAL))
    if kind is None:  # an unknown value is refused with the others
        return {**kept, **{key: given[key] for key in StorageKeys.model_fields if key in given}}, []
    if kind.holds_archives or kind.holds_rows:  # a URL there picks its storage, whatever the type is
        text = f"belongs to {TYPE} s3. Give the place in {FOLDER}, s3://bucket/folder."
        problems = [
            Decision(key, given[key], "not translated", "", text) for key in (BUCKET, PREFIX) if key in given
        ]
        return {**kept, **{key: given[key] for key in StorageKeys.model_fields if key in given}}, problems
    decisions: list[Decision] = []
    url = folder if isinstance(folder, str) and "://" in folder else None
    if url is None and kind.name == S3:
        url, decisions = _bucket_url(given, folder)
        kept.pop(FOLDER, None)
    elif url is not None:
        name = source_of(url)
        if name is not None and kind.name not in (name, _LOCAL):
            text = f"{FOLDER} is a URL of {name}. Remove {TYPE}."
            decisions.append(Decision(TYPE, values[TYPE], "not translated", "", text))
        decisions += _without_effect(given, (BUCKET, PREFIX), _IN_URL)
        kept[TYPE] = name or _LOCAL
    elif kind.schemes:
        text = f"required with {TYPE} {kind.name}: the URL of a folder, {kind.schemes[0]}://."
        decisions.append(Decision(FOLDER, folder, "not translated", "", text))
        url = f"{kind.schemes[0]}://{_NOWHERE}"
    if url is not None:
        kept[FOLDER] = url
    if kept.get(TYPE) != S3 and kind.name != S3:
        return kept, [*decisions, *_without_effect(given, (*_OWN,), _NOT_S3)]
    return {
        **kept,
        TYPE: S3,
        **{key: given[key] for key in StorageKeys.model_fields if key in given},
    }, decisions


def without_secrets(values: Mapping[str, JsonValue]) -> tuple[dict[str, JsonValue], list[Decision]]:
    """An entry as it may be written to a file: the secrets in it are left out, {env:VARIABLE} stays."""
    hide_secrets(values)
    left_out = {
        key: values[key]
        for key in SECRETS
        if key in values and not is_off(values[key]) and not PLACEHOLDER.fullmatch(str(values[key]))
    }
    return (
        {key: value for key, value in values.items() if key not in left_out},
        [Decision(key, HIDDEN_SECRET, "not translated", "", _IN_ENVIRONMENT) for key in left_out],
    )


def without_storage(values: Mapping[str, JsonValue]) -> tuple[dict[str, JsonValue], list[Decision]]:
    """An entry of a cache without its storage: caches are local."""
    kind = values.get(TYPE)
    if IMAGE_SOURCES.named(kind) is not IMAGE_SOURCES[S3]:
        return dict(values), []
    own = {key: value for key, value in values.items() if key == TYPE or key.startswith("aws_")}
    return (
        {key: value for key, value in values.items() if key not in own},
        [Decision(key, value, "no effect", "", _LOCAL_CACHE) for key, value in own.items()],
    )


def _bucket_url(given: Mapping[str, JsonValue], folder: JsonValue) -> tuple[str, list[Decision]]:
    """The URL of a bucket and of the folder in it."""
    bucket, prefix = str(given.get(BUCKET, "")).strip(), str(given.get(PREFIX, "")).strip()
    decisions = []
    if not bucket:
        text = f"required with {TYPE} s3, or {FOLDER} with a URL, s3://bucket/folder."
        return f"s3://{_NOWHERE}", [Decision(BUCKET, None, "not translated", "", text)]
    if "/" in bucket:
        text = f"must be the name of a bucket. A folder in it is {PREFIX}."
        return f"s3://{_NOWHERE}", [Decision(BUCKET, bucket, "not translated", "", text)]
    if not is_off(folder):
        outcome: Outcome = "no effect" if prefix else "not translated"
        text = f"the folder in the bucket is {PREFIX}; this key has no effect."
        decisions.append(Decision(FOLDER, folder, outcome, "", text))
    url = f"s3://{bucket}/{prefix.strip('/')}".rstrip("/")
    decisions += [
        Decision(key, given[key], "translated", f"{FOLDER}: {shown(url)}", "")
        for key in (BUCKET, PREFIX)
        if key in given
    ]
    return url, decisions


def _without_effect(given: Mapping[str, JsonValue], keys: tuple[str, ...], text: str) -> list[Decision]:
    return [Decision(key, given[key], "no effect", "", text) for key in keys if key in given]
