"""A configuration over folders of images that have every problem, written as a user writes it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

NAME = "<b>wide & odd</b>.png"
JAPANESE = "空を飛ぶ猫、青い空"


def scene(seed: int, width: int = 128, height: int = 128) -> Image.Image:
    """Blocks of random greys under fine noise: sharp, and unlike every other seed's."""
    rng = np.random.default_rng(seed)
    blocks = Image.fromarray(rng.integers(40, 216, (6, 6), dtype=np.uint8)).resize((width, height))
    noise = rng.normal(0, 12, (height, width, 3))
    return Image.fromarray((np.asarray(blocks)[..., None] + noise).clip(0, 255).astype(np.uint8))


def save(image: Image.Image, file: Path, caption: str | None = None) -> None:
    """Save an image, with its caption beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)
    if caption is not None:
        file.with_suffix(".txt").write_text(caption, encoding="utf-8")


def write_run(folder: Path, *datasets: dict[str, object], **keys: object) -> Path:
    """The config.json of a run over these datasets; keyword arguments are its keys."""
    config = {
        "model_family": "sdxl",
        "lora_type": "standard",
        "data_backend_config": "data.json",
        "output_dir": "output",
        "cache_dir_vae": "cache/vae",
        "cache_dir_text": "cache/text",
        "resolution": 128,
        "aspect_bucket_alignment": 64,
        "train_batch_size": 2,
        "max_train_steps": 4,
        "learning_rate": 1e-4,
        "validation_disable": True,
        "seed": 7,
        **keys,
    }
    (folder / "data.json").write_text(json.dumps(datasets), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder / "config.json"


def write_problems(folder: Path) -> Path:
    """A config.json whose two datasets have each finding once or more."""
    images = folder / "images"
    save(scene(1), images / "first.png", "sks cat, sitting, indoors")
    (images / "copy.png").write_bytes((images / "first.png").read_bytes())
    (images / "copy.txt").write_text("sks cat, again, outdoors")
    scene(1).save(images / "pixels.tif")
    (images / "pixels.txt").write_text("sks cat, once more, sky")
    smaller = scene(2).resize((96, 96))
    save(scene(2), images / "large.png", "sks cat, large, tree")
    save(smaller, images / "small.png", "sks cat, small, tree")
    save(scene(3).filter(ImageFilter.GaussianBlur(8)), images / "soft.png", JAPANESE)
    save(Image.new("RGB", (128, 128), "grey"), images / "grey.png", "")
    save(scene(4, 640, 128), images / NAME, "sks cat, wide, grass")
    save(scene(5), images / "same caption.png", "sks cat, wide, grass")
    save(scene(6), images / "damaged.png", "sks cat")
    data = (images / "damaged.png").read_bytes()
    (images / "damaged.png").write_bytes(data[: len(data) // 2])
    (images / "no image.png").write_bytes(b"<html></html>")
    (images / "alone.txt").write_text("nothing has my name")
    for number, mask in enumerate((255, 0)):
        save(scene(10 + number), folder / "masked" / f"{number}.png", f"sks dog {number}")
        save(Image.new("L", (128, 128), mask), folder / "masks" / f"{number}.png")
    return write_run(
        folder,
        {
            "id": "cats",
            "instance_data_dir": "images",
            "crop": True,
            "crop_style": "random",
            "instance_prompt": "sks",
            "repeats": 1,
        },
        {
            "id": "dogs",
            "instance_data_dir": "masked",
            "conditioning_data": "masks",
            "is_regularisation_data": True,
            "instance_prompt": "sks",
        },
        {
            "id": "masks",
            "dataset_type": "conditioning",
            "conditioning_type": "mask",
            "instance_data_dir": "masks",
        },
    )
