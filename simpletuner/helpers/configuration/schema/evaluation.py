"""The section of config.json on the loss of held-out images."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator

from simpletuner.helpers.configuration.schema.base import Count, CountOrZero, Names, Section
from simpletuner.helpers.configuration.schema.datasets import listed_ids


class EvaluationConfig(Section):
    """The loss of held-out images: of entries with dataset_type eval, and of eval_share of others."""

    eval_steps_interval: CountOrZero = 100
    """Optimiser steps between evaluations; 0 for none. Before the first step and after the last one is always
    one."""
    eval_epoch_interval: CountOrZero = 0
    """Completed epochs between evaluations, beside eval_steps_interval; 0 for none. An epoch that ends within
    a step is complete after it."""
    num_eval_images: Count = 8
    """Held-out images that are evaluated, at most, and as many training images beside them. The digests of
    their bytes choose them."""
    eval_timesteps: Count = 8
    """Noise levels of each image, spread evenly over the distribution that training draws from."""
    eval_dataset_id: Annotated[Names, BeforeValidator(listed_ids)] = ()
    """ids of the entries whose held-out images are evaluated: a text or a list. Empty for all."""
    eval_loss_disable: bool = False
    """Evaluate nothing; images are held out nevertheless."""
