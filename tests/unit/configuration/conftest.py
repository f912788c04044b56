"""A folder with a small, valid configuration that a test changes in one place."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.configuration.schema.sections import RunConfig
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.errors import ConfigError

SPEC = ModelSpec(
    name="toy",
    flavours={"small": "somebody/toy-small", "large": "somebody/toy-large"},
    default_flavour="small",
    prediction_types=("v_prediction", "epsilon"),
    pixel_alignment=32,
    minimum_alignment=8,
    default_resolution=512,
    lora_targets=("to_q", "to_v"),
    num_text_encoders=2,
    text_encoder_lora_targets=("q_proj", "v_proj"),
)

Json = dict[str, object]


@dataclass
class Workspace:
    """Three files in a folder that is also the working directory."""

    folder: Path
    families: Mapping[str, ModelSpec] = field(default_factory=lambda: {"toy": SPEC})
    config: Json = field(default_factory=dict)
    lycoris: Json = field(default_factory=dict)
    datasets: list[object] = field(default_factory=list)

    def write(self) -> Path:
        """Write the three files; the path of config.json."""
        self.text("config.json", json.dumps(self.config))
        self.text("lycoris.json", json.dumps(self.lycoris))
        self.text("data.json", json.dumps(self.datasets))
        return self.folder / "config.json"

    def text(self, name: str, text: str) -> Path:
        """Write one file as it is."""
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return path

    def load(self, *overrides: str, **changes: object) -> RunConfig:
        """Load with these keys of config.json changed and these arguments of the command line."""
        self.config |= changes
        return self.load_as_written(*overrides, path=self.write())

    def load_as_written(self, *overrides: str, path: Path | None = None) -> RunConfig:
        """Load what is on disk."""
        return load_config(path or Path("config.json"), overrides=overrides, families=self.families)

    def problems(self, *overrides: str, **changes: object) -> str:
        """The message of the error that loading ends in."""
        with pytest.raises(ConfigError) as caught:
            self.load(*overrides, **changes)
        return str(caught.value)

    def dataset_problems(self, *entries: object, number: int = 1, **config: object) -> str:
        """The message for a dataset json of these entries, which lists this number of problems."""
        self.datasets = list(entries)
        self.config |= config
        message = self.problems()
        assert sum(map(int, re.findall(r": (\d+) problem", message))) == number, message
        return message

    def without(self, *keys: str) -> Workspace:
        """Take keys out of config.json."""
        for key in keys:
            del self.config[key]
        return self

    def image_folder(self, name: str, files: Sequence[str] = ("a.png",)) -> Path:
        """A folder of files that have an image's name."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            (folder / file).write_bytes(b"not decoded here")
        return folder


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A valid T-LoRA configuration of the toy family with one dataset."""
    monkeypatch.chdir(tmp_path)
    made = Workspace(tmp_path)
    made.image_folder("images")
    made.config = {
        "model_family": "toy",
        "lora_type": "lycoris",
        "lycoris_config": "lycoris.json",
        "data_backend_config": "data.json",
        "max_train_steps": 10,
    }
    made.lycoris = {"algo": "tlora", "multiplier": 1.0, "linear_dim": 8, "linear_alpha": 8}
    made.datasets = [{"id": "photos", "instance_data_dir": "images"}]
    return made
