"""The sections of config.json; the text under a field is its line in the reference page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, model_validator

from simpletuner.helpers.configuration.loading.building import as_json
from simpletuner.helpers.configuration.schema.base import (
    Count,
    CountOrZero,
    Decimals,
    InputFile,
    Names,
    NonNegativeNumber,
    Number,
    OptionalCount,
    OptionalInputFile,
    OptionalText,
    OptionalWhole,
    OutputPath,
    PathContext,
    PositiveNumber,
    Section,
    Seed,
    Share,
    ShareBelowOne,
    contradiction,
)
from simpletuner.helpers.configuration.schema.datasets import (
    DatasetConfig,
    OptionalCaptionStrategy,
    ResolutionType,
    resolution_problem,
)
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig
from simpletuner.helpers.configuration.schema.model_sections import ModelConfig, NoiseConfig, PrecisionConfig
from simpletuner.helpers.configuration.schema.values import (
    OptimizerArgument,
    optimizer_arguments,
    optimizer_problem,
    sizes,
    trackers,
)
from simpletuner.helpers.configuration.text.problems import without
from simpletuner.helpers.contracts import Size

CHANGE_THE_BASE = ("olora", "pissa")
"""Of lora_init_type: the adapter fits the base only after subtracting its start from it."""


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
    """norm scales the whole gradient to length max_grad_norm; value cuts each entry."""

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

    optimizer: Literal["adamw", "prodigy"] = "adamw"
    """adamw; prodigy finds its own rate and needs the package extra optim."""
    optimizer_config: Annotated[Mapping[str, OptimizerArgument], BeforeValidator(optimizer_arguments)] = {}
    """Further arguments, "weight_decay=0.01,eps=1e-8" or an object."""
    learning_rate: PositiveNumber = Field(
        default_factory=lambda values: 1.0 if values.get("optimizer") == "prodigy" else 1e-4
    )
    """Step size. Default: 1e-4, and 1 for prodigy, which scales its own rate by it."""
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "sine"
    ] = "constant_with_warmup"
    """Course of the learning rate after the warm-up; those that fall reach lr_end at the last step."""
    lr_warmup_steps: CountOrZero = 0
    """Optimiser steps over which the learning rate rises from 0; not used by constant."""
    lr_end: NonNegativeNumber = 0.0
    """Lowest learning rate of the schedules that fall."""
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
    caption_strategy: OptionalCaptionStrategy = None
    """Where captions come from: textfile, the .txt file beside an image; filename, its words; instanceprompt,
    instance_prompt for all. null takes textfile in folders that hold text files, else filename."""
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

    report_to: Annotated[tuple[Literal["wandb", "tensorboard"], ...], BeforeValidator(trackers)] = ()
    """Trackers, a list or comma-separated; none is none."""
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
    validation_noise_scheduler: (
        Literal["ddim", "ddpm", "dpm++", "euler", "euler-a", "heun", "unipc"] | None
    ) = None
    """Sampling scheduler; null is the model's own."""
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
            flat |= as_json(section)
        flat["data_backend_config"] = [as_json(dataset) for dataset in self.datasets]
        del flat["prompts"], flat["lycoris_config"]
        resolved = {key: without(value, self.hidden) for key, value in flat.items()}
        if self.lycoris is not None:
            resolved["lycoris_config"] = dict(self.lycoris.raw)
        return resolved
