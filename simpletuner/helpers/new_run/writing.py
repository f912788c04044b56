"""The files of a new configuration, put in place once they pass what `validate` checks."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.helpers.configuration.finding import FILE
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.configuration.migration.writing import DATASETS_FILE, PROMPTS_FILE
from simpletuner.helpers.configuration.schema.sections import RunConfig
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.estimating.estimate import Estimate, estimate
from simpletuner.helpers.io.atomic import new_folder, write_json, write_text
from simpletuner.helpers.new_run.answers import Answers
from simpletuner.helpers.new_run.texts import Texts
from simpletuner.helpers.training.plan import WARNING, plan_lines

ADAPTER_SETTINGS_FILE = "lycoris_tlora.json"
PAGE_FILE = "README.md"
PARTS = 4
"""Checkpoints, and times that validation images are made, in a run."""


@dataclass(frozen=True, slots=True)
class Written:
    """A new configuration."""

    page: Path
    warnings: tuple[str, ...]
    """What `validate` warns of."""
    estimate: Estimate | None
    """None for a family without an estimate."""


def write_configuration(answers: Answers, texts: Texts, *, specs: Mapping[str, ModelSpec]) -> Written:
    """Write the folder of a configuration, or nothing if it would not be valid.

    Raises:
        ConfigError: The configuration would not be valid.
        DataError: A run could not use the images.
        StorageError: The folder cannot be written.
    """
    with new_folder(answers.folder) as folder:
        for name, content in settings_of(answers).items():
            write_json(folder / name, content)
        write_text(folder / PAGE_FILE, page(answers, texts))
        run, warnings = _checked(folder, answers.folder, specs)
    return Written(answers.folder / PAGE_FILE, warnings, estimate(run))


def settings_of(answers: Answers) -> dict[str, Any]:
    """File name -> content, of the four files that a run reads."""
    preset, steps = answers.preset, answers.steps
    run = {
        "output_dir": answers.output.as_posix(),
        "max_train_steps": steps,
        "checkpoint_step_interval": steps // PARTS,
        "validation_step_interval": steps // PARTS,
    }
    dataset = {
        "id": answers.name,
        "type": "local",
        "dataset_type": "image",
        "instance_data_dir": answers.images.folder.as_posix(),
        "instance_prompt": answers.caption,
    }
    return {
        FILE: answers.model.settings(answers.purpose, answers.card) | run,
        ADAPTER_SETTINGS_FILE: dict(preset.lycoris),
        DATASETS_FILE: [dataset],
        PROMPTS_FILE: {name: text.format(trigger=answers.trigger) for name, text in preset.prompts.items()},
    }


def start_command(name: str) -> str:
    """The command that starts the run: train.sh where it is, else the installed program's.

    A name of a configuration has no character that a shell reads.
    """
    program = "./train.sh" if Path("train.sh").is_file() else "simpletuner train"
    return f"{program} {name}"


def page(answers: Answers, texts: Texts) -> str:
    """README.md of the configuration."""
    preset = answers.preset
    first = next(iter(preset.prompts.values())).format(trigger=answers.trigger)
    return texts.readme(
        name=answers.name,
        images=_cell(str(answers.images.folder)),
        purpose=answers.purpose,
        trigger=_cell(answers.trigger),
        model=f"{answers.model.title} (`{answers.model.name}`)",
        memory=f"{answers.memory:g}",
        time=answers.time,
        command=start_command(answers.name),
        steps=2 * answers.steps,
        output=answers.output.as_posix(),
        prompt=shlex.quote(first),
        size="{0}x{0}".format(answers.model.settings(answers.purpose, answers.card)["resolution"]),
        evidence="\n".join(f"- {texts.evidence(key)}" for key in preset.evidence),
    )


def _cell(text: str) -> str:
    """A text as one cell of a Markdown table."""
    return f"`{text}`".replace("|", "\\|")


def _checked(folder: Path, final: Path, specs: Mapping[str, ModelSpec]) -> tuple[RunConfig, tuple[str, ...]]:
    try:
        run = load_config(folder / FILE, families=specs)
    except ConfigError as error:
        raise ConfigError(str(error).replace(str(folder), str(final))) from error
    lines: Iterable[str] = plan_lines(run, specs[run.model.model_family])
    return run, tuple(line.removeprefix(WARNING) for line in lines if line.startswith(WARNING))
