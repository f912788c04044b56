"""Keys of a compiled denoiser: what is read, and what they are refused with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Workspace

OFFLOAD = {"enable_group_offload": True, "group_offload_type": "leaf_level", "gradient_checkpointing": True}
ROUTES = {"tread_config": {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 0, "end_layer_idx": 1}]}}


@pytest.mark.parametrize(
    ("given", "read"),
    [("INDUCTOR", "inductor"), ("aot_eager", "aot_eager"), ("no", "no"), (None, "no"), ("", "no")],
)
def test_a_backend_is_read_as_accelerate_writes_it(workspace: Workspace, given: object, read: str) -> None:
    assert workspace.load(dynamo_backend=given).compiling.dynamo_backend == read


@pytest.mark.parametrize("key", ["dynamo_mode", "validation_torch_compile_mode"])
def test_modes_with_cuda_graphs_become_those_without(workspace: Workspace, key: str) -> None:
    for given, read in {
        "": "default",
        "reduce-overhead": "default",
        "max-autotune": "max-autotune-no-cudagraphs",
    }.items():
        assert getattr(workspace.load(**{key: given}).compiling, key) == read
    assert f"{key} " in workspace.problems(**{key: "fastest"})


@pytest.mark.parametrize("others", [OFFLOAD, ROUTES], ids=["enable_group_offload", "tread_config"])
@pytest.mark.parametrize(
    ("key", "value"), [("dynamo_backend", "inductor"), ("validation_torch_compile", True)]
)
def test_what_changes_within_a_block_is_refused_at_the_key(
    workspace: Workspace, others: dict[str, object], key: str, value: object
) -> None:
    workspace.load(**others)
    problems = workspace.problems(**others, **{key: value})
    assert ": 1 problem\n" in problems
    assert f"{key} " in problems
    assert next(iter(others)) in problems
