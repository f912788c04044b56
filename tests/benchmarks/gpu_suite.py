"""The benchmarks that need a GPU, in one go: training steps, memory, sampling, compiled blocks, precisions.

    pip install --no-index --find-links wheels diffusers transformers peft lycoris-lora accelerate
    PYTHONPATH=. python tests/benchmarks/gpu_suite.py --minutes 8 --json suite.json
    PYTHONPATH=. python tests/benchmarks/gpu_suite.py --toy

Needs torch 2.11 or newer and the dependencies of pyproject.toml. Weights are random and made on the device.
Each part has a share of the minutes, and each row is printed and written as soon as it is measured; a part
that fails or runs out of its time is a row that says so. --toy runs all parts with toy models on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent))
from measure import Result, clock_s, machine, side_by_side
from suite_models import FLUX, KLEIN_4B, SDXL, Denoiser, Stage, adapted_paths, no_gradients_left

from simpletuner.helpers.configuration.schema.compiling import CompileConfig
from simpletuner.helpers.models.compiling import compile_for_training
from simpletuner.helpers.models.quantisation import quantize_and_move

GIB = 2**30
SPARE_S = 3.0
SAMPLING_STEPS = 28
COLUMNS = ("part", "case", "contender", "ms", "ratio", "quartiles", "limit ms", "peak GiB")
COUNTS = ("launches", "per layer", "syncs", "error", "note")


@dataclass(frozen=True)
class Row:
    """One measurement; None where it does not apply."""

    part: str
    case: str
    contender: str = ""
    ms: float | None = None
    ratio: float | None = None
    """To the first contender of the case; the quartiles are of the quotients of single turns."""
    low: float | None = None
    high: float | None = None
    limit_ms: float | None = None
    peak_gib: float | None = None
    launches: int | None = None
    """Kernel launches of a step on a GPU, operator calls on a CPU."""
    per_layer: float | None = None
    """Launches beyond the frozen model's, for each adapted layer."""
    syncs: int | None = None
    """Times in a step that the host waits for the GPU."""
    error: float | None = None
    """Norm of the gradients' difference, over the norm of the exact ones."""
    note: str = ""

    def line(self) -> str:
        """The row of the table."""
        quartiles = "" if self.low is None else f"{self.low:.3f}-{self.high:.3f}"
        numbers = (self.ms, self.ratio, quartiles, self.limit_ms, self.peak_gib)
        counts = (self.launches, self.per_layer, self.syncs, self.error, self.note)
        cells = (self.part, self.case, self.contender, *map(_cell, (*numbers, *counts)))
        return f"| {' | '.join(cells)} |"


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Settings:
    """What all parts share."""

    device: torch.device
    rank: int
    is_toy: bool
    max_turns: int

    def stage(self, denoiser: Denoiser, *, dtype: torch.dtype = torch.bfloat16, batch: int = 1) -> Stage:
        """The model with random weights, at toy size on request."""
        chosen = denoiser.at_toy_size() if self.is_toy else denoiser
        return Stage.of(chosen, device=self.device, dtype=dtype, rank=self.rank, batch=batch)

    def turns(self, runs: Sequence[Callable[[], object]], *, budget_s: float) -> int:
        """Turns that fit into the budget, from one of each."""
        began_s = clock_s(self.device)
        for run in runs:
            run()
        once_s = max(clock_s(self.device) - began_s, 1e-6)
        return min(self.max_turns, max(2, int(budget_s / once_s)))


@dataclass(frozen=True)
class Contender:
    """One way to take a step."""

    run: Callable[[], object]
    num_layers: int = 0
    """Adapted layers."""


def frozen(stage: Stage, model: Any) -> Contender:
    """Forward and backward without an adapter; the input asks for the gradient."""
    return Contender(lambda: stage.loss(model, asks_for_input=True).backward())


def tlora(stage: Stage, model: Any, *, timestep: int = 500) -> Contender:
    """A whole step of a T-LoRA, as the trainer takes it."""
    adapter = stage.with_tlora(model)

    def forward_and_backward() -> None:
        with adapter.rank_mask_for([timestep]):
            stage.loss(model).backward()

    step = _with_optimizer(adapter.parameters(), forward_and_backward)
    return Contender(step, len(adapted_paths(model)))


def peft(stage: Stage, model: Any, *, targets: Sequence[str]) -> Contender:
    """A whole step of PEFT's LoRA on the same layers."""
    parameters = stage.with_peft(model, targets)
    return Contender(_with_optimizer(parameters, lambda: stage.loss(model).backward()), len(targets))


def _with_optimizer(parameters: Sequence[Any], step: Callable[[], None]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def run() -> None:
        step()
        optimizer.step()
        optimizer.zero_grad()

    return run


def targets_of(stage: Stage) -> list[str]:
    """Layers that a T-LoRA adapts on this model."""
    model = stage.twin()
    stage.with_tlora(model)
    return adapted_paths(model)


def training(denoiser: Denoiser, settings: Settings, budget_s: float) -> Iterator[Row]:
    """A step of the whole model with every block recomputed."""
    stage = settings.stage(denoiser)
    stage.base.enable_gradient_checkpointing()
    targets = targets_of(stage)
    makers = {
        "frozen": partial(frozen, stage),
        f"PEFT LoRA rank {stage.rank}": partial(peft, stage, targets=targets),
        f"T-LoRA rank {stage.rank}, t = 500": partial(tlora, stage),
    }
    yield from compare("training", stage, makers, settings=settings, budget_s=budget_s)


def compare(
    part: str,
    stage: Stage,
    makers: dict[str, Callable[[Any], Contender]],
    *,
    settings: Settings,
    budget_s: float,
) -> Iterator[Row]:
    """Build contenders one by one, and time them in turns; each is a row."""
    began_s, weights = time.monotonic(), allocated(stage.device)
    contenders, peaks = {}, {}
    for name, make in makers.items():
        held = allocated(stage.device)
        contender = contenders[name] = make(stage.twin())
        contender.run()
        own = allocated(stage.device) - held
        others = allocated(stage.device) - weights - own
        peaks[name] = peak_gib(contender.run, others=others, device=stage.device)
    runs = {name: each.run for name, each in contenders.items()}
    left_s = 0.8 * (budget_s - (time.monotonic() - began_s))
    turns = settings.turns([*runs.values()], budget_s=left_s)
    results = side_by_side(part, stage.denoiser.name, runs, turns=turns, device=stage.device)
    counts = {name: launches(run, stage.device) for name, run in runs.items()}
    first = next(iter(counts.values()))
    for result in results:
        layers, count = contenders[result.contender].num_layers, counts[result.contender]
        yield replace(
            timed_row(result),
            limit_ms=stage.denoiser.limit_ms,
            peak_gib=peaks[result.contender],
            launches=count,
            per_layer=(count - first) / layers if layers else None,
            syncs=host_syncs(runs[result.contender], stage.device),
            note=f"{layers} layers, {turns} turns",
        )


def timed_row(result: Result) -> Row:
    """The times of a contender as a row."""
    spread = {"ratio": result.ratio, "low": result.low, "high": result.high}
    return Row(result.bench, result.case, result.contender, ms=result.median_ms, **spread)


def allocated(device: torch.device) -> int:
    """Bytes of all tensors on a GPU; 0 on a CPU."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def peak_gib(run: Callable[[], object], *, others: int, device: torch.device) -> float | None:
    """The most memory in a step, without the bytes of other contenders; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - others) / GIB


def launches(run: Callable[[], object], device: torch.device) -> int:
    """Kernel launches of a step; operator calls on a CPU."""
    is_gpu = device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    with profile(activities=kinds) as profiler:
        run()
    prefix = ("cudaLaunchKernel", "cuLaunchKernel") if is_gpu else ("aten::",)
    return sum(event.count for event in profiler.key_averages() if event.key.startswith(prefix))


def host_syncs(run: Callable[[], object], device: torch.device) -> int | None:
    """Synchronisations of a step; None on a CPU."""
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(each.message) for each in caught)


def sampling(settings: Settings, budget_s: float) -> Iterator[Row]:
    """B6: a denoising step with guidance, the ranks of a picture's timesteps in turn."""
    stage = settings.stage(SDXL, batch=2)
    stage.base.eval()
    targets = targets_of(stage)

    def denoise(model: Any) -> None:
        with torch.no_grad():
            stage.loss(model)

    def masked(model: Any) -> Contender:
        adapter, timesteps = stage.with_tlora(model), cycle(range(999, 0, -1000 // SAMPLING_STEPS))

        def run() -> None:
            with adapter.rank_mask_for([next(timesteps)]):
                denoise(model)

        return Contender(run, len(targets))

    def unfused(model: Any) -> Contender:
        stage.with_peft(model, targets)
        return Contender(lambda: denoise(model), len(targets))

    makers = {
        "base": lambda model: Contender(lambda: denoise(model)),
        f"PEFT LoRA rank {stage.rank}, unfused": unfused,
        f"T-LoRA rank {stage.rank}": masked,
    }
    for row in compare("B6", stage, makers, settings=settings, budget_s=budget_s):
        yield replace(row, case="a denoising step, batch 2", limit_ms=None)


def gradients(settings: Settings, budget_s: float) -> Iterator[Row]:
    """Gradients of recomputed blocks, which a GPU runs on threads of autograd, against kept float32 ones."""
    exact = settings.stage(FLUX.shallow(double=1, single=1), dtype=torch.float32)
    expected = adapter_gradients(exact, exact.twin())
    for dtype in (torch.float32, torch.bfloat16):
        base = copy.deepcopy(exact.base).to(dtype)
        inputs = {
            name: value.to(dtype) if "ids" not in name else value for name, value in exact.inputs.items()
        }
        stage = replace(exact, dtype=dtype, base=base, inputs=inputs)
        stage.base.enable_gradient_checkpointing()
        found = adapter_gradients(stage, stage.twin())
        error = float((found - expected).norm() / expected.norm())
        name = str(dtype).removeprefix("torch.")
        yield Row(
            "gradients",
            stage.denoiser.name,
            f"{name}, recomputed",
            error=error,
        )


def adapter_gradients(stage: Stage, model: Any) -> Tensor:
    """All gradients of a T-LoRA in one vector, float32."""
    adapter = stage.with_tlora(model)
    with no_gradients_left(adapter.parameters()):
        with adapter.rank_mask_for([700]):
            stage.loss(model).backward()
        return torch.cat([_gradient(parameter).flatten() for parameter in adapter.parameters()])


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "every factor is trained"
    return parameter.grad.float()


def compiled(settings: Settings, budget_s: float) -> Iterator[Row]:
    """Blocks of real width with and without torch.compile."""
    stage = settings.stage(FLUX.shallow(double=2, single=4))
    backend = "eager" if settings.is_toy else "inductor"
    config, targets = CompileConfig(dynamo_backend=backend), targets_of(stage)

    def with_compiling(make: Callable[[Any], Contender]) -> Callable[[Any], Contender]:
        def made(model: Any) -> Contender:
            contender = make(model)
            compile_for_training(model, config)
            return contender

        return made

    makers: dict[str, Callable[[Any], Contender]] = {}
    for name, make in {
        "frozen": partial(frozen, stage),
        "PEFT": partial(peft, stage, targets=targets),
        "T-LoRA": partial(tlora, stage),
    }.items():
        makers |= {f"{name}, eager": make, f"{name}, compiled": with_compiling(make)}
    yield from compare("compiled", stage, makers, settings=settings, budget_s=budget_s)


def half(settings: Settings, budget_s: float) -> Iterator[Row]:
    """Steps in float16 with a gradient scaler."""
    stage = settings.stage(FLUX.shallow(double=1, single=1), dtype=torch.float16)
    model = stage.twin()
    adapter = stage.with_tlora(model)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-5, fused=True)
    scaler = torch.amp.GradScaler(stage.device.type, init_scale=2.0**16)
    scales = []
    for _ in range(10):
        with adapter.rank_mask_for([500]):
            scaler.scale(stage.loss(model)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    skipped = sum(after < before for before, after in zip([2.0**16, *scales], scales, strict=False))
    is_finite = all(bool(parameter.isfinite().all()) for parameter in adapter.parameters())
    note = f"10 steps, {skipped} skipped, scale {scales[-1]:g}, adapter {'' if is_finite else 'not '}finite"
    yield Row("fp16", stage.denoiser.name, "T-LoRA with a gradient scaler", note=note)


def quantised(precision: Any, settings: Settings, budget_s: float) -> Iterator[Row]:
    """A step of a T-LoRA on a quantised base."""
    stage = settings.stage(FLUX.shallow(double=2, single=4))
    stage = replace(stage, base=quantize_and_move(stage.base, precision=precision, device=stage.device))
    makers = {f"T-LoRA on {precision}": partial(tlora, stage)}
    for row in compare("quantised", stage, makers, settings=settings, budget_s=budget_s):
        yield replace(row, ratio=None, low=None, high=None, limit_ms=None)


Part = Callable[[Settings, float], Iterator[Row]]
PARTS: dict[str, tuple[float, Part]] = {
    "SDXL": (0.19, partial(training, SDXL)),
    "Flux.1": (0.19, partial(training, FLUX)),
    "Klein 4B": (0.16, partial(training, KLEIN_4B)),
    "B6": (0.08, sampling),
    "gradients": (0.04, gradients),
    "compiled": (0.18, compiled),
    "fp16": (0.04, half),
    "int8": (0.04, partial(quantised, "int8-torchao")),
    "fp8": (0.04, partial(quantised, "fp8-torchao")),
    "nf4": (0.04, partial(quantised, "nf4-bnb")),
}
"""Name -> share of the minutes, and what is measured."""


class OutOfTimeError(Exception):
    """A part has used its time."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError in the context after these seconds."""

    def stop(*_: object) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Report:
    """The rows so far, on the screen and in a file."""

    def __init__(self, file: Path | None) -> None:
        self._file, self._rows = file, []
        names = (*COLUMNS, *COUNTS)
        print(f"{machine()}\n\n| {' | '.join(names)} |\n|{'---|' * len(names)}", flush=True)

    def add(self, row: Row) -> None:
        """Print a row, and write all of them."""
        self._rows.append(row)
        print(row.line(), flush=True)
        if self._file is not None:
            content = {"machine": machine(), "rows": [asdict(each) for each in self._rows]}
            self._file.write_text(json.dumps(content, indent=2))


def main() -> None:
    """Run every part within its time."""
    options = parse()
    device = torch.device(options.device)
    settings = Settings(
        device=device,
        rank=4 if options.toy else 64,
        is_toy=options.toy,
        max_turns=2 if options.toy else 30,
    )
    if options.toy:
        torch.set_num_threads(1)
    report = Report(options.json)
    ends_s = time.monotonic() + 60 * options.minutes
    for name, (share, part) in PARTS.items():
        if options.only and name not in options.only:
            continue
        budget_s = min(60 * options.minutes * share, ends_s - time.monotonic() - SPARE_S)
        run_part(name, partial(part, settings), report=report, budget_s=budget_s)


def run_part(name: str, part: Callable[[float], Iterator[Row]], *, report: Report, budget_s: float) -> None:
    """Run a part, whatever becomes of it, and free its memory."""
    if budget_s <= 0:
        report.add(Row(name, "", note="not run: no time was left"))
        return
    try:
        with time_limit(budget_s):
            for row in part(budget_s):
                report.add(row)
    except OutOfTimeError:
        report.add(Row(name, "", note=f"stopped after its {budget_s:.0f} s"))
    except Exception as error:  # noqa: BLE001 - named boundary: the parts after this one still run
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300].replace("|", "/")
        report.add(Row(name, "", note=reason))
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="of all parts together")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--toy", action="store_true", help="toy models, to see that it runs")
    parser.add_argument("--only", nargs="*", choices=PARTS, help="these parts alone")
    options = parser.parse_args()
    if options.device == "cpu" and not options.toy:
        parser.error("models of real size need a GPU; --toy runs all parts on a CPU")
    return options


if __name__ == "__main__":
    main()
