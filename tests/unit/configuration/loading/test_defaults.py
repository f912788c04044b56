"""SimpleTuner's defaults: taken where the configuration says so, listed where it does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from simpletuner.helpers.choices.optimizers import OPTIMIZERS
from simpletuner.helpers.configuration.load import KEYS
from simpletuner.helpers.configuration.loading.defaults import differing_defaults, their_optimizers
from simpletuner.helpers.io.run_folder import CONFIG_FILE
from simpletuner.helpers.models import registry

if TYPE_CHECKING:
    from conftest import Workspace

    from simpletuner.helpers.configuration.schema.sections import RunConfig

EVERYWHERE = {
    "learning_rate": 4e-7,
    "grad_clip_method": "value",
    "max_grad_norm": 2.0,
    "train_batch_size": 4,
    "vae_batch_size": 4,
    "caption_dropout_probability": 0.1,
    "caption_strategy": "filename",
}


@pytest.fixture
def flux(workspace: Workspace) -> Workspace:
    workspace.families = registry.specs()
    workspace.config |= {"model_family": "flux"}
    return workspace


def listed(run: RunConfig) -> set[str]:
    return {each.key for each in run.differing_defaults}


def test_every_key_of_the_table_exists() -> None:
    keys = [each.key for each in differing_defaults()]
    assert set(keys) <= KEYS.owners.keys()
    assert len(keys) == len(set(keys))
    assert EVERYWHERE.keys() < set(keys)


def test_their_defaults_are_taken_on_demand(workspace: Workspace) -> None:
    run = workspace.load(defaults="simpletuner")
    assert {key: run.resolved()[key] for key in EVERYWHERE} == EVERYWHERE
    assert run.datasets[0].caption_strategy == "filename"
    assert run.file.defaults == "simpletuner"
    assert not run.differing_defaults


def test_ours_stay_otherwise_and_the_differing_ones_are_listed(workspace: Workspace) -> None:
    run = workspace.load()
    assert not [key for key, value in EVERYWHERE.items() if run.resolved()[key] == value]
    assert listed(run) == EVERYWHERE.keys() | {"seed"}
    assert not workspace.load(defaults="ours").differing_defaults


def test_the_file_and_the_command_line_win_over_their_defaults(workspace: Workspace) -> None:
    run = workspace.load("max_grad_norm=3", defaults="simpletuner", train_batch_size=2, vae_batch_size=None)
    assert run.training.max_grad_norm == 3
    assert run.training.train_batch_size == 2
    assert run.precision.vae_batch_size == 4


def test_what_the_file_gives_is_not_listed(workspace: Workspace) -> None:
    workspace.datasets = [{"id": "photos", "instance_data_dir": "images", "caption_strategy": "textfile"}]
    run = workspace.load("learning_rate=1e-3", train_batch_size=4, max_grad_norm=1.0)
    assert listed(run) == {"grad_clip_method", "vae_batch_size", "caption_dropout_probability", "seed"}


def test_a_default_is_listed_only_where_the_run_depends_on_it(workspace: Workspace) -> None:
    polynomial = workspace.load(lr_scheduler="polynomial", lora_type="standard", validation_prompt="x")
    assert {"lr_end", "lr_power", "lora_dropout", "validation_negative_prompt"} <= listed(polynomial)
    cosine = workspace.load(lr_scheduler="cosine", lora_type="lycoris", validation_disable=True)
    assert "lr_end" in listed(cosine)
    assert not {"lr_power", "lora_dropout", "validation_negative_prompt"} & listed(cosine)


def test_the_shift_is_the_explicit_one_then_the_default_then_the_family_s(flux: Workspace) -> None:
    assert flux.load().noise.flow_schedule_shift is None
    assert "flow_schedule_shift" in listed(flux.load())
    assert flux.load(defaults="simpletuner").noise.flow_schedule_shift == 3.0
    assert flux.load("flow_schedule_shift=1.5").noise.flow_schedule_shift == 1.5
    assert flux.load(flow_schedule_auto_shift=True).noise.flow_schedule_shift is None
    sdxl = flux.load(model_family="sdxl", flow_schedule_auto_shift=None)
    assert sdxl.noise.flow_schedule_shift is None


def test_their_defaults_win_over_the_family_s(flux: Workspace) -> None:
    changes = {"validation_prompt": "x", "defaults": "simpletuner"}
    assert flux.load(**changes).validation.validation_guidance == 7.5
    assert str(flux.load().validation.validation_resolution[0]) == "256x256"
    assert flux.load(defaults="ours").validation.validation_guidance == 3.5


def test_a_resolved_configuration_stays_as_it_is_with_their_defaults(flux: Workspace) -> None:
    resolved = flux.load(defaults="simpletuner", max_grad_norm=1.0, seed=5).resolved()
    flux.config = dict(resolved)
    assert flux.load().resolved() == resolved


@pytest.mark.parametrize("changes", [{"seed": -1}, {"seed": "-1"}, {"defaults": "simpletuner"}], ids=range(3))
def test_a_drawn_seed_is_written_and_kept_when_the_run_goes_on(
    workspace: Workspace, changes: dict[str, object]
) -> None:
    first, second = workspace.load(**changes), workspace.load(**changes)
    assert first.training.seed != second.training.seed  # once in 2^31 they are equal
    assert first.resolved()["seed"] == first.training.seed >= 0
    (workspace.folder / "output").mkdir()
    folder = first.checkpoint.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(f'{{"seed": {first.training.seed}}}')
    assert workspace.load(**changes).training.seed == first.training.seed
    assert workspace.load(resume_from_checkpoint="none").training.seed != first.training.seed


@pytest.mark.parametrize("text", ["", "[]", '{"seed": "x"}', '{"seed": true}', '{"seed": -1}'])
def test_a_run_folder_without_a_seed_is_no_run_that_goes_on(workspace: Workspace, text: str) -> None:
    folder = workspace.load(seed=-1).checkpoint.output_dir
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(text)
    assert workspace.load().training.seed > 1


def test_the_model_of_a_file_that_names_none_is_said_or_theirs(flux: Workspace) -> None:
    assert "model_flavour" in listed(flux.load())
    assert flux.load(defaults="simpletuner").model.model_flavour == "krea"
    assert flux.load(model_family="flux2").model.pretrained_model_name_or_path.endswith("klein-base-9B")
    named = flux.load(defaults=None, pretrained_model_name_or_path="somebody/model")
    assert "model_flavour" not in listed(named)


def test_a_flavour_with_another_model_under_its_name(flux: Workspace) -> None:
    run = flux.load(model_family="flux2", model_flavour="klein-9b")
    assert run.model.pretrained_model_name_or_path == "black-forest-labs/FLUX.2-klein-9B"
    assert "model_flavour" in listed(run)
    theirs = flux.load(defaults="simpletuner")
    assert theirs.model.pretrained_model_name_or_path == "black-forest-labs/FLUX.2-klein-base-9B"
    assert theirs.model.model_flavour == "klein-base-9b"
    assert "model_flavour" in {each.key for each in theirs.decisions}
    assert "model_flavour" not in listed(flux.load(defaults=None, model_flavour="klein-base-9b"))


def test_an_optimizer_is_simpletuners_with_its_defaults(workspace: Workspace) -> None:
    run = workspace.load(defaults="simpletuner", optimizer="prodigy", learning_rate=1e-4)
    assert (run.optimizer.optimizer, run.optimizer.learning_rate) == ("prodigyplus", 1.0)
    changed = {each.key: each.value for each in run.decisions if each.outcome == "translated"}
    assert (changed["optimizer"], changed["learning_rate"]) == ("prodigy", 1e-4)
    again = workspace.load(**run.resolved())
    assert again.optimizer == run.optimizer
    workspace.config["learning_rate"] = 1e-4
    run = workspace.load(optimizer="muon", optimizer_config="eps=1e-6")
    assert run.optimizer.optimizer_config == {"eps": 1e-6, "weight_decay": 0.1}
    assert run.optimizer.learning_rate == 1e-4
    ours = workspace.load(defaults="ours", optimizer="prodigy", optimizer_config="")
    assert (ours.optimizer.optimizer, ours.optimizer.optimizer_config) == ("prodigy", {})


def test_every_optimizer_of_the_table_exists_with_its_arguments() -> None:
    for name, each in their_optimizers().items():
        record = OPTIMIZERS[name]
        assert each.arguments.keys() <= record.arguments.keys()
        assert not each.ours or each.ours in OPTIMIZERS
