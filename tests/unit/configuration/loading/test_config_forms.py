"""config.env, config.toml, an export of the Web-UI, and a second JSON object."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from simpletuner.helpers.configuration.finding import find_config
from simpletuner.helpers.configuration.load import own_output_dir
from simpletuner.helpers.models import registry

if TYPE_CHECKING:
    from conftest import Workspace

    from simpletuner.helpers.configuration.schema.sections import RunConfig


def load_env(workspace: Workspace, text: str) -> RunConfig:
    workspace.write()
    workspace.families = registry.specs()
    return workspace.load_as_written(path=workspace.text("config.env", text))


def test_config_env_is_read_by_simpletuner_s_names(workspace: Workspace) -> None:
    run = load_env(
        workspace,
        """
# the run
export MODEL_FAMILY='flux'
DATALOADER_CONFIG=data.json
BASE=out
OUTPUT_DIR="${BASE}/mine"   # ours
MAX_NUM_STEPS=120
NUM_EPOCHS=0
OPTIMIZER=adamw_bf16
VALIDATION_PROMPT="a cat, # on a mat"
READ_BATCH_SIZE=25
LR_WARMUP_STEPS=
HF_HOME=/models
TRAINING_NUM_PROCESSES=2
TRAINER_EXTRA_ARGS="--lora_rank=8"
TRAINER_EXTRA_ARGS+=" --use_dora"
if true
""",
    )
    assert run.model.model_family == "flux"
    assert run.checkpoint.output_dir == workspace.folder / "out/mine"
    assert run.training.max_train_steps == 120
    assert run.optimizer.optimizer == "adamw"
    assert run.validation.validation_prompt == "a cat, # on a mat"
    assert run.adapter.lora_rank == 8
    assert run.adapter.use_dora
    idle = {each.key for each in run.decisions if each.outcome == "no effect"}
    assert idle == {"BASE", "HF_HOME", "TRAINING_NUM_PROCESSES", "read_batch_size", "line 17"}


@pytest.mark.parametrize(("flags", "family"), [("FLUX=true", "flux"), ("FLUX=false", "sdxl")])
def test_the_older_flags_name_the_family(workspace: Workspace, flags: str, family: str) -> None:
    run = load_env(workspace, f"{flags}\nKOLORS=false\nDATALOADER_CONFIG=data.json\nMAX_NUM_STEPS=1\n")
    assert run.model.model_family == family


def test_an_unknown_argument_of_config_env_is_a_problem(workspace: Workspace) -> None:
    with pytest.raises(Exception, match="lora_rnak"):
        load_env(
            workspace, 'MODEL_FAMILY=flux\nDATALOADER_CONFIG=data.json\nTRAINER_EXTRA_ARGS="--lora_rnak=8"'
        )


def test_config_toml_is_read(workspace: Workspace) -> None:
    workspace.write()
    path = workspace.text(
        "config.toml",
        'model_family = "toy"\ndata_backend_config = "data.json"\nlearning_rate = 2e-4\n"--seed" = 7\n',
    )
    run = workspace.load_as_written(path=path)
    assert run.optimizer.learning_rate == 2e-4
    assert run.training.seed == 7


def test_a_toml_that_is_none_says_where(workspace: Workspace) -> None:
    path = workspace.text("config.toml", "model_family = \n")
    with pytest.raises(Exception, match=r"config\.toml.*\n.*line 1"):
        workspace.load_as_written(path=path)


def test_an_export_of_the_web_ui_is_its_config(workspace: Workspace) -> None:
    workspace.write()
    export = {
        "_metadata": {"name": "mine"},
        "config": {f"--{key}": value for key, value in workspace.config.items()},
    }
    run = workspace.load_as_written(path=workspace.text("config.json", json.dumps(export)))
    assert run.model.model_family == "toy"
    assert [(each.key, each.outcome) for each in run.decisions] == [("_metadata", "no effect")]


def test_a_second_json_object_is_a_remark_and_other_rest_is_an_error(workspace: Workspace) -> None:
    path = workspace.write()
    text = path.read_text(encoding="utf-8")
    run = workspace.load_as_written(path=workspace.text("config.json", f'{text}\n{{"seed": 7}}'))
    assert run.training.seed == 42
    assert [(each.key, each.outcome) for each in run.decisions] == [("", "no effect")]
    with pytest.raises(Exception, match="after the end of the JSON"):
        workspace.load_as_written(path=workspace.text("config.json", f"{text}x"))


@pytest.mark.parametrize("name", ["config.toml", "config.env"])
def test_a_folder_with_another_form_is_found(workspace: Workspace, name: str) -> None:
    (workspace.folder / "config/mine").mkdir(parents=True)
    path = workspace.text(f"config/mine/{name}", "")
    assert find_config(workspace.folder / "config/mine") == path
    assert own_output_dir(path).name == "mine"
