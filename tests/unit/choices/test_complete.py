"""Each registry is complete: every value has a record, and every record is true of its implementation."""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import torch

from simpletuner.helpers.choices.algorithms import ALGORITHMS, ARGUMENTS, STANDARD, argument_aliases
from simpletuner.helpers.choices.captions import CAPTION_SOURCES
from simpletuner.helpers.choices.image_sources import IMAGE_SOURCES
from simpletuner.helpers.choices.losses import HUBER_SCHEDULES, LOSSES, Loss
from simpletuner.helpers.choices.lr_schedules import LR_SCHEDULES
from simpletuner.helpers.choices.optimizers import OPTIMIZERS
from simpletuner.helpers.choices.precisions import PRECISIONS, UNCHANGED
from simpletuner.helpers.choices.registry import Choice, Registry
from simpletuner.helpers.choices.samplers import SAMPLERS, samplers_of
from simpletuner.helpers.choices.trackers import TRACKERS
from simpletuner.helpers.configuration.load import SECTIONS
from simpletuner.helpers.configuration.loading.known_values import UNSUPPORTED_VALUES
from simpletuner.helpers.configuration.schema.base import Section, registry_of
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.lycoris import LayerArguments, LycorisConfig, TargetPreset
from simpletuner.helpers.data.captions import CaptionReader
from simpletuner.helpers.models import registry
from simpletuner.helpers.reporting.trackers import Tracker

REGISTRIES: dict[str, Registry[Any]] = {
    "optimizer": OPTIMIZERS,
    "lr_scheduler": LR_SCHEDULES,
    "loss_type": LOSSES,
    "huber_schedule": HUBER_SCHEDULES,
    "validation_noise_scheduler": SAMPLERS,
    "base_model_precision": PRECISIONS,
    **{f"text_encoder_{number}_precision": PRECISIONS for number in range(1, 5)},
    "caption_strategy": CAPTION_SOURCES,
    "type": IMAGE_SOURCES,
    "report_to": TRACKERS,
    "algo": ALGORITHMS,
}
EVERY_RECORD: dict[str, Choice] = {STANDARD.name: STANDARD} | {
    f"{key} {name}": each for key, records in REGISTRIES.items() for name, each in records.items()
}
every_record = pytest.mark.parametrize("record", EVERY_RECORD.values(), ids=EVERY_RECORD)

# Arguments that an optimiser's class has, and that optimizer_config does not offer.
_SINGLE_TENSOR = {"lr", "foreach", "maximize", "kwargs"}
_DECAY = {"weight_decouple", "fixed_decay"}
_BITSANDBYTES = {"lr", "args"}
_TORCHAO = {"lr", "amsgrad", "bf16_stochastic_round"}
NOT_OFFERED = {
    "adamw": {"lr", "fused", "amsgrad", "maximize", "foreach", "capturable", "differentiable"},
    "bnb-adamw8bit": _BITSANDBYTES | {"amsgrad", "optim_bits", "is_paged"},
    "bnb-adamw8bit-paged": _BITSANDBYTES | {"amsgrad", "optim_bits"},
    "ao-adamw8bit": _TORCHAO,
    "ao-adamw4bit": _TORCHAO,
    "adafactor": {"lr", "eps", "decay_rate", "scale_parameter", "relative_step", "warmup_init"},
    "lion": _SINGLE_TENSOR | _DECAY,
    "bnb-lion8bit": _BITSANDBYTES | {"is_paged"},
    "prodigy": {"lr", "fsdp_in_use", "slice_p"},
    "prodigyplus": {
        *("lr", "fused_back_pass", "split_groups", "split_groups_mean"),
        *("factored_fp32", "stochastic_rounding", "use_focus"),
    },
    "adamw_schedulefree": _SINGLE_TENSOR | {"warmup_steps", "decoupling_c", "ams_bound"},
    "came": _SINGLE_TENSOR | _DECAY | {"ams_bound"},
    "stableadamw": _SINGLE_TENSOR | {"kahan_sum", "weight_decouple"},
    "muon": {"lr"},
    "dadaptation": _SINGLE_TENSOR | {"fixed_decay"},
}
# Arguments of the whole network, which LyCORIS's wrapper reads.
OF_THE_NETWORK = {"conv_dim", "conv_alpha", "train_norm"}
# Arguments that a layer's constructor takes without an effect, or that its record refuses with a reason.
WITHOUT_EFFECT = {
    "tlora": {"bypass_mode", "dropout", "rank_dropout", "module_dropout", "rank_dropout_scale"},
    "tlokr": {
        *("bypass_mode", "dropout", "rank_dropout", "module_dropout", "rank_dropout_scale", "full_matrix"),
        *("rs_lora", "use_scalar", "use_tucker", "wd_on_out", "weight_decompose"),
    },
    "full": {"bypass_mode", "dropout", "use_scalar", "use_tucker"},
    "diag-oft": {"dropout", "rank_dropout_scale", "use_scalar", "use_tucker"},
    "boft": {"dropout", "rank_dropout", "rank_dropout_scale", "use_scalar", "use_tucker"},
    "ia3": {
        *("dropout", "rank_dropout", "rank_dropout_scale"),
        *("rs_lora", "use_scalar", "use_tucker", "weight_decompose"),
    },
    "glora": {"use_tucker", "weight_decompose"},
    "dylora": {
        *("bypass_mode", "dropout", "rank_dropout", "rank_dropout_scale"),
        *("rs_lora", "train_on_input", "use_scalar", "use_tucker", "weight_decompose"),
    },
}


def choice_keys() -> Iterator[tuple[type[Section], str]]:
    for section in (*SECTIONS, DatasetConfig, LycorisConfig, LayerArguments, TargetPreset):
        for key in section.model_fields:
            if key in REGISTRIES or registry_of(section, key) is not None:
                yield section, key


@pytest.mark.parametrize(("section", "key"), list(choice_keys()), ids=str)
def test_every_value_of_a_choice_has_a_record(section: type[Section], key: str) -> None:
    assert registry_of(section, key) is REGISTRIES[key]
    values = values_in(section.model_json_schema()["properties"][key])
    assert values == list(REGISTRIES[key])


def values_in(schema: Any) -> list[str]:
    if isinstance(schema, dict):
        found = schema.get("enum", [schema["const"]] if "const" in schema else [])
        return [*found, *(each for part in schema.values() for each in values_in(part))]
    return [each for part in schema for each in values_in(part)] if isinstance(schema, list) else []


def test_every_choice_is_a_key() -> None:
    assert {key for _, key in choice_keys()} == REGISTRIES.keys()


NOT_IN_DEV = {"trackio", "gcsfs", "adlfs"}
"""Packages that hold back the version of another that the tests run with, or bring dozens of others."""


@pytest.mark.parametrize("key", REGISTRIES)
def test_a_record_stands_under_its_name_and_is_not_called_unsupported(key: str) -> None:
    for name, each in REGISTRIES[key].items():
        assert name == each.name
        assert each.summary.endswith(".")
        assert not {(key, value) for value in (name, *each.aliases)} & UNSUPPORTED_VALUES.keys()


@every_record
def test_implementation_of_a_record_imports(record: Choice) -> None:
    if record.package in NOT_IN_DEV:
        pytest.importorskip(record.package)
    if record is PRECISIONS[UNCHANGED]:
        return
    if record.name in SAMPLERS and record is SAMPLERS[record.name]:
        sampler = SAMPLERS[record.name]
        assert sampler.schedulers
        assert all(hasattr(sampler.load_for(process), "set_timesteps") for process in sampler.schedulers)
    else:
        assert callable(record.load())


@every_record
def test_package_of_a_record_is_in_its_extra(record: Choice, repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert bool(record.package) == bool(record.extra)
    if record.package:
        names = {re.split(r"[^\w.-]", each)[0] for each in project["optional-dependencies"][record.extra]}
        installed = packages_distributions().get(record.package, [record.package])
        assert names & {name.replace("_", "-") for name in installed}


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_arguments_of_an_optimiser_are_those_of_its_class(name: str) -> None:
    record = OPTIMIZERS[name]
    parameters = parameters_of(record.load())
    assert parameters.keys() - {"params"} == record.arguments.keys() | NOT_OFFERED[name]
    assert record.defaults.keys() <= parameters.keys()
    for argument, argument_type in record.arguments.items():
        default = parameters[argument].default
        expected = {"boolean": bool, "betas": tuple}.get(argument_type, float | int | None)
        assert isinstance(default, expected), argument
        assert isinstance(default, bool) == (argument_type == "boolean"), argument
    if "betas" in record.arguments:
        assert record.betas == parameters["betas"].default
    assert bool(record.fused_devices) == ("fused" in parameters)


@pytest.mark.parametrize("name", LR_SCHEDULES)
def test_arguments_of_a_schedule_are_those_of_its_function(name: str) -> None:
    record = LR_SCHEDULES[name]
    _, *keywords = parameters_of(record.load()).values()
    assert {each.name for each in keywords} == set(record.arguments)
    assert all(each.kind is inspect.Parameter.KEYWORD_ONLY for each in keywords)
    values = {"end": 0.25, "power": 2.0, "num_cycles": 2.0}
    assert record.load()(0.0, **{key: values[key] for key in record.arguments}) == 1.0


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_takes_prediction_target_and_weight(name: str) -> None:
    prediction, target = torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    record = LOSSES[name]
    has_threshold = isinstance(record, Loss) and record.has_threshold
    options = {"threshold": torch.full((2,), 0.5)} if has_threshold else {}
    losses = record.load()(prediction, target, torch.tensor([1.0, 2.0]), **options)
    assert losses.tolist() == [losses[0].item(), 2 * losses[0].item()]
    assert losses[0] > 0
    assert record.load()(target, target, torch.ones(2), **options).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", HUBER_SCHEDULES)
def test_a_huber_schedule_takes_c_the_time_and_the_ratio(name: str) -> None:
    threshold = HUBER_SCHEDULES[name].load()(0.25, time=1.0, noise_to_signal=float("inf"))
    assert threshold == pytest.approx(0.25)


@pytest.mark.parametrize("name", [name for name in PRECISIONS if name != UNCHANGED])
def test_a_precision_quantises_one_layer(name: str) -> None:
    layer = torch.nn.Linear(128, 64)
    quantised = PRECISIONS[name].load()(layer, torch.device("cpu"))
    inputs = torch.randn(2, 128)
    assert isinstance(quantised, torch.nn.Linear)
    assert quantised(inputs).shape == (2, 64)


@pytest.mark.parametrize("name", CAPTION_SOURCES)
def test_a_caption_source_is_a_reader(name: str) -> None:
    reader = CAPTION_SOURCES[name].load()
    assert issubclass(reader, CaptionReader)
    assert reader.read is not CaptionReader.read


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_has_every_method_and_takes_the_keywords(name: str) -> None:
    if TRACKERS[name].package in NOT_IN_DEV:
        pytest.importorskip(TRACKERS[name].package)
    tracker = TRACKERS[name].load()
    methods = {method for method in vars(Tracker) if inspect.isfunction(vars(Tracker)[method])}
    assert {method for method in methods if not method.startswith("_")} <= set(dir(tracker))
    inspect.signature(tracker).bind(config=None, output_dir=None, settings=None, resumed_step=0)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_arguments_of_an_algorithm_are_those_of_its_layer(name: str) -> None:
    record = ALGORITHMS[name]
    taken: set[str] = set()
    for each in record.load().__mro__:
        if "__init__" in vars(each):
            parameters = parameters_of(each.__init__)
            taken |= parameters.keys()
            if all(one.kind is not inspect.Parameter.VAR_POSITIONAL for one in parameters.values()):
                break
    assert record.arguments - OF_THE_NETWORK == taken & ARGUMENTS.keys() - WITHOUT_EFFECT.get(name, set())
    assert record.defaults.keys() & ARGUMENTS.keys() <= record.arguments


def test_every_argument_belongs_to_an_algorithm_and_aliases_are_unique() -> None:
    assert frozenset().union(*(each.arguments for each in ALGORITHMS.values())) == ARGUMENTS.keys()
    assert not argument_aliases().keys() & ARGUMENTS.keys()
    assert len(argument_aliases()) == sum(len(each.aliases) for each in ARGUMENTS.values())


def test_every_family_has_a_sampler_and_every_sampler_a_family() -> None:
    samplers = {name: samplers_of(spec) for name, spec in registry.specs().items()}
    assert all(samplers.values())
    assert {name for names in samplers.values() for name in names} == SAMPLERS.keys()
