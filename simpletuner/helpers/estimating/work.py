"""What a run computes and copies, by its configuration. Imports no torch."""

from __future__ import annotations

from simpletuner.helpers.estimating.cards import Work
from simpletuner.helpers.estimating.device_memory import num_passes
from simpletuner.helpers.estimating.run_facts import RunFacts
from simpletuner.helpers.estimating.step_flops import forward_flops, step_flops


def work_of(facts: RunFacts) -> Work | None:
    """The work of a run; None in float32, for which vendors give other figures."""
    run = facts.run
    if not facts.arithmetic.is_mixed:
        return None
    setup, accumulated = facts.setup, run.training.gradient_accumulation_steps
    passes = 2 if run.precision.enable_group_offload else 0
    return Work(
        flops_per_step=step_flops(setup.layout, setup.step) * accumulated,
        copied_per_step=passes * accumulated * facts.step_memory.weights,
        validation_flops=_validation_flops(facts),
        num_steps=facts.num_steps,
    )


def _validation_flops(facts: RunFacts) -> float:
    """Flops of the validation images of a whole run, those of the base model included."""
    validation, steps, size = facts.run.validation, facts.num_steps, facts.validation_size
    if size is None or steps is None:
        return 0
    interval = validation.validation_step_interval
    times = -(-steps // interval) if interval else 1
    times += 0 if validation.disable_benchmark else 1
    sizes = validation.validation_resolution or (size,)
    per_size = [forward_flops(facts.layout(each)) for each in sizes]
    images = len(validation.prompts) * validation.num_validation_images
    return times * images * sum(per_size) * validation.validation_num_inference_steps * num_passes(facts)
