"""The folder of a run as a run leaves it, without training anything."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NASTY = "</script><script>alert('x')</script> \"sks\" & <b>cat</b>"
SECRET = "hf_abcdefghijklmnopqrstuvwx"
BANDS = ("0-500", "500-800", "800-1000")


@dataclass
class SyntheticRun:
    """A run of so many steps and validations over T-LoRA at rank 64."""

    folder: Path
    steps: int = 50
    validations: int = 2
    prompts: tuple[str, ...] = (NASTY, "a dog")
    picture_px: int = 32
    config: dict[str, Any] = field(default_factory=dict)

    def write(self) -> Path:
        """Write everything; returns the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "metrics.jsonl").open("w") as log:
            log.writelines(f"{json.dumps(line)}\n" for line in map(record, range(1, self.steps + 1)))
        shots = [self._pictures(index, prompt) for index, prompt in enumerate(self.prompts)]
        self.json("config.resolved.json", CONFIG | self.config)
        self.json("run.json", FACTS | {"shots": shots, "max_steps": self.steps * 2})
        (self.folder / "pytorch_lora_weights.safetensors").write_bytes(b"")
        return self.folder

    def json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write one file."""
        (self.folder / name).write_text(json.dumps(content))

    def _pictures(self, index: int, prompt: str) -> dict[str, Any]:
        name = f"{index:02d}-prompt-{self.picture_px}x{self.picture_px}-seed1"
        base = self.folder / "validation" / "base" / f"{name}-0123456789abcdef.png"
        base.parent.mkdir(parents=True, exist_ok=True)
        shape = (self.picture_px, self.picture_px, 3)
        pixels = np.random.default_rng(index).integers(0, 255, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(base, compress_level=1)
        for number in range(1, self.validations + 1):
            folder = self.folder / "validation" / f"step-{number * self.steps // self.validations}"
            folder.mkdir(exist_ok=True)
            shutil.copy(base, folder / f"{name}.png")
        size = f"{self.picture_px}x{self.picture_px}"
        return {"name": name, "prompt": prompt, "size": size, "seed": 1, "base": base.name, "other": None}


def record(step: int) -> dict[str, Any]:
    """One line of the log."""
    noise = random.Random(step)
    loss = 0.1 * math.exp(noise.gauss(0, 0.5))
    band = noise.choice(BANDS)
    return {
        "step": step,
        "epoch": step // 10,
        "loss": loss,
        "lr": 1e-4,
        "grad_norm": noise.random(),
        "mean_active_rank": 64 * noise.random(),
        "samples": 4 * step,
        "seconds": 0.5,
        "loss_by_band": {each: loss if each == band else None for each in BANDS},
        "memory_mib": 2048.0,
        "device_memory_mib": None,
    }


CONFIG: dict[str, Any] = {
    "lora_type": "lycoris",
    "lycoris_config": {"algo": "tlora", "linear_dim": 64, "linear_alpha": 64, "tlora_min_rank": 4},
    "pretrained_model_name_or_path": "owner/model",
    "learning_rate": 1e-4,
    "hub_token": "not-to-be-seen",
    "note": f"{NASTY} {SECRET} s3://user:password@host/x",
    "validation_num_inference_steps": 3,
    "validation_guidance": 5.0,
    "seed": 1,
    "data_backend_config": [
        {
            "id": "cats",
            "instance_data_dir": str(Path.home() / "pictures" / "cats"),
            "resolution": 64.0,
            "resolution_type": "pixel",
            "repeats": 2,
            "instance_prompt": NASTY,
        }
    ],
}
FACTS: dict[str, Any] = {
    "version": 1,
    "changed_keys": ["learning_rate"],
    "adapter": {
        "kind": "tlora",
        "layers": 3,
        "parameters": 1234567,
        "schedule": {"max_rank": 64, "min_rank": 4, "alpha": 1.0, "schedule": "floor", "num_timesteps": 1000},
        "ranks": [[0, 64], [1, 40], [500, 20], [1000, 4]],
    },
    "datasets": [
        {
            "id": "cats",
            "images": 7,
            "without_caption": 1,
            "distinct_captions": 5,
            "buckets": {"64x64": 4, "32x128": 3},
            "originals": ["64x64", "640x480"],
            "captions": [["a.png", NASTY]],
            "num_skipped": 2,
            "skipped": [[f"{NASTY}.png", "it cannot be decoded"]],
        }
    ],
    "environment": {"python": "3.11", "torch": "2.13", "device": "cpu", "processes": 1, "CUDA": None},
    "compared_with": None,
}


class Page(HTMLParser):
    """What a browser would make of a page: its elements, its text, and whether every element is closed."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "wbr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID and tag != "path":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if "script" in self._open:
            self.scripts.append(data)
        elif "style" not in self._open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every element of a kind, in order."""
        return [attributes for name, attributes in self.elements if name == tag]


def code_of(html: str, anchor: str) -> str:
    """The text of a code block, as one would copy it."""
    parts = html.partition(f'<pre id="{anchor}"><code>')[2].partition("</code></pre>")[0]
    return Page(f"<p>{parts}</p>").text
