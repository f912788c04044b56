"""config.json, the lycoris json, the dataset json and the command line into one checked RunConfig."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import JsonValue

from simpletuner.helpers.choices.optimizers import OPTIMIZERS
from simpletuner.helpers.choices.precisions import UNCHANGED
from simpletuner.helpers.configuration.finding import FILE, OTHER_FORMS
from simpletuner.helpers.configuration.loading import rules
from simpletuner.helpers.configuration.loading.building import Source, Validated, build
from simpletuner.helpers.configuration.loading.compile_rules import check_compiling
from simpletuner.helpers.configuration.loading.config_forms import read_config
from simpletuner.helpers.configuration.loading.dataset_file import (
    SWITCHES,
    DatasetFile,
    TextCacheEntry,
    read_datasets,
)
from simpletuner.helpers.configuration.loading.dataset_times import check_times
from simpletuner.helpers.configuration.loading.defaults import (
    CHOICE,
    THEIRS,
    differences,
    their_defaults,
    their_flavour,
    their_optimizers,
)
from simpletuner.helpers.configuration.loading.layers import Keys, RawValue, merge_layers
from simpletuner.helpers.configuration.loading.lycoris_file import complete_lycoris, read_lycoris
from simpletuner.helpers.configuration.loading.new_token_rules import check_embedding, check_new_tokens
from simpletuner.helpers.configuration.loading.prompts import (
    at_both_ends,
    check_images,
    merge_prompts,
    read_library,
)
from simpletuner.helpers.configuration.loading.relations import Context
from simpletuner.helpers.configuration.loading.text_encoder_rules import check_text_encoders
from simpletuner.helpers.configuration.loading.webhook_file import hide_address, read_webhooks
from simpletuner.helpers.configuration.loading.whole_model import check_whole_model
from simpletuner.helpers.configuration.schema.adapter import AdapterConfig
from simpletuner.helpers.configuration.schema.base import PathContext, Section, holds_text
from simpletuner.helpers.configuration.schema.compiling import CompileConfig
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig, slider_strengths
from simpletuner.helpers.configuration.schema.ema import EmaConfig
from simpletuner.helpers.configuration.schema.evaluation import EvaluationConfig
from simpletuner.helpers.configuration.schema.lycoris import (
    LayerArguments,
    LycorisConfig,
    TargetPreset,
    algorithm_arguments,
    layer_aliases,
)
from simpletuner.helpers.configuration.schema.masks import ConditioningConfig, MaskConfig
from simpletuner.helpers.configuration.schema.model import WITHOUT_ADAPTER, ModelConfig
from simpletuner.helpers.configuration.schema.new_tokens import NewTokenConfig
from simpletuner.helpers.configuration.schema.noise import NoiseConfig
from simpletuner.helpers.configuration.schema.publishing import PublishingConfig
from simpletuner.helpers.configuration.schema.references import ReferenceConfig
from simpletuner.helpers.configuration.schema.regularisation import RegularisationConfig
from simpletuner.helpers.configuration.schema.sections import (
    CheckpointConfig,
    DataConfig,
    FileConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
    TrainingConfig,
    ValidationConfig,
    ValidationPrompt,
)
from simpletuner.helpers.configuration.schema.text_encoders import TextEncoderConfig
from simpletuner.helpers.configuration.schema.tracking import TrackingConfig, WebhookConfig
from simpletuner.helpers.configuration.schema.values import DifferingDefault, optimizer_arguments
from simpletuner.helpers.configuration.schema.whole_model import WholeModelConfig
from simpletuner.helpers.configuration.text.decisions import Decision
from simpletuner.helpers.configuration.text.placeholders import Environment
from simpletuner.helpers.configuration.text.problems import Problems, shown
from simpletuner.helpers.configuration.text.reading import read_json
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.io.run_folder import CONFIG_FILE

SECTIONS: tuple[type[Section], ...] = (
    FileConfig,
    ModelConfig,
    AdapterConfig,
    TextEncoderConfig,
    NewTokenConfig,
    TrainingConfig,
    RegularisationConfig,
    OptimizerConfig,
    EmaConfig,
    NoiseConfig,
    MaskConfig,
    WholeModelConfig,
    PrecisionConfig,
    CompileConfig,
    DataConfig,
    CheckpointConfig,
    TrackingConfig,
    PublishingConfig,
    ValidationConfig,
    EvaluationConfig,
)
COMPUTED_KEYS = frozenset({"prompts", "webhooks"})
KEYS = Keys(
    {key: section for section in SECTIONS for key in section.model_fields if key not in COMPUTED_KEYS}
)
_DRAWN_SEEDS = 1 << 31
_PLACEHOLDERS = {"model_family": "?", "pretrained_model_name_or_path": "unknown/unknown"}

S = TypeVar("S", bound=Section)


def load_config(path: Path, *, overrides: Sequence[str] = (), families: Mapping[str, ModelSpec]) -> RunConfig:
    """Load a configuration without importing torch.

    Args:
        path: The config.json.
        overrides: Command-line arguments: key=value, --key=value, --key value, or --key for true.
        families: Name -> spec of every model family.

    Raises:
        ConfigError: Lists every problem of every file.
    """
    problems = Problems()
    run = Loader(path, families=families, problems=problems).load(overrides)
    problems.raise_if_any()
    assert run is not None, "without a RunConfig there is a problem"
    return run


class Loader:
    """Loads one config.json with the files that it names, and notes every problem."""

    def __init__(
        self,
        path: Path,
        *,
        families: Mapping[str, ModelSpec],
        problems: Problems,
        compared_by: tuple[Path, ...] = (),
    ) -> None:
        self.path, self.families, self.problems = path, families, problems
        self.chain = (*compared_by, path)
        """Each file names the next as validation_compared_config."""
        self.file = display(path)
        self.environment = Environment(os.environ, problems, without_text=_keys_without_text)
        self.raw: Mapping[str, RawValue] = {}
        self.built: list[Section] = []
        self.decisions: list[Decision] = []
        """What became of every key that does not stay as it is."""
        self.values: Mapping[str, object] = {}
        """Values of the user and the family's defaults, without inline files."""
        self.source = Source(
            problems,
            lambda key: self.raw[key].source if key in self.raw else self.file,
            PathContext(config_folder=Path(os.path.abspath(path)).parent),
        )

    def load(self, overrides: Sequence[str] = ()) -> RunConfig | None:
        """Load one config.json; returns None if errors prevent building the RunConfig."""
        content, left_out = read_config(self.path, source=self.file, problems=self.problems)
        if content is None:
            return None
        if not isinstance(content, dict):
            self.source.add("", "must hold an object, {...}.")
            return None
        layers = merge_layers(
            content, overrides, KEYS, file=self.file, environment=self.environment, families=self.families
        )
        self.raw = layers.raw
        self.decisions += [*left_out, *layers.decisions]
        spec = rules.family_of(self.raw, self.families, self.source)
        defaults, context = self._defaults(spec)
        self.values = defaults | {
            key: raw.value for key, raw in self.raw.items() if not self._is_inline_file(key)
        }
        self.source = self.source.with_names(model_family=str(self.values.get("model_family", "")))
        self._section(FileConfig)
        checkpoint = self._section(CheckpointConfig)
        if checkpoint.section is not None:
            self.source = self.source.with_names(output_dir=str(checkpoint.section.output_dir))
            self._draw_seed(checkpoint.section)
        model = self._section(ModelConfig, placeholders=_PLACEHOLDERS)
        adapter, data = self._section(AdapterConfig), self._section(DataConfig)
        training, optimizer = self._section(TrainingConfig), self._section(OptimizerConfig)
        regularisation = self._section(RegularisationConfig)
        noise, precision = self._section(NoiseConfig), self._section(PrecisionConfig)
        compiling = self._section(CompileConfig)
        masks, tokens = self._section(MaskConfig), self._section(NewTokenConfig)
        text_encoders, _ = self._section(TextEncoderConfig), self._section(WholeModelConfig)
        if "webhook_config" in self.raw:
            hide_address(self.raw["webhook_config"].value)
        tracking, validation = self._section(TrackingConfig), self._section(ValidationConfig)
        publishing, ema = self._section(PublishingConfig), self._section(EmaConfig)
        evaluation = self._section(EvaluationConfig)
        lycoris, dataset_file = self._lycoris(adapter, precision), self._datasets(data)
        self.decisions += dataset_file.decisions
        prompts, webhooks = self._prompts(validation, dataset_file), self._webhooks(tracking)
        if spec is not None:
            rules.check_model(model, spec, self.source)
            family_sections = (model, adapter, training, noise, validation)
            rules.check_family(family_sections, spec, families=self.families, source=self.source)
            self._check_adapter(adapter, lycoris, spec=spec, datasets=dataset_file.datasets)
            rules.check_precision(precision, adapter, lycoris, spec=spec, source=self.source)
            check_text_encoders(
                text_encoders, precision, optimizer, lycoris=lycoris, spec=spec, source=self.source
            )
            check_new_tokens(tokens, precision, optimizer, spec=spec, source=self.source)
            rules.check_offload(precision, training, validation, spec=spec, source=self.source)
            check_compiling(compiling, precision, training, source=self.source)
            rules.check_alignment(data, spec, self.source)
            rules.check_validation(validation, spec, self.source)
            images = () if validation.section is None else validation.section.validation_reference_images
            check_images(prompts, model, images=images, spec=spec, source=self.source)
            rules.check_references(
                model, data, dataset_file, spec=spec, families=self.families, source=self.source
            )
        rules.check_noise(noise, self.source)
        rules.check_masks(masks, noise, kinds=dataset_file.mask_kinds, source=self.source)
        rules.check_ema(ema, optimizer, self.source)
        rules.check_evaluation(evaluation, dataset_file, self.source)
        rules.check_repository(tracking, publishing, self.source)
        rules.check_regularisation(regularisation, adapter, dataset_file.datasets, source=self.source)
        datasets = dataset_file.datasets
        check_times(datasets, training, self.source)
        check_whole_model(self.built, self.raw, prompts=prompts, datasets=datasets, source=self.source)
        check_embedding(self.built, self.raw, datasets=datasets, source=self.source)
        rules.check_output(checkpoint, dataset_file.folders(), self.source)
        if len(self.chain) == 1:  # a compared run that is finished may lie anywhere
            rules.check_writable(checkpoint, self.source)
        compared_with = self._compared_with(validation)
        if len(self.problems) or spec is None or data.section is None or validation.section is None:
            return None
        assert tracking.section is not None, "without it there is a problem"
        text_cache = {"cache_dir_text": dataset_file.cache_dir_text} if dataset_file.cache_dir_text else {}
        sizes = validation.section.validation_resolution or (rules.training_size(data.section, spec),)
        run = RunConfig.model_validate(
            {
                "source": Path(os.path.abspath(self.path)),
                **self._sections(),
                "lycoris": lycoris,
                "data": data.section.model_copy(update=text_cache),
                "datasets": dataset_file.datasets,
                "conditioning": dataset_file.conditioning,
                "references": dataset_file.references,
                "tracking": tracking.section.model_copy(update={"webhooks": webhooks}),
                "validation": validation.section.model_copy(
                    update={"validation_resolution": sizes, "prompts": prompts}
                ),
                "compared_with": compared_with,
                "decisions": tuple(self.decisions),
                "differing_defaults": tuple(self._differences(context, dataset_file)),
            }
        )
        rules.check_comparison(run, self.source)
        return run

    def _defaults(self, spec: ModelSpec | None) -> tuple[dict[str, object], Context]:
        """The values of keys that are left out, and what relations between keys look at."""
        theirs: dict[str, object] = {}
        raw = dict(self.raw)
        context = Context({key: each.value for key, each in raw.items()}, spec)
        if context.text(CHOICE) == THEIRS:
            theirs |= their_defaults(raw, context)
            flavour = theirs.pop("model_flavour", None) or context.values.get("model_flavour")
            if flavour is not None:
                named = their_flavour(str(flavour))
                raw["model_flavour"] = RawValue(named, named, self.source.name_of("model_flavour"))
                if named != context.values.get("model_flavour", named):
                    text = "Another model under the same name."
                    ours = f"model_flavour: {named}"
                    self.decisions.append(Decision("model_flavour", str(flavour), "translated", ours, text))
            self._adopt_optimizer(raw)
            self.raw = raw
        defaults: dict[str, object] = {"output_dir": str(own_output_dir(self.path))}
        defaults |= _PLACEHOLDERS if spec is None else rules.family_defaults(self.raw, spec)
        if "group_offload_type" in defaults:
            kind = f"group_offload_type: {defaults['group_offload_type']}"
            text = "The only kind that a UNet has."
            self.decisions.append(Decision("enable_group_offload", True, "translated", kind, text))
        return defaults | theirs, context

    def _adopt_optimizer(self, raw: dict[str, RawValue]) -> None:
        """Put what SimpleTuner does with the optimiser in place of what the name means here."""
        record = OPTIMIZERS.named(raw["optimizer"].value) if "optimizer" in raw else None
        found = their_optimizers().get(record.name) if record is not None else None
        if record is None or found is None:
            return

        def put(key: str, value: Any, text: str) -> None:
            given = raw[key].value if key in raw else None
            raw[key] = RawValue(value, value, self.source.name_of(key))
            if given != value:
                decision = Decision(key, given, "translated", f"{key}: {shown(value)}", text)
                self.decisions.append(decision)

        if found.ours:
            put("optimizer", found.ours, "SimpleTuner's optimiser of that name.")
        if found.learning_rate is not None:
            put("learning_rate", found.learning_rate, "SimpleTuner's rate of that optimiser.")
        if found.arguments:
            written = raw["optimizer_config"].value if "optimizer_config" in raw else None
            with suppress(ValueError):  # the section says what is wrong with it
                given = optimizer_arguments(written, betas=record.betas)
                plain = {key: list(each) if isinstance(each, tuple) else each for key, each in given.items()}
                text = "SimpleTuner's arguments of that optimiser, where the file gives no others."
                put("optimizer_config", {**found.arguments, **plain}, text)

    def _draw_seed(self, checkpoint: CheckpointConfig) -> None:
        """Replace the seed -1 by the seed of the run that goes on, else by a drawn one."""
        if str(self.values.get("seed")).strip() != "-1":
            return
        is_new = checkpoint.resume_from_checkpoint is None
        seed = None if is_new else stored_seed(checkpoint.output_dir)
        how = "The run's own, which goes on."
        if seed is None:
            seed = random.SystemRandom().randrange(_DRAWN_SEEDS)
            how = "Drawn for each new run; one that goes on keeps its own."
        self.values = {**self.values, "seed": seed}
        self.decisions.append(Decision("seed", -1, "translated", f"seed: {seed}", how))

    def _differences(self, context: Context, dataset_file: DatasetFile) -> Iterator[DifferingDefault]:
        """The defaults that SimpleTuner has otherwise, unless the configuration chooses."""
        if CHOICE in self.raw:
            return
        datasets: list[object] = [dict(dataset) for dataset in dataset_file.datasets]
        everything = {key: value for section in self.built for key, value in section}
        values = {**everything, "data_backend_config": datasets}
        if "pretrained_model_name_or_path" not in self.raw:
            del values["pretrained_model_name_or_path"]
        yield from differences(self.raw, replace(context, values=values), values=everything)

    def _section(self, section: type[S], *, placeholders: Mapping[str, object] | None = None) -> Validated[S]:
        own = {key: self.values[key] for key in section.model_fields if key in self.values}
        built = build(section, own, self.source, placeholders=placeholders)
        self.built += [built.section] if built.section is not None else []
        return built

    def _sections(self) -> dict[str, Section]:
        """The sections by their names in a RunConfig."""
        built = {type(each): each for each in self.built}
        fields = RunConfig.model_fields.items()
        return {name: built[field.annotation] for name, field in fields if field.annotation in built}

    def _lycoris(
        self, adapter: Validated[AdapterConfig], precision: Validated[PrecisionConfig]
    ) -> LycorisConfig | None:
        section = adapter.section
        if section is None or self.values.get("model_type") in WITHOUT_ADAPTER:
            return None
        # An invalid lora_type has become standard here; its lycoris json is checked nevertheless.
        if section.lora_type == "standard" and "lora_type" not in adapter.invalid_keys:
            if section.lycoris_config is not None and "lora_type" not in self.raw:
                self.source.add("lora_type", "lycoris_config has no effect without it. Set it to lycoris.")
            return None
        content = self._content("lycoris_config", section.lycoris_config)
        if content is not None:
            value, raw, source = content
            quantised = precision.if_valid("base_model_precision")
            chosen = UNCHANGED if quantised is None else quantised.base_model_precision
            added, decisions = complete_lycoris(value, precision=chosen)
            self.decisions += decisions
            if isinstance(value, dict) and isinstance(raw, dict):
                value, raw = value | added, raw | added
            return read_lycoris(value, source, raw=raw)
        if "lycoris_config" not in self.raw:
            text = "required by lora_type lycoris. Give the path of the lycoris json."
            self.source.add("lycoris_config", text)
        return None

    def _check_adapter(
        self,
        adapter: Validated[AdapterConfig],
        lycoris: LycorisConfig | None,
        *,
        spec: ModelSpec,
        datasets: Sequence[DatasetConfig],
    ) -> None:
        if self.values.get("model_type") in WITHOUT_ADAPTER:
            return
        rules.check_lora_preset(self.raw, adapter, spec=spec, source=self.source)
        rules.check_format(adapter, lycoris, spec=spec, source=self.source)
        rules.check_slider(adapter, lycoris, datasets=datasets, source=self.source)

    def _datasets(self, data: Validated[DataConfig]) -> DatasetFile:
        path = data.section.data_backend_config if data.section is not None else None
        content = self._content("data_backend_config", path)
        if content is not None:
            value, _, source = content
            return read_datasets(value, source, data=data)
        if "data_backend_config" not in self.raw:
            text = "required, but missing. Give the path of the dataset json."
            self.source.add("data_backend_config", text)
        return DatasetFile((), None)

    def _prompts(
        self, validation: Validated[ValidationConfig], dataset_file: DatasetFile
    ) -> tuple[ValidationPrompt, ...]:
        section = validation.section
        if section is None:
            return ()
        content = self._content("user_prompt_library", section.user_prompt_library)
        images = section.validation_reference_images
        user = read_library(content[0], content[2], images=images) if content is not None else ()
        with_library = section.validation_prompt_library
        prompts = merge_prompts(
            section.validation_prompt, with_library=with_library, images=images, user=user
        )
        strengths = slider_strengths(dataset_file.datasets)
        return at_both_ends(prompts, strengths, factor=section.validation_lycoris_strength)

    def _webhooks(self, tracking: Validated[TrackingConfig]) -> tuple[WebhookConfig, ...]:
        path = tracking.section.webhook_config if tracking.section is not None else None
        content = self._content("webhook_config", path)
        return read_webhooks(content[0], content[2]) if content is not None else ()

    def _is_inline_file(self, key: str) -> bool:
        is_file = key in ("lycoris_config", "data_backend_config", "webhook_config")
        return is_file and isinstance(self.raw[key].value, dict | list)

    def _content(self, key: str, path: Path | None) -> tuple[JsonValue, JsonValue, Source] | None:
        """The inline value of a key, or the content of the file it names: (value, raw value, source)."""
        inline = self.raw.get(key)
        if inline is not None and isinstance(inline.value, dict | list):
            source = replace(self.source, name_of=lambda _: f"{inline.source}, {key}")
            return inline.value, inline.raw, source
        if path is None:
            return None
        file = display(path)
        raw = read_json(path, source=file, problems=self.problems)
        if raw is None:
            return None
        value = self.environment.fill(raw, source=file, key="")
        return value, raw, replace(self.source, name_of=lambda _: file)

    def _compared_with(self, validation: Validated[ValidationConfig]) -> RunConfig | None:
        """Load the run of validation_compared_config."""
        key = "validation_compared_config"
        section = validation.if_valid(key)
        path = section.validation_compared_config if section is not None else None
        if path is None:
            return None
        chain = [os.path.realpath(each) for each in self.chain]
        if os.path.realpath(path) not in chain:
            other = Loader(path, families=self.families, problems=self.problems, compared_by=self.chain)
            return other.load()
        circle = (*self.chain[chain.index(os.path.realpath(path)) :], path)
        found = " -> ".join(map(display, circle))
        advice = "Name the config.json of another run, or remove the key."
        self.source.add(key, f"{found}: a run cannot be compared with itself. {advice}")
        return None


def _keys_without_text() -> frozenset[str]:
    """Keys of the lycoris json and the dataset json that hold a number or a choice."""
    adapter = (LycorisConfig, TargetPreset, LayerArguments, algorithm_arguments())
    sections = (*adapter, DatasetConfig, ConditioningConfig, ReferenceConfig, TextCacheEntry)
    keys = {key for section in sections for key in section.model_fields if not holds_text(section, key)}
    return frozenset({*keys, *layer_aliases(), *SWITCHES} - {"apply_preset"})


def stored_seed(output_dir: Path) -> int | None:
    """The seed of the run in an output folder; None if there is none."""
    try:
        resolved = json.loads((output_dir / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    seed = resolved.get("seed") if isinstance(resolved, dict) else None
    return seed if isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 else None


def own_output_dir(path: Path) -> Path:
    """The output folder of a configuration that sets none: output/mine for config/mine/config.json."""
    folder = Path(os.path.abspath(path)).parent.name
    return Path("output", folder if path.name in (FILE, *OTHER_FORMS) else f"{folder}-{path.stem}")


def display(path: Path) -> str:
    """A path for messages: relative if it is below the working directory."""
    absolute, here = Path(os.path.abspath(path)), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(path)
