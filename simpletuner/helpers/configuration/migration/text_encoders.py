"""Trained text encoders of other programs' runs."""

from __future__ import annotations

from collections.abc import Sequence

from simpletuner.helpers.choices.optimizers import OPTIMIZERS
from simpletuner.helpers.configuration.loading.text_encoder_rules import LARGEST_RANK
from simpletuner.helpers.configuration.migration.draft import Draft
from simpletuner.helpers.configuration.text.decisions import Outcome

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
