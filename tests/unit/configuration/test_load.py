"""From files to a RunConfig, and every mistake at once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pydantic import ValidationError

from simpletuner.helpers.choices.optimizers import OPTIMIZERS
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.configuration.schema.base import PathContext, Section
from simpletuner.helpers.errors import ConfigError

if TYPE_CHECKING:
    from conftest import Workspace


def test_a_small_configuration_is_completed_with_defaults(workspace: Workspace) -> None:
    config = workspace.load()
    assert config.source == workspace.folder / "config.json"
    assert config.training.train_batch_size == 1
    assert config.training.gradient_checkpointing is True
    assert config.optimizer.learning_rate == 1e-4
    assert config.checkpoint.output_dir == workspace.folder / "output" / workspace.folder.name
    assert config.data.cache_dir_text == workspace.folder / "cache" / "text"
    assert [dataset.id for dataset in config.datasets] == ["photos"]
    assert config.lycoris is not None
    assert config.lycoris.linear_dim == 8


def test_what_the_family_knows_is_filled_in(workspace: Workspace) -> None:
    config = workspace.load()
    assert config.model.pretrained_model_name_or_path == "somebody/toy-small"
    assert config.model.model_flavour == "small"
    assert config.model.prediction_type is None  # the model's own scheduler says
    assert config.data.resolution == 512
    assert config.data.aspect_bucket_alignment == 32
    assert config.adapter.peft_lora_target_modules == ("to_q", "to_v")
    assert [str(size) for size in config.validation.validation_resolution] == ["512x512"]


def test_a_flavour_names_its_repository(workspace: Workspace) -> None:
    config = workspace.load(model_flavour="large")
    assert config.model.pretrained_model_name_or_path == "somebody/toy-large"
    assert config.model.model_flavour == "large"


def test_a_configuration_is_frozen(workspace: Workspace) -> None:
    config = workspace.load()
    with pytest.raises(ValidationError, match="frozen"):
        config.training.seed = 1  # type: ignore[misc]


@pytest.mark.reliability_row(28)
def test_every_mistake_of_all_files_is_listed_at_once(workspace: Workspace) -> None:
    workspace.lycoris |= {"linear_dim": "many", "fctor": 1, "tlora_alpha": -1}
    workspace.datasets += [{"id": "photos", "instance_data_dir": "nowhere", "repeats": -1}]
    message = workspace.problems("--sede=3", lerning_rate=1, train_batch_size=0, mixed_precision="bf61")
    assert message.splitlines() == [
        "config.json: 3 problems",
        "  lerning_rate      unknown key. Did you mean learning_rate?",
        "  train_batch_size  0: must be at least 1.",
        '  mixed_precision   "bf61": must be one of bf16, fp16, no. Did you mean bf16?',
        "command line: 1 problem",
        "  sede  unknown key. Did you mean seed?",
        "lycoris.json: 3 problems",
        "  fctor        unknown key.",
        '  linear_dim   "many": must be a whole number.',
        "  tlora_alpha  -1: must be above 0.",
        "data.json: 3 problems",
        '  [1].id                 "photos": [0] has this id too. Change one.',
        f'  [1].instance_data_dir  "nowhere": not found from {workspace.folder}.',
        "  [1].repeats            -1: must be at least 0.",
    ]


def test_a_contradiction_is_found_beside_other_mistakes(workspace: Workspace) -> None:
    workspace.lycoris |= {"multiplier": "x", "tlora_min_rank": 9}
    message = workspace.problems(lr_end=1, lr_power="x")
    assert "lr_end    1 is above learning_rate 0.0001." in message
    assert "tlora_min_rank  9 is above linear_dim 8." in message


def test_a_contradiction_with_a_value_that_is_itself_wrong_is_not_reported(workspace: Workspace) -> None:
    message = workspace.problems(lr_end=1, learning_rate="x")
    assert message.splitlines() == ["config.json: 1 problem", '  learning_rate  "x": must be a number.']


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("learning_rate", "1e-3", 1e-3),
        ("learning_rate", 1, 1.0),
        ("train_batch_size", "4", 4),
        ("train_batch_size", 4.0, 4),
        ("max_train_steps", "1e3", 1000),
        ("gradient_checkpointing", "false", False),
        ("gradient_checkpointing", "False", False),
        ("gradient_checkpointing", False, False),
        ("max_train_steps", 0, None),
        ("checkpoints_total_limit", None, None),
        ("snr_gamma", "none", None),
        ("snr_gamma", 0, None),
        ("snr_gamma", 5, 5.0),
        ("resume_from_checkpoint", None, None),
        ("resume_from_checkpoint", "none", None),
        ("resume_from_checkpoint", "checkpoint-20", "checkpoint-20"),
        ("validation_seed", "7", 7),
        ("lora_alpha", "0.5", 0.5),
        ("report_to", "wandb, tensorboard", ("wandb", "tensorboard")),
        ("report_to", "none", ()),
        ("peft_lora_target_modules", "to_k,to_q", ("to_k", "to_q")),
        ("peft_lora_target_modules", '["to_k", " to_out.0"]', ("to_k", "to_out.0")),
        ("peft_lora_target_modules", "blocks.0.to_k", ("blocks.0.to_k",)),
        ("peft_lora_target_modules", r".*attn1\.to_[qk]", r".*attn1\.to_[qk]"),
        ("peft_lora_target_modules", "[a-c].*[qk]", "[a-c].*[qk]"),
        ("tracker_run_name", 5, "5"),
        ("caption_strategy", "instance_prompt", "instanceprompt"),
        ("optimizer_config", "weight_decay=1e-4", {"weight_decay": 1e-4}),
    ],
)
def test_values_are_read_as_json_types_and_as_texts(
    workspace: Workspace, key: str, written: object, value: object
) -> None:
    if key == "max_train_steps":
        workspace.config["num_train_epochs"] = 1
    workspace.config["instance_prompt"] = "a cat"
    config = workspace.load(**{key: written})
    found = {name: each for _, section in config for name, each in _items(section)}[key]
    assert found == value
    assert type(found) is type(value)


def _items(section: object) -> list[tuple[str, object]]:
    return list(section) if isinstance(section, Section) else []


@pytest.mark.parametrize(
    ("key", "written", "pattern"),
    [
        ("train_batch_size", True, "true: .*number"),
        ("train_batch_size", 1.5, "1.5: .*whole number"),
        ("train_batch_size", "1e-1", '"1e-1": .*whole number'),
        ("learning_rate", "fast", '"fast": .*number'),
        ("learning_rate", "inf", '"inf": .*finite'),
        ("learning_rate", 0, "0: .*above 0"),
        ("gradient_checkpointing", "maybe", '"maybe": .*true or false'),
        ("gradient_checkpointing", 2, "2: .*true or false"),
        ("caption_dropout_probability", 1.5, "1.5: .*at most 1"),
        ("lora_dropout", 1, "1: .*below 1"),
        ("seed", -2, "-2: .*at least 0"),
        ("lr_scheduler", "cosin", '"cosin": .*Did you mean cosine'),
        ("tracker_project_name", [], r"\[\]: .*text"),
        ("output_dir", 3, "3: .*path"),
        ("output_dir", "config.json/output", r".*config.json is a file"),
        ("max_train_steps", 10**30, r".*at most 2147483647"),
        ("max_train_steps", "1e30", r".*at most 2147483647"),
        ("lr_warmup_steps", 10**30, r".*at most 2147483647"),
        ("validation_seed", 10**30, r".*at most 9223372036854775807"),
        ("validation_seed", -(10**30), r".*at least -9223372036854775807"),
        ("output_dir", "s3://bucket", '"s3://bucket": remote'),
        ("init_lora", "missing.safetensors", '"missing.safetensors": not found'),
        ("init_lora", "images", '"images": .*file'),
        ("resume_from_checkpoint", "../other", '"../other": .*latest.*none'),
        ("resume_from_checkpoint", "..", '"..": .*latest.*none'),
        ("optimizer_config", "weight_decya=1", "weight_decya .*adamw.*Did you mean weight_decay"),
        ("resolution", 1.0, "1: .*16 to 16384.*resolution_type"),
        ("num_train_epochs", -1, "-1: .*at least 0"),
        ("validation_resolution", "big", '"big": .*width x height'),
        ("pretrained_model_name_or_path", "model.ckpt", '"model.ckpt": .*pickle'),
        ("pretrained_model_name_or_path", "./nowhere", '"./nowhere": .+'),
        ("pretrained_model_name_or_path", "", '"": .*folder.*repository'),
        ("pretrained_vae_model_name_or_path", "a/b/c", '"a/b/c": .+'),
    ],
)
def test_a_wrong_value_says_what_was_found_and_what_is_allowed(
    workspace: Workspace, key: str, written: object, pattern: str
) -> None:
    message = workspace.problems(**{key: written})
    assert re.fullmatch(f"config.json: 1 problem\n  {key}  {pattern}.*", message), message


def test_a_run_without_an_end_is_refused(workspace: Workspace) -> None:
    message = workspace.problems(max_train_steps=0, num_train_epochs=0)
    assert re.search("  max_train_steps  .*num_train_epochs", message)


def test_prodigy_starts_at_rate_one(workspace: Workspace) -> None:
    assert workspace.load(optimizer="prodigy").optimizer.learning_rate == 1.0


def test_lora_alpha_follows_the_rank(workspace: Workspace) -> None:
    assert workspace.load(lora_rank=4).adapter.lora_alpha == 4.0


def test_null_stands_for_the_default_where_it_is_no_value(workspace: Workspace) -> None:
    config = workspace.load(train_batch_size=None, lora_alpha=None, report_to=None)
    assert (config.training.train_batch_size, config.adapter.lora_alpha) == (1, 16.0)


@pytest.mark.parametrize("key", ["model_family", "data_backend_config"])
def test_a_required_key_that_is_missing_is_named(workspace: Workspace, key: str) -> None:
    message = workspace.without(key).problems()
    assert f"  {key}  required" in message


def test_lora_type_lycoris_needs_its_file(workspace: Workspace) -> None:
    assert "lycoris_config  required by lora_type lycoris" in workspace.without("lycoris_config").problems()


def test_lora_type_standard_does_not_read_the_lycoris_json(workspace: Workspace) -> None:
    workspace.lycoris = {"nonsense": 1}
    assert workspace.load(lora_type="standard").lycoris is None


def test_the_lycoris_json_is_checked_though_lora_type_is_misspelt(workspace: Workspace) -> None:
    workspace.lycoris = {"nonsense": 1}
    message = workspace.problems(lora_type="lycorice")
    assert "Did you mean lycoris?" in message
    assert "nonsense" in message


def test_an_unknown_family_lists_the_known_ones(workspace: Workspace) -> None:
    message = workspace.problems(model_family="toyy")
    assert re.search('model_family  "toyy": .*: toy. Did you mean toy?', message)


@pytest.mark.reliability_row(28)
def test_a_missing_config_is_one_problem_with_exit_code_2(workspace: Workspace) -> None:
    with pytest.raises(ConfigError) as caught:
        workspace.load_as_written(path=workspace.folder / "none.json")
    assert str(caught.value).startswith("none.json: 1 problem\n  not found")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["[]", "3", '"text"', "null"])
def test_a_config_that_is_no_object_is_one_problem(workspace: Workspace, text: str) -> None:
    path = workspace.text("config.json", text)
    with pytest.raises(ConfigError, match=r"^config.json: 1 problem\n  .*object"):
        workspace.load_as_written(path=path)


def test_the_rest_of_a_file_with_slips_is_checked_too(workspace: Workspace) -> None:
    path = workspace.write()
    path.write_text(path.read_text()[:-1] + ', "seed": "x",}', encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        workspace.load_as_written()
    assert "a comma before the closing }" in str(caught.value)
    assert re.search('seed +"x": ', str(caught.value))


@pytest.mark.reliability_row(28)
def test_malformed_json_in_each_file_is_reported_for_each(workspace: Workspace) -> None:
    workspace.write()
    workspace.text("lycoris.json", "{")
    workspace.text("data.json", "[{]")
    with pytest.raises(ConfigError) as caught:
        workspace.load_as_written()
    message = str(caught.value)
    assert "lycoris.json: 1 problem\n  line 1, column 1  {" in message
    assert "data.json: 1 problem\n  line 1, column 3" in message


# Paths


def test_inputs_are_looked_for_in_the_working_directory_then_beside_the_config(workspace: Workspace) -> None:
    run = workspace.folder / "conf"
    run.mkdir()
    for name in ("lycoris.json", "data.json"):
        workspace.write()
        (workspace.folder / name).rename(run / name)
    (run / "config.json").write_text(json.dumps(workspace.config), encoding="utf-8")
    config = workspace.load_as_written(path=run / "config.json")
    assert config.data.data_backend_config == run / "data.json"
    (workspace.folder / "data.json").write_text(json.dumps(workspace.datasets), encoding="utf-8")
    config = workspace.load_as_written(path=run / "config.json")
    assert config.data.data_backend_config == workspace.folder / "data.json"
    assert config.checkpoint.output_dir == workspace.folder / "output" / "conf"


def test_a_model_folder_becomes_absolute_and_a_repository_stays(workspace: Workspace) -> None:
    (workspace.folder / "models" / "mine").mkdir(parents=True)
    found = workspace.load(pretrained_model_name_or_path="models/mine").model.pretrained_model_name_or_path
    assert found == str(workspace.folder / "models" / "mine")
    other = workspace.load(pretrained_model_name_or_path="models/others")
    assert other.model.pretrained_model_name_or_path == "models/others"


def test_names_in_braces_are_replaced_in_paths(workspace: Workspace) -> None:
    config = workspace.load(
        output_dir="out/{model_family}",
        cache_dir_vae="{output_dir}/latents",
        cache_dir_text="text-{model_family}",
    )
    assert config.checkpoint.output_dir == workspace.folder / "out" / "toy"
    assert config.data.cache_dir_vae == workspace.folder / "out" / "toy" / "latents"
    assert config.data.cache_dir_text == workspace.folder / "text-toy"
    assert config.datasets[0].cache_dir_vae == workspace.folder / "out" / "toy" / "latents" / "photos"


@pytest.mark.parametrize(
    ("key", "known"), [("output_dir", "{model_family}"), ("cache_dir_vae", "{output_dir}")]
)
def test_an_unknown_name_in_braces_lists_the_known(workspace: Workspace, key: str, known: str) -> None:
    message = workspace.problems(**{key: "a/{familie}"})
    assert "{familie} is unknown here. Known placeholders: {model_family}" in message
    assert known in message


def test_output_inside_a_dataset_is_refused(workspace: Workspace) -> None:
    message = workspace.problems(output_dir="images/out")
    assert "  output_dir  " in message
    assert "instance_data_dir of dataset photos" in message


# A configuration that was written on Windows


def test_backslashes_in_paths_separate_folders(workspace: Workspace) -> None:
    workspace.image_folder("images/cats")
    workspace.folder.joinpath("own", "adapter").mkdir(parents=True)
    workspace.text("own/adapter/lycoris.json", json.dumps(workspace.lycoris))
    workspace.datasets = [{"id": "photos", "instance_data_dir": ".\\images\\cats"}]
    overrides = ("cache_dir_vae=cache\\vae", "pretrained_model_name_or_path=own\\adapter")
    config = workspace.load(
        *overrides, lycoris_config="own\\adapter\\lycoris.json", output_dir="output\\mine"
    )
    assert config.datasets[0].instance_data_dir == workspace.folder / "images" / "cats"
    assert config.checkpoint.output_dir == workspace.folder / "output" / "mine"
    assert config.data.cache_dir_vae == workspace.folder / "cache" / "vae"
    assert config.model.pretrained_model_name_or_path == str(workspace.folder / "own" / "adapter")
    assert config.lycoris is not None


def test_a_name_that_holds_backslashes_is_found_as_it_is_written(workspace: Workspace) -> None:
    workspace.image_folder("images/cats")
    workspace.image_folder("images\\cats")
    workspace.datasets = [{"id": "photos", "instance_data_dir": "images\\cats"}]
    assert workspace.load().datasets[0].instance_data_dir == workspace.folder / "images\\cats"


def test_paths_of_a_drive_are_refused_at_their_keys(workspace: Workspace) -> None:
    workspace.datasets = [{"id": "photos", "instance_data_dir": "D:\\images"}]
    message = workspace.problems(
        output_dir="C:\\runs\\mine",
        cache_dir_text="//server/cache",
        cache_dir_vae="\\\\server\\cache",
        pretrained_model_name_or_path="C:/model",
        init_lora="C:\\a.safetensors",
    )
    for key in (
        "output_dir",
        "cache_dir_vae",
        "pretrained_model_name_or_path",
        "init_lora",
        "instance_data_dir",
    ):
        assert key in message
    assert "cache_dir_text" not in message
    assert {path.name for path in workspace.folder.iterdir()} == {
        "config.json",
        "lycoris.json",
        "data.json",
        "images",
    }


@pytest.mark.parametrize("path", ["~\\images", "C:\new\table", "\\", "..\\..\\none", "images\\*"])
def test_a_strange_path_is_one_problem(workspace: Workspace, path: str) -> None:
    workspace.datasets = [{"id": "photos", "instance_data_dir": path}]
    assert "photos.instance_data_dir" in workspace.problems()


# The lycoris json and the dataset json may stand in config.json itself


def test_the_other_files_may_stand_in_config_json(workspace: Workspace) -> None:
    config = workspace.load(
        lycoris_config=dict(workspace.lycoris), data_backend_config=list(workspace.datasets)
    )
    assert config.lycoris is not None
    assert config.lycoris.algo == "tlora"
    assert config.datasets[0].id == "photos"


def test_mistakes_in_what_stands_in_config_json_name_it(workspace: Workspace) -> None:
    message = workspace.problems(lycoris_config={"algo": "tlra"}, data_backend_config=[1])
    assert "config.json, lycoris_config: 4 problems" in message
    assert "Did you mean tlora?" in message
    assert "config.json, data_backend_config: 2 problems" in message


# Speed, as counts that do not depend on the machine's load


def test_loading_imports_no_torch_and_few_modules(workspace: Workspace, repository: Path) -> None:
    workspace.write()
    script = (
        "import sys\n"
        f"sys.path.insert(0, {str(repository)!r})\n"
        "from pathlib import Path\n"
        "from simpletuner.helpers.configuration.load import load_config\n"
        "from simpletuner.helpers.contracts import ModelSpec\n"
        "spec = ModelSpec('toy', {'a': 'b/c'}, 'a', ('epsilon',), 64, 8, 512, ('to_q',))\n"
        "load_config(Path('config.json'), families={'toy': spec})\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'lycoris', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(len(sys.modules))\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 400  # 257 with pydantic 2.14


def test_loading_makes_few_calls_for_each_image(workspace: Workspace) -> None:
    path = workspace.write()
    few = _num_calls(lambda: load_config(path, families=workspace.families))
    workspace.image_folder("images", [f"{index:04}.png" for index in range(2000)])
    many = _num_calls(lambda: load_config(path, families=workspace.families))
    assert few < 8500  # 8,170
    assert many - few < 5 * 2000  # the folder is listed, no image is opened


def _num_calls(function: Callable[[], object]) -> int:
    """Calls of Python and C functions."""
    events: list[str] = []
    before = sys.getprofile()
    sys.setprofile(lambda _frame, event, _argument: events.append(event))
    try:
        function()
    finally:
        sys.setprofile(before)
    return events.count("call") + events.count("c_call")


@pytest.mark.parametrize("value", ["L2", " l2 ", False, "", "none", 0])
def test_loss_type_takes_every_spelling_of_the_squared_loss(workspace: Workspace, value: object) -> None:
    assert workspace.load(loss_type=value).noise.loss_type == "l2"


@pytest.mark.parametrize("algo", [["tlora"], {"a": 1}])
def test_an_algorithm_that_is_no_text_is_a_problem_of_its_key(workspace: Workspace, algo: object) -> None:
    workspace.lycoris["algo"] = algo
    assert "algo" in workspace.problems()


def test_a_home_folder_of_nobody_is_a_problem_of_its_key(workspace: Workspace) -> None:
    assert "output_dir" in workspace.problems(output_dir="~nobody-has-this-name/x")


def test_a_configuration_without_output_dir_gets_a_folder_of_its_own(workspace: Workspace) -> None:
    name = workspace.folder.name
    assert workspace.load().checkpoint.output_dir == Path.cwd() / "output" / name
    other = workspace.text("other.json", workspace.write().read_text())
    assert (
        workspace.load_as_written(path=other).checkpoint.output_dir == Path.cwd() / "output" / f"{name}-other"
    )
    assert workspace.load("output_dir=null").checkpoint.output_dir == Path.cwd() / "output" / name


@pytest.mark.parametrize("name", ["sdxl", "photo", "toy"])
def test_the_demo_is_found_from_every_folder(name: str, workspace: Workspace) -> None:
    found = PathContext(working_directory=workspace.folder).input_path(f"simpletuner/demo/{name}")
    assert found is not None
    assert found.is_dir()
    assert PathContext(working_directory=workspace.folder).input_path("simpletuner/helpers") is None


@pytest.mark.parametrize("output_dir", ["output", "output/new/run"])
@pytest.mark.reliability_row(26)
def test_output_dir_that_cannot_be_written_is_a_problem(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, output_dir: str
) -> None:
    folder = workspace.folder / "output"
    folder.mkdir()

    def access(path: Path, mode: int) -> bool:  # as for a user who is not root, or a read-only disk
        return not (Path(path) == folder and mode & os.W_OK)

    monkeypatch.setattr(os, "access", access)
    assert str(folder) in workspace.problems(output_dir=output_dir)


def test_output_dir_of_a_compared_run_may_be_read_only(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {**workspace.config, "output_dir": "finished"}
    workspace.text("other.json", json.dumps(other))
    (workspace.folder / "finished").mkdir()
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).name != "finished")
    loaded = workspace.load(validation_compared_config="other.json")
    assert loaded.compared_with is not None


def test_the_repository_is_named_by_hub_model_id_or_by_a_project_that_can_be_one(
    workspace: Workspace,
) -> None:
    assert workspace.load(
        push_to_hub=True, hub_model_id="https://huggingface.co/me/cat"
    ).publishing.hub_model_id == ("me/cat")
    workspace.load(push_to_hub=False, hub_model_id=None, tracker_project_name="my cats")
    assert "tracker_project_name" in workspace.problems(push_to_hub=True)
    assert "hub_model_id" in workspace.problems(hub_model_id="me//cat")


def test_the_title_is_that_of_the_repository_the_run_or_the_folder(workspace: Workspace) -> None:
    assert workspace.load(output_dir="out/cats").title == "cats"
    assert workspace.load(tracker_run_name="try 2").title == "try 2"
    assert workspace.load(hub_model_id="me/cat").title == "cat"


def test_target_layers_are_read_from_a_file(workspace: Workspace) -> None:
    workspace.text("layers.json", '["to_k", "to_q"]')
    config = workspace.load(peft_lora_target_modules="layers.json")
    assert config.adapter.peft_lora_target_modules == ("to_k", "to_q")


@pytest.mark.parametrize(
    ("written", "found"),
    [
        (r".*to_(q|k", "character 6"),
        ("other.json", "other.json"),
        ("layers.json", "array"),
        ("broken.json", "broken.json"),
        ('["to_q", 5]', "array"),
    ],
)
def test_target_layers_that_cannot_be_read_are_refused(
    workspace: Workspace, written: str, found: str
) -> None:
    workspace.text("layers.json", '{"to_k": 1}')
    workspace.text("broken.json", "[")
    message = workspace.problems(peft_lora_target_modules=written)
    assert "config.json: 1 problem" in message
    assert "  peft_lora_target_modules  " in message
    assert found in message


@pytest.mark.parametrize("decay", [1, 1.5, -0.1, "1.0"])
def test_a_decay_that_would_keep_the_start_for_ever_is_refused(workspace: Workspace, decay: object) -> None:
    message = workspace.problems(use_ema=True, ema_decay=decay)
    assert "ema_decay" in message
    assert str(decay) in message


@pytest.mark.parametrize(
    "keys", [{"ema_update_interval": 0}, {"ema_device": "cuda"}, {"ema_validation": "both"}], ids=str
)
def test_other_values_of_the_average_are_refused_by_key(
    workspace: Workspace, keys: dict[str, object]
) -> None:
    assert next(iter(keys)) in workspace.problems(use_ema=True, **keys)


def test_an_optimiser_with_an_average_of_its_own_is_refused_by_name(workspace: Workspace) -> None:
    for name, record in OPTIMIZERS.items():
        if record.has_averages:
            message = workspace.problems(use_ema=True, optimizer=name)
            assert "use_ema" in message
            assert name in message
        else:
            assert workspace.load(use_ema=True, optimizer=name).ema.use_ema
        workspace.load(use_ema=False, optimizer=name)


def test_simpletuner_s_keys_of_the_average_are_ours(workspace: Workspace) -> None:
    theirs = {"use_ema": True, "ema_cpu_only": True, "ema_foreach_disable": True, "ema_update_interval": None}
    ema = workspace.load(**theirs).ema
    assert (ema.use_ema, ema.ema_device, ema.ema_update_interval) == (True, "cpu", 1)
