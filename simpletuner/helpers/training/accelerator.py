"""The accelerator of a run, and what does not work with several processes."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DynamoBackend,
    InitProcessGroupKwargs,
    broadcast_object_list,
)

from simpletuner.helpers.choices.optimizers import OPTIMIZERS
from simpletuner.helpers.choices.precisions import UNCHANGED
from simpletuner.helpers.errors import ConfigError

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.sections import RunConfig

# The other processes wait while the main process validates.
PROCESS_GROUP_TIMEOUT = timedelta(hours=6)


def build_accelerator(config: RunConfig) -> Accelerator:
    """Devices, processes and precision.

    Raises:
        ConfigError: The device cannot train in this mixed_precision.
    """
    precision = config.precision.mixed_precision
    torch.set_float32_matmul_precision("high" if config.precision.allow_tf32 else "highest")
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            gradient_accumulation_steps=config.training.gradient_accumulation_steps,
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=PROCESS_GROUP_TIMEOUT),
            ],
        )
    except ValueError as error:
        raise ConfigError(
            f"mixed_precision {precision} does not run on this device: {error} "
            "Set mixed_precision to bf16 or no."
        ) from error
    # On a CPU accelerate ignores fp16: no autocast and no scaler, but float16 weights.
    if precision == "fp16" and accelerator.scaler is None:
        raise ConfigError(
            f"mixed_precision fp16 does not train on {accelerator.device.type}. "
            "Set mixed_precision to bf16 or no."
        )
    return accelerator


def with_shared_seed(config: RunConfig) -> RunConfig:
    """The configuration with the seed of the first process: a drawn one differs between them."""
    seeds = [config.training.seed]
    broadcast_object_list(seeds)
    return config.model_copy(update={"training": config.training.model_copy(update={"seed": seeds[0]})})


def check_distribution(config: RunConfig, accelerator: Accelerator) -> None:
    """Refuse settings that do not work with several processes.

    Raises:
        ConfigError: The message names the setting and its remedy.
    """
    distribution = accelerator.distributed_type
    if config.precision.enable_group_offload and accelerator.num_processes > 1:
        raise ConfigError("enable_group_offload works in a run of one process. Set it to false.")
    if config.whole_model.fused_backward_pass and accelerator.num_processes > 1:
        raise ConfigError(
            "fused_backward_pass steps before gradients of several processes are averaged. Set it to false."
        )
    if distribution in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigError(
            f"accelerate's {distribution.value} is not supported. Use plain data parallelism or FSDP 2."
        )
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ConfigError(
            f"accelerate's own configuration compiles with {accelerator.state.dynamo_plugin.backend.value}. "
            "Remove dynamo_config from its file, and set dynamo_backend in the config.json."
        )
    if distribution != DistributedType.FSDP:
        return
    plugin = accelerator.state.fsdp_plugin
    # Prodigy keeps the start of each weight in one row, which a resumed run would not shard again; that of an
    # adapter is zero.
    sharded = [
        name
        for name, record in OPTIMIZERS.items()
        if record.trains_shards and not (config.model.is_full and record.needs_all_gradients)
    ]
    problems = {
        "FSDP 1 is not supported. Set fsdp_version to 2": plugin.fsdp_version != 2,
        "FSDP does not shard quantised weights. Set base_model_precision to no_change": (
            config.precision.base_model_precision != UNCHANGED
        ),
        "FSDP trains T-LoRA and no other adapter. Set algo to tlora and no other algorithms": (
            not config.model.is_full and (config.lycoris is None or config.lycoris.algo != "tlora")
        ),
        f"FSDP does not train with {config.optimizer.optimizer}. Set optimizer to {' or '.join(sharded)}": (
            config.optimizer.optimizer not in sharded
        ),
        "FSDP generates no validation images. Set validation_disable to true": bool(
            config.validation.prompts and not config.validation.validation_disable
        ),
        "FSDP was not tried with torch.compile. Set dynamo_backend to no": (
            config.compiling.dynamo_backend != "no"
        ),
        "FSDP trains no text encoders. Set train_text_encoder to false": (
            config.text_encoders.train_text_encoder
        ),
        "FSDP trains no new tokens. Remove placeholder_token": (
            config.new_tokens.placeholder_token is not None
        ),
        "FSDP loads weights in every process. Set fsdp_cpu_ram_efficient_loading to false": bool(
            plugin.cpu_ram_efficient_loading
        ),
    }
    found = [message for message, is_wrong in problems.items() if is_wrong]
    if found:
        raise ConfigError(". ".join(found) + ".")


def in_any_process(accelerator: Accelerator, *, flag: bool) -> bool:
    """Whether a flag is set in any process; every process takes part."""
    if accelerator.num_processes == 1:
        return flag
    flags = torch.tensor(float(flag), device=accelerator.device)
    return bool(accelerator.reduce(flags, reduction="sum") > 0)
