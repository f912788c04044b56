"""B20: a second start of a run: scan of the images, captions, and the check of the caches, without a model.

python tests/benchmarks/bench_start.py [--images 10000] [--turns 5] [--other CHECKOUT]
python tests/benchmarks/bench_start.py --rows 1000000 [--captions]
python tests/benchmarks/bench_start.py --loop 200
python tests/benchmarks/bench_start.py --imagefolder [--images 10000] [--turns 5]
python tests/benchmarks/bench_start.py --processes 2 [--images 10000] [--turns 5]

Each start is a process of its own, this build and the other one in turn; CPU time without the imports. The
other checkout has caches of its own, made by its own code. --rows plans images that an index knows and that
no disk holds: the memory over the imports. --loop takes batches of 4 of Flux.1's size at 1024 px from the
caches beside a step of 100 ms that sleeps, and sums the waits for them. --imagefolder compares the first scan
with that of the library datasets, which reads no image. --processes plans the data in several processes, of
which the first goes first, as those of one machine do, over the time of one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
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


def plan_rows(number: int, folder: Path, *, captions: bool) -> None:
    """Plan images that an index knows, without files; print CPU time and memory."""
    from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
    from simpletuner.helpers.configuration.schema.sections import DataConfig
    from simpletuner.helpers.data import planning
    from simpletuner.helpers.data.dataset import TrainingData
    from simpletuner.helpers.data.sources.base import FoundFile, ImageSource, scan_source

    class Rows(ImageSource[None]):
        place = "rows"

        def list(self) -> Iterator[tuple[str, None]]:
            for row in range(number):
                yield f"{row:07}.jpg", None
                if captions:
                    yield f"{row:07}.txt", None

        def stat(self, name: str, entry: None) -> FoundFile:
            row = int(name[:7])
            return FoundFile(self, name, (1000 + row, 10**18 + row, 10**18 + row, row))

        def read(self, file: FoundFile, *, limit: int) -> bytes:
            raise AssertionError(f"{file.name} is known")

    entry = {
        "id": "rows",
        "instance_data_dir": folder / "images",
        "resolution": 512,
        "resolution_type": "pixel_area",
        "caption_strategy": "textfile" if captions else "instanceprompt",
        "instance_prompt": "a photo of sks",
    }
    (folder / "images").mkdir()
    config = DatasetConfig.model_validate(entry)
    folders = DataConfig.model_validate({"cache_dir_vae": folder / "vae", "cache_dir_text": folder / "text"})
    if not (process := os.fork()):  # the memory of writing does not count
        _write_rows(number, folders.latents_folder(config), config, captions=captions)
        os._exit(0)
    os.waitpid(process, 0)
    planning.scan_entry = lambda _, **options: scan_source(Rows())
    before_bytes, before_s = _memory("VmRSS"), time.process_time()
    data = TrainingData([config], folders, seed=1, batch_size=4, pixel_alignment=64)
    took_s = time.process_time() - before_s
    kept, peak = _memory("VmRSS") - before_bytes, _memory("VmHWM") - before_bytes
    print(
        f"{len(data.samples)} rows: {took_s:.1f} s of CPU time, {kept / number:.0f} bytes kept for each, "
        f"at most {peak / 2**20:.0f} MiB"
    )


def _write_rows(number: int, folder: Path, config: Any, *, captions: bool) -> None:
    from simpletuner.helpers.data.columns import Texts
    from simpletuner.helpers.data.index import _VERSION, index_file
    from simpletuner.helpers.data.index_file import IndexContent, KnownFiles, write_content

    rows, rng = np.arange(number), np.random.default_rng(0)
    packed = np.stack([1000 + rows, 10**18 + rows, 10**18 + rows, rows], axis=1)
    sizes = np.zeros((number, 3), np.int32)
    sizes[:, :2] = rng.integers(512, 1500, (number, 2))
    texts = range(number if captions else 0)
    content = IndexContent(
        images=KnownFiles(Texts.of(f"{row:07}.jpg" for row in range(number)), packed),
        digests=rng.integers(0, 256, (number, 16), dtype=np.uint8),
        sizes=sizes,
        texts=KnownFiles(Texts.of(f"{row:07}.txt" for row in texts), packed[: len(texts)]),
        bodies=Texts.of(f"photograph number {row}" for row in texts),
    )
    write_content(index_file(folder, config), content, version=_VERSION)


def _memory(kind: str) -> int:
    """Bytes that this process holds now (VmRSS), or held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(kind))) << 10


def wait_in_loop(steps: int, folder: Path) -> float:
    """The sum of the waits for batches over that of the steps, which sleep for 100 ms each."""
    from simpletuner.helpers.caching.filling import encode_missing
    from simpletuner.helpers.caching.text import text_entry
    from simpletuner.helpers.contracts import TextEmbeds

    make_images(folder / "images", 64)
    _, make = _contender(folder, folder / "cache")
    data = make()
    data.set_encoders(vae_identity="vae", text_identity="text")
    embeds = TextEmbeds(torch.ones(1, 512, 4096, dtype=torch.bfloat16), torch.ones(1, 768))
    images: Any = lambda pixels: [{"latents": torch.ones(16, 128, 128)} for _ in pixels]  # noqa: E731
    texts: Any = lambda captions: [text_entry(embeds) for _ in captions]  # noqa: E731
    for requests, encode in ((data.latents_requests(), images), (data.text_requests(), texts)):
        for _ in encode_missing(requests, encode, batch_size=16):
            pass
    data._cached._texts = type(data._cached._texts)(0)  # every prompt is read anew
    batches, waited_s = data.batches(), 0.0
    for _ in range(steps):
        before_s = time.perf_counter()
        next(batches)
        waited_s += time.perf_counter() - before_s
        time.sleep(0.1)
    return waited_s / (steps * 0.1)


def compare_imagefolder(root: Path, turns: int) -> None:
    """CPU time of the first scan over that of the library's, in turn, each in a process of its own."""
    script = (
        "import sys, time; from datasets import load_dataset, disable_progress_bars; "
        "import datasets.packaged_modules.imagefolder.imagefolder; from PIL import Image; "
        "disable_progress_bars(); start = time.process_time(); "
        "load_dataset('imagefolder', data_dir=sys.argv[1], split='train', cache_dir=sys.argv[2]); "
        "print(time.process_time() - start)"
    )
    environment = os.environ | {"HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ratios = []
    for turn in range(turns):
        own = _run(HERE, root, root / f"cache-{turn}")["plan"]
        command = [sys.executable, "-c", script, str(root / "images"), str(root / f"library-{turn}")]
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
        ratios.append(own / float(done.stdout.split()[-1]))
        print(f"first scan {own:.2f} s, imagefolder {float(done.stdout.split()[-1]):.2f} s")
    print(f"ratio: {median(ratios):.3f}")


def share_a_scan(root: Path, number: int, turns: int) -> None:
    """CPU time of planning new images in several processes over that of one."""
    time.sleep(3)  # a file that changed within two seconds of its scan is read once more
    ratios = []
    for turn in range(turns):
        plans = [_run(HERE, root, root / f"cache-{turn}")["plan"] for _ in range(number)]
        ratios.append(sum(plans) / plans[0])
        print(f"first process {plans[0]:.2f} s, all {sum(plans):.2f} s")
    print(f"ratio: {median(ratios):.3f}")


def main() -> None:
    """Make the images and the caches, then start in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--worker", nargs=2, type=Path)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--captions", action="store_true")
    parser.add_argument("--loop", type=int)
    parser.add_argument("--imagefolder", action="store_true")
    parser.add_argument("--processes", type=int)
    options = parser.parse_args()
    if options.rows or options.loop or options.imagefolder or options.processes:
        with tempfile.TemporaryDirectory() as folder:
            if options.rows:
                plan_rows(options.rows, Path(folder), captions=options.captions)
            elif options.loop:
                print(f"waits: {wait_in_loop(options.loop, Path(folder)):.4f} of the steps' time")
            else:
                make_images(Path(folder) / "images", options.images)
                if options.processes:
                    share_a_scan(Path(folder), options.processes, options.turns)
                else:
                    compare_imagefolder(Path(folder), options.turns)
        return
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
