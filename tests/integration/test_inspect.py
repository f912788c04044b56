"""`simpletuner inspect`: what a file is, for every kind of file that a user may hold."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from simpletuner import cli
from simpletuner.cli import app
from simpletuner.helpers.adapters.files import embeddings
from simpletuner.helpers.adapters.files.export import ExportOptions, export_adapter
from simpletuner.helpers.adapters.files.inspection import inspect
from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.io.run_folder import ADAPTER_FILE
from simpletuner.helpers.models import registry
from tests.integration.tiny_pipelines import attach, load, trained_adapter_file
from tests.integration.tiny_runs import TinyRun, deep_model

pytestmark = pytest.mark.usefixtures("shared_caches")


def test_tlora_file_of_a_run_tells_everything_about_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training = TinyRun(tmp_path, keys={"pretrained_model_name_or_path": str(deep_model())})
    assert training.run(max_train_steps=1) == 0
    file = training.output_dir / ADAPTER_FILE
    monkeypatch.setattr("sys.argv", ["simpletuner", "inspect", str(file)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    lines = capsys.readouterr().out.splitlines()
    facts = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in lines if "  " in line}
    assert facts["Algorithm"] == "T-LoRA, init random/last"
    assert facts["Layers"] == "64: rank 8 (64)"
    assert facts["Base model"] == str(deep_model())
    assert facts["Family"] == "sdxl"
    assert facts["steps"] == "1"
    assert facts["learning_rate"] == "0.001"
    assert facts["Targets"] == '{"target_module": ["Attention"]}'
    assert "Missing" not in facts
    chart = [line.split() for line in lines if line.endswith("#")]
    assert [(int(t), int(rank)) for t, rank, _ in chart][:: len(chart) - 1] == [(0, 8), (1000, 2)]
    assert lines[-1].startswith(f"Images: simpletuner sample --adapter {file} --prompt")


def test_json_holds_the_same_facts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = trained_adapter_file(tlora_init="vanilla", linear_alpha=4.0)
    monkeypatch.setattr("sys.argv", ["simpletuner", "inspect", str(file), "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    facts = json.loads(capsys.readouterr().out)
    assert facts["init"] == "vanilla"
    assert facts["scales"] == {"0.5": 40}
    assert facts["schedule"]["min_rank"] == 2
    assert facts["num_frozen"] == 0
    assert facts["num_base_hashes"] == facts["num_layers"] == 40


def test_layers_of_another_rank_are_counted(tmp_path: Path) -> None:
    preset = {"target_module": ["Attention"], "module_algo_map": {"FeedForward": {"linear_dim": 4}}}
    adapter = attach(load(deep_model()), apply_preset=preset)
    adapter.save(tmp_path / "a.safetensors", metadata={})
    assert inspect(tmp_path / "a.safetensors").ranks == {4: 16, 8: 64}


@pytest.mark.parametrize(("algo", "name"), [("lora", "LoRA"), ("loha", "LoHa"), ("lokr", "LoKr")])
def test_other_lycoris_algorithms_are_named_and_have_no_schedule(
    algo: str, name: str, tmp_path: Path
) -> None:
    adapter = attach(load(deep_model()), algo=algo)
    adapter.save(tmp_path / "a.safetensors", metadata={})
    found = inspect(tmp_path / "a.safetensors")
    assert (found.algorithm, found.num_layers, found.schedule, found.missing) == (name, 80, None, ())


@pytest.mark.parametrize(("layout", "name"), [("diffusers", "LoRA in diffusers' format"), ("kohya", "LoRA")])
def test_export_is_a_plain_lora_of_twice_the_rank(layout: str, name: str, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    options = ExportOptions(layout=layout)  # type: ignore[arg-type]
    export_adapter(trained_adapter_file(), output, options, families=registry.specs())
    found = inspect(output)
    assert (found.algorithm, found.ranks, found.schedule) == (name, {16: 40}, None)


def test_stock_file_says_what_it_lacks(tmp_path: Path) -> None:
    state = {
        key: tensor
        for key, tensor in load_file(trained_adapter_file()).items()
        if ".base_" not in key and "schedule" not in key
    }
    save_file(state, tmp_path / "a.safetensors")
    found = inspect(tmp_path / "a.safetensors")
    assert found.algorithm == "T-LoRA"
    assert [line.split(":")[0] for line in found.missing] == ["base factors", "rank schedule", "base model"]
    assert "--family FAMILY --model MODEL" in found.text()


def test_authors_file_is_recognised(tmp_path: Path) -> None:
    place = "unet.mid_block.attn1.processor.to_q_lora"
    save_file(
        {f"{place}.down.weight": torch.ones(4, 8), f"{place}.up.weight": torch.ones(8, 4)}, tmp_path / "a.st"
    )
    found = inspect(tmp_path / "a.st")
    assert (found.algorithm, found.ranks) == ("T-LoRA of the authors' release", {4: 1})


def test_file_that_is_no_adapter_names_its_first_key(tmp_path: Path) -> None:
    save_file({"conv.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=r"conv\.weight"):
        inspect(tmp_path / "a.safetensors")


def test_inspecting_imports_neither_diffusers_nor_lycoris() -> None:
    code = (
        "import sys; from pathlib import Path; "
        "from simpletuner.helpers.adapters.files.inspection import inspect; "
        f"inspect(Path({str(trained_adapter_file())!r})).text(); "
        "print(sorted({'diffusers', 'lycoris', 'peft', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_file_of_a_new_token_is_described_by_its_embeddings(tmp_path: Path) -> None:
    file = tmp_path / "learned_embeds.safetensors"
    rows = {"text_encoder": torch.full((2, 4), 0.5), "text_encoder_2": torch.zeros(2, 6)}
    metadata = {"placeholder_token": "<cat>", "initializer_token": "cat", "steps": "12"}
    embeddings.write(file, rows, metadata=metadata)
    result = CliRunner().invoke(app, ["inspect", str(file)], catch_exceptions=False)
    lines = {tuple(re.split("  +", line)) for line in result.output.splitlines()}
    assert {("New token", "<cat>"), ("Started from", "cat"), ("steps", "12")} < lines
    assert ("text_encoder", "2 of width 4, mean length 1") in lines
    assert ("text_encoder_2", "2 of width 6, mean length 0") in lines
    stored = json.loads(CliRunner().invoke(app, ["inspect", str(file), "--json"]).output)
    assert stored["embeddings"] == {"text_encoder": [2, 4], "text_encoder_2": [2, 6]}
