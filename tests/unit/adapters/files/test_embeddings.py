"""Files of new tokens, of this program and of others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from simpletuner.helpers.adapters.files import adapter_file, embeddings
from simpletuner.helpers.errors import AdapterError

ROWS = torch.arange(6.0).reshape(2, 3)


def write(path: Path, tensors: dict[str, Tensor], **header: str) -> Path:
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path, header)
    return path


def test_a_written_file_has_the_keys_of_other_programs_and_what_was_written(tmp_path: Path) -> None:
    file = tmp_path / "learned.safetensors"
    own = {"placeholder_token": "<cat>", "initializer_token": "cat"}
    metadata = {**own, "ss_seed": "1", "modelspec.title": "t"}
    embeddings.write(file, {"text_encoder": ROWS, "text_encoder_2": ROWS + 1}, metadata=metadata)
    with safe_open(file, "pt") as opened:
        assert set(opened.keys()) == {"clip_l", "clip_g"}
        assert set(opened.metadata()) == {"format", *own}
    stored = embeddings.read(file)
    assert (stored.token, stored.initializer) == ("<cat>", "cat")
    assert torch.equal(stored.rows["text_encoder"], ROWS)
    assert torch.equal(stored.rows["text_encoder_2"], ROWS + 1)
    assert embeddings.is_embeddings(adapter_file.read(file, takes_embeddings=True))
    with pytest.raises(AdapterError, match="embeddings of a new token and no adapter"):
        adapter_file.read(file)


@pytest.mark.parametrize("rows", [ROWS, ROWS[0], ROWS.half()], ids=["several", "one", "half"])
@pytest.mark.parametrize(
    ("key", "token", "expected"),
    [("<dog>", None, "<dog>"), ("<dog>", "<cat>", "<cat>"), ("emb_params", "<cat>", "<cat>")],
    ids=["own token", "another token", "kohya"],
)
def test_a_file_of_one_text_encoder_is_read(
    tmp_path: Path, rows: Tensor, key: str, token: str | None, expected: str
) -> None:
    stored = embeddings.read(write(tmp_path / "a.safetensors", {key: rows}), token=token)
    assert stored.token == expected
    assert stored.initializer is None
    assert torch.equal(stored.rows[""], rows.float().reshape(-1, 3))


@pytest.mark.parametrize("header", [{}, {"placeholder_token": "{env:WORD}"}], ids=["none", "hidden"])
def test_a_file_without_a_token_needs_one(tmp_path: Path, header: dict[str, str]) -> None:
    file = write(tmp_path / "a.safetensors", {"clip_l": ROWS, "clip_g": ROWS}, **header)
    with pytest.raises(AdapterError, match=r"does not name its token. Give it as a.safetensors=<token>"):
        embeddings.read(file)
    assert embeddings.read(file, token="<cat>").token == "<cat>"


def test_an_initializer_that_is_hidden_is_none(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", {"<cat>": ROWS}, initializer_token="{env:WORD}")
    assert embeddings.read(file).initializer is None


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"a.lora_up.weight": ROWS, "a.lora_down.weight": ROWS},
            "no embeddings .*, but a.lora_down",
        ),
        ({"clip_l": ROWS, "other": ROWS}, "no embeddings of a new token"),
        ({"<cat>": ROWS[None]}, r"shape \(1, 2, 3\)"),
        ({"clip_l": ROWS * float("nan")}, "not finite"),
    ],
    ids=["adapter", "more keys", "axes", "nan"],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        embeddings.read(write(tmp_path / "a.safetensors", tensors), token="<cat>")


@pytest.mark.parametrize("name", ["a.pt", "a.bin"])
def test_a_pickle_is_never_opened(tmp_path: Path, name: str) -> None:
    torch.save({"string_to_param": {"*": ROWS}}, tmp_path / name)
    with pytest.raises(AdapterError, match="never opened"):
        embeddings.read(tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such file"):
        embeddings.read(tmp_path / "a.safetensors")
