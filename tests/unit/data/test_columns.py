"""Texts in one piece of memory, and sequences of items that are made when they are asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.helpers.data import columns
from simpletuner.helpers.data.columns import Lazy, Texts, in_pieces, is_everything, joined

NAMES = ["", "a.jpg", "ü/🐈.png", "\udcff.jpg", "\ud800"]


@given(st.lists(st.text(st.characters(exclude_characters="\0"))))
def test_texts_are_given_back(texts: list[str]) -> None:
    column = Texts.of(texts)
    assert list(column) == [column[row] for row in range(len(texts))] == texts
    assert column.is_same(Texts.of(iter(texts)))


def test_texts_hold_names_that_are_not_utf8_and_pieces_end_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_PIECE", 2)
    column = Texts.of(NAMES)
    assert list(column) == NAMES
    assert (column[-1], column[1:3]) == (NAMES[-1], NAMES[1:3])
    assert list(column.take(np.array([3, 1]))) == [NAMES[3], NAMES[1]]
    assert list(in_pieces(np.arange(10).reshape(5, 2))) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert not column.is_same(Texts.of(NAMES[:4]))
    with pytest.raises(IndexError):
        column[5]


def test_a_nul_in_a_text_and_a_text_without_end_are_errors() -> None:
    with pytest.raises(ValueError, match="NUL"):
        Texts.of(["a\0b"])
    with pytest.raises(ValueError, match="no end"):
        Texts(np.frombuffer(b"a", np.uint8))


def test_a_lazy_sequence_is_equal_to_what_it_makes() -> None:
    squares = Lazy(4, lambda row: row * row)
    assert squares == (0, 1, 4, 9)
    assert squares != (0, 1, 4, 8)
    assert squares[1:3] == (1, 4)
    assert squares[-1] == 9
    assert list(squares) == [0, 1, 4, 9]


def test_sequences_are_joined_where_one_of_them_is_empty() -> None:
    assert list(joined([[1, 2], [], [3]])) == [1, 2, 3]
    assert joined([[1, 2], [], [3]])[2] == 3
    assert len(joined([])) == 0


def test_only_all_positions_in_order_are_everything() -> None:
    assert is_everything(np.arange(3), 3)
    assert not is_everything(np.array([0, 2, 1]), 3)
    assert not is_everything(np.arange(2), 3)
