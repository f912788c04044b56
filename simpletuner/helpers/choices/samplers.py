"""Samplers of validation images: the values of `validation_noise_scheduler`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from simpletuner.helpers.choices.registry import Choice, Registry
from simpletuner.helpers.contracts import ModelSpec

NoiseProcess = Literal["diffusion", "flow_matching"]


@dataclass(frozen=True, kw_only=True)
class Sampler(Choice):
    """A sampler; a model family may register its own."""

    schedulers: Mapping[NoiseProcess, str]
    """Noise process of a model -> scheduler class as "module:name"."""
    families: tuple[str, ...] = ()
    """Model families that the sampler works for. Default: all with the noise process."""

    def load_for(self, process: NoiseProcess) -> Any:
        """Import the scheduler class for models of this noise process."""
        return replace(self, build=self.schedulers[process]).load()


def _diffusion(name: str, scheduler: str) -> Sampler:
    return Sampler(
        name=name, summary=f"{scheduler} of diffusers.", schedulers={"diffusion": f"diffusers:{scheduler}"}
    )


SAMPLERS = Registry(
    _diffusion("ddim", "DDIMScheduler"),
    _diffusion("ddpm", "DDPMScheduler"),
    _diffusion("dpm++", "DPMSolverMultistepScheduler"),
    Sampler(
        name="euler",
        summary="Euler's method, for diffusion and flow matching.",
        schedulers={
            "diffusion": "diffusers:EulerDiscreteScheduler",
            "flow_matching": "diffusers:FlowMatchEulerDiscreteScheduler",
        },
    ),
    _diffusion("euler-a", "EulerAncestralDiscreteScheduler"),
    _diffusion("heun", "HeunDiscreteScheduler"),
    _diffusion("unipc", "UniPCMultistepScheduler"),
)


def samplers_of(spec: ModelSpec) -> tuple[str, ...]:
    """Samplers that validation can use for a model family."""
    process: NoiseProcess = "flow_matching" if "flow_matching" in spec.prediction_types else "diffusion"
    return tuple(
        name
        for name, sampler in SAMPLERS.items()
        if process in sampler.schedulers and (not sampler.families or spec.name in sampler.families)
    )
