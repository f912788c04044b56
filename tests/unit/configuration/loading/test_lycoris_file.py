"""The lycoris json."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from simpletuner.helpers.choices.algorithms import ALGORITHMS
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig
from simpletuner.helpers.errors import ConfigError

if TYPE_CHECKING:
    from conftest import Workspace


def loaded(workspace: Workspace, **changes: object) -> LycorisConfig:
    workspace.lycoris |= changes
    config = workspace.load().lycoris
    assert config is not None
    return config


def refused(workspace: Workspace, **changes: object) -> str:
    workspace.lycoris |= changes
    message = workspace.problems()
    assert message.startswith("lycoris.json: 1 problem\n"), message
    return message


def test_t_lora_has_the_defaults_of_the_method(workspace: Workspace) -> None:
    config = loaded(workspace)
    assert (config.tlora_min_rank, config.tlora_alpha, config.tlora_schedule) == (1, 1.0, "floor")
    assert (config.tlora_init, config.sig_type) == ("random", "last")
    assert config.extra == {}


@pytest.mark.parametrize(
    ("written", "read"),
    [(3, 3), ("3", 3), (3.0, 3), ("2e0", 2), (0.5, 0.5), ("0.5", 0.5), (".25", 0.25)],
)
def test_min_rank_is_a_rank_or_a_share(workspace: Workspace, written: object, read: float) -> None:
    entry = {"tlora_min_rank": written, "tlora_alpha": 2}
    config = loaded(workspace, tlora_min_rank=written, apply_preset={"module_algo_map": {"X": entry}})
    own = config.apply_preset.module_algo_map["X"]
    for found in (config.tlora_min_rank, own.tlora_min_rank):
        assert (found, type(found)) == (read, type(read))
    assert own.tlora_alpha == 2.0


@pytest.mark.parametrize("key", ["multiplier", "linear_alpha"])
@pytest.mark.parametrize("written", [0.5, "0.5", "5e-1"])
def test_strength_and_alpha_stay_floats(workspace: Workspace, key: str, written: object) -> None:
    assert loaded(workspace, **{key: written}).model_dump()[key] == 0.5


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_algorithm_of_lycoris_is_known(workspace: Workspace, algo: str) -> None:
    assert loaded(workspace, algo=algo).algo == algo


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_an_algorithm_takes_its_own_arguments_and_no_others(workspace: Workspace, algo: str) -> None:
    every = {
        "factor": 4, "decompose_both": True, "dropout": 0.1, "bypass_mode": True, "use_tucker": True,
        "constrain": 0.5, "rescaled": True, "block_size": 2, "train_on_input": True, "rs_lora": True,
        "conv_dim": 4,
    }  # fmt: skip
    names = {"constrain": "constraint"}
    own = {key: value for key, value in every.items() if names.get(key, key) in ALGORITHMS[algo].arguments}
    config = loaded(workspace, algo=algo, **own)
    assert config.extra == {names.get(key, key): value for key, value in own.items()}
    workspace.lycoris |= every
    message = workspace.problems()
    assert {line.split()[0] for line in message.splitlines()[1:]} == every.keys() - own.keys()


@pytest.mark.parametrize(
    ("algo", "options", "idle"),
    [
        ("lora", {"bypass_mode": True, "weight_decompose": True}, "bypass_mode"),
        ("lokr", {"bypass_mode": True, "dora_wd": True, "wd_on_output": False}, "bypass_mode"),
        ("lora", {"dropout": 0.1}, "dropout"),
        ("glora", {"rank_dropout": 0.1}, "rank_dropout"),
        ("lokr", {"rank_dropout": 0.1, "bypass_mode": True}, "rank_dropout"),
        ("diag-oft", {"rank_dropout": 0.1, "bypass_mode": True}, "rank_dropout"),
        ("loha", {"rank_dropout_scale": True}, "rank_dropout_scale"),
        ("loha", {"wd_on_out": False}, "wd_on_out"),
        ("lokr", {"full_matrix": True, "decompose_both": True}, "decompose_both"),
        ("lokr", {"full_matrix": True, "use_tucker": True}, "use_tucker"),
        (
            "lora",
            {"apply_preset": {"name_algo_map": {"x": {"bypass_mode": True, "dora_wd": True}}}},
            "apply_preset.name_algo_map.x.bypass_mode",
        ),
        (
            "lora",
            {"dora_wd": True, "apply_preset": {"module_algo_map": {"X": {"bypass_mode": True}}}},
            "apply_preset.module_algo_map.X.bypass_mode",
        ),
    ],
)  # fmt: skip
def test_an_option_without_effect_beside_the_others_is_refused(
    workspace: Workspace, algo: str, options: dict[str, object], idle: str
) -> None:
    assert re.search(rf"^  \S*{re.escape(idle)}  ", refused(workspace, algo=algo, **options), re.MULTILINE)


@pytest.mark.parametrize(
    ("algo", "options"),
    [
        ("lora", {"weight_decompose": True, "wd_on_out": False}),
        ("lora", {"dropout": 0.1, "bypass_mode": True}),
        ("lora", {"bypass_mode": True, "rank_dropout": 0.1, "wd_on_out": True, "weight_decompose": False}),
        ("lokr", {"rank_dropout": 0.1, "rank_dropout_scale": True}),
        ("diag-oft", {"rank_dropout": 0.1}),
        ("glora", {"rank_dropout": 0.1, "bypass_mode": True}),
        # The entry's algorithm takes no bypass_mode, and its weight_decompose has an effect in the others.
        (
            "lora",
            {
                "weight_decompose": True,
                "apply_preset": {"module_algo_map": {"X": {"algo": "ia3", "bypass_mode": True}}},
            },
        ),
    ],
)  # fmt: skip
def test_options_that_work_together_are_taken(
    workspace: Workspace, algo: str, options: dict[str, object]
) -> None:
    loaded(workspace, algo=algo, **options)


@pytest.mark.parametrize(
    ("algo", "option", "value"),
    [
        ("full", "bypass_mode", True),
        ("dylora", "bypass_mode", True),
        ("glora", "use_tucker", True),
        ("boft", "rank_dropout", 0.1),
        ("ia3", "conv_dim", 2),
        ("full", "conv_alpha", 2),
        ("diag-oft", "conv_alpha", 2),
    ],
)
def test_an_option_that_an_algorithm_ignores_is_refused(
    workspace: Workspace, algo: str, option: str, value: object
) -> None:
    assert f"{option}  not taken by algo {algo}" in refused(workspace, algo=algo, **{option: value})


def test_arguments_given_as_texts_become_their_types(workspace: Workspace) -> None:
    extra = loaded(workspace, algo="lokr", factor="8", full_matrix="true", rank_dropout="0.25").extra
    assert extra == {"factor": 8, "full_matrix": True, "rank_dropout": 0.25}
    assert [type(extra[key]) for key in ("factor", "full_matrix", "rank_dropout")] == [int, bool, float]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"tlora_min_rank": 9}, "tlora_min_rank  9 is above linear_dim 8. Lower it or raise linear_dim."),
        ({"tlora_min_rank": 0}, "tlora_min_rank  0: must be a rank, "),
        ({"tlora_schedule": "cosine", "tlora_alpha": 2}, "tlora_alpha  has no meaning with tlora_schedule"),
        ({"tlora_alpha": 0}, "tlora_alpha  0: must be above 0."),
        ({"tlora_init": "weihgt"}, "must be one of random, weight, vanilla. Did you mean weight?"),
        ({"sig_type": "first"}, "must be one of last, middle, principal."),
        ({"multiplier": 0}, "multiplier  0: must not be 0, which switches the adapter off."),
        ({"algo": "ia3", "multiplier": 0.5}, "multiplier  0.5 cannot be stored in the file of ia3"),
        ({"algo": "diag-oft", "multiplier": 0.5}, "in the file of diag-oft"),
        ({"algo": "boft", "multiplier": 2}, "multiplier  2 cannot be stored in the file of boft"),
        ({"algo": "lora", "multiplier": 0.5, "dora_wd": True}, "in the file of weight_decompose"),
        (
            {"algo": "lora", "multiplier": 0.5,
             "apply_preset": {"name_algo_map": {"x": {"algo": "ia3"}, "y": {"weight_decompose": True}}}},
            "in the file of ia3, weight_decompose",
        ),
        ({"linear_dim": 0}, "linear_dim  0: must be at least 1."),
        ({"linear_alpha": "x"}, 'linear_alpha  "x": must be a number.'),
        ({"algo": "tlra"}, 'algo  "tlra": must be one of tlora, lora,'),
        ({"dropout": 0.1}, "dropout  not supported with algo tlora"),
        ({"rank_dropout": "0.1"}, "rank_dropout  not supported with algo tlora"),
        ({"module_dropout": 1}, "module_dropout  not supported with algo tlora"),
        ({"bypass_mode": True}, "bypass_mode  not taken by algo tlora"),
        ({"factor": 4}, "factor  not taken by algo tlora. Remove it; it belongs to lokr, tlokr."),
        ({"algo": "tlokr", "full_matrix": True}, "full_matrix  not taken by algo tlokr, whose rank schedule"),
        ({"algo": "tlokr", "tlora_init": "random"}, "tlora_init  belongs to algo tlora, but algo is tlokr"),
        ({"mask_group_id": -1}, "mask_group_id  -1: must be at least 0."),
        ({"mask_group_id": 1 << 16}, "mask_group_id  65536: must be below 65536."),
        ({"preset": "full"}, "Use apply_preset, which names the layers."),
        ({"linear_dims": 4}, "linear_dims  unknown key. Did you mean linear_dim?"),
        ({"apply_preset": []}, "apply_preset  []: must be an object"),
        ({"apply_preset": {"target_modules": []}}, "unknown key. Did you mean target_module?"),
        ({"apply_preset": {"lora_prefix": "lora_unet"}}, "apply_preset.lora_prefix  known from SimpleTuner"),
        ({"apply_preset": {"target_name": "(a"}}, "apply_preset.target_name  '(a' "),
        ({"apply_preset": {"module_algo_map": {"X": {"factr": 3, "algo": "lokr"}}}}, "Did you mean factor?"),
        ({"apply_preset": {"module_algo_map": {"X": {"factor": 3}}}}, "not taken by algo tlora."),
        ({"apply_preset": {"name_algo_map": {"x": {"dim": 0}}}}, "name_algo_map.x.dim  0: must be at"),
        ({"apply_preset": {"name_algo_map": {"x": {"conv_dim": 2}}}}, "name_algo_map.x.conv_dim  "),
        ({"apply_preset": {"name_algo_map": {"x": {"dim": 2, "linear_dim": 3}}}}, "is another name of dim"),
        ({"apply_preset": {"name_algo_map": {"x": {"dropout": 0.5}}}}, "not supported with algo tlora"),
        ({"tlora_min_rank": -1}, "tlora_min_rank  -1: must be a rank"),
        ({"tlora_min_rank": 0.0}, "tlora_min_rank  0.0: must be a rank"),
        ({"tlora_min_rank": 1.0}, "tlora_min_rank  1.0: is a rank or a share? Write 1 for one rank, or "),
        ({"tlora_min_rank": "1.0"}, 'tlora_min_rank  "1.0": is a rank or a share?'),
        ({"tlora_min_rank": 2.5}, "tlora_min_rank  2.5: must be a rank"),
        ({"tlora_min_rank": True}, "tlora_min_rank  true: must be a number"),
        ({"tlora_min_rank": "half"}, 'tlora_min_rank  "half": must be a number'),
        ({"tlora_scale": "alpha"}, 'tlora_scale  "alpha": must be one of rank, active'),
        ({"algo": "lora", "tlora_scale": "active"}, "tlora_scale  belongs to algo tlora, but algo is lora"),
        ({"tlora_scale": "active", "tlora_schedule": "cosine"}, "tlora_scale  is part of "),
        (
            {"apply_preset": {"module_algo_map": {"X": {"dim": 4, "tlora_min_rank": 5}}}},
            "module_algo_map.X.tlora_min_rank  5 is above the rank of these layers, 4.",
        ),
        (
            {"apply_preset": {"name_algo_map": {"x": {"tlora_min_rank": 9}}}},
            "name_algo_map.x.tlora_min_rank  9 is above the rank of these layers, 8.",
        ),
        (
            {"apply_preset": {"name_algo_map": {"x": {"algo": "lora", "tlora_min_rank": 2}}}},
            "name_algo_map.x.tlora_min_rank  belongs to algo tlora, but these layers have lora",
        ),
        (
            {"apply_preset": {"name_algo_map": {"x": {"tlora_scale": "active"}}}},
            "name_algo_map.x.tlora_scale  applies to the whole adapter",
        ),
        (
            {"tlora_schedule": "linear", "apply_preset": {"name_algo_map": {"x": {"tlora_alpha": 2.0}}}},
            "name_algo_map.x.tlora_alpha  has no meaning with tlora_schedule linear",
        ),
        ({"apply_preset": {"name_algo_map": {"x": {"tlora_alpha": 0}}}}, "x.tlora_alpha  0: must be above 0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_says_what_to_do(
    workspace: Workspace, changes: dict[str, object], text: str
) -> None:
    assert text in refused(workspace, **changes)


@pytest.mark.parametrize("dropout", ["dropout", "rank_dropout", "module_dropout"])
def test_zero_dropout_is_no_dropout(workspace: Workspace, dropout: str) -> None:
    assert loaded(workspace, **{dropout: 0.0}).extra == {}
    assert loaded(workspace, algo="lora").extra == {}


def test_dropout_with_tlora_is_refused_though_a_layer_of_another_kind_could_take_it(
    workspace: Workspace,
) -> None:
    preset = {"module_algo_map": {"X": {"algo": "lora"}}}
    assert "not supported with algo tlora" in refused(workspace, dropout=0.1, apply_preset=preset)


def test_false_is_an_argument_of_its_own(workspace: Workspace) -> None:
    assert loaded(workspace, algo="lora", dora_wd=True, wd_on_output=False).extra == {
        "weight_decompose": True,
        "wd_on_out": False,
    }


@pytest.mark.parametrize(("use", "init"), [(True, "weight"), ("false", "random")])
def test_lycoris_own_name_of_the_start_is_read(workspace: Workspace, use: object, init: str) -> None:
    assert loaded(workspace, use_data_init=use).tlora_init == init
    assert loaded(workspace, use_data_init=use, tlora_init=init).tlora_init == init


@pytest.mark.parametrize(
    ("use", "init"), [(True, "random"), (False, "weight"), (True, "vanilla"), (False, "vanilla")]
)
def test_two_starts_that_contradict_are_refused(workspace: Workspace, use: bool, init: str) -> None:
    message = refused(workspace, use_data_init=use, tlora_init=init)
    assert "Keep tlora_init and remove use_data_init." in message


def test_a_start_that_is_neither_true_nor_false_is_refused(workspace: Workspace) -> None:
    assert '"maybe": must be true or false.' in refused(workspace, use_data_init="maybe")


@pytest.mark.parametrize("key", ["tlora_min_rank", "tlora_alpha", "tlora_schedule", "tlora_init", "sig_type"])
def test_keys_of_tlora_belong_to_it(workspace: Workspace, key: str) -> None:
    assert f"{key}  belongs to algo tlora, but algo is lora." in refused(workspace, algo="lora", **{key: 1})


def test_keys_of_tlora_count_when_some_layers_use_it(workspace: Workspace) -> None:
    preset = {"module_algo_map": {"X": {"algo": "tlora"}}}
    config = loaded(workspace, algo="lokr", linear_dim=100, factor=4, tlora_min_rank=3, apply_preset=preset)
    assert config.tlora_min_rank == 3
    assert config.extra == {"factor": 4}


def test_targets_are_read_as_list_or_text(workspace: Workspace) -> None:
    preset = {"target_module": "Attention, FeedForward", "target_name": "a{1,2}", "exclude_name": ["x"]}
    targets = loaded(workspace, apply_preset=preset).apply_preset
    assert targets.target_module == ("Attention", "FeedForward")
    assert targets.target_name == ("a{1,2}",)
    assert targets.exclude_name == ("x",)


def test_wildcards_are_allowed_with_fnmatch(workspace: Workspace) -> None:
    preset = {"target_name": "*.attn", "use_fnmatch": "true"}
    assert loaded(workspace, apply_preset=preset).apply_preset.use_fnmatch is True
    del preset["use_fnmatch"]
    assert "Set use_fnmatch for * and ?." in refused(workspace, apply_preset=preset)


def test_entries_of_a_map_use_the_names_of_the_constructors(workspace: Workspace) -> None:
    entry = {"algo": "lora", "linear_dim": "4", "linear_alpha": 0.5, "dora_wd": True}
    preset = loaded(workspace, apply_preset={"module_algo_map": {"X": entry}}).apply_preset
    dumped = preset.module_algo_map["X"].model_dump(exclude_none=True)
    assert dumped == {"algo": "lora", "dim": 4, "alpha": 0.5, "weight_decompose": True}


def test_the_json_is_kept_as_it_was_written_but_for_numbers_of_the_environment(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_NUMBER", "6")
    monkeypatch.setenv("TOY_CLASS", "Attention")
    numbers = {"linear_dim": "{env:TOY_NUMBER}", "--multiplier": "{env:TOY_NUMBER}"}
    preset = {"target_module": ["{env:TOY_CLASS}"], "lora_prefix": "lycoris"}
    del workspace.lycoris["multiplier"]
    config = loaded(workspace, **numbers, tlora_init="vanilla", apply_preset=preset)
    assert (config.linear_dim, config.multiplier) == (6, 6)
    assert config.raw == {**workspace.lycoris, "linear_dim": "6", "--multiplier": "6"}
    assert json.loads(json.dumps(dict(config.raw)))["apply_preset"] == preset


@pytest.mark.parametrize("key", ["algo", "multiplier", "linear_dim", "linear_alpha"])
def test_required_keys_are_required(workspace: Workspace, key: str) -> None:
    del workspace.lycoris[key]
    assert f"{key}  required, but missing." in refused(workspace)


@pytest.mark.parametrize("text", ["[]", "null"])
def test_a_lycoris_json_that_is_no_object_is_refused(workspace: Workspace, text: str) -> None:
    workspace.write()
    workspace.text("lycoris.json", text)
    with pytest.raises(ConfigError, match=r"^lycoris.json: 1 problem\n  .*object"):
        workspace.load_as_written()
