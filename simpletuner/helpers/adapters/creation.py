"""Build a new LyCORIS network, or name the layers that its algorithm does not support."""

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
from simpletuner.helpers.choices.algorithms import ALGORITHMS
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig
from simpletuner.helpers.errors import ConfigError

lycoris_layers.register()

Size = tuple[int, ...]

# LyCORIS's constructors raise these for a layer or an argument that an algorithm does not support.
REFUSALS = (ValueError, NotImplementedError, AssertionError)


@contextmanager
def quiet_lycoris() -> Iterator[None]:
    """Silence LyCORIS, which logs a line per setting."""
    level = lycoris_logger.level
    lycoris_logger.setLevel("ERROR")
    try:
        yield
    finally:
        lycoris_logger.setLevel(level)


@dataclass(frozen=True, kw_only=True)
class NetworkBuilder:
    """Builds a new network for layers of a denoiser."""

    denoiser: nn.Module
    config: LycorisConfig
    schedule: RankSchedule
    seed: int

    def network(self, layers: Mapping[str, Options]) -> LycorisNetwork:
        """Build the network for the layers among these modules, without attaching it.

        Args:
            layers: Path -> its own options, from `targets.resolve`.

        Raises:
            ConfigError: The algorithm does not support a layer, the rank of a T-LoRA is above its size, or
                train_norm finds no layer to train.
        """
        own = {str(options["algo"]) for options in layers.values() if "algo" in options}
        lycoris_layers.register_algorithms({self.config.algo, *own})
        try:
            network = self._create(layers)
        except REFUSALS as error:
            raise ConfigError(self._refusal_message(layers, error)) from error
        network.loras[:] = [module for module in network.loras if not module.not_supported]
        norms = [module for module in network.loras if isinstance(module, lycoris_layers.NormLayer)]
        if self.config.extra.get("train_norm") and not norms:
            raise ConfigError(
                "train_norm: the targets contain no LayerNorm or GroupNorm with weight and bias. Remove it "
                "or target classes around such layers."
            )
        return network

    def _create(self, layers: Mapping[str, Options]) -> LycorisNetwork:
        config, extra = self.config, dict(self.config.extra)
        layers = {path: self._without_foreign_flags(options) for path, options in layers.items()}
        in_force = targets.preset_in_force(layers, enable_conv=config.apply_preset.enable_conv)
        with in_force, quiet_lycoris(), torch.random.fork_rng():
            torch.manual_seed(self.seed)  # stock algorithms initialise from the global generator
            return LycorisNetwork(
                self.denoiser,
                multiplier=config.multiplier,
                lora_dim=config.linear_dim,
                conv_lora_dim=extra.pop("conv_dim", config.linear_dim),
                alpha=config.linear_alpha,
                conv_alpha=extra.pop("conv_alpha", config.linear_alpha),
                network_module=config.algo,
                norm_modules=lycoris_layers.NormLayer,
                warn_on_unmatched=False,
                tlora_init=config.tlora_init,
                sig_type=config.sig_type,
                schedule=self.schedule,
                tlora_min_rank=config.tlora_min_rank,
                seed=self.seed,
                **extra,
            )

    def _without_foreign_flags(self, options: Options) -> Options:
        """A layer's options, with the adapter's flags off that only algorithms of other layers take.

        LyCORIS gives an argument of the adapter to every layer, and layers of another algorithm act on it.
        """
        named = {self.config.algo, *(entry.algo for entry in self.config.apply_preset.entries if entry.algo)}
        foreign = frozenset().union(*(ALGORITHMS[name].arguments for name in named))
        foreign -= ALGORITHMS[str(options.get("algo", self.config.algo))].arguments
        flags = (name for name, value in self.config.extra.items() if value is True)
        return {**{name: False for name in flags if name in foreign}, **options}

    def _refusal_message(self, layers: Mapping[str, Options], error: Exception) -> str:
        """Name the sizes that fail, by building one layer of each size and options alone."""
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
            f"algo {algo} with linear_dim {dim} does not support layers of {sizes}, first {path}. LyCORIS's "
            f"reason: {reason}. {remedy}, give these layers another algo in name_algo_map, or exclude them "
            "with exclude_name."
        )


def _size_of(module: nn.Module) -> Size:
    """(out, in, kernel...) of a linear layer or convolution; () for other modules."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.out_channels, module.in_channels, *module.kernel_size
    return ()


def _remedy(algo: str, outputs: Sequence[int]) -> str:
    if algo == "boft" and outputs and not any(num % 2 for num in outputs):
        # Block size is even and the number of blocks a power of two, so every odd divisor is in the block.
        return f"Raise linear_dim to {max(2 * (num // (num & -num)) for num in outputs)}"
    return "Change linear_dim or the algorithm's arguments"
