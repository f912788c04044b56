"""Set the rank mask around each denoiser call of a diffusers pipeline."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from inspect import ismethod
from typing import Any, ClassVar

import torch
from lycoris.modules.tlora import TLoraModule
from torch import nn

from simpletuner.helpers.adapters.attachment import adapter_keys_visible
from simpletuner.helpers.adapters.tlora import layer as masked_layers
from simpletuner.helpers.adapters.tlora import mask
from simpletuner.helpers.adapters.tlora.masked_layer import MaskedLayer
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule
from simpletuner.helpers.errors import AdapterError

masked_layers.register()

_in_use: dict[int, int] = {}  # id of a denoiser -> id of the thread that samples from it
_in_use_lock = threading.Lock()


class MaskedDenoising:
    """Mixin before a diffusers pipeline class: each denoising step runs with the rank mask of its timestep.

    `_tlora_config` (`max_rank`, optionally `min_rank`, `alpha`, `schedule`, `num_timesteps`) switches it on.
    The timestep is the scheduler's; a transformer's input is divided and rounded to its dtype.
    A call raises AdapterError when `_tlora_config` is malformed, fits no network in the denoiser or finds
    none, and RuntimeError when another thread is sampling from the same denoiser.
    """

    denoiser_name: ClassVar[str]
    """Component that predicts the noise: "unet" or "transformer"."""

    _tlora_config: Mapping[str, Any] | None = None

    scheduler: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Wrap diffusers' call with the mask, keeping its signature and documentation."""
        super().__init_subclass__(**kwargs)
        if "__call__" not in vars(cls):
            cls.__call__ = _masked_call(super().__call__)  # type: ignore[method-assign, misc]

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Offload layer by layer, the adapter's tensors with them."""
        with adapter_keys_visible():
            super().enable_sequential_cpu_offload(*args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def _masked(self, denoiser: nn.Module) -> Iterator[None]:
        if self._tlora_config is None:
            yield
            return
        schedules = schedules_of(denoiser, config=self._tlora_config, scheduler=self.scheduler)
        groups: set[int] = set()

        def set_masks(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = kwargs.get("timestep", args[1] if len(args) > 1 else None)
            sample = args[0] if args else next(iter(kwargs.values()))
            timestep = scheduler_timestep(self.scheduler, given=given)
            for group, schedule in schedules.items():
                mask.set_mask(schedule, [timestep], group=group, device=sample.device)
                groups.add(group)

        def clear_masks(*_: object) -> None:
            while groups:  # a mask that another caller holds stays
                mask.clear_mask(groups.pop())

        with _around_calls(denoiser, before=set_masks, after=clear_masks):
            yield


@contextmanager
def one_pass_in_first_steps(denoiser: nn.Module, *, steps: int) -> Iterator[None]:
    """Leave out the second pass of guidance in the first steps of a pipeline's call.

    In these steps the pipeline's second call of the denoiser, with the negative prompt, gives the prediction
    of its first call, with the prompt. So guidance changes nothing: p + scale * (p - p) is p.

    Args:
        denoiser: Of a pipeline that calls it twice in each step, with the prompt first.
        steps: Number of denoising steps without a second pass.
    """
    replaced = denoiser._compiled_call_impl
    run: Callable[..., Any] = denoiser._call_impl if replaced is None else replaced
    num_calls, prediction = 0, None

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_calls, prediction
        is_second = num_calls % 2 == 1 and num_calls < 2 * steps
        num_calls += 1
        if not is_second:
            prediction = run(*args, **kwargs)
        return prediction

    denoiser._compiled_call_impl = call
    try:
        yield
    finally:
        denoiser._compiled_call_impl = replaced


@contextmanager
def _around_calls(
    denoiser: nn.Module, *, before: Callable[..., None], after: Callable[..., None]
) -> Iterator[None]:
    """Call `before` ahead of every forward and `after` once it returns or raises."""
    compiled = denoiser._compiled_call_impl
    if compiled is None:
        handles = [
            denoiser.register_forward_pre_hook(before, with_kwargs=True),
            denoiser.register_forward_hook(after, always_call=True),
        ]
    else:  # `denoiser.compile()` compiles hooks too, and reading a timestep from a tensor cannot be compiled

        def call(*args: Any, **kwargs: Any) -> Any:
            before(denoiser, args, kwargs)
            try:
                return compiled(*args, **kwargs)
            finally:
                after()

        handles = []
        denoiser._compiled_call_impl = call
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        denoiser._compiled_call_impl = compiled
        after()


def _masked_call(call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)
    def masked(pipeline: MaskedDenoising, *args: Any, **kwargs: Any) -> Any:
        denoiser: nn.Module = getattr(pipeline, pipeline.denoiser_name)
        with _one_thread(denoiser), pipeline._masked(denoiser):
            return call(pipeline, *args, **kwargs)

    return masked


def scheduler_timestep(scheduler: Any, *, given: Any) -> int:
    """The timestep of a scheduler's next step, floored to an integer.

    Args:
        scheduler: A diffusers scheduler whose timesteps are set.
        given: The denoiser's timestep input; used for schedulers without a step index (DDIM and similar),
            which call the denoiser with their own timestep.
    """
    attributes = vars(scheduler)
    if "_step_index" not in attributes:
        return int(torch.as_tensor(given).flatten()[0])
    index = attributes["_step_index"]
    if index is None:
        index = attributes.get("_begin_index") or 0
    return int(scheduler.timesteps[index])


def schedules_of(
    denoiser: nn.Module, *, config: Mapping[str, Any], scheduler: Any
) -> dict[int, RankSchedule]:
    """Mask group -> schedule, for every group that a denoiser's T-LoRA layers read.

    The config is for the networks of its `max_rank`; keys that it omits have the network's own values. A
    network of another rank keeps its own schedule, and so does one beside a network whose schedule equals the
    config. Stock LyCORIS layers read group 0, which is included only if the denoiser has any.

    Raises:
        AdapterError: The config is malformed, no layer follows a mask, or no network has its `max_rank`.
    """
    num_timesteps = int(scheduler.config.num_train_timesteps)
    try:
        wanted = RankSchedule.from_config(config, num_timesteps=num_timesteps)
    except (ValueError, TypeError) as error:
        raise AdapterError(f"_tlora_config is invalid: {error}.") from error
    layers = [module for module in denoiser.modules() if isinstance(module, MaskedLayer)]
    own = {layer.mask_group_id: layer.schedule for layer in layers}
    stock = {mask.PUBLIC_GROUP: wanted} if _has_stock_layers(denoiser) else {}
    if not own and not stock:
        raise AdapterError(
            f"_tlora_config is set, but no layer of this {type(denoiser).__name__} follows a rank mask. If "
            "LyCORIS merged a T-LoRA into the weights, load the model again and move the import of this "
            "pipeline, or of simpletuner.helpers.training.lycoris, above create_lycoris_from_weights: T-LoRA "
            "layers then stay apart from the weights. Without an adapter, set _tlora_config to None."
        )
    fitting = {group for group, stated in own.items() if stated is None or stated.max_rank == wanted.max_rank}
    if not fitting and not stock:
        found = ", ".join(str(stated.max_rank) for stated in own.values() if stated is not None)
        raise AdapterError(
            f"_tlora_config has max_rank {wanted.max_rank}, the network in the denoiser {found}. "
            "Set max_rank to the network's."
        )
    completed = {group: _completed(config, wanted, stated=own[group]) for group in fitting}
    described = {group for group in fitting if completed[group] == own[group]} or fitting
    kept = {group: stated for group, stated in own.items() if stated is not None and group not in described}
    return stock | {group: completed[group] for group in described} | kept


def _has_stock_layers(denoiser: nn.Module) -> bool:
    """Whether a model has LyCORIS's own T-LoRA layers, which replace `forward` and are no children."""
    forwards = (vars(module).get("forward") for module in denoiser.modules())
    return any(ismethod(forward) and isinstance(forward.__self__, TLoraModule) for forward in forwards)


def _completed(
    config: Mapping[str, Any], wanted: RankSchedule, *, stated: RankSchedule | None
) -> RankSchedule:
    return wanted if stated is None else RankSchedule.from_config({**stated.config(), **config})


@contextmanager
def _one_thread(denoiser: nn.Module) -> Iterator[None]:
    thread = threading.get_ident()
    with _in_use_lock:
        is_first = id(denoiser) not in _in_use
        if _in_use.setdefault(id(denoiser), thread) != thread:
            raise RuntimeError(
                "Another thread is sampling from this denoiser. A denoiser has one rank mask, so load the "
                "pipeline once per thread, or take turns."
            )
    try:
        yield
    finally:
        with _in_use_lock:
            if is_first:  # in a nested call the outer one releases the denoiser
                del _in_use[id(denoiser)]
