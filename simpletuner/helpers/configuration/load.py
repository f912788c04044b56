"""Config.json, the lycoris json, the dataset json and the command line into one checked RunConfig."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from pydantic import JsonValue

from simpletuner.helpers.configuration.loading import rules
from simpletuner.helpers.configuration.loading.building import Source, Validated, build
from simpletuner.helpers.configuration.loading.dataset_file import DatasetFile, read_datasets
from simpletuner.helpers.configuration.loading.layers import (
    Keys,
    RawValue,
    from_command_line,
    from_file,
    merge,
)
from simpletuner.helpers.configuration.loading.lycoris_file import read_lycoris
from simpletuner.helpers.configuration.loading.prompts import prompts_of, read_library
from simpletuner.helpers.configuration.schema.base import PathContext, Section
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig
from simpletuner.helpers.configuration.schema.model_sections import ModelConfig, NoiseConfig, PrecisionConfig
from simpletuner.helpers.configuration.schema.sections import (
    AdapterConfig,
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    RunConfig,
    TrackingConfig,
    TrainingConfig,
    ValidationConfig,
    ValidationPrompt,
)
from simpletuner.helpers.configuration.text.placeholders import Environment
from simpletuner.helpers.configuration.text.problems import Problems
from simpletuner.helpers.configuration.text.reading import read_json
from simpletuner.helpers.contracts import ModelSpec

SECTIONS: tuple[type[Section], ...] = (
    ModelConfig,
    AdapterConfig,
    TrainingConfig,
    OptimizerConfig,
    NoiseConfig,
    PrecisionConfig,
    DataConfig,
    CheckpointConfig,
    TrackingConfig,
    ValidationConfig,
)
COMPUTED_KEYS = frozenset({"prompts"})
KEYS = Keys(
    {key: section for section in SECTIONS for key in section.model_fields if key not in COMPUTED_KEYS}
)
_PLACEHOLDERS = {"model_family": "?", "pretrained_model_name_or_path": "unknown/unknown"}

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class _Files:
    """Reads the files that config.json names."""

    main: str
    """Config.json as it is named in messages."""
    given: Mapping[str, RawValue]
    source: Source
    environment: Environment
    chain: tuple[Path, ...]
    """The config.json whose validation_compared_config led here, one after another, and this one."""
    load_other: Callable[[Path], RunConfig | None]

    def document(self, key: str, path: Path | None) -> tuple[JsonValue, JsonValue, Source] | None:
        """(value, value as written, source) of the file that a key names, or of the value in its stead."""
        given = self.given.get(key)
        if given is not None and isinstance(given.value, dict | list):
            source = replace(self.source, name_of=lambda _: f"{given.source}, {key}")
            return given.value, given.written, source
        if path is None:
            return None
        name = display(path)
        written = read_json(path, source=name, problems=self.source.problems)
        if written is None:
            return None
        value = self.environment.filled(written, source=name, key="")
        return value, written, replace(self.source, name_of=lambda _: name)


def load_config(path: Path, *, overrides: Sequence[str] = (), families: Mapping[str, ModelSpec]) -> RunConfig:
    """Read and check everything that a run is told, without importing torch.

    Args:
        path: The config.json.
        overrides: Arguments of the command line: key=value, --key=value, --key value, or --key for true.
        families: Name -> facts of every model family.

    Raises:
        ConfigError: Something is wrong; the message lists every problem of every file.
    """
    problems = Problems()
    run = _loaded(path, overrides, families, leading=(), problems=problems)
    problems.raise_if_any()
    assert run is not None, "a run that cannot be assembled has a problem"
    return run


def _loaded(
    path: Path,
    overrides: Sequence[str],
    families: Mapping[str, ModelSpec],
    *,
    leading: tuple[Path, ...],
    problems: Problems,
) -> RunConfig | None:
    """The run of a config.json, its problems noted; None if they are too many to say what it is.

    `leading` are the config.json that name one another, the last of them this one.
    """
    environment = Environment(os.environ, problems)
    main = display(path)
    values = read_json(path, source=main, problems=problems)
    if values is not None and not isinstance(values, dict):
        problems.add(main, "", "must hold an object, {...}.")
    if not isinstance(values, dict):
        return None
    given = merge(
        from_file(values, KEYS, source=main, problems=problems, environment=environment),
        from_command_line(overrides, KEYS, problems=problems, environment=environment),
        keys=KEYS,
    )
    context = PathContext(config_folder=Path(os.path.abspath(path)).parent)
    source = Source(problems, lambda key: given[key].source if key in given else main, context)
    chain = (*leading, path)

    def load_other(other: Path) -> RunConfig | None:
        return _loaded(other, (), families, leading=chain, problems=problems)

    run = _assembled(path, _Files(main, given, source, environment, chain, load_other), families)
    if run is not None:
        rules.check_comparison(run, source)
    return run


def _assembled(path: Path, files: _Files, families: Mapping[str, ModelSpec]) -> RunConfig | None:
    given, source = files.given, files.source
    spec = rules.family_of(given, families, source)
    values: dict[str, object] = {key: each.value for key, each in given.items()}
    for key in ("lycoris_config", "data_backend_config"):
        if isinstance(values.get(key), dict | list):
            del values[key]
    values = (_PLACEHOLDERS if spec is None else rules.family_defaults(given, spec)) | values
    names = {"model_family": str(values.get("model_family", ""))}
    make = _maker(values, replace(source, context=replace(source.context, names=names)))
    checkpoint = make(CheckpointConfig)
    if checkpoint.section is not None:
        names["output_dir"] = str(checkpoint.section.output_dir)
    model, adapter, data = make(ModelConfig), make(AdapterConfig), make(DataConfig)
    training, optimizer, noise = make(TrainingConfig), make(OptimizerConfig), make(NoiseConfig)
    precision, tracking, validation = make(PrecisionConfig), make(TrackingConfig), make(ValidationConfig)

    files = replace(files, source=replace(source, context=replace(source.context, names=names)))
    lycoris = _lycoris(adapter, files)
    dataset_file = _datasets(data, files)
    prompts = _prompts(validation, files)
    if spec is not None:
        if model.section is not None:
            rules.check_model(model.section, spec, source)
        about_models = (model, adapter, training, noise, validation)
        rules.check_family(about_models, spec, families=families, source=source)
        rules.check_lora_preset(given, adapter, spec=spec, source=source)
        rules.check_format(adapter, lycoris, spec=spec, source=source)
        rules.check_precision(precision, adapter, lycoris, spec=spec, source=source)
        rules.check_offload(precision, training, validation, spec=spec, source=source)
        rules.check_alignment(data, spec, source)
        rules.check_validation(validation, spec, source)
    folders = {dataset.id: str(dataset.instance_data_dir) for dataset in dataset_file.datasets}
    rules.check_output(checkpoint, folders, source)
    compared_with = _compared_with(validation, files)
    if len(source.problems) or spec is None or data.section is None or validation.section is None:
        return None
    sizes = validation.section.validation_resolution or (rules.training_size(data.section, spec),)
    text_cache = {"cache_dir_text": dataset_file.cache_dir_text} if dataset_file.cache_dir_text else {}
    return RunConfig.model_validate(
        {
            "source": Path(os.path.abspath(path)),
            "model": model.section,
            "adapter": adapter.section,
            "lycoris": lycoris,
            "training": training.section,
            "optimizer": optimizer.section,
            "noise": noise.section,
            "precision": precision.section,
            "data": data.section.model_copy(update=text_cache),
            "datasets": dataset_file.datasets,
            "checkpoint": checkpoint.section,
            "tracking": tracking.section,
            "validation": validation.section.model_copy(
                update={"validation_resolution": sizes, "prompts": prompts}
            ),
            "compared_with": compared_with,
            "hidden": files.environment.used,
        }
    )


def _maker(values: Mapping[str, object], source: Source) -> Callable[[type[S]], Validated[S]]:
    def make(section: type[S]) -> Validated[S]:
        own = {key: values[key] for key in section.model_fields if key in values and key not in COMPUTED_KEYS}
        placeholders = {key: value for key, value in _PLACEHOLDERS.items() if key in section.model_fields}
        return build(section, own, source, placeholders=placeholders)

    return make


def _lycoris(adapter: Validated[AdapterConfig], files: _Files) -> LycorisConfig | None:
    """The adapter that the lycoris json describes; its file is checked too when lora_type cannot be read."""
    section = adapter.section
    if section is None or (section.lora_type == "standard" and "lora_type" not in adapter.invalid_keys):
        if section is not None and section.lycoris_config is not None and "lora_type" not in files.given:
            files.source.add("lora_type", "lycoris_config has no effect without it. Set it to lycoris.")
        return None
    document = files.document("lycoris_config", section.lycoris_config)
    if document is None:
        if "lycoris_config" not in files.given:
            files.source.add(
                "lycoris_config", "required by lora_type lycoris. Give the path of the lycoris json."
            )
        return None
    value, written, source = document
    return read_lycoris(value, source, raw=written)


def _datasets(data: Validated[DataConfig], files: _Files) -> DatasetFile:
    path = data.section.data_backend_config if data.section is not None else None
    document = files.document("data_backend_config", path)
    if document is None:
        if "data_backend_config" not in files.given:
            files.source.add(
                "data_backend_config", "required, but missing. Give the path of the dataset json."
            )
        return DatasetFile((), None)
    value, _, source = document
    return read_datasets(value, source, data=data)


def _prompts(validation: Validated[ValidationConfig], files: _Files) -> tuple[ValidationPrompt, ...]:
    section = validation.section
    if section is None:
        return ()
    document = files.document("user_prompt_library", section.user_prompt_library)
    user = read_library(document[0], document[2]) if document is not None else ()
    return prompts_of(section.validation_prompt, with_library=section.validation_prompt_library, user=user)


def _compared_with(validation: Validated[ValidationConfig], files: _Files) -> RunConfig | None:
    """The other run whose adapter is shown beside this one's; its problems are noted with this run's."""
    section = validation.if_valid("validation_compared_config")
    path = section.validation_compared_config if section is not None else None
    if path is None:
        return None
    here = [os.path.realpath(each) for each in files.chain]
    if os.path.realpath(path) not in here:
        return files.load_other(path)
    circle = " -> ".join(display(each) for each in (*files.chain[here.index(os.path.realpath(path)) :], path))
    advice = "Name the config.json of another run, or leave the key out."
    files.source.add("validation_compared_config", f"{circle}: a run is not compared with itself. {advice}")
    return None


def display(path: Path) -> str:
    """A path as messages name it: from the working directory where it lies below it."""
    absolute, here = Path(os.path.abspath(path)), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(path)
