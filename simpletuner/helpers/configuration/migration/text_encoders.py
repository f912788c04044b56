"""Trained text encoders of other programs' runs."""

from __future__ import annotations

from collections.abc import Sequence

from simpletuner.helpers.choices.optimizers import OPTIMIZERS
from simpletuner.helpers.configuration.loading.text_encoder_rules import LARGEST_RANK
from simpletuner.helpers.configuration.migration.draft import Draft, Settings
from simpletuner.helpers.configuration.text.decisions import Outcome
from simpletuner.helpers.contracts import ModelSpec

_RANK_BESIDE_WHOLE_MATRICES = 16


def put_text_encoders(draft: Draft, rates: Sequence[float]) -> str:
    """Train the text encoders with these rates, once rate and optimiser of the run are put.

    Returns:
        Our keys, for the decision on the other program's key.
    """
    config = draft.config
    own = [float(rate) for rate in rates]
    if len(set(own)) == 1:
        own = own[:1]
    optimizer = OPTIMIZERS.named(config.get("optimizer", "adamw"))
    if optimizer is not None and not optimizer.takes_rates:
        own = [float(str(config["learning_rate"])) if rate else 0.0 for rate in own]
    config["train_text_encoder"] = True
    config["text_encoder_lr"] = list(own)
    if draft.lycoris is not None and int(str(draft.lycoris["linear_dim"])) > LARGEST_RANK:
        config["text_encoder_lora_rank"] = _RANK_BESIDE_WHOLE_MATRICES
    for number in (1, 2):
        draft.withdraw(f"text_encoder_{number}_precision", "Trained text encoders are not quantised.")
    return f"train_text_encoder: true, text_encoder_lr: {', '.join(f'{rate:g}' for rate in own)}"


def outcome_of(draft: Draft) -> Outcome:
    """Outcome of trained text encoders: elsewhere they have the denoiser's algorithm, here a LoRA."""
    return "translated" if draft.lycoris is None else "approximate"


def onetrainer_text_encoders(settings: Settings, spec: ModelSpec) -> None:
    """Decide the keys of OneTrainer on text encoders; rate and optimiser of the run are put."""
    parts = ["text_encoder", "text_encoder_2"][: spec.num_text_encoders]
    trained = [part for part in parts if settings.flag(f"{part}.train")]
    if trained and not spec.text_encoder_lora_targets:
        text = f"The text encoders of {spec.name} are not trained here; the result differs."
        for part in trained:
            settings.decide(f"{part}.train", "not translated", text=text)
    elif trained:
        _put_onetrainer(settings, parts, trained)
    for key in ("train", "learning_rate", "stop_training_after", "stop_training_after_unit"):
        for part in ("text_encoder", "text_encoder_2"):
            if settings.has(f"{part}.{key}"):
                text = "Of a text encoder that is not trained, or that the model does not have."
                settings.decide(f"{part}.{key}", "no effect", text=text)


def _put_onetrainer(settings: Settings, parts: Sequence[str], trained: Sequence[str]) -> None:
    """Train these text encoders; a rate of 0 leaves the other one as it is."""
    draft = settings.draft
    common, own = settings.number("learning_rate"), float(str(draft.config["learning_rate"]))
    factor = own / (settings.number("unet.learning_rate") or common or own)  # of learning_rate_scaler
    given = {part: settings.number(f"{part}.learning_rate") or common for part in trained}
    rates = [given[part] * factor if part in trained else 0.0 for part in parts]
    ours = put_text_encoders(draft, rates)
    for part in trained:
        settings.decide(f"{part}.train", outcome_of(draft), ours=ours, text="")
        if settings.has(f"{part}.learning_rate"):
            settings.decide(f"{part}.learning_rate", "translated", ours="text_encoder_lr", text="")
    ends = {
        settings.whole(f"{part}.stop_training_after")
        if settings.text(f"{part}.stop_training_after_unit").upper() == "STEP"
        else 0
        for part in trained
    }
    for part in trained:
        for key in ("stop_training_after", "stop_training_after_unit"):
            if len(ends) == 1 and ends != {0}:
                draft.config["stop_text_encoder_training"] = max(ends)
                ours = f"stop_text_encoder_training: {max(ends)}"
                settings.decide(f"{part}.{key}", "translated", ours=ours, text="")
            elif settings.has(f"{part}.{key}"):
                unit = settings.text(f"{part}.stop_training_after_unit").upper()
                is_never = unit in ("", "NEVER") and ends == {0}
                text = (
                    "Never, as here." if is_never else settings.rows["text_encoder.stop_training_after"].text
                )
                settings.decide(f"{part}.{key}", "no effect" if is_never else "not translated", text=text)


def ai_toolkit_text_encoders(settings: Settings, spec: ModelSpec) -> None:
    """Decide the keys of ai-toolkit on text encoders; rate and optimiser of the run are put."""
    keys = ("train.train_text_encoder", "train.text_encoder_lr")
    if settings.flag(keys[0]) and spec.text_encoder_lora_targets:
        rate = settings.number(keys[1]) or float(str(settings.draft.config["learning_rate"]))
        ours = put_text_encoders(settings.draft, [rate])
        for key in keys:
            if settings.has(key):
                settings.decide(key, outcome_of(settings.draft), ours=ours, text="")
        return
    for key in keys:
        if settings.has(key) and settings.flag(keys[0]):
            text = f"The text encoders of {spec.name} are not trained here; the result differs."
            settings.decide(key, "not translated", text=text)
        elif settings.has(key):
            settings.decide(key, "no effect", text="The text encoders are not trained.")
