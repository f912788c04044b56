"""Finds and checks the components of a model, for all families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models.loading import (
    Component,
    Config,
    ModelSource,
    class_of,
    find_component,
    find_in_file,
    guess_subfolder,
    read_model_index,
)
from simpletuner.helpers.models.single_file import DENOISER_PREFIX, VAE_PREFIX

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.model import ModelConfig

PREFIXES = {"unet": DENOISER_PREFIX, "transformer": DENOISER_PREFIX, "vae": VAE_PREFIX}
"""Component -> prefix of its tensors in a single file of the original layout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelComponents:
    """Components that every family has; a family adds its text encoders."""

    denoiser: Component
    vae: Component
    scheduler: Component


def base_source(model: ModelConfig) -> ModelSource:
    """Source of the base model."""
    return ModelSource(model.pretrained_model_name_or_path, revision=model.revision, variant=model.variant)


def read_index(base: ModelSource, *, pipelines: tuple[str, ...], family: str) -> Config:
    """Read the model_index.json of a model.

    Args:
        base: The model.
        pipelines: Allowed pipeline classes; `*` stands for any ending.
        family: Display name of the family, for messages.

    Raises:
        ModelError: The model is missing or of another family.
    """
    index = read_model_index(base)
    if not any(fnmatchcase(class_of(index), pipeline) for pipeline in pipelines):
        needed = " or ".join(pipeline.removesuffix("*") for pipeline in pipelines)
        raise ModelError(
            f"{base} is a model for {class_of(index)}, but {family} needs {needed}. Set model_family to that "
            f"model's family, or give a model of {family}."
        )
    return index


def transformer_of(model: ModelConfig, base: ModelSource) -> Component:
    """The transformer, from its own configuration keys or from the base."""
    return swappable_component(
        "transformer",
        base,
        own=model.pretrained_transformer_model_name_or_path,
        subfolder=model.pretrained_transformer_subfolder,
    )


def vae_of(model: ModelConfig, base: ModelSource, *, file: ModelSource | None = None) -> Component:
    """The VAE, from its own configuration keys, a single file or the base."""
    return swappable_component(
        "vae",
        base,
        own=model.pretrained_vae_model_name_or_path,
        subfolder=model.pretrained_vae_subfolder,
        file=file,
    )


def swappable_component(
    name: str, base: ModelSource, *, own: str | None, subfolder: str | None, file: ModelSource | None = None
) -> Component:
    """A component that the user can take from elsewhere.

    Args:
        name: The component's name.
        base: The base model; it provides the configuration for a single file.
        own: Value of pretrained_<name>_model_name_or_path.
        subfolder: Value of pretrained_<name>_subfolder.
        file: Single file of the whole model.

    Raises:
        ModelError: The component is incomplete, or its repository is unreachable.
    """
    source = file if own is None else ModelSource(own, key=f"pretrained_{name}_model_name_or_path")
    if source is None:
        return find_component(name, base, component_type="diffusers", strict_variant=name != "vae")
    if source.is_file:
        return find_in_file(name, source, prefix=PREFIXES[name], configuration=base)
    if subfolder is None:
        subfolder = guess_subfolder(source, usual=name)
    return find_component(name, source, component_type="diffusers", subfolder=subfolder)


def check_classes(expected: Mapping[str, Component], *, family: str) -> None:
    """Refuse a component of another class.

    Args:
        expected: Class name -> component.
        family: Display name of the family, for messages.

    Raises:
        ModelError: A component is of another class.
    """
    for class_name, component in expected.items():
        if (found := class_of(component.config)) != class_name:
            raise ModelError(
                f"{component.source}: component {component.name} in {component.folder} is {found}, but "
                f"{family} needs {class_name}. Give a {family} model, or set model_family to this model's."
            )


def check_fit(
    component: Component,
    expected: Mapping[str, tuple[int, str]],
    *,
    advice: str = "Give the components of one model.",
) -> None:
    """Refuse a component that does not fit the others.

    Args:
        component: Usually the denoiser.
        expected: Number in its configuration -> (value in the other components, its meaning for the message).
        advice: Last sentence of the message.

    Raises:
        ModelError: A number differs.
    """
    for name, (value, meaning) in expected.items():
        if (found := config_number(component, name)) != value:
            raise ModelError(
                f"{component.source}: {name} of {component.name} is {found}, but the {meaning} is {value}. "
                f"{advice}"
            )


def config_number(component: Component, name: str, *, section: str | None = None) -> int:
    """An integer in a component's configuration, or in a section of it if there is one.

    Raises:
        ModelError: The number is missing.
    """
    config = component.config.get(section, component.config) if section else component.config
    value = config.get(name) if isinstance(config, Mapping) else None
    if not isinstance(value, int):
        raise ModelError(
            f"{component.source}: {component.folder} has no number for {name} (found {value!r}). "
            "Give a complete model."
        )
    return value
