"""Make a new LyCORIS network for chosen layers, or say which of them it cannot be made for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from lycoris.logging import logger as lycoris_logger
from lycoris.wrapper import LycorisNetwork
from torch import nn

from simpletuner.helpers.adapters import lycoris_layers, targets
from simpletuner.helpers.adapters.targets import Options
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig
from simpletuner.helpers.errors import ConfigError

lycoris_layers.register()

Size = tuple[int, ...]

# What LyCORIS's constructors raise for a layer or an argument that an algorithm cannot have.
REFUSALS = (ValueError, NotImplementedError, AssertionError)


@contextmanager
def quiet_lycoris() -> Iterator[None]:
    """Keep LyCORIS from printing a line per setting; what matters is checked and said here."""
    level = lycoris_logger.level
    lycoris_logger.setLevel("ERROR")
    try:
        yield
    finally:
        lycoris_logger.setLevel(level)


@dataclass(frozen=True, kw_only=True)
class NetworkBuilder:
    """What a new network on a denoiser is made from."""

    denoiser: nn.Module
    config: LycorisConfig
    schedule: RankSchedule
    seed: int

    def network(self, layers: Mapping[str, Options]) -> LycorisNetwork:
        """The network for the layers among these modules, not attached yet.

        Args:
            layers: Path -> what differs for it, as `targets.resolve` gives it.

        Raises:
            ConfigError: LyCORIS cannot make the algorithm for some of them, or the rank of a T-LoRA is above
                a layer's size.
        """
        try:
            return self._create(layers)
        except REFUSALS as error:
            raise ConfigError(self._refusal_message(layers, error)) from error

    def _create(self, layers: Mapping[str, Options]) -> LycorisNetwork:
        config, extra = self.config, dict(self.config.extra)
        in_force = targets.preset_in_force(layers, enable_conv=config.apply_preset.enable_conv)
        with in_force, quiet_lycoris(), torch.random.fork_rng():
            torch.manual_seed(self.seed)  # stock algorithms draw their start from the global generator
            return LycorisNetwork(
                self.denoiser,
                multiplier=config.multiplier,
                lora_dim=config.linear_dim,
                conv_lora_dim=extra.pop("conv_dim", config.linear_dim),
                alpha=config.linear_alpha,
                conv_alpha=extra.pop("conv_alpha", config.linear_alpha),
                network_module=config.algo,
                warn_on_unmatched=False,
                tlora_init=config.tlora_init,
                sig_type=config.sig_type,
                schedule=self.schedule,
                seed=self.seed,
                **extra,
            )

    def _refusal_message(self, layers: Mapping[str, Options], error: Exception) -> str:
        """What to tell the user, once one layer of each kind was tried alone to find those that fail."""
        modules = dict(self.denoiser.named_modules())
        examples: dict[tuple[Size, str], str] = {}
        for path, options in layers.items():
            if size := _size_of(modules[path]):
                examples.setdefault((size, str(options)), path)
        failed: dict[Size, tuple[str, Exception]] = {}
        for (size, _), path in examples.items():
            try:
                self._create({path: layers[path]})
            except REFUSALS as own:
                failed.setdefault(size, (path, own))
        path, error = next(iter(failed.values()), (next(iter(layers)), error))
        algo = layers[path].get("algo", self.config.algo)
        dim = layers[path].get("dim", self.config.linear_dim)
        sizes = ", ".join("x".join(map(str, size)) for size in failed) or "any size"
        reason = str(error).rstrip(".") or type(error).__name__
        remedy = _remedy(algo, [size[0] for size in failed])
        return (
            f"algo {algo} with linear_dim {dim} cannot be made for layers of {sizes}, the first of them "
            f"{path}. LyCORIS says: {reason}. {remedy}, give these layers another algo in name_algo_map, or "
            "leave them out with exclude_name."
        )


def _size_of(module: nn.Module) -> Size:
    """Outputs, inputs and kernel of a layer; empty for what is none."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.out_channels, module.in_channels, *module.kernel_size
    return ()


def _remedy(algo: str, outputs: Sequence[int]) -> str:
    if algo == "boft" and outputs and not any(num % 2 for num in outputs):
        # Its blocks are even, and their number is a power of two, so a block holds every odd divisor.
        return f"Raise linear_dim to {max(2 * (num // (num & -num)) for num in outputs)}"
    return "Change linear_dim or the algorithm's arguments"
