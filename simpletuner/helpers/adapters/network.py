"""Attach an adapter to a denoiser: LyCORIS algorithms with T-LoRA among them, or PEFT LoRA."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from lycoris.wrapper import LycorisNetwork
from torch import Tensor, nn

from simpletuner.helpers.adapters import rebuilding, targets
from simpletuner.helpers.adapters.adapter import Adapter
from simpletuner.helpers.adapters.attachment import Attachment
from simpletuner.helpers.adapters.creation import NetworkBuilder, quiet_lycoris
from simpletuner.helpers.adapters.files import adapter_file, scales
from simpletuner.helpers.adapters.files.foreign.translation import (
    ScheduleOptions,
    own_values,
    stated_schedule,
    translate,
)
from simpletuner.helpers.adapters.peft_lora import PeftAdapter
from simpletuner.helpers.adapters.sharding import distribute_like, full_tensor
from simpletuner.helpers.adapters.tlora import mask
from simpletuner.helpers.adapters.tlora.masked_layer import MaskedLayer
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule, weighted_schedules
from simpletuner.helpers.adapters.trainable import refuse_other_state
from simpletuner.helpers.configuration.schema.adapter import AdapterConfig
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.errors import AdapterError, ConfigError
from simpletuner.helpers.io.names import MAX_REASON_CHARACTERS

logger = logging.getLogger(__name__)


def attach_adapter(
    denoiser: nn.Module,
    config: AdapterConfig,
    *,
    lycoris: LycorisConfig | None,
    spec: ModelSpec,
    seed: int,
    weight_hashes: Mapping[str, str] | None = None,
) -> Adapter:
    """Attach a new adapter to a frozen denoiser, at zero effect unless `init_lora` names a file.

    Args:
        denoiser: The model to adapt.
        config: Adapter settings, with `init_lora`.
        lycoris: The LyCORIS network; None for PEFT LoRA.
        spec: The family's names of layers.
        seed: Seed of the initial factors.
        weight_hashes: Name of a weight -> its hash before quantisation.

    Raises:
        ConfigError: A target matches no layer, or the algorithm does not support one.
        AdapterError: The file of `init_lora` does not fit.
    """
    adapter: Adapter
    if lycoris is None:
        adapter = PeftAdapter(
            denoiser, config, prefix=spec.denoiser_name, default_targets=spec.lora_targets, seed=seed
        )
    else:
        adapter = LycorisAdapter.create(denoiser, lycoris, spec=spec, seed=seed)
        adapter.set_base_hashes(weight_hashes or {})
    if config.init_lora is not None:
        adapter.init_from(config.init_lora)
    return adapter


def load_adapter(
    denoiser: nn.Module, file: Path, *, strength: float = 1.0, schedule: ScheduleOptions | None = None
) -> LycorisAdapter:
    """Attach the adapter of a file of any known program, with the file's rank schedule.

    Args:
        denoiser: The model to adapt.
        file: The file; documentation/adapter-files.md lists what is read.
        strength: Scale of the adapter's contribution.
        schedule: Any of min_rank, alpha, kind and scale, in place of the file's own.

    Raises:
        AdapterError: The file cannot be read, has another layout or does not fit; nothing is attached.
    """
    return attach_stored(denoiser, adapter_file.read(file), strength=strength, schedule=schedule)


def attach_stored(
    denoiser: nn.Module,
    stored: adapter_file.AdapterFile,
    *,
    strength: float = 1.0,
    schedule: ScheduleOptions | None = None,
) -> LycorisAdapter:
    """As `load_adapter`, for the content of a file.

    Raises:
        AdapterError: As for `load_adapter`.
    """
    file = stored.path
    if any(parameter.is_meta for parameter in denoiser.parameters()):
        raise AdapterError(
            f"{file}: this {type(denoiser).__name__} has weights on meta, as under sequential offload. "
            "Load the adapter before enabling offload, or disable it with pipeline.remove_all_hooks()."
        )
    stored = translate(stored, denoiser, schedule=schedule).file
    network = _network_on(denoiser, stored)
    rebuilding.bypass_quantised_layers(file, network)
    rebuilding.bypass_rounding(network)
    ranks = _schedule_of(stored, [module for module in network.loras if isinstance(module, MaskedLayer)])
    raw = (stored.entry(adapter_file.LYCORIS_KEY) or {}) | {"multiplier": stored.multiplier}
    adapter = LycorisAdapter(network, denoiser, raw=raw, schedule=ranks)
    adapter_file.warn_about_other_base(stored, adapter.base_hashes)
    adapter.set_strength(strength)
    return adapter


def _network_on(denoiser: nn.Module, file: adapter_file.AdapterFile) -> LycorisNetwork:
    """Build the network of a file, with every layer of the file, without attaching it."""
    try:
        tensors = rebuilding.with_whole_scale(file)
        names = {key.split(".")[0] for key in tensors}
        with quiet_lycoris():
            network = rebuilding.network_of(denoiser, file, tensors)
    except (AdapterError, ConfigError) as error:
        reason = str(error).removeprefix(f"{file.path}: ")
        raise AdapterError(f"{file.path}: {reason}") from error
    _refuse_unknown_keys(file.path, network, tensors)
    found = {module.lora_name for module in network.loras}
    if found != names:
        family = file.metadata.get("model_family")
        trained_on = f" Its model family is {family}." if family else ""
        missing = sorted(names - found)
        raise AdapterError(
            f"{file.path}: {len(missing)} of {len(names)} layers are not in this {type(denoiser).__name__}, "
            f"first {missing[0]}.{trained_on} Use a model of its family."
        )
    return network


def _refuse_unknown_keys(path: Path, network: LycorisNetwork, tensors: Mapping[str, Tensor]) -> None:
    """Refuse keys that LyCORIS's loader would ignore in a T-LoRA layer."""
    own = {
        module.lora_name: {*module.weight_list, "dtype_tensor"}
        for module in network.loras
        if isinstance(module, MaskedLayer)
    }
    for key in tensors:
        name, _, part = key.partition(".")
        if name in own and part not in own[name]:
            raise AdapterError(f"{path}: {key} is no tensor of a T-LoRA layer; it would have no effect.")


class LycorisAdapter(Adapter):
    """A LyCORIS network; its modules are children of the layers that they adapt."""

    def __init__(
        self,
        network: LycorisNetwork,
        denoiser: nn.Module,
        *,
        raw: Mapping[str, Any],
        schedule: RankSchedule | None,
        group: int | None = None,
    ) -> None:
        self.network, self._denoiser = network, denoiser
        self.algorithm = str(raw.get("algo", "lycoris"))
        self.num_layers = len(network.loras)
        self._raw, self._multiplier = dict(raw), float(raw.get("multiplier", 1.0))
        self._tlora = [module for module in network.loras if isinstance(module, MaskedLayer)]
        self.schedule = schedule if self._tlora else None
        self.group = mask.new_group() if group is None else group
        for layer in self._tlora:
            layer.join(self.group, schedule=self.schedule)
        self._schedules = weighted_schedules([layer.ranks for layer in self._tlora], self.schedule)
        layers = {module.lora_name: module.org_module[0] for module in network.loras}
        self.base_hashes = adapter_file.base_hashes(layers)
        paths = {id(layer): path for path, layer in denoiser.named_modules()}
        self._paths = {name: paths[id(layer)] for name, layer in layers.items()}
        self._attachments: list[Attachment] = []
        self._joined: list[LycorisAdapter] = []
        self._attach()

    @classmethod
    def create(
        cls, denoiser: nn.Module, config: LycorisConfig, *, spec: ModelSpec, seed: int
    ) -> LycorisAdapter:
        """Attach a new network to a denoiser, from the user's lycoris json.

        Raises:
            ConfigError: A target matches no layer, or the algorithm does not support one.
        """
        wanted = targets.translate(
            config.apply_preset.model_dump(exclude_none=True), aliases=spec.target_aliases
        )
        schedule = RankSchedule.of_adapter(config, num_timesteps=spec.num_train_timesteps)
        builder = NetworkBuilder(denoiser=denoiser, config=config, schedule=schedule, seed=seed)
        network = builder.network(targets.resolve(wanted, denoiser))
        targets.check_matches(wanted, denoiser, adapted=[module.org_module[0] for module in network.loras])
        raw = dict(config.raw)
        if isinstance(config.tlora_min_rank, float):  # every reader of the file understands ranks
            raw["tlora_min_rank"] = schedule.min_rank
        return cls(network, denoiser, raw=raw, schedule=schedule, group=config.mask_group_id)

    def set_base_hashes(self, weight_hashes: Mapping[str, str]) -> None:
        """Set the hashes of the base weights in the adapter's file, taken before quantisation."""
        for name, path in self._paths.items():
            if (key := f"{path}.weight") in weight_hashes:
                self.base_hashes[name] = weight_hashes[key]

    def join(self, others: Sequence[LycorisAdapter]) -> None:
        """Scale and detach adapters of other models, such as text encoders, together with this one."""
        self._joined.extend(others)

    def _attach(self) -> None:
        stock = [module for module in self.network.loras if not isinstance(module, MaskedLayer)]
        for module in stock:
            layer = module.org_module[0]
            module.to(device=layer.weight.device, dtype=torch.float32).train(layer.training)
            module.forward = partial(_forward_unless_off, module, type(module).forward)
        self.network.apply_to()
        self._attachments.extend(Attachment(module.org_module[0], module) for module in stock)

    @property
    def tlora_config(self) -> dict[str, int | float | str] | None:
        """Value of a pipeline's `_tlora_config`; None without T-LoRA layers."""
        return self.schedule.config() if self.schedule is not None else None

    @property
    def lycoris_network(self) -> LycorisNetwork:
        """The LyCORIS network."""
        return self.network

    def rank_mask_for(self, timesteps: Sequence[int]) -> AbstractContextManager[None]:
        """Set the rank mask of these timesteps, one per sample, for a forward and its backward."""
        if self.schedule is None:
            return nullcontext()
        device = self.network.loras[0].alpha.device
        return mask.rank_mask(self.schedule, timesteps, group=self.group, device=device)

    def mean_active_rank(self, timesteps: Sequence[int]) -> float | None:
        """Mean active rank over these timesteps; None without T-LoRA layers.

        It is that of the network's schedule; where layers have their own values, the mean over all layers.
        """
        weights = list(self._schedules.values())
        means = [fmean(map(schedule.rank_at, timesteps)) for schedule in self._schedules]
        return fmean(means, weights) if means else None

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters, layer by layer."""
        return [p for module in self.network.loras for p in module.parameters() if p.requires_grad]

    def set_strength(self, strength: float) -> None:
        """Scale the adapter's contribution; at 0 the layers compute what they do without it, bit for bit."""
        self.network.set_multiplier(self._multiplier * strength)
        for other in self._joined:
            other.set_strength(strength)

    def state_dict(self) -> dict[str, Tensor]:
        """Every parameter and persistent buffer: of T-LoRA the differences, not the sums."""
        return {name: full_tensor(tensor) for name, tensor in self._tensors().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of `state_dict`.

        Raises:
            AdapterError: A tensor is missing, unknown or of another shape.
        """
        own = self._tensors()
        refuse_other_state(state, own=own)
        for key, tensor in own.items():
            tensor.copy_(distribute_like(state[key], like=tensor))

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{module.lora_name}.{name}": tensor.detach()
            for module in self.network.loras
            for name, tensor in _tensors_of(module)
        }

    def init_from(self, file: Path) -> None:
        """Initialise the adapter from a file.

        Raises:
            AdapterError: The file's algorithm, rank or layers differ.
        """
        stored = self._read(file)
        try:
            self.network.load_state_dict(self._at_own_scale(stored), strict=True)
        except RuntimeError as error:
            reason = self._misfit(stored) or _first_reason(error)
            raise AdapterError(f"init_lora {file} does not fit this adapter: {reason}.") from error

    def _read(self, file: Path) -> adapter_file.AdapterFile:
        """A file of any known program in this adapter's keys; another rank schedule is reported."""
        stored = translate(adapter_file.read(file), self._denoiser).file
        theirs = stated_schedule(stored)
        if self.schedule is not None and theirs not in (None, self.schedule):
            logger.warning(
                "init_lora %s has the rank schedule %s, this run %s. To continue the file's, set "
                "tlora_min_rank, tlora_alpha and tlora_schedule to its values.",
                file,
                theirs,
                self.schedule,
            )
        ours = {layer.lora_name: layer.ranks.own for layer in self._tlora if any(layer.ranks.own)}
        if self.schedule is not None and own_values(stored) != ours:
            logger.warning(
                "init_lora %s gives layers other values of tlora_min_rank or tlora_alpha than this run's "
                "module_algo_map and name_algo_map, which are taken.",
                file,
            )
        return stored

    def _misfit(self, stored: adapter_file.AdapterFile) -> str | None:
        """How many layers of the adapter and of a file have no partner; None if all have one."""
        own = {module.lora_name for module in self.network.loras}
        found = {key.partition(".")[0] for key in stored.tensors}
        missing, extra = sorted(own - found), sorted(found - own)
        if missing:
            return f"{len(missing)} of its {len(own)} layers are not in the file, first {missing[0]}"
        if extra:
            return f"{len(extra)} of the file's {len(found)} layers are not adapted here, first {extra[0]}"
        return None

    def _at_own_scale(self, stored: adapter_file.AdapterFile) -> dict[str, Tensor]:
        """A file's tensors with this adapter's alpha: what differs goes into the factors, in float32."""
        tensors = rebuilding.with_whole_scale(stored)
        layers = adapter_file.by_layer(tensors)
        for name, own in adapter_file.by_layer(self.network.state_dict()).items():
            if name in layers:
                scale = scales.scale_of(layers[name]) * stored.multiplier
                layer = scales.rescaled(layers[name], scale / (scales.scale_of(own) * self._multiplier))
                layer |= {key: own[key] for key in ("alpha",) if key in own}
                tensors |= {f"{name}.{key}": tensor for key, tensor in layer.items()}
        return tensors

    def content(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The network in LyCORIS's key layout; T-LoRA with base factors and schedule.

        `multiplier` is folded into the tensors, so that readers who know only those apply it too.

        Raises:
            AdapterError: The multiplier cannot be folded.
        """
        header = {
            adapter_file.VERSION_KEY: adapter_file.VERSION,
            adapter_file.LYCORIS_KEY: json.dumps(self._raw | {"multiplier": 1.0}, sort_keys=True),
            adapter_file.MULTIPLIER_KEY: json.dumps(self._multiplier),
            adapter_file.HASH_KEY: json.dumps(self.base_hashes, sort_keys=True),
            adapter_file.PATHS_KEY: json.dumps(self._paths, sort_keys=True),
            adapter_file.OPTIONS_KEY: json.dumps(rebuilding.hidden_options(self.network)),
        }
        if self.schedule is not None:
            header[adapter_file.SCHEDULE_KEY] = json.dumps(self.schedule.config())
        layers = adapter_file.by_layer(self.network.state_dict())
        tensors = {
            f"{name}.{key}": tensor
            for name, layer in layers.items()
            for key, tensor in scales.with_multiplier(name, layer, self._multiplier).items()
        }
        return tensors, header

    def detach(self) -> None:
        """Remove every module from its layer."""
        self.network.restore()
        for attachment in self._attachments:
            attachment.remove()
        self._attachments.clear()
        while self._joined:
            self._joined.pop().detach()


def _forward_unless_off(
    module: Any, forward: Callable[..., Tensor], x: Tensor, *args: Any, **options: Any
) -> Tensor:
    """A LyCORIS module's forward; at multiplier 0, where some still change the weights, the base layer's."""
    if module.multiplier == 0:
        output: Tensor = module.org_forward(x, *args, **options)
        return output
    return forward(module, x, *args, **options)


def _first_reason(error: Exception) -> str:
    """The first of torch's reasons for which a state does not load, and the number of others."""
    first, *others = [line.strip().rstrip(".") for line in str(error).splitlines()[1:] if line.strip()] or [
        ""
    ]
    more = f"; {len(others)} more layers do not fit" if others else ""
    return first[:MAX_REASON_CHARACTERS] + more


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from ((name, tensor) for name, tensor in module.named_buffers() if name != "dtype_tensor")


def _schedule_of(stored: adapter_file.AdapterFile, layers: Sequence[MaskedLayer]) -> RankSchedule | None:
    """The schedule of a file's header, else of its layers, else the default one of their rank.

    Raises:
        AdapterError: Header and layers contradict each other, or one of them is invalid.
    """
    config = stored.entry(adapter_file.SCHEDULE_KEY)
    try:
        header = RankSchedule.from_config(config) if config is not None else None
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{stored.path}: the rank schedule in its header is invalid: {error}.") from error
    stated = {layer.schedule for layer in layers if layer.schedule is not None}
    if len(stated) > 1:
        raise AdapterError(f"{stored.path}: its layers have {len(stated)} different rank schedules.")
    own = stated.pop() if stated else None
    if header is not None and own is not None and own != header:
        raise AdapterError(f"{stored.path}: the header has {header.config()}, the layers {own.config()}.")
    largest = max((layer.lora_dim for layer in layers), default=0)
    schedule = header or own or (RankSchedule(max_rank=largest) if layers else None)
    if schedule is not None and schedule.max_rank != largest and not _has_other_ranks(stored):
        found = f"its layers have rank {largest}" if layers else "it has no T-LoRA layers"
        raise AdapterError(f"{stored.path}: its schedule has max_rank {schedule.max_rank}, but {found}.")
    return schedule


def _has_other_ranks(stored: adapter_file.AdapterFile) -> bool:
    """Whether the header's lycoris json may give some layers another rank."""
    config = stored.entry(adapter_file.LYCORIS_KEY) or {}
    preset = config.get("apply_preset")
    maps = [preset.get(name) for name in rebuilding.MAPS] if isinstance(preset, dict) else []
    return "conv_dim" in config or any(maps)
