"""PEFT LoRA on the same path: `lora_type: standard`, saved in diffusers' own format."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from simpletuner.helpers.adapters.adapter import Adapter
from simpletuner.helpers.adapters.files import adapter_file
from simpletuner.helpers.adapters.files.adapter_file import METADATA_KEY
from simpletuner.helpers.adapters.files.foreign.alphas import config_of, stated_alpha
from simpletuner.helpers.adapters.files.foreign.diffusers_layout import in_diffusers_layout
from simpletuner.helpers.adapters.targets import no_match_message
from simpletuner.helpers.adapters.trainable import refuse_other_state
from simpletuner.helpers.configuration.schema.adapter import CHANGE_THE_BASE, AdapterConfig
from simpletuner.helpers.errors import AdapterError, ConfigError
from simpletuner.helpers.io.names import counted

logger = logging.getLogger(__name__)

ADAPTER_NAME = "default"
_KEY = "peft_lora_target_modules"
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, LoraLayer)


class PeftAdapter(Adapter):
    """PEFT LoRA layers in a model of diffusers or transformers, float32 whatever the base layer's dtype.

    Args:
        denoiser: The model.
        config: Rank, alpha, targets and further settings.
        prefix: Name of the model in keys of files.
        default_targets: Names of target layers where the configuration gives none.
        seed: Of the initial factors.

    Raises:
        ConfigError: A target name matches no layer.
    """

    algorithm = "standard"

    def __init__(
        self, denoiser: Any, config: AdapterConfig, *, prefix: str, default_targets: Sequence[str], seed: int
    ) -> None:
        self.denoiser, self.prefix = denoiser, prefix
        wanted = config.peft_lora_target_modules or default_targets
        alpha = config.lora_alpha or config.lora_rank
        self.scale = alpha / (math.sqrt(config.lora_rank) if config.use_rslora else config.lora_rank)
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # a float is right at run time
            lora_dropout=config.lora_dropout,
            init_lora_weights=True if config.lora_init_type == "default" else config.lora_init_type,
            use_dora=config.use_dora,
            use_rslora=config.use_rslora,
            target_modules=_of_pattern(wanted, denoiser) if isinstance(wanted, str) else list(wanted),
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                denoiser.add_adapter(lora, adapter_name=ADAPTER_NAME)
            except ValueError as error:  # PEFT found no layer, or does not support its class
                names = [wanted] if isinstance(wanted, str) else wanted
                message = no_match_message(names, denoiser, key=_KEY)
                raise ConfigError(f"{message} PEFT's reason: {error}") from error
        layers = (module for module in denoiser.modules() if isinstance(module, LoraLayer))
        # A removed adapter leaves empty wrappers behind.
        self.layers = [layer for layer in layers if ADAPTER_NAME in layer.scaling]
        self.num_layers = len(self.layers)
        # A family's default targets cover several models.
        if not isinstance(wanted, str) and wanted != default_targets:
            self._refuse_idle(wanted)
        for parameter in self.parameters():
            parameter.data = parameter.data.float()
        changes_base = config.lora_init_type in CHANGE_THE_BASE
        start = self.state_dict() if changes_base else {}
        self._start = {key: factor.clone().cpu() for key, factor in start.items()}

    def _refuse_idle(self, wanted: Sequence[str]) -> None:
        own = {id(layer) for layer in self.layers}
        paths = [path for path, module in self.denoiser.named_modules() if id(module) in own]
        idle = [name for name in wanted if not any(f".{path}".endswith(f".{name}") for path in paths)]
        if idle:
            raise ConfigError(no_match_message(idle, self.denoiser, key=_KEY))

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters, layer by layer."""
        return [p for layer in self.layers for p in layer.parameters() if p.requires_grad]  # type: ignore[attr-defined]

    def set_strength(self, strength: float) -> None:
        """Scale the adapter's contribution; at 0 the layers compute what they do without it, bit for bit.

        At a scale of 0 DoRA still rescales the weights, and dropout still draws.
        """
        for layer in self.layers:
            layer.set_scale(ADAPTER_NAME, strength)
            layer._disable_adapters = strength == 0

    def state_dict(self) -> dict[str, Tensor]:
        """The LoRA weights under PEFT's keys."""
        state = get_peft_model_state_dict(self.denoiser, adapter_name=ADAPTER_NAME)
        return {key: tensor.detach() for key, tensor in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of `state_dict`.

        Raises:
            AdapterError: A tensor is missing, unknown or of another shape.
        """
        refuse_other_state(state, own=self.state_dict())
        set_peft_model_state_dict(self.denoiser, dict(state), adapter_name=ADAPTER_NAME)

    def init_from(self, file: Path) -> None:
        """Initialise the adapter from a standard LoRA of any known program.

        Raises:
            AdapterError: The file's layers or ranks differ.
        """
        self.init_from_stored(adapter_file.read(file))

    def init_from_stored(self, file: adapter_file.AdapterFile) -> None:
        """Initialise the adapter from the content of a file.

        Raises:
            AdapterError: The file's layers or ranks differ.
        """
        stored = in_diffusers_layout(file, self.denoiser, prefix=self.prefix)
        state = _with_scale(stored, self.scale, prefix=self.prefix)
        try:
            self.load_state_dict(state)
        except AdapterError as error:
            raise AdapterError(f"init_lora {file.path}: {error}") from error

    def content(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The LoRA for diffusers' `load_lora_weights`, with its scale in B and alpha equal to the rank.

        This layout has no tensor for alpha, and not every program reads the header.

        An initialisation that was subtracted from the base weights is subtracted from the LoRA too, by ranks
        of its own, so that the file fits the published base model.
        """
        config: LoraConfig = self.denoiser.peft_config[ADAPTER_NAME]
        state = self.state_dict()
        if self._start:
            state = {key: _subtract_start(key, factor, self._start[key]) for key, factor in state.items()}
            config = replace(config, r=2 * config.r, init_lora_weights=True)
        # Readers of the header would scale by the root of the rank once more.
        config = replace(config, lora_alpha=config.r, use_rslora=False)
        header = {
            adapter_file.VERSION_KEY: adapter_file.VERSION,
            METADATA_KEY: lora_metadata(config, prefix=self.prefix),
        }
        tensors = {
            f"{self.prefix}.{key}": tensor * self.scale if ".lora_B." in key else tensor
            for key, tensor in state.items()
        }
        return tensors, header

    def detach(self) -> None:
        """Remove the LoRA layers from the denoiser."""
        self.denoiser.delete_adapters(ADAPTER_NAME)


def _of_pattern(pattern: str, denoiser: nn.Module) -> str:
    """A regular expression of the layers alone that another one matches among a model's modules.

    Raises:
        ConfigError: It matches no layer.
    """
    layers = {path: module for path, module in denoiser.named_modules() if isinstance(module, _LAYERS)}
    # A removed adapter leaves empty wrappers behind.
    wrappers = tuple(f"{path}." for path, module in layers.items() if isinstance(module, LoraLayer))
    paths = [path for path in layers if re.fullmatch(pattern, path) and not path.startswith(wrappers)]
    if not paths:
        raise ConfigError(no_match_message([pattern], denoiser, key=_KEY))
    logger.info("%s %s matches %s.", _KEY, pattern, counted(len(paths), "layer"))
    return "|".join(map(re.escape, paths))


def _subtract_start(key: str, factor: Tensor, start: Tensor) -> Tensor:
    """A factor of B A - B0 A0, with twice the rank: A above A0, or B beside -B0."""
    start = start.to(factor.device)
    return torch.cat([factor, start]) if ".lora_A." in key else torch.cat([factor, -start], dim=1)


def _with_scale(stored: adapter_file.AdapterFile, scale: float, *, prefix: str) -> dict[str, Tensor]:
    """The file's factors under PEFT's keys, each B such that alpha / rank is `scale`, formed in float32."""
    config, state = config_of({prefix}, stored.entry(METADATA_KEY) or {}), {}
    for key, tensor in stored.tensors.items():
        name = key.removeprefix(f"{prefix}.")
        if name.endswith(".lora_B.weight"):
            rank, path = tensor.shape[1], name.removesuffix(".lora_B.weight")
            alpha = stated_alpha(path, config, rank=rank, path=stored.path)
            tensor = tensor.to(torch.float32) * (alpha / rank / scale)
        state[name] = tensor
    return state


def lora_metadata(config: LoraConfig, *, prefix: str) -> str:
    """A LoRA's configuration as the json that diffusers reads from a file's header."""
    values = {
        f"{prefix}.{key}": sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()  # type: ignore[no-untyped-call]
    }
    return json.dumps(values, sort_keys=True)
