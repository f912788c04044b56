"""Text encoders trained beside the denoiser's adapter, on the tiny SDXL model."""

from __future__ import annotations

import functools
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

from simpletuner.helpers.adapters.files import adapter_file
from simpletuner.helpers.adapters.files.export import ExportOptions, export_adapter
from simpletuner.helpers.adapters.files.inspection import inspect
from simpletuner.helpers.adapters.files.rewriting import open_adapter
from simpletuner.helpers.adapters.files.text_layers import encoders_in, without_encoders
from simpletuner.helpers.adapters.inference import load_into_pipeline, remove_from_pipeline
from simpletuner.helpers.errors import AdapterError, CheckpointError
from simpletuner.helpers.io.run_folder import ADAPTER_FILE, image_file, validation_step_folder
from simpletuner.helpers.models.registry import specs
from simpletuner.helpers.sampling.sample_command import SampleRequest, sample
from simpletuner.helpers.training.text_encoding import present_embeds
from simpletuner.helpers.training.trainer import Trainer
from tests.integration.tiny_pipelines import load, tiny_model
from tests.integration.tiny_runs import TinyRun

TRAINED = {
    "train_text_encoder": True,
    "text_encoder_lr": "1e-2,2e-2",
    "text_encoder_lora_rank": 4,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
}
STANDARD = {"lora_type": "standard", "lora_rank": 4, "lora_alpha": 8}
KINDS: dict[str, dict[str, object]] = {"standard": STANDARD, "tlora": {}}
PROMPT = "a photo of a small dog"


@functools.cache
def trained(kind: str) -> TinyRun:
    """A run of four steps, once per process, that saw every image and no text cache."""
    run = TinyRun(Path(tempfile.mkdtemp(prefix="text_encoders_")))
    assert run.run(**TRAINED, **KINDS[kind]) == 0
    return run


def embeds_of(pipeline: Any, prompt: str = PROMPT) -> tuple[Tensor, Tensor]:
    text, _, pooled, _ = pipeline.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
    return text, pooled


def live_embeds(run: TinyRun, kind: str) -> tuple[Tensor, Tensor]:
    """Embeds of the prompt with the text encoders as the end of the run left them."""
    with run.trainer(**TRAINED, **KINDS[kind], max_train_steps=9) as trainer:
        embeds = present_embeds(trainer.family)(PROMPT)
    assert embeds.pooled is not None
    return embeds.prompt_embeds, embeds.pooled


def first_batch(trainer: Trainer) -> Any:
    return next(trainer.data.batches()).to(trainer.accelerator.device)


@pytest.mark.parametrize("keys", [{}, {"max_token_length": 150}], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("recomputes", [True, False], ids=["checkpointed", "plain"])
def test_captions_encoded_in_the_step_have_the_values_of_cached_ones(
    tmp_path: Path, keys: dict[str, object], recomputes: bool
) -> None:
    keys = {**keys, "gradient_checkpointing": recomputes, "caption_dropout_probability": 0.5}
    run = TinyRun(tmp_path, num_images=4)
    with run.trainer(**keys) as cached:
        expected = [next(cached.data.batches(start=index)) for index in range(8)]
    with run.trainer(**TRAINED, **keys) as trainer:
        found = [trainer.text_encoding.encoded(trainer.data._batch(index)) for index in range(8)]
    captions = [batch.samples[0].caption for batch in expected]
    assert [batch.samples[0].caption for batch in found] == captions
    assert "" in captions
    assert any(captions)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.text.prompt_embeds, theirs.text.prompt_embeds)
        assert torch.equal(ours.text.pooled, theirs.text.pooled)
        assert ours.text.prompt_embeds.requires_grad == bool(ours.samples[0].caption)


def test_no_caption_is_cached(tmp_path: Path) -> None:
    run = TinyRun(tmp_path)
    with run.trainer(**TRAINED):
        pass
    assert not list((tmp_path / "cache" / "text").rglob("*.safetensors"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(tmp_path: Path, kind: str) -> None:
    run, keys = TinyRun(tmp_path), TRAINED | KINDS[kind] | {"use_ema": True, "lora_dropout": 0.1}
    digests = []
    for folder, stops in (("whole", [4]), ("parts", [1, 4])):
        for steps in stops:
            with run.trainer(max_train_steps=steps, output_dir=str(tmp_path / folder), **keys) as trainer:
                trainer.run()
                digests.append(trainer.state_digest())
    assert digests[0] == digests[2]


def test_a_run_does_not_go_on_with_other_text_encoders(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model(), model)
    run, keys = TinyRun(tmp_path), TRAINED | STANDARD | {"pretrained_model_name_or_path": str(model)}
    assert run.run(max_train_steps=1, **keys) == 0
    file = model / "text_encoder" / "model.safetensors"
    weights = {name: weight + 1 for name, weight in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="text encoders"):
        run.run(max_train_steps=2, **keys)


def test_each_group_has_its_rate_and_moves_both_encoders(tmp_path: Path) -> None:
    with TinyRun(tmp_path).trainer(**TRAINED) as trainer:
        assert [(group.name, group.learning_rate) for group in trainer.trainable.groups()] == [
            ("adapter", None),
            ("text_encoder", 0.01),
            ("text_encoder_2", 0.02),
        ]
        assert [group["lr"] for group in trainer.optimizer.param_groups] == [1e-3, 0.01, 0.02]
        before = trainer.trainable.state_dict()
        before = {key: tensor.clone() for key, tensor in before.items()}
        trainer.optimizer_step(trainer.data.batches())
        after = trainer.trainable.state_dict()
        moved = {key.split("/")[0] for key in after if not torch.equal(after[key], before[key])}
    assert {"text_encoder", "text_encoder_2"} < moved


def test_an_encoder_of_rate_0_stays_bit_identical_and_out_of_the_file(tmp_path: Path) -> None:
    run = TinyRun(tmp_path)
    keys = TRAINED | STANDARD | {"text_encoder_lr": "0,1e-2"}
    with run.trainer(**keys) as trainer:
        assert not any(
            weight.requires_grad for weight in trainer.family.text_encoders["text_encoder"].parameters()
        )
        trainer.run()
    file = run.output_dir / ADAPTER_FILE
    assert encoders_in(adapter_file.read(file)) == ["text_encoder_2"]
    pipeline, untouched = load(tiny_model()), load(tiny_model())
    load_into_pipeline(pipeline, file)
    text, plain = embeds_of(pipeline)[0], embeds_of(untouched)[0]
    half = text.shape[-1] // 2
    assert torch.equal(text[..., :half], plain[..., :half])
    assert not torch.equal(text[..., half:], plain[..., half:])


def test_text_encoders_stay_as_they_are_after_their_last_step(tmp_path: Path) -> None:
    keys = {"stop_text_encoder_training": 2, "max_train_steps": 4, "optimizer_config": "weight_decay=0.1"}
    with TinyRun(tmp_path).trainer(**TRAINED | keys) as trainer:
        batches, states = trainer.data.batches(), []
        for _ in range(4):
            trainer.optimizer_step(batches)
            states.append({key: tensor.clone() for key, tensor in trainer.trainable.state_dict().items()})
        assert not trainer.text_encoding.encoded(first_batch(trainer)).text.prompt_embeds.requires_grad
    text = [key for key in states[0] if key.startswith("text_encoder")]
    assert any(not torch.equal(states[0][key], states[1][key]) for key in text)
    assert all(torch.equal(states[1][key], states[3][key]) for key in text)
    assert any(not torch.equal(states[2][key], states[3][key]) for key in states[0] if key not in text)


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_has_the_effect_of_the_live_encoders_in_a_pipeline(kind: str) -> None:
    run = trained(kind)
    pipeline = load(tiny_model())
    plain = embeds_of(pipeline)
    adapter = load_into_pipeline(pipeline, run.output_dir / ADAPTER_FILE)
    for found, expected, base in zip(embeds_of(pipeline), live_embeds(run, kind), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
        assert float((found - base).detach().abs().max()) > 1e-3
    adapter.set_strength(0)
    assert all(torch.equal(one, two) for one, two in zip(embeds_of(pipeline), plain, strict=True))
    adapter.set_strength(1)
    remove_from_pipeline(pipeline, adapter)
    assert all(torch.equal(one, two) for one, two in zip(embeds_of(pipeline), plain, strict=True))


def test_diffusers_loads_the_file_with_the_effect_of_the_live_encoders() -> None:
    run = trained("standard")
    pipeline = load(tiny_model(), diffusers.StableDiffusionXLPipeline)
    pipeline.load_lora_weights(str(run.output_dir), weight_name=ADAPTER_FILE)
    for found, expected in zip(embeds_of(pipeline), live_embeds(run, "standard"), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["comfyui", "diffusers"])
def test_diffusers_loads_an_export_with_the_effect_of_the_live_encoders(
    tmp_path: Path, kind: str, layout: Any
) -> None:
    run, file = trained(kind), tmp_path / "exported.safetensors"
    export_adapter(run.output_dir / ADAPTER_FILE, file, ExportOptions(layout=layout), families=specs())
    keys = load_file(file)
    if layout == "comfyui":
        parts = ("lora_down.weight", "lora_up.weight", "alpha")
        names = [
            f"{number}_{each}"
            for number in range(3)
            for each in (*(f"self_attn_{name}_proj" for name in ("q", "k", "v", "out")), "mlp_fc1", "mlp_fc2")
        ]
        assert {key for key in keys if key.startswith("lora_te")} == {
            f"lora_te{number}_text_model_encoder_layers_{name}.{part}"
            for number in (1, 2)
            for name in names
            for part in parts
        }
        assert all(key.startswith(("lora_unet_", "lora_te1_", "lora_te2_")) for key in keys)
    pipeline = load(tiny_model(), diffusers.StableDiffusionXLPipeline)
    pipeline.load_lora_weights(str(tmp_path), weight_name=file.name)
    for found, expected in zip(embeds_of(pipeline), live_embeds(run, kind), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_counts_the_layers_of_text_encoders(kind: str) -> None:
    found = inspect(trained(kind).output_dir / ADAPTER_FILE)
    assert found.text_encoders == {"text_encoder": 18, "text_encoder_2": 18}
    assert not found.left_out
    assert "text_encoder_2 (18)" in found.text()


@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_resize_refuse_a_file_with_text_encoders(kind: str) -> None:
    with pytest.raises(AdapterError, match=r"text_encoder and text_encoder_2"):
        open_adapter(trained(kind).output_dir / ADAPTER_FILE, families=specs(), base=None)


@pytest.mark.parametrize("kind", KINDS)
def test_init_lora_starts_the_text_encoders_too(tmp_path: Path, kind: str) -> None:
    source = trained(kind)
    keys = TRAINED | KINDS[kind] | {"init_lora": str(source.output_dir / ADAPTER_FILE)}
    with TinyRun(tmp_path).trainer(**keys) as trainer:
        at_once = present_embeds(trainer.family)(PROMPT)
        for encoder in trainer.text_encoding.text_encoders:
            for parameter in encoder.lora.parameters():
                parameter.data.zero_()
        trainer.trainable.init_from(source.output_dir / ADAPTER_FILE)  # type: ignore[attr-defined]
        again = present_embeds(trainer.family)(PROMPT)
    for embeds in (at_once, again):
        pairs = zip((embeds.prompt_embeds, embeds.pooled), live_embeds(source, kind), strict=True)
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_validation_encodes_prompts_at_the_strength_of_their_images(tmp_path: Path) -> None:
    run, seen = TinyRun(tmp_path), {}
    images = {"validation_disable": False, "validation_prompt": PROMPT, "validation_num_inference_steps": 2}
    with run.trainer(**TRAINED, **images, validation_step_interval=0, max_train_steps=2) as trainer:
        sampler, encode = trainer.validation.sampler, trainer.family.encode_prompts

        def watched(prompts: list[str]) -> Any:
            lora = trainer.text_encoding.text_encoders[0]
            is_off = all(layer._disable_adapters for layer in lora.lora.layers)
            seen.setdefault((prompts[0], is_off, lora.encoder.training), encode(prompts)[0].prompt_embeds)
            return encode(prompts)

        trainer.family.encode_prompts = watched  # type: ignore[method-assign]
        trainer.run()
        assert sampler.cached_path(sampler.prompts[0]).exists()
        assert image_file(validation_step_folder(sampler.folder, 2), sampler.prompts[0].name).exists()
    assert {key for key in seen if key[0]} == {(PROMPT, True, False), (PROMPT, False, False)}
    assert torch.equal(seen[PROMPT, True, False], embeds_of(load(tiny_model()))[0])
    assert not torch.equal(seen[PROMPT, False, False], seen[PROMPT, True, False])


def test_the_target_of_regularisation_has_the_text_encoders_of_the_base_model(tmp_path: Path) -> None:
    run, prior = TinyRun(tmp_path), TinyRun(tmp_path / "prior")
    datasets = [
        {"id": "pictures", "instance_data_dir": str(run.folder / "images")},
        {"id": "class", "instance_data_dir": str(prior.folder / "images"), "is_regularisation_data": True},
    ]
    with run.trainer(data_backend_config=datasets, **TRAINED) as trainer:
        for _ in range(2):
            trainer.optimizer_step(trainer.data.batches())
        seen, predict = [], trainer.family.predict

        def watched(denoiser: Any, noisy: Any, batch: Any) -> Tensor:
            seen.append(batch.text.prompt_embeds.detach())
            return predict(denoiser, noisy, batch)

        trainer.family.predict = watched  # type: ignore[method-assign]
        batch = next(each for each in trainer.data.batches() if each.is_regularisation)
        trainer.train_step(batch)
    assert torch.equal(seen[0], embeds_of(load(tiny_model()), batch.samples[0].caption)[0])
    assert not torch.equal(seen[1], seen[0])


@pytest.mark.parametrize("kind", KINDS)
def test_sample_applies_the_layers_of_text_encoders(tmp_path: Path, kind: str) -> None:
    file = trained(kind).output_dir / ADAPTER_FILE
    denoiser_alone = tmp_path / "denoiser.safetensors"
    stored = adapter_file.read(file)
    rest = without_encoders(stored, encoders_in(stored))
    adapter_file.write(denoiser_alone, rest.tensors, metadata=rest.metadata)
    images = [
        np.asarray(Image.open(sample_image(each, tmp_path / str(index))))
        for index, each in enumerate((file, denoiser_alone))
    ]
    pipeline = load(tiny_model())
    load_into_pipeline(pipeline, file)
    options = {"prompt": PROMPT, "num_inference_steps": 2, "guidance_scale": 4.0}
    generator = torch.Generator().manual_seed(3)
    expected = pipeline(**options, height=64, width=64, generator=generator, output_type="np").images[0]
    assert np.abs(images[0] / 255 - expected).max() < 1.5 / 255
    assert np.abs(images[0].astype(int) - images[1]).max() > 1


def sample_image(file: Path, output: Path) -> Path:
    """The image that `simpletuner sample` makes with an adapter file."""
    request = SampleRequest(
        adapter=file,
        prompts=[PROMPT],
        model={},
        validation={
            "validation_resolution": "64",
            "validation_num_inference_steps": 2,
            "validation_guidance": 4.0,
            "validation_seed": 3,
        },
        dtype="fp32",
        options={},
    )
    return next(sample(request, output=output, families=specs()))


@pytest.mark.parametrize("trains_too", [True, False], ids=["beside trained encoders", "beside cached text"])
def test_the_compared_run_has_its_own_text_encoders(tmp_path: Path, trains_too: bool) -> None:
    other = trained("tlora")
    keys: dict[str, object] = {
        "validation_disable": False,
        "validation_prompt": PROMPT,
        "validation_num_inference_steps": 2,
        "validation_resolution": "64",
        "validation_compared_config": str(other.folder / "config.json"),
        "validation_lycoris_strength": 0.5,
    }
    run = TinyRun(tmp_path)
    with run.trainer(**keys, **(TRAINED if trains_too else {})) as trainer:
        comparison = trainer.validation.comparison
        assert comparison is not None
        (prompt,) = comparison.sampler.prompts
        found = np.asarray(Image.open(comparison.cached_path(prompt)))
        encode = present_embeds(trainer.family)
        assert torch.equal(encode(PROMPT).prompt_embeds, embeds_of(load(tiny_model()))[0])
    pipeline = load(tiny_model())
    load_into_pipeline(pipeline, other.output_dir / ADAPTER_FILE, strength=0.5)
    generator = torch.Generator().manual_seed(prompt.seed)
    options = {"prompt": PROMPT, "num_inference_steps": 2, "guidance_scale": 7.5}
    expected = pipeline(**options, height=64, width=64, generator=generator, output_type="np").images[0]
    assert np.abs(found / 255 - expected).max() < 1.5 / 255
