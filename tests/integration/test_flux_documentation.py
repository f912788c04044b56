"""The quickstart of Flux.1 and Flux.2: its files train, its code runs, its numbers are right.

The tiny models need other values of: repository, size, steps, device, ranks above 16, 16 bits.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import re
import tempfile
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
from simpletuner.helpers.models.flow_matching import shift_sigma, sigma_to_timestep
from simpletuner.helpers.models.flux.spec import FLAVOURS
from simpletuner.helpers.models.flux.tiny import save_tiny_flux
from simpletuner.helpers.models.flux2.pipeline import Flux2KleinPipeline
from simpletuner.helpers.models.flux2.spec import FLAVOURS as FLAVOURS_2
from simpletuner.helpers.models.flux2.tiny import save_tiny_flux2
from simpletuner.helpers.models.shift import DynamicShift
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
    "learning_rate": 0.1,  # so that two steps change the image
    "validation_disable": True,
}
RANKS = {"linear_dim": 16, "linear_alpha": 16, "tlora_min_rank": 8}
TOKENS = {edge_px: (edge_px // 16) ** 2 for edge_px in (512, 1024)}


PAGE = (REPOSITORY / "documentation" / "quickstart-flux.md").read_text(encoding="utf-8")
EXAMPLES = {"flux": "flux-dev-tlora-vanilla", "klein": "flux2-klein-4b-tlora", "dev": "flux2-dev-tlora"}
PIPELINES = {"flux": "Flux.1 dev", "klein": "Flux.2 Klein", "dev": "Flux.2 dev"}
"""Model -> its column in the page's table of pipelines."""


def block(label: str) -> str:
    """The code block under a label."""
    found = re.search(rf"<!-- {re.escape(label)} -->\n```\w+\n(.+?)```", PAGE, re.DOTALL)
    assert found is not None, f"the page has no {label}"
    return found[1]


def table(label: str) -> list[list[str]]:
    """The cells of a table under a label, its head first."""
    lines = PAGE.partition(f"<!-- table: {label} -->\n")[2].partition("\n\n")[0].splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [head, *rows]


@functools.cache
def tiny(model: str) -> Path:
    """The tiny model, made once per process."""
    folder = Path(tempfile.mkdtemp(prefix=f"tiny_{model}_"))
    if model == "flux":
        save_tiny_flux(folder)
    else:
        save_tiny_flux2(folder, klein=model == "klein")
    return folder


def example(model: str) -> dict[str, Any]:
    """The three files of a model's example."""
    folder = REPOSITORY / "config" / "examples" / EXAMPLES[model]
    return {name: json.loads((folder / name).read_text()) for name in FILES}


def shown_files(model: str) -> dict[str, Any]:
    """The three files as the page gives them: Flux.1's, with the differences of Flux.2."""
    files = {name: json.loads(block(f"example: {name}")) for name in FILES}
    name = ""
    for file, key, flux, flux2 in table("differences")[1:]:
        name, key = file.strip("`") or name, key.strip("`")
        assert (json.loads(flux.strip("`")) if flux else None) == files[name].get(key), key
        if model == "klein":
            files[name][key] = json.loads(flux2.strip("`"))
    return files


@functools.cache
def trained(model: str) -> Path:
    """The output folder of a run of the tiny model with those files; dev's the page only names."""
    folder = Path(tempfile.mkdtemp(prefix=f"trained_{model}_"))
    files = example(model) if model == "dev" else shown_files(model)
    files["lycoris_tlora.json"] |= RANKS
    files["multidatabackend.json"][0]["instance_data_dir"] = str(
        REPOSITORY / "simpletuner" / "demo" / "photo"
    )
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    keys = {name: folder / name for name in ("output_dir", "cache_dir_vae", "cache_dir_text")}
    keys |= OVERRIDES | {"pretrained_model_name_or_path": tiny(model)}
    overrides = [f"{key}={value}" for key, value in keys.items()]
    reset_accelerate()
    assert (
        build_trainer(load_config(folder / FILES[0], overrides=overrides, families=registry.specs())).run()
        == 0
    )
    return folder / "output_dir"


def run_code(label: str, *, model: str, **replaced: str) -> dict[str, Any]:
    """The names that a block leaves behind, run beside the adapter's file."""
    code = block(f"tested: {label}")
    head, *rows = [[cell.strip("`") for cell in row] for row in table("pipelines")]
    for row in rows:
        assert row[0] in code, f"{row[0]} is not in the block"
        code = code.replace(row[0], row[head.index(PIPELINES[model])])
    in_toy = {
        r'"black-forest-labs/[\w.-]+"': f'r"{tiny(model)}"',
        r'\.to\("cuda"\)': "",
        r"torch\.bfloat16": "torch.float32",
        r"num_inference_steps=\d+": "num_inference_steps=3",
        r"=1024,": "=64,",
    }
    for pattern, value in (in_toy | replaced).items():
        code, count = re.subn(pattern, lambda _, value=value: value, code)
        assert count, f"{pattern} is not in the block"
    names: dict[str, Any] = {}
    exec(compile(code, f"quickstart-flux.md {label}", "exec"), names)
    return names


@pytest.mark.parametrize("model", ["flux", "klein"])
def test_shown_files_are_those_of_the_example(model: str) -> None:
    assert f"simpletuner examples copy {EXAMPLES[model]} " in PAGE
    assert shown_files(model) == example(model)


@pytest.mark.parametrize(
    ("label", "model"), [("loader", "flux"), ("recipe", "flux"), ("loader", "klein"), ("recipe", "dev")]
)
def test_code_of_the_page_runs(label: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained(model))
    names = run_code(label, model=model)
    assert isinstance(names["image"], Image.Image)
    assert type(names["pipeline"]).__name__ == table("pipelines")[2][list(PIPELINES).index(model)].strip("`")
    assert names["pipeline"]._tlora_config.items() >= {"max_rank": 16, "min_rank": 8, "alpha": 1.0}.items()


def test_recipe_and_command_make_the_loaders_image_and_are_really_masked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained("flux"))

    def image(label: str, **replaced: str) -> np.ndarray:
        return np.asarray(run_code(label, model="flux", **replaced)["image"]).astype(int)

    request = SampleRequest(
        adapter=Path(ADAPTER_FILE),
        prompts=["a photo of sks cat on a beach"],
        model={},
        validation={"validation_num_inference_steps": 3, "validation_resolution": "64"},
        dtype="fp32",
        options={},
    )
    (file,) = sample(request, output=tmp_path, families=registry.specs())
    recipe = image("recipe")
    assert np.abs(recipe - np.asarray(Image.open(file))).max() <= 1
    assert np.abs(recipe - image("loader")).max() <= 1
    assert np.abs(recipe - image("recipe", **{'"min_rank": 8': '"min_rank": 16'})).max() > 2
    assert np.abs(recipe - image("recipe", **{r"merge_to\(\)": "merge_to(0.5)"})).max() > 2


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


def test_table_of_ranks_is_what_the_code_computes() -> None:
    head, *rows = table("ranks")
    shares = (np.arange(4000) + 0.5) / 4000
    sigmas = 1 / (1 + np.exp(-norm.ppf(shares)))
    shifts = (1.0, 3.0, at(1024, family="flux"), at(1024, family="flux2"))
    for row, shift in zip(rows, shifts, strict=True):
        assert row[0].partition(",")[0] == f"{shift:.2f}".removesuffix(".00")
        timesteps = [sigma_to_timestep(shift_sigma(float(sigma), shift)) for sigma in sigmas]
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


def test_page_names_every_flavour_with_its_numbers() -> None:
    for name, flavour in FLAVOURS.items():
        has_guidance = "yes" if flavour.has_guidance else "no"
        row = rf"^\| .*`{name}`.* \| {has_guidance} \| {flavour.text_tokens} \|"
        assert re.search(row, PAGE, re.MULTILINE), name
    for name in FLAVOURS_2:
        assert f"`{name}`" in PAGE
    for edge_px in TOKENS:
        assert f"{at(edge_px, family='flux2'):.2f} at {edge_px} px" in PAGE
    assert f"{at(1024, family='flux'):.2f} at 1024 px" in PAGE
