"""B20: a second start of a run: scan of the images, captions, and the check of the caches, without a model.

python tests/benchmarks/bench_start.py [--images 10000] [--turns 5] [--other CHECKOUT]

Each start is a process of its own, this build and the other one in turn; CPU time without the imports. The
other checkout has caches of its own, made by its own code.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).parents[2]
LATENTS, TEXT = (4, 8, 8), (1, 77, 64)


def make_images(folder: Path, number: int) -> None:
    """Small JPEGs with captions of their own."""
    folder.mkdir(parents=True)
    values = np.random.default_rng(0).integers(0, 255, (16, 64, 64, 3), dtype=np.uint8)
    for index in range(number):
        Image.fromarray(values[index % 16]).save(folder / f"{index:06}.jpg")
        (folder / f"{index:06}.txt").write_text(f"photograph number {index}")


def start(root: Path, cache: Path) -> dict[str, float]:
    """Plan the data and fill the caches with stand-ins for the encoders; what it took."""
    fill, make = _contender(root, cache)
    before_s, before_bytes = time.process_time(), _bytes_read()
    data = make()
    planned_s, planned_bytes = time.process_time(), _bytes_read()
    fill(data)
    return {
        "plan": planned_s - before_s,
        "caches": time.process_time() - planned_s,
        "total": time.process_time() - before_s,
        "read while planning": planned_bytes - before_bytes,
        "read of caches": _bytes_read() - planned_bytes,
    }


def look(root: Path) -> float:
    """CPU time of scandir and stat of every image and caption."""
    before_s = time.process_time()
    with os.scandir(root / "images") as listing:
        sizes = [entry.stat().st_size for entry in listing]
    assert sizes
    return time.process_time() - before_s


def _contender(root: Path, cache: Path) -> tuple[Callable[[Any], None], Callable[[], Any]]:
    """How the build that is imported fills caches and makes data; the first builds had other names."""
    try:
        from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
        from simpletuner.helpers.configuration.schema.sections import DataConfig
    except ImportError:
        from simpletuner.helpers.configuration.datasets import DatasetConfig
        from simpletuner.helpers.configuration.sections import DataConfig

        fill = _fill_of_the_first_builds
    else:
        fill = _fill
    from simpletuner.helpers.data.dataset import TrainingData

    entry = {
        "id": "photos",
        "instance_data_dir": root / "images",
        "resolution": 64,
        "resolution_type": "pixel",
        "caption_strategy": "textfile",
    }
    datasets = [DatasetConfig.model_validate(entry)]
    folders = DataConfig.model_validate({"cache_dir_vae": cache / "vae", "cache_dir_text": cache / "text"})
    return fill, lambda: TrainingData(datasets, folders, seed=1, batch_size=4, pixel_alignment=64)


def _embeds(texts: Sequence[str]) -> list[Any]:
    from simpletuner.helpers.contracts import TextEmbeds

    return [TextEmbeds(torch.zeros(TEXT), torch.zeros(1, 32)) for _ in texts]


def _fill(data: Any) -> None:
    from simpletuner.helpers.caching.filling import encode_missing
    from simpletuner.helpers.caching.text import text_entry

    data.set_encoders(vae_identity="vae", text_identity="text")
    images: Any = lambda pixels: [{"latents": torch.zeros(LATENTS)} for _ in pixels]  # noqa: E731
    texts: Any = lambda captions: [text_entry(each) for each in _embeds(captions)]  # noqa: E731
    for requests, encode in ((data.latents_requests(), images), (data.text_requests(), texts)):
        for _ in encode_missing(requests, encode, batch_size=16):
            pass


def _fill_of_the_first_builds(data: Any) -> None:
    options = {"batch_size": 16, "on_progress": lambda *_: None, "shard": (0, 1)}
    data.cache_latents(lambda pixels: torch.zeros(len(pixels), *LATENTS), identity="vae", **options)
    del options["on_progress"]
    data.cache_text(_embeds, identity="text", extra=(), **options)


def _bytes_read() -> int:
    """Bytes that this process has read so far; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/io").read_text().split()[1])
    except OSError:
        return 0


def _run(checkout: Path, root: Path, cache: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--worker", str(root), str(cache)]
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=root, check=True, stdout=subprocess.PIPE)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Make the images and the caches, then start in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--worker", nargs=2, type=Path)
    options = parser.parse_args()
    if options.worker:
        root, cache = options.worker
        print(json.dumps(start(root, cache) | {"look": look(root)}))
        return
    builds = {"this build": HERE} | ({"the other build": options.other} if options.other else {})
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_images(root / "images", options.images)
        caches = {name: root / f"cache-{index}" for index, name in enumerate(builds)}
        first = {name: _run(checkout.resolve(), root, caches[name]) for name, checkout in builds.items()}
        time.sleep(3)  # a file that changed within two seconds of its scan is read once more
        _ = [_run(checkout.resolve(), root, caches[name]) for name, checkout in builds.items()]
        turns = [
            {name: _run(checkout.resolve(), root, caches[name]) for name, checkout in builds.items()}
            for _ in range(options.turns)
        ]
    for name in builds:
        second = {key: median(turn[name][key] for turn in turns) for key in turns[0][name]}
        print(f"{name}, {options.images} images: first start {first[name]['total']:.2f} s, second ", end="")
        print(
            ", ".join(f"{key} {value:.3f} s" for key, value in second.items() if "read" not in key), end="; "
        )
        print(f"{second['read of caches'] / 1e6:.2f} MB read of the caches")
    if len(builds) == 2:
        one, other = builds
        print(f"ratio: {median(turn[one]['total'] / turn[other]['total'] for turn in turns):.3f}")
    times = median(turn["this build"]["total"] / turn["this build"]["look"] for turn in turns)
    print(f"this build, times scandir and stat: {times:.1f}")


if __name__ == "__main__":
    main()
