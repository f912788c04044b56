"""Changes of a configuration that need less device memory, those that cost least first. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from simpletuner.helpers.choices.optimizers import OPTIMIZERS
from simpletuner.helpers.choices.precisions import PRECISIONS, UNCHANGED
from simpletuner.helpers.choices.registry import Choice
from simpletuner.helpers.configuration.loading.rules import training_size
from simpletuner.helpers.configuration.schema.adapter import CHANGE_THE_BASE
from simpletuner.helpers.configuration.schema.resolution import square_size
from simpletuner.helpers.configuration.schema.sections import RunConfig
from simpletuner.helpers.contracts import ModelSpec, Size
from simpletuner.helpers.estimating.device_memory import phases_of
from simpletuner.helpers.estimating.run_facts import facts_of

FITS = 0.95
"""Share of a card's memory up to which an estimate counts as fitting."""
LEAST_EFFECT = 0.99
"""A change is named if the largest phase falls to less than this share."""
RESOLUTIONS = (768.0, 512.0)
SMALL_STATES = "bnb-adamw8bit"


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Values of configuration keys to change, together with all suggestions before it."""

    values: tuple[str, ...]
    """Each `key=value`, as on the command line."""
    cost: str
    peak_device_bytes: int
    """The estimate after it."""


@dataclass(frozen=True, slots=True)
class _Change:
    values: Mapping[str, object]
    cost: str
    apply: Callable[[RunConfig], RunConfig]


def suggestions(run: RunConfig, spec: ModelSpec, *, memory_bytes: int) -> list[Suggestion]:
    """Changes after which a run fits a memory, or as many as there are; none if it fits as it is."""
    changes: list[_Change] = []
    changed, limit = run, FITS * memory_bytes
    # From the cheapest on after each change: another phase may be the largest then.
    while _peak(changed, spec) > limit and (change := _cheapest(changed, spec, limit=limit)) is not None:
        changed = change.apply(changed)
        changes.append(change)
    if _peak(changed, spec) <= limit:
        changes = _needed(run, spec, changes, limit=limit)
    found = []
    for change in changes:
        run = change.apply(run)
        values = tuple(f"{key}={_shown(value)}" for key, value in change.values.items())
        found.append(Suggestion(values, change.cost, _peak(run, spec)))
    return found


def _needed(run: RunConfig, spec: ModelSpec, changes: list[_Change], *, limit: float) -> list[_Change]:
    """The changes without those that the later ones make superfluous."""
    for change in changes[:-1]:
        others = [each for each in changes if each is not change]
        changed = run
        for each in others:
            changed = each.apply(changed)
        if _peak(changed, spec) <= limit:
            changes = others
    return changes


def _cheapest(run: RunConfig, spec: ModelSpec, *, limit: float) -> _Change | None:
    """The cheapest change that makes the largest phase smaller and no other larger; None without any.

    Of several degrees of a change it is the first one that keeps the limit, else that of the lowest peak.
    """
    before = _phases(run, spec)
    largest = max(before, key=lambda name: before[name])
    for degrees in _CHANGES:
        effective = []
        for change in degrees(run, spec):
            after = _phases(change.apply(run), spec)
            peak = max(after.values())
            if after.get(largest, 0) < LEAST_EFFECT * before[largest] and peak <= before[largest]:
                effective.append((change, peak))
        if effective:
            lowest = min(effective, key=lambda each: each[1])
            return next((each for each in effective if each[1] <= limit), lowest)[0]
    return None


def _phases(run: RunConfig, spec: ModelSpec) -> dict[str, int]:
    """Name of a phase -> its device memory."""
    facts = facts_of(run, spec)
    assert facts is not None, "a family without a memory model has no estimate to improve"
    return {phase.name: phase.num_bytes for phase in phases_of(facts)}


def _peak(run: RunConfig, spec: ModelSpec) -> int:
    return max(_phases(run, spec).values())


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _changed(section: str, cost: str, **values: object) -> _Change:
    """The change of some keys of a section."""

    def apply(run: RunConfig) -> RunConfig:
        return run.model_copy(update={section: getattr(run, section).model_copy(update=values)})

    return _Change(values, cost, apply)


def _recompute(run: RunConfig, _spec: ModelSpec) -> Iterator[_Change]:
    training = run.training
    if not training.gradient_checkpointing:
        yield _changed("training", "a quarter to a third more time", gradient_checkpointing=True)
    elif (training.gradient_checkpointing_interval or 1) > 1:
        yield _changed("training", "more time", gradient_checkpointing_interval=1)


def _average_on_host(run: RunConfig, _spec: ModelSpec) -> Iterator[_Change]:
    if run.ema.use_ema and run.ema.ema_device == "accelerator":
        yield _changed("ema", "slower updates of the average", ema_device="cpu")


def _small_caching(run: RunConfig, _spec: ModelSpec) -> Iterator[_Change]:
    if run.precision.vae_batch_size > 1:
        yield _changed("precision", "slower caching of latents", vae_batch_size=1)


def _cache_before(run: RunConfig, _spec: ModelSpec) -> Iterator[_Change]:
    values = {key: False for key in ("vae_cache_ondemand", "text_cache_ondemand") if getattr(run.data, key)}
    if values:
        yield _changed("data", "everything is cached before the first step", **values)


def _tiles(run: RunConfig, _spec: ModelSpec) -> Iterator[_Change]:
    if not run.precision.vae_enable_tiling:
        yield _changed("precision", "slightly other latents and images", vae_enable_tiling=True)


def _needs(choice: Choice) -> str:
    """The package of a choice, for the end of a cost."""
    return f"; needs {choice.package}" if choice.package else ""


def _small_text_encoder(run: RunConfig, spec: ModelSpec) -> Iterator[_Change]:
    key = f"text_encoder_{spec.num_text_encoders}_precision"  # the last one is the largest
    if run.trains_text or getattr(run.precision, key) != UNCHANGED:
        return
    for precision in ("int8-torchao", "nf4-bnb"):
        cost = f"prompt embeds are a little less exact{_needs(PRECISIONS[precision])}"
        yield _changed("precision", cost, **{key: precision})


def _small_batches(run: RunConfig, _spec: ModelSpec) -> Iterator[_Change]:
    training = run.training
    if training.train_batch_size > 1 and not run.whole_model.fused_backward_pass:
        yield _changed(
            "training",
            "more time for as many images",
            train_batch_size=1,
            gradient_accumulation_steps=training.train_batch_size * training.gradient_accumulation_steps,
        )


def _small_states(run: RunConfig, _spec: ModelSpec) -> Iterator[_Change]:
    if run.optimizer.optimizer == "adamw":
        cost = f"the optimiser's state in 8 bits{_needs(OPTIMIZERS[SMALL_STATES])}"
        yield _changed("optimizer", cost, optimizer=SMALL_STATES)


def _step_in_backward(run: RunConfig, _spec: ModelSpec) -> Iterator[_Change]:
    record, training = OPTIMIZERS[run.optimizer.optimizer], run.training
    if run.model.is_full and not record.needs_all_gradients and training.gradient_accumulation_steps == 1:
        change = _changed("training", "gradients are not clipped", max_grad_norm=0.0)
        fused = _changed("whole_model", change.cost, fused_backward_pass=True)
        values = {**fused.values, **change.values}
        yield _Change(values, change.cost, lambda each: fused.apply(change.apply(each)))


def _small_weights(run: RunConfig, _spec: ModelSpec) -> Iterator[_Change]:
    precision = run.precision
    if not run.model.has_adapter or _needs_dense_weights(run):
        return
    if precision.base_model_precision == UNCHANGED:
        cost = f"weights are 1 % off{_needs(PRECISIONS['int8-torchao'])}"
        yield _changed("precision", cost, base_model_precision="int8-torchao")
    if not precision.enable_group_offload:
        cost = f"weights are 9 % off{_needs(PRECISIONS['nf4-bnb'])}"
        yield _changed("precision", cost, base_model_precision="nf4-bnb")


def _needs_dense_weights(run: RunConfig) -> bool:
    if run.lycoris is None:
        return run.adapter.lora_init_type in CHANGE_THE_BASE
    others = any(entry.algo is not None for entry in run.lycoris.apply_preset.entries)
    return run.algorithm.adds_to_weight or others or bool(run.lycoris.extra.get("weight_decompose"))


def _offload(run: RunConfig, spec: ModelSpec) -> Iterator[_Change]:
    precision, kind = run.precision, "leaf_level" if spec.denoiser_name == "unet" else "block_level"
    fits = run.training.gradient_checkpointing and run.compared_with is None and not _compiles(run)
    if run.model.is_full or precision.enable_group_offload or not fits:
        return
    values: dict[str, Any] = {"enable_group_offload": True, "group_offload_type": kind}
    if precision.base_model_precision == "nf4-bnb":  # its layers stay on the device
        values["base_model_precision"] = "int8-torchao"
    yield _changed("precision", "much slower: each step copies the model twice", **values)


def _compiles(run: RunConfig) -> bool:
    return run.compiling.dynamo_backend != "no" or run.compiling.validation_torch_compile


def _small_validation(run: RunConfig, spec: ModelSpec) -> Iterator[_Change]:
    for edge in RESOLUTIONS:
        size = _square(edge, run, spec)
        sizes = run.validation.validation_resolution
        if sizes and all(each.height * each.width > size.height * size.width for each in sizes):
            change = _changed("validation", "smaller validation images", validation_resolution=(size,))
            yield replace(change, values={"validation_resolution": size})


def _small_images(run: RunConfig, spec: ModelSpec) -> Iterator[_Change]:
    data = run.data
    for edge in RESOLUTIONS if data.resolution_type != "area" else ():
        if edge < data.resolution and all(each.resolution == data.resolution for each in run.datasets):
            yield _Change(
                {"resolution": edge}, "less detail is learnt", partial(_with_resolution, spec, edge)
            )


def _with_resolution(spec: ModelSpec, edge: float, run: RunConfig) -> RunConfig:
    """The run with another resolution in config.json, which datasets and validation images inherit."""
    data = run.data.model_copy(update={"resolution": edge})
    datasets = tuple(each.model_copy(update={"resolution": edge}) for each in run.datasets)
    validation = run.validation
    if validation.validation_resolution == (training_size(run.data, spec),):
        size = training_size(data, spec)
        validation = validation.model_copy(update={"validation_resolution": (size,)})
    return run.model_copy(update={"data": data, "datasets": datasets, "validation": validation})


def _square(edge: float, run: RunConfig, spec: ModelSpec) -> Size:
    alignment = run.data.alignment(spec.pixel_alignment)
    return square_size(resolution=edge, resolution_type="pixel", alignment=alignment)


_CHANGES: Sequence[Callable[[RunConfig, ModelSpec], Iterator[_Change]]] = (
    _average_on_host,
    _cache_before,
    _small_caching,
    _tiles,
    _recompute,
    _small_text_encoder,
    _small_states,
    _small_batches,
    _step_in_backward,
    _small_validation,
    _small_weights,
    _small_images,
    _offload,
)
"""In the order of their costs: time first, then exactness, then what is learnt."""
