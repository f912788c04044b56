"""The device of a run: its name, and the refusal to train a large model on the CPU by accident."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.io.names import counted

if TYPE_CHECKING:
    import torch

    from simpletuner.helpers.configuration.schema.sections import RunConfig

LARGEST_ON_CPU = 300_000_000
"""Number of a denoiser's weights; a step of a model of billions takes minutes on a CPU."""
_GPU_FILES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/proc/driver/nvidia/version")


def has_gpu() -> bool:
    """Whether this machine seems to have a GPU that torch can use, as far as that is seen without torch."""
    if sys.platform == "win32":
        return True  # not seen from here
    if sys.platform == "darwin":
        return platform.machine() == "arm64"
    return any(Path(file).exists() for file in _GPU_FILES)


def billions(number: int) -> str:
    """A number of weights: 2.6 billion, 5 million."""
    return f"{number / 1e9:.1f} billion" if number >= 1e9 else f"{number / 1e6:.0f} million"


def refuse_cpu(config: RunConfig, device: torch.device, *, num_weights: int | None) -> None:
    """Refuse to train a large denoiser on the CPU by accident.

    Raises:
        ConfigError: The denoiser has more than 300 million weights, and allow_cpu is false.
    """
    if device.type != "cpu" or num_weights is None or num_weights <= LARGEST_ON_CPU:
        return
    if not config.precision.allow_cpu:
        raise ConfigError(
            f"This run would train on the CPU, and the denoiser has {billions(num_weights)} weights: that "
            "takes days. Install a torch build for your GPU (https://pytorch.org/get-started), or set "
            "allow_cpu to true."
        )


def device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU's memory; None for a device that is not limited by memory of its own."""
    import torch

    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def device_name(device: torch.device) -> str:
    """The device in words: its name and memory, or number of threads."""
    import torch

    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        return f"{device}, {facts.name} with {facts.total_memory / 2**30:.0f} GiB"
    if device.type == "mps":
        return "mps, the GPU of this Mac"
    if device.type == "cpu":
        return f"cpu, {counted(torch.get_num_threads(), 'thread')}"
    return str(device)
