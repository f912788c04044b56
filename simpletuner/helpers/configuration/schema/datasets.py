"""One image dataset of the dataset json, with the values inherited from config.json."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from simpletuner.helpers.choices.captions import CAPTION_SOURCES
from simpletuner.helpers.choices.image_sources import IMAGE_SOURCES
from simpletuner.helpers.configuration.schema.aspect_buckets import AspectBuckets
from simpletuner.helpers.configuration.schema.base import (
    CountOrZero,
    Names,
    NonNegativeNumber,
    OneOf,
    OptionalCount,
    OptionalNumber,
    OptionalOutputPath,
    OptionalPositiveNumber,
    OptionalShare,
    OptionalText,
    PositiveNumber,
    Share,
    ShareBelowOne,
    contradiction,
)
from simpletuner.helpers.configuration.schema.captions import CaptionFilters, CaptionShuffle
from simpletuner.helpers.configuration.schema.image_places import ImagePlace
from simpletuner.helpers.configuration.schema.made_references import MadeReferences
from simpletuner.helpers.configuration.schema.row_keys import RowCaptionKeys
from simpletuner.helpers.configuration.schema.values import is_off

ResolutionType = Literal["pixel", "area", "pixel_area"]
CropStyle = Literal["random", "center", "corner"]
CropAspect = Literal["square", "preserve", "closest", "random"]

CaptionLines = Literal["choose", "first", "whole"]

SMALLEST_EDGE_PX = 16
LARGEST_EDGE_PX = 16_384
LARGEST_AREA_MEGAPIXELS = 256.0
BUCKETED_ASPECTS = ("closest", "random")
"""Values of crop_aspect that take a bucket of crop_aspect_buckets."""
_MAX_ID_LENGTH = 100


def american(value: object) -> object:
    """A value of crop_style in its American spelling."""
    return "center" if value == "centre" else value


def resolution_problem(resolution: float, resolution_type: ResolutionType) -> str | None:
    """Reason why a number is not a resolution of that type, or None."""
    if resolution_type == "area":
        if resolution > LARGEST_AREA_MEGAPIXELS:
            return (
                f"{resolution:g} megapixels is above {LARGEST_AREA_MEGAPIXELS:g}. For an edge in pixels set "
                'resolution_type to "pixel_area" or "pixel".'
            )
        return None
    if not SMALLEST_EDGE_PX <= resolution <= LARGEST_EDGE_PX:
        megapixels = ' For megapixels set resolution_type to "area".' if resolution < SMALLEST_EDGE_PX else ""
        return f"{resolution:g}: must be from {SMALLEST_EDGE_PX} to {LARGEST_EDGE_PX} pixels.{megapixels}"
    return None


def without_buckets(crop_aspect: CropAspect) -> PydanticCustomError:
    """The error of a crop_aspect that takes one of crop_aspect_buckets, without any."""
    text = f'required by crop_aspect "{crop_aspect}". Give width / height of each, for instance '
    return contradiction("crop_aspect_buckets", f"{text}[0.67, 1.0, 1.5].", "crop_aspect")


def _folder_name(value: object) -> object:
    if not isinstance(value, str):
        return value
    if not value.strip():
        raise ValueError("must not be empty.")
    hidden = value.startswith((".", "-")) or value != value.strip()
    if (
        hidden
        or len(value.encode()) > _MAX_ID_LENGTH
        or not value.isprintable()
        or set(value) & set('/\\:*?"<>|')
    ):
        raise ValueError(
            'must fit a folder name: at most 100 bytes, without / \\ : * ? " < > | and control characters, '
            "without a dot, hyphen or space at the start."
        )
    return value


def _switched(value: object) -> object:
    """caption_shuffle as a switch: true enables it, a value that is off is its default."""
    if value is True or (isinstance(value, str) and value.strip().lower() == "true"):
        return {"enable": True}
    return {} if is_off(value) else value


def listed_ids(value: object) -> object:
    """One id or several as a list of texts; an id may be a number."""
    if is_off(value):
        return ()
    return [str(each) for each in value] if isinstance(value, list) else [str(value)]


CaptionStrategy = Annotated[str, OneOf(CAPTION_SOURCES)]


class DatasetConfig(RowCaptionKeys, ImagePlace):
    """A folder of images, with captions, size and repeats."""

    model_config = ConfigDict(defer_build=False)

    id: Annotated[str, BeforeValidator(_folder_name)]
    """Name of the dataset and of its cache folder, unique in the file."""
    dataset_type: Literal["image", "eval"] = "image"
    """image; eval, whose images are held out: never trained, only evaluated; or text_embeds for an entry that
    only names the text cache (`cache_dir`)."""
    disabled: bool = False
    """Skip the entry without checks."""
    cache_dir_vae: OptionalOutputPath = None
    """Folder of cached latents. Default: the dataset's id below `cache_dir_vae` of config.json."""
    resolution: PositiveNumber = 1024.0
    """Training size of images, in the unit of resolution_type. A list makes a dataset of each size, with ids
    like cats-512. Default: config.json's."""
    resolution_type: ResolutionType = "pixel_area"
    """Unit of resolution: pixel, the shorter edge; pixel_area, the edge of a square of equal area; area,
    megapixels. Default: config.json's."""
    minimum_image_size: NonNegativeNumber = 0.0
    """Smaller images are skipped; in the unit of resolution_type, 0 keeps all. Default: config.json's."""
    maximum_image_size: OptionalPositiveNumber = None
    """With crop, larger images are resized to target_downsample_size before they are cropped; in the unit of
    resolution_type. null resizes each image to the smallest size that its crop fits in. Default:
    config.json's."""
    target_downsample_size: OptionalPositiveNumber = None
    """Size of images above maximum_image_size before their crop, in the unit of resolution_type; at least
    resolution. Default: config.json's."""
    max_upscale_threshold: OptionalShare = None
    """Largest enlargement for a bucket of crop_aspect_buckets: 0.2 is by a fifth of width and height, 0 none,
    null any. An image without such a bucket is skipped. Default: config.json's."""
    crop: bool = False
    """Crop by crop_aspect; false keeps each image's aspect ratio, in buckets."""
    crop_style: Annotated[CropStyle, BeforeValidator(american)] = "random"
    """Position of the crop."""
    crop_aspect: CropAspect = "square"
    """Shape of the crop: square; preserve, the bucket nearest to the image's aspect ratio; closest, the
    nearest of crop_aspect_buckets; random, one of crop_aspect_buckets, drawn once for each image."""
    crop_aspect_buckets: AspectBuckets = ()
    """Width / height of the crops with closest and random: numbers, which random draws evenly, or objects
    {"aspect", "weight"}, whose weights sum to 1."""
    vae_cache_clear_each_epoch: bool = False
    """Draw a new random crop of each image in each epoch. Its latents are not cached: the VAE stays in memory
    beside the model and encodes each image whenever a batch needs it."""
    random_flip: bool = False
    """Train each image mirrored left to right in every second pass, with its mask and references. Not for
    subjects with a left and a right, such as writing or a face."""
    caption_strategy: CaptionStrategy | None = None
    """Source of captions. null takes table if a table holds captions, else textfile if text files lie beside
    images, else instanceprompt if instance_prompt is set without prepend_instance_prompt, else filename.
    Default: config.json's."""
    caption_lines: CaptionLines = "choose"
    """Lines of a text file: choose, each line is a caption and one is drawn each time; first, the first line
    is the caption; whole, the text is one caption. A JSON object or array is always whole. SimpleTuner's
    disable_multiline_split: true is whole. Default: config.json's."""
    instance_prompt: OptionalText = None
    """Caption of every image with instanceprompt; prefix of captions with prepend_instance_prompt. Default:
    config.json's."""
    prepend_instance_prompt: bool = False
    """Prepend instance_prompt to each caption."""
    only_instance_prompt: bool = False
    """Use instance_prompt as every caption, instead of caption_strategy."""
    caption_filter_list: CaptionFilters = ()
    """Terms and regular expressions to remove from captions, and s/search/replacement/ entries to replace: a
    list, or the path of a .txt file with one on each line or a .json array."""
    caption_prefix: str = ""
    """Text before each caption, separated by a blank."""
    caption_suffix: str = ""
    """Text after each caption, separated by a blank."""
    enable_wildcard: bool = False
    """Draw one of the alternatives in braces, {red|blue}, for each variant of a caption; {{ and }} are plain
    braces."""
    caption_shuffle: Annotated[CaptionShuffle, BeforeValidator(_switched)] = CaptionShuffle()
    """Orders of a caption's tags: an object with the keys of CaptionShuffle."""
    caption_tag_dropout_rate: Share = 0.0
    """Share of tags that each variant of a caption lacks; the tags that caption_shuffle keeps in place are
    never dropped."""
    caption_dropout_probability: OptionalShare = None
    """Fraction of samples trained without their caption. Default: config.json's."""
    repeats: CountOrZero = 0
    """Additional passes over each image in an epoch; 0 is one pass."""
    probability: PositiveNumber = 1.0
    """Factor on the number of draws in an epoch: 0.5 draws half the images, 2 each image twice."""
    eval_share: ShareBelowOne = 0.0
    """Share of the images that is held out: never trained, only evaluated. The digest of an image's bytes
    decides, whatever else is in the folder. Default: config.json's, 0 for regularisation."""
    train_batch_size: OptionalCount = None
    """Images of the dataset in a forward pass of each process; null or 0 takes config.json's."""
    start_step: CountOrZero = 1
    """First optimiser step that the dataset takes part in; 0 and 1 are the first of the run."""
    end_step: OptionalCount = None
    """Last optimiser step that it takes part in; null or 0 is the last of the run."""
    start_epoch: CountOrZero = 1
    """First epoch that it takes part in, beside start_step; 0 and 1 are the first of the run. A new epoch
    begins where a dataset begins or ends."""
    end_epoch: OptionalCount = None
    """Last epoch that it takes part in, beside end_step; null or 0 is the last of the run."""
    is_regularisation_data: bool = False
    """The images keep what the model knows of the subject's class: regularisation_target of config.json says
    what they are trained towards. Their captions name the class, without the subject's own word."""
    conditioning_data: Annotated[Names, BeforeValidator(listed_ids)] = ()
    """ids of the entries with the masks and the reference images of the images: a text or a list."""
    conditioning: MadeReferences = ()
    """References that are made of the images themselves, beside those of conditioning_data: an object, or a
    list of objects with `type` and its own keys."""
    alpha_mask: bool = False
    """The alpha channel of each image is its mask; an image without one counts as a whole."""
    max_num_samples: OptionalCount = None
    """Number of images to use, chosen by the seed; null or 0 uses all."""
    slider_strength: OptionalNumber = None
    """Strength of the adapter while the images train, for a slider: positive in one dataset, negative in
    another. null or 0 is neutral: trained at the strengths of the others in turn, or at 1 if no dataset has
    one."""

    @property
    def is_trained(self) -> bool:
        """Whether its images are trained, but for the part that is held out."""
        return self.dataset_type == "image"

    @property
    def holds_out(self) -> bool:
        """Whether images of it may be held out."""
        return not self.is_trained or self.eval_share > 0

    @property
    def arranges_tags(self) -> bool:
        """Whether caption_shuffle changes captions by itself."""
        return self.caption_shuffle.enable or self.caption_shuffle.keep_separator is not None

    @property
    def needs_row_captions(self) -> bool:
        """Whether the rows that are the images must hold captions."""
        has_prompt = self.instance_prompt is not None and not self.prepend_instance_prompt
        is_asked = self.caption_strategy == "table" or (self.caption_strategy is None and not has_prompt)
        return is_asked and not self.only_instance_prompt

    @property
    def crops_to_buckets(self) -> bool:
        """Whether the shape of a crop comes from crop_aspect_buckets."""
        return self.crop and self.crop_aspect in BUCKETED_ASPECTS

    @property
    def downsampling(self) -> tuple[float, float] | None:
        """maximum_image_size and target_downsample_size if they have an effect, else None."""
        maximum, target = self.maximum_image_size, self.target_downsample_size
        if not self.crop or maximum is None or target is None or target == self.resolution:
            return None
        return maximum, target

    @model_validator(mode="after")
    def _can_crop(self) -> Self:
        if self.crops_to_buckets and not self.crop_aspect_buckets:
            raise without_buckets(self.crop_aspect)
        if self.downsampling is None:
            return self
        maximum, target = self.downsampling
        for key, size in {"maximum_image_size": maximum, "target_downsample_size": target}.items():
            if problem := resolution_problem(size, self.resolution_type):
                raise contradiction(key, problem, "resolution_type")
        if target < self.resolution:
            raise contradiction(
                "target_downsample_size",
                f"{target:g} is below resolution {self.resolution:g}, the size of the crop. Raise it, or "
                "remove it and maximum_image_size.",
                "resolution",
            )
        return self

    @model_validator(mode="after")
    def _can_draw_crops_anew(self) -> Self:
        key = "vae_cache_clear_each_epoch"
        if not self.vae_cache_clear_each_epoch:
            return self
        if not self.crop or self.crop_style != "random":
            text = (
                'only random crops are drawn anew. Set crop to true and crop_style to "random", or remove it.'
            )
            raise contradiction(key, text, "crop_style")
        if not self.is_trained:
            text = "held-out images keep their crop, so that their losses compare. Remove it."
            raise contradiction(key, text, "dataset_type")
        for other in ("conditioning_data", "conditioning", "alpha_mask"):
            if getattr(self, other):
                text = "masks and references keep the crop that they were cut with. Remove one of the keys."
                raise contradiction(key, text, other)
        return self

    @model_validator(mode="after")
    def _finds_captions(self) -> Self:
        has_rows, strategy = IMAGE_SOURCES[self.source].holds_rows, self.caption_strategy
        if has_rows and self.parquet is not None:
            text = "names captions of other images; rows hold theirs in caption_column. Remove it."
            raise contradiction("parquet", text)
        if strategy == "table" and not has_rows and self.parquet is None:
            text = (
                "captions come from a table, and none is named. Set parquet, with path, filename_column and "
            )
            raise contradiction("caption_strategy", f'"table": {text}caption_column.', "parquet")
        if strategy == "textfile" and has_rows:
            text = "no files lie beside rows of a table. Use table, instanceprompt or filename."
            raise contradiction("caption_strategy", f'"textfile": {text}')
        if self.streaming and self.max_num_samples is None:
            text = "a stream is taken up to max_num_samples rows. Set that, or remove streaming."
            raise contradiction("max_num_samples", f"required by streaming: {text}", "streaming")
        return self

    @model_validator(mode="after")
    def _begins_before_its_end(self) -> Self:
        for unit, start, end in (
            ("step", self.start_step, self.end_step),
            ("epoch", self.start_epoch, self.end_epoch),
        ):
            if end is not None and end < start:
                text = f"{end} is before start_{unit} {start}. Raise it, or lower start_{unit}."
                raise contradiction(f"end_{unit}", text, f"start_{unit}")
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if problem := resolution_problem(self.resolution, self.resolution_type):
            raise contradiction("resolution", problem, "resolution_type")
        if self.is_regularisation_data and self.holds_out:
            key = "eval_share" if self.is_trained else "dataset_type"
            text = "images of regularisation are not evaluated. Remove one of the keys."
            raise contradiction(key, text, "is_regularisation_data")
        if self.train_batch_size is not None and self.slider_strength is not None:
            text = "the datasets of a slider share one. Set it in config.json."
            raise contradiction("train_batch_size", f"{self.train_batch_size}: {text}", "slider_strength")
        needs_prompt = {
            f'caption_strategy "{self.caption_strategy}"': self.caption_strategy is not None
            and CAPTION_SOURCES[self.caption_strategy].needs_instance_prompt,
            "only_instance_prompt": self.only_instance_prompt,
            "prepend_instance_prompt": self.prepend_instance_prompt,
        }
        asking = [name for name, asks in needs_prompt.items() if asks]
        if asking and self.instance_prompt is None:
            raise contradiction(
                "instance_prompt",
                f'required by {asking[0]}. Give the text, for instance "a photo of sks cat".',
                "caption_strategy",
            )
        return self


def subjects_of(datasets: Iterable[DatasetConfig]) -> list[DatasetConfig]:
    """The datasets that teach something new: without is_regularisation_data, and not held out."""
    return [each for each in datasets if each.is_trained and not each.is_regularisation_data]


def slider_strengths(datasets: Iterable[DatasetConfig]) -> tuple[float, ...]:
    """The strengths of a slider's datasets, each once and ascending; empty without a slider."""
    trained = (each.slider_strength for each in datasets if each.is_trained)
    return tuple(sorted({strength for strength in trained if strength is not None}))
