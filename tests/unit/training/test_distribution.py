"""Ways to use several processes that are refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from accelerate import Accelerator, DistributedType
from accelerate.utils import DynamoBackend

from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.configuration.schema.compiling import CompileConfig
from simpletuner.helpers.configuration.schema.sections import RunConfig
from simpletuner.helpers.configuration.schema.whole_model import WholeModelConfig
from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.models import registry
from simpletuner.helpers.training.accelerator import check_distribution


def accelerator(
    kind: DistributedType,
    *,
    version: int = 2,
    through_one: bool = False,
    num_processes: int = 1,
    compiles_with: DynamoBackend = DynamoBackend.NO,
) -> Accelerator:
    plugin = SimpleNamespace(fsdp_version=version, cpu_ram_efficient_loading=through_one)
    state = SimpleNamespace(fsdp_plugin=plugin, dynamo_plugin=SimpleNamespace(backend=compiles_with))
    found = SimpleNamespace(distributed_type=kind, state=state, num_processes=num_processes)
    return cast(Accelerator, found)


@pytest.fixture
def config(repository: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.chdir(repository)
    path = Path("config/config.json")
    return load_config(path, overrides=("validation_disable=true",), families=registry.specs())


@pytest.mark.parametrize("kind", [DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.FSDP])
def test_what_works_is_let_through(kind: DistributedType, config: RunConfig) -> None:
    check_distribution(config, accelerator(kind))


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_other_ways_are_refused_by_name(kind: DistributedType, config: RunConfig) -> None:
    with pytest.raises(ConfigError, match=kind.value):
        check_distribution(config, accelerator(kind))


def test_compiling_by_accelerates_own_file_is_refused(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"INDUCTOR.*dynamo_config.*dynamo_backend"):
        check_distribution(config, accelerator(DistributedType.NO, compiles_with=DynamoBackend.INDUCTOR))


def test_every_problem_with_fsdp_is_told_at_once(config: RunConfig) -> None:
    with_pictures = config.validation.model_copy(update={"validation_disable": False})
    optimizer = config.optimizer.model_copy(update={"optimizer": "came"})
    compiling = CompileConfig(dynamo_backend="inductor")
    wrong: dict[str, Any] = {"lycoris": None, "validation": with_pictures, "optimizer": optimizer}
    wrong["compiling"] = compiling
    found = accelerator(DistributedType.FSDP, version=1, through_one=True)
    with pytest.raises(ConfigError) as caught:
        check_distribution(config.model_copy(update=wrong), found)
    for remedy in (
        "fsdp_version to 2",
        "algo to tlora",
        "optimizer to adamw or prodigy",
        "validation_disable to true",
        "fsdp_cpu_ram_efficient_loading to false",
        "dynamo_backend to no",
    ):
        assert remedy in str(caught.value)


def test_fsdp_shards_a_whole_model_without_an_adapter(config: RunConfig) -> None:
    model = config.model.model_copy(update={"model_type": "full"})
    whole = config.model_copy(update={"model": model, "lycoris": None})
    check_distribution(whole, accelerator(DistributedType.FSDP))
    prodigy = config.optimizer.model_copy(update={"optimizer": "prodigy"})
    with pytest.raises(ConfigError, match=r"optimizer to adamw\."):
        check_distribution(whole.model_copy(update={"optimizer": prodigy}), accelerator(DistributedType.FSDP))
    check_distribution(config.model_copy(update={"optimizer": prodigy}), accelerator(DistributedType.FSDP))


def test_fused_backward_pass_needs_one_process(config: RunConfig) -> None:
    whole = WholeModelConfig(fused_backward_pass=True)
    fused = config.model_copy(update={"whole_model": whole})
    check_distribution(fused, accelerator(DistributedType.NO))
    with pytest.raises(ConfigError, match="fused_backward_pass"):
        check_distribution(fused, accelerator(DistributedType.MULTI_GPU, num_processes=2))
