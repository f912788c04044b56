"""What targets and algorithms adapt on models of real size, and the page that says it."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
from torch import nn

from simpletuner.helpers.adapters.network import LycorisAdapter
from simpletuner.helpers.configuration.loading.building import Source
from simpletuner.helpers.configuration.loading.lycoris_file import read_lycoris
from simpletuner.helpers.configuration.schema.base import PathContext
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig
from simpletuner.helpers.configuration.text.problems import Problems
from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.models.flux import spec as flux
from simpletuner.helpers.models.flux2 import spec as flux2
from simpletuner.helpers.models.sdxl import spec as sdxl
from simpletuner.lycoris_defaults import default_lycoris_config
from tests.integration.layer_table import (
    ALGORITHMS,
    MODELS,
    PAGE,
    TLORA,
    algorithms_of,
    jsons_of,
    lycoris,
    sides_of,
    tables,
)

SDXL, FLUX, FLUX2_DEV, KLEIN_4B, KLEIN_9B = MODELS
GENERIC = {"target_module": ["Attention", "FeedForward"]}


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.title)
def test_the_sides_and_the_size_that_a_family_states_are_its_models(model: Any) -> None:
    for flavour in model.flavours:
        stated = dict(model.spec.layer_sides[flavour])
        if flavour == "schnell":  # the only one here whose embedding has no guidance
            stated["CombinedTimestepGuidanceTextProjEmbeddings"] = stated.pop(
                "CombinedTimestepTextProjEmbeddings"
            )
        assert stated == sides_of(model)
        number = sum(weight.numel() for weight in model.denoiser.parameters())
        assert model.spec.num_weights[flavour] == pytest.approx(number, rel=0.02)


def test_tables_of_the_page_are_what_the_code_makes() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, right in tables(page).items():
        found = re.search(rf"<!-- table: {name} -->.*?<!-- end -->", page, re.DOTALL)
        assert found is not None
        assert found[0] == right, "run: python tests/integration/layer_table.py"


def test_every_flavour_of_the_families_has_a_model() -> None:
    for spec in (sdxl.SPEC, flux.SPEC, flux2.SPEC):
        named = [flavour for model in MODELS if model.spec is spec for flavour in model.flavours]
        assert sorted(named) == sorted(spec.flavours)


@pytest.mark.parametrize(
    ("model", "targets", "layers", "parameters"),
    [
        (SDXL, ["Attention", "FeedForward"], 700, 167_489_280),
        (FLUX, ["Attention"], 57 * 8 - 38 * 5, None),
        (FLUX, ["FeedForward"], 38 * 2 + 38 * 2, None),
        (FLUX, ["FluxTransformerBlock", "FluxSingleTransformerBlock"], 494, 343_700_000),
        (FLUX2_DEV, ["Attention", "FeedForward"], 192, 402_665_472),
        (FLUX2_DEV, ["FeedForward"], 8 * 4, None),
        (KLEIN_4B, ["Attention", "FeedForward"], 100, 96_300_000),
        (KLEIN_9B, ["Attention", "FeedForward"], 144, 174_100_000),
    ],
    ids=lambda value: value.title if value in MODELS else None,
)
def test_targets_adapt_the_layers_that_they_name(
    model: Any, targets: list[str], layers: int, parameters: int | None
) -> None:
    count = lycoris(TLORA | {"apply_preset": {"target_module": targets}}, model.denoiser, model.spec)
    assert count.layers == layers
    assert parameters is None or count.parameters == pytest.approx(parameters, rel=1e-3)


def test_flavour_without_guidance_has_the_same_layers_among_its_targets() -> None:
    values = TLORA | {"apply_preset": GENERIC}
    counts = {lycoris(values, FLUX.make(guidance_embeds=given), FLUX.spec) for given in (True, False)}
    assert len(counts) == 1


@pytest.mark.parametrize(
    ("model", "least"),
    [(SDXL, 10), (FLUX, 6), (FLUX2_DEV, 54), (KLEIN_4B, 54), (KLEIN_9B, 18)],
    ids=lambda value: value.title if value in MODELS else None,
)
def test_boft_needs_the_block_that_the_page_says(model: Any, least: int) -> None:
    values = default_lycoris_config("boft") | {"linear_dim": least}
    assert lycoris(values, model.denoiser, model.spec).layers > 0
    with pytest.raises(ConfigError, match=rf"impossible to decompose.*Raise linear_dim to {least}, "):
        lycoris(values | {"linear_dim": least - 1}, model.denoiser, model.spec)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_json_of_an_algorithm_is_its_default(algo: str) -> None:
    assert algorithms_of(PAGE.read_text(encoding="utf-8"))[algo] == default_lycoris_config(algo)


def read(values: dict[str, Any]) -> LycorisConfig:
    problems = Problems()
    place = Source(problems, lambda _: "lycoris.json", PathContext())
    config = read_lycoris(values, place, raw=values)
    problems.raise_if_any()
    assert config is not None
    return config


@pytest.mark.parametrize(
    "values", jsons_of(PAGE.read_text(encoding="utf-8")), ids=lambda values: str(values["algo"])
)
def test_every_json_of_the_page_is_read(values: dict[str, Any]) -> None:
    assert read(values).algo == values["algo"]


def test_example_of_ranks_by_name_does_what_the_page_says() -> None:
    denoiser = FLUX.make()
    adapter = LycorisAdapter.create(
        denoiser, read(jsons_of(PAGE.read_text(encoding="utf-8"))[-1]), spec=FLUX.spec, seed=0
    )
    paths = {id(module): path for path, module in denoiser.named_modules() if isinstance(module, nn.Linear)}
    ranks: dict[int, list[str]] = {}
    for layer in adapter.network.loras:
        ranks.setdefault(layer.lora_dim, []).append(paths[id(layer.org_module[0])])
    # 17 double blocks of 8 projections and 4 feed-forward layers, 38 single ones of 3 projections.
    assert Counter({rank: len(found) for rank, found in ranks.items()}) == {
        32: 17 * 7 + 38 * 2,
        16: 17 + 38,
        8: 17 * 4,
    }
    assert all(".attn." in path for path in ranks[32])
    assert all(path.endswith(".to_q") for path in ranks[16])
    assert all(".ff" in path for path in ranks[8])
    adapted = {path.rsplit(".attn")[0] for path in ranks[32]}
    assert not adapted & {"transformer_blocks.0", "transformer_blocks.1"}
    assert "single_transformer_blocks.0" in adapted
