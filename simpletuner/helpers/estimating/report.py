"""The estimate in words: a table for the command, a line for `validate`. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from simpletuner.helpers.estimating.advice import FITS, Suggestion
from simpletuner.helpers.estimating.cards import EFFICIENCY, Card, cards
from simpletuner.helpers.estimating.device_memory import Activations
from simpletuner.helpers.estimating.disk import GIB, disk_problems
from simpletuner.helpers.estimating.estimate import Estimate
from simpletuner.helpers.io.names import counted, printable

SIZES_GIB = (8, 12, 16, 24, 32, 48, 80, 141, 192)
"""Memory of the cards that people have."""
SHOWN_CARDS = ("RTX 3060", "RTX 3090", "RTX 4090", "RTX 5090", "A100 80GB", "H100 80GB")
"""Cards of the times where none is named."""
_WIDTH = 26


def summary(estimate: Estimate) -> str:
    """One line: the peak, where it is, the cards that it fits, and the disk space."""
    peak, phase = estimate.peak_device_bytes, estimate.peak.name
    disk = f"; writes {estimate.disk_bytes / GIB:.1f} GiB" if estimate.disk_bytes > GIB // 10 else ""
    disk += "".join(f"; does not fit: {problem}" for problem in disk_problems(estimate.disk))
    return (
        f"{peak / GIB:.1f} GiB of a GPU at the peak, in {phase}: {_least(peak)}{disk} (simpletuner estimate)"
    )


def lines(estimate: Estimate, *, memory_gib: float | None, card: Card | None) -> Iterator[str]:
    """The whole estimate, but for what to change.

    Args:
        estimate: Of the run.
        memory_gib: Of the device; None if it is not known.
        card: The device; None for times on some cards.
    """
    yield from _table(estimate)
    yield ""
    yield _row("device memory", verdict(estimate.peak_device_bytes, memory_gib))
    parts = ", ".join(f"{name} {number / GIB:.1f}" for name, number in estimate.host.items())
    yield _row("main memory", f"{estimate.host_bytes / GIB:.1f} GiB: {parts}")
    if estimate.disk:
        yield _row("disk", f"{estimate.disk_bytes / GIB:.1f} GiB are still to be written")
        for need in estimate.disk:
            place = printable(str(need.folder))
            yield _row("", f"{need.name}: {need.num_bytes / GIB:.2f} GiB in {place}")
    if estimate.num_images is None:
        yield _row("", "without caches of images that are not in a folder on this machine")
    yield from _times(estimate, card)
    yield from (_row("warning", f"{problem}.") for problem in disk_problems(estimate.disk))


def activation_lines(found: Sequence[Activations]) -> Iterator[str]:
    """Activations at some resolutions and batches, with gradient_checkpointing and without."""
    yield ""
    batches = dict.fromkeys(each.batch_size for each in found)
    yield f"{'activations, GiB':{_WIDTH}}" + "".join(f"{f'batch {number}':>20}" for number in batches)
    for size in dict.fromkeys(each.size for each in found):
        pairs = (
            f"{each.recomputed / GIB:.2f} / {each.kept / GIB:.2f}" for each in found if each.size == size
        )
        yield f"  {size!s:{_WIDTH - 2}}" + "".join(f"{pair:>20}" for pair in pairs)
    yield "  with gradient_checkpointing / without"


def advice_lines(found: Sequence[Suggestion], *, memory_gib: float) -> Iterator[str]:
    """What to change, in the order of the costs; each line has the estimate with those before it."""
    if not found:
        return
    yield ""
    yield f"To fit {memory_gib:g} GiB, change from the top until it fits:"
    for each in found:
        yield f"  {' '.join(each.values)}  -> {each.peak_device_bytes / GIB:.1f} GiB ({each.cost})"
    if found[-1].peak_device_bytes > FITS * memory_gib * GIB:
        yield "  Nothing else here lowers it: a smaller model, or a larger card, is needed."


def verdict(peak: int, memory_gib: float | None) -> str:
    """The peak, and whether it fits."""
    text = f"{peak / GIB:.1f} GiB at the peak"
    if memory_gib is None:
        return f"{text}; {_least(peak)}"
    share = peak / (memory_gib * GIB)
    word = "fits" if share <= FITS else "may not fit" if share <= 1 else "does not fit"
    return f"{text}, {share:.0%} of {memory_gib:g} GiB: {word}"


def _least(peak: int) -> str:
    """The smallest usual memory that a peak fits."""
    least = next((size for size in SIZES_GIB if peak <= FITS * size * GIB), None)
    return "fits no single GPU" if least is None else f"fits {least} GiB"


def _table(estimate: Estimate) -> Iterator[str]:
    """Parts as rows, phases as columns, in GiB."""
    names = [phase.name for phase in estimate.phases]
    yield f"{'device memory, GiB':{_WIDTH}}" + "".join(f"{name:>20}" for name in names)
    longest_first = sorted(estimate.phases, key=lambda phase: -len(phase.parts))
    rows = dict.fromkeys(part for phase in longest_first for part in phase.parts)
    rows["context"] = rows.pop("context")  # last
    for part in rows:
        cells = (_cell(phase.parts.get(part)) for phase in estimate.phases)
        yield f"  {part:{_WIDTH - 2}}" + "".join(f"{cell:>20}" for cell in cells)
    yield f"  {'sum':{_WIDTH - 2}}" + "".join(f"{_cell(each.num_bytes):>20}" for each in estimate.phases)


def _cell(number: int | None) -> str:
    return "" if number is None else f"{number / GIB:.2f}"


def _times(estimate: Estimate, card: Card | None) -> Iterator[str]:
    work = estimate.work
    if work is None:
        yield _row("time", "not estimated in float32")
        return
    named = [card] if card is not None else [each for each in cards() if each.name in SHOWN_CARDS]
    steps = "" if work.num_steps is None else f" for {counted(work.num_steps, 'step')} with their images"
    yield _row("time", f"at {EFFICIENCY:.0%} of the vendor's bf16 figure; an estimate")
    for each in named:
        seconds, total = work.seconds_per_step(each), work.seconds(each)
        whole = "" if total is None else f", {_duration(total)}{steps}"
        yield _row("", f"{each.name}: {seconds:.2f} s a step{whole}")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes == 0:
        return "under a minute"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def _row(name: str, text: str) -> str:
    return f"{name:16}{text}"
