"""Optimisers as configured."""

from __future__ import annotations

import pytest
import torch

from simpletuner.helpers.adapters.trainable import ParameterGroup, one_group
from simpletuner.helpers.choices.optimizers import OPTIMIZERS
from simpletuner.helpers.configuration.schema.sections import OptimizerConfig
from simpletuner.helpers.errors import MissingDependencyError
from simpletuner.helpers.training.optimizers import build_optimizer


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]


def test_adamw_takes_learning_rate_and_defaults() -> None:
    optimizer = build_optimizer(one_group("adapter", parameters()), OptimizerConfig(learning_rate=3e-4))
    group = optimizer.param_groups[0]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (
        3e-4,
        (0.9, 0.999),
        1e-2,
        1e-8,
    )


def test_adamw_fused_takes_the_same_step_as_the_plain_one() -> None:
    fused, plain = parameters(), parameters()
    optimizers = [
        build_optimizer(one_group("adapter", fused), OptimizerConfig(learning_rate=0.1)),
        torch.optim.AdamW(plain, lr=0.1, weight_decay=1e-2),
    ]
    for chosen, optimizer in zip((fused, plain), optimizers, strict=True):
        for parameter in chosen:
            parameter.grad = torch.full_like(parameter, 0.5)
        optimizer.step()
    for one, other in zip(fused, plain, strict=True):
        torch.testing.assert_close(one, other)


def test_adamw_takes_the_arguments_of_optimizer_config() -> None:
    config = OptimizerConfig(optimizer_config="betas=0.8,0.95,weight_decay=1e-4")
    group = build_optimizer(one_group("adapter", parameters()), config).param_groups[0]
    assert (group["betas"], group["weight_decay"], group["lr"]) == ((0.8, 0.95), 1e-4, 1e-4)


def test_prodigy_is_taken_from_its_package() -> None:
    prodigyopt = pytest.importorskip("prodigyopt")
    config = OptimizerConfig(optimizer="prodigy", learning_rate=1.0, optimizer_config={"d_coef": 2.0})
    optimizer = build_optimizer(one_group("adapter", parameters()), config)
    assert isinstance(optimizer, prodigyopt.Prodigy)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["d_coef"]) == (1.0, 2.0)


def test_prodigy_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "prodigyopt", None)
    with pytest.raises(MissingDependencyError, match=r"simpletuner-t\[optim\]"):
        build_optimizer(one_group("adapter", parameters()), OptimizerConfig(optimizer="prodigy"))


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("AdamW", "adamw"),
        ("adamw8bit", "bnb-adamw8bit"),
        ("AdamW8bit", "bnb-adamw8bit"),
        ("PagedAdamW8bit", "bnb-adamw8bit-paged"),
        ("Adafactor", "adafactor"),
        ("Lion", "lion"),
        ("Lion8bit", "bnb-lion8bit"),
        ("lion8bit", "bnb-lion8bit"),
        ("Prodigy", "prodigy"),
        ("optimi-stableadamw", "stableadamw"),
        ("AdamWScheduleFree", "adamw_schedulefree"),
        ("CAME", "came"),
        ("DAdaptAdam", "dadaptation"),
        ("dadapt", "dadaptation"),
    ],
)
def test_spellings_of_other_programs_name_the_same_optimiser(written: str, name: str) -> None:
    assert OptimizerConfig(optimizer=written).optimizer == name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_takes_its_arguments_and_a_rate(name: str) -> None:
    optimizer = build_optimizer(
        one_group("adapter", parameters()),
        OptimizerConfig(optimizer=name, learning_rate=0.5, optimizer_config="weight_decay=0.25"),
    )
    for group in optimizer.param_groups:
        assert (float(group["lr"]), group["weight_decay"]) == (0.5, 0.25)


def test_adafactor_steps_at_the_configured_rate_whatever_the_size_of_the_weights() -> None:
    large, small = (torch.nn.Parameter(torch.full((4, 4), size)) for size in (100.0, 0.0))
    optimizer = build_optimizer(
        one_group("adapter", [large, small]), OptimizerConfig(optimizer="adafactor", learning_rate=0.5)
    )
    for weight in (large, small):
        weight.grad = torch.ones(4, 4)
    optimizer.step()
    torch.testing.assert_close(100.0 - large.detach(), -small.detach())
    torch.testing.assert_close(small.detach(), torch.full((4, 4), -0.5))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_groups_take_steps_at_their_own_rates(name: str) -> None:
    matrices = [torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(2)]
    vectors = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    groups = [
        ParameterGroup(name=str(rate), parameters=list(pair), learning_rate=rate)
        for rate, pair in zip((None, 0.25), zip(matrices, vectors, strict=True), strict=True)
    ]
    optimizer = build_optimizer(groups, OptimizerConfig(optimizer=name, learning_rate=0.5))
    for weight in (*matrices, *vectors):
        weight.grad = torch.eye(2) if weight.ndim == 2 else torch.ones(2)
    optimizer.step()
    for whole, half in (matrices, vectors):
        assert whole.detach().abs().max() > 0.1
        torch.testing.assert_close(half.detach(), whole.detach() / 2)
