"""Every option of every algorithm: trained, saved and loaded to the same output, or refused before training.

The full product of the options takes minutes: pytest --long tests/unit/adapters/test_every_option.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from itertools import combinations, compress, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simpletuner.helpers.adapters.files.inspection import inspect
from simpletuner.helpers.adapters.network import LycorisAdapter, attach_adapter, load_adapter
from simpletuner.helpers.choices.algorithms import ALGORITHMS
from simpletuner.helpers.configuration.loading.building import Source
from simpletuner.helpers.configuration.loading.lycoris_file import read_lycoris
from simpletuner.helpers.configuration.schema.adapter import AdapterConfig
from simpletuner.helpers.configuration.schema.base import PathContext
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig
from simpletuner.helpers.configuration.text.problems import Problems
from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.models.sdxl.spec import SPEC

Options = Mapping[str, Any]
BASE: Mapping[str, Options] = {
    "tlora": {"tlora_min_rank": 1},
    "tlokr": {"tlora_min_rank": 1, "linear_dim": 2, "factor": 2},
    "lokr": {"linear_dim": 2, "factor": 8},
    "boft": {"linear_dim": 6},
    "dylora": {"block_size": 2},
}
"""What an algorithm needs on layers of 32 and 48."""
TRIALS: Mapping[str, tuple[Any, ...]] = {
    "conv_dim": (6,),
    "conv_alpha": (2.0,),
    "dropout": (0.2,),
    "rank_dropout": (
        0.1,
    ),  # at most: with rank_dropout_scale LyCORIS divides by zero if all ranks are dropped
    "module_dropout": (0.2,),
    "factor": (5, -1),
    "constraint": (1e-3,),
    "block_size": (1,),
    "wd_on_out": (False,),
}
"""Values of an option; the others are switches."""
NEEDS: Mapping[str, Options] = {
    "dropout": {"bypass_mode": True},
    "rank_dropout_scale": {"rank_dropout": 0.1},
    "wd_on_out": {"weight_decompose": True},
}
"""Options without which an option is refused."""
ALSO_NEEDS: Mapping[tuple[str, str], Options] = {
    ("glora", "rank_dropout"): {"bypass_mode": True},
    ("glora", "rank_dropout_scale"): {"bypass_mode": True},
    ("dylora", "conv_dim"): {"linear_dim": 6, "block_size": 3},
}
_TWO_FACTORS = (
    *("use_tucker", "use_scalar", "rs_lora", "weight_decompose", "wd_on_out", "bypass_mode", "conv_dim"),
)
SAME_FACTORS: Mapping[str, tuple[str, ...]] = {
    "lora": _TWO_FACTORS,
    "loha": _TWO_FACTORS,
    "lokr": (
        *_TWO_FACTORS,
        *("factor", "full_matrix", "decompose_both", "unbalanced_factorization"),
    ),
    "diag-oft": ("constraint", "rescaled", "bypass_mode", "conv_dim", "train_norm"),
    "boft": ("constraint", "rescaled", "bypass_mode", "conv_dim", "train_norm"),
    "ia3": ("train_on_input", "bypass_mode", "train_norm"),
    "glora": ("use_scalar", "rs_lora", "bypass_mode", "conv_dim"),
    "dylora": ("block_size", "conv_alpha", "train_norm"),
    "tlora": ("conv_dim", "conv_alpha"),
    "tlokr": ("factor", "decompose_both", "unbalanced_factorization"),
}
"""Algorithm -> options that shape, scale or read the same factors; they are tried in pairs."""
INPUT, IMAGE = (
    torch.randn(shape, generator=torch.Generator().manual_seed(3)) for shape in ((4, 32), (2, 32, 5, 5))
)
STEPS = 60
"""Passes in which a random dropout or block has let every parameter take part."""


class Toy(nn.Module):
    """Linear layers and convolutions with and without bias, square and not, and two norms."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.square = nn.Linear(32, 48), nn.Linear(48, 48, bias=False)
        self.conv, self.pointwise = nn.Conv2d(32, 48, 3, padding=1), nn.Conv2d(48, 48, 1)
        self.down = nn.Conv2d(48, 32, 3, stride=2, padding=1, bias=False)
        self.norm, self.groups = nn.LayerNorm(48), nn.GroupNorm(2, 48)

    def forward(self) -> Tensor:
        tokens = self.norm(self.square(self.linear(INPUT)))
        pixels = self.down(self.groups(self.pointwise(self.conv(IMAGE))))
        return torch.cat([tokens.flatten(), pixels.flatten()])


def toy() -> Toy:
    return Toy().requires_grad_(False).eval()


def configured(algo: str, options: Options) -> LycorisConfig:
    """What a lycoris json with these options says.

    Raises:
        ConfigError: It is refused.
    """
    size = {"algo": algo, "multiplier": 1.0, "linear_dim": 4, "linear_alpha": 3.0}
    raw = json.loads(
        json.dumps(size | BASE.get(algo, {}) | {"apply_preset": {"target_name": [".*"]}} | dict(options))
    )
    problems = Problems()
    config = read_lycoris(dict(raw), Source(problems, lambda _: "lycoris.json", PathContext()), raw=raw)
    problems.raise_if_any()
    assert config is not None
    return config


def attached(model: nn.Module, config: LycorisConfig, init_lora: Path | None = None) -> LycorisAdapter:
    settings = AdapterConfig.model_construct(
        **(dict(AdapterConfig(lora_type="lycoris")) | {"init_lora": init_lora})
    )
    adapter = attach_adapter(model, settings, lycoris=config, spec=SPEC, seed=0)
    assert isinstance(adapter, LycorisAdapter)
    return adapter


def predict(model: nn.Module, adapter: LycorisAdapter) -> Tensor:
    with torch.no_grad(), adapter.rank_mask_for([400]):
        return model()


def train(model: nn.Module, adapter: LycorisAdapter) -> list[str]:
    """One step from random parameters; the names of those without a gradient."""
    names = {
        id(each): f"{module.lora_name}.{name}"
        for module in adapter.network.loras
        for name, each in module.named_parameters()
    }
    parameters = adapter.parameters()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.train()
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(parameters, lr=1e-2)
    idle = parameters
    for _ in range(STEPS):
        with adapter.rank_mask_for([0]):
            (model() - 1).square().mean().backward()
        idle = [each for each in idle if each.grad is None or not each.grad.any()]
        if not idle:
            break
    optimizer.step()
    model.eval()
    return [names[id(each)] for each in idle]


def problem(config: LycorisConfig, folder: Path, *, thorough: bool) -> str | None:
    """Why an adapter does not train, or is another one when loaded; None if all is well."""
    model = toy()
    base, adapter = model(), attached(model, config)
    if idle := train(model, adapter):
        return f"{', '.join(idle)} got no gradient"
    expected, file = predict(model, adapter), folder / "a.safetensors"
    effect = (expected - base).norm()
    if not effect > 1e-3:
        return f"an effect of {effect}"
    adapter.save(file, metadata={})
    fresh = toy()
    loaded = load_adapter(fresh, file)
    ways = {"loaded": predict(fresh, loaded)}
    if thorough:
        loaded.save(folder / "b.safetensors", metadata={})
        again = toy()
        ways["saved again"] = predict(again, load_adapter(again, folder / "b.safetensors"))
        started = toy()
        ways["init_lora"] = predict(started, attached(started, config, file))
        resumed = toy()
        other = attached(resumed, config)
        other.load_state_dict(adapter.state_dict())
        ways["resumed"] = predict(resumed, other)
    errors = {way: float((found - expected).norm() / effect) for way, found in ways.items()}
    return next(
        (f"{way}: {error:.1e} of the effect off" for way, error in errors.items() if error > 1e-4), None
    )


def with_needs(algo: str, options: Options) -> Options:
    """The options with those without which they are refused."""
    needed: dict[str, Any] = {}
    for option in options:
        needed |= {**NEEDS.get(option, {}), **ALSO_NEEDS.get((algo, option), {})}
    return needed | dict(options)


def trials(algo: str, option: str) -> list[Options]:
    return [with_needs(algo, {option: value}) for value in TRIALS.get(option, (True,))]


def problems(algo: str, cases: Iterator[Options], folder: Path, *, thorough: bool) -> dict[str, str]:
    """The problem of each case that has one; a refusal counts as none."""
    found: dict[str, str] = {}
    for options in cases:
        try:
            config = configured(algo, options)
        except ConfigError:
            continue
        if reason := problem(config, folder, thorough=thorough):
            found[str(dict(options))] = reason
    return found


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_option_by_itself_is_trained_and_loaded_again(algo: str, tmp_path: Path) -> None:
    cases = [{}, *(case for option in sorted(ALGORITHMS[algo].arguments) for case in trials(algo, option))]
    for options in cases:
        configured(algo, options)  # none is refused
    assert problems(algo, iter(cases), tmp_path, thorough=algo != "locon") == {}  # whose layer is lora's


@pytest.mark.parametrize("algo", SAME_FACTORS)
def test_options_of_the_same_factors_are_trained_and_loaded_in_pairs(algo: str, tmp_path: Path) -> None:
    pairs = (
        dict(one) | dict(other)
        for first, second in combinations(SAME_FACTORS[algo], 2)
        for one, other in product(trials(algo, first), trials(algo, second))
    )
    assert problems(algo, pairs, tmp_path, thorough=False) == {}


@pytest.mark.parametrize(
    ("algo", "options", "title", "ranks"),
    [
        ("loha", {"use_tucker": True}, "LoHa", {4: 5}),
        ("lokr", {"use_tucker": True}, "LoKr", {2: 5}),
        ("lokr", {"unbalanced_factorization": True, "decompose_both": True}, "LoKr", {2: 5}),
        ("lokr", {"full_matrix": True}, "LoKr", {}),
        ("full", {}, "full", {}),
        ("diag-oft", {}, "diag-oft", {}),
        ("boft", {}, "boft", {}),
        ("ia3", {}, "ia3", {}),
        ("glora", {}, "GLoRA", {4: 5}),
        ("dylora", {}, "LoRA", {4: 5}),
        ("lora", {"train_norm": True}, "LoRA, norms", {4: 5}),
    ],
)
def test_inspect_counts_every_layer_of_every_algorithm(
    algo: str, options: Options, title: str, ranks: dict[int, int], tmp_path: Path
) -> None:
    adapter = attached(toy(), configured(algo, options))
    adapter.save(tmp_path / "a.safetensors", metadata={})
    found = inspect(tmp_path / "a.safetensors")
    assert (found.algorithm, found.num_layers, found.ranks) == (title, len(adapter.network.loras), ranks)


def test_inspect_names_the_algorithms_of_a_mixed_file(tmp_path: Path) -> None:
    maps = {"name_algo_map": {"conv": {"algo": "lokr"}, "square": {"algo": "loha"}}}
    adapter = attached(toy(), configured("tlora", {"apply_preset": {"target_name": [".*"]} | maps}))
    adapter.save(tmp_path / "a.safetensors", metadata={})
    found = inspect(tmp_path / "a.safetensors")
    assert set(found.algorithm.split(", ")) == {"T-LoRA", "LoHa", "LoKr"}
    assert found.num_layers == 5


def test_table_of_the_documentation_is_what_the_algorithms_take(repository: Path) -> None:
    text = (repository / "documentation/lycoris.md").read_text()
    head, _, *rows = (
        text.partition("<!-- table: options -->")[2].partition("<!-- end -->")[0].strip().splitlines()
    )
    columns = [re.findall(r"`(\S+)`", cell) for cell in head.split("|")[2:-1]]
    found: dict[str, set[str]] = {algo: set() for names in columns for algo in names}
    for row in rows:
        option, *cells = (cell.strip() for cell in row.split("|")[1:-1])
        assert set(cells) <= {"ok", "refused"}
        for names, cell in zip(columns, cells, strict=True):
            for algo in names if cell == "ok" else ():
                found[algo].add(option.strip("`"))
    assert found == {algo: set(record.arguments) for algo, record in ALGORITHMS.items()}


TOGETHER = (("conv_dim", "conv_alpha"), ("rank_dropout", "rank_dropout_scale", "module_dropout"))
"""Options that are set together in the full product."""


def every_combination(algo: str) -> Iterator[Options]:
    """The full product of an algorithm's options, each unset or at its first value."""
    taken = ALGORITHMS[algo].arguments
    groups = [tuple(option for option in group if option in taken) for group in TOGETHER]
    single = sorted(taken.difference(*groups))
    for chosen in product((False, True), repeat=len(groups) + len(single)):
        parts = compress([*groups, *((option,) for option in single)], chosen)
        yield {option: TRIALS.get(option, (True,))[0] for part in parts for option in part}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_the_full_product_of_the_options_is_trained_and_loaded_or_refused(algo: str, tmp_path: Path) -> None:
    assert problems(algo, every_combination(algo), tmp_path, thorough=False) == {}
