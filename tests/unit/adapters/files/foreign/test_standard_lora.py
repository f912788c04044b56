"""LoRA, LoHa, LoKr and full files in the names of other programs add what their own formula says."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from simpletuner.helpers.adapters.network import load_adapter
from simpletuner.helpers.errors import AdapterError
from tests.unit.adapters.files.foreign.makers import (
    LAYERS,
    RANK,
    Factors,
    Made,
    full,
    loha,
    lokr,
    lokr_whole,
    lora,
    make,
    original_file,
    own_file,
    worst_error,
)

TOLERANCE = 1e-4
ALGORITHMS: dict[str, Factors] = {
    "lora": lora,
    "loha": loha,
    "lokr": lokr,
    "lokr_whole": lokr_whole,
    "full": full,
}
PEFT_NAMES = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
every_family = pytest.mark.parametrize("family", LAYERS)


def underscored(prefix: str) -> Callable[[str, str], str]:
    return lambda name, part: f"{prefix}{name.replace('.', '_')}.{part}"


def dotted(prefix: str) -> Callable[[str, str], str]:
    return lambda name, part: f"{prefix}{name}.{part}"


def peft(prefix: str, adapter: str = "") -> Callable[[str, str], str]:
    def key(name: str, part: str) -> str:
        part = PEFT_NAMES.get(part, part)
        return f"{prefix}{name}.{part.replace('.weight', f'{adapter}.weight')}"

    return key


def former(name: str, part: str) -> str:
    return f"unet.{name}.{part.replace('lora_down', 'lora.down').replace('lora_up', 'lora.up')}"


ORIGINAL_NAMES = {
    "kohya": underscored("lora_unet_"),
    "comfyui": dotted("diffusion_model."),
    "ai-toolkit": peft("diffusion_model."),
    "bare": dotted(""),
}
OWN_NAMES = {
    "kohya": underscored("lora_unet_"),
    "onetrainer": underscored("lora_transformer_"),
    "lycoris": underscored("lycoris_"),
    "diffusers": peft("transformer."),
    "diffusers unet": peft("unet."),
    "peft": peft("base_model.model."),
    "peft in memory": peft("base_model.model.", adapter=".default"),
    "bare": peft(""),
}


@every_family
@pytest.mark.parametrize("names", ORIGINAL_NAMES)
def test_lora_with_the_original_names_adds_its_delta(family: str, names: str, tmp_path: Path) -> None:
    alpha = None if names == "ai-toolkit" else 2.0
    made = original_file(family, lora, key=ORIGINAL_NAMES[names], alpha=alpha)
    model = make(family)
    adapter = load_adapter(model, made.save(tmp_path / "a.safetensors"))
    assert adapter.num_layers == len(made.deltas)
    assert adapter.tlora_config is None
    assert worst_error(model, made) < TOLERANCE


@every_family
@pytest.mark.parametrize("names", OWN_NAMES)
def test_lora_with_diffusers_names_adds_its_delta(family: str, names: str, tmp_path: Path) -> None:
    alpha = None if "peft" in names else 2.0
    made = own_file(family, lora, key=OWN_NAMES[names], alpha=alpha)
    model = make(family)
    adapter = load_adapter(model, made.save(tmp_path / "a.safetensors"))
    assert adapter.num_layers == len(made.deltas)
    assert worst_error(model, made) < TOLERANCE


@every_family
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_with_the_original_names_adds_its_delta(
    family: str, algorithm: str, tmp_path: Path
) -> None:
    made = original_file(family, ALGORITHMS[algorithm], key=ORIGINAL_NAMES["kohya"], alpha=1.0)
    model = make(family)
    load_adapter(model, made.save(tmp_path / "a.safetensors"))
    assert worst_error(model, made) < TOLERANCE


def test_former_diffusers_keys_are_a_standard_lora(tmp_path: Path) -> None:
    made = own_file("sdxl", lora, key=former)
    model = make("sdxl")
    load_adapter(model, made.save(tmp_path / "a.safetensors"))
    assert worst_error(model, made) < TOLERANCE


@every_family
@pytest.mark.parametrize("names", ["original", "diffusers"])
def test_magnitudes_of_outputs_scale_the_rows_of_the_changed_weight(
    family: str, names: str, tmp_path: Path
) -> None:
    model = make(family)
    if names == "original":
        made = original_file(family, lora, key=ORIGINAL_NAMES["kohya"], alpha=2.0)
        magnitudes = dict(LAYERS[family])
    else:
        made = own_file(family, lora, key=peft("transformer."))
        magnitudes = {path: {path: 1} for parts in LAYERS[family].values() for path in parts}
    generator = torch.Generator().manual_seed(4)
    for name, parts in magnitudes.items():
        scales = []
        for path in parts:
            changed = model.get_submodule(path).weight + made.deltas[path]
            scale = torch.rand(changed.shape[0], *(1,) * (changed.ndim - 1), generator=generator) + 0.5
            norm = changed.flatten(1).norm(dim=1).view(scale.shape)
            made.deltas[path] = scale * changed / norm - model.get_submodule(path).weight
            scales.append(scale)
        joined = torch.cat(scales)
        if names == "original":
            made.tensors[ORIGINAL_NAMES["kohya"](name, "dora_scale")] = joined
        else:
            # Of a convolution PEFT keeps [1, O, 1, 1].
            shape = (-1,) if joined.ndim == 2 else (1, -1, 1, 1)
            made.tensors[f"transformer.{name}.lora_magnitude_vector"] = joined.view(shape)
    load_adapter(model, made.save(tmp_path / "a.safetensors"))
    assert worst_error(model, made) < TOLERANCE


def test_alphas_of_pefts_configuration_count_wherever_it_stands(tmp_path: Path) -> None:
    made = own_file("flux", lora, key=peft("base_model.model."))
    path = f"{next(iter(made.deltas))}"
    config = {"lora_alpha": 8, "r": RANK, "alpha_pattern": {path: 2.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for each, delta in made.deltas.items():
        made.deltas[each] = delta * ((2.0 if each == path else 8) / RANK)
    model = make("flux")
    load_adapter(model, made.save(tmp_path / "adapter_model.safetensors"))
    assert worst_error(model, made) < TOLERANCE
    header = own_file("flux", lora, key=peft("transformer."))
    header.metadata = {
        "lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})
    }
    (tmp_path / "adapter_config.json").unlink()
    header.deltas, model = made.deltas, make("flux")
    load_adapter(model, header.save(tmp_path / "b.safetensors"))
    assert worst_error(model, header) < TOLERANCE


def test_rank_stabilised_scale_is_alpha_over_the_root_of_the_rank(tmp_path: Path) -> None:
    made = own_file("sdxl", lora, key=peft("base_model.model."))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 3, "use_rslora": True}))
    made.deltas = {path: delta * 3 / RANK**0.5 for path, delta in made.deltas.items()}
    model = make("sdxl")
    load_adapter(model, made.save(tmp_path / "a.safetensors"))
    assert worst_error(model, made) < TOLERANCE


def test_onetrainers_open_layout_names_the_parts_of_joined_layers_and_swaps_the_last_modulation(
    tmp_path: Path,
) -> None:
    generator = torch.Generator().manual_seed(1)
    names = {
        "double_blocks.1.img_attn.qkv.1": "transformer_blocks.1.attn.to_k",
        "double_blocks.0.txt_attn.qkv.2": "transformer_blocks.0.attn.add_v_proj",
        "single_blocks.1.linear1.3": "single_transformer_blocks.1.proj_mlp",
        "img_in.proj": "x_embedder",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    }
    model, made = make("flux"), Made()
    for name, path in names.items():
        weight = model.get_submodule(path).weight
        parts, delta = lora(weight.shape[0], tuple(weight.shape[1:]), generator)
        made.tensors |= {f"transformer.{name}.{part}": tensor for part, tensor in parts.items()}
        made.deltas[path] = torch.cat(delta.chunk(2)[::-1]) if name.startswith("final") else delta
    made.tensors |= {
        "clip_l.text_model.encoder.layers.0.mlp.fc1.lora_down.weight": torch.ones(2, 4),
        "t5.encoder.block.0.layer.0.SelfAttention.k.lora_down.weight": torch.ones(2, 4),
        "bundle_emb.word.clip_l": torch.ones(2, 4),
    }
    load_adapter(model, made.save(tmp_path / "a.safetensors"))
    assert worst_error(model, made) < TOLERANCE


@pytest.mark.parametrize("prefix", ["lora_te1_", "lora_te2_", "lora_te_", "text_encoder.", "text_encoder_2."])
def test_layers_of_text_encoders_are_left_out_and_counted(
    prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = original_file("sdxl", lora, key=ORIGINAL_NAMES["kohya"])
    for part in ("lora_down.weight", "lora_up.weight", "alpha"):
        made.tensors[f"{prefix}text_model_encoder_layers_0_mlp_fc1.{part}"] = torch.ones(1, 1)
    model = make("sdxl")
    with caplog.at_level(logging.WARNING):
        load_adapter(model, made.save(tmp_path / "a.safetensors"))
    assert "3 tensors are left out: layers of text encoders" in caplog.text
    assert worst_error(model, made) < TOLERANCE


QKV = "lora_unet_double_blocks_1_img_attn_qkv"
HOSTILE = {
    "another width": (
        {f"{QKV}.lora_up.weight": torch.ones(97, 4), f"{QKV}.lora_down.weight": torch.ones(4, 32)},
        "97",
    ),
    "three times the width": (
        {f"{QKV}.lora_up.weight": torch.ones(288, 4), f"{QKV}.lora_down.weight": torch.ones(4, 96)},
        "do not fit",
    ),
    "magnitude of inputs": (
        {
            f"{QKV}.lora_up.weight": torch.ones(96, 4),
            f"{QKV}.lora_down.weight": torch.ones(4, 32),
            f"{QKV}.dora_scale": torch.ones(1, 32),
        },
        f"{QKV[10:]}.*dora_scale",
    ),
    "rotation": ({f"{QKV}.oft_blocks": torch.ones(2, 48, 48)}, "oft_blocks cannot be divided"),
    "unknown part": ({f"{QKV}.lora_C.weight": torch.ones(2, 2)}, "lora_C"),
    "unknown layer": (
        {
            "lora_unet_triple_blocks_1.lora_up.weight": torch.ones(2, 2),
            "lora_unet_triple_blocks_1.lora_down.weight": torch.ones(2, 2),
        },
        "1 of 1 layers are not in this .* triple_blocks_1",
    ),
    "half a layer": ({f"{QKV}.lora_up.weight": torch.ones(96, 4)}, "fit"),
    "text encoder only": ({"lora_te1_a.lora_up.weight": torch.ones(2, 2)}, "no layer of a denoiser"),
    "time-aware": ({"transformer_blocks.0.attn.to_q.lora_time_gamma.weight": torch.ones(2, 2)}, "DiffSynth"),
    "inverted mask": ({"transformer_blocks.0.attn.to_q.down.weight": torch.ones(2, 2)}, "inverted"),
    "other rotation": (
        {"lora_transformer_transformer_blocks_0_attn_to_q.oft_R.weight": torch.ones(2, 2)},
        "OFT",
    ),
    "twice": (
        {
            f"{prefix}transformer_blocks.0.attn.to_q.lora_{which}.weight": torch.ones(32, 32)
            for prefix in ("transformer.", "diffusion_model.")
            for which in "AB"
        },
        "twice",
    ),
    "twice by two names": (
        {
            f"transformer.{name}.lora_{which}.weight": torch.ones(32, 32)
            for name in ("transformer_blocks.1.attn.to_out.0", "double_blocks.1.img_attn.proj")
            for which in "AB"
        },
        r"attn\.to_out\.0",
    ),
}


@pytest.mark.parametrize("damage", HOSTILE)
def test_file_that_cannot_be_read_is_refused_in_one_line_and_changes_nothing(
    damage: str, tmp_path: Path
) -> None:
    tensors, message = HOSTILE[damage]
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    model = make("flux")
    with pytest.raises(AdapterError, match=message) as caught:
        load_adapter(model, tmp_path / "a.safetensors")
    assert str(caught.value).count(str(tmp_path)) == 1
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert not any("lycoris" in name for name, _ in model.named_modules())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "list"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"lora_alpha": "big"}', "no finite number"),
        ("x" * (1 << 20) + "x", "larger"),
    ],
)
def test_damaged_configuration_beside_the_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    made = own_file("sdxl", lora, key=peft("base_model.model."))
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError, match=message) as caught:
        load_adapter(make("sdxl"), made.save(tmp_path / "a.safetensors"))
    assert "\n" not in str(caught.value)


@every_family
def test_small_lora_on_a_half_precision_base_is_not_rounded_away(family: str, tmp_path: Path) -> None:
    made = original_file(family, lora, key=ORIGINAL_NAMES["kohya"], alpha=RANK * 1e-3)
    model = make(family).to(torch.bfloat16)
    load_adapter(model, made.save(tmp_path / "a.safetensors"))
    for path, delta in made.deltas.items():
        layer = model.get_submodule(path)
        x = torch.randn(2, layer.weight.shape[1], *(6, 6) * (layer.weight.ndim == 4)).to(torch.bfloat16)
        (adapter,) = layer.children()
        with torch.no_grad():
            added = adapter.bypass_forward_diff(x).float()
            weight, x = delta, x.float()
            expected = (
                torch.nn.functional.linear(x, weight)
                if weight.ndim == 2
                else torch.nn.functional.conv2d(x, weight, stride=layer.stride, padding=layer.padding)
            )
        assert adapter.bypass_mode
        assert (added - expected).norm() / expected.norm() < 1e-2
