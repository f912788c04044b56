"""The weights of a denoiser as what a run trains, in diffusers' layout."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn

from simpletuner.helpers.adapters.sharding import distribute_like, full_tensor, gathered
from simpletuner.helpers.adapters.trainable import (
    FULL_STRENGTH,
    ParameterGroup,
    Trainable,
    one_group,
    refuse_other_state,
)
from simpletuner.helpers.choices.algorithms import WHOLE_MODEL
from simpletuner.helpers.errors import AdapterError, ConfigError
from simpletuner.helpers.io.atomic import JsonValue, write_json
from simpletuner.helpers.io.run_folder import ema_folder
from simpletuner.helpers.io.safetensors_file import save_tensors

LARGEST_FILE = "10GB"
"""Of weights; larger models are split, as diffusers splits them."""


class WholeModel(Trainable):
    """The denoiser itself; frozen weights stay as they are.

    Args:
        denoiser: A model of diffusers, frozen.
        folder: Name of its folder in diffusers' layout.
        layer_filter: Regular expressions; weights in whose names one is found are trained. Empty: all.
        one_by_one: Make each weight a group of its own, for an optimiser that steps one at a time.

    Raises:
        ConfigError: An expression is found in no weight's name.
    """

    algorithm = WHOLE_MODEL.name
    is_model = True

    def __init__(
        self, denoiser: nn.Module, *, folder: str, layer_filter: Sequence[str] = (), one_by_one: bool = False
    ) -> None:
        self.denoiser, self.folder = denoiser, folder
        self.config = config_of(denoiser)  # sharding gives the denoiser another class
        self.one_by_one = one_by_one
        names = [name for name, _ in denoiser.named_parameters()]
        unmatched = [each for each in layer_filter if not any(re.search(each, name) for name in names)]
        if unmatched:
            raise ConfigError(
                f"layer_filter: {', '.join(unmatched)} is in none of the {len(names)} names of weights, "
                f"for instance {names[0]} and {names[-1]}. Correct it."
            )
        for name, weight in denoiser.named_parameters():
            weight.requires_grad_(not layer_filter or any(re.search(each, name) for each in layer_filter))
        self.num_layers = len({name.rpartition(".")[0] for name, _ in self._named()})

    @property
    def file_names(self) -> tuple[str, str]:
        """The folders of the model."""
        return self.folder, ema_folder(self.folder)

    def groups(self) -> list[ParameterGroup]:
        """The trained weights, all in one group or each in its own."""
        if not self.one_by_one:
            return one_group(self.folder, self.parameters())
        return [ParameterGroup(name=name, parameters=[weight]) for name, weight in self._named()]

    def parameters(self) -> list[nn.Parameter]:
        """The trained weights, in the order of the denoiser."""
        return [weight for _, weight in self._named()]

    def set_strength(self, strength: float) -> None:
        """There is no base model beside the trained one, so only the strength of training is possible."""
        assert strength == FULL_STRENGTH, "the configuration refuses what needs the base model"

    @property
    def num_bytes(self) -> int:
        """Size of all weights and buffers."""
        tensors: list[Tensor] = list(self.denoiser.state_dict().values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def state_dict(self) -> dict[str, Tensor]:
        """All weights and buffers, the frozen ones too; sharded ones are gathered."""
        return {name: full_tensor(tensor.detach()) for name, tensor in self.denoiser.state_dict().items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore all weights.

        Raises:
            AdapterError: A tensor is missing, unknown or of another shape.
        """
        own = self.denoiser.state_dict()
        refuse_other_state(state, own=own)
        for name, tensor in own.items():
            tensor.copy_(distribute_like(state[name], like=tensor))

    def save(self, path: Path, *, metadata: Mapping[str, str]) -> None:
        """Write the folder of the model in diffusers' layout; the headers of its weights have the metadata.

        Every process of a sharded run must call this, and the first one writes.

        Raises:
            AdapterError: A weight is not finite; nothing is written.
            SafetensorError: A file cannot be written.
        """
        own = self.denoiser.state_dict()
        state = gathered({name: tensor.detach() for name, tensor in own.items()})
        if len(state) < len(own):
            return
        bad = [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
        if bad:
            raise AdapterError(f"{len(bad)} weights are not finite, first {bad[0]}. Nothing was written.")
        write_model(path, self.config, state, metadata=metadata)

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, each) for name, each in self.denoiser.named_parameters() if each.requires_grad]


def config_of(denoiser: Any) -> dict[str, JsonValue]:
    """The configuration of a model of diffusers, as its folder has it."""
    config: dict[str, JsonValue] = json.loads(denoiser.to_json_string())
    config.pop("_name_or_path", None)  # a path of this machine
    return config


def write_model(
    path: Path,
    config: Mapping[str, JsonValue],
    state: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str],
) -> None:
    """Write a folder that diffusers' from_pretrained reads: the configuration and these weights."""
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / CONFIG_NAME, config)
    pattern = SAFETENSORS_WEIGHTS_NAME.replace(".", "{suffix}.")
    shards = split_torch_state_dict_into_shards(
        dict(state), filename_pattern=pattern, max_shard_size=LARGEST_FILE
    )
    for file, names in shards.filename_to_tensors.items():
        tensors = {name: state[name].cpu().contiguous() for name in names}
        save_tensors(tensors, path / file, metadata={**metadata, "format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(path / SAFE_WEIGHTS_INDEX_NAME, index)
