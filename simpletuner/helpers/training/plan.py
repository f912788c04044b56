"""What a run will do, as `validate` prints it, and what a person may want to change. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import simpletuner
from simpletuner.helpers.adapters.tlora.rank_schedule import min_rank_of
from simpletuner.helpers.checkpointing.intervals import Epochs
from simpletuner.helpers.choices.optimizers import OPTIMIZERS
from simpletuner.helpers.configuration.loading.rules import training_size
from simpletuner.helpers.configuration.migration.paths import repeated_folder
from simpletuner.helpers.configuration.schema.base import HIDDEN_SECRET, as_json
from simpletuner.helpers.configuration.schema.masks import ConditioningConfig
from simpletuner.helpers.configuration.schema.references import ReferenceConfig
from simpletuner.helpers.configuration.schema.sections import RunConfig
from simpletuner.helpers.configuration.text.problems import nearest
from simpletuner.helpers.configuration.translation_lines import default_lines, translation_lines
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.data.phases import (
    Calendar,
    batch_sizes,
    idle_datasets,
    stretch_lines,
)
from simpletuner.helpers.data.preview import DatasetPreview
from simpletuner.helpers.data.scan_report import listed, shown
from simpletuner.helpers.errors import MissingDependencyError
from simpletuner.helpers.estimating.estimate import estimate
from simpletuner.helpers.estimating.report import summary
from simpletuner.helpers.io.names import counted, printable
from simpletuner.helpers.io.run_folder import (
    ADAPTER_FILE,
    COMFYUI_FILES,
    EMA_FILES,
    EMBEDDING_FILE,
    EVALUATIONS_FILE,
    METRICS_FILE,
    PAGE_FILE,
    TENSORBOARD_FOLDER,
    ema_folder,
)
from simpletuner.helpers.models.rank_forecast import RankForecast, expected_mean_rank, is_low
from simpletuner.helpers.models.weights_on_disk import (
    VELOCITY_MARKER,
    ZERO_SNR_MARKER,
    markers,
    num_denoiser_weights,
    scheduler_config,
)
from simpletuner.helpers.training.device import LARGEST_ON_CPU, billions, has_gpu
from simpletuner.helpers.training.evaluation_plan import (
    evaluation_problems,
    evaluation_rows,
)
from simpletuner.helpers.training.expected_epochs import (
    directions_out_of_balance,
    trained_datasets,
    trained_of,
)
from simpletuner.helpers.training.packages import check_packages
from simpletuner.helpers.training.previews import preview_datasets

DEMO = Path(simpletuner.__file__).parent / "demo"
EXAMPLE_SUBJECT = "sks cat"
FEWEST_TLORA_STEPS = 100
MOST_REPEATS = 999
"""A larger number before a folder's name is a year."""
WARNING = "  warning     "
"""Begins the line of a warning."""
_SHOWN_BUCKETS = 6
_UNSEEN = "downloaded by the run or by validate --data, and not checked before"


def plan_lines(config: RunConfig, spec: ModelSpec, *, reads_all: bool = False) -> Iterator[str]:
    """Lines on model, adapter, data, steps, images, files and keys of a run, then one for each warning.

    Args:
        config: The run.
        spec: Its family.
        reads_all: Read the headers of all images, not of the first 2,000, and download datasets of the hub.

    Raises:
        DataError: A dataset's folder cannot be read, no caption has tags to shuffle, or there are too many
            variants of captions.
        ModelError: A local model's file is no safetensors file.
    """
    known = preview_datasets(config, spec, reads_all=reads_all)
    trained, previews, unseen, calendar = trained_datasets(config), known.read, known.unseen, known.calendar
    rows = [("model", _model(config, spec)), *_weights(config, spec)]
    for each in previews:
        rows += _dataset(each)
    rows += [("images", f"{each.id}: {each.place}, {_UNSEEN}") for each in unseen]
    rows += [
        ("steps", _steps(config, previews, calendar=calendar)),
        *_block("", stretch_lines(trained, calendar, config.training)),
        *_memory(config),
        ("validation", _validation(config, calendar=calendar)),
        *evaluation_rows(config, previews),
        ("writes", _written(config, spec)),
    ]
    rows += _block("keys", translation_lines(config)) + _block(
        "defaults", default_lines(config.differing_defaults)
    )
    if config.publishing.push_to_hub:
        rows.append(("uploads", _uploaded(config)))
    yield from (f"  {name:<12}{text}" for name, text in rows)
    problems = [f"dataset {each.config.id}: {listed(each.problems)}" for each in previews if each.problems]
    unreached = [each for each in previews if each.unreachable is not None]
    problems += [f"dataset {each.config.id} was not looked at: {each.unreachable}" for each in unreached]
    if not (unseen or unreached):
        problems += directions_out_of_balance(config, previews, calendar)
        problems += evaluation_problems(config, previews)
    problems += [f"dataset {each.config.id}: {line}." for each in previews for line in each.tags.lines()]
    if not (unseen or unreached) or config.training.max_train_steps is not None:  # else steps are unknown
        problems += warnings_of(config, spec, calendar=calendar)
    for text in (*problems, *_only_before(config, spec)):
        yield f"{WARNING}{text}"


def _weights(config: RunConfig, spec: ModelSpec) -> Iterator[tuple[str, str]]:
    if config.model.is_full:
        yield "weights", _whole_model(config, spec)
    if config.model.has_adapter:
        yield "adapter", _adapter(config, spec)
    if config.text_encoders.train_text_encoder:
        yield "encoders", _text_encoders(config)
    if config.new_tokens.placeholder_token is not None:
        yield "new token", _new_token(config)


def _block(name: str, lines: Iterable[str]) -> list[tuple[str, str]]:
    """Rows of which the first has the name."""
    return [(name if index == 0 else "", line) for index, line in enumerate(lines)]


def warnings_of(config: RunConfig, spec: ModelSpec, *, calendar: Calendar) -> list[str]:
    """What a person may not have meant, from the configuration and the epochs of the run."""
    steps = calendar.num_steps(config.training)
    found = [
        *_other_model(config),
        *_examples_own(config),
        *_prediction(config),
        *_repeated_folders(config),
        *_keys_in_files(config),
        *_sizes_without_effect(config),
        *_without_references(config, spec),
        *_prompts_without_references(config),
        *_untrained_text_encoders(config),
        *idle_datasets(trained_datasets(config), calendar, config.training),
        *_prompts_without_token(config),
    ]
    if config.publishing.push_checkpoints_to_hub and not config.publishing.push_to_hub:
        found.append("push_checkpoints_to_hub uploads nothing without push_to_hub. Set push_to_hub to true.")
    if (
        config.training.max_train_steps is None
        and config.algorithm.name == "tlora"
        and steps < FEWEST_TLORA_STEPS
    ):
        found.append(
            f"max_train_steps is not set, so the run takes {counted(steps, 'step')}. T-LoRA on few images "
            "takes several hundred: set it, for instance to 800."
        )
    optimizer = config.optimizer
    if OPTIMIZERS[optimizer.optimizer].has_averages and not optimizer.lr_scheduler.startswith("constant"):
        found.append(
            f"lr_scheduler {optimizer.lr_scheduler} lowers the rate of {optimizer.optimizer}, which averages "
            "the weights instead. Set it to constant_with_warmup."
        )
    interval = config.training.gradient_checkpointing_interval or 1
    if interval > 1 and not config.training.gradient_checkpointing:
        found.append("gradient_checkpointing_interval has no effect without gradient_checkpointing.")
    warm_up = config.optimizer.lr_warmup_steps
    if warm_up > steps:
        found.append(
            f"lr_warmup_steps {warm_up} is above the {counted(steps, 'step')} of the run: learning_rate is "
            "never reached. Lower it."
        )
    return found


def _memory(config: RunConfig) -> Iterator[tuple[str, str]]:
    found = estimate(config)
    if found is not None:
        yield "memory", summary(found)


def _repeated_folders(config: RunConfig) -> Iterator[str]:
    """Folders named like 10_sks dog, whose number is how often kohya's scripts take each image."""
    theirs = "which kohya's scripts take {} times an epoch"
    for dataset in config.datasets:
        folder = dataset.folder
        if folder is None or not dataset.is_trained:
            continue
        own = repeated_folder(folder.name)
        if own is not None and own[0] <= MOST_REPEATS and own[0] - 1 != dataset.repeats:
            yield (
                f'instance_data_dir of dataset {dataset.id} is "{printable(folder.name)}", '
                f'{theirs.format(own[0])}. Set "repeats": {own[0] - 1} for that; it is {dataset.repeats}.'
            )
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        inner = [(name, found[0]) for name in names if (found := repeated_folder(name))]
        if own is None and inner:
            name, times = inner[0]
            yield (
                f'instance_data_dir of dataset {dataset.id} holds "{printable(name)}", '
                f"{theirs.format(times)}. Make a dataset of each such folder, with "
                f'"repeats": {times - 1} here, or use simpletuner migrate.'
            )


def _without_references(config: RunConfig, spec: ModelSpec) -> Iterator[str]:
    """A flavour for editing, of a family that has others too, without anything to edit."""
    flavour = config.model.model_flavour or spec.default_flavour
    is_for_editing = spec.reference_flavours < spec.flavours.keys() and spec.sees_references(
        config.model.model_flavour, config.model.pretrained_model_name_or_path
    )
    if is_for_editing and not config.has_references:
        yield (
            f"{flavour} edits reference images, and no dataset has some: it is trained on captions alone. "
            "Name an entry with conditioning_type reference_strict in conditioning_data."
        )


def _prompts_without_references(config: RunConfig) -> Iterator[str]:
    """Validation prompts of a run on references that name none."""
    prompts = () if config.validation.validation_disable else config.validation.prompts
    names = [each.name for each in prompts if not each.images]
    if config.has_references and names:
        yield (
            f"the run trains on reference images, and these validation prompts name none: {listed(names)}. "
            "Their images say little of it. Set validation_reference_images, or image in user_prompt_library."
        )


def _prompts_without_token(config: RunConfig) -> Iterator[str]:
    """A run with a new token that no validation prompt shows."""
    prompts = () if config.validation.validation_disable else config.validation.prompts
    token = config.new_tokens.placeholder_token
    if token is not None and prompts and not any(token in each.text for each in prompts):
        yield (
            f"no validation prompt has the new token {printable(token)}, so no image shows what it "
            "learns. Write it in validation_prompt."
        )


def _untrained_text_encoders(config: RunConfig) -> Iterator[str]:
    """The keys of the text encoders' LoRA in a run without it."""
    section = config.text_encoders
    names = sorted(section.model_fields_set - {"train_text_encoder"})
    unread = [name for name in names if getattr(section, name)]
    for key in ("text_cache_ondemand", "text_cache_disable"):
        if getattr(config.data, key) and section.train_text_encoder:
            yield f"{key}: no effect with train_text_encoder, which caches no captions."
    if unread and not section.train_text_encoder:
        yield f"{', '.join(unread)}: no effect without train_text_encoder. Set it to true, or remove them."


def rank_line(forecast: RankForecast, config: RunConfig) -> str:
    """The expected mean active ranks, with advice if they are low."""
    assert config.lycoris is not None, "only T-LoRA has a rank schedule"
    means = [f"{forecast.mean:.1f} of {config.lycoris.linear_dim}"]
    means += [f"{printable(name)} {mean:.1f} of {rank}" for name, (mean, rank) in forecast.entries.items()]
    text = f"expected mean active rank {', '.join(means)}"
    if not is_low(forecast, config.lycoris):
        return text
    return f"{text}, under a quarter: raise tlora_min_rank, or lower tlora_alpha or the noise levels' shift"


def _only_before(config: RunConfig, spec: ModelSpec) -> Iterator[str]:
    """What the run itself refuses or measures."""
    yield from _targets(config, spec)
    try:
        check_packages(config)
    except MissingDependencyError as error:
        yield str(error)
    weights = num_denoiser_weights(config.model, spec)
    if weights is not None and weights > LARGEST_ON_CPU and not config.precision.allow_cpu and not has_gpu():
        yield (
            f"no GPU was found, and this denoiser has {billions(weights)} weights: the run ends at its start "
            "unless allow_cpu is true."
        )


def _other_model(config: RunConfig) -> Iterator[str]:
    for each in config.differing_defaults:
        if each.key == "model_flavour" and each.ours == config.model.model_flavour:
            named = config.model.pretrained_model_name_or_path
            yield (
                f"model_flavour {each.ours} is {named} here; what is {each.ours} in SimpleTuner is "
                f"{each.theirs} here. Name the one that you mean, or set defaults."
            )


def _keys_in_files(config: RunConfig) -> Iterator[str]:
    """Entries whose keys of storage are written in the dataset json."""
    entries = (*config.datasets, *config.conditioning, *config.references)
    if found := [each.id for each in entries if as_json(each)["aws_secret_access_key"] == HIDDEN_SECRET]:
        yield (
            f"aws_secret_access_key of {', '.join(found)} stands in the dataset json, where others may read "
            "it. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment instead."
        )


def _examples_own(config: RunConfig) -> Iterator[str]:
    if Path(config.model.pretrained_model_name_or_path).is_relative_to(DEMO):
        return
    for dataset in config.datasets:
        if dataset.folder is not None and dataset.folder.is_relative_to(DEMO):
            yield f"instance_data_dir of dataset {dataset.id} is still the example's. Set your folder."
        elif EXAMPLE_SUBJECT in (dataset.instance_prompt or ""):
            yield f"instance_prompt of dataset {dataset.id} is still the example's. Name your subject."
    if any(EXAMPLE_SUBJECT in prompt.text for prompt in config.validation.prompts):
        yield "validation_prompt is still the example's. Name your subject."


def _sizes_without_effect(config: RunConfig) -> Iterator[str]:
    """One line for each key of sizes that no other setting of its datasets reads."""
    alone: dict[str, list[str]] = {}
    for dataset in config.datasets:
        size, target = dataset.maximum_image_size, dataset.target_downsample_size
        unread = {
            "maximum_image_size has no effect without target_downsample_size": bool(size and not target),
            "target_downsample_size has no effect without maximum_image_size": bool(target and not size),
            "crop_aspect_buckets has no effect without crop and crop_aspect closest or random": (
                bool(dataset.crop_aspect_buckets) and not dataset.crops_to_buckets
            ),
            "max_upscale_threshold has no effect without crop and crop_aspect closest or random": (
                dataset.max_upscale_threshold is not None and not dataset.crops_to_buckets
            ),
        }
        for text in (text for text, is_unread in unread.items() if is_unread):
            alone.setdefault(text, []).append(dataset.id)
    yield from (f"{text} (dataset {', '.join(names)})." for text, names in alone.items())


def _targets(config: RunConfig, spec: ModelSpec) -> Iterator[str]:
    """Target classes that the family's denoisers lack, and a T-LoRA rank above the side of a target layer."""
    if config.lycoris is None:
        return
    preset = config.lycoris.apply_preset
    named = [*preset.target_module, *preset.module_algo_map]
    classes = {cls for name in named for cls in _classes_of(name, spec)}
    known = {cls for sides in spec.layer_sides.values() for cls in sides}
    for name in sorted(classes - known if known else ()):
        yield f"apply_preset: {name} matches no layer of {spec.name}.{nearest(name, known)}"
    repositories = {repository: flavour for flavour, repository in spec.flavours.items()}
    flavour = repositories.get(config.model.pretrained_model_name_or_path)
    if config.algorithm.name != "tlora" or flavour is None or preset.exclude_name:
        return
    if not (named or preset.target_name or preset.name_algo_map):
        classes = {cls for alias in spec.target_aliases.values() for cls in alias.modules}
    sides = [side for cls in classes & known if (side := spec.layer_sides[flavour].get(cls)) is not None]
    if sides and config.lycoris.linear_dim > min(sides):
        yield (
            f"linear_dim {config.lycoris.linear_dim} is above {min(sides)}, the smaller side of a target "
            "layer. Lower it."
        )


def _classes_of(name: str, spec: ModelSpec) -> tuple[str, ...]:
    alias = spec.target_aliases.get(name)
    return (name,) if alias is None else alias.modules


def _prediction(config: RunConfig) -> Iterator[str]:
    model = config.model
    found, scheduler = markers(model), scheduler_config(model) or {}
    if model.prediction_type == "epsilon" and VELOCITY_MARKER in found:
        yield (
            "prediction_type is epsilon, but the file is marked v_pred, a model that predicts v. Remove "
            "prediction_type."
        )
    is_velocity = VELOCITY_MARKER in found or scheduler.get("prediction_type") == "v_prediction"
    prediction = model.prediction_type or ("v_prediction" if is_velocity else "epsilon")
    is_zero_snr = (
        model.rescale_betas_zero_snr
        or ZERO_SNR_MARKER in found
        or scheduler.get("rescale_betas_zero_snr") is True
    )
    if is_zero_snr and prediction == "epsilon":
        yield (
            "the noise schedule ends at an SNR of zero, where epsilon says nothing of the image. Such models "
            "predict v: set prediction_type to v_prediction, or rescale_betas_zero_snr to false."
        )


def _model(config: RunConfig, spec: ModelSpec) -> str:
    weights = num_denoiser_weights(config.model, spec)
    size = "" if weights is None else f", denoiser of {billions(weights)} weights"
    precision = config.precision
    formats = (
        f"mixed_precision {precision.mixed_precision}, base_model_precision {precision.base_model_precision}"
    )
    return f"{spec.name}, {config.model.pretrained_model_name_or_path}{size}; {formats}"


def _whole_model(config: RunConfig, spec: ModelSpec) -> str:
    whole, is_rounded = config.whole_model, config.precision.mixed_precision != "no"
    names = f"those with {' or '.join(whole.layer_filter)} in their names" if whole.layer_filter else "all"
    kept = "bf16, rounded stochastically after each step" if is_rounded else "float32"
    when = ", each in the backward pass" if whole.fused_backward_pass else ""
    return f"{config.algorithm.title} of the {spec.denoiser_name}: {names}; {kept}{when}"


def _adapter(config: RunConfig, spec: ModelSpec) -> str:
    lycoris, title = config.lycoris, config.algorithm.title
    if lycoris is None:
        return f"{title}, rank {config.adapter.lora_rank}"
    expected = expected_mean_rank(
        config, spec, scheduler=scheduler_config(config.model), size=training_size(config.data, spec)
    )
    if not config.algorithm.has_rank_schedule:
        return f"{title}, rank {lycoris.linear_dim}"
    forecast = (
        rank_line(expected, config)
        if expected is not None
        else "the model's scheduler decides the expected mean active rank; the start of the run names it"
    )
    lowest = min_rank_of(lycoris.tlora_min_rank, lycoris.linear_dim)
    return f"{title}, rank {lycoris.linear_dim}, {lowest} at the highest noise; {forecast}"


def _text_encoders(config: RunConfig) -> str:
    section, lycoris = config.text_encoders, config.lycoris
    rank = lycoris.linear_dim if lycoris is not None else config.adapter.lora_rank
    rates = section.text_encoder_lr or (config.optimizer.learning_rate,)
    last = section.stop_text_encoder_training
    end = "to the end" if last is None else f"until step {last}"
    return (
        f"LoRA of the text encoders, rank {section.text_encoder_lora_rank or rank}; learning rate "
        f"{', '.join(f'{rate:g}' for rate in rates)}; {end}"
    )


def _new_token(config: RunConfig) -> str:
    token = config.new_tokens
    number = counted(token.num_vectors, "embedding")
    rate = token.embedding_lr or config.optimizer.learning_rate
    word, start = (printable(str(each)) for each in (token.placeholder_token, token.initializer_token))
    return f"{word}, {number} in each text encoder, from {start}; learning rate {rate:g}"


def _dataset(each: DatasetPreview) -> Iterator[tuple[str, str]]:
    config = each.config
    if each.unreachable is not None:
        yield "images", f"{config.id}: not looked at in {config.place}"
        return
    part = "" if each.is_whole else f" (of the first {each.num_read:,})"
    sizes = [f"{size}: {number:,}" for size, number in sorted(each.buckets.items())]
    more = f" and {len(sizes) - _SHOWN_BUCKETS} more" if len(sizes) > _SHOWN_BUCKETS else ""
    crop = f"crop {config.crop_aspect}, {config.crop_style}" if config.crop else "no crop"
    crop += ", drawn anew in each epoch" if config.vae_cache_clear_each_epoch else ""
    crop += ", every second pass mirrored" if config.random_flip else ""
    grown = (
        f"{counted(len(each.enlarged), 'is', 'are')} enlarged: {listed(each.enlarged)}"
        if each.enlarged
        else "none is enlarged"
    )
    if config.downsampling is not None:
        grown = f"{each.num_downsampled} above maximum_image_size; {grown}"
    buckets = ", ".join(sizes[:_SHOWN_BUCKETS])
    number = counted(each.num_images, "image")
    kind = f"{number} of regularisation" if config.is_regularisation_data else number
    if config.holds_out:
        kind = f"{number}, {each.num_held_out}{part} held out"
    if each.num_copies:
        kind += f", {each.num_copies}{part} not trained, as another dataset holds out the same bytes,"
    yield "images", f"{config.id}: {kind} in {config.place}"
    yield "", f"{crop}; {counted(len(sizes), 'bucket')}{part}: {buckets}{more}; {grown}"
    if config.slider_strength is not None:
        yield "", f"slider_strength {config.slider_strength:g}"
    masks = [entry.id for entry in each.conditioning if isinstance(entry, ConditioningConfig)]
    if config.alpha_mask or masks:
        yield "masks", f"{config.id}: {'alpha channels' if config.alpha_mask else masks[0]}"
    references = [
        f"{entry.id} ({entry.conditioning_type})"
        for entry in each.conditioning
        if isinstance(entry, ReferenceConfig)
    ]
    references += [f"{made.type} (made of the images)" for made in config.conditioning]
    if references:
        yield "references", f"{config.id}: {', '.join(references)}"
    captioned = sum(each.buckets.values()) - each.num_uncaptioned
    example = "" if each.example is None else f", for instance {each.example[0]}: {shown(each.example[1])}"
    number = f"{counted(captioned, 'image has one', 'images have one')}{part}"
    yield "captions", f"{config.id}: {each.captions}; {number}{example}"
    if each.num_variants > 1:
        about = "" if each.is_whole else "about "
        yield (
            "",
            f"{each.num_variants} variants of each caption: {about}{each.expected_captions:,} to encode",
        )


def _steps(config: RunConfig, previews: Sequence[DatasetPreview], *, calendar: Calendar) -> str:
    training = config.training
    steps = calendar.num_steps(training)
    about = "" if all(each.is_whole for each in previews) else "about "
    accumulated, batches = training.gradient_accumulation_steps, calendar.stretches[0].length
    if not batches and training.max_train_steps is None:
        return f"{counted(training.num_train_epochs, 'epoch')} of an unknown number of images"
    own = [each.config.train_batch_size for each in trained_of(previews)] or [None]
    sizes = [(each or training.train_batch_size) * accumulated for each in own]
    number = f"{calendar.epochs_before(steps * accumulated):,.1f}".removesuffix(".0")
    noun = "epoch" if number == "1" else "epochs"
    lengths = f" of {counted(batches, 'batch', 'batches')}" if len(calendar.stretches) == 1 else ""
    passes = f"{about}{number} {noun}{lengths}" if batches else "an unknown number of epochs"
    return f"{counted(steps, 'step')} of {batch_sizes(sizes)} on each process; {passes}"


def _validation(config: RunConfig, *, calendar: Calendar) -> str:
    validation = config.validation
    steps = calendar.num_steps(config.training)
    sizes = validation.validation_resolution
    number = len(validation.prompts) * len(sizes) * validation.num_validation_images
    if config.ema.use_ema and config.ema.ema_validation == "comparison":
        number *= 2
    if validation.validation_disable or not number:
        return "no images"
    by_step, by_epoch = validation.validation_step_interval, validation.validation_epoch_interval
    per_step = config.training.gradient_accumulation_steps
    epochs = Epochs(calendar=calendar, batches_per_step=per_step)
    first = min([*([by_step] if by_step else []), *([epochs.end_of(by_epoch)] if by_epoch else []), steps])
    when = f"{_every(by_step, by_epoch)} and at the end" if first < steps else "at the end"
    return f"{counted(number, 'image')} of {', '.join(map(str, sizes))} {when}"


def _every(steps: int, epochs: int) -> str:
    """The intervals of checkpoints or validations; empty without any."""
    given = {"step": steps, "epoch": epochs}
    return " and ".join(f"every {counted(number, noun)}" for noun, number in given.items() if number)


def _written(config: RunConfig, spec: ModelSpec) -> str:
    every = _every(config.checkpoint.checkpoint_step_interval, config.checkpoint.checkpoint_epoch_interval)
    names = [ADAPTER_FILE] if config.model.has_adapter else []
    names += [spec.denoiser_name] if config.model.is_full else []
    names += [EMBEDDING_FILE] if config.new_tokens.placeholder_token is not None else []
    if config.ema.use_ema:
        names += [EMA_FILES.get(name, ema_folder(name)) for name in names]
    exported = names if config.adapter.lora_format == "comfyui" else []
    files = [
        *names,
        *(COMFYUI_FILES[name] for name in exported if name in COMFYUI_FILES),
        f"checkpoints {every}" if every else "a checkpoint at the end",
        METRICS_FILE,
        *((EVALUATIONS_FILE,) if config.evaluates else ()),
        PAGE_FILE,
        *(TENSORBOARD_FOLDER if name == "tensorboard" else name for name in config.tracking.report_to),
    ]
    return f"{printable(str(config.checkpoint.output_dir))}: {', '.join(files)}"


def _uploaded(config: RunConfig) -> str:
    publishing = config.publishing
    name = publishing.hub_model_id or config.tracking.tracker_project_name
    owner = "" if "/" in name else " of the login"
    kind = "private" if publishing.model_card_private else "public"
    when = (
        "every checkpoint and the finished run" if publishing.push_checkpoints_to_hub else "the finished run"
    )
    return f"{when}, to the repository {name}{owner}; a new one is {kind}"
