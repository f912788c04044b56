"""An adapter of a denoiser, LoRAs of its text encoders and a new token, trained together.

Adapter and LoRAs are saved in one file, the token in another beside it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from simpletuner.helpers.adapters.adapter import Adapter
from simpletuner.helpers.adapters.files import adapter_file
from simpletuner.helpers.adapters.files.adapter_file import METADATA_KEY
from simpletuner.helpers.adapters.files.text_layers import (
    TextLayer,
    encoders_in,
    file_of_encoder,
    path_in_files,
)
from simpletuner.helpers.adapters.new_tokens import NewToken
from simpletuner.helpers.adapters.peft_lora import PeftAdapter
from simpletuner.helpers.adapters.trainable import ParameterGroup
from simpletuner.helpers.configuration.schema.adapter import AdapterConfig
from simpletuner.helpers.io.run_folder import embedding_file
from simpletuner.helpers.randomness import mix

logger = logging.getLogger(__name__)

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_TOKEN = "new_token/"
"""Prefix of the token's state."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoderSettings:
    """How one text encoder is trained."""

    learning_rate: float | None
    """None for the run's."""
    end_step: int | None
    """Optimiser steps after which it stays as it is; None for all steps of the run."""


class TextEncoderLora:
    """LoRA on one text encoder. It has no rank mask: prompts are encoded without a timestep.

    Args:
        encoder: The model; its own weights are frozen.
        config: Rank, alpha and dropout.
        name: Of the encoder in keys of diffusers' files.
        targets: Names of the layers.
        settings: How it is trained.
        seed: Of the run.
    """

    def __init__(
        self,
        encoder: nn.Module,
        config: AdapterConfig,
        *,
        name: str,
        targets: Sequence[str],
        settings: TextEncoderSettings,
        seed: int,
    ) -> None:
        self.name, self.encoder, self.settings = name, encoder, settings
        own_seed = mix(seed, "text encoder", name)
        self.lora = PeftAdapter(encoder, config, prefix=name, default_targets=targets, seed=own_seed)

    def group(self) -> ParameterGroup:
        """Its parameters, with their learning rate and end step."""
        return ParameterGroup(
            name=self.name,
            parameters=self.lora.parameters(),
            learning_rate=self.settings.learning_rate,
            end_step=self.settings.end_step,
        )

    def init_from(self, file: adapter_file.AdapterFile) -> None:
        """Start from the encoder's layers in a file, if it has any.

        Raises:
            AdapterError: They differ from the layers that are trained here, or their ranks do.
        """
        if self.name in encoders_in(file):
            self.lora.init_from_stored(file_of_encoder(file, self.name, self.encoder))
        else:
            logger.info("init_lora %s has no layers of %s, which starts anew.", file.path, self.name)

    def layers(self) -> list[TextLayer]:
        """Its layers for files, with the scale in the factor `up`."""
        state = self.lora.state_dict()
        return [
            TextLayer(
                encoder=self.name,
                path=path_in_files(path),
                down=down,
                up=state[f"{path}{_UP}"] * self.lora.scale,
            )
            for key, down in state.items()
            if (path := key.removesuffix(_DOWN)) != key
        ]


class JointAdapter(Adapter):
    """The adapter of a denoiser, LoRAs of its text encoders and a new token, with rates of their own."""

    def __init__(
        self, denoiser: Adapter, text_encoders: Sequence[TextEncoderLora], *, token: NewToken | None = None
    ) -> None:
        self.denoiser, self.text_encoders, self.token = denoiser, tuple(text_encoders), token
        self.algorithm = denoiser.algorithm
        self.num_layers = denoiser.num_layers + sum(each.lora.num_layers for each in text_encoders)

    @property
    def tlora_config(self) -> dict[str, int | float | str] | None:
        """Value of a pipeline's `_tlora_config`; None without a rank schedule."""
        return self.denoiser.tlora_config

    @property
    def lycoris_network(self) -> nn.Module | None:
        """The LyCORIS network of the denoiser, None for PEFT."""
        return self.denoiser.lycoris_network

    def groups(self) -> list[ParameterGroup]:
        """The denoiser's parameters, those of each text encoder, and those of the new token."""
        tokens = [] if self.token is None else self.token.groups()
        return [*self.denoiser.groups(), *(each.group() for each in self.text_encoders), *tokens]

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters of all groups."""
        return [parameter for group in self.groups() for parameter in group.parameters]

    def rank_mask_for(self, timesteps: Sequence[int]) -> AbstractContextManager[None]:
        """Set the denoiser's rank mask of these timesteps, one per sample, for a forward and its backward."""
        return self.denoiser.rank_mask_for(timesteps)

    def mean_active_rank(self, timesteps: Sequence[int]) -> float | None:
        """Mean active rank of the denoiser's layers; None without a rank schedule."""
        return self.denoiser.mean_active_rank(timesteps)

    def set_strength(self, strength: float) -> None:
        """Scale the contribution of all; at 0 every model computes what it does without, bit for bit."""
        self.denoiser.set_strength(strength)
        for each in self.text_encoders:
            each.lora.set_strength(strength)
        if self.token is not None:
            self.token.set_strength(strength)

    def state_dict(self) -> dict[str, Tensor]:
        """The denoiser's state, that of each text encoder under its name, and that of the new token."""
        state = self.denoiser.state_dict()
        for each in self.text_encoders:
            state |= {f"{each.name}/{key}": tensor for key, tensor in each.lora.state_dict().items()}
        if self.token is not None:
            state |= {f"{_TOKEN}{name}": rows for name, rows in self.token.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of `state_dict`.

        Raises:
            AdapterError: A tensor is missing, unknown or of another shape.
        """
        rest = dict(state)
        parts = {f"{each.name}/": each.lora.load_state_dict for each in self.text_encoders}
        if self.token is not None:
            parts[_TOKEN] = self.token.load_state_dict
        for prefix, load in parts.items():
            own = {key: rest.pop(key) for key in list(rest) if key.startswith(prefix)}
            load({key.removeprefix(prefix): tensor for key, tensor in own.items()})
        self.denoiser.load_state_dict(rest)

    def content(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The denoiser's file with the layers of the text encoders.

        They have diffusers' keys beside PEFT's LoRA, and kohya's beside LyCORIS's layout.
        """
        tensors, header = self.denoiser.content()
        in_diffusers_layout = METADATA_KEY in header
        for each in self.text_encoders:
            for layer in each.layers():
                tensors |= layer.in_diffusers_layout() if in_diffusers_layout else layer.in_kohya_layout()
            if in_diffusers_layout:
                _, own = each.lora.content()
                joined = json.loads(header[METADATA_KEY]) | json.loads(own[METADATA_KEY])
                header = header | {METADATA_KEY: json.dumps(joined, sort_keys=True)}
        return tensors, header

    def save(self, path: Path, *, metadata: Mapping[str, str]) -> None:
        """Write `content` to a file, and the new token to another beside it.

        Raises:
            AdapterError: A weight is not finite, or the adapter cannot be written.
            StorageError: A file cannot be written.
        """
        if self.token is not None:
            self.token.save(embedding_file(path), metadata=metadata)
        super().save(path, metadata=metadata)

    def init_from(self, file: Path) -> None:
        """Start from a file: the denoiser's adapter, and each text encoder of which it has layers.

        Raises:
            AdapterError: The file's algorithm or layers differ.
        """
        self.denoiser.init_from(file)
        self.init_text_encoders(file)

    def init_text_encoders(self, file: Path) -> None:
        """Start the text encoders from their layers in a file.

        Raises:
            AdapterError: The file's layers or ranks differ.
        """
        stored = adapter_file.read(file)
        for each in self.text_encoders:
            each.init_from(stored)

    def detach(self) -> None:
        """Remove all adapters; every model becomes bit-identical to its original."""
        self.denoiser.detach()
        if self.token is not None:
            self.token.detach()
        for each in self.text_encoders:
            each.lora.detach()
