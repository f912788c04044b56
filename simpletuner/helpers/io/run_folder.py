"""Names in the output folder of a run, with the formatting and parsing of the numbered ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

from simpletuner.helpers.contracts import Size
from simpletuner.helpers.io.names import file_name

# Written while a run is held.
LOCK_FILE = ".run.lock"
LOCK_HOLDER_FILE = ".run.holder.json"
EXIT_FILE = "exit.json"
BRANCH_FILE = "branch.json"
"""Which checkpoints were saved since the run went back to an earlier one."""
CHANGES_FILE = "changes.json"
"""What changed at which step, from one start of the run to the next."""
CONFIG_FILE = "config.resolved.json"
RUN_MANIFEST_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
"""The losses of held-out images."""
WANDB_FILE = "wandb_run.json"
WANDB_FOLDER = "wandb"
TRACKIO_FILE = "trackio_run.json"
TENSORBOARD_FOLDER = "tensorboard"
PAGE_FILE = "report.html"
PROGRESS_FILE = "progress.json"
"""Step and time left of the run, rewritten every few seconds."""
REQUESTS_FOLDER = "requests"
"""Requests that wait for the run's next optimiser step, and its answers."""
SUMMARY_FILE = "finished.json"
"""Written last; it marks the run as finished."""

# In the output folder when the run is finished, and in each checkpoint.
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
COMFYUI_FILE = "pytorch_lora_weights_comfyui.safetensors"
EMA_ADAPTER_FILE = "pytorch_lora_weights.ema.safetensors"
EMA_COMFYUI_FILE = "pytorch_lora_weights_comfyui.ema.safetensors"
COMFYUI_FILES = {ADAPTER_FILE: COMFYUI_FILE, EMA_ADAPTER_FILE: EMA_COMFYUI_FILE}
"""Adapter file -> its export for ComfyUI."""
EMBEDDING_FILE = "learned_embeds.safetensors"
EMA_EMBEDDING_FILE = "learned_embeds.ema.safetensors"
EMBEDDING_FILES = {
    ADAPTER_FILE: EMBEDDING_FILE,
    COMFYUI_FILE: EMBEDDING_FILE,
    EMA_ADAPTER_FILE: EMA_EMBEDDING_FILE,
    EMA_COMFYUI_FILE: EMA_EMBEDDING_FILE,
}
"""Adapter file or export -> the file beside it with the embeddings of the run's new token."""
EMA_FILES = {ADAPTER_FILE: EMA_ADAPTER_FILE, EMBEDDING_FILE: EMA_EMBEDDING_FILE}
"""File of the main weights -> that of the second ones of a run with an EMA."""

# The model card, for people who get the adapter; the repository on the hub has the same names.
CARD_FOLDER = "model-card"
CARD_FILE = "README.md"
CARD_IMAGES_FOLDER = "images"
LYCORIS_FILE = "lycoris_config.json"

UPLOAD_FOLDER = "hub"
"""Adapters of checkpoints that wait for their upload, and UPLOAD_STATE_FILE."""
UPLOAD_STATE_FILE = "uploaded.json"

# In a checkpoint, beside CONFIG_FILE and ADAPTER_FILE.
CHECKPOINT_MANIFEST_FILE = "manifest.json"
COMPATIBILITY_FILE = "compatibility.json"
ADAPTER_STATE_FILE = "adapter_state.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
EMA_STATE_FILE = "ema_state.safetensors"
COUNTERS_FILE = "state.json"

INDEX_FOLDER = "image-index"
"""Indexes of the images of a run whose cache folder cannot be written, or whose cache of latents is off."""
VALIDATION_FOLDER = "validation"
GRID_FILE = "grid.png"
SCORES_FILE = "scores.json"
"""Of the images of one validation."""
EMA_FOLDER = "ema"
"""In the folder of one validation, its images of the EMA weights."""
BASE_FOLDER = "base"
REMOVED_PREFIX = ".removed-"
"""A checkpoint is renamed before it is removed."""
_CHECKPOINT = "checkpoint-"
_STEP = "step-"
_ANSWER = ".answer.json"
_IMAGE = re.compile(r"\d\d+-(?P<prompt>.+)-(?P<size>\d+x\d+)-seed(?P<seed>-?\d+)")
_CACHED_IMAGE = re.compile(r"(?P<name>.+)-[0-9a-f]{16}\.png")


def ema_folder(model: str) -> str:
    """Name of the folder beside that of a whole model, for the second weights of a run with an EMA."""
    return f"{model}_ema"


def adapter_in(folder: Path, *, is_token: bool = False) -> Path | None:
    """The adapter in an output folder or a checkpoint, else the file of a token that was trained alone.

    The file of the token comes first for a run of a token alone, whose folder may hold another run's adapter.
    """
    names = (EMBEDDING_FILE, ADAPTER_FILE) if is_token else (ADAPTER_FILE, EMBEDDING_FILE)
    found = (folder / name for name in names)
    return next((file for file in found if file.is_file()), None)


def embedding_file(adapter: Path) -> Path:
    """The file with the embeddings of a new token that was trained with this adapter, which may not exist."""
    return adapter.with_name(EMBEDDING_FILES.get(adapter.name, EMBEDDING_FILE))


def model_files(folder: Path) -> list[Path]:
    """The weight files of a whole model in an output folder or a checkpoint; none beside an adapter."""
    found = sorted(folder.glob("*/diffusion_pytorch_model*.safetensors"))
    return [file for file in found if file.parent.name != ema_folder(file.parent.name.removesuffix("_ema"))]


def new_request_file(output_dir: Path, kind: str) -> Path:
    """The file of a new request to the run of this folder."""
    return output_dir / REQUESTS_FOLDER / f"{kind}-{uuid4().hex[:8]}.json"


def is_request_file(name: str) -> bool:
    """Whether a file of this name in REQUESTS_FOLDER is a request, and neither an answer nor half written."""
    return name.endswith(".json") and not name.endswith(_ANSWER) and not name.startswith(".")


def answer_file(request: Path) -> Path:
    """The run's answer to a request, beside it."""
    return request.with_name(f"{request.stem}{_ANSWER}")


def compared_page_name(others: Sequence[str]) -> str:
    """Name of the report that shows images of these other runs beside the run's own."""
    return f"report-with-{file_name('-'.join(others))}.html"


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """The checkpoint after this optimiser step."""
    return output_dir / f"{_CHECKPOINT}{step}"


def checkpoint_folders(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of each checkpoint, oldest step first."""
    return _numbered(output_dir, _CHECKPOINT)


def grid_name(step: int) -> str:
    """Name of the grid of this optimiser step's validation, where it stands with those of others."""
    return f"grids/{_STEP}{step}.png"


def validation_step_folder(validation: Path, step: int) -> Path:
    """The images of the validation after this optimiser step."""
    return validation / f"{_STEP}{step}"


def validation_step_folders(validation: Path) -> list[tuple[int, Path]]:
    """(step, folder) of each validation, oldest step first."""
    return _numbered(validation, _STEP)


def image_name(index: int, prompt: str, *, size: Size, seed: int) -> str:
    """Name of a validation image, without suffix; unique by the prompt's index, the size and the seed."""
    return f"{index:02d}-{file_name(prompt)[:60]}-{size}-seed{seed}"


def parse_image_name(name: str) -> dict[str, str]:
    """Prompt, size and seed as far as `image_name` kept them; {} for another name."""
    match = _IMAGE.fullmatch(name)
    return {} if match is None else match.groupdict() | {"prompt": match["prompt"].replace("_", " ")}


def image_file(folder: Path, name: str) -> Path:
    """The file of an image by its name, in the folder of its validation."""
    return folder / f"{name}.png"


def image_files(folder: Path) -> dict[str, Path]:
    """Name -> file of each image of one validation, the grid excepted."""
    return {file.stem: file for file in folder.glob("*.png") if file.name != GRID_FILE}


def validation_files(folder: Path) -> list[Path]:
    """The images, the grid and the scores of one validation, without files of other names."""
    found = [*folder.glob("*.png"), *(folder / EMA_FOLDER).glob("*.png")]
    images = [file for file in found if file.name == GRID_FILE or parse_image_name(file.stem)]
    return [*images, *folder.glob(SCORES_FILE)]


def cached_image_file(validation: Path, name: str, *, digest: str) -> Path:
    """The file of an image that training does not change; `digest` is 16 hexadecimal digits."""
    return validation / BASE_FOLDER / f"{name}-{digest}.png"


def cached_image_files(validation: Path) -> dict[str, Path]:
    """Image name -> its newest cached file."""
    files = sorted(
        (validation / BASE_FOLDER).glob("*.png"), key=lambda file: (file.stat().st_mtime_ns, file.name)
    )
    matches = ((_CACHED_IMAGE.fullmatch(file.name), file) for file in files)
    return {match["name"]: file for match, file in matches if match}


def _numbered(folder: Path, prefix: str) -> list[tuple[int, Path]]:
    paths = [path for path in folder.glob(f"{prefix}*") if path.is_dir()]
    numbers = ((path.name.removeprefix(prefix), path) for path in paths)
    return sorted((int(number), path) for number, path in numbers if re.fullmatch(r"\d+", number))
