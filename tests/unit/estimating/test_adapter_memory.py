"""The configured adapter as the memory model counts it, against the tables of lycoris.md.

Another test holds those tables equal to the real adapters on models of real size.
"""

from __future__ import annotations

import json
import re
from math import prod
from pathlib import Path
from typing import Any

import pytest

from simpletuner.helpers.contracts import Size
from simpletuner.helpers.estimating.adapter_memory import adapter_of
from simpletuner.helpers.estimating.step_memory import adapter_shapes
from simpletuner.helpers.models.registry import memory_of, specs
from tests.unit.estimating.conftest import Example

PAGE = Path(__file__).resolve().parents[3] / "documentation" / "lycoris.md"
# Title in the tables -> example, flavour.
MODELS = {
    "SDXL": ("sdxl-tlora-paper", "base-1.0"),
    "Flux.1": ("flux-dev-tlora", "dev"),
    "Flux.2 dev": ("flux2-dev-tlora", "dev"),
    "Flux.2 Klein 4B": ("flux2-klein-4b-tlora", "klein-base-4b"),
    "Flux.2 Klein 9B": ("flux2-klein-9b-tlora", "klein-base-9b"),
}
TEXT = PAGE.read_text(encoding="utf-8")
JSONS = {
    values["algo"]: values
    for values in reversed([json.loads(each) for each in re.findall(r"```json\n(.+?)```", TEXT, re.DOTALL)])
}


def rows(name: str) -> list[list[str]]:
    """The rows of a table of the page below its head."""
    table = TEXT.partition(f"<!-- table: {name} -->")[2].partition("<!-- end -->")[0]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.strip().splitlines()]


def algorithm_cells() -> list[tuple[str, str, float]]:
    """(title, algorithm, millions of parameters)."""
    head, _, *body = rows("algorithms")
    return [
        (title, algo.strip("`"), float(cell.removesuffix(" M")))
        for algo, *cells in body
        for title, cell in zip(head[1:], cells, strict=True)
        if cell != "none"
    ]


def layer_cells() -> list[tuple[str, str, float]]:
    """(title, targets, millions of parameters)."""
    found, title = [], ""
    for model, targets, _, parameters in rows("layers")[2:]:
        title = model.rpartition(",")[0] or title
        found.append((title, targets, float(parameters.removesuffix(" M"))))
    return found


def counted(example: Example, title: str, *overrides: str) -> float:
    """Millions of parameters that the memory model counts."""
    name, flavour = MODELS[title]
    run = example(name, "base_model_precision=no_change", *overrides)
    memory = memory_of(run.model.model_family)
    assert memory is not None
    layout = memory.layout(memory.PUBLISHED[flavour], size=Size(64, 64), text_tokens=77)
    spec = specs()[run.model.model_family]
    shapes = adapter_shapes(layout, adapter_of(run, spec, layout=layout, paths=memory.BLOCK_PATHS))
    return sum(prod(shape) * number for shape, number in shapes.items()) / 1e6


@pytest.mark.parametrize(("title", "algo", "millions"), algorithm_cells())
def test_an_algorithm_trains_the_parameters_of_its_table(
    example: Example, tmp_path: Path, title: str, algo: str, millions: float
) -> None:
    file = tmp_path / "lycoris.json"
    file.write_text(json.dumps(JSONS[algo]))
    assert counted(example, title, f"lycoris_config={file}") == pytest.approx(millions, rel=0.01, abs=0.06)


@pytest.mark.parametrize(("title", "targets", "millions"), layer_cells())
def test_targets_have_the_parameters_of_their_table(
    example: Example, tmp_path: Path, title: str, targets: str, millions: float
) -> None:
    names = [each.strip("` ") for each in targets.split(",")]
    if names[0] == "standard":
        family = specs()[example(MODELS[title][0]).model.model_family]
        modules = family.lora_presets[names[1]] if len(names) > 1 else family.lora_targets
        overrides = ["lora_type=standard", "lora_rank=64", f"peft_lora_target_modules={','.join(modules)}"]
    else:
        file = tmp_path / "lycoris.json"
        values = JSONS["tlora"] | {"linear_dim": 64, "apply_preset": {"target_module": names}}
        file.write_text(json.dumps(values))
        overrides = [f"lycoris_config={file}"]
    found = counted(example, title, *overrides)
    if names[-1] in ("tiny", "nano"):  # layers of named blocks, which are counted in every block
        assert found > millions
    else:
        assert found == pytest.approx(millions, rel=0.01, abs=0.06)


@pytest.mark.parametrize(
    ("preset", "same"),
    [
        ({"target_name": [".*attn.*"]}, {"target_module": ["Attention"]}),
        ({"target_name": [".*?\\.ff"]}, {"target_module": ["FeedForward"]}),
        ({"target_name": ["*.ff.*"], "use_fnmatch": True}, {"target_module": ["FeedForward"]}),
        # Blocks with numbers are not followed: all targets count.
        ({"target_name": ["up_blocks\\.1\\..*attn1"]}, {"target_module": ["Attention", "FeedForward"]}),
    ],
)
def test_patterns_of_paths_are_those_of_lycoris(
    example: Example, tmp_path: Path, preset: dict[str, Any], same: dict[str, Any]
) -> None:
    found = []
    for each in (preset, same):
        file = tmp_path / "lycoris.json"
        file.write_text(json.dumps(JSONS["tlora"] | {"apply_preset": each}))
        found.append(counted(example, "SDXL", f"lycoris_config={file}"))
    assert found[0] == found[1] > 0


def test_a_regular_expression_of_peft_is_one_of_whole_paths(example: Example) -> None:
    def of(targets: str) -> float:
        return counted(example, "SDXL", "lora_type=standard", f"peft_lora_target_modules={targets}")

    assert of(r".*\.attn[12]\.to_(q|k)$") == of("to_q,to_k") > 0
    assert of(r"attn1\.to_q") > of("to_q")  # no whole path: all targets count


def test_a_whole_matrix_of_lokr_is_not_split(example: Example, tmp_path: Path) -> None:
    found = []
    for changes in ({}, {"linear_dim": 8, "full_matrix": True}, {"linear_dim": 8}):
        file = tmp_path / "lycoris.json"
        file.write_text(json.dumps(JSONS["lokr"] | changes))
        found.append(counted(example, "SDXL", f"lycoris_config={file}"))
    assert found[0] == found[1] > found[2]
