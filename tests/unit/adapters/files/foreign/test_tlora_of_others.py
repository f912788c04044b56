"""T-LoRA files of other trainers: at every timestep the delta of the trainer that wrote them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from simpletuner.helpers.adapters.files.inspection import inspect
from simpletuner.helpers.adapters.network import load_adapter
from simpletuner.helpers.errors import AdapterError
from tests.unit.adapters.files.foreign.makers import LAYERS, Made, effect_error, make, shapes_of

R = 8
TIMESTEPS = (0, 200, 500, 790, 999)
TOLERANCE = 1e-4
Ranks = Callable[[int], tuple[int, float]]
"""Timestep -> number of active ranks, and the factor on them."""


def floored(min_rank: int, alpha: float = 1.0) -> Ranks:
    return lambda t: (int(((1000 - t) / 1000) ** alpha * (R - min_rank)) + min_rank, 1.0)


def rounded(min_rank: int, *, cosine: bool) -> Ranks:
    def ranks(t: int) -> tuple[int, float]:
        progress = torch.tensor(1 - t / 1000)
        if cosine:
            progress = 0.5 - 0.5 * torch.cos(progress * math.pi)
        rank = min_rank + int(torch.round((R - min_rank) * progress))
        return rank, R / rank

    return ranks


def constant(rank: int) -> Ranks:
    return lambda _: (rank, 1.0)


@dataclass(frozen=True)
class Layout:
    """How a trainer writes a T-LoRA, and what it means."""

    factors: str
    """vanilla, base (with the initial factors) or weight (they are those of the layer's weight)."""
    ranks: Ranks
    prefix: str = "lora_unet_"
    metadata: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)
    """Part in LyCORIS's layout -> the trainer's own."""
    names: str = "original"
    alpha: float | None = 4.0
    warns: bool = False
    source: str | None = None
    """What inspect says of the place of the schedule."""


def arguments(**values: str) -> dict[str, Any]:
    return {"ss_network_args": values}


BUFFERS = {"base_q": "base_q.weight", "base_p": "base_p.weight", "base_lambda": "base_lambda_buf"}
JSON = {"algo": "tlora", "linear_dim": R, "tlora_min_rank": 3, "tlora_alpha": 2.0}
LAYOUTS: dict[str, Layout] = {
    "simpletuner checkpoint": Layout(
        "weight",
        floored(3, 2.0),
        "lycoris_",
        {"lycoris_config": JSON},
        names="own",
        source="lycoris_config in",
    ),
    "simpletuner checkpoint with defaults": Layout(
        "weight",
        floored(1),
        "lycoris_",
        {"lycoris_config": {"algo": "tlora", "linear_dim": R}},
        names="own",
        source="lycoris_config in",
    ),
    "simpletuner final": Layout(
        "weight",
        floored(3, 2.0),
        "lycoris_",
        beside={"lycoris_config.json": json.dumps(JSON)},
        names="own",
        source="lycoris_config.json beside",
    ),
    "simpletuner beside another's json": Layout(
        "weight",
        floored(1),
        "lycoris_",
        names="own",
        warns=True,
        beside={"lycoris_config.json": json.dumps(JSON | {"linear_dim": 64})},
    ),
    "lycoris fork": Layout("base", floored(4), metadata=arguments(algo="tlora"), source="ss_network_args"),
    "lycoris fork with values": Layout(
        "base",
        floored(2, 0.5),
        metadata=arguments(algo="tlora", tlora_min_rank="2", tlora_mask_alpha="0.5", tlora_alpha="3"),
        source="ss_network_args",
    ),
    "lycoris fork, older name": Layout(
        "base", floored(4, 3.0), metadata=arguments(algo="tlora", tlora_alpha="3"), source="ss_network_args"
    ),
    "mask on locon": Layout(
        "vanilla",
        floored(4),
        metadata=arguments(algo="locon", use_timestep_mask="True"),
        source="use_timestep_mask",
    ),
    "mask on locon with values": Layout(
        "vanilla",
        floored(3, 2.0),
        source="use_timestep_mask",
        metadata=arguments(algo="lora", use_timestep_mask="true", tlora_min_rank="3", tlora_alpha="2.0"),
    ),
    "sd-scripts fork": Layout(
        "base",
        floored(2, 2.0),
        parts=BUFFERS,
        source="ss_tlora_min_rank",
        metadata={
            "ss_network_module": "networks.lora_tlora",
            "ss_tlora_min_rank": "2",
            "ss_tlora_init": "orthogonal",
            "ss_tlora_alpha_rank_scale": "2.0",
            "ss_tlora_max_timestep": "1000",
        },
    ),
    "sd-scripts fork, kaiming": Layout(
        "vanilla",
        floored(2),
        source="ss_tlora_min_rank",
        metadata={"ss_tlora_min_rank": "2", "ss_tlora_init": "kaiming", "ss_tlora_alpha_rank_scale": "1.0"},
    ),
    "sd-scripts fork without header": Layout("base", floored(1), parts=BUFFERS, warns=True),
    "lora-scripts": Layout(
        "vanilla",
        rounded(1, cosine=True),
        metadata={"ss_network_module": "networks.tlora"},
        source="networks.tlora",
    ),
    "lora-scripts with values": Layout(
        "vanilla",
        rounded(2, cosine=False),
        source="networks.tlora_flux",
        metadata={"ss_network_module": "networks.tlora_flux"}
        | arguments(tlora_min_rank="2", tlora_rank_schedule="linear", tlora_orthogonal_init="True"),
    ),
    "lora-scripts, header entries": Layout(
        "vanilla",
        rounded(2, cosine=False),
        source="ss_tlora_rank_schedule",
        metadata={"ss_tlora_min_rank": "2", "ss_tlora_rank_schedule": "linear"},
    ),
    "lycoris through kohya": Layout(
        "weight", constant(R), metadata=arguments(algo="tlora"), source="all ranks open"
    ),
    "prefix tlora": Layout("vanilla", floored(1), "tlora_", source="prefix tlora_"),
    "prefix tlora, factors": Layout("weight", floored(1), "tlora_", names="own", source="prefix tlora_"),
}


def weight_triplet(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
    return vh[:R], u[:, :R], s[None, :R]


@dataclass(frozen=True)
class Factors:
    """One layer's factors, the joined one's where the original joins layers."""

    q: Tensor
    p: Tensor
    values: Tensor
    base: tuple[Tensor, Tensor, Tensor] | None

    def delta(self, rank: int) -> Tensor:
        """The delta of the first ranks, without its scale."""
        gate = (torch.arange(R) < rank).double()
        q, p, values = self.q.double(), self.p.double(), self.values[0].double()
        if self.base is None:
            return (p * gate) @ q
        q0, p0, values0 = (each.double() for each in self.base)
        return (p * (values * gate)) @ q - (p0 * (values0[0] * gate)) @ q0


def random_factors(
    rows: int, size: int, layout: Layout, weight: Tensor, generator: torch.Generator
) -> Factors:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, p, values = normal(R, size), normal(rows, R), torch.rand(1, R, generator=generator) + 0.5
    if layout.factors == "vanilla":
        return Factors(q, p, torch.ones(1, R), None)
    if layout.factors == "base":
        return Factors(q, p, values, (normal(R, size), normal(rows, R), values.flip(1)))
    q0, p0, values0 = weight_triplet(weight)
    return Factors(
        (q0 + 0.1 * q).float(), (p0 + 0.1 * p).float(), (values0 + 0.1 * values).float(), (q0, p0, values0)
    )


def tensors_of(factors: Factors, layout: Layout, inputs: tuple[int, ...]) -> dict[str, Tensor]:
    kernel = (1,) * (len(inputs) - 1)
    if layout.factors == "vanilla":
        parts = {
            "lora_down.weight": factors.q.view(R, *inputs),
            "lora_up.weight": factors.p.view(-1, R, *kernel),
        }
    else:
        parts = {"q_layer.weight": factors.q, "p_layer.weight": factors.p, "lambda_layer": factors.values}
    if layout.factors == "base":
        assert factors.base is not None
        parts |= dict(zip(("base_q", "base_p", "base_lambda"), factors.base, strict=True))
    if layout.prefix == "lycoris_":  # the others keep a convolution's factors as matrices
        parts |= {
            "q_layer.weight": factors.q.view(R, *inputs),
            "p_layer.weight": factors.p.view(-1, R, *kernel),
        }
    if layout.alpha is not None:
        parts["alpha"] = torch.tensor(layout.alpha)
    return {layout.parts.get(part, part): tensor for part, tensor in parts.items()}


def build(family: str, layout: Layout) -> tuple[Made, dict[str, Callable[[int], Tensor]]]:
    """The file, and for each layer the delta of a number of ranks."""
    model, made = make(family), Made()
    generator = torch.Generator().manual_seed(1)
    deltas: dict[str, Callable[[int], Tensor]] = {}
    scale = 1.0 if layout.alpha is None else layout.alpha / R
    groups = LAYERS[family]
    if layout.names == "own":
        groups = {path: {path: 1} for parts in groups.values() for path in parts}
    for name, parts in groups.items():
        if layout.factors == "weight" and len(parts) > 1:
            continue  # the joined weight's triplets are those of no layer here
        rows, inputs, heights = shapes_of(model, parts)
        weight = model.get_submodule(next(iter(parts))).weight
        factors = random_factors(rows, math.prod(inputs), layout, weight, generator)
        key = f"{layout.prefix}{name.replace('.', '_')}"
        made.tensors |= {f"{key}.{part}": t for part, t in tensors_of(factors, layout, inputs).items()}
        for index, path in enumerate(parts):
            first = sum(heights[:index])
            taken = slice(first, first + heights[index])

            def rows_of(
                rank: int, f: Factors = factors, rows: slice = taken, i: tuple[int, ...] = inputs
            ) -> Tensor:
                return (f.delta(rank)[rows] * scale).view(-1, *i)

            deltas[path] = rows_of
    entries = layout.metadata.items()
    made.metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in entries}
    return made, deltas


def written(made: Made, layout: Layout, folder: Path) -> Path:
    for name, text in layout.beside.items():
        (folder / name).write_text(text)
    return made.save(folder / "a.safetensors")


def worst(model: Any, adapter: Any, deltas: Mapping[str, Callable[[int], Tensor]], ranks: Ranks) -> float:
    errors = []
    for timestep in TIMESTEPS:
        rank, gain = ranks(timestep)
        with adapter.rank_mask_for([timestep]):
            errors += [effect_error(model, path, delta(rank) * gain) for path, delta in deltas.items()]
    return max(errors)


@pytest.mark.parametrize("family", LAYERS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_file_acts_as_its_trainer_meant_it_at_every_timestep(
    family: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layout = LAYOUTS[name]
    made, deltas = build(family, layout)
    model = make(family)
    with caplog.at_level(logging.WARNING):
        adapter = load_adapter(model, written(made, layout, tmp_path))
    assert adapter.num_layers == len(deltas)
    assert ("states no rank schedule" in caplog.text) == layout.warns
    assert worst(model, adapter, deltas, layout.ranks) < TOLERANCE


@pytest.mark.parametrize("name", LAYOUTS)
def test_inspect_shows_the_schedule_and_where_it_stands(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    found = inspect(written(build("sdxl", layout)[0], layout, tmp_path))
    assert found.algorithm == "T-LoRA"
    assert found.ranks == {R: found.num_layers}
    if layout.warns:
        assert found.schedule is None
        assert any("--schedule" in each for each in found.missing)
        return
    assert found.schedule is not None
    assert layout.source is not None
    assert layout.source in str(found.schedule_source)
    assert layout.source in found.text()
    assert found.schedule["min_rank"] == layout.ranks(1000)[0]


def processors(names: Mapping[str, str], *, base: bool, prefix: str = "") -> tuple[dict[str, Tensor], Any]:
    """The authors' keys for layers of 32 features, and the delta of each by its number of ranks."""
    generator = torch.Generator().manual_seed(1)
    tensors, deltas = {}, {}
    for name, path in names.items():
        q, p, q0, p0 = (torch.randn(*s, generator=generator) for s in ((R, 32), (32, R)) * 2)
        values, values0 = (torch.rand(1, R, generator=generator) for _ in range(2))
        parts = {"down.weight": q, "up.weight": p}
        if base:
            parts = {
                "q_layer.weight": q,
                "p_layer.weight": p,
                "lambda_layer": values,
                "base_q.weight": q0,
                "base_p.weight": p0,
                "base_lambda": values0,
            }
        tensors |= {f"{prefix}{name}_lora.{part}": tensor for part, tensor in parts.items()}

        def delta(rank: int, f: Any = (q, p, values, q0, p0, values0)) -> Tensor:
            if not base:
                return f[1][:, :rank] @ f[0][:rank]
            product = (f[1] * f[2])[:, :rank] @ f[0][:rank]
            return product - (f[4] * f[5])[:, :rank] @ f[3][:rank]

        if path:
            deltas[path] = delta
    return tensors, deltas


DOUBLE = "transformer_blocks.1.attn"
SINGLE = "single_transformer_blocks.0.attn"
RELEASE = {
    **{f"{DOUBLE}.processor.to_{name}": f"{DOUBLE}.to_{name}" for name in "qkv"},
    **{f"{DOUBLE}.processor.to_{name}_proj": f"{DOUBLE}.add_{name}_proj" for name in "qkv"},
    f"{DOUBLE}.processor.to_out": f"{DOUBLE}.to_out.0",
    **{f"{SINGLE}.processor.to_{name}": f"{SINGLE}.to_{name}" for name in "qkv"},
    # Made by their processor and never called in a block without a context.
    f"{SINGLE}.processor.to_out": "",
    **{f"{SINGLE}.processor.to_{name}_proj": "" for name in "qkv"},
}


@pytest.mark.parametrize("base", [False, True], ids=["vanilla", "factors"])
def test_authors_names_of_context_projections_and_their_idle_layers(
    base: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors, deltas = processors(RELEASE, base=base)
    save_file(tensors, tmp_path / "a.safetensors")
    model = make("flux")
    with caplog.at_level(logging.WARNING):
        adapter = load_adapter(model, tmp_path / "a.safetensors")
    assert "4 layers are left out, which the authors' program never calls" in caplog.text
    assert caplog.text.count("states no rank schedule") == 1
    assert adapter.num_layers == 10
    assert worst(model, adapter, deltas, floored(1)) < TOLERANCE


def test_authors_options_beside_the_file_are_its_schedule(tmp_path: Path) -> None:
    tensors, deltas = processors(RELEASE, base=False)
    save_file(tensors, tmp_path / "a.safetensors")
    (tmp_path / "hparams.yml").write_text("alpha_rank_scale: 2.0\nlora_rank: 8\nmin_rank: 4\n")
    model = make("flux")
    adapter = load_adapter(model, tmp_path / "a.safetensors")
    assert worst(model, adapter, deltas, floored(4, 2.0)) < TOLERANCE


@pytest.mark.parametrize("family", LAYERS)
def test_namesake_scheduled_by_steps_keeps_its_last_rank_at_every_timestep(
    family: str, tmp_path: Path
) -> None:
    made, deltas = build(family, Layout("vanilla", constant(R), alpha=None))
    for key in [key for key in made.tensors if key.endswith("lora_up.weight")]:
        name = key.removesuffix("lora_up.weight")
        made.tensors |= {
            f"{name}tlora_current_rank": torch.tensor(5),
            f"{name}tlora_min_rank": torch.tensor(2),
            f"{name}tlora_max_rank": torch.tensor(R),
            f"{name}tlora_alpha": torch.tensor(16.0),
        }
    made.metadata = {
        "ss_network_module": "networks.tlora",
        "ss_network_args": json.dumps({"tlora_rank_schedule": "linear"}),
    }
    model = make(family)
    adapter = load_adapter(model, made.save(tmp_path / "a.safetensors"))
    assert adapter.tlora_config is None
    for path, delta in deltas.items():
        assert effect_error(model, path, delta(5) * (16 / 5)) < TOLERANCE


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        ({"min_rank": 2}, floored(2)),
        ({"min_rank": 2, "alpha": 0.5}, floored(2, 0.5)),
        ({"kind": "cosine"}, rounded(1, cosine=True)),
        ({"min_rank": R}, constant(R)),
    ],
    ids=["minimum", "minimum and exponent", "kind", "every rank"],
)
def test_schedule_that_the_user_gives_replaces_the_files(
    options: dict[str, Any], ranks: Ranks, tmp_path: Path
) -> None:
    tensors, deltas = processors(RELEASE, base=True)
    save_file(tensors, tmp_path / "a.safetensors")
    model = make("flux")
    adapter = load_adapter(model, tmp_path / "a.safetensors", schedule=options)
    assert worst(model, adapter, deltas, ranks) < TOLERANCE


def test_schedule_makes_a_standard_lora_a_masked_one_and_keeps_stated_values(tmp_path: Path) -> None:
    plain = Layout("vanilla", floored(3))
    made, deltas = build("sdxl", plain)
    model = make("sdxl")
    adapter = load_adapter(model, made.save(tmp_path / "a.safetensors"), schedule={"min_rank": 3})
    assert worst(model, adapter, deltas, floored(3)) < TOLERANCE
    stated, stated_deltas = build("flux2", LAYOUTS["sd-scripts fork"])
    model = make("flux2")
    adapter = load_adapter(model, stated.save(tmp_path / "b.safetensors"), schedule={"min_rank": 5})
    assert worst(model, adapter, stated_deltas, floored(5, 2.0)) < TOLERANCE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_rank": 99}, "min_rank 99"),
        ({"min_rank": 0}, "min_rank 0"),
        ({"min_rank": 2.5}, "whole"),
        ({"alpha": -1.0}, "alpha"),
        ({"kind": "square"}, "square"),
        ({"kind": "cosine", "alpha": 2.0}, "alpha"),
        ({"steps": 3}, "schedule"),
    ],
)
def test_invalid_schedule_is_refused_in_one_line(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tensors, _ = processors(RELEASE, base=True)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=message) as caught:
        load_adapter(make("flux"), tmp_path / "a.safetensors", schedule=options)
    assert "\n" not in str(caught.value)


def test_schedule_of_an_algorithm_without_ranks_in_a_row_is_refused(tmp_path: Path) -> None:
    tensors = {
        f"lora_unet_double_blocks_0_img_mlp_0.hada_{name}": torch.ones(4, 4)
        for name in ("w1_a", "w1_b", "w2_a", "w2_b")
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="hada_w1_a"):
        load_adapter(make("flux"), tmp_path / "a.safetensors", schedule={"min_rank": 1})


HOSTILE: dict[str, tuple[dict[str, str], str]] = {
    "words for numbers": ({"ss_tlora_min_rank": "many"}, "schedule that it states"),
    "endless exponent": ({"ss_tlora_min_rank": "1", "ss_tlora_alpha_rank_scale": "inf"}, "alpha"),
    "endless time": ({"ss_tlora_min_rank": "1", "ss_tlora_max_timestep": "1e999"}, "schedule that it states"),
    "unknown kind": (
        {"ss_network_module": "networks.tlora", "ss_network_args": '{"tlora_rank_schedule": "geometric"}'},
        "geometric",
    ),
    "arguments that are a list": ({"ss_network_args": "[]"}, "list"),
    "arguments that are no json": ({"ss_network_args": "{"}, "not JSON"),
    "negative exponent": ({"ss_network_args": '{"algo": "tlora", "tlora_alpha": "-2"}'}, "alpha"),
}


@pytest.mark.parametrize("damage", HOSTILE)
def test_header_with_an_impossible_schedule_is_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    header, message = HOSTILE[damage]
    made, _ = build("sdxl", Layout("base", floored(1)))
    made.metadata = header
    with pytest.raises(AdapterError, match=message) as caught:
        load_adapter(make("sdxl"), made.save(tmp_path / "a.safetensors"))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ["[]", "{", '{"algo": "tlora", "linear_dim": 8, "tlora_alpha": "big"}'])
def test_damaged_json_beside_a_file_is_named(text: str, tmp_path: Path) -> None:
    made, _ = build("sdxl", LAYOUTS["simpletuner final"])
    (tmp_path / "lycoris_config.json").write_text(text)
    with pytest.raises(AdapterError, match=r"lycoris_config\.json|tlora_alpha") as caught:
        load_adapter(make("sdxl"), made.save(tmp_path / "a.safetensors"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("header", "base", "min_rank"),
    [
        ({"algo": "tlora"}, True, 3),
        ({"algo": "locon", "use_timestep_mask": "true"}, False, 2),
        ({"algo": "tlora", "use_timestep_mask": "true"}, True, 3),
    ],
    ids=["rounded up", "rounded down", "the mask of a locon is none of factors"],
)
def test_half_of_an_odd_rank_is_rounded_as_each_trainer_does(
    header: dict[str, str], base: bool, min_rank: int, tmp_path: Path
) -> None:
    factors = {
        "q_layer.weight": (5, 32),
        "p_layer.weight": (32, 5),
        "lambda_layer": (1, 5),
        "base_q": (5, 32),
    }
    shapes = factors if base else {"lora_down.weight": (5, 32), "lora_up.weight": (32, 5)}
    tensors = {
        f"lora_unet_mid_block_attentions_0_proj_in.{part}": torch.ones(shape)
        for part, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"ss_network_args": json.dumps(header)})
    found = inspect(tmp_path / "a.safetensors")
    assert found.schedule is not None
    assert found.schedule["min_rank"] == min_rank
