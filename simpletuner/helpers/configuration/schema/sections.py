"""The sections of config.json; the text below a field is its line in the reference page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, model_validator

from simpletuner.helpers.choices.algorithms import ALGORITHMS, NEW_TOKEN, STANDARD, WHOLE_MODEL, Algorithm
from simpletuner.helpers.choices.lr_schedules import LR_SCHEDULES
from simpletuner.helpers.choices.optimizers import OPTIMIZERS
from simpletuner.helpers.choices.precisions import PRECISIONS, UNCHANGED
from simpletuner.helpers.choices.samplers import SAMPLERS
from simpletuner.helpers.configuration.schema.adapter import AdapterConfig
from simpletuner.helpers.configuration.schema.base import (
    Count,
    CountOrZero,
    Decimals,
    InputFile,
    InputFiles,
    NonNegativeNumber,
    Number,
    OneOf,
    OptionalCount,
    OptionalInputFile,
    OptionalPositiveNumber,
    OptionalShare,
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
    none_word,
)
from simpletuner.helpers.configuration.schema.compiling import CompileConfig
from simpletuner.helpers.configuration.schema.datasets import (
    CaptionLines,
    CaptionStrategy,
    DatasetConfig,
    ResolutionType,
    resolution_problem,
)
from simpletuner.helpers.configuration.schema.ema import EmaConfig
from simpletuner.helpers.configuration.schema.evaluation import EvaluationConfig
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig
from simpletuner.helpers.configuration.schema.masks import ConditioningConfig, MaskConfig
from simpletuner.helpers.configuration.schema.model import ModelConfig
from simpletuner.helpers.configuration.schema.model_source import (
    ModelSource,
)
from simpletuner.helpers.configuration.schema.new_tokens import NewTokenConfig
from simpletuner.helpers.configuration.schema.noise import NoiseConfig
from simpletuner.helpers.configuration.schema.publishing import PublishingConfig
from simpletuner.helpers.configuration.schema.references import ReferenceConfig
from simpletuner.helpers.configuration.schema.regularisation import RegularisationConfig
from simpletuner.helpers.configuration.schema.text_encoders import TextEncoderConfig
from simpletuner.helpers.configuration.schema.token_routing import OptionalTreadConfig
from simpletuner.helpers.configuration.schema.tracking import TrackingConfig
from simpletuner.helpers.configuration.schema.values import (
    DifferingDefault,
    OptimizerArgument,
    arguments_of_optimizer,
    optimizer_problem,
    sizes,
)
from simpletuner.helpers.configuration.schema.whole_model import WholeModelConfig
from simpletuner.helpers.configuration.text.decisions import Decision
from simpletuner.helpers.contracts import Size
from simpletuner.helpers.io.redaction import redacted, redacted_json

Precision = Annotated[str, OneOf(PRECISIONS)]


class FileConfig(Section):
    """The configuration itself."""

    defaults: Literal["ours", "simpletuner"] = "ours"
    """Values of the keys that are left out: this program's, or SimpleTuner's where they differ."""


class PrecisionConfig(Section):
    """Number formats and memory."""

    mixed_precision: Literal["bf16", "fp16", "no"] = "bf16"
    """Format of the frozen model and of the computation; no is float32. The adapter is float32."""
    base_model_precision: Precision = UNCHANGED
    """Format of the frozen denoiser's linear layers; fewer bits are a little less exact."""
    text_encoder_1_precision: Precision = UNCHANGED
    """The same for the first text encoder; each has its own cache entries."""
    text_encoder_2_precision: Precision = UNCHANGED
    """The same for the second."""
    text_encoder_3_precision: Precision = UNCHANGED
    """The same for the third."""
    text_encoder_4_precision: Precision = UNCHANGED
    """The same for the fourth."""
    enable_group_offload: bool = False
    """Keep the denoiser's blocks on the host and move one group at a time to the device, in forward and
    backward: much less memory, much slower."""
    group_offload_type: Literal["block_level", "leaf_level"] = "block_level"
    """block_level: a group is some neighbouring blocks; leaf_level: a group is one layer."""
    group_offload_blocks_per_group: Count = 1
    """Blocks per group with block_level."""
    allow_tf32: bool = False
    """Multiply float32 matrices in TF32 on GPUs that can: faster, with 10 bits of mantissa."""
    allow_cpu: bool = False
    """Train a denoiser of more than 300 million weights without a GPU, which takes days."""
    skip_estimate: bool = False
    """Only warn where the run needs over 1.3 times the GPU's memory, or more disk space than is free, instead
    of ending before anything is downloaded."""
    vae_batch_size: Count = 1
    """Images encoded at a time; above 1, the last bits of latents depend on it."""
    vae_enable_tiling: bool = False
    """Encode and decode in tiles: less memory, slightly different values."""
    vae_enable_slicing: bool = False
    """Decode the images of a batch one by one: less memory."""


class TrainingConfig(Section):
    """Length of the run, batches and gradients."""

    max_train_steps: OptionalCount = None
    """Optimiser steps of the run; null or 0 uses num_train_epochs."""
    num_train_epochs: CountOrZero = 1
    """Passes over the data, if max_train_steps is null or 0."""
    train_batch_size: Count = 1
    """Images per forward pass and process."""
    gradient_accumulation_steps: Count = 1
    """Forward and backward passes per optimiser step."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a quarter more time."""
    gradient_checkpointing_interval: OptionalCount = None
    """With gradient_checkpointing, recompute every block (null or 1), every second one (2), and so on; a
    higher number takes less time and more memory."""
    seed: Seed = 42
    """Seed of every random choice."""
    caption_dropout_probability: Share = 0.0
    """Fraction of samples trained without their caption, of datasets that set none."""
    max_grad_norm: NonNegativeNumber = 1.0
    """Bound on the gradient, by grad_clip_method; 0 does not clip."""
    grad_clip_method: Literal["norm", "value"] = "norm"
    """norm: clip by global norm; value: clip each element."""
    tread_config: OptionalTreadConfig = None
    """Token routing in training, an object with routes; null trains every block on all tokens."""

    @model_validator(mode="after")
    def _has_an_end(self) -> Self:
        if self.max_train_steps is None and self.num_train_epochs == 0:
            raise contradiction(
                "max_train_steps",
                "the run would have no end. Set max_train_steps or num_train_epochs above 0.",
                "num_train_epochs",
            )
        return self


class OptimizerConfig(Section):
    """The optimiser and its learning rate."""

    optimizer: Annotated[str, OneOf(OPTIMIZERS)] = "adamw"
    """The optimiser."""
    optimizer_config: Annotated[Mapping[str, OptimizerArgument], BeforeValidator(arguments_of_optimizer)] = {}
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
    """Defaults for all datasets; a dataset can override most of them."""

    data_backend_config: InputFile | None = None
    """The dataset json: its path, or the array itself. Required."""
    resolution: PositiveNumber = 1024.0
    """Training size of images, in the unit of resolution_type. Default: the family's."""
    resolution_type: ResolutionType = "pixel_area"
    """Unit of resolution: pixel, the shorter edge; pixel_area, the edge of a square of equal area; area,
    megapixels."""
    minimum_image_size: NonNegativeNumber = 0.0
    """Smaller images are skipped; in the unit of resolution_type, 0 keeps all."""
    maximum_image_size: OptionalPositiveNumber = None
    """With crop, larger images are resized to target_downsample_size before they are cropped; in the unit of
    resolution_type. null resizes each image to the smallest size that its crop fits in."""
    target_downsample_size: OptionalPositiveNumber = None
    """Size of images above maximum_image_size before their crop, in the unit of resolution_type; at least
    resolution."""
    max_upscale_threshold: OptionalShare = None
    """Largest enlargement for a bucket of crop_aspect_buckets: 0.2 is by a fifth of width and height, 0 none,
    null any. An image without such a bucket is skipped."""
    aspect_bucket_alignment: OptionalCount = None
    """Training width and height are multiples of this many pixels. Default: the family's."""
    aspect_bucket_rounding: Decimals = 2
    """Decimals of aspect ratios before images go into buckets."""
    caption_strategy: CaptionStrategy | None = None
    """Source of captions. null takes textfile if text files lie beside images, else instanceprompt if
    instance_prompt is set without prepend_instance_prompt, else filename."""
    caption_lines: CaptionLines = "choose"
    """Lines of a text file: choose, each line is a caption and one is drawn each time; first, the first line
    is the caption; whole, the text is one caption. A JSON object or array is always whole."""
    instance_prompt: OptionalText = None
    """Caption of every image with instanceprompt; prefix of captions with prepend_instance_prompt."""
    eval_share: ShareBelowOne = 0.0
    """Share of each dataset's images that is held out: never trained, only evaluated. The digest of an
    image's bytes decides, whatever else is in the folder."""
    conditioning_multidataset_sampling: Literal["random", "combined"] = "random"
    """References of an image with several entries of them: random, those of one entry, drawn for each image
    and epoch; combined, those of all entries."""
    caption_variants: Count = 4
    """Variants of each caption with enable_wildcard or caption_tag_dropout_rate, taken in turn; a multiple of
    the orders of caption_shuffle. All are encoded before training."""
    cache_dir_vae: OutputPath = Field(default_factory=lambda: PathContext().output_path("cache/vae"))
    """Folder of cached latents, one subfolder per dataset. Default: cache/vae."""
    cache_dir_text: OutputPath = Field(default_factory=lambda: PathContext().output_path("cache/text"))
    """Folder of cached prompt embeds. Default: cache/text."""
    vae_cache_ondemand: bool = False
    """Encode an image when a batch first needs it, not before the first step; the VAE stays in memory beside
    the model."""
    text_cache_ondemand: bool = False
    """Encode a caption when a batch first needs it, not before the first step; the text encoders stay in
    memory beside the model. Prompts of validation images are encoded before."""
    vae_cache_disable: bool = False
    """Encode each image whenever a batch needs it and keep no latents and masks; the VAE stays in memory
    beside the model."""
    text_cache_disable: bool = False
    """Encode each caption whenever a batch needs it and keep no prompt embeds; the text encoders stay in
    memory beside the model. Prompts of validation images are encoded at each start."""
    text_encoder_batch_size: Count = 1
    """Captions encoded at a time; above 1, the last bits of prompt embeds depend on the batch, so a run whose
    caching was interrupted may end a rounding error apart."""
    text_cache_memory: NonNegativeNumber = 2.0
    """GiB of prompt embeds that each process keeps in memory once they were read, the most recently used
    ones; 0 reads them for every sample."""
    loader_timeout_seconds: NonNegativeNumber = 300.0
    """Seconds after which a run ends that waits for one batch of its loader, as on a network folder that does
    not answer; 0 waits for ever."""

    def keeps_latents(self, dataset: DatasetConfig) -> bool:
        """Whether a dataset's latents are cached."""
        return not (self.vae_cache_disable or dataset.vae_cache_clear_each_epoch)

    def latents_folder(self, dataset: DatasetConfig) -> Path:
        """Folder of a dataset's cached latents."""
        return dataset.cache_dir_vae or self.cache_dir_vae / dataset.id

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


class CheckpointConfig(Section):
    """The output folder, checkpoints and resuming."""

    output_dir: OutputPath = Field(default_factory=lambda: PathContext().output_path("output"))
    """Folder of all files of the run except caches. Default: output/ and the name of the configuration's
    folder, output/mine for config/mine/config.json."""
    checkpoint_step_interval: CountOrZero = 500
    """Optimiser steps between checkpoints; 0 for none. The last step is always saved."""
    checkpoint_epoch_interval: CountOrZero = 0
    """Completed epochs between checkpoints, beside checkpoint_step_interval; 0 for none. An epoch that ends
    within a step is complete after it."""
    checkpoints_total_limit: OptionalCount = 5
    """Number of checkpoints to keep, the newest; null or 0 keeps all."""
    resume_from_checkpoint: Annotated[
        Annotated[str, AfterValidator(_folder_in_output)] | None, BeforeValidator(none_word)
    ] = "latest"
    """latest resumes from the newest intact checkpoint, if there is one. The name of a checkpoint folder goes
    back to that once: when the run has saved another after it, the same command goes on from there. The name
    with ! behind it goes back at every start. null or none starts anew."""


class ValidationPrompt(Section):
    """A prompt of validation images."""

    name: str
    """Name of its images."""
    text: str
    """The prompt."""
    strength: float | None = None
    """Strength of the adapter; null is validation_lycoris_strength."""
    images: tuple[Path, ...] = ()
    """Files of its reference images."""


def _no_file(value: object) -> object:
    """The value of validation_prompt_library, which names no file.

    Raises:
        ValueError: It is a path.
    """
    if isinstance(value, str) and ("/" in value or "\\" in value or "." in value):
        raise ValueError(
            "is true or false, for the prompts of the package. Set user_prompt_library to the path."
        )
    return value


class ValidationConfig(Section):
    """Validation images; none without a prompt."""

    validation_prompt: OptionalText = None
    """Prompt of the validation images."""
    validation_prompt_library: Annotated[bool, BeforeValidator(_no_file)] = False
    """Add the prompts of the package."""
    user_prompt_library: OptionalInputFile = None
    """A json with more prompts: an object of name -> prompt, or name -> {"prompt", "adapter_strength",
    "image"}, where image is the path of its reference image or a list of paths."""
    validation_reference_images: InputFiles = ()
    """Reference images of the prompts that name none, for models that edit: the path of one, or a list of
    paths."""
    validation_negative_prompt: str = ""
    """Negative prompt of guidance."""
    validation_resolution: Annotated[tuple[Size, ...], BeforeValidator(sizes)] = ()
    """Sizes of the images in pixels: an edge of a square, or width x height, comma-separated
    ("1024x1024,768x1344"). Default: the training resolution."""
    validation_guidance: NonNegativeNumber = 7.5
    """Guidance scale; 1 or below for no guidance. Default: the family's."""
    validation_guidance_real: NonNegativeNumber = 1.0
    """Guidance by a second pass with the negative prompt, for models with a guidance embedding; 1 or below
    for none."""
    validation_no_cfg_until_timestep: CountOrZero = 0
    """Denoising steps, the first ones, without the second pass of validation_guidance_real; no effect without
    that."""
    validation_guidance_rescale: Share = 0.0
    """Fraction of rescaling guided predictions to the spread of unguided ones, against overexposure."""
    validation_num_inference_steps: Count = 30
    """Denoising steps per image."""
    validation_seed: OptionalWhole = None
    """Seed of the first image of each prompt; the others count up. Default: seed."""
    validation_noise_scheduler: Annotated[str, OneOf(SAMPLERS)] | None = None
    """The sampler; null takes the model's own."""
    num_validation_images: Count = 1
    """Images per prompt and size."""
    validation_step_interval: CountOrZero = 100
    """Optimiser steps between validations; 0 for none. The last step is always validated."""
    validation_epoch_interval: CountOrZero = 0
    """Completed epochs between validations, beside validation_step_interval; 0 for none. An epoch that ends
    within a step is complete after it."""
    validation_on_startup: bool = False
    """Also validate before the first step."""
    validation_disable: bool = False
    """Make no images."""
    disable_benchmark: bool = False
    """Make no images of the base model for comparison."""
    validation_lycoris_strength: Number = 1.0
    """Strength of the adapter in validation images; 1 as trained, 0 for the base model."""
    evaluation_type: Literal["none", "clip"] = "none"
    """clip scores each validation image against its prompt, in the trackers and the report."""
    pretrained_evaluation_model_name_or_path: ModelSource = "openai/clip-vit-large-patch14"
    """CLIP model of evaluation_type clip: a folder in transformers' layout, or its repository, which is
    downloaded. Scores of different models cannot be compared."""
    validation_compared_config: OptionalInputFile = None
    """Config.json of another run on the same model; its adapter makes images for comparison. That run trains
    first if it is not finished, without the arguments of the command line."""
    prompts: tuple[ValidationPrompt, ...] = ()
    """All prompts."""


class RunConfig(Section):
    """The whole configuration of a run, validated."""

    source: Path
    """The config.json."""
    file: FileConfig = FileConfig()
    model: ModelConfig
    adapter: AdapterConfig
    lycoris: LycorisConfig | None
    text_encoders: TextEncoderConfig = TextEncoderConfig()
    new_tokens: NewTokenConfig = NewTokenConfig()
    training: TrainingConfig
    regularisation: RegularisationConfig
    optimizer: OptimizerConfig
    ema: EmaConfig
    noise: NoiseConfig
    masks: MaskConfig = MaskConfig()
    whole_model: WholeModelConfig = WholeModelConfig()
    precision: PrecisionConfig
    compiling: CompileConfig = CompileConfig()
    data: DataConfig
    datasets: tuple[DatasetConfig, ...]
    """Image datasets, without disabled ones."""
    conditioning: tuple[ConditioningConfig, ...] = ()
    """The entries of masks that the datasets' conditioning_data names."""
    references: tuple[ReferenceConfig, ...] = ()
    """The entries of reference images that it names."""
    checkpoint: CheckpointConfig
    tracking: TrackingConfig
    publishing: PublishingConfig
    validation: ValidationConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    compared_with: RunConfig | None = None
    """The run of validation_compared_config."""
    decisions: tuple[Decision, ...] = Field(default=(), repr=False, exclude=True)
    """What became of every key of the files that does not stay as it is."""
    differing_defaults: tuple[DifferingDefault, ...] = Field(default=(), repr=False, exclude=True)
    """Keys that are left out and that SimpleTuner would give another value; none if `defaults` is given."""

    @property
    def algorithm(self) -> Algorithm:
        """Algorithm of the adapter; for another model_type what is trained instead."""
        if not self.model.has_adapter:
            return WHOLE_MODEL if self.model.is_full else NEW_TOKEN
        return STANDARD if self.lycoris is None else ALGORITHMS[self.lycoris.algo]

    @property
    def trains_text(self) -> bool:
        """Whether a text encoder or a new token is trained, so that captions are encoded in every step."""
        return self.text_encoders.train_text_encoder or self.new_tokens.placeholder_token is not None

    @property
    def has_references(self) -> bool:
        """Whether the datasets have reference images, in entries or made of the images themselves."""
        return bool(self.references) or any(each.conditioning for each in self.datasets)

    @property
    def evaluates(self) -> bool:
        """Whether the loss of held-out images is measured, if there are some."""
        return not self.evaluation.eval_loss_disable and any(each.holds_out for each in self.datasets)

    @property
    def title(self) -> str:
        """Name of the adapter, redacted: of the repository, the tracker's run, or the output folder."""
        repository = redacted(self.publishing.hub_model_id or "").rpartition("/")[2]
        run = redacted(self.tracking.tracker_run_name or "")
        return repository or run or Path(redacted(str(self.checkpoint.output_dir))).name

    def resolved(self) -> dict[str, JsonValue]:
        """Every key and its value in one flat json object, which load_config can read.

        It contains the lycoris json and the dataset json. Placeholders replace environment variables, so no
        secret is written to disk.
        """
        resolved: dict[str, JsonValue] = redacted_json(self.filled())
        if self.lycoris is not None:
            resolved["lycoris_config"] = dict(self.lycoris.raw)
        return resolved

    def filled(self) -> dict[str, JsonValue]:
        """The same without the lycoris json, and with the values of environment variables."""
        sections = (
            self.file,
            self.model,
            self.adapter,
            self.text_encoders,
            self.new_tokens,
            self.training,
            self.regularisation,
            self.optimizer,
            self.ema,
            self.noise,
            self.masks,
            self.whole_model,
            self.precision,
            self.compiling,
            self.data,
            self.checkpoint,
            self.tracking,
            self.publishing,
            self.validation,
            self.evaluation,
        )
        flat: dict[str, JsonValue] = {}
        for section in sections:
            flat |= as_json(section)
        entries: tuple[Section, ...] = (*self.datasets, *self.conditioning, *self.references)
        flat["data_backend_config"] = [as_json(each) for each in entries]
        del flat["prompts"], flat["lycoris_config"], flat["webhooks"]
        return flat
