"""Training on several processes: the same adapter on each, and the one that a single process trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from simpletuner.helpers.io.run_folder import ADAPTER_FILE, EMA_ADAPTER_FILE, checkpoint_folders
from tests.integration.family_runs import FLUX
from tests.integration.processes import start, start_ranks, wait_for_all
from tests.integration.tiny_runs import TLORA, TinyRun

pytestmark = pytest.mark.usefixtures("shared_caches")

SCRIPT = """
import json, os, sys
from pathlib import Path
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.models import registry
from simpletuner.helpers.training.build import build_trainer
config = load_config(Path(sys.argv[1]), families=registry.specs())
trainer = build_trainer(config)
folder = Path(sys.argv[1]).parent
rank = trainer.accelerator.process_index
def keep(name):
    state = trainer.trainable.state_dict()
    save_file({k: v.clone() for k, v in state.items()}, folder / f"{name}-{rank}.safetensors")
keep("start")
seen, add_noise = [], trainer.family.add_noise
def watched(latents, **options):
    noised = add_noise(latents, **options)
    seen.append(noised.timesteps)
    return noised
trainer.family.add_noise = watched
parts = [isinstance(p, DTensor) for p in trainer.denoiser.parameters()]
(folder / f"parts-{rank}.json").write_text(json.dumps([sum(parts), len(parts)]))
code = trainer.run()
keep("end")
(folder / f"timesteps-{rank}.json").write_text(json.dumps(seen))
sys.exit(code)
"""
# accelerate passes over its FSDP plugin on a CPU; told that it is at work, it shards there too.
ON_CPU_TOO = """
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
import simpletuner.helpers.training.preparing as preparing
make = preparing.build_accelerator
def build_accelerator(config):
    accelerator = make(config)
    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=False, reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["BasicTransformerBlock"])
    return accelerator
preparing.build_accelerator = build_accelerator
"""
VARIANTS = {
    "plain": {"gradient_checkpointing": False},
    "checkpointed and accumulated": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
}


def train(run: TinyRun, *, num_processes: int, before: str = "", **keys: object) -> TinyRun:
    run.config(**keys)
    script = run.folder / "script.py"
    script.write_text(before + SCRIPT)
    arguments = (script, run.folder / "config.json")
    wait_for_all([start(*arguments)] if num_processes == 1 else start_ranks(*arguments))
    return run


@pytest.fixture(scope="module", params=VARIANTS)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyRun, TinyRun]:
    """The same three steps of two samples each: on two processes, and on one."""
    folder = tmp_path_factory.mktemp("runs")
    # A large eps: where a gradient is nearly zero, Adam divides rounding by rounding.
    constant = {"lr_scheduler": "constant", "optimizer_config": "eps=1e-3"}
    saves = {"checkpoint_step_interval": 0, "checkpoint_epoch_interval": 1}
    keys = {"max_train_steps": 3, "use_ema": True, **constant, **saves, **VARIANTS[request.param]}
    two = train(TinyRun(folder / "two", num_images=4), num_processes=2, train_batch_size=1, **keys)
    one = train(TinyRun(folder / "one", num_images=4), num_processes=1, train_batch_size=2, **keys)
    return two, one


def tensors(run: TinyRun, name: str) -> dict[str, Tensor]:
    return load_file(run.folder / f"{name}.safetensors")


def test_both_processes_start_and_end_with_the_same_adapter(runs: tuple[TinyRun, TinyRun]) -> None:
    two, _ = runs
    for name in ("start", "end"):
        first, second = tensors(two, f"{name}-0"), tensors(two, f"{name}-1")
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def test_epochs_end_at_the_same_steps_on_two_processes_and_on_one(runs: tuple[TinyRun, TinyRun]) -> None:
    for run in runs:
        # 4 images are 2 batches of 2; the last step, 3, is saved in any case.
        accumulates = "accumulation" in " ".join(json.loads((run.folder / "config.json").read_text()))
        steps = [step for step, _ in checkpoint_folders(run.output_dir)]
        assert steps == ([1, 2, 3] if accumulates else [2, 3])


def test_two_processes_train_what_one_trains_with_the_same_samples(runs: tuple[TinyRun, TinyRun]) -> None:
    two, one = runs
    start, end, expected = tensors(one, "start-0"), tensors(two, "end-0"), tensors(one, "end-0")
    trained = [key for key in start if not torch.equal(start[key], expected[key])]
    assert len(trained) == 3 * 32, "dQ, dP and dlam of every layer"
    assert max(float((expected[key] - start[key]).abs().max()) for key in trained) > 1e-3
    for key, tensor in expected.items():
        torch.testing.assert_close(end[key], tensor, rtol=0, atol=1e-7)
    losses = [[line["loss"] for line in run.log()] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    by_band = [
        [(band, loss) for line in run.log() for band, loss in line["loss_by_band"].items()] for run in runs
    ]
    assert len({band for band, loss in by_band[0] if loss is not None}) > 1
    assert [band for band, loss in by_band[0] if loss is None] == [
        band for band, loss in by_band[1] if loss is None
    ]
    known = [[loss for _, loss in each if loss is not None] for each in by_band]
    assert known[0] == pytest.approx(known[1], rel=1e-5)


def test_each_process_opens_the_ranks_of_its_own_samples(runs: tuple[TinyRun, TinyRun]) -> None:
    two, one = runs
    first, second, both = (
        json.loads((run.folder / f"timesteps-{rank}.json").read_text())
        for run, rank in ((two, 0), (two, 1), (one, 0))
    )
    assert [left + right for left, right in zip(first, second, strict=True)] == both
    assert first != second


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyRun, TinyRun]:
    """Three steps with every weight shared out over two processes, stopped after two; and on one process.

    Of the layers of rank 1 the second process has no part.
    """
    folder = tmp_path_factory.mktemp("sharded")
    ranks = {"name_algo_map": {".*to_k$": {"linear_dim": 1, "linear_alpha": 1, "tlora_min_rank": 1}}}
    lycoris = {**TLORA, "apply_preset": {"target_module": ["Attention"], **ranks}}
    keys = {"lr_scheduler": "constant", "optimizer_config": "eps=1e-3", "gradient_checkpointing": True}
    keys |= {"use_ema": True}
    two, one = (TinyRun(folder / name, lycoris=lycoris, num_images=4) for name in ("two", "one"))
    for steps in (2, 3):
        train(two, num_processes=2, before=ON_CPU_TOO, train_batch_size=1, max_train_steps=steps, **keys)
    train(one, num_processes=1, train_batch_size=2, max_train_steps=3, **keys)
    return two, one


def test_sharded_run_holds_no_weight_whole(sharded: tuple[TinyRun, TinyRun]) -> None:
    for rank in (0, 1):
        num_parts, num_parameters = json.loads((sharded[0].folder / f"parts-{rank}.json").read_text())
        assert num_parts == num_parameters > 3 * 32


def test_sharded_and_resumed_run_trains_what_one_process_trains(sharded: tuple[TinyRun, TinyRun]) -> None:
    two, one = sharded
    expected = tensors(one, "end-0")
    for rank in (0, 1):
        for key, tensor in tensors(two, f"end-{rank}").items():
            torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-7)
    norms = [[line["grad_norm"] for line in run.log()] for run in sharded]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("name", [ADAPTER_FILE, EMA_ADAPTER_FILE])
def test_file_of_a_sharded_run_is_that_of_one_process(sharded: tuple[TinyRun, TinyRun], name: str) -> None:
    two, one = (load_file(run.output_dir / name) for run in sharded)
    assert two.keys() == one.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-6)


def test_average_of_two_processes_is_that_of_one(runs: tuple[TinyRun, TinyRun]) -> None:
    two, one = (load_file(run.output_dir / EMA_ADAPTER_FILE) for run in runs)
    plain = load_file(runs[1].output_dir / ADAPTER_FILE)
    assert any(not torch.equal(tensor, plain[key]) for key, tensor in one.items())
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "kind",
    [
        {"train_text_encoder": True, "text_encoder_lora_rank": 4},
        {"model_type": "embedding", "lora_type": "standard", "lycoris_config": None},
    ],
    ids=["beside an adapter", "token alone"],
)
def test_two_processes_train_the_text_encoders_and_the_token_that_one_trains(
    tmp_path: Path, kind: dict[str, object]
) -> None:
    keys: dict[str, object] = {
        **kind,
        "placeholder_token": "<cat>",
        "initializer_token": "cat",
        "gradient_accumulation_steps": 2,
        "max_train_steps": 2,
        "lr_scheduler": "constant",
        "optimizer_config": "eps=1e-3,weight_decay=0.1",
    }
    pair = [TinyRun(tmp_path / name, num_images=4) for name in ("two", "one")]
    for run in pair:  # so that a process has batches without the token
        (run.folder / "images" / "image0.txt").write_text("a photo of <cat>")
    two = train(pair[0], num_processes=2, train_batch_size=1, **keys)
    one = train(pair[1], num_processes=1, train_batch_size=2, **keys)
    start, end, expected = tensors(one, "start-0"), tensors(two, "end-0"), tensors(one, "end-0")
    other = tensors(two, "end-1")
    assert all(torch.equal(tensor, other[key]) for key, tensor in end.items())
    for key, tensor in expected.items():
        torch.testing.assert_close(end[key], tensor, rtol=0, atol=1e-7)
    moved = {key for key in start if not torch.equal(start[key], expected[key])}
    if "model_type" in kind:
        assert moved == {"text_encoder", "text_encoder_2"}
        return
    assert {"new_token/text_encoder", "new_token/text_encoder_2"} < moved
    text = {key for key in start if key.startswith("text_encoder") and ".lora_B." in key}
    assert {key.split("/")[0] for key in moved & text} == {"text_encoder", "text_encoder_2"}
    assert not text <= moved, "of the last layer of the first encoder nothing is read"
    assert max(float((expected[key] - start[key]).abs().max()) for key in moved & text) > 1e-5


PAIRS: dict[str, object] = {
    "model_flavour": "kontext",
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "optimizer_config": "eps=1e-3",
    "validation_prompt": None,
}


def save_pairs(run: TinyRun) -> None:
    """Four images, each with a reference of its own in each of two entries, of which one is drawn."""
    entries = []
    for name, first in (("after", 0), ("before", 40), ("other", 80)):
        folder = run.folder / name
        folder.mkdir()
        for number in range(4):
            Image.new("RGB", (64, 64), (first + 20 * number, 200 - first, 10 * number)).save(
                folder / f"{number}.png"
            )
        entries.append({"id": name, "instance_data_dir": str(folder)})
    entries[0] |= {"conditioning_data": ["before", "other"], "caption_strategy": "filename"}
    for entry in entries[1:]:
        entry["conditioning_type"] = "reference_strict"
    run.keys["data_backend_config"] = entries


def test_two_processes_train_the_pairs_that_one_trains(tmp_path: Path) -> None:
    runs = {number: FLUX.run(tmp_path / str(number)) for number in (1, 2)}
    for number, run in runs.items():
        save_pairs(run)
        size = 2 // number
        train(run, num_processes=number, train_batch_size=size, max_train_steps=2, **PAIRS)
    start, end, expected = (
        tensors(runs[number], name) for number, name in ((1, "start-0"), (2, "end-0"), (1, "end-0"))
    )
    assert any(not torch.equal(start[key], tensor) for key, tensor in expected.items())
    for key, tensor in expected.items():
        torch.testing.assert_close(end[key], tensor, rtol=0, atol=1e-7)
        assert torch.equal(end[key], tensors(runs[2], "end-1")[key])
