"""The configurations that come with the repository."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from simpletuner.demo import make
from simpletuner.demo.scenes import COLOURS, PATTERNS, PLACES
from simpletuner.helpers.configuration.examples import copy_example, examples
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.configuration.schema.sections import RunConfig
from simpletuner.helpers.data.captions import strategy_of
from simpletuner.helpers.data.sources.base import scan_source
from simpletuner.helpers.data.sources.local import LocalFolder
from simpletuner.helpers.models import registry

QUESTION = re.compile(r"a sks toy (.+) on a (\w+) (\w+) background")
Load = Callable[[str | Path], RunConfig]


@pytest.fixture
def load(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.chdir(repository)
    return lambda name: load_config(Path("config") / name, families=registry.specs())


@pytest.mark.parametrize(
    "name",
    ["config.json", *(f"examples/demo-{name}/config.json" for name in ("lora", "losses", "photo"))],
)
def test_every_configuration_of_the_demo_is_valid(name: str, load: Load) -> None:
    assert isinstance(load(name), RunConfig)


@pytest.mark.parametrize("name", examples())
def test_every_example_is_valid_and_waits_for_an_output_and_images(
    name: str, repository: Path, load: Load
) -> None:
    config = load(f"examples/{name}/config.json")
    assert config.checkpoint.output_dir == repository / "output" / name
    trained = [each.instance_data_dir for each in config.datasets if each.is_trained]
    assert trained == [repository / "simpletuner/demo/photo"]
    assert config.validation.prompts
    assert config.tracking.report_to == ()


@pytest.mark.parametrize("name", examples())
def test_every_example_trains_captions_beside_the_users_images_and_crops_none(
    name: str, tmp_path: Path, load: Load
) -> None:
    config = load(f"examples/{name}/config.json")
    (dataset,) = (each for each in config.datasets if each.is_trained)
    assert not dataset.crop
    (tmp_path / "dog.png").touch()
    without_texts = strategy_of(dataset, scan_source(LocalFolder(tmp_path)))
    assert without_texts == ("instanceprompt" if dataset.instance_prompt else "textfile")
    (tmp_path / "dog.txt").touch()
    # The user's own captions have no new token.
    has_token = config.new_tokens.placeholder_token is not None
    expected = "instanceprompt" if has_token else "textfile"
    assert strategy_of(dataset, scan_source(LocalFolder(tmp_path))) == expected


def test_the_list_has_every_example(repository: Path) -> None:
    folders = {path.parent.name for path in (repository / "config" / "examples").glob("*/config.json")}
    assert folders == {"demo-lora", "demo-losses", "demo-photo", *examples()}


def test_every_family_has_an_example_of_each_kind(load: Load) -> None:
    def kind(config: RunConfig) -> str:
        return config.lycoris.algo if config.lycoris is not None else config.adapter.lora_type

    configs = [load(f"examples/{name}/config.json") for name in examples()]
    assert {(config.model.model_family, kind(config)) for config in configs} == {
        (family, each) for family in registry.specs() for each in ("tlora", "standard", "lokr")
    }


def test_a_copied_example_reads_its_own_files(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    mine = copy_example("sdxl-tlora-paper", tmp_path / "mine").parent
    adapter = json.loads((mine / "lycoris_tlora.json").read_text())
    (mine / "lycoris_tlora.json").write_text(json.dumps(adapter | {"linear_dim": 48}))
    config = load_config(mine / "config.json", families=registry.specs())
    assert config.lycoris is not None
    assert config.lycoris.linear_dim == 48
    assert config.data.data_backend_config == mine / "multidatabackend.json"


def test_the_demo_is_small_and_t_lora(load: Load, repository: Path) -> None:
    config = load("config.json")
    assert config.model.pretrained_model_name_or_path == str(repository / "simpletuner" / "demo" / "sdxl")
    assert config.lycoris.algo == "tlora"
    assert config.lycoris.tlora_min_rank * 2 == config.lycoris.linear_dim
    assert config.data.resolution == 64
    assert config.training.max_train_steps <= 600
    assert config.precision.mixed_precision == "no"
    assert config.checkpoint.output_dir == repository / "output" / "demo"
    assert config.tracking.report_to == ()


def test_the_demo_is_compared_with_a_lora_that_is_trained_alike(load: Load) -> None:
    demo = load("config.json")
    other = demo.compared_with
    assert other.lycoris.algo == "lora"
    for name in ("linear_dim", "linear_alpha", "apply_preset"):
        assert vars(other.lycoris)[name] == vars(demo.lycoris)[name]
    for section in ("model", "training", "optimizer", "noise", "precision", "datasets"):
        assert vars(other)[section] == vars(demo)[section]
    assert other.validation.prompts == demo.validation.prompts


def test_the_demo_asks_for_what_its_one_picture_does_not_show(load: Load, repository: Path) -> None:
    config = load("config.json")
    (dataset,) = (each for each in config.datasets if each.is_trained)
    (picture,) = dataset.instance_data_dir.glob("*.png")
    known, *new = (prompt.text for prompt in config.validation.prompts)
    assert picture.with_suffix(".txt").read_text(encoding="utf-8") == f"{known}\n"
    questions = [QUESTION.fullmatch(text).groups() for text in new]
    assert len(questions) >= 5
    for place, pattern, colour in questions:
        assert place in PLACES
        assert pattern in PATTERNS
        assert colour in COLOURS
        assert place != make.CHARACTER_PLACE
        assert (pattern, colour) != (make.CHARACTER_BACKGROUND.pattern, make.CHARACTER_BACKGROUND.colour)


def test_the_demo_on_a_photograph_asks_for_what_it_trains_and_is_short(load: Load) -> None:
    config = load("examples/demo-photo/config.json")
    (dataset,) = (each for each in config.datasets if each.is_trained)
    (caption,) = dataset.instance_data_dir.glob("*.txt")
    assert [prompt.text for prompt in config.validation.prompts] == [caption.read_text().strip()]
    assert config.training.max_train_steps * config.training.train_batch_size <= 120
    assert config.training.max_train_steps % config.validation.validation_step_interval == 0


def test_the_papers_recipe_is_the_papers(load: Load) -> None:
    config = load("examples/sdxl-tlora-paper/config.json")
    lycoris = config.lycoris
    assert (lycoris.linear_dim, lycoris.tlora_min_rank, lycoris.linear_alpha) == (64, 32, 64.0)
    assert (lycoris.tlora_init, lycoris.sig_type, lycoris.tlora_schedule) == ("random", "last", "floor")
    assert lycoris.apply_preset.target_module == ("Attention",)
    assert config.optimizer.optimizer == "adamw"
    assert config.optimizer.learning_rate == 1e-4
    assert config.optimizer.optimizer_config == {"weight_decay": 1e-4}
    assert config.optimizer.lr_scheduler == "constant"
    assert (config.training.train_batch_size, config.training.max_train_steps) == (1, 800)
    assert config.precision.mixed_precision == "bf16"
    assert config.model.pretrained_model_name_or_path == "stabilityai/stable-diffusion-xl-base-1.0"


def test_the_authors_recipe_for_flux_is_theirs(load: Load) -> None:
    config = load("examples/flux-dev-tlora-vanilla/config.json")
    assert (config.lycoris.linear_dim, config.lycoris.tlora_init) == (16, "vanilla")
    assert config.lycoris.apply_preset.target_module == ("Attention",)
    assert (config.optimizer.optimizer, config.optimizer.learning_rate) == ("prodigy", 1.0)
    assert (config.training.train_batch_size, config.training.max_train_steps) == (1, 500)
    assert config.model.pretrained_model_name_or_path == "black-forest-labs/FLUX.1-dev"


@pytest.mark.parametrize(
    ("name", "guidance", "steps"),
    [("sdxl-lora", 5.0, 30), ("flux-dev-lora", 3.5, 28), ("flux2-klein-4b-lora", 4.0, 50)],
)
def test_pictures_are_made_as_the_model_is_used(name: str, guidance: float, steps: int, load: Load) -> None:
    pictures = load(f"examples/{name}/config.json").validation
    assert (pictures.validation_guidance, pictures.validation_num_inference_steps) == (guidance, steps)


def test_class_names_and_generic_names_of_targets_are_both_shown(load: Load) -> None:
    def targets(name: str) -> tuple[str, ...]:
        return load(f"examples/{name}/config.json").lycoris.apply_preset.target_module

    assert targets("flux2-klein-4b-tlora") == ("Attention", "FeedForward")
    assert targets("flux2-dev-tlora") == ("Flux2Attention", "Flux2FeedForward", "Flux2ParallelSelfAttention")
