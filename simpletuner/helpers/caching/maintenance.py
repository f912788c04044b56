"""Looks through the folders of a cache, checks every entry, and packs what is worth keeping."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Set
from dataclasses import dataclass, field
from pathlib import Path

from simpletuner.helpers.caching import store as limits
from simpletuner.helpers.caching.shard_folder import excluded_keys, exclusions_file, shard_names
from simpletuner.helpers.caching.shards import ShardIndex, read_about, read_index
from simpletuner.helpers.caching.single_files import SingleFiles
from simpletuner.helpers.caching.store import TensorStore
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.faults import storage_error


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreStats:
    """What a store's folder holds."""

    folder: Path
    entries: int
    """Distinct keys with an entry that is not known to be damaged."""
    repeated: int
    """Further entries of the same keys, as of two runs that encoded at once."""
    damaged: int
    """Entries that were found damaged, of shards that can be read."""
    shards: int
    unreadable_shards: int
    """Those of the shards that cannot be read; they count as empty."""
    single_files: int
    """Entries in files of their own, as earlier versions wrote them."""
    num_bytes: int


@dataclass(kw_only=True, slots=True)
class Pruned:
    """What `prune` did in one folder."""

    folder: Path
    removed: int = 0
    """Entries that are gone: unused, repeated or damaged."""
    packed: int = 0
    """Entries that moved to another shard."""
    freed_bytes: int = 0


@dataclass(slots=True)
class _Packing:
    """Which shards stay as they are, and which entries of the others move."""

    moved: dict[Path, list[str]] = field(default_factory=dict)
    """Shard -> keys to keep of it."""
    seen: set[str] = field(default_factory=set)
    removed: int = 0


def stores_under(folder: Path) -> list[Path]:
    """The folders of stores in a folder and below it.

    Raises:
        DataError: There are none.
    """
    found = [Path(path) for path, *_ in os.walk(folder) if _is_store(Path(path))]
    if not found:
        raise DataError(
            f"{folder}: no cache is there. Give the folder of cache_dir_vae or cache_dir_text, or one above."
        )
    return sorted(found)


def stats(folder: Path) -> StoreStats:
    """Count what a store's folder holds; only headers are read.

    Raises:
        DataError: A shard cannot be read.
    """
    keys: list[str] = []
    damaged = 0
    indexes = _indexes(folder)
    for shard, index in indexes.items():
        excluded, own = set(excluded_keys(shard)), set(index or ())
        damaged += len(own & excluded)
        keys += own - excluded
    singles = SingleFiles(folder).found()
    distinct = singles.union(keys)
    return StoreStats(
        folder=folder,
        entries=len(distinct),
        repeated=len(keys) + len(singles) - len(distinct),
        damaged=damaged,
        shards=len(indexes),
        unreadable_shards=sum(index is None for index in indexes.values()),
        single_files=len(singles),
        num_bytes=_size_of(folder),
    )


def unreadable_shards(folder: Path) -> list[str]:
    """The names of the shards that are cut short or have a damaged header; their entries count as missing."""
    return [shard.name for shard, index in _indexes(folder).items() if index is None]


def verify(folder: Path) -> list[str]:
    """Read every entry of a store; the keys of those that are damaged, which count as missing from now on.

    Entries of `unreadable_shards` have no keys that could be read.

    Raises:
        DataError: A shard cannot be read.
    """
    store, damaged = TensorStore(folder), []
    in_shards = (key for index in _indexes(folder).values() for key in index or ())
    for key in sorted({*SingleFiles(folder).found(), *in_shards}):
        if store.get(key) is None:
            damaged.append(key)
    return damaged


def prune(folder: Path, *, used: Set[str] | None = None) -> Pruned:
    """Remove damaged and repeated entries, and those that are not used; pack single files and small shards.

    New shards are written before the old ones are removed, so an interruption leaves entries twice at most.

    Args:
        folder: Of a store.
        used: The keys to keep; None for all.

    Raises:
        DataError: A shard cannot be read; nothing is removed.
        StorageError: A shard cannot be written or removed.
    """
    before, reader, writer = _size_of(folder), TensorStore(folder), TensorStore(folder)
    packing = _packing(folder, used)
    singles = sorted(SingleFiles(folder).found())
    result = Pruned(folder=folder, removed=packing.removed)
    is_empty = not all(packing.moved.values())
    if not (packing.removed or singles or is_empty or len(packing.moved) > 1):
        return result
    for shard, keys in packing.moved.items():
        result.packed += _pack(keys, reader, writer, about=read_about(shard))
    wanted = [key for key in singles if key not in packing.seen and (used is None or key in used)]
    result.packed += _pack(wanted, reader, writer, about={})
    result.removed += len(singles) - len(wanted)
    writer.flush()
    reader.close()  # Windows removes no open file
    _remove([*packing.moved, *(exclusions_file(each) for each in packing.moved)])
    _remove([SingleFiles(folder).path(key) for key in singles])
    result.freed_bytes = before - _size_of(folder)
    return result


def _packing(folder: Path, used: Set[str] | None) -> _Packing:
    packing, copies = _Packing(), Counter(SingleFiles(folder).found())
    indexes = {shard: set(index or ()) for shard, index in _indexes(folder).items()}
    for own in indexes.values():
        copies.update(own)
    for shard, own in indexes.items():
        kept = own - set(excluded_keys(shard)) - packing.seen
        if used is not None:
            kept &= used
        packing.seen |= kept
        packing.removed += len(own) - len(kept)
        # Moved entries are read, so that a damaged copy does not stay in place of a whole one.
        is_repeated = any(copies[key] > 1 for key in kept)
        if is_repeated or kept != own or not own or not _is_large(shard, len(own)):
            packing.moved[shard] = sorted(kept)
    return packing


def _pack(keys: Collection[str], reader: TensorStore, writer: TensorStore, *, about: dict[str, str]) -> int:
    """Write entries again; the number of those that are whole."""
    number = 0
    for key in keys:
        tensors = reader.get(key)
        if tensors is not None:
            writer.put_again(key, tensors, about=about.get(key, ""))
            number += 1
    return number


def _is_store(folder: Path) -> bool:
    return bool(shard_names(folder)) or bool(SingleFiles(folder).found())


def _is_large(shard: Path, num_entries: int) -> bool:
    return num_entries >= limits.MAX_SHARD_ENTRIES // 2 or _bytes_of(shard) >= limits.MAX_SHARD_BYTES // 2


def _indexes(folder: Path) -> dict[Path, ShardIndex | None]:
    """Shard -> its index, in the order of their names; None for one that is damaged or was removed meanwhile.

    Raises:
        DataError: A file cannot be read, so nothing is known of what it holds.
    """
    return {folder / name: _index_of(folder / name) for name in sorted(shard_names(folder))}


def _index_of(shard: Path) -> ShardIndex | None:
    try:
        return read_index(shard)
    except DataError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
            raise
        return None


def _size_of(folder: Path) -> int:
    singles = SingleFiles(folder)
    files = [folder / name for name in shard_names(folder)] + [singles.path(key) for key in singles.found()]
    return sum(map(_bytes_of, files))


def _bytes_of(file: Path) -> int:
    """The size of a file; 0 if another process removed it."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _remove(files: Collection[Path]) -> None:
    for file in files:
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(file, error) from error
