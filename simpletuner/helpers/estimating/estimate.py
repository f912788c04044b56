"""The estimate of a run: device memory by phase, main memory, disk space, time. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from simpletuner.helpers.configuration.schema.sections import RunConfig
from simpletuner.helpers.estimating.cards import EFFICIENCY, Card, Work
from simpletuner.helpers.estimating.device_memory import Activations, Phase, activations_of, phases_of
from simpletuner.helpers.estimating.disk import DiskNeed, disk_needs
from simpletuner.helpers.estimating.host_memory import host_memory
from simpletuner.helpers.estimating.run_facts import facts_of
from simpletuner.helpers.estimating.work import work_of
from simpletuner.helpers.models.registry import specs


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a run needs, by its configuration; bytes."""

    phases: tuple[Phase, ...]
    """Device memory, in the order of the run."""
    host: Mapping[str, int]
    """Part -> main memory."""
    disk: tuple[DiskNeed, ...]
    """What is still to be written."""
    work: Work | None
    """None in float32, for which no card has figures here."""
    num_images: int | None
    """None if they are not in folders on this machine."""

    @property
    def peak(self) -> Phase:
        """The phase that needs the most device memory."""
        return max(self.phases, key=lambda phase: phase.num_bytes)

    @property
    def peak_device_bytes(self) -> int:
        """Device memory of the largest phase."""
        return self.peak.num_bytes

    @property
    def host_bytes(self) -> int:
        """Main memory."""
        return sum(self.host.values())

    @property
    def disk_bytes(self) -> int:
        """Disk space that is still to be written."""
        return sum(need.num_bytes for need in self.disk)

    def as_json(self, cards: tuple[Card, ...]) -> dict[str, Any]:
        """Everything in bytes and seconds, with the times on cards."""
        work = self.work
        return {
            "peak_device_bytes": self.peak_device_bytes,
            "peak_phase": self.peak.name,
            "device_bytes": {phase.name: dict(phase.parts) for phase in self.phases},
            "host_bytes": dict(self.host),
            "disk_bytes": [asdict(need) | {"folder": str(need.folder)} for need in self.disk],
            "images": self.num_images,
            "flops_per_step": None if work is None else work.flops_per_step,
            "steps": None if work is None else work.num_steps,
            "efficiency": EFFICIENCY,
            "seconds": {
                card.name: {"step": work.seconds_per_step(card), "run": work.seconds(card)}
                for card in cards
                if work is not None
            },
        }


def activations(run: RunConfig) -> list[Activations]:
    """Device memory of activations at some resolutions and batches; none without a memory model."""
    facts = facts_of(run, specs()[run.model.model_family])
    return [] if facts is None else list(activations_of(facts))


def estimate(run: RunConfig) -> Estimate | None:
    """The estimate of a run on a GPU; None if its family has no memory model.

    Raises:
        DataError: A dataset's folder cannot be read.
        ModelError: A local model's file is no safetensors file.
    """
    facts = facts_of(run, specs()[run.model.model_family])
    if facts is None:
        return None
    return Estimate(
        phases=phases_of(facts),
        host=host_memory(facts),
        disk=disk_needs(facts),
        work=work_of(facts),
        num_images=facts.num_images,
    )
