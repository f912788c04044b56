"""The quickstarts of Flux.1 and Flux.2: their files train, their code runs, their numbers are right.

What changes is what a toy cannot have: its repository, size, steps, device, ranks above 16, 16 bits.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from PIL import Image
from scipy.stats import norm

from simpletuner.helpers.adapters.inference import load_into_pipeline
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.io.run_folder import ADAPTER_FILE
from simpletuner.helpers.models import registry
from simpletuner.helpers.models.flow_matching import DynamicShift, shift_sigma, sigma_to_timestep
from simpletuner.helpers.models.flux.spec import FLAVOURS
from simpletuner.helpers.models.flux.tiny import save_tiny_flux
from simpletuner.helpers.models.flux2.pipeline import Flux2KleinPipeline
from simpletuner.helpers.models.flux2.spec import FLAVOURS as FLAVOURS_2
from simpletuner.helpers.models.flux2.tiny import save_tiny_flux2
from simpletuner.helpers.sampling.sample_command import SampleRequest, sample
from simpletuner.helpers.training.build import build_trainer
from tests.integration.tiny_runs import reset_accelerate

REPOSITORY = Path(__file__).resolve().parents[2]
FILES = ("config.json", "lycoris_tlora.json", "multidatabackend.json")
OVERRIDES = {
    "resolution": 64,
    "max_train_steps": 2,
    "mixed_precision": "no",
    "base_model_precision": "no_change",
    "text_encoder_1_precision": "no_change",
    "optimizer": "adamw",
    "learning_rate": 0.1,  # the adapter is to be seen after two steps
    "validation_disable": True,
}
RANKS = {"linear_dim": 16, "linear_alpha": 16, "tlora_min_rank": 8}
TOKENS = {edge_px: (edge_px // 16) ** 2 for edge_px in (512, 1024)}


@dataclass(frozen=True)
class Page:
    """One of the two pages."""

    file: str
    example: str

    @property
    def text(self) -> str:
        return (REPOSITORY / "documentation" / self.file).read_text(encoding="utf-8")

    def block(self, label: str) -> str:
        """The code block under a label."""
        found = re.search(rf"<!-- {re.escape(label)} -->\n```\w+\n(.+?)```", self.text, re.DOTALL)
        assert found is not None, f"{self.file} has no {label}"
        return found[1]


FLUX = Page("quickstart-flux.md", "flux-dev-tlora-vanilla")
FLUX2 = Page("quickstart-flux2.md", "flux2-klein-4b-tlora")
BLOCKS = [
    pytest.param(page, label, kind, id=f"{kind}-{label}")
    for page, label, kind in (
        (FLUX, "loader", "flux"),
        (FLUX, "recipe", "flux"),
        (FLUX2, "loader", "klein"),
        (FLUX2, "recipe", "dev"),
    )
]


@functools.cache
def tiny(kind: str) -> Path:
    """The tiny model of a kind, made once per process."""
    folder = Path(tempfile.mkdtemp(prefix=f"tiny_{kind}_"))
    if kind == "flux":
        save_tiny_flux(folder)
    else:
        save_tiny_flux2(folder, klein=kind == "klein")
    return folder


def files_of(kind: str) -> dict[str, Any]:
    """What a page's reader has in the three files; dev's are an example that the page only names."""
    if kind == "dev":
        folder = REPOSITORY / "config" / "examples" / "flux2-dev-tlora"
        return {name: json.loads((folder / name).read_text()) for name in FILES}
    page = FLUX if kind == "flux" else FLUX2
    return {name: json.loads(page.block(f"example: {name}")) for name in FILES}


@functools.cache
def trained(kind: str) -> Path:
    """The folder of a run with those files on the tiny model, where its adapter lies."""
    folder = Path(tempfile.mkdtemp(prefix=f"trained_{kind}_"))
    files = files_of(kind)
    files["lycoris_tlora.json"] |= RANKS
    files["multidatabackend.json"][0]["instance_data_dir"] = str(
        REPOSITORY / "simpletuner" / "demo" / "photo"
    )
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    keys = {name: folder / name for name in ("output_dir", "cache_dir_vae", "cache_dir_text")}
    keys |= OVERRIDES | {"pretrained_model_name_or_path": tiny(kind)}
    overrides = [f"{key}={value}" for key, value in keys.items()]
    reset_accelerate()
    assert (
        build_trainer(load_config(folder / FILES[0], overrides=overrides, families=registry.specs())).run()
        == 0
    )
    return folder / "output_dir"


def run_code(page: Page, label: str, *, kind: str, **replaced: str) -> dict[str, Any]:
    """The names that a block leaves behind, run beside the adapter's file."""
    code = page.block(f"tested: {label}")
    in_toy = {
        r'"black-forest-labs/[\w.-]+"': f'r"{tiny(kind)}"',
        r'\.to\("cuda"\)': "",
        r"torch\.bfloat16": "torch.float32",
        r"num_inference_steps=\d+": "num_inference_steps=3",
        r"=1024,": "=64,",
    }
    for pattern, value in (in_toy | replaced).items():
        code, count = re.subn(pattern, lambda _, value=value: value, code)
        assert count, f"{pattern} is not in the block"
    names: dict[str, Any] = {}
    exec(compile(code, f"{page.file} {label}", "exec"), names)
    return names


@pytest.mark.parametrize("page", [FLUX, FLUX2], ids=lambda page: page.file)
def test_shown_files_are_those_of_the_example(page: Page) -> None:
    folder = REPOSITORY / "config" / "examples" / page.example
    assert f"simpletuner examples copy {page.example} " in page.text
    for name in FILES:
        assert json.loads(page.block(f"example: {name}")) == json.loads((folder / name).read_text())


@pytest.mark.parametrize(("page", "label", "kind"), BLOCKS)
def test_code_of_the_page_runs(page: Page, label: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained(kind))
    names = run_code(page, label, kind=kind)
    assert isinstance(names["image"], Image.Image)
    assert names["pipeline"]._tlora_config.items() >= {"max_rank": 16, "min_rank": 8, "alpha": 1.0}.items()


def test_recipe_and_command_make_the_loaders_picture_and_are_really_masked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained("flux"))

    def picture(label: str, **replaced: str) -> np.ndarray:
        return np.asarray(run_code(FLUX, label, kind="flux", **replaced)["image"]).astype(int)

    request = SampleRequest(
        adapter=Path(ADAPTER_FILE),
        prompts=["a photo of sks cat on a beach"],
        model={},
        validation={"validation_num_inference_steps": 3, "validation_resolution": "64"},
        dtype="fp32",
        options={},
    )
    (file,) = sample(request, output=tmp_path, families=registry.specs())
    recipe = picture("recipe")
    assert np.abs(recipe - np.asarray(Image.open(file))).max() <= 1
    assert np.abs(recipe - picture("loader")).max() <= 1
    assert np.abs(recipe - picture("recipe", **{'"min_rank": 8': '"min_rank": 16'})).max() > 2
    assert np.abs(recipe - picture("recipe", **{r"merge_to\(\)": "merge_to(0.5)"})).max() > 2


def test_a_distilled_klein_takes_the_base_models_file_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = Path(tempfile.mkdtemp())
    save_tiny_flux2(other, klein=True, is_distilled=True, seed=1)
    pipeline = Flux2KleinPipeline.from_pretrained(other)
    with caplog.at_level(logging.WARNING):
        load_into_pipeline(pipeline, trained("klein") / ADAPTER_FILE)
    assert "was trained on other base weights" in caplog.text
    image = pipeline(prompt="a photo", height=64, width=64, num_inference_steps=4, guidance_scale=1.0).images[
        0
    ]
    assert isinstance(image, Image.Image)


@pytest.mark.parametrize(("page", "family"), [(FLUX, "flux"), (FLUX2, "flux2")], ids=["flux", "flux2"])
def test_table_of_ranks_is_what_the_code_computes(page: Page, family: str) -> None:
    table = page.text.partition("<!-- table: ranks -->\n")[2].partition("\n\n")[0]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    at_1024 = at(1024, family=family)
    assert rows[-1][0].startswith(f"{at_1024:.2f}")
    shares = (np.arange(4000) + 0.5) / 4000
    sigmas = 1 / (1 + np.exp(-norm.ppf(shares)))
    for row, factor in zip(rows, (1.0, 3.0, at_1024), strict=True):
        timesteps = [sigma_to_timestep(shift_sigma(float(sigma), factor)) for sigma in sigmas]
        expected = [f"{np.mean(timesteps):.0f}"]
        for column in head[2:]:
            rank, least = map(int, re.findall(r"\d+", column))
            schedule = RankSchedule(rank, min_rank=least)
            expected.append(f"{np.mean([schedule.rank_at(timestep) for timestep in timesteps]):.1f}")
        assert row[1:] == expected


def at(edge_px: int, *, family: str) -> float:
    """The shift of a released model's scheduler at an edge in pixels."""
    tokens = TOKENS[edge_px]
    return DynamicShift()(tokens) if family == "flux" else math.exp(compute_empirical_mu(tokens, 50))


def test_pages_name_every_flavour_with_its_numbers() -> None:
    for name, flavour in FLAVOURS.items():
        assert f"`{name}`" in FLUX.text
        told = "yes" if flavour.has_guidance else "no"
        assert re.search(rf"^\| .*`{name}`.* \| {told} \| {flavour.text_tokens} \|", FLUX.text, re.MULTILINE)
    for name in FLAVOURS_2:
        assert f"`{name}`" in FLUX2.text
    for edge_px in TOKENS:
        assert f"{at(edge_px, family='flux2'):.2f} at {edge_px} px" in FLUX2.text
    assert f"{at(1024, family='flux'):.2f} at 1024 px" in FLUX.text
