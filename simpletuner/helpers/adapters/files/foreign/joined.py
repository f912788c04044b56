"""Take the rows of one layer from an adapter's layer that other programs join.

Shapes: O rows (out features) of the joined layer, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from simpletuner.helpers.adapters.files.foreign.layer_names import Target
from simpletuner.helpers.adapters.files.scales import scale_of
from simpletuner.helpers.errors import AdapterError

# Parts whose first axis is the output, and parts that every layer of the joined one shares.
OUTPUT_PARTS = ("lora_up.weight", "hada_w1_a", "hada_w2_a", "p_layer.weight", "base_p", "diff", "diff_b")
SHARED_PARTS = (
    *("lora_down.weight", "hada_w1_b", "hada_w2_b", "alpha", "tlora_schedule"),
    *("q_layer.weight", "lambda_layer", "base_q", "base_lambda"),
)


def take_rows(name: str, parts: Mapping[str, Tensor], target: Target) -> dict[str, Tensor]:
    """The parts of one layer; unchanged if the file's layer stands for it alone.

    Raises:
        AdapterError: The parts cannot be divided by rows.
    """
    if target.num_pieces == 1:
        return dict(parts)
    if "lokr_w1" in parts or "lokr_w1_a" in parts:
        return _lokr_rows(name, parts, target)
    num_rows = next((parts[key].shape[0] for key in OUTPUT_PARTS if key in parts), 0)
    taken = {}
    for part, tensor in parts.items():
        if part in OUTPUT_PARTS:
            taken[part] = _rows(name, tensor, target)
        elif part == "dora_scale":
            taken[part] = _rows(name, _on_output(name, tensor, num_rows), target)
        elif part in SHARED_PARTS:
            taken[part] = tensor
        else:
            raise AdapterError(f"{name} joins several layers, and {part} cannot be divided between them.")
    return taken


def _on_output(name: str, scale: Tensor, num_rows: int) -> Tensor:
    if scale.shape[0] != num_rows:
        raise AdapterError(
            f"{name} joins several layers, and its dora_scale of shape {tuple(scale.shape)} is one magnitude "
            "per input over all of them, which no part has by itself. Convert the file with its own program."
        )
    return scale


def _rows(name: str, tensor: Tensor, target: Target) -> Tensor:
    if tensor.shape[0] % target.num_pieces:
        raise AdapterError(
            f"{name} has {tensor.shape[0]} rows, which are not {target.num_pieces} equal pieces. "
            "The file is for a model of another width."
        )
    pieces = tensor.reshape(target.num_pieces, -1, *tensor.shape[1:])
    return pieces[list(target.pieces)].flatten(0, 1)


def _lokr_rows(name: str, parts: Mapping[str, Tensor], target: Target) -> dict[str, Tensor]:
    """Rows of w1 where they divide: row i * o2 + j of the product is row i of w1 with row j of w2."""
    if "dora_scale" in parts:
        raise AdapterError(
            f"{name} joins several layers: a LoKr's dora_scale cannot be divided between them."
        )
    first = "lokr_w1" if "lokr_w1" in parts else "lokr_w1_a"
    if parts[first].shape[0] % target.num_pieces == 0:
        return dict(parts) | {first: _rows(name, parts[first], target)}
    return {"diff": _rows(name, lokr_delta(parts), target)}


def lokr_delta(parts: Mapping[str, Tensor]) -> Tensor:
    """The dense delta of a LoKr of a linear layer, [O, I] float32, with its scale.

    Source: LyCORIS, arXiv:2309.14859, LoKr; the scale is 1 where both factors are whole.
    """
    factors = []
    for which in ("w1", "w2"):
        whole = parts.get(f"lokr_{which}")
        if whole is None:
            a, b = parts[f"lokr_{which}_a"].float(), parts[f"lokr_{which}_b"].float()
            whole = a @ b
        factors.append(whole.float())
    return torch.kron(factors[0], factors[1]) * scale_of(parts)
