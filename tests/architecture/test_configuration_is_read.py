"""Every accepted key does something."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.architecture.package_source import Module, assert_only, modules

# "Class.field" -> what it becomes while the configuration is loaded; not read by its own name afterwards.
_OPENED = "names a file or a rule that is read while the configuration is loaded"
_ONE_VALUE = "has one value; the key is accepted because users' files have it"
READ_WHILE_LOADING: dict[str, str] = {
    "NoiseConfig.flux2_training_shift": "read by the family's spec, from a mapping",
    "AdapterConfig.flux_lora_target": "becomes peft_lora_target_modules while the configuration is loaded",
    "AdapterConfig.slider_lora_target": "becomes peft_lora_target_modules while the configuration is loaded",
    "AdapterConfig.lycoris_config": _OPENED,
    "DataConfig.aspect_bucket_alignment": "read through DataConfig.alignment",
    "DataConfig.cache_dir_vae": "read through DataConfig.latents_folder",
    "DataConfig.data_backend_config": _OPENED,
    "ConditioningConfig.dataset_type": _ONE_VALUE,
    "DatasetConfig.dataset_type": "read through DatasetConfig.is_trained",
    "ReferenceConfig.dataset_type": _ONE_VALUE,
    "DatasetConfig.cache_dir_vae": "read through DataConfig.latents_folder",
    "NoiseConfig.timestep_bias_begin": "read through biased_timesteps",
    "NoiseConfig.timestep_bias_end": "read through biased_timesteps",
    "NoiseConfig.timestep_bias_portion": "read through biased_timesteps",
    "NoiseConfig.timestep_bias_strategy": "read through biased_timesteps",
    "RunConfig.decisions": "read through translation_lines",
    "TextCacheEntry.cache_dir": _OPENED,
    "TrackingConfig.webhook_config": _OPENED,
    "PublishingConfig.model_card_safe_for_work": "read from the resolved configuration, as the command does",
    "TextCacheEntry.default": _ONE_VALUE,
    "ValidationConfig.user_prompt_library": _OPENED,
    "ValidationConfig.validation_compared_config": _OPENED,
    "ValidationConfig.validation_prompt": _OPENED,
    "ValidationConfig.validation_prompt_library": _OPENED,
}


def test_every_configuration_field_is_read_outside_configuration() -> None:
    read = {
        node.attr
        for module in modules()
        if module.folder != "configuration"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    patterns = [
        each for module in modules() if module.folder != "configuration" for each in _looked_up(module)
    ]
    looked_up = re.compile("|".join(patterns))
    fields = _fields()
    assert len(fields) > 50, "the sections were not found"
    names = {field: field.partition(".")[2] for field in fields}
    unread = {field for field, name in names.items() if name not in read and not looked_up.fullmatch(name)}
    assert_only(unread, allowed=READ_WHILE_LOADING)


def _looked_up(module: Module) -> Iterator[str]:
    """Patterns of the texts that a module makes from parts, where it looks attributes up by name."""
    nodes = list(ast.walk(module.tree))
    if not any(isinstance(node, ast.Name) and node.id == "getattr" for node in nodes):
        return
    for node in nodes:
        if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
            yield "".join(
                re.escape(str(part.value)) if isinstance(part, ast.Constant) else ".+" for part in node.values
            )


def _fields() -> set[str]:
    """Class.field of every section, which is every class that descends from Section."""
    classes = [node for module in modules() if module.folder == "configuration" for node in _classes(module)]
    sections = {"Section"}
    for _ in classes:  # once per class is enough for any order of inheritance
        sections |= {node.name for node in classes if sections & _base_names(node)}
    return {
        f"{node.name}.{statement.target.id}"
        for node in classes
        if node.name in sections - {"Section"}
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        if "ClassVar" not in ast.dump(statement.annotation)
    }


def _classes(module: Module) -> list[ast.ClassDef]:
    return [node for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)]


def _base_names(node: ast.ClassDef) -> set[str]:
    return {base.id for base in node.bases if isinstance(base, ast.Name)}
