"""What the families' searches for their components share: swapped components and checks of what was found."""

from __future__ import annotations

from collections.abc import Mapping
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
    from simpletuner.helpers.configuration.schema.sections import ModelConfig

PREFIXES = {"unet": DENOISER_PREFIX, "transformer": DENOISER_PREFIX, "vae": VAE_PREFIX}
"""Component -> prefix of its tensors in a whole checkpoint of the original layout."""


def base_source(model: ModelConfig) -> ModelSource:
    """Where the model itself comes from."""
    return ModelSource(model.pretrained_model_name_or_path, revision=model.revision, variant=model.variant)


def read_index(base: ModelSource, *, pipelines: tuple[str, ...], family: str) -> Config:
    """The model_index.json of a model whose pipeline is one of these.

    Raises:
        ModelError: There is no model, or it is of another family.
    """
    index = read_model_index(base)
    if class_of(index) not in pipelines:
        raise ModelError(
            f"{base}: is a model for {class_of(index)}, and {family} needs one for {' or '.join(pipelines)}. "
            "Set model_family to that model's family, or give another model."
        )
    return index


def transformer_of(model: ModelConfig, base: ModelSource) -> Component:
    """The transformer, from where the user says or from the base model."""
    return swapped_or_own(
        "transformer",
        base,
        key="pretrained_transformer_model_name_or_path",
        where=model.pretrained_transformer_model_name_or_path,
        subfolder=model.pretrained_transformer_subfolder,
    )


def vae_of(model: ModelConfig, base: ModelSource) -> Component:
    """The VAE, from where the user says or from the base model."""
    return swapped_or_own(
        "vae",
        base,
        key="pretrained_vae_model_name_or_path",
        where=model.pretrained_vae_model_name_or_path,
        subfolder=model.pretrained_vae_subfolder,
    )


def swapped_or_own(
    name: str, base: ModelSource, *, key: str, where: str | None, subfolder: str | None
) -> Component:
    """A component from where the user says, else from the base model; revision and variant are the base's.

    A single file takes its configuration from the base model.
    """
    if where is None:
        return find_component(name, base, kind="diffusers", strict_variant=name in ("unet", "transformer"))
    source = ModelSource(where, key=key)
    if source.is_file:
        return find_in_file(name, source, prefix=PREFIXES[name], configuration=base)
    if subfolder is None:
        subfolder = guess_subfolder(source, usual=name)
    return find_component(name, source, kind="diffusers", subfolder=subfolder)


def check_classes(expected: Mapping[str, Component], *, family: str) -> None:
    """Refuse a component whose configuration names another class.

    Args:
        expected: Class name -> component.
        family: As it is called in messages.

    Raises:
        ModelError: One is of another class.
    """
    for class_name, component in expected.items():
        if (found := class_of(component.config)) != class_name:
            raise ModelError(
                f"{component.source}: component {component.name} in {component.folder} is {found}, and "
                f"{family} needs {class_name}. Give a {family} model, or set model_family to this model's."
            )


def check_number(component: Component, name: str, *, needed: int, what: str) -> None:
    """Refuse a component that does not fit the others.

    Args:
        component: Has the number.
        name: Of the number in its configuration.
        needed: What the number must be.
        what: What is as large as that, for the message.

    Raises:
        ModelError: The number is another one.
    """
    if (found := number(component, name)) != needed:
        raise ModelError(
            f"{component.source}: {name} of {component.name} is {found}, and the {what} is {needed}. "
            "Give the parts of one model."
        )


def number(component: Component, name: str) -> int:
    """A whole number in a component's configuration.

    Raises:
        ModelError: It is not there.
    """
    value = component.config.get(name)
    if not isinstance(value, int):
        raise ModelError(
            f"{component.source}: {component.folder} has no number for {name} (found {value!r}). "
            "Give a complete model."
        )
    return value
