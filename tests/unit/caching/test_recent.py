"""What was read recently stays up to a limit; the least recently used goes first."""

from __future__ import annotations

from simpletuner.helpers.caching.recent import RecentlyRead


def test_the_least_recently_used_makes_room() -> None:
    kept = RecentlyRead[str](max_bytes=20)
    for key in ("a", "b"):
        kept.keep(key, key.upper(), num_bytes=10)
    assert kept.get("a") == "A"
    kept.keep("c", "C", num_bytes=10)
    assert [kept.get(key) for key in "abc"] == ["A", None, "C"]
    kept.keep("d", "D", num_bytes=20)
    assert [kept.get(key) for key in "acd"] == [None, None, "D"]


def test_what_is_above_the_limit_is_not_kept() -> None:
    kept = RecentlyRead[str](max_bytes=10)
    kept.keep("a", "A", num_bytes=10)
    kept.keep("b", "B", num_bytes=11)
    assert [kept.get(key) for key in "ab"] == ["A", None]
    kept.keep("a", "again", num_bytes=10)
    assert kept.get("a") == "A"
