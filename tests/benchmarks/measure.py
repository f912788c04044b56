"""Side-by-side timing: contenders take turns, iteration by iteration, and are compared by medians."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles

import torch

PACKAGES = ("torch", "diffusers", "lycoris-lora", "peft")


@dataclass(frozen=True)
class Result:
    """One contender's time against the reference's."""

    bench: str
    case: str
    contender: str
    ratio: float
    """Median of the quotients with the reference of the same turn."""
    low: float
    high: float
    """Quartiles of those quotients."""
    median_ms: float


def clock_s(device: torch.device) -> float:
    """CPU time of this process, which others do not add to; on an accelerator wall time, once it is idle."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def side_by_side(
    bench: str, case: str, contenders: Mapping[str, Callable[[], object]], *, turns: int, device: torch.device
) -> list[Result]:
    """Time every contender once per turn; the first is the reference."""
    for run in contenders.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(turns):
        for name, run in contenders.items():
            began_s = clock_s(device)
            run()
            times[name].append(clock_s(device) - began_s)
    reference = next(iter(times.values()))
    results = []
    for name, own in times.items():
        quotients = [one / other for one, other in zip(own, reference, strict=True)]
        low, _, high = quantiles(quotients, n=4)
        results.append(Result(bench, case, name, median(quotients), low, high, median(own) * 1e3))
    return results


@dataclass(frozen=True)
class Pair:
    """The ratio of two contenders' times."""

    ratio: float
    """Median over the pairs of blocks."""
    low: float
    high: float
    """Its 95 % bootstrap interval."""
    first_ms: float
    second_ms: float
    """Median times of a step."""


def paired(
    first: Callable[[], object], second: Callable[[], object], *, pairs: int, steps: int, warm_up: int = 2
) -> Pair:
    """Time blocks of steps of two contenders in turn, on the CPU, and the one that begins in turn too."""
    for _ in range(warm_up):
        first(), second()
    times: tuple[list[float], list[float]] = [], []
    for pair in range(pairs):
        for index in (0, 1) if pair % 2 else (1, 0):
            began_s = time.process_time()
            for _ in range(steps):
                (first, second)[index]()
            times[index].append((time.process_time() - began_s) / steps)
    quotients = torch.tensor([one / other for one, other in zip(*times, strict=True)])
    drawn = torch.randint(pairs, (2000, pairs), generator=torch.Generator().manual_seed(0))
    medians = quotients[drawn].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975])).tolist()
    return Pair(median(quotients.tolist()), low, high, median(times[0]) * 1e3, median(times[1]) * 1e3)


def arguments(description: str | None) -> argparse.Namespace:
    """The options that every bench has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes and few turns, to see that it runs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the results here too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        options.turns = 2
    return options


def report(results: list[Result], options: argparse.Namespace) -> None:
    """Print the table, and where it was made."""
    print(f"{machine()}; {options.turns} turns; {'CPU time' if options.device == 'cpu' else 'wall time'}\n")
    print("| case | contender | ratio | quartiles | median ms |\n|---|---|---|---|---|")
    for each in results:
        spread = f"{each.low:.3f}-{each.high:.3f}"
        print(f"| {each.case} | {each.contender} | {each.ratio:.3f} | {spread} | {each.median_ms:.3g} |")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(each) for each in results], indent=2))


def machine() -> str:
    """Processor, threads and versions."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model
        )
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} thread; {versions}"
