"""Plans of the benchmark: contenders, ranks, concepts, seeds and steps; all contenders train alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from simpletuner.demo.comparison.concepts import CONCEPTS
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule

LEARNING_RATE = 1.5e-3
"""Shared by all contenders and ranks."""
TARGETS = {"target_module": ["Attention", "FeedForward"]}


@dataclass(frozen=True, slots=True)
class Contender:
    """A training method."""

    # The repr of a run is part of its fingerprint: renaming a class or field here repeats finished runs.

    name: str
    init: str | None = None
    """tlora_init; None is LyCORIS's LoRA."""
    band: str = "last"
    """sig_type: the singular triplets of the initialisation."""
    min_share: float = 1.0
    """Active rank at the noisiest timestep, at least 1, as a share of the rank; 1.0 for a constant rank."""
    mask_mode: str = "floor"
    scale: str = "rank"
    """tlora_scale."""
    weighted: bool = False
    """Whether timesteps are drawn in proportion to T-LoRA's active rank, not evenly."""

    @property
    def is_masked(self) -> bool:
        """Whether the active rank falls with the noise."""
        return self.min_share < 1

    @property
    def unmasked(self) -> Contender:
        """The same files sampled with every rank active at every timestep."""
        return replace(self, name=f"{self.name}, unmasked")

    def min_rank(self, rank: int) -> int:
        """Active rank at the noisiest timestep."""
        return max(1, int(rank * self.min_share))

    def lycoris(self, rank: int) -> dict[str, object]:
        """LyCORIS configuration at a rank."""
        common = {"multiplier": 1.0, "linear_dim": rank, "linear_alpha": rank, "apply_preset": TARGETS}
        if self.init is None:
            return {"algo": "lora", **common}
        return {
            "algo": "tlora",
            **common,
            "tlora_init": self.init,
            "sig_type": self.band,
            "tlora_min_rank": self.min_rank(rank),
            "tlora_schedule": self.mask_mode,
            "tlora_scale": self.scale,
        }


LORA = Contender("LoRA")
VANILLA = Contender("Vanilla T-LoRA", init="vanilla", min_share=0.5)
STATIC = Contender("Ortho-LoRA", init="random")
"""T-LoRA with a constant rank: min rank = rank."""
TLORA = Contender("T-LoRA", init="random", min_share=0.5)
CONTENDERS = (LORA, VANILLA, STATIC, TLORA)
VARIANTS = (
    *(
        replace(TLORA, name=f"T-LoRA min {name}", min_share=share)
        for name, share in {"1": 0.0, "R/4": 0.25, "3R/4": 0.75}.items()
    ),
    replace(TLORA, name="T-LoRA active scale", scale="active"),
    *(replace(each, name=f"{each.name} weighted timesteps", weighted=True) for each in (LORA, STATIC)),
)
FURTHER_CONTENDERS = (
    Contender("static rank", init="vanilla"),  # LoRA through T-LoRA's layer
    *(
        Contender(f"T-LoRA {init}/{band}", init=init, band=band, min_share=0.5)
        for init, band in product(("random", "weight"), ("last", "middle", "principal"))
        if (init, band) != ("random", "last")
    ),
    Contender("T-LoRA inclusive", init="random", min_share=0.5, mask_mode="inclusive"),
)


def timestep_weights(rank: int) -> list[int]:
    """[T] T-LoRA's active rank at each timestep, in proportion to which `weighted` contenders draw them.

    T-LoRA trains a rank at the timesteps at which it is active. Averaged over its ranks, that is in this
    proportion.
    """
    schedule = RankSchedule(rank, min_rank=TLORA.min_rank(rank))
    return [schedule.rank_at(timestep) for timestep in range(schedule.num_timesteps)]


@dataclass(frozen=True, slots=True)
class Run:
    """One adapter to train and measure."""

    contender: Contender
    rank: int
    concept: str
    """Key of CONCEPTS."""
    seed: int

    @property
    def name(self) -> str:
        """Name of its files."""
        contender = self.contender.name.replace("/", "-").replace(" ", "-").lower()
        return f"{contender}_rank-{self.rank}_{self.concept}_seed-{self.seed}"


@dataclass(frozen=True, slots=True)
class Plan:
    """The settings of a benchmark."""

    contenders: tuple[Contender, ...] = CONTENDERS
    ranks: tuple[int, ...] = (4, 16)
    detailed_rank: int | None = 16
    """Rank at which VARIANTS are trained too, and masked contenders are also measured unmasked."""
    concepts: tuple[str, ...] = tuple(CONCEPTS)
    seeds: int = 5
    steps: tuple[int, ...] = (80, 200, 320)
    """Steps after which each adapter is measured."""
    unequal: tuple[int, int] = (200, 320)
    """Steps of LoRA and of the others, in the paper's proportion of 500 to 800."""
    learning_rate: float = LEARNING_RATE
    batch: int = 2
    """Copies of the training image, each with other noise."""
    prompts: int = 8
    """Images per measurement with place and background in the prompt."""
    neutral: int = 4
    """Images per measurement for the concept's name alone."""
    sampling_steps: int = 15
    guidance: float = 3.0

    def runs(self) -> Iterator[Run]:
        """Every run, seed by seed with all contenders, so that an unfinished benchmark compares them all."""
        order = product(range(self.seeds), self.concepts, self.ranks)
        return (
            Run(contender, rank, concept, seed)
            for seed, concept, rank in order
            for contender in self.contenders + (VARIANTS if rank == self.detailed_rank else ())
        )

    def is_measured_unmasked(self, run: Run) -> bool:
        """Whether a run's files are also measured with every rank active."""
        return run.contender.is_masked and run.rank == self.detailed_rank


STANDARD = Plan()
QUICK = replace(
    STANDARD,
    ranks=(4,),
    detailed_rank=None,
    concepts=STANDARD.concepts[:1],
    seeds=1,
    steps=(20, 40),
    unequal=(20, 40),
    prompts=3,
    neutral=1,
    sampling_steps=8,
)
"""Three minutes or less: tests the benchmark itself; its results say nothing about the contenders."""
FULL = replace(STANDARD, contenders=(*CONTENDERS, *FURTHER_CONTENDERS), ranks=(4, 16, 64))
PLANS = {"standard": STANDARD, "quick": QUICK, "full": FULL}
