"""Runs of other programs that train the whole denoiser, as model_type full."""

from __future__ import annotations

from pydantic import JsonValue

from simpletuner.helpers.configuration.migration.draft import Draft, Settings
from simpletuner.helpers.configuration.text.decisions import Outcome
from simpletuner.helpers.configuration.text.problems import shown

_ROUNDED = "bf16 weights are stepped in float32 and rounded stochastically, so small updates are kept."


def put_fused_backward_pass(settings: Settings, key: str, *, accumulation: int) -> None:
    """The step in the backward pass, without clipping by the norm of all gradients, which it cannot have.

    Args:
        settings: Has the key.
        key: Of the other program.
        accumulation: Micro-batches of a step.
    """
    if not settings.flag(key):
        if settings.has(key):
            settings.decide(key, "no effect", text="Off, as here.")
        return
    if accumulation > 1:
        settings.decide(key, "no effect", text="Not with gradient accumulation here; the result is the same.")
        return
    settings.put(key, "fused_backward_pass", True)
    clipping = next((each for each in ("max_grad_norm", "clip_grad_norm") if each in settings.rows), "")
    text = (
        "fused_backward_pass never has the norm of all gradients; grad_clip_method value clips each element."
    )
    settings.draft.config["max_grad_norm"] = 0
    if settings.flag(clipping):
        settings.decide(clipping, "approximate", ours="max_grad_norm: 0", text=text)


def put_weight_format(settings: Settings, key: str, *, is_bf16: bool) -> None:
    """The format of the trained weights; is_bf16 says whether the other program has them in bf16."""
    precision = settings.text("mixed_precision") if "mixed_precision" in settings.rows else "bf16"
    outcome: Outcome = "approximate"
    if is_bf16 or precision == "no":
        settings.decide(key, outcome, ours="mixed_precision", text=_ROUNDED)
    else:
        text = f"The weights are float32 there. {_ROUNDED} mixed_precision no trains in float32."
        settings.decide(key, outcome, ours="mixed_precision", text=text)


def fit_to_whole_model(draft: Draft) -> None:
    """Set model_type, and take back what goes with adapters only."""
    draft.config["model_type"] = "full"
    for key in ("enable_group_offload", "base_model_precision", "lora_format"):
        draft.withdraw(key, "Not with model_type full.")
    draft.config.pop("group_offload_type", None)
    if draft.config.get("mixed_precision") == "fp16":
        draft.change("mixed_precision", "bf16", f"fp16 is for adapters. {_ROUNDED}")


def put_layer_filter(settings: Settings, key: str, patterns: list[str]) -> None:
    """The patterns of weights that are trained; without a pattern all are."""
    wanted: list[JsonValue] = [pattern for pattern in patterns if pattern]
    if wanted:
        settings.draft.config["layer_filter"] = wanted
    if settings.has(key):
        ours = f"layer_filter: {shown(wanted)}" if wanted else "all weights"
        settings.decide(key, "translated", ours=ours, text="")
