"""A new token (textual inversion) trained beside an adapter and alone, on the tiny SDXL model."""

from __future__ import annotations

import functools
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import simpletuner
from simpletuner.helpers.adapters.files import adapter_file, embeddings
from simpletuner.helpers.adapters.inference import load_embeddings_into_pipeline, load_into_pipeline
from simpletuner.helpers.contracts import TextEmbeds
from simpletuner.helpers.errors import AdapterError, CheckpointError, ConfigError, DataError
from simpletuner.helpers.io.run_folder import (
    ADAPTER_FILE,
    EMA_EMBEDDING_FILE,
    EMBEDDING_FILE,
    checkpoint_folder,
    image_file,
    validation_step_folder,
)
from simpletuner.helpers.models.registry import specs
from simpletuner.helpers.publishing.card import card_text
from simpletuner.helpers.publishing.run_files import read_run
from simpletuner.helpers.reporting.run_summary import load_summary
from simpletuner.helpers.sampling.embeddings import read_embeddings
from simpletuner.helpers.sampling.sample_command import SampleRequest, sample
from simpletuner.helpers.training.text_encoding import present_embeds
from simpletuner.helpers.training.trainer import Trainer
from tests.integration.tiny_pipelines import load, tiny_model
from tests.integration.tiny_runs import TinyRun, gradients

DEMO = Path(simpletuner.__file__).parent / "demo"
TOKEN = "<cat>"
PROMPT = f"a photo of {TOKEN} on grass"
KEYS: dict[str, object] = {
    "placeholder_token": TOKEN,
    "initializer_token": "dog",
    "num_vectors": 2,
    "embedding_lr": 0.05,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
}
STANDARD: dict[str, object] = {"lora_type": "standard", "lycoris_config": None}
KINDS: dict[str, dict[str, object]] = {
    "text encoders": {"train_text_encoder": True, "text_encoder_lora_rank": 4},
    "standard": STANDARD | {"lora_rank": 4},
    "alone": STANDARD | {"model_type": "embedding"},
}
IMAGES: dict[str, object] = {
    "validation_disable": False,
    "validation_prompt": PROMPT,
    "validation_num_inference_steps": 2,
    "validation_resolution": "64",
    "validation_step_interval": 0,
}


def token_run(folder: Path, **options: Any) -> TinyRun:
    """A run whose captions have the token."""
    run = TinyRun(folder, **options)
    for file in (folder / "images").glob("*.txt"):
        file.write_text(f"a photo of {TOKEN} on grass")
    return run


@functools.cache
def trained(kind: str) -> TinyRun:
    """A finished run with an EMA and an image, once per process."""
    run = token_run(Path(tempfile.mkdtemp(prefix="new_token_")))
    assert run.run(**KEYS, **KINDS[kind], **IMAGES, use_ema=True) == 0
    return run


def embeds_of(pipeline: Any, prompt: str = PROMPT) -> tuple[Tensor, Tensor]:
    text, _, pooled, _ = pipeline.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
    return text, pooled


def live_embeds(run: TinyRun, kind: str, prompt: str = PROMPT, *, strength: float = 1.0) -> TextEmbeds:
    """Embeds of the prompt with what the end of the run left in the text encoders."""
    keys = {**KEYS, **KINDS[kind], **IMAGES, "use_ema": True, "max_train_steps": 9}
    with run.trainer(**keys) as trainer, trainer.trainable.at_strength(strength):
        return present_embeds(trainer.family)(prompt)


def assert_same(found: tuple[Tensor, Tensor], expected: TextEmbeds) -> None:
    assert expected.pooled is not None
    for one, two in zip(found, (expected.prompt_embeds, expected.pooled), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_the_files_of_the_token_and_of_what_else_it_trained(kind: str) -> None:
    run = trained(kind)
    for folder in (run.output_dir, checkpoint_folder(run.output_dir, 4)):
        assert (folder / ADAPTER_FILE).exists() is (kind != "alone")
        plain, average = (load_file(folder / name) for name in (EMBEDDING_FILE, EMA_EMBEDDING_FILE))
        assert {key: tuple(tensor.shape) for key, tensor in plain.items()} == {
            "clip_l": (2, 32),
            "clip_g": (2, 32),
        }
        assert all(not torch.equal(tensor, average[key]) for key, tensor in plain.items())
    stored = embeddings.read(run.output_dir / EMBEDDING_FILE)
    assert (stored.token, stored.initializer) == (TOKEN, "dog")
    assert image_file(validation_step_folder(run.output_dir / "validation", 4), "grid").exists()
    assert not list((run.folder / "cache" / "text").rglob("*.safetensors"))


@pytest.mark.parametrize("kind", ["text encoders", "alone"])
def test_a_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(tmp_path: Path, kind: str) -> None:
    run, digests = token_run(tmp_path), []
    keys = {**KEYS, **KINDS[kind], "use_ema": True, "gradient_accumulation_steps": 2}
    for folder, stops in (("whole", [2]), ("parts", [1, 2])):
        for steps in stops:
            with run.trainer(max_train_steps=steps, output_dir=str(tmp_path / folder), **keys) as trainer:
                trainer.run()
                digests.append(trainer.state_digest())
    assert digests[0] == digests[2] != digests[1]


def test_a_run_does_not_go_on_with_another_token(tmp_path: Path) -> None:
    run = token_run(tmp_path)
    assert run.run(**KEYS, max_train_steps=1) == 0
    others = {"placeholder_token": "<hat>", "initializer_token": "photo", "num_vectors": 1}
    for key, value in others.items():
        for file in (tmp_path / "images").glob("*.txt"):
            file.write_text(f"{TOKEN} and <hat>")
        with pytest.raises(CheckpointError, match=key):
            run.run(**KEYS | {key: value}, max_train_steps=2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_has_the_effect_of_the_live_token_in_a_pipeline(kind: str) -> None:
    run, pipeline = trained(kind), load(tiny_model())
    if kind != "alone":
        load_into_pipeline(pipeline, run.output_dir / ADAPTER_FILE)
    load_embeddings_into_pipeline(pipeline, run.output_dir / EMBEDDING_FILE)
    assert_same(embeds_of(pipeline), live_embeds(run, kind))


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_the_file_has_the_strength_of_the_live_token(strength: float) -> None:
    run, pipeline = trained("alone"), load(tiny_model())
    load_embeddings_into_pipeline(pipeline, run.output_dir / EMBEDDING_FILE, strength=strength)
    found = embeds_of(pipeline)
    assert_same(found, live_embeds(run, "alone", strength=strength))
    at_start = embeds_of(load(tiny_model()), PROMPT.replace(TOKEN, "dog dog"))
    assert torch.equal(found[0], at_start[0]) is (strength == 0)


def test_diffusers_loads_the_file_with_the_effect_of_the_live_token() -> None:
    run = trained("alone")
    pipeline = load(tiny_model(), diffusers.StableDiffusionXLPipeline)
    tensors = load_file(run.output_dir / EMBEDDING_FILE)
    for key, number in (("clip_l", ""), ("clip_g", "_2")):
        pipeline.load_textual_inversion(
            tensors[key],
            token=TOKEN,
            text_encoder=pipeline.components[f"text_encoder{number}"],
            tokenizer=pipeline.components[f"tokenizer{number}"],
        )
    assert_same(embeds_of(pipeline), live_embeds(run, "alone"))


@pytest.mark.parametrize("chunks", [75, 150])
def test_a_caption_is_encoded_in_the_step_as_a_prompt_is(tmp_path: Path, chunks: int) -> None:
    run = token_run(tmp_path)
    with run.trainer(**KEYS, max_token_length=chunks, model_type="lora") as trainer:
        for parameter in trainer.text_encoding.token.parameters():  # type: ignore[union-attr]
            parameter.data.normal_()
        batch = trainer.text_encoding.encoded(next(trainer.data.batches()))
        found = present_embeds(trainer.family)(batch.samples[0].caption)
    assert torch.equal(batch.text.prompt_embeds, found.prompt_embeds)
    assert batch.text.prompt_embeds.requires_grad
    pipeline = load(tiny_model())
    for name, rows in trainer.text_encoding.token.state_dict().items():  # type: ignore[union-attr]
        number = name.removeprefix("text_encoder")
        pipeline.load_textual_inversion(
            rows,
            token=TOKEN,
            text_encoder=pipeline.components[name],
            tokenizer=pipeline.components[f"tokenizer{number}"],
        )
    expected = embeds_of(pipeline, batch.samples[0].caption)[0]
    torch.testing.assert_close(found.prompt_embeds[:, :77], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["text encoders", "alone"])
def test_recomputed_activations_give_the_same_gradients(tmp_path: Path, kind: str) -> None:
    found = []
    for index, recomputes in enumerate((False, True)):
        run = token_run(tmp_path / str(index))
        with run.trainer(**KEYS, **KINDS[kind], gradient_checkpointing=recomputes) as trainer:
            trainer.train_step(next(trainer.data.batches()))
            found.append([each.grad for each in trainer.text_encoding.token.parameters()])  # type: ignore[union-attr]
    for plain, recomputed in zip(*found, strict=True):
        assert float(plain.abs().max()) > 0
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=1e-6)


def test_a_token_alone_leaves_all_weights_of_the_model_as_they_are(tmp_path: Path) -> None:
    with token_run(tmp_path).trainer(
        **KEYS, **KINDS["alone"], optimizer_config="weight_decay=0.1"
    ) as trainer:
        encoders = trainer.family.text_encoders.values()
        models = [trainer.denoiser, *encoders]
        own = {id(each) for each in trainer.trainable.parameters()}
        frozen = [each for model in models for each in model.parameters() if id(each) not in own]
        before = [each.detach().clone() for each in frozen]
        assert not any(each.requires_grad for each in frozen)
        assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.0]
        assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.05]
        for _ in range(2):
            trainer.optimizer_step(trainer.data.batches())
        assert all(torch.equal(one, two) for one, two in zip(frozen, before, strict=True))


def test_the_groups_beside_an_adapter_have_their_own_rates(tmp_path: Path) -> None:
    keys = KEYS | KINDS["text encoders"] | {"text_encoder_lr": "0,1e-3"}
    with token_run(tmp_path).trainer(**keys, optimizer_config="weight_decay=0.1") as trainer:
        groups = trainer.optimizer.param_groups
        metrics = trainer.optimizer_step(trainer.data.batches())
        assert (metrics.lr, metrics.lr_by_group) == (1e-3, {"new_token": 0.05})
        assert metrics.curves["lr_new_token"] == 0.05
        assert [(group["lr"], group["weight_decay"]) for group in groups] == [
            (1e-3, 0.1),
            (1e-3, 0.1),
            (0.05, 0.0),
        ]
        trainer.train_step(next(trainer.data.batches()))
        assert len(gradients(trainer)) == len(trainer.trainable.parameters())


def test_the_token_is_trained_on_after_the_text_encoders_have_ended(tmp_path: Path) -> None:
    keys = KEYS | KINDS["text encoders"] | {"stop_text_encoder_training": 1, "max_train_steps": 2}
    with token_run(tmp_path).trainer(**keys) as trainer:
        states = []
        for _ in range(2):
            trainer.optimizer_step(trainer.data.batches())
            states.append({key: each.clone() for key, each in trainer.trainable.state_dict().items()})
    text = [key for key in states[0] if key.startswith("text_encoder")]
    token = [key for key in states[0] if key.startswith("new_token/")]
    assert len(token) == 2
    assert all(torch.equal(states[0][key], states[1][key]) for key in text)
    assert all(not torch.equal(states[0][key], states[1][key]) for key in token)


def test_validation_shows_the_token_at_the_strength_of_each_image(tmp_path: Path) -> None:
    run, seen = token_run(tmp_path), {}
    with run.trainer(**KEYS, **KINDS["alone"], **IMAGES, max_train_steps=2) as trainer:
        encode, token = trainer.family.encode_prompts, trainer.text_encoding.token
        assert token is not None

        def watched(prompts: list[str]) -> Any:
            strength = token.embeddings["text_encoder"].strength
            seen[prompts[0], strength] = encode(prompts)[0].prompt_embeds
            return encode(prompts)

        trainer.family.encode_prompts = watched  # type: ignore[method-assign]
        trainer.run()
    assert {key for key in seen if key[0]} == {(PROMPT, 0.0), (PROMPT, 1.0)}
    at_start = embeds_of(load(tiny_model()), PROMPT.replace(TOKEN, "dog dog"))[0]
    assert torch.equal(seen[PROMPT, 0.0], at_start)
    assert not torch.equal(seen[PROMPT, 1.0], at_start)


def test_the_image_of_the_base_model_is_that_of_this_initializer(tmp_path: Path) -> None:
    paths = set()
    for start in ("dog", "photo"):
        run = token_run(tmp_path / start)
        with run.trainer(**KEYS | {"initializer_token": start}, **IMAGES) as trainer:
            sampler = trainer.validation.sampler
            paths.add(sampler.cached_path(sampler.prompts[0]).name)
    assert len(paths) == 2


def sampled(file: Path, output: Path, *given: str, strength: float = 1.0) -> np.ndarray:
    """The image that `simpletuner sample` makes with a file."""
    request = SampleRequest(
        adapter=file,
        prompts=[PROMPT],
        model={},
        validation={
            "validation_resolution": "64",
            "validation_num_inference_steps": 2,
            "validation_guidance": 4.0,
            "validation_seed": 3,
            "validation_lycoris_strength": strength,
        },
        dtype="fp32",
        embeddings=given,
        options={},
    )
    return np.asarray(Image.open(next(sample(request, output=output, families=specs()))), dtype=int)


def expected_image(*, token: Path | None, adapter: Path | None = None) -> np.ndarray:
    pipeline = load(tiny_model())
    if adapter is not None:
        load_into_pipeline(pipeline, adapter)
    if token is not None:
        load_embeddings_into_pipeline(pipeline, token, token=TOKEN)
    options = {"prompt": PROMPT, "num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "np"}
    generator = torch.Generator().manual_seed(3)
    image: np.ndarray = pipeline(**options, height=64, width=64, generator=generator).images[0]
    return image * 255


@pytest.mark.parametrize("kind", ["text encoders", "alone"])
def test_sample_finds_the_token_beside_the_adapter(tmp_path: Path, kind: str) -> None:
    folder = trained(kind).output_dir
    adapter = folder / ADAPTER_FILE if kind == "text encoders" else None
    found = sampled(adapter or folder / EMBEDDING_FILE, tmp_path)
    assert np.abs(found - expected_image(adapter=adapter, token=folder / EMBEDDING_FILE)).max() < 1.5
    assert np.abs(found - expected_image(adapter=adapter, token=None)).max() > 2


@pytest.mark.parametrize("name", [EMA_EMBEDDING_FILE, "cat.safetensors"], ids=["ema", "renamed"])
def test_sample_takes_the_very_file_of_a_token_that_was_trained_alone(tmp_path: Path, name: str) -> None:
    for file in (EMBEDDING_FILE, EMA_EMBEDDING_FILE):
        shutil.copy(trained("alone").output_dir / file, tmp_path / file)
    shutil.copy(tmp_path / EMA_EMBEDDING_FILE, tmp_path / "copy.safetensors")
    (tmp_path / "copy.safetensors").rename(tmp_path / name)
    header = adapter_file.read(tmp_path / name, takes_embeddings=True).metadata
    (found,) = read_embeddings(tmp_path / name, header, is_alone=True)
    assert found.path == tmp_path / name
    image = sampled(tmp_path / name, tmp_path / "images")
    assert np.abs(image - expected_image(token=tmp_path / name)).max() < 1.5
    assert np.abs(image - expected_image(token=None)).max() > 2


def test_sample_takes_files_of_others_and_says_what_is_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = trained("text encoders").output_dir
    adapter = tmp_path / "moved.safetensors"
    shutil.copy(folder / ADAPTER_FILE, adapter)
    with caplog.at_level(logging.WARNING):
        alone = sampled(adapter, tmp_path / "alone")
    assert f"was trained with the new token {TOKEN}" in caplog.text
    other = tmp_path / "other=1.safetensors"
    save_file(load_file(folder / EMBEDDING_FILE), other)
    with pytest.raises(AdapterError, match="does not name its token"):
        sampled(adapter, tmp_path / "nameless", str(other))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        found = sampled(adapter, tmp_path / "given", f"{other}={TOKEN}")
    assert "was trained with" not in caplog.text
    assert np.abs(found - expected_image(adapter=adapter, token=other)).max() < 1.5
    assert np.abs(found - alone).max() > 2


@pytest.mark.parametrize("kind", ["text encoders", "alone"])
def test_the_compared_run_has_its_own_token(tmp_path: Path, kind: str) -> None:
    other = trained(kind)
    keys = {"validation_compared_config": str(other.folder / "config.json"), "validation_guidance": 4.0}
    with TinyRun(tmp_path).trainer(**IMAGES, **keys, validation_seed=3) as trainer:
        comparison = trainer.validation.comparison
        assert comparison is not None
        found = np.asarray(Image.open(comparison.cached_path(comparison.sampler.prompts[0])), dtype=int)
        # This run's prompts know no token.
        expected = embeds_of(load(tiny_model()))[0]
        assert torch.equal(present_embeds(trainer.family)(PROMPT).prompt_embeds, expected)
    adapter = other.output_dir / ADAPTER_FILE if kind == "text encoders" else None
    expected = expected_image(adapter=adapter, token=other.output_dir / EMBEDDING_FILE)
    assert np.abs(found - expected).max() < 1.5


def test_a_run_with_a_token_is_compared_with_another_of_the_same_token(tmp_path: Path) -> None:
    other = trained("alone")
    keys = {"validation_compared_config": str(other.folder / "config.json")}
    run = token_run(tmp_path)
    assert run.run(**KEYS, **IMAGES, **keys, max_train_steps=1) == 0
    assert len(list((run.output_dir / "validation" / "base").glob("*.png"))) == 2


@pytest.mark.parametrize("kind", ["text encoders", "alone"])
def test_a_damaged_file_of_a_finished_run_is_written_again(tmp_path: Path, kind: str) -> None:
    run = token_run(tmp_path)
    keys = KEYS | KINDS[kind] | {"max_train_steps": 1, "use_ema": True, "lora_format": "diffusers"}
    if kind == "text encoders":
        keys["lora_format"] = "comfyui"
    else:
        del keys["lora_format"]
    assert run.run(**keys) == 0
    names = [EMBEDDING_FILE, EMA_EMBEDDING_FILE]
    whole = {name: (run.output_dir / name).read_bytes() for name in names}
    summary = load_summary(run.output_dir)
    assert summary is not None
    assert set(names) <= set(summary.files)
    assert (summary.embedding is None) is (kind == "alone")
    (run.output_dir / EMBEDDING_FILE).write_bytes(b"damaged")
    (run.output_dir / EMA_EMBEDDING_FILE).unlink()
    assert run.run(**keys) == 0
    assert {name: (run.output_dir / name).read_bytes() for name in names} == whole


@pytest.mark.parametrize("kind", KINDS)
def test_the_card_and_the_upload_have_the_token(kind: str) -> None:
    found = read_run(trained(kind).output_dir)
    assert {EMBEDDING_FILE, EMA_EMBEDDING_FILE} <= set(found.adapters)
    text = card_text(found, families=specs(), repository="me/cat")
    assert "## New token" in text
    assert "textual_inversion" in text
    assert f"embedding:{Path(EMBEDDING_FILE).stem}" in text
    assert "load_embeddings_into_pipeline(pipeline, 'learned_embeds.safetensors')" in text
    assert ("load_into_pipeline(" in text or "load_peft_into_pipeline(" in text) is (kind != "alone")
    assert ("pipeline.load_lora_weights('me/cat'" in text) is (kind == "standard")
    assert ("pipeline.load_textual_inversion(" in text) is (kind in ("standard", "alone"))
    assert f"token='{TOKEN}'" in text or kind not in ("standard", "alone")


def test_files_of_an_earlier_run_in_the_folder_are_not_taken_for_the_runs_own(tmp_path: Path) -> None:
    run = token_run(tmp_path)
    kinds: list[dict[str, object]] = [KEYS, {}, KEYS | KINDS["alone"]]
    for kind, own in zip(kinds, (ADAPTER_FILE, ADAPTER_FILE, EMBEDDING_FILE), strict=True):
        assert run.run(**kind, max_train_steps=1) == 0
        shutil.rmtree(checkpoint_folder(run.output_dir, 1))
        found, summary = read_run(run.output_dir), load_summary(run.output_dir)
        assert found.adapter_name == own
        assert (EMBEDDING_FILE in found.adapters) is bool(kind)
        assert summary is not None
        assert (summary.embedding is not None) is (kind is KEYS)


@pytest.mark.parametrize("kind", ["standard", "alone"])
def test_the_code_of_the_card_generates_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    run = trained(kind)
    text = card_text(read_run(run.output_dir), families=specs(), repository=None)
    images = []
    for name in ("In Python:", "### diffusers"):
        code = text.partition(name)[2].partition("```python\n")[2].partition("```")[0]
        code = code.replace("path/to/the/base/model", str(tiny_model()))
        monkeypatch.chdir(run.output_dir)
        code = code.replace('"image.png"', repr(str(tmp_path / "image.png")))
        exec(compile(code, name, "exec"), {})
        images.append(np.asarray(Image.open(tmp_path / "image.png"), dtype=int))
    assert np.abs(images[0] - images[1]).max() <= 1
    live = image_file(validation_step_folder(run.output_dir / "validation", 4), "00-validation-64x64-seed7")
    assert np.abs(images[0] - np.asarray(Image.open(live), dtype=int)).max() <= 1


def test_a_token_is_trained_beside_a_quantised_denoiser(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    keys = KEYS | KINDS["alone"] | {"base_model_precision": "int8-torchao", "mixed_precision": "bf16"}
    with token_run(tmp_path).trainer(**keys) as trainer:
        before = {key: each.clone() for key, each in trainer.trainable.state_dict().items()}
        trainer.optimizer_step(trainer.data.batches())
        after = trainer.trainable.state_dict()
    assert all(each.dtype == torch.float32 for each in after.values())
    assert all(not torch.equal(each, before[key]) for key, each in after.items())


def test_a_run_without_the_token_in_its_captions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"<cat> is in none of 3 captions: for instance .*picture number"):
        TinyRun(tmp_path).run(**KEYS)


def test_a_run_with_the_token_in_held_out_captions_alone_is_refused(tmp_path: Path) -> None:
    run = TinyRun(tmp_path)
    held_out = tmp_path / "held out"
    held_out.mkdir()
    Image.new("RGB", (64, 64), "red").save(held_out / "a.png")
    (held_out / "a.txt").write_text(f"a photo of {TOKEN}")
    pictures = {"id": "pictures", "instance_data_dir": str(tmp_path / "images")}
    others = {"id": "others", "instance_data_dir": str(held_out), "dataset_type": "eval"}
    with pytest.raises(DataError, match=r"<cat> is in none of 3 captions"):
        run.run(**KEYS, data_backend_config=[pictures, others])


def test_a_caption_with_the_token_in_other_letters_is_refused(tmp_path: Path) -> None:
    run = token_run(tmp_path)
    (tmp_path / "images" / "image1.txt").write_text("a <Cat> there")
    with pytest.raises(DataError, match=r"a caption writes it otherwise: .*<Cat> there"):
        run.run(**KEYS)


def test_a_known_word_is_refused_before_the_first_step(tmp_path: Path) -> None:
    run = TinyRun(tmp_path)
    for file in (tmp_path / "images").glob("*.txt"):
        file.write_text("a photo of a cat")
    with pytest.raises(ConfigError, match=r"placeholder_token cat: the tokenizer knows"):
        run.run(**KEYS | {"placeholder_token": "cat"})


def test_a_token_alone_learns_an_image_of_the_embedded_model(tmp_path: Path) -> None:
    """The loss on draws that the training did not see falls, in proportion to the strength."""
    images = tmp_path / "toy"
    images.mkdir()
    shutil.copy(DEMO / "toy" / "toy.png", images)
    (images / "toy.txt").write_text("a <toy>")
    model = {"pretrained_model_name_or_path": str(DEMO / "sdxl"), "resolution": 64}
    data = {"data_backend_config": [{"id": "toy", "instance_data_dir": str(images)}]}
    words = {"placeholder_token": "<toy>", "initializer_token": "toy", "embedding_lr": 0.1}
    keys = (
        KEYS | KINDS["alone"] | model | data | words | {"aspect_bucket_alignment": 8, "train_batch_size": 2}
    )
    with TinyRun(tmp_path).trainer(**keys) as trainer:
        batches = trainer.data.batches()
        for _ in range(12):
            trainer.optimizer_step(batches)
        losses = []
        for strength in (0.0, 0.5, 1.0):
            trainer.trainable.set_strength(strength)
            with torch.no_grad():
                losses.append(sum(_loss(trainer, 1000 + index) for index in range(12)) / 12)
    assert losses[2] < losses[1] < losses[0]
    assert losses[2] < 0.98 * losses[0]


def _loss(trainer: Trainer, index: int) -> float:
    batch = trainer.data._batch(index)
    noisy = trainer.objective.add_noise(batch)
    prediction = trainer.family.predict(trainer.denoiser, noisy, trainer.text_encoding.encoded(batch))
    return float(trainer.objective.sample_losses(prediction, noisy).mean())
