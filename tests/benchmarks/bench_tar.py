"""B22: images and captions in tar archives, beside the same files in a folder: finding and reading them.

python tests/benchmarks/bench_tar.py [--quick]

With the package webdataset its reader is a contender too: it reads whole archives, in their order.
"""

from __future__ import annotations

import random
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from measure import arguments, report, side_by_side

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.data.sources.base import FoundFile, Scan, read_bounded
from simpletuner.helpers.data.sources.opening import scan_entry

IMAGE_BYTES = 40_000


def make(root: Path, number: int) -> None:
    """Files of random bytes with captions of their own, in a folder and in ten archives."""
    (root / "folder").mkdir()
    (root / "archives").mkdir()
    values = np.random.default_rng(0)
    for shard in range(10):
        with tarfile.open(root / "archives" / f"{shard:03}.tar", "w") as archive:
            for index in range(shard * number // 10, (shard + 1) * number // 10):
                image, text = (root / "folder" / f"{index:06}{suffix}" for suffix in (".jpg", ".txt"))
                image.write_bytes(values.bytes(IMAGE_BYTES))
                text.write_text(f"photograph number {index}")
                archive.add(image, arcname=image.name)
                archive.add(text, arcname=text.name)


def found(root: Path, kind: str, *, cache: Path) -> Scan:
    """The scan of the folder or of the archives."""
    place = root / ("archives" if kind == "webdataset" else "folder")
    return scan_entry(DatasetConfig(id="x", type=kind, instance_data_dir=place), cache=cache)


def read_all(files: list[FoundFile]) -> None:
    """Read files in a random order, as training does."""
    for file in random.Random(1).sample(files, len(files)):
        assert read_bounded(file, limit=1 << 20)


def webdataset_reader(root: Path) -> dict[str, Callable[[], object]]:
    """webdataset's own reader, if it is installed."""
    if find_spec("webdataset") is None:
        return {}
    import webdataset

    archives = sorted(str(each) for each in (root / "archives").iterdir())
    return {
        "webdataset's reader": lambda: [None for _ in webdataset.WebDataset(archives, shardshuffle=False)]
    }


def main() -> None:
    """Make the files, then find and read them each way."""
    options = arguments(__doc__)
    number = 50 if options.quick else 10_000
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make(root, number)
        time.sleep(0 if options.quick else 3)  # the index keeps no archive that changed within two seconds
        kept = root / "kept"
        scans = {kind: found(root, kind, cache=kept) for kind in ("local", "webdataset")}
        finding: dict[str, Callable[[], object]] = {
            "folder": lambda: found(root, "local", cache=kept),
            "archives, first": lambda: found(root, "webdataset", cache=Path(tempfile.mkdtemp(dir=root))),
            "archives, later": lambda: found(root, "webdataset", cache=kept),
        }
        images = {kind: list(scan.images) for kind, scan in scans.items()}
        texts = {kind: [each for (each,) in scan.captions.values()] for kind, scan in scans.items()}
        reading: dict[str, Callable[[], object]] = {
            "folder": lambda: read_all(images["local"]),
            "archives": lambda: read_all(images["webdataset"]),
            **webdataset_reader(root),
        }
        captions: dict[str, Callable[[], object]] = {
            "folder": lambda: read_all(texts["local"]),
            "archives": lambda: read_all(texts["webdataset"]),
        }
        results = []
        cases = {"find": finding, "read the images": reading, "read the captions": captions}
        for case, contenders in cases.items():
            results += side_by_side(
                "B22", f"{case}, {number:,}", contenders, turns=options.turns, device=torch.device("cpu")
            )
        report(results, options)


if __name__ == "__main__":
    main()
