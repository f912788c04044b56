"""Prompts of a run that trains text encoders or a new token: they are encoded when needed, never cached."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from simpletuner.helpers.adapters.joint import JointAdapter, TextEncoderLora, TextEncoderSettings
from simpletuner.helpers.adapters.new_tokens import NewToken
from simpletuner.helpers.configuration.schema.adapter import AdapterConfig
from simpletuner.helpers.sampling.embeddings import text_parts

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from simpletuner.helpers.adapters.adapter import Adapter
    from simpletuner.helpers.adapters.trainable import Trainable
    from simpletuner.helpers.checkpointing.progress import Progress
    from simpletuner.helpers.configuration.schema.sections import RunConfig
    from simpletuner.helpers.contracts import Batch, TextEmbeds
    from simpletuner.helpers.models.family import ModelFamily


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoding:
    """Encodes the captions of a step with the text encoders and the new token that it trains."""

    family: ModelFamily
    text_encoders: tuple[TextEncoderLora, ...]
    """Empty for a run that trains none."""
    token: NewToken | None
    end_step: int | None
    """Of the text encoders; the token is trained to the end."""
    progress: Progress

    @property
    def models(self) -> list[nn.Module]:
        """The text encoders that are loaded for training; none if the run trains nothing of them."""
        return list(self.family.text_encoders.values()) if self.trains_text else []

    @property
    def trains_text(self) -> bool:
        """Whether there is anything to train; the batches of another run have cached prompt embeds."""
        return bool(self.text_encoders) or self.token is not None

    def encoded(self, batch: Batch) -> Batch:
        """The batch with the embeds of its captions, through which gradients reach what is trained of text.

        Unchanged in a run that trains nothing of it.
        """
        if not self.trains_text:
            return batch
        has_ended = self.token is None and self.end_step is not None and self.progress.step >= self.end_step
        with torch.set_grad_enabled(torch.is_grad_enabled() and not has_ended):
            return replace(batch, text=self.family.embed_prompts([each.caption for each in batch.samples]))

    def average_gradients(self, accelerator: Accelerator) -> None:
        """Average the gradients of the text's part over the processes, as DDP does those of the denoiser.

        A parameter without a gradient in every process, as of a layer whose output nothing reads, keeps none.
        """
        if accelerator.num_processes == 1 or not self.trains_text:
            return
        parameters = [each for encoder in self.text_encoders for each in encoder.lora.parameters()]
        parameters += [] if self.token is None else self.token.parameters()
        found = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        has_gradient = [float(each.grad is not None) for each in parameters]
        whole = torch.cat([found[0].new_tensor(has_gradient), *(each.flatten() for each in found)])
        whole = accelerator.reduce(whole, reduction="sum")
        counts, *sums = whole.split([len(parameters), *(each.numel() for each in parameters)])
        for parameter, count, gradient in zip(parameters, counts.tolist(), sums, strict=True):
            mean = gradient.view_as(parameter) / accelerator.num_processes
            parameter.grad = mean if count else None


def build_text_encoding(
    config: RunConfig, family: ModelFamily, trainable: Trainable, *, progress: Progress
) -> TextEncoding:
    """The encoding of a run's captions."""
    joint = trainable if isinstance(trainable, JointAdapter) else None
    alone = trainable if isinstance(trainable, NewToken) else None
    return TextEncoding(
        family=family,
        text_encoders=() if joint is None else joint.text_encoders,
        token=alone if joint is None else joint.token,
        end_step=config.text_encoders.stop_text_encoder_training,
        progress=progress,
    )


def with_text_encoders(adapter: Adapter, config: RunConfig, family: ModelFamily) -> Adapter:
    """The adapter with what is trained of the text encoders, which are loaded; as it is if nothing is.

    Raises:
        ConfigError: The new token is known already, or its initializer is unknown or too long.
        AdapterError: The layers of the text encoders in the file of init_lora do not fit.
        ModelError: A text encoder does not load.
    """
    if not config.trains_text:
        return adapter
    family.load_text_encoders()
    loras = _loras(config, family)
    has_token = config.new_tokens.placeholder_token is not None
    joint = JointAdapter(adapter, loras, token=new_token(config, family) if has_token else None)
    if config.adapter.init_lora is not None:
        joint.init_text_encoders(config.adapter.init_lora)
    return joint


def new_token(config: RunConfig, family: ModelFamily) -> NewToken:
    """The new token of a run in the family's text encoders, which are loaded and frozen but for their LoRAs.

    Raises:
        ConfigError: It is known already, or its initializer is unknown or too long.
        ModelError: A text encoder does not load.
    """
    family.load_text_encoders()
    for index, encoder in enumerate(family.text_encoders.values()):
        if not config.text_encoders.trains(index):
            encoder.requires_grad_(False)
            _prepare(encoder, config)
    return NewToken(text_parts(family), config.new_tokens)


def _prepare(encoder: Any, config: RunConfig) -> None:
    """Put a text encoder into training mode."""
    if config.training.gradient_checkpointing:
        encoder.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    encoder.train()  # transformers recomputes activations in training mode alone


def _loras(config: RunConfig, family: ModelFamily) -> list[TextEncoderLora]:
    section, trained = config.text_encoders, []
    for index, (name, encoder) in enumerate(family.text_encoders.items()):
        if not section.trains(index):
            continue
        lora = TextEncoderLora(
            encoder,
            lora_of_text_encoders(config),
            name=name,
            targets=family.spec.text_encoder_lora_targets,
            settings=TextEncoderSettings(
                learning_rate=section.rate_of(index), end_step=section.stop_text_encoder_training
            ),
            seed=config.training.seed,
        )
        _prepare(encoder, config)
        trained.append(lora)
    return trained


def lora_of_text_encoders(config: RunConfig) -> AdapterConfig:
    """Rank, alpha and dropout of the text encoders' LoRA: those of the denoiser's adapter, unless set."""
    own, lycoris, rank = config.adapter, config.lycoris, config.text_encoders.text_encoder_lora_rank
    if lycoris is not None:
        rank = rank or lycoris.linear_dim
        return AdapterConfig(lora_rank=rank, lora_alpha=rank * lycoris.linear_alpha / lycoris.linear_dim)
    rank = rank or own.lora_rank
    return AdapterConfig(
        lora_rank=rank,
        lora_alpha=rank * own.lora_alpha / own.lora_rank,
        lora_dropout=own.lora_dropout,
        use_rslora=own.use_rslora,
    )


def present_embeds(family: ModelFamily) -> Callable[[str], TextEmbeds]:
    """What encodes a prompt with the text encoders as they are, loading them if need be."""

    def embeds_of(prompt: str) -> TextEmbeds:
        family.load_text_encoders()
        with evaluating(family.text_encoders.values()):
            return family.encode_prompts([prompt])[0]

    return embeds_of


@contextmanager
def evaluating(models: Iterable[nn.Module]) -> Iterator[None]:
    """Models in evaluation mode; each is back in its own mode afterwards."""
    were_training = [(model, model.training) for model in models]
    for model, _ in were_training:
        model.eval()
    try:
        yield
    finally:
        for model, was_training in were_training:
            model.train(was_training)
