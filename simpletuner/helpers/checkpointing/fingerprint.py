"""Settings that a resumed run must share with its checkpoint; metadata of an adapter file. No torch."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

from simpletuner import __version__
from simpletuner.helpers.adapters.files.labels import labels_of_run
from simpletuner.helpers.choices.precisions import UNCHANGED
from simpletuner.helpers.configuration.schema.adapter import AdapterConfig
from simpletuner.helpers.configuration.schema.base import holds_text
from simpletuner.helpers.configuration.schema.datasets import subjects_of
from simpletuner.helpers.io.redaction import redacted, redacted_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from simpletuner.helpers.configuration.schema.model import ModelConfig
    from simpletuner.helpers.configuration.schema.new_tokens import NewTokenConfig
    from simpletuner.helpers.configuration.schema.noise import NoiseConfig
    from simpletuner.helpers.configuration.schema.sections import RunConfig
    from simpletuner.helpers.configuration.schema.text_encoders import TextEncoderConfig
    from simpletuner.helpers.contracts import ModelSpec
    from simpletuner.helpers.data.dataset import TrainingData
    from simpletuner.helpers.io.atomic import JsonValue

# Adapter settings that may change on resume.
SAFE_ADAPTER_KEYS = {
    *("lora_dropout", "lora_format", "lycoris_config", "init_lora"),
    "slider_lora_target",  # peft_lora_target_modules has its layers
}

_TEXTS = {"lycoris apply_preset"} | {
    key for key in AdapterConfig.model_fields if holds_text(AdapterConfig, key)
}


def resume_fingerprint(config: RunConfig) -> dict[str, JsonValue]:
    """Settings that must not change on resume, since the training state depends on them.

    A value of an environment variable in a text is a digest beside its placeholder.
    """
    settings: dict[str, JsonValue] = {
        "model_family": config.model.model_family,
        "prediction_type": config.model.prediction_type,
        "rescale_betas_zero_snr": config.model.rescale_betas_zero_snr,
        "optimizer": config.optimizer.optimizer,
        "lora_type": config.adapter.lora_type,
    }
    if not config.model.has_adapter:
        settings["model_type"] = config.model.model_type
    if config.model.is_full:
        settings |= {
            "mixed_precision": config.precision.mixed_precision,
            "layer_filter": list(config.whole_model.layer_filter),
        }
    settings |= _prompt_length(config.model) | _text_encoders(config.text_encoders)
    settings |= token_facts(config.new_tokens, with_digest=True)
    for dataset in (each for each in config.datasets if each.is_trained):
        name = redacted(f"dataset {dataset.id}")
        if dataset.downsampling is not None:
            maximum, target = dataset.downsampling
            settings[f"{name}, maximum_image_size"] = maximum
            settings[f"{name}, target_downsample_size"] = target
        if dataset.slider_strength is not None:
            settings[f"{name}, slider_strength"] = dataset.slider_strength
    if config.lycoris is not None:
        chosen: dict[str, JsonValue] = config.lycoris.model_dump(mode="json", exclude={"raw"})
        settings |= {f"lycoris {key}": value for key, value in chosen.items()}
    else:
        # Checkpoints of older versions have no use_rslora.
        unset = set() if config.adapter.use_rslora else {"use_rslora"}
        settings |= config.adapter.model_dump(mode="json", exclude=SAFE_ADAPTER_KEYS | unset)
    texts = {key: redacted_json(settings[key], with_digest=True) for key in _TEXTS & settings.keys()}
    return settings | texts


def non_default(noise: NoiseConfig) -> dict[str, JsonValue]:
    """Noise and guidance settings that differ from the defaults."""
    values: dict[str, JsonValue] = noise.model_dump(mode="json", exclude_defaults=True)
    return values


def _text_encoders(config: TextEncoderConfig) -> dict[str, JsonValue]:
    """The trained text encoders and their rank; none for a run that trains none, as older checkpoints say."""
    if not config.train_text_encoder:
        return {}
    rates = config.text_encoder_lr or (None,)
    return {
        "train_text_encoder": [rate != 0 for rate in (rates[0], rates[-1])],
        "text_encoder_lora_rank": config.text_encoder_lora_rank,
    }


def token_facts(config: NewTokenConfig, *, with_digest: bool = False) -> dict[str, JsonValue]:
    """The new token of a run and what it starts from, redacted; nothing without one."""
    if config.placeholder_token is None:
        return {}
    facts = config.model_dump(mode="json", exclude={"embedding_lr"})
    return {key: redacted_json(value, with_digest=with_digest) for key, value in facts.items()}


def _prompt_length(model: ModelConfig) -> dict[str, JsonValue]:
    """max_token_length if it differs from the default."""
    return model.model_dump(mode="json", include={"max_token_length"}, exclude_defaults=True)


def adapter_metadata(
    config: RunConfig, data: TrainingData, *, spec: ModelSpec, scheduler: Mapping[str, object]
) -> dict[str, str]:
    """Metadata about the training, redacted, for the header of the adapter file.

    Args:
        config: The run.
        data: Its samples.
        spec: Its family.
        scheduler: Configuration of the model's scheduler, for the prediction type.
    """
    prompts = {str(each.instance_prompt) for each in subjects_of(config.datasets) if each.instance_prompt}
    replaced = {key: value for key, value in config.model if key.startswith("pretrained_")}
    del replaced["pretrained_model_name_or_path"]
    metadata = {
        "software": f"simpletuner {__version__}",
        "base_model": redacted(config.model.pretrained_model_name_or_path),
        "model_family": config.model.model_family,
        "model_flavour": config.model.model_flavour,
        "prediction_type": config.model.prediction_type,
        "rescale_betas_zero_snr": config.model.rescale_betas_zero_snr or None,
        **_prompt_length(config.model),
        **token_facts(config.new_tokens),
        **redacted_json(replaced),
        **non_default(config.noise),
        "optimizer": config.optimizer.optimizer,
        "learning_rate": config.optimizer.learning_rate,
        "lr_scheduler": config.optimizer.lr_scheduler,
        "train_batch_size": config.training.train_batch_size,
        "gradient_accumulation_steps": config.training.gradient_accumulation_steps,
        "mixed_precision": config.precision.mixed_precision,
        **{
            key: value for key, value in config.precision if key.endswith("_precision") and value != UNCHANGED
        },
        "seed": config.training.seed,
        "resolution": config.data.resolution,
        "datasets": json.dumps(Counter(redacted(sample.dataset_id) for sample in data.samples)),
        "trigger_words": redacted(", ".join(sorted(prompts))),
    }
    own = {name: str(value) for name, value in metadata.items() if value not in (None, "")}
    if not config.model.has_adapter:  # the labels are those of adapters
        return own
    prediction_type = config.model.prediction_type or scheduler.get("prediction_type")
    labels = labels_of_run(
        config,
        spec,
        samples=data.samples,
        prediction_type=None if prediction_type is None else str(prediction_type),
    )
    return own | {name: redacted(value) for name, value in labels.items()}
