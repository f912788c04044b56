"""Images in tar archives."""

from __future__ import annotations

import contextlib
import gzip
import io
import logging
import random
import tarfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.references import ReferenceConfig
from simpletuner.helpers.contracts import Size
from simpletuner.helpers.data.captions import caption_reader, read_captions
from simpletuner.helpers.data.index import ImageIndex
from simpletuner.helpers.data.pairing import Pair, PairFinder
from simpletuner.helpers.data.sources import tar_index
from simpletuner.helpers.data.sources.base import FoundFile, RangedSource, Scan, read_bounded, scan_source
from simpletuner.helpers.data.sources.local import LocalFolder
from simpletuner.helpers.data.sources.opening import scan_entry
from simpletuner.helpers.data.sources.tar import TarArchives
from simpletuner.helpers.errors import DataError, SimpleTunerError
from simpletuner.helpers.io.faults import StorageError

FILES = {
    "a.png": b"first" * 200,
    "a.txt": b"a dog",
    "sub/b.jpg": b"second" * 300,
    "sub/b.jpg.txt": b"a cat",
    "v1.2 photo.jpg": b"third",
    "v1.2 photo.txt": b"a bird",
    "sub/empty.webp": b"",
    "notes.md": b"x" * 512,
}


def packed(files: Mapping[str, bytes], **options: object) -> bytes:
    """A tar archive."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", **options) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return target.getvalue()


def png(size_px: tuple[int, int]) -> bytes:
    """A small image."""
    target = io.BytesIO()
    Image.new("RGB", size_px).save(target, "PNG")
    return target.getvalue()


class Storage(RangedSource[int]):
    """Files in memory that count what is read, as storage elsewhere would."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.read_names: list[str] = []

    @property
    def place(self) -> str:
        return "memory://box"

    def list(self) -> Iterator[tuple[str, int | str]]:
        yield from ((name, len(data)) for name, data in self.files.items())

    def stat(self, name: str, entry: int) -> FoundFile:
        return FoundFile(self, name, (entry, hash(self.files[name])))

    def read(self, file: FoundFile, *, limit: int) -> bytes:
        raise AssertionError("an archive is never read whole")

    def read_range(self, file: FoundFile, start: int, length: int) -> bytes:
        self.read_names.append(file.name)
        return self.files[file.name][start : start + length]


def scan(files: dict[str, bytes], pattern: str = "", *, cache: Path | None = None) -> Scan:
    source = TarArchives(Storage(files), pattern, identity="pictures")
    if cache is not None:
        source.remember_in(cache)
    return scan_source(source)


def contents(found: Scan) -> dict[str, bytes]:
    """Name -> bytes of the images and captions."""
    texts = [file for files in found.captions.values() for file in files]
    return {file.name: read_bounded(file, limit=1 << 20) for file in (*found.images, *texts)}


def entry(folder: Path, **keys: object) -> DatasetConfig:
    return DatasetConfig(id="pictures", type="webdataset", **{"instance_data_dir": folder, **keys})  # type: ignore[arg-type]


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives_give_what_the_folder_gives_into_which_they_are_unpacked(tmp_path: Path, style: int) -> None:
    names = list(FILES)
    archives, folder = tmp_path / "archives", tmp_path / "folder"
    archives.mkdir()
    for number, part in enumerate((names[:3], names[3:])):  # a caption lies in the next archive
        data = packed({name: FILES[name] for name in part}, format=style)
        (archives / f"{number}.tar").write_bytes(data)
        with tarfile.open(archives / f"{number}.tar") as archive:
            archive.extractall(folder, filter="data")
    ours = scan_entry(entry(archives), cache=tmp_path / "cache")
    theirs = scan_source(LocalFolder(folder))
    assert [file.name for file in ours.images] == [file.name for file in theirs.images]
    assert contents(ours) == contents(theirs)
    assert (ours.others, ours.skipped) == (theirs.others, theirs.skipped) == (("notes.md",), ())
    config = entry(archives)
    captions = {
        image.name: read_captions(image, config, caption_reader(config, ours)).texts for image in ours.images
    }
    assert captions == {
        "a.png": ("a dog",),
        "sub/b.jpg": ("a cat",),
        "sub/empty.webp": ("",),
        "v1.2 photo.jpg": ("a bird",),
    }


def test_a_later_start_reads_no_archive_but_those_that_changed(tmp_path: Path) -> None:
    files = {f"{number}.tar": packed({f"{number}.png": b"x" * 2000}) for number in range(3)}
    first = scan(files, cache=tmp_path)
    storage = Storage(files)
    source = TarArchives(storage, "", identity="pictures")
    source.remember_in(tmp_path)
    assert [*scan_source(source).images] == [
        FoundFile(source, each.name, each.signature) for each in first.images
    ]
    assert storage.read_names == []

    files["1.tar"] = packed({"new.png": b"y"})
    assert [each.name for each in scan_source(source).images] == ["0.png", "2.png", "new.png"]
    assert set(storage.read_names) == {"1.tar"}
    scan(files, "{0,2}.tar", cache=tmp_path)
    storage.read_names.clear()
    scan_source(source)
    assert set(storage.read_names) == {"1.tar"}, "archives that are not looked up are dropped"


def test_the_index_of_another_entry_is_not_taken(tmp_path: Path) -> None:
    files = {"0.tar": packed({"a.png": b"x"})}
    scan(files, cache=tmp_path)
    storage = Storage(files)
    other = TarArchives(storage, "", identity="masks")
    other.remember_in(tmp_path)
    scan_source(other)
    assert storage.read_names


def test_a_damaged_index_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {"0.tar": packed({"a.png": b"x"})}
    scan(files, cache=tmp_path)
    (index,) = tmp_path.iterdir()
    data = index.read_bytes()
    for damaged in (data[:-10], data.replace(b"a.png", b"b.png"), b"[]", b"{}"):
        index.write_bytes(damaged)
        assert [each.name for each in scan(files, cache=tmp_path).images] == ["a.png"]
        assert "is damaged and will be rebuilt" in caplog.text
        assert index.read_bytes() == data
        caplog.clear()


def test_a_cache_folder_that_cannot_be_written_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise StorageError("no space is left")

    monkeypatch.setattr(tar_index, "write_bytes", fail)
    assert scan({"0.tar": packed({"a.png": b"x"})}, cache=tmp_path).images
    assert "the next start reads them: no space is left" in caplog.text


@pytest.mark.reliability_row(17)
def test_an_archive_that_changed_just_now_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(packed({"a.png": b"x"}))
    (image,) = scan_entry(entry(tmp_path), cache=tmp_path / "cache").images
    assert not (tmp_path / "cache").exists()
    assert image.source.changed_ns(image) == (tmp_path / "0.tar").stat().st_ctime_ns


def test_a_look_uses_what_is_kept_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_index, "_RACY_NS", -1)
    (tmp_path / "0.tar").write_bytes(packed({"a.png": b"x"}))
    scan_entry(entry(tmp_path), cache=tmp_path / "cache", is_read_only=True)
    assert not (tmp_path / "cache").exists()
    scan_entry(entry(tmp_path), cache=tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    kept = file.read_bytes()
    monkeypatch.setattr(TarArchives, "_refuse", lambda *_: None)
    monkeypatch.setattr(
        "simpletuner.helpers.data.sources.tar.read_members", lambda *_: pytest.fail("read again")
    )
    assert [
        each.name for each in scan_entry(entry(tmp_path), cache=tmp_path / "cache", is_read_only=True).images
    ]
    assert file.read_bytes() == kept


def test_many_archives_are_kept_before_the_last_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar_index, "_SAVED_EVERY_S", -1.0)
    files = {"0.tar": packed({"a.png": b"x"}), "1.tar": b"no archive"}
    with pytest.raises(DataError, match=r"1\.tar"):
        scan(files, cache=tmp_path)
    assert b"a.png" in next(tmp_path.iterdir()).read_bytes()


@pytest.mark.reliability_row(17)
def test_an_archive_that_changes_after_the_scan_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "0.tar"
    file.write_bytes(packed({"a.png": b"x" * 2000}))
    (image,) = scan_entry(entry(tmp_path), cache=tmp_path / "cache").images
    assert read_bounded(image, limit=2000) == b"x" * 2000
    file.write_bytes(packed({"b.png": b"x" * 2000, "a.png": b"y" * 9000}))
    with pytest.raises(DataError, match=r"in 0\.tar: it changed after the scan"):
        read_bounded(image, limit=2000)
    file.unlink()
    with pytest.raises(DataError, match=r"in 0\.tar: it cannot be read: No such file"):
        read_bounded(image, limit=2000)


def test_an_archive_that_shrinks_after_the_scan_gives_no_half_of_an_image() -> None:
    storage = Storage({"0.tar": packed({"a.png": b"x" * 2000})})
    (image,) = scan_source(TarArchives(storage, "", identity="x")).images
    whole = storage.files["0.tar"]
    storage.files["0.tar"] = whole[:1000]
    with pytest.raises(DataError, match=r"0\.tar gives 488 bytes of it instead of 2000"):
        read_bounded(image, limit=2000)
    storage.read_range = lambda *_: whole  # type: ignore[method-assign]  # a server that ignores ranges
    with pytest.raises(DataError, match=r"0\.tar gives 10240 bytes"):
        read_bounded(image, limit=2000)


def test_a_member_over_the_limit_is_not_read() -> None:
    storage = Storage({"0.tar": packed({"a.png": b"x" * 2000})})
    (image,) = scan_source(TarArchives(storage, "", identity="x")).images
    storage.read_names.clear()
    with pytest.raises(DataError, match="it is over 1999 bytes"):
        read_bounded(image, limit=1999)
    assert storage.read_names == []


@pytest.mark.parametrize("error", [DataError("it is gone"), SimpleTunerError("box: it does not answer")])
def test_a_place_that_fails_ends_the_start_and_counts_as_no_damage(
    error: SimpleTunerError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Storage, file: FoundFile, start: int, length: int) -> bytes:
        if start == 0:
            return whole[:length]
        raise error

    whole = packed({"a.png": b"x" * 3000, "b.png": b"y"})
    monkeypatch.setattr(Storage, "read_range", fail)
    monkeypatch.setattr(Storage, "request_bytes", 1024)
    with pytest.raises(type(error), match=str(error)):
        scan({"0.tar": whole})


@pytest.mark.reliability_row(13)
def test_of_an_archive_that_is_cut_the_whole_members_are_read_and_the_loss_is_named() -> None:
    files = {f"{number}.png": bytes([number]) * (number * 300) for number in range(1, 8)}
    whole = packed(files)
    ends, end = {}, 0
    for name, data in files.items():
        ends[name] = end + 512 + len(data)
        end += 512 + -(-len(data) // 512) * 512
    for cut in range(512, end + 1, 100):
        found = scan({"0.tar": whole[:cut]})
        assert contents(found) == {name: files[name] for name in files if ends[name] <= cut}
        skipped = dict(found.skipped)
        assert f"{len(found.images)} file" in skipped.pop("0.tar")
        assert set(skipped.values()) <= {"its archive is cut off in it"}
        assert len(skipped) <= 1
    assert scan({"0.tar": whole[: end + 1024]}).skipped == ()


@pytest.mark.reliability_row(13)
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:1024] + b"?" * 512 + data[1536:], "it is cut off or damaged at byte 1,024"),
        (lambda data: data + data, "it goes on behind its end mark"),
        (lambda data: data[:2048], "it has no end mark"),
    ],
    ids=["a header", "joined", "no end"],
)
def test_a_damaged_end_is_named(damage: object, reason: str) -> None:
    data = packed({"a.png": b"x", "b.png": b"y"})
    assert len(data) == tarfile.RECORDSIZE
    found = scan({"0.tar": damage(data)})  # type: ignore[operator]
    assert reason in dict(found.skipped)["0.tar"]
    assert found.images[0].name == "a.png"


@pytest.mark.parametrize(
    ("files", "pattern", "reasons"),
    [
        ({"0.tar": b""}, "", "0.tar: it is empty"),
        ({"0.tar": b"<html>" * 500}, "", "0.tar: it is no tar archive"),
        ({"0.tar": gzip.compress(packed({"a.png": b"x"}))}, "", "0.tar: it is compressed with gzip"),
        ({"0.tar.gz": b"x", "1.tar": packed({"a.png": b"x"})}, "", "0.tar.gz: it is compressed"),
        ({"0.TGZ": b"x"}, "", "0.TGZ: it is compressed"),
        ({"0.tar": packed({"a.png": b"x"})}, "{0..1}.tar", "1.tar: there is no such archive"),
        ({"0.tar": packed({"a.png": b"x"})}, "{0,b*}.tar", r"b\*.tar: there is no such archive"),
        ({f"{n}.tar": b"" for n in range(9)}, "", "9 archives cannot be read: .*4.tar: .*; and 4 more"),
        ({"a.png": b"x"}, "", "no tar archive is there. Check instance_data_dir"),
    ],
    ids=["empty", "html", "gzip", "tar.gz", "tgz", "missing", "unmatched", "many", "none"],
)
def test_an_archive_of_which_nothing_can_be_read_ends_the_start(
    files: dict[str, bytes], pattern: str, reasons: str
) -> None:
    with pytest.raises(DataError, match=reasons) as raised:
        scan(files, pattern)
    assert str(raised.value).startswith("memory://box: ")


def test_an_archive_without_members_is_whole() -> None:
    found = scan({"0.tar": packed({}), "1.tar": packed({"a.png": b"x"})})
    assert (len(found.images), found.skipped) == (1, ())


@pytest.mark.reliability_row(16)
def test_a_name_in_two_archives_makes_each_archive_a_folder() -> None:
    files = {f"part/{n}.tar": packed({"0.png": bytes([n]), "0.txt": b"%d" % n}) for n in range(2)}
    found = scan(files)
    assert contents(found) == {
        "part/0.tar/0.png": b"\0",
        "part/0.tar/0.txt": b"0",
        "part/1.tar/0.png": b"\1",
        "part/1.tar/0.txt": b"1",
    }


def test_of_two_members_of_one_name_the_later_one_counts() -> None:
    first, second = packed({"a.png": b"old"}), packed({"a.png": b"new"})
    assert contents(scan({"0.tar": first[:1024] + second})) == {"a.png": b"new"}


@pytest.mark.reliability_row(19, 21)
def test_specials_and_names_that_leave_the_archive_are_skipped_with_a_reason() -> None:
    target = io.BytesIO()
    kinds = {"link.png": tarfile.SYMTYPE, "hard.png": tarfile.LNKTYPE, "pipe.png": tarfile.FIFOTYPE}
    plain = (
        "./in.png",
        "a//b/./c.png",
        "../up.png",
        "/root.png",
        "a/../b.png",
        ".hidden.png",
        ".git/a.png",
        "./._in.png",
    )
    with tarfile.open(fileobj=target, mode="w") as archive:
        for name in plain:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
        for name, kind in {**kinds, "folder.png": tarfile.DIRTYPE}.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "in.png"
            archive.addfile(member)
    found = scan({"0.tar": target.getvalue()})
    assert [each.name for each in found.images] == ["a/b/c.png", "in.png"]
    leaves = "its name is no path within the archive"
    assert dict(found.skipped) == {
        "../up.png": leaves,
        "/root.png": leaves,
        "a/../b.png": leaves,
        "link.png": "it is a link; pack the file itself",
        "hard.png": "it is a link; pack the file itself",
        "pipe.png": "it is not a regular file",
    }


def test_sparse_members_are_skipped() -> None:
    member = tarfile.TarInfo("a.png")
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.png"}
    member.size = 512
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(member, io.BytesIO(b"1\n0\n512\n".ljust(512, b"\0")))
    assert dict(scan({"0.tar": target.getvalue()}).skipped) == {"a.png": "it is not a regular file"}


@pytest.mark.reliability_row(20)
@pytest.mark.parametrize("style", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_strange_names_are_kept(style: int, tmp_path: Path) -> None:
    names = (
        "d" * 120 + "/" + "e" * 120 + ".png",
        "ü😀\u202e.png",
        "-a.png",
        "line\nbreak.png",
        "byte\udcff.png",
    )
    files = {name: name.encode("utf-8", "surrogateescape") for name in names}
    archives = {"0.tar": packed(files, format=style, encoding="utf-8", errors="surrogateescape")}
    for _ in range(2):  # the second time from the index
        assert contents(scan(archives, cache=tmp_path)) == files


def header(**fields: object) -> bytes:
    member = tarfile.TarInfo("a.png")
    for key, value in fields.items():
        setattr(member, key, value)
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.reliability_row(13)
@pytest.mark.parametrize(
    "hostile",
    [
        header(size=-1024),
        header(size=-1),
        header(size=1 << 62),
        header(type=tarfile.XHDTYPE, size=1 << 40),
        header(type=tarfile.XHDTYPE, size=-512),
        header(type=tarfile.GNUTYPE_LONGNAME, size=1 << 40),
        header(type=tarfile.XGLTYPE, size=0) * 5000,
        header(type=tarfile.XHDTYPE, size=0) * 5000,
        header(type=tarfile.XHDTYPE, size=512) + b"0 path=a\n".ljust(512, b"\0"),
        header(type=tarfile.XHDTYPE, size=512) + b"14 size=-4096\n".ljust(512, b"\0"),
        header(type=tarfile.GNUTYPE_SPARSE, size=512),
    ],
    ids=[
        "negative",
        "a little negative",
        "huge",
        "pax huge",
        "pax negative",
        "name huge",
        "pax chain",
        "own pax chain",
        "pax loop",
        "pax size",
        "sparse",
    ],
)
def test_hostile_headers_end_soon_in_a_problem_or_an_error(hostile: bytes) -> None:
    started_s = time.perf_counter()
    found = scan({"0.tar": packed({"first.png": b"x"})[:1024] + hostile + packed({"b.png": b"y"})})
    assert found.images[0].name in ("b.png", "first.png")
    assert set(contents(found).values()) <= {b"x", b"y", b""}
    with contextlib.suppress(DataError):
        scan({"0.tar": hostile + packed({"b.png": b"y"})})
    assert time.perf_counter() - started_s < 2


@pytest.mark.reliability_row(13)
def test_archives_with_changed_bytes_never_raise_but_for_people() -> None:
    data = packed(FILES, format=tarfile.PAX_FORMAT)
    rng = random.Random(1)
    for _ in range(300):
        changed = bytearray(data[: rng.randrange(512, len(data))])
        for _ in range(rng.randrange(1, 20)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        with contextlib.suppress(DataError):
            contents(scan({"0.tar": bytes(changed)}))


def test_further_images_of_a_sample_are_not_trained_on() -> None:
    names = (
        "a/1.jpg",
        "a/1.mask.png",
        "a/1.depth.png",
        "b/1.mask.png",
        "v1.2 photo.jpg",
        "v1.3 photo.jpg",
        "2.x.txt",
    )
    found = scan({"0.tar": packed(dict.fromkeys(names, b"x"))})
    assert [each.name for each in found.images] == [
        "a/1.jpg",
        "b/1.mask.png",
        "v1.2 photo.jpg",
        "v1.3 photo.jpg",
    ]
    reason = "it is another field of the sample of 1.jpg, not an image of its own"
    assert dict(found.skipped) == {"a/1.mask.png": reason, "a/1.depth.png": reason}


def test_references_in_archives_belong_to_images_of_their_path(tmp_path: Path) -> None:
    files = {name: png((8, 4)) for name in ("sub/a.png", "b.png")}
    (tmp_path / "images.tar").write_bytes(packed(files))
    (tmp_path / "references.tar").write_bytes(packed({name: png((16, 8)) for name in files}))
    images = scan_entry(
        entry(tmp_path, instance_data_dir=f"{tmp_path}/images.tar"), cache=tmp_path / "c"
    ).images
    references = ReferenceConfig(
        id="before",
        type="webdataset",
        instance_data_dir=f"{tmp_path}/references.tar",
        conditioning_type="reference_strict",
    )
    index = ImageIndex(tmp_path / "c" / "index.json")
    finder = PairFinder(references, index, noun="reference", keeps_aspect=True)
    for image in images:
        pair = finder.pair_of(image, Size(height=4, width=8))
        assert isinstance(pair, Pair)
        assert (pair.file.name, pair.size) == (image.name, Size(height=8, width=16))
    assert finder.problems() == []


def test_images_beside_the_archives_are_named(tmp_path: Path) -> None:
    data = packed({"a.png": b"x"})
    beside = {"0.tar.idx": b"x", "0.tar.md5": b"x", "0.json": b"{}"}
    found = scan({"0.tar": data, "loose.png": b"x"} | beside)
    assert dict(found.skipped) == {"loose.png": "it lies beside the archives, not in one"}
    assert scan({"0.tar": data, "loose.png": b"x"}, "0.tar").skipped == ()


def test_a_pattern_takes_the_archives_of_one_folder() -> None:
    data = {name: packed({f"{name}.png": b"x"}) for name in ("0.tar", "1.tar", "x-1.tar", "sub/0.tar")}
    assert [each.name for each in scan(data, "{0..1}.tar").images] == ["0.tar.png", "1.tar.png"]
    assert [each.name for each in scan(data, "*1.tar").images] == ["1.tar.png", "x-1.tar.png"]
    assert [each.name for each in scan(data, "{*0,?}.tar").images] == ["0.tar.png", "1.tar.png"]
    odd = {"[1].tar": packed({"a.png": b"x"}), "x1.tar": packed({"b.png": b"x"})}
    assert [each.name for each in scan(odd, "[1]*.tar").images] == ["a.png"]
    assert len(scan(data).images) == 4


def test_what_is_no_archive_is_named_but_with_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(packed({"a.png": b"x"}))
    (tmp_path / "up").symlink_to(tmp_path)
    found = scan_entry(entry(tmp_path), cache=tmp_path / "cache")
    assert dict(found.skipped) == {"up": "it is a link to a folder"}
    (tmp_path / "sub").mkdir(mode=0)
    found = scan_entry(entry(tmp_path, instance_data_dir=f"{tmp_path}/*.tar"), cache=tmp_path / "cache")
    assert found.skipped == (), "with a pattern only its folder is looked at"
    (tmp_path / "sub").rmdir()
    (tmp_path / "1.tar").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"1\.tar: it is a link to nothing"):
        scan_entry(entry(tmp_path), cache=tmp_path / "cache")


def test_images_of_an_unchanged_archive_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simpletuner.helpers.data.index._RACY_NS", -1)
    (tmp_path / "0.tar").write_bytes(packed({"a.png": b"x"}))
    index = ImageIndex(tmp_path / "index.json")
    index.info(scan_entry(entry(tmp_path), cache=tmp_path / "cache").images[0])
    index.save()
    (image,) = scan_entry(entry(tmp_path), cache=tmp_path / "cache").images
    assert ImageIndex(tmp_path / "index.json").knows(image)
    (tmp_path / "0.tar").write_bytes(packed({"a.png": b"y"}))
    (image,) = scan_entry(entry(tmp_path), cache=tmp_path / "cache").images
    assert not ImageIndex(tmp_path / "index.json").knows(image)


def test_the_first_start_says_what_it_reads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    files = {"0.tar": packed({"a.png": b"x"}), "1.tar": packed({"b.png": b"x"})}
    scan(files, cache=tmp_path)
    assert "Reading the headers of 2 tar archives in memory://box" in caplog.text
    caplog.clear()
    scan(files, cache=tmp_path)
    assert caplog.text == ""
