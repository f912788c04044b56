"""What is compared: contenders, ranks, concepts, seeds and steps. Every contender is treated alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from simpletuner.demo.comparison.concepts import CONCEPTS

LEARNING_RATE = 1.5e-3
"""Of every contender at every rank."""
TARGETS = {"target_module": ["Attention", "FeedForward"]}


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to train an adapter."""

    name: str
    init: str | None = None
    """tlora_init; None is LyCORIS's plain LoRA."""
    band: str = "last"
    """tlora_sig_type: which singular triplets the factors start from."""
    masked: bool = False
    """Whether the rank falls to half of it at the noisiest timestep; else all ranks are always open."""
    mask_mode: str = "floor"

    def lycoris(self, rank: int) -> dict[str, object]:
        """The lycoris json at a rank."""
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
"""T-LoRA with the rank held still: min rank = rank."""
CONTENDERS = (
    LORA,
    Contender("Vanilla T-LoRA", init="vanilla", masked=True),
    STATIC,
    Contender("T-LoRA", init="random", masked=True),
)
FURTHER_CONTENDERS = (
    Contender("static rank", init="vanilla"),  # a LoRA through the same layer as the others
    *(
        Contender(f"T-LoRA {init}/{band}", init=init, band=band, masked=True)
        for init, band in product(("random", "weight"), ("last", "middle", "principal"))
        if (init, band) != ("random", "last")
    ),
    Contender("T-LoRA inclusive", init="random", masked=True, mask_mode="inclusive"),
)


@dataclass(frozen=True, slots=True)
class Run:
    """One adapter to train and to measure."""

    contender: Contender
    rank: int
    concept: str
    """Key of CONCEPTS."""
    seed: int

    @property
    def name(self) -> str:
        """Names its files."""
        contender = self.contender.name.replace("/", "-").replace(" ", "-").lower()
        return f"{contender}_rank-{self.rank}_{self.concept}_seed-{self.seed}"


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole comparison."""

    contenders: tuple[Contender, ...] = CONTENDERS
    ranks: tuple[int, ...] = (4, 16)
    concepts: tuple[str, ...] = tuple(CONCEPTS)
    seeds: int = 5
    steps: tuple[int, ...] = (80, 200, 320)
    """After which each adapter is measured."""
    unequal: tuple[int, int] = (200, 320)
    """LoRA's steps and those of the others, in the paper's proportion of 500 to 800."""
    learning_rate: float = LEARNING_RATE
    batch: int = 2
    """Of the one picture, each time with other noise."""
    prompts: int = 8
    """Pictures with a place and a background in the prompt, at each measurement."""
    neutral: int = 4
    """Pictures of the concept alone."""
    sampling_steps: int = 15
    guidance: float = 3.0

    def runs(self) -> Iterator[Run]:
        """Every adapter; all contenders of one seed before the next seed, so that a part is a comparison."""
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
"""Three minutes or less: shows that everything runs, says nothing about the contenders."""
FULL = replace(STANDARD, contenders=(*CONTENDERS, *FURTHER_CONTENDERS), ranks=(4, 16, 64))
PLANS = {"standard": STANDARD, "quick": QUICK, "full": FULL}
