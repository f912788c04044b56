"""A compiled denoiser: the gradients of the uncompiled one, a graph for each bucket, the same files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.utils import counters

from simpletuner.helpers.io.run_folder import ADAPTER_FILE
from simpletuner.helpers.models.compiling import compiled_for_validation
from simpletuner.helpers.training.trainer import Trainer
from tests.integration.family_runs import IMAGES, MODELS, SDXL, FamilyModel
from tests.integration.processes import wait_for_all
from tests.integration.tiny_runs import TLORA, TinyRun, deep_model, gradients, start_pair

pytestmark = pytest.mark.usefixtures("shared_caches")

DEEP = FamilyModel(SDXL.family, deep_model, SDXL.targets, 2 * SDXL.num_layers)
TWO_LAYERS = {**TLORA, "apply_preset": {"target_name": [r".*mid_block.*attn1\.to_q"]}}
"""In two blocks; the others, which run before them, have no adapter."""
NUM_GRAPHS = {"sdxl": 2, "flux": 4, "flux2": 3}
"""One for each kind of block, and another where an input of its first block needs no gradient."""
FAST = {"dynamo_backend": "eager", "gradient_checkpointing": True}


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def num_graphs() -> int:
    assert sum(counters["graph_break"].values()) == 0
    return counters["stats"]["unique_graphs"]


def off_start(trainer: Trainer) -> None:
    """Move the adapter; a delta of zero has gradients of zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.trainable.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def step_gradients(trainer: Trainer, *, steps: int) -> list[list[Tensor]]:
    """Gradients of micro-batches, each of another timestep."""
    batches = trainer.data.batches(start=0)
    found = []
    for _ in range(steps):
        trainer.train_step(next(batches))
        found.append(gradients(trainer))
    return found


def check_gradients(run: TinyRun, **compiled: object) -> int:
    """Compare four micro-batches with and without compiling; the number of graphs."""
    with run.trainer(**compiled | {"dynamo_backend": "no"}) as trainer:
        off_start(trainer)
        expected, names = step_gradients(trainer, steps=4), [*trainer.denoiser.state_dict()]
    assert not num_graphs()
    with run.trainer(**compiled) as trainer:
        off_start(trainer)
        found = step_gradients(trainer, steps=1)
        with torch._dynamo.config.patch(error_on_recompile=True):
            found += step_gradients(trainer, steps=4)[1:]
        assert [*trainer.denoiser.state_dict()] == names
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    return num_graphs()


def test_blocks_with_and_without_an_adapter_have_graphs_of_their_own(tmp_path: Path) -> None:
    assert check_gradients(DEEP.run(tmp_path, TWO_LAYERS), **FAST) == 4  # of two widths


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_gradients_are_the_same_and_no_timestep_compiles_again(
    tmp_path: Path, model: FamilyModel, checkpointing: bool
) -> None:
    keys = {"dynamo_backend": "aot_eager", "gradient_checkpointing": checkpointing, "train_batch_size": 2}
    assert check_gradients(model.run(tmp_path), **keys) == NUM_GRAPHS[model.family]
    whole = {"dynamo_use_regional_compilation": False}
    if not checkpointing:
        torch.compiler.reset()
        counters.clear()
        assert check_gradients(model.run(tmp_path), **keys, **whole) == 1


@pytest.mark.slow
def test_every_bucket_has_fixed_shapes_and_none_compiles_twice(tmp_path: Path) -> None:
    run = DEEP.run(tmp_path, TWO_LAYERS)
    for height in (96, 128):
        Image.new("RGB", (64, height), "red").save(tmp_path / "images" / f"{height}.png")
        (tmp_path / "images" / f"{height}.txt").write_text("a tall one")
    with run.trainer(**FAST, aspect_bucket_alignment=8) as trainer:
        batches = trainer.data.batches(start=0)
        shapes = set()
        for _ in range(5):
            batch = next(batches)
            before, is_new = num_graphs(), batch.latents.shape not in shapes
            shapes.add(batch.latents.shape)
            trainer.train_step(batch)
            assert num_graphs() - before == (4 if is_new else 0)
    assert len(shapes) == 3


def test_validation_runs_uncompiled_unless_it_is_asked_for(tmp_path: Path) -> None:
    keys = {**FAST, **IMAGES, "disable_benchmark": True}
    with DEEP.run(tmp_path, TWO_LAYERS).trainer(**keys) as trainer:
        trainer.validation.run(2)
        assert trainer.validation.grid_file(2).exists()
        assert not num_graphs()
    with DEEP.run(tmp_path / "compiled", TWO_LAYERS).trainer(
        **keys, validation_torch_compile=True
    ) as trainer:
        step_gradients(trainer, steps=1)
        trained = num_graphs()
        trainer.validation.run(2)
        shown = num_graphs()
        assert shown > trained
        with torch._dynamo.config.patch(error_on_recompile=True):
            trainer.validation.run(4)
            step_gradients(trainer, steps=1)
        assert num_graphs() == shown
    plain, compiled = (tmp_path / name / "output" for name in ("", "compiled"))
    for file in sorted(plain.rglob("*.png")):
        with Image.open(file) as one, Image.open(compiled / file.relative_to(plain)) as other:
            assert one.tobytes() == other.tobytes()


def test_without_a_training_backend_only_validation_is_compiled(tmp_path: Path) -> None:
    keys = {**IMAGES, "disable_benchmark": True, "gradient_checkpointing": True}
    with DEEP.run(tmp_path, TWO_LAYERS).trainer(**keys) as trainer:
        config = trainer.config.compiling.model_copy(update={"validation_torch_compile": True})
        with compiled_for_validation(trainer.denoiser, config):
            assert [module for module in trainer.denoiser.modules() if module._compiled_call_impl]
        assert not [module for module in trainer.denoiser.modules() if module._compiled_call_impl]


@pytest.mark.slow
def test_a_compiled_run_resumes_and_writes_the_files_of_an_uncompiled_one(tmp_path: Path) -> None:
    keys = {"use_ema": True, "gradient_accumulation_steps": 2}
    plain, compiled = DEEP.run(tmp_path / "plain", TWO_LAYERS), DEEP.run(tmp_path / "compiled", TWO_LAYERS)
    assert plain.run(**keys, gradient_checkpointing=True) == 0
    assert compiled.run(**keys, **FAST, max_train_steps=2) == 0
    assert compiled.run(**keys, **FAST) == 0
    names = sorted(
        str(file.relative_to(plain.output_dir)) for file in plain.output_dir.rglob("*.safetensors")
    )
    assert len(names) > 3
    for name in names:
        expected, found = load_file(plain.output_dir / name), load_file(compiled.output_dir / name)
        assert sorted(found) == sorted(expected)
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-6, msg=f"{name}: {key}")


@pytest.mark.slow
def test_two_processes_train_compiled_what_one_trains(tmp_path: Path) -> None:
    adapters = []
    for name, keys in {"uncompiled": {"dynamo_backend": "no"}, "compiled": {}}.items():
        run = DEEP.run(tmp_path / name, TWO_LAYERS)
        wait_for_all(start_pair(run, **FAST | keys))
        adapters.append(load_file(run.output_dir / ADAPTER_FILE))
    for key, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][key], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles with a C++ compiler on a CPU")
def test_inductor_gives_the_same_gradients(tmp_path: Path) -> None:
    assert check_gradients(DEEP.run(tmp_path, TWO_LAYERS), **FAST | {"dynamo_backend": "inductor"}) == 4
