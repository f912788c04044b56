"""The layers that a name of another program stands for."""

from __future__ import annotations

from simpletuner.helpers.adapters.files.foreign.layer_names import Target, find, targets_by_name
from tests.unit.adapters.files.foreign.makers import make

ATTENTION = "transformer_blocks.1.attn"


def test_name_of_a_joined_layer_stands_for_its_parts_and_a_number_for_one_of_them() -> None:
    names = targets_by_name(make("flux"))
    parts = [Target(f"{ATTENTION}.to_{letter}", (index,), 3) for index, letter in enumerate("qkv")]
    assert find(names, "double_blocks.1.img_attn.qkv") == parts
    assert find(names, "double_blocks.1.img_attn.qkv.2") == [Target(f"{ATTENTION}.to_v")]
    assert find(names, "double_blocks_1_img_attn_qkv_3") == ()


def test_layer_of_its_own_has_no_numbered_parts() -> None:
    names = targets_by_name(make("flux"))
    assert find(names, "img_in") == find(names, "img_in.proj") == find(names, "x_embedder")
    assert find(names, "img_in.0") == ()
