"""Configurations of other programs as their users write them, and folders of images for them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from simpletuner.helpers.configuration.migration.detection import translate
from simpletuner.helpers.configuration.migration.draft import Draft
from simpletuner.helpers.configuration.text.decisions import Decision
from simpletuner.helpers.data.preview import header_size
from simpletuner.helpers.models import registry

SQUARE = (64, 64)


def migrate(source: str | Path) -> Draft:
    """The draft that the command makes of a file or a command line."""
    return translate(str(source), specs=registry.specs(), header_size=header_size)


def decision(draft: Draft, key: str) -> Decision:
    """The only decision about a key."""
    found = [each for each in draft.decisions if each.key == key]
    assert len(found) == 1, f"{len(found)} decisions about {key}"
    return found[0]


def images(folder: Path, number: int, *, size: tuple[int, int] = SQUARE, caption: str | None = None) -> Path:
    """A folder with images, each with a caption file if there is a caption."""
    folder.mkdir(parents=True, exist_ok=True)
    start = len(list(folder.glob("*.png")))
    for index in range(start, start + number):
        Image.new("RGB", size, (index % 255, 0, 0)).save(folder / f"image{index}.png")
        if caption is not None:
            (folder / f"image{index}.txt").write_text(caption)
    return folder


def toml(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def kohya(folder: Path, script: str, options: Mapping[str, object]) -> str:
    """A command line of kohya's scripts on folders of images below `folder`."""
    given = {
        "pretrained_model_name_or_path": "stabilityai/stable-diffusion-xl-base-1.0",
        "train_data_dir": folder.as_posix(),
        "output_dir": "output",
        "output_name": "mine",
        "network_module": "networks.lora",
        "resolution": "64,64",
        "caption_extension": ".txt",
        **options,
    }
    return f"accelerate launch {script}.py {arguments(given)}"


def arguments(options: Mapping[str, object]) -> str:
    """Options as a shell has them; true is a flag, false and None are left out."""
    words: list[str] = []
    for key, value in options.items():
        if value is True:
            words.append(f"--{key}")
        elif isinstance(value, list):
            words += [f"--{key}", *(f'"{each}"' for each in value)]
        elif value is not None and value is not False:
            words.append(f'--{key}="{value}"')
    return " ".join(words)


def ai_toolkit(
    path: Path, datasets: Sequence[Mapping[str, object]], **sections: Mapping[str, object]
) -> Path:
    """A job of ai-toolkit as json."""
    process: dict[str, object] = {
        "type": "sd_trainer",
        "training_folder": "output",
        "network": {"type": "lora", "linear": 8, "linear_alpha": 8},
        "model": {"name_or_path": "stabilityai/stable-diffusion-xl-base-1.0", "arch": "sdxl"},
        "train": {"steps": 10, "batch_size": 1, "lr": 1e-4, "dtype": "bf16"},
        "datasets": list(datasets),
    }
    for name, section in sections.items():
        known = process.get(name, {})
        process[name] = {**known, **section} if isinstance(known, dict) else section
    path.write_text(json.dumps({"job": "extension", "config": {"name": "mine", "process": [process]}}))
    return path


def one_trainer(path: Path, concepts: Sequence[Mapping[str, object]], **keys: object) -> Path:
    """A configuration of OneTrainer."""
    content = {
        "training_method": "LORA",
        "model_type": "STABLE_DIFFUSION_XL_10_BASE",
        "base_model_name": "stabilityai/stable-diffusion-xl-base-1.0",
        "layer_filter_preset": "attn-mlp",
        "learning_rate": 3e-4,
        "resolution": "64",
        "concepts": list(concepts),
        "text_encoder": {"train": False},
        "text_encoder_2": {"train": False},
        **keys,
    }
    path.write_text(json.dumps(content))
    return path
