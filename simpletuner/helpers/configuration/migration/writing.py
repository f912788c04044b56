"""Writes a translated configuration, checks it, and says what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from simpletuner.helpers.configuration.finding import FILE
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.configuration.migration.draft import Draft
from simpletuner.helpers.configuration.migration.report import report
from simpletuner.helpers.configuration.schema.model_source import FILE_SUFFIX
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.io.atomic import write_json, write_text
from simpletuner.helpers.io.new_files import refuse_existing
from simpletuner.helpers.io.run_folder import LYCORIS_FILE

DATASETS_FILE = "multidatabackend.json"
PROMPTS_FILE = "prompts.json"
REPORT_FILE = "MIGRATION.md"


@dataclass(frozen=True, slots=True)
class Written:
    """The files of a migration."""

    config: Path
    files: tuple[Path, ...]
    """All of them, the report last."""
    to_do: tuple[str, ...]
    """What the user must still supply, a sentence each; empty if the configuration is valid."""
    is_valid: bool


def write_migration(
    draft: Draft, folder: Path, *, source: str, specs: Mapping[str, ModelSpec], overwrite: bool
) -> Written:
    """Write config.json, the dataset json, the lycoris json where needed, and MIGRATION.md.

    Args:
        draft: The translated configuration.
        folder: Gets the files.
        source: What it was translated from, for the page.
        specs: Name -> spec of every model family.
        overwrite: Replace files that exist.

    Raises:
        StorageError: A file exists, or cannot be written.
    """
    contents: dict[Path, dict[str, JsonValue] | list[dict[str, JsonValue]]] = {
        folder / DATASETS_FILE: draft.datasets
    }
    # The draft has the other program's defaults already.
    config: dict[str, JsonValue] = {"defaults": "ours", **draft.config}
    config["data_backend_config"] = (folder / DATASETS_FILE).as_posix()
    if draft.lycoris is not None:
        contents[folder / LYCORIS_FILE] = draft.lycoris
        config["lycoris_config"] = (folder / LYCORIS_FILE).as_posix()
    if draft.prompts:
        contents[folder / PROMPTS_FILE] = {**draft.prompts}
        config["user_prompt_library"] = (folder / PROMPTS_FILE).as_posix()
    files = (folder / FILE, *contents, folder / REPORT_FILE)
    refuse_existing(files, overwrite=overwrite)
    for path, content in contents.items():
        write_json(path, content)
    write_json(folder / FILE, config)
    problems = _problems(folder / FILE, specs)
    missing = [
        text for key, text in _missing_files(config).items() if not any(key in each for each in problems)
    ]
    to_do = (*draft.to_do, *missing, *problems)
    write_text(folder / REPORT_FILE, report(draft, source=source, files=files[:-1], to_do=to_do))
    return Written(config=folder / FILE, files=files, to_do=to_do, is_valid=not problems and not missing)


def _missing_files(config: Mapping[str, JsonValue]) -> dict[str, str]:
    """Key -> sentence on a checkpoint that is not here; the loader may take its path for a repository."""
    paths = ((key, str(value)) for key, value in config.items() if key.startswith("pretrained_"))
    missing = [(key, path) for key, path in paths if path.endswith(FILE_SUFFIX) and not Path(path).exists()]
    return {key: f"{key}: {path} is not here. Correct the path." for key, path in missing}


def _problems(config: Path, specs: Mapping[str, ModelSpec]) -> list[str]:
    try:
        load_config(config, families=specs)
    except ConfigError as error:
        lines = str(error).splitlines()
        return [" ".join(line.split()) for line in lines if line.startswith("  ")] or lines
    return []
