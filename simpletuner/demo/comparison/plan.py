"""Plans of the benchmark: contenders, ranks, concepts, seeds and steps; all contenders train alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from simpletuner.demo.comparison.concepts import CONCEPTS

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
    masked: bool = False
    """Whether the active rank falls to half at the noisiest timestep; else it is constant."""
    mask_mode: str = "floor"

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
            "tlora_min_rank": rank // 2 if self.masked else rank,
            "tlora_schedule": self.mask_mode,
        }


LORA = Contender("LoRA")
STATIC = Contender("Ortho-LoRA", init="random")
"""T-LoRA with a constant rank: min rank = rank."""
CONTENDERS = (
    LORA,
    Contender("Vanilla T-LoRA", init="vanilla", masked=True),
    STATIC,
    Contender("T-LoRA", init="random", masked=True),
)
FURTHER_CONTENDERS = (
    Contender("static rank", init="vanilla"),  # LoRA through T-LoRA's layer
    *(
        Contender(f"T-LoRA {init}/{band}", init=init, band=band, masked=True)
        for init, band in product(("random", "weight"), ("last", "middle", "principal"))
        if (init, band) != ("random", "last")
    ),
    Contender("T-LoRA inclusive", init="random", masked=True, mask_mode="inclusive"),
)


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
        order = product(range(self.seeds), self.concepts, self.ranks, self.contenders)
        return (Run(contender, rank, concept, seed) for seed, concept, rank, contender in order)


STANDARD = Plan()
QUICK = replace(
    STANDARD,
    ranks=(4,),
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
