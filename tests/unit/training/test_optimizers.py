"""Optimisers as configured."""

from __future__ import annotations

import pytest
import torch

from simpletuner.helpers.configuration.schema.sections import OptimizerConfig
from simpletuner.helpers.errors import MissingDependencyError
from simpletuner.helpers.training.optimizers import build_optimizer


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]


def test_adamw_takes_learning_rate_and_defaults() -> None:
    optimizer = build_optimizer(parameters(), OptimizerConfig(learning_rate=3e-4))
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
        build_optimizer(fused, OptimizerConfig(learning_rate=0.1)),
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
    group = build_optimizer(parameters(), config).param_groups[0]
    assert (group["betas"], group["weight_decay"], group["lr"]) == ((0.8, 0.95), 1e-4, 1e-4)


def test_prodigy_is_taken_from_its_package() -> None:
    prodigyopt = pytest.importorskip("prodigyopt")
    config = OptimizerConfig(optimizer="prodigy", learning_rate=1.0, optimizer_config={"d_coef": 2.0})
    optimizer = build_optimizer(parameters(), config)
    assert isinstance(optimizer, prodigyopt.Prodigy)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["d_coef"]) == (1.0, 2.0)


def test_prodigy_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "prodigyopt", None)
    with pytest.raises(MissingDependencyError, match=r"simpletuner-t\[optim\]"):
        build_optimizer(parameters(), OptimizerConfig(optimizer="prodigy"))
