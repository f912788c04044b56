"""The sections of config.json; the text under a field is its line in the reference page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, ValidationInfo, model_validator

from simpletuner.helpers.choices.algorithms import ALGORITHMS, STANDARD, Algorithm
from simpletuner.helpers.choices.losses import LOSSES
from simpletuner.helpers.choices.lr_schedules import LR_SCHEDULES
from simpletuner.helpers.choices.optimizers import OPTIMIZERS
from simpletuner.helpers.choices.precisions import PRECISIONS, UNCHANGED
from simpletuner.helpers.choices.samplers import SAMPLERS
from simpletuner.helpers.choices.trackers import TRACKERS
from simpletuner.helpers.configuration.schema.base import (
    Count,
    CountOrZero,
    Decimals,
    InputFile,
    Names,
    NonNegativeNumber,
    Number,
    OneOf,
    OptionalCount,
    OptionalInputFile,
    OptionalNonNegativeNumber,
    OptionalPositiveNumber,
    OptionalText,
    OptionalWhole,
    OutputPath,
    PathContext,
    PositiveNumber,
    Section,
    Seed,
    Share,
    ShareBelowOne,
    as_json,
    contradiction,
    path_context,
    registry_of,
)
from simpletuner.helpers.configuration.schema.datasets import (
    CaptionStrategy,
    DatasetConfig,
    ResolutionType,
    resolution_problem,
)
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig
from simpletuner.helpers.configuration.schema.values import (
    OptimizerArgument,
    optimizer_arguments,
    optimizer_problem,
    sizes,
    trackers,
)
from simpletuner.helpers.configuration.text.problems import without
from simpletuner.helpers.contracts import PredictionType, Size

CHANGE_THE_BASE = ("olora", "pissa")
"""Values of lora_init_type: the adapter fits the base only after subtracting its start from it."""
FILE_SUFFIX = ".safetensors"
Precision = Annotated[str, OneOf(PRECISIONS)]


def _model_source(value: object, info: ValidationInfo) -> object:
    """A folder or file as its absolute path, a repository's name as it is."""
    if not isinstance(value, str | Path) or not str(value).strip():
        raise ValueError("must be the folder or the repository of a model, as a text.")
    text = path_context(info).expand(str(value))
    if text.lower().endswith((".ckpt", ".pt", ".pth", ".bin", ".gguf")):
        raise ValueError(
            "is neither a folder in diffusers' layout nor a .safetensors file, which are all that is opened: "
            "pickles can run code, and GGUF is for inference. Give the model as one of those."
        )
    path = path_context(info).input_path(text)
    if path is not None and path.is_file() and path.suffix != FILE_SUFFIX:
        raise ValueError("is a file. Give a folder in diffusers' layout, or a .safetensors file.")
    if path is not None:
        return str(path)
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise ValueError(
            "is no folder or file here. Give an existing one, or a repository written owner/name."
        )
    return text


ModelSource = Annotated[str, BeforeValidator(_model_source)]
OptionalModelSource = Annotated[ModelSource | None, BeforeValidator(lambda value: value or None)]


class ModelConfig(Section):
    """The model that is adapted."""

    model_family: str
    """Family of the model."""
    model_flavour: OptionalText = None
    """Variant within the family, which names the repository when no model is given. Default: the family's."""
    model_type: Literal["lora"] = "lora"
    """What is trained: lora, an adapter of the kind that lora_type names."""
    pretrained_model_name_or_path: ModelSource
    """Folder in diffusers' layout, repository written owner/name, or a whole checkpoint in one .safetensors
    file where the family reads one. Default: the flavour's repository."""
    pretrained_config_name_or_path: OptionalModelSource = None
    """Folder or repository that gives such a file its configuration, tokenizers and scheduler. Default: the
    flavour's repository."""
    pretrained_unet_model_name_or_path: OptionalModelSource = None
    """Folder, repository or .safetensors file of another UNet than the model's."""
    pretrained_unet_subfolder: OptionalText = None
    """Subfolder of that UNet; null finds it."""
    pretrained_transformer_model_name_or_path: OptionalModelSource = None
    """Folder, repository or .safetensors file of another transformer than the model's."""
    pretrained_transformer_subfolder: OptionalText = None
    """Subfolder of that transformer; null finds it."""
    pretrained_t5_model_name_or_path: OptionalModelSource = None
    """Folder or repository of another T5 text encoder than the model's."""
    pretrained_vae_model_name_or_path: OptionalModelSource = None
    """Folder, repository or .safetensors file of another VAE than the model's."""
    pretrained_vae_subfolder: OptionalText = None
    """Subfolder of that VAE; null finds it."""
    revision: OptionalText = None
    """Branch, tag or commit of the repository; null is its main branch."""
    variant: OptionalText = None
    """Variant of the weight files, for instance fp16; null is the plain one."""
    prediction_type: PredictionType | None = None
    """What the denoiser predicts. Default: what the model's own scheduler says."""
    rescale_betas_zero_snr: bool = False
    """Rescale the noise schedule so that the last timestep is pure noise."""

    @model_validator(mode="after")
    def _configures_a_file(self) -> Self:
        key = "pretrained_config_name_or_path"
        if self.pretrained_config_name_or_path is None:
            return self
        if not self.pretrained_model_name_or_path.endswith(FILE_SUFFIX):
            text = "has an effect only where pretrained_model_name_or_path is a single file. Remove it."
            raise contradiction(key, text, "pretrained_model_name_or_path")
        if self.pretrained_config_name_or_path.endswith(FILE_SUFFIX):
            raise contradiction(key, "is a file. Give a folder in diffusers' layout, or a repository.")
        return self


class NoiseConfig(Section):
    """Which noise levels are trained, how the loss weighs them, and what the model is told beside them."""

    snr_gamma: OptionalPositiveNumber = None
    """Gamma of min-SNR loss weights, usually 5; null or 0 weighs all timesteps alike."""
    flow_sigmoid_scale: PositiveNumber = 1.0
    """Noise levels are the sigmoid of a normal number times this; larger is wider. Flow matching only, as
    the other keys that begin with flow."""
    flow_use_uniform_schedule: bool = False
    """Draw noise levels uniformly instead."""
    flow_use_beta_schedule: bool = False
    """Draw noise levels from a beta distribution instead."""
    flow_beta_schedule_alpha: PositiveNumber = 2.0
    """First parameter of that beta distribution; above the second it prefers high noise."""
    flow_beta_schedule_beta: PositiveNumber = 2.0
    """Second parameter of that beta distribution."""
    flow_schedule_shift: OptionalNonNegativeNumber = None
    """Shift of the noise levels that are drawn and of those that pictures are made at; above 1 is more noise,
    0 and 1 do not shift. null takes what the model's own scheduler says."""
    flow_schedule_auto_shift: bool = False
    """Shift by the number of image tokens, whatever the model's own scheduler says."""
    flux_guidance_mode: Literal["constant", "random-range"] = "constant"
    """What guidance a model with a guidance embedding is told in training: constant, flux_guidance_value;
    random-range, uniform between flux_guidance_min and flux_guidance_max."""
    flux_guidance_value: NonNegativeNumber = 1.0
    """That guidance with constant."""
    flux_guidance_min: NonNegativeNumber = 0.0
    """Lowest guidance with random-range."""
    flux_guidance_max: NonNegativeNumber = 4.0
    """Highest guidance with random-range."""
    flux_attention_masked_training: bool = False
    """Attention passes over the padding of captions, in training and in pictures made while training."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.flow_use_uniform_schedule and self.flow_use_beta_schedule:
            raise contradiction(
                "flow_use_beta_schedule",
                "noise levels are drawn one way only. Leave out this or flow_use_uniform_schedule.",
                "flow_use_uniform_schedule",
            )
        if self.flow_schedule_auto_shift and self.flow_schedule_shift is not None:
            raise contradiction(
                "flow_schedule_shift",
                f"{self.flow_schedule_shift:g} has no effect with flow_schedule_auto_shift. Leave out one.",
                "flow_schedule_auto_shift",
            )
        low, high = self.flux_guidance_min, self.flux_guidance_max
        if low > high:
            raise contradiction(
                "flux_guidance_min",
                f"{low:g} is above flux_guidance_max {high:g}. Lower it.",
                "flux_guidance_max",
            )
        return self


class PrecisionConfig(Section):
    """Number formats and memory."""

    mixed_precision: Literal["bf16", "fp16", "no"] = "bf16"
    """Format of the frozen model and of the computation; no is float32. The adapter itself is float32."""
    base_model_precision: Precision = UNCHANGED
    """Format of the frozen denoiser's linear layers; fewer bits are a little less exact."""
    text_encoder_1_precision: Precision = UNCHANGED
    """The same for the first text encoder; its prompt embeds are cached apart."""
    text_encoder_2_precision: Precision = UNCHANGED
    """The same for the second."""
    text_encoder_3_precision: Precision = UNCHANGED
    """The same for the third."""
    text_encoder_4_precision: Precision = UNCHANGED
    """The same for the fourth."""
    enable_group_offload: bool = False
    """Keep the denoiser's blocks on the host and bring them to the device a group at a time, forwards and
    backwards: much less memory, much slower."""
    group_offload_type: Literal["block_level", "leaf_level"] = "block_level"
    """What a group is: block_level, neighbouring blocks; leaf_level, a single layer."""
    group_offload_blocks_per_group: Count = 1
    """Blocks that are brought together with block_level."""
    vae_batch_size: Count = 1
    """Images encoded at a time; above 1, last bits depend on it as with text_encoder_batch_size."""
    vae_enable_tiling: bool = False
    """Encode and decode in tiles: less memory, slightly different values."""
    vae_enable_slicing: bool = False
    """Decode the images of a batch one by one: less memory."""


class AdapterConfig(Section):
    """The adapter; the keys from lora_rank to peft_lora_target_modules are for lora_type standard."""

    lora_type: Literal["standard", "lycoris"] = "standard"
    """Kind of adapter: standard, LoRA by PEFT; lycoris, T-LoRA or another algorithm, by lycoris_config."""
    lora_rank: Count = 16
    """Rank of the LoRA."""
    lora_alpha: PositiveNumber = Field(default_factory=lambda values: float(values.get("lora_rank", 16)))
    """Scale of the LoRA, applied as lora_alpha / lora_rank. Default: lora_rank, a scale of 1."""
    lora_dropout: ShareBelowOne = 0.0
    """Share of inputs dropped while training."""
    lora_init_type: Literal["default", "gaussian", "olora", "pissa"] = "default"
    """Start of the LoRA's factors. olora and pissa take it from the base weights; the file then has twice the
    rank, so that it fits the base model as it is published."""
    use_dora: bool = False
    """Train direction and magnitude apart (DoRA)."""
    peft_lora_target_modules: Names | None = None
    """Names of the layers that get a LoRA, a list or comma-separated. Default: the family's."""
    flux_lora_target: OptionalText = None
    """A set of layers by its name, in place of peft_lora_target_modules."""
    lycoris_config: OptionalInputFile = None
    """The lycoris json: its path, or the object itself. Required by lora_type lycoris."""
    lora_format: Literal["diffusers", "comfyui"] = "diffusers"
    """comfyui leaves, beside the adapter's own file, a plain LoRA with every rank open, under the names that
    ComfyUI and kohya's tools read."""
    init_lora: OptionalInputFile = None
    """Adapter file of the same kind and rank to start from."""

    @model_validator(mode="after")
    def _start_is_one(self) -> Self:
        if self.lora_type == "standard" and self.lora_init_type in CHANGE_THE_BASE:
            taken = f"{self.lora_init_type} takes the start from the base weights"
            if self.init_lora is not None:
                raise contradiction(
                    "lora_init_type", f"{taken}, and init_lora from a file. Leave out one.", "init_lora"
                )
            if self.use_dora:
                raise contradiction(
                    "lora_init_type", f"{taken}, which use_dora rescales. Leave out one.", "use_dora"
                )
        return self


class TrainingConfig(Section):
    """How long and in which batches is trained."""

    max_train_steps: OptionalCount = None
    """Optimiser steps of the run; null or 0 trains num_train_epochs."""
    num_train_epochs: CountOrZero = 1
    """Passes over the data; used when max_train_steps is null or 0."""
    train_batch_size: Count = 1
    """Images per forward pass and process."""
    gradient_accumulation_steps: Count = 1
    """Forward and backward passes per optimiser step."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a quarter more time."""
    seed: Seed = 42
    """Everything random follows from it."""
    caption_dropout_probability: Share = 0.0
    """Share of images trained without their caption."""
    max_grad_norm: NonNegativeNumber = 1.0
    """Bound on the gradient, in the sense of grad_clip_method; 0 does not clip."""
    grad_clip_method: Literal["norm", "value"] = "norm"
    """norm: clip by global norm; value: clip each element."""
    loss_type: Annotated[str, OneOf(LOSSES)] = "l2"
    """Loss of the prediction."""

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.max_train_steps is None and self.num_train_epochs == 0:
            raise contradiction(
                "max_train_steps",
                "the run has no end. Set max_train_steps or num_train_epochs above 0.",
                "num_train_epochs",
            )
        return self


class OptimizerConfig(Section):
    """The optimiser and its learning rate."""

    optimizer: Annotated[str, OneOf(OPTIMIZERS)] = "adamw"
    """The optimiser."""
    optimizer_config: Annotated[Mapping[str, OptimizerArgument], BeforeValidator(optimizer_arguments)] = {}
    """Further arguments, "weight_decay=0.01,eps=1e-8" or an object."""
    learning_rate: PositiveNumber = Field(
        default_factory=lambda values: OPTIMIZERS[values.get("optimizer", "adamw")].default_learning_rate
    )
    """Learning rate. Default: the optimiser's."""
    lr_scheduler: Annotated[str, OneOf(LR_SCHEDULES)] = "constant_with_warmup"
    """Schedule of the learning rate; those that decay reach lr_end at the last step."""
    lr_warmup_steps: CountOrZero = 0
    """Optimiser steps over which the learning rate rises from 0; constant has no warm-up."""
    lr_end: NonNegativeNumber = 0.0
    """Lowest learning rate of the schedules that decay."""
    lr_power: PositiveNumber = 1.0
    """Exponent of polynomial; 1 is linear."""
    lr_num_cycles: PositiveNumber = 1.0
    """Restarts of cosine_with_restarts, whole waves of sine."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if problem := optimizer_problem(self.optimizer, self.optimizer_config):
            raise contradiction("optimizer_config", problem, "optimizer")
        if self.lr_end > self.learning_rate:
            raise contradiction(
                "lr_end",
                f"{self.lr_end:g} is above learning_rate {self.learning_rate:g}. Lower it.",
                "learning_rate",
            )
        return self


class DataConfig(Section):
    """What all datasets share; most keys can be overridden by a dataset."""

    data_backend_config: InputFile | None = None
    """The dataset json: its path, or the array itself. Required."""
    resolution: PositiveNumber = 1024.0
    """Size that images are resized to, in the unit of resolution_type. Default: the family's."""
    resolution_type: ResolutionType = "pixel_area"
    """Meaning of resolution: pixel, the shorter edge; pixel_area, the edge of a square of the same area;
    area, megapixels."""
    minimum_image_size: NonNegativeNumber = 0.0
    """Smaller images are left out; in the unit of resolution_type, 0 keeps all."""
    aspect_bucket_alignment: OptionalCount = None
    """Training width and height are multiples of this many pixels. Default: the family's."""
    aspect_bucket_rounding: Decimals = 2
    """Decimals to which aspect ratios are rounded before images are put into buckets."""
    caption_strategy: CaptionStrategy | None = None
    """Source of captions. null takes textfile in folders that hold text files, else filename."""
    instance_prompt: OptionalText = None
    """Caption of every image with instanceprompt, and what prepend_instance_prompt of a dataset prepends."""
    cache_dir_vae: OutputPath = Field(default_factory=lambda: PathContext().output_path("cache/vae"))
    """Folder of cached latents, one subfolder per dataset. Default: cache/vae."""
    cache_dir_text: OutputPath = Field(default_factory=lambda: PathContext().output_path("cache/text"))
    """Folder of cached text embeddings. Default: cache/text."""
    text_encoder_batch_size: Count = 1
    """Captions encoded at a time; above 1, an embedding's last bits depend on what it was encoded with, so
    that a run whose caching was interrupted may end a rounding error apart."""

    def alignment(self, family_alignment: int) -> int:
        """Pixels of which training width and height are multiples; the family's by default."""
        return self.aspect_bucket_alignment or family_alignment

    @model_validator(mode="after")
    def _resolution_fits_its_type(self) -> Self:
        if problem := resolution_problem(self.resolution, self.resolution_type):
            raise contradiction("resolution", problem, "resolution_type")
        return self


def _folder_in_output(value: str) -> str:
    if Path(value).name != value or value in (".", "..") or "\\" in value:
        raise ValueError('must be "latest", "none", or the name of a checkpoint folder inside output_dir.')
    return value


def _checkpoint_name(value: object) -> object:
    return None if isinstance(value, str) and value.strip().lower() in ("", "none", "null") else value


class CheckpointConfig(Section):
    """What is written to disk, and what a run goes on from."""

    output_dir: OutputPath = Field(default_factory=lambda: PathContext().output_path("output"))
    """Folder of everything the run writes but caches. Default: output."""
    checkpoint_step_interval: CountOrZero = 500
    """Optimiser steps between checkpoints; 0 saves only at the end."""
    checkpoints_total_limit: OptionalCount = 5
    """How many of the newest checkpoints stay on disk; null or 0 keeps every one."""
    resume_from_checkpoint: Annotated[
        Annotated[str, AfterValidator(_folder_in_output)] | None, BeforeValidator(_checkpoint_name)
    ] = "latest"
    """What the run goes on from: latest, the newest intact checkpoint if there is one; the name of a
    checkpoint's folder; null or none starts anew."""


class TrackingConfig(Section):
    """Where the course of the run is reported, beside the log in output_dir."""

    report_to: Annotated[tuple[Annotated[str, OneOf(TRACKERS)], ...], BeforeValidator(trackers)] = ()
    """Trackers, a list or comma-separated; none for no tracker."""
    tracker_project_name: str = "simpletuner"
    """Project that the run belongs to in the tracker."""
    tracker_run_name: OptionalText = None
    """Name of the run in the tracker; null lets the tracker choose."""


class ValidationPrompt(Section):
    """A prompt that validations make pictures of."""

    name: str
    """Names its pictures."""
    text: str
    """The prompt."""
    strength: float | None = None
    """Strength of the adapter; null is validation_lycoris_strength."""


class ValidationConfig(Section):
    """The pictures made while training; none without a prompt."""

    validation_prompt: OptionalText = None
    """Prompt of the validation pictures."""
    validation_prompt_library: bool = False
    """Adds a small set of prompts that come with the trainer."""
    user_prompt_library: OptionalInputFile = None
    """A json that adds prompts: an object of name -> prompt, or name -> {"prompt", "adapter_strength"}."""
    validation_negative_prompt: str = ""
    """Prompt that guidance leads away from."""
    validation_resolution: Annotated[tuple[Size, ...], BeforeValidator(sizes)] = ()
    """Sizes of the pictures in pixels: an edge of a square, or width x height, comma-separated
    ("1024x1024,768x1344"). Default: the training resolution."""
    validation_guidance: NonNegativeNumber = 7.5
    """Guidance scale; 1 or below is no guidance. Default: the family's."""
    validation_guidance_real: NonNegativeNumber = 1.0
    """Guidance by a second pass with the negative prompt, for models that are told a guidance scale and
    follow it in one pass; 1 or below is none."""
    validation_guidance_rescale: Share = 0.0
    """How far guided predictions are rescaled to the spread of unguided ones, against overexposure."""
    validation_num_inference_steps: Count = 30
    """Denoising steps per picture."""
    validation_seed: OptionalWhole = None
    """Seed of the first picture of each prompt; the others count up. Default: seed."""
    validation_noise_scheduler: Annotated[str, OneOf(SAMPLERS)] | None = None
    """The sampler; null takes the model's own."""
    num_validation_images: Count = 1
    """Pictures per prompt and size."""
    validation_step_interval: CountOrZero = 100
    """Optimiser steps between validations; 0 validates only at the end."""
    validation_on_startup: bool = False
    """Validate before the first step too."""
    validation_disable: bool = False
    """Makes no pictures at all."""
    disable_benchmark: bool = False
    """Leaves out the pictures of the base model that stand beside the trained ones."""
    validation_lycoris_strength: Number = 1.0
    """Strength of the adapter in validation pictures; 1 as trained, 0 the base model."""
    validation_compared_config: OptionalInputFile = None
    """Config.json of another run on the same model, whose adapter is shown beside this run's; that run is
    trained first where it is not finished. Arguments of the command line are not for it."""
    prompts: tuple[ValidationPrompt, ...] = ()
    """Every prompt of the above."""


class RunConfig(Section):
    """Everything a run is told, checked and complete."""

    source: Path
    """The config.json."""
    model: ModelConfig
    adapter: AdapterConfig
    lycoris: LycorisConfig | None
    training: TrainingConfig
    optimizer: OptimizerConfig
    noise: NoiseConfig
    precision: PrecisionConfig
    data: DataConfig
    datasets: tuple[DatasetConfig, ...]
    """The image datasets that are not disabled."""
    checkpoint: CheckpointConfig
    tracking: TrackingConfig
    validation: ValidationConfig
    compared_with: RunConfig | None = None
    """The run that validation_compared_config names."""
    hidden: Mapping[str, str] = Field(default={}, repr=False, exclude=True)
    """Value of an environment variable in a text -> the placeholder that stands for it in `resolved`."""

    @property
    def algorithm(self) -> Algorithm:
        """Algorithm of the adapter."""
        return STANDARD if self.lycoris is None else ALGORITHMS[self.lycoris.algo]

    def resolved(self) -> dict[str, JsonValue]:
        """Every key and its value as json, flat, in one object that load_config reads again.

        The lycoris json and the dataset json stand in it whole. Where an environment variable was put into a
        text, its placeholder stands, so that no secret is written to disk.
        """
        sections = (
            self.model,
            self.adapter,
            self.training,
            self.optimizer,
            self.noise,
            self.precision,
            self.data,
            self.checkpoint,
            self.tracking,
            self.validation,
        )
        flat: dict[str, JsonValue] = {}
        for section in sections:
            registries = {key: registry_of(type(section), key) for key in type(section).model_fields}
            # A choice of one is no setting: its key is accepted, but not written.
            fixed = {
                key for key, registry in registries.items() if registry is not None and len(registry) == 1
            }
            flat |= {key: value for key, value in as_json(section).items() if key not in fixed}
        flat["data_backend_config"] = [as_json(dataset) for dataset in self.datasets]
        del flat["prompts"], flat["lycoris_config"]
        resolved = {key: without(value, self.hidden) for key, value in flat.items()}
        if self.lycoris is not None:
            resolved["lycoris_config"] = dict(self.lycoris.raw)
        return resolved
