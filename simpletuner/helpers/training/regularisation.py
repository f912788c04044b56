"""Prior preservation: samples of the subject's class keep the adapted model near the base model.

Shapes: B batch, ... the axes of one sample's latents.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn

    from simpletuner.helpers.adapters.trainable import Trainable
    from simpletuner.helpers.configuration.schema.regularisation import RegularisationTarget
    from simpletuner.helpers.configuration.schema.sections import RunConfig
    from simpletuner.helpers.contracts import Batch, NoisyBatch
    from simpletuner.helpers.models.family import ModelFamily
    from simpletuner.helpers.training.text_encoding import TextEncoding


@dataclass(frozen=True, kw_only=True, slots=True)
class Regularisation:
    """Target and weight of regularisation samples."""

    family: ModelFamily
    trainable: Trainable
    text_encoding: TextEncoding
    target: RegularisationTarget
    weight: float
    """prior_loss_weight."""

    def applied_to(self, noisy: NoisyBatch, batch: Batch, *, denoiser: nn.Module) -> NoisyBatch:
        """The noisy batch with the target and the weight of regularisation; unchanged for other samples.

        The target base is the prediction [B, ...] of the denoiser without its adapter, for the same noise,
        timesteps and captions. It runs without a gradient, and before the step's rank mask is set.

        Source: Ruiz et al., DreamBooth, arXiv:2208.12242, equation 2, which for the target data takes images
        that the base model generated.
        """
        if not batch.is_regularisation:
            return noisy
        noisy = replace(noisy, weight=noisy.weight * self.weight)
        if self.target == "data":
            return noisy
        with torch.no_grad(), self.trainable.switched_off():
            batch = self.text_encoding.encoded(batch)
            return replace(noisy, target=self.family.predict(denoiser, noisy, batch))


def build_regularisation(
    config: RunConfig, family: ModelFamily, trainable: Trainable, *, text_encoding: TextEncoding
) -> Regularisation:
    """The configured regularisation."""
    return Regularisation(
        family=family,
        trainable=trainable,
        text_encoding=text_encoding,
        target=config.regularisation.regularisation_target,
        weight=config.regularisation.prior_loss_weight,
    )
