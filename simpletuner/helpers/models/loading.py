"""The parts of a model in the diffusers layout: found in a folder or a repository, checked, then loaded.

Everything is resolved to files on this machine first, so that one place explains what is missing and so that
a cached repository is used without any request.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, TypeVar, cast

import diffusers.utils.logging as diffusers_logging
import torch
import transformers.utils.logging as transformers_logging
import xxhash
from safetensors import SafetensorError
from torch import nn

from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models import hub
from simpletuner.helpers.models.single_file import SUFFIX, SingleFile, content_digest, load_single_file

logger = logging.getLogger(__name__)

ComponentKind = Literal["diffusers", "transformers", "tokenizer", "scheduler", "configuration"]
Config = Mapping[str, object]
Found = TypeVar("Found")

CONFIG_NAMES: Mapping[ComponentKind, str] = {
    "diffusers": "config.json",
    "transformers": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
    "configuration": "config.json",  # of a model whose weights are elsewhere
}
WEIGHT_STEMS: Mapping[ComponentKind, str] = {
    "diffusers": "diffusion_pytorch_model",
    "transformers": "model",
}
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
CHAT_TEMPLATE = "chat_template.jinja"
"""Of a tokenizer whose model takes conversations; the others have none."""
HASH_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model comes from."""

    where: str
    """An existing folder, or the name of a repository."""
    key: str = "pretrained_model_name_or_path"
    """The configuration key that named it, for messages."""
    revision: str | None = None
    variant: str | None = None
    """Which weight files are preferred, for instance fp16. None takes the plain ones."""

    @property
    def is_local(self) -> bool:
        """Whether where names something on this machine."""
        return Path(self.where).exists()

    @property
    def is_file(self) -> bool:
        """Whether it is a single .safetensors file."""
        return self.where.endswith(SUFFIX) and Path(self.where).is_file()

    def __str__(self) -> str:
        return f"{self.key} {self.where}"


@dataclass(frozen=True, slots=True)
class Component:
    """One part of a model, found on this machine with all its files."""

    name: str
    source: ModelSource
    folder: Path
    config: Config
    """Empty for a tokenizer that has none."""
    files: tuple[Path, ...]
    """What the identity depends on: configuration, weights, vocabulary."""
    variant: str | None = None
    commit: str | None = None
    """Of the repository; None for a local folder."""
    single_file: SingleFile | None = None
    """Where the weights are; None when they are in the folder."""

    def identity(self) -> str:
        """A text that changes with the component's content: a commit, or a hash of every file's bytes."""
        if self.commit is not None:
            return (
                f"{self.name}={self.source.where}@{self.commit}/{self.folder.name}:{self.variant or 'plain'}"
            )
        digest = xxhash.xxh3_128()
        for file in sorted(self.files):
            state = file.stat()
            digest.update(f"{file.name}\x1f{state.st_size}\x1f".encode())
            if self.single_file is not None and file == self.single_file.path:
                digest.update(content_digest(file, state.st_size, state.st_mtime_ns).encode())
                continue
            with file.open("rb") as stream:
                while chunk := stream.read(HASH_CHUNK_BYTES):
                    digest.update(chunk)
        return f"{self.name}={digest.hexdigest()}"


def read_model_index(source: ModelSource) -> Config:
    """The model_index.json of a model.

    Raises:
        ModelError: There is no model, or it is a single file or a single component.
    """
    path = Path(source.where)
    if path.is_file():
        raise ModelError(
            f"{source}: is a file, and this family takes only its denoiser and VAE from single files. Give a "
            "model folder in the diffusers layout (with model_index.json) or a repository."
        )
    root, index = _search(source, ["model_index.json"], look=_file("model_index.json"))
    if index is not None:
        return read_json(index)
    if (config := root / "config.json").is_file():
        found = f"holds a single component ({class_of(read_json(config))}), not a whole model"
    else:
        found = "has no model_index.json, so it is not a model in the diffusers layout"
    raise ModelError(f"{source}: {found}. Give the folder or repository that holds model_index.json.")


def find_component(
    name: str,
    source: ModelSource,
    *,
    kind: ComponentKind,
    subfolder: str | None = None,
    strict_variant: bool = False,
) -> Component:
    """Locate one component and check that all its files are there; a repository is downloaded as needed.

    Args:
        name: The component's name in model_index.json, and its folder's unless subfolder says otherwise.
        source: Where to look.
        kind: Which files it has.
        subfolder: "" is the source's own folder.
        strict_variant: Refuse plain weights when the source asks for a variant.

    Raises:
        ModelError: A file is missing, or the repository cannot be reached.
    """
    subfolder = name if subfolder is None else subfolder
    variants = [source.variant] if strict_variant or source.variant is None else [source.variant, None]
    for variant in variants if kind in WEIGHT_STEMS else [None]:

        def look(root: Path, variant: str | None = variant) -> Component | None:
            return _component_at(
                root, name=name, source=source, kind=kind, subfolder=subfolder, variant=variant
            )

        root, found = _search(source, _patterns(kind, subfolder, variant), look=look)
        if found is not None:
            if variant != source.variant and kind in WEIGHT_STEMS:
                logger.warning(
                    "%s: %s has no %s weights; its plain ones are used.", source, name, source.variant
                )
            return found
    raise ModelError(_what_is_missing(root, name=name, source=source, kind=kind, subfolder=subfolder))


def find_in_file(
    name: str,
    file: ModelSource,
    *,
    prefix: str,
    configuration: ModelSource,
    subfolder: str | None = None,
) -> Component:
    """One component whose weights are in a single file and whose configuration is a model's.

    Args:
        name: The component's name.
        file: The .safetensors file.
        prefix: Of the component's tensors in a file that holds others too.
        configuration: The model that states its shape; its weights are not fetched.
        subfolder: Of that model; None is the component's name.

    Raises:
        ModelError: The configuration is missing, or the repository cannot be reached.
    """
    found = find_component(name, configuration, kind="configuration", subfolder=subfolder)
    path = Path(file.where)
    weights = SingleFile(path, prefix)
    return replace(found, source=file, files=(path, *found.files), commit=None, single_file=weights)


def guess_subfolder(source: ModelSource, *, usual: str) -> str:
    """The usual subfolder if the source is a whole model, "" if it is the component itself."""
    patterns = ["config.json", f"{usual}/config.json"]
    root, config = _search(source, patterns, look=_file("config.json"))
    return "" if config is not None and not (root / usual).is_dir() else usual


class Loadable(Protocol):
    """A model class of diffusers or transformers."""

    __name__: str

    def from_pretrained(
        self, path: str, **options: object
    ) -> tuple[nn.Module, Mapping[str, Sequence[object]]]:
        """The model and, with output_loading_info, which weights did not fit."""


def load_weights(model_class: Loadable, component: Component, *, dtype: torch.dtype) -> nn.Module:
    """Load a diffusers or transformers model from safetensors files only, silently, in eval mode.

    Raises:
        ModelError: A weight file is damaged, incomplete, or of another architecture.
    """
    if component.single_file is not None:
        with quiet():
            return load_single_file(model_class, component.single_file, folder=component.folder, dtype=dtype)
    try:
        with quiet():
            model, info = model_class.from_pretrained(
                str(component.folder),
                variant=component.variant,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{component.source}: {component.folder} cannot be loaded as {model_class.__name__}: {reason}. "
            "Fetch the model again, or give the folder of one that this family can use."
        ) from error
    if missing := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise ModelError(
            f"{component.source}: {component.folder} lacks {len(missing)} of the weights of "
            f"{model_class.__name__}, for instance {missing[0]}. Fetch the model again, or give another one."
        )
    return model.eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and warnings of diffusers and transformers, then put them back."""
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


def read_json(path: Path) -> Config:
    """The object in a json file.

    Raises:
        ModelError: It is not a json object.
    """
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as json: {error}. Fetch the model again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: holds {type(content).__name__}, not an object. Fetch the model again.")
    return content


def class_of(config: Config) -> str:
    """The class that a component's configuration names, as written by diffusers or transformers."""
    if isinstance(name := config.get("_class_name"), str):
        return name
    match config.get("architectures"):
        case [str(first), *_]:
            return first
    return "of an unknown class"


def _search(
    source: ModelSource, patterns: Sequence[str], *, look: Callable[[Path], Found | None]
) -> tuple[Path, Found | None]:
    """Where look looked and what it found: in a local folder, else in the cache, else after a download."""
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


def _component_at(
    root: Path, *, name: str, source: ModelSource, kind: ComponentKind, subfolder: str, variant: str | None
) -> Component | None:
    folder = root / subfolder
    config_file = folder / CONFIG_NAMES[kind]
    content = _content_files(folder, kind, variant)
    if content is None or not (config_file.is_file() or kind == "tokenizer"):
        return None
    has_config = config_file.is_file()
    return Component(
        name=name,
        source=source,
        folder=folder,
        config=read_json(config_file) if has_config else {},
        files=(*content, *((config_file,) if has_config else ())),
        variant=variant,
        commit=None if source.is_local else root.name,
    )


def _content_files(folder: Path, kind: ComponentKind, variant: str | None) -> tuple[Path, ...] | None:
    """The weights or vocabulary of a component; None when they are not complete."""
    if kind in ("scheduler", "configuration"):
        return ()
    if kind == "tokenizer":
        for names in TOKENIZER_FILES:
            if all((folder / name).is_file() for name in names):
                template = [folder / CHAT_TEMPLATE] if (folder / CHAT_TEMPLATE).is_file() else []
                return (*(folder / name for name in names), *template)
        return None
    stem, infix = WEIGHT_STEMS[kind], f".{variant}" if variant else ""
    if (single := folder / f"{stem}{infix}.safetensors").is_file():
        return (single,)
    if not (index := folder / f"{stem}.safetensors.index{infix}.json").is_file():
        return None
    weight_map = cast("Mapping[str, str]", read_json(index).get("weight_map", {}))
    shards = tuple(folder / name for name in sorted(set(weight_map.values())))
    return (index, *shards) if shards and all(shard.is_file() for shard in shards) else None


def _patterns(kind: ComponentKind, subfolder: str, variant: str | None) -> list[str]:
    """Which files of a repository a component needs."""
    names = [CONFIG_NAMES[kind]]
    if kind == "tokenizer":
        names += [
            "tokenizer.json",
            "vocab.json",
            "merges.txt",
            "special_tokens_map.json",
            "added_tokens.json",
            CHAT_TEMPLATE,
        ]
    if kind in WEIGHT_STEMS:
        stem, infix = WEIGHT_STEMS[kind], f".{variant}" if variant else ""
        part = "-" + "[0-9]" * 5 + "-of-" + "[0-9]" * 5
        names += [f"{stem}{infix}.safetensors", f"{stem}.safetensors.index{infix}.json"]
        # Two spellings are in use for the shards of a variant.
        names += [f"{stem}{infix}{part}.safetensors", f"{stem}{part}{infix}.safetensors"]
    return [f"{subfolder}/{name}" if subfolder else name for name in dict.fromkeys(names)]


def _what_is_missing(
    root: Path, *, name: str, source: ModelSource, kind: ComponentKind, subfolder: str
) -> str:
    folder = root / subfolder
    where = f"{source}: component {name}"
    if not folder.is_dir():
        return f"{where} is missing: there is no folder {subfolder}. Give a complete diffusers model folder."
    present = sorted(file.name for file in folder.iterdir() if file.is_file())
    listing, place = ", ".join(present[:8]) or "nothing", subfolder or "the folder"
    if kind in WEIGHT_STEMS and CONFIG_NAMES[kind] in present:
        wanted = f"{WEIGHT_STEMS[kind]}{f'.{source.variant}' if source.variant else ''}.safetensors"
        pickled = any(file.endswith((".bin", ".ckpt", ".pt", ".pth")) for file in present)
        note = " Pickle files are never loaded: convert them to safetensors." if pickled else ""
        return f"{where} has no complete weights: {place} holds {listing}, but not {wanted}.{note}"
    wanted = "tokenizer.json or vocab.json with merges.txt" if kind == "tokenizer" else CONFIG_NAMES[kind]
    return f"{where} is incomplete: {place} holds {listing}, but not {wanted}."
