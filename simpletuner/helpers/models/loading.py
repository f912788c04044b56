"""Finds and loads the components of a model in the diffusers layout, from a folder or a repository.

Every component is resolved to local files before it is loaded, so a cached repository needs no request.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import diffusers.utils.logging as diffusers_logging
import torch
import transformers.utils.logging as transformers_logging
import xxhash
from safetensors import SafetensorError
from torch import nn

from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.io.names import one_line_reason
from simpletuner.helpers.io.safetensors_file import read_header
from simpletuner.helpers.models import hub
from simpletuner.helpers.models.single_file import (
    SUFFIX,
    SingleFile,
    cached_file_digest,
    hash_file,
    load_single_file,
)
from simpletuner.helpers.models.weights_on_disk import own_shapes

logger = logging.getLogger(__name__)

ComponentType = Literal["diffusers", "transformers", "tokenizer", "scheduler", "configuration"]
Config = Mapping[str, object]
Found = TypeVar("Found")
Model = TypeVar("Model", bound=nn.Module)

CONFIG_NAMES: Mapping[ComponentType, str] = {
    "diffusers": "config.json",
    "transformers": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
    "configuration": "config.json",  # its weights are in a single file
}
WEIGHT_STEMS: Mapping[ComponentType, str] = {
    "diffusers": "diffusion_pytorch_model",
    "transformers": "model",
}
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
CHAT_TEMPLATE = "chat_template.jinja"
"""Only tokenizers of chat models have one."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A folder, file or repository that holds a model."""

    where: str
    """Path, or name of a repository."""
    key: str = "pretrained_model_name_or_path"
    """Configuration key of this source, for messages."""
    revision: str | None = None
    variant: str | None = None
    """Preferred variant of the weight files, for instance fp16; None: without a variant."""

    @property
    def is_local(self) -> bool:
        """Whether it is a local path."""
        return Path(self.where).exists()

    @property
    def is_file(self) -> bool:
        """Whether it is a single .safetensors file."""
        return self.where.endswith(SUFFIX) and Path(self.where).is_file()

    def __str__(self) -> str:
        return f"{self.key} {self.where}"


@dataclass(frozen=True, slots=True)
class Component:
    """One component of a model, with all its files on this machine."""

    name: str
    source: ModelSource
    folder: Path
    config: Config
    """Empty for a tokenizer without one."""
    files: tuple[Path, ...]
    """Configuration, weights, vocabulary: the identity depends on them."""
    variant: str | None = None
    commit: str | None = None
    """Commit of the repository; None for a local folder."""
    single_file: SingleFile | None = None
    """File with the weights; None: they are in the folder."""

    def num_weights(self) -> int:
        """Number of values in its weight files, from their headers.

        Raises:
            ModelError: A file is no safetensors file.
        """
        headers = [read_header(file, error=ModelError) for file in self.files if file.suffix == SUFFIX]
        prefix = "" if self.single_file is None else self.single_file.prefix
        return sum(math.prod(shape) for header in headers for shape in own_shapes(header, prefix=prefix))

    def identity(self) -> str:
        """Text that changes with the component's content: the commit, or a hash of all files."""
        if self.commit is not None:
            return (
                f"{self.name}={self.source.where}@{self.commit}/{self.folder.name}:{self.variant or 'plain'}"
            )
        digest = xxhash.xxh3_128()
        for file in sorted(self.files):
            state = file.stat()
            digest.update(f"{file.name}\x1f{state.st_size}\x1f".encode())
            if self.single_file is not None and file == self.single_file.path:
                digest.update(cached_file_digest(file, state.st_size, state.st_mtime_ns).encode())
            else:
                hash_file(file, digest)
        return f"{self.name}={digest.hexdigest()}"


def read_model_index(source: ModelSource) -> Config:
    """Read the model_index.json of a model.

    Raises:
        ModelError: The source is missing, a single file or a single component.
    """
    path = Path(source.where)
    if path.is_file():
        raise ModelError(
            f"{source} is a file; this family reads only denoiser and VAE from single files. Give a model "
            "folder in the diffusers layout (with model_index.json) or a repository."
        )
    root, index = search(source, ["model_index.json"], look=_file("model_index.json"))
    if index is not None:
        return read_config(index)
    if (config := root / "config.json").is_file():
        found = f"holds a single component ({class_of(read_config(config))}), not a model"
    else:
        found = "has no model_index.json"
    raise ModelError(f"{source} {found}. Give the folder or repository that holds model_index.json.")


def find_component(
    name: str,
    source: ModelSource,
    *,
    component_type: ComponentType,
    subfolder: str | None = None,
    strict_variant: bool = False,
) -> Component:
    """Find one component with all its files; missing files of a repository are downloaded.

    Args:
        name: The component's name in model_index.json.
        source: The model or component.
        component_type: Decides which files the component has.
        subfolder: Folder of the component, by default its name; "" is the source's own folder.
        strict_variant: Refuse weights without a variant if the source has one.

    Raises:
        ModelError: A file is missing, or the repository is unreachable.
    """
    wanted = _Wanted(name, source, component_type, name if subfolder is None else subfolder)
    has_weights = component_type in WEIGHT_STEMS
    variants = [source.variant] if has_weights else [None]
    if has_weights and source.variant is not None and not strict_variant:
        variants.append(None)
    for variant in variants:
        root, found = search(source, wanted.patterns(variant), look=partial(wanted.found_in, variant=variant))
        if found is not None:
            if has_weights and variant != source.variant:
                logger.warning(
                    "%s: %s has no %s weights; using those without a variant.", source, name, source.variant
                )
            return found
    raise ModelError(wanted.missing_in(root))


def find_in_file(name: str, file: ModelSource, *, prefix: str, configuration: ModelSource) -> Component:
    """Find one component with its weights in a single file and its configuration in a model.

    Args:
        name: The component's name.
        file: The .safetensors file.
        prefix: Prefix of the component's tensors in a file with several components.
        configuration: Model with the component's configuration; its weights are not downloaded.

    Raises:
        ModelError: The configuration is missing, or the repository is unreachable.
    """
    found = find_component(name, configuration, component_type="configuration")
    path = Path(file.where)
    weights = SingleFile(path, prefix)
    return replace(found, source=file, files=(path, *found.files), commit=None, single_file=weights)


def guess_subfolder(source: ModelSource, *, usual: str) -> str:
    """The usual subfolder if the source is a model, "" if it is the component itself."""
    patterns = ["config.json", f"{usual}/config.json"]
    root, config = search(source, patterns, look=_file("config.json"))
    return "" if config is not None and not (root / usual).is_dir() else usual


def load_weights(model_class: type[Model], component: Component, *, dtype: torch.dtype) -> Model:
    """Load a diffusers or transformers model from safetensors files, silently, in eval mode.

    Raises:
        ModelError: A weight file is damaged, incomplete, or of another architecture.
    """
    if component.single_file is not None:
        with quiet():
            return load_single_file(model_class, component.single_file, folder=component.folder, dtype=dtype)
    loader: Any = model_class
    try:
        with quiet():
            model, info = loader.from_pretrained(
                str(component.folder),
                variant=component.variant,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"{component.source}: {component.folder} cannot be loaded as {model_class.__name__}: "
            f"{one_line_reason(error)}. Download the model again, or give a model of this family."
        ) from error
    if missing := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise ModelError(
            f"{component.source}: {component.folder} lacks {len(missing)} of the weights of "
            f"{model_class.__name__}, for instance {missing[0]}. Download it again, or give another one."
        )
    return cast(Model, model.eval())


@contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars and warnings of diffusers and transformers within the context."""
    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    bars = diffusers_logging.is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled()
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level, bar in zip((diffusers_logging, transformers_logging), levels, bars, strict=True):
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()


def read_config(path: Path) -> Config:
    """Read the object in a JSON file.

    Raises:
        ModelError: The file is unreadable or holds no JSON object.
    """
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not readable JSON: {error}. Download the model again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds {type(content).__name__}, not an object. Download the model again.")
    return content


def class_of(config: Config) -> str:
    """Class name in a component's configuration, of diffusers or transformers."""
    if isinstance(name := config.get("_class_name"), str):
        return name
    match config.get("architectures"):
        case [str(first), *_]:
            return first
    return "an unknown class"


def search(
    source: ModelSource, patterns: Sequence[str], *, look: Callable[[Path], Found | None]
) -> tuple[Path, Found | None]:
    """Call `look` on the local folder, else on the cached snapshot, else on the downloaded one.

    Returns the last folder and the result.
    """
    if source.is_local:
        return (root := Path(source.where)), look(root)
    where, revision, key = source.where, source.revision, source.key
    root_or_none = hub.cached(where, revision=revision, patterns=patterns, key=key)
    if root_or_none is not None and (found := look(root_or_none)) is not None:
        return root_or_none, found
    root = hub.downloaded(where, revision=revision, patterns=patterns, key=key)
    return root, look(root)


def _file(name: str) -> Callable[[Path], Path | None]:
    def look(root: Path) -> Path | None:
        return path if (path := root / name).is_file() else None

    return look


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A component to find."""

    name: str
    source: ModelSource
    component_type: ComponentType
    subfolder: str

    def found_in(self, root: Path, variant: str | None) -> Component | None:
        """The component in the folder of a model; None if a file is missing."""
        folder = root / self.subfolder
        config_file = folder / CONFIG_NAMES[self.component_type]
        content = self._content_files(folder, variant)
        has_config = config_file.is_file()
        if content is None or not (has_config or self.component_type == "tokenizer"):
            return None
        return Component(
            name=self.name,
            source=self.source,
            folder=folder,
            config=read_config(config_file) if has_config else {},
            files=(*content, *((config_file,) if has_config else ())),
            variant=variant,
            commit=None if self.source.is_local else root.name,
        )

    def _content_files(self, folder: Path, variant: str | None) -> tuple[Path, ...] | None:
        """Weights or vocabulary; None if a file is missing."""
        if self.component_type == "tokenizer":
            for names in TOKENIZER_FILES:
                if all((folder / name).is_file() for name in names):
                    template = [folder / CHAT_TEMPLATE] if (folder / CHAT_TEMPLATE).is_file() else []
                    return (*(folder / name for name in names), *template)
            return None
        if self.component_type not in WEIGHT_STEMS:
            return ()
        stem, infix = self._weight_names(variant)
        if (single := folder / f"{stem}{infix}.safetensors").is_file():
            return (single,)
        if not (index := folder / f"{stem}.safetensors.index{infix}.json").is_file():
            return None
        weight_map = cast("Mapping[str, str]", read_config(index).get("weight_map", {}))
        shards = tuple(folder / name for name in sorted(set(weight_map.values())))
        return (index, *shards) if shards and all(shard.is_file() for shard in shards) else None

    def patterns(self, variant: str | None) -> list[str]:
        """Patterns of the component's files in a repository."""
        names = [CONFIG_NAMES[self.component_type]]
        if self.component_type == "tokenizer":
            names += [
                "tokenizer.json",
                "vocab.json",
                "merges.txt",
                "special_tokens_map.json",
                "added_tokens.json",
                CHAT_TEMPLATE,
            ]
        if self.component_type in WEIGHT_STEMS:
            stem, infix = self._weight_names(variant)
            part = "-" + "[0-9]" * 5 + "-of-" + "[0-9]" * 5
            names += [f"{stem}{infix}.safetensors", f"{stem}.safetensors.index{infix}.json"]
            # Two spellings are in use for the shards of a variant.
            names += [f"{stem}{infix}{part}.safetensors", f"{stem}{part}{infix}.safetensors"]
        return [f"{self.subfolder}/{name}" if self.subfolder else name for name in dict.fromkeys(names)]

    def _weight_names(self, variant: str | None) -> tuple[str, str]:
        return WEIGHT_STEMS[self.component_type], f".{variant}" if variant else ""

    def missing_in(self, root: Path) -> str:
        """Error message for a folder without the complete component."""
        folder = root / self.subfolder
        where = f"{self.source}: component {self.name}"
        if not folder.is_dir():
            return (
                f"{where} is missing: there is no folder {self.subfolder}. Give a complete diffusers model "
                "folder."
            )
        present = sorted(file.name for file in folder.iterdir() if file.is_file())
        listing, place = ", ".join(present[:8]) or "no file", self.subfolder or "the folder"
        needed = CONFIG_NAMES[self.component_type]
        if self.component_type in WEIGHT_STEMS and needed in present:
            stem, infix = self._weight_names(self.source.variant)
            pickled = any(file.endswith((".bin", ".ckpt", ".pt", ".pth")) for file in present)
            note = " Pickle files are never loaded: convert them to safetensors." if pickled else ""
            return f"{where} lacks weights: {place} holds {listing}, but not {stem}{infix}.safetensors.{note}"
        if self.component_type == "tokenizer":
            needed = "tokenizer.json or vocab.json with merges.txt"
        return f"{where} is incomplete: {place} holds {listing}, but not {needed}."
