"""The model card: what the hub reads of it, what people read, and texts that try to break it."""

from __future__ import annotations

import ast
import html
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from simpletuner.helpers.errors import PublishError
from simpletuner.helpers.models.registry import specs
from simpletuner.helpers.publishing.card import write_card
from simpletuner.helpers.publishing.markdown import escape
from tests.unit.publishing.conftest import write_adapter, write_run

HOSTILE = (
    'a | b\n# not a heading\n``` ---\n- "x": {y}',
    "<script>alert(1)</script> ![](http://x) [link](y) *bold* _it_",
    "---\nlicense: mit\n---",
    "1. a: b # c, 'd' \\ & é 🐱 \u202e \x07 %YAML",
    "- item\n```\n# out of the fence\n````",
    "{{ jinja }} $HOME `code`",
)


def card_of(folder: Path, **options: Any) -> str:
    return write_card(folder, families=specs(), **options).read_text(encoding="utf-8")


def front(card: str) -> dict[str, Any]:
    """The front matter, by the client's own reading."""
    assert card.startswith("---\n")
    found: dict[str, Any] = ModelCard(card).data.to_dict()
    return found


def body(card: str) -> str:
    return str(ModelCard(card).text)


def shown(markdown: str) -> str:
    """The text of Markdown as people see it."""
    made = MarkdownIt("commonmark").enable("table").render(markdown)
    return html.unescape(re.sub(r"<[^>]+>", "", made))


def test_the_front_matter_is_what_the_hub_reads(run: Path) -> None:
    assert front(card_of(run)) == {
        "base_model": "stabilityai/stable-diffusion-xl-base-1.0",
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "license": "openrail++",
        "pipeline_tag": "text-to-image",
        "instance_prompt": "sks cat",
        "tags": [
            *(
                "text-to-image",
                "diffusers",
                "lora",
                "template:diffusion-lora",
                "tlora",
                "simpletuner-t",
                "sdxl",
            ),
            "not-for-all-audiences",
        ],
        "widget": [
            {"text": f"a photo of sks cat {index}", "output": {"url": f"images/0{index}.png"}}
            for index in range(2)
        ],
    }


@pytest.mark.parametrize(
    ("model", "licence"),
    [
        ("black-forest-labs/FLUX.1-dev", ("other", "flux-1-dev-non-commercial-license")),
        ("black-forest-labs/FLUX.1-schnell", ("apache-2.0", None)),
        ("somebody/finetune", (None, None)),
        ("/private/place/model", (None, None)),
    ],
)
def test_the_licence_is_that_of_a_known_base_model_only(
    model: str, licence: tuple[str | None, str | None], tmp_path: Path
) -> None:
    folder = write_run(tmp_path / "run", model_family="flux", pretrained_model_name_or_path=model)
    found = front(card_of(folder))
    assert (found.get("license"), found.get("license_name")) == licence
    assert ("license_link" in found) == (licence[1] is not None)
    assert found.get("base_model") == (None if model.startswith("/") else model)
    assert ("see the base model" in body(card_of(folder))) == (licence[0] is None)


def test_a_card_that_is_safe_for_work_lacks_the_tag(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", model_card_safe_for_work=True, model_card_note="Only **cats**.")
    assert "not-for-all-audiences" not in front(card_of(folder))["tags"]
    assert "\nOnly **cats**.\n" in card_of(folder)


def test_the_card_has_the_images_the_schedule_the_settings_and_the_use(run: Path) -> None:
    card = card_of(run, repository="somebody/my-cat")
    text = shown(body(card))
    assert text.splitlines()[0] == "my-cat"
    assert re.search(r"timestep\s+0\s+250\s+500\s+750\s+1000\s+active rank\s+8\s+6\s+5\s+3\s+2\s", text)
    assert re.search(r"learning_rate\s+0\.0001\s", text)
    assert re.search(r"training images\s+3\s", text)
    assert "hf download somebody/my-cat pytorch_lora_weights.safetensors" in text
    named = re.findall(r"!\[\]\(([^)]+)\)", card)
    assert named == ["images/00.png", "images/01.png", "images/grid.png"]
    newest = run / "validation" / "step-4"
    for name, source in zip(named, ("00-cat", "01-cat", "grid"), strict=True):
        assert (run / "model-card" / name).read_bytes() == (newest / f"{source}.png").read_bytes()


@pytest.mark.parametrize("choice", ["plain", "main"])
def test_the_card_says_which_file_has_the_average_and_shows_its_images(tmp_path: Path, choice: str) -> None:
    folder = write_run(tmp_path / "run", use_ema=True, ema_decay=0.99, ema_adapter_file=choice)
    assert "EMA" not in card_of(folder)
    names = ["pytorch_lora_weights.safetensors", "pytorch_lora_weights.ema.safetensors"]
    write_adapter(folder / names[1])
    averaged = folder / "validation" / "step-4" / "ema"
    averaged.mkdir()
    (averaged / "00-cat.png").write_bytes(b"of the average")
    text = shown(body(card_of(folder)))
    plain, average = names if choice == "plain" else reversed(names)
    assert text.index(f"{plain} has the weights") < text.index(f"{average} their")
    assert "0.99" in text
    image = (folder / "model-card" / "images" / "00.png").read_bytes()
    assert (image == b"of the average") is (choice == "main")
    (folder / "validation" / "step-4" / "00-cat.png").unlink()
    card_of(folder)  # images of the average alone
    assert (folder / "model-card" / "images" / "00.png").read_bytes() == b"of the average"


@pytest.mark.parametrize("prompt", HOSTILE)
def test_no_text_breaks_the_card(prompt: str, tmp_path: Path) -> None:
    dataset = {"id": "photos", "instance_prompt": prompt, "instance_data_dir": "/private/place"}
    folder = write_run(tmp_path / "run", data_backend_config=[dataset], tracker_run_name=prompt)
    shots = [{"name": "00-cat", "prompt": prompt, "size": "64x64", "seed": 7}]
    (folder / "run.json").write_text(json.dumps({"shots": shots}))
    card = card_of(folder)
    found = front(card)
    assert found["widget"][0]["text"] == found["instance_prompt"] == prompt
    assert found["license"] == "openrail++"
    rendered = MarkdownIt("commonmark").enable("table").parse(body(card))
    headings = [token.tag for token in rendered if token.type == "heading_open"]
    assert headings == ["h1", *["h2"] * 5, *["h3"] * 3]
    assert not [token for token in rendered if token.type == "html_block" and "script" in token.content]
    inline = [child for token in rendered for child in token.children or ()]
    assert {each.type for each in inline} <= {
        "text",
        "text_special",
        "image",
        "link_open",
        "link_close",
        "code_inline",
    }
    assert len([each for each in inline if each.type == "image"]) == 2
    code = {token.info: token.content for token in rendered if token.type == "fence"}
    [call] = [
        node
        for node in ast.walk(ast.parse(code["python"]))
        if isinstance(node, ast.Call) and any(each.arg == "prompt" for each in node.keywords)
    ]
    written = {each.arg: each.value for each in call.keywords}["prompt"]
    assert ast.literal_eval(written) == prompt
    words = shlex.split(code["bash"])
    assert words[words.index("--prompt") + 1] == prompt


@pytest.mark.parametrize("text", HOSTILE)
def test_an_escaped_text_reads_as_itself(text: str) -> None:
    plain = " ".join(text.split()).replace("\u202e", r"\u202e").replace("\x07", r"\x07")
    for markdown in (f"- {escape(text)}", f"# {escape(text)}", f"| a |\n| --- |\n| {escape(text)} |"):
        assert plain in " ".join(shown(markdown).split())


def test_a_card_that_somebody_edited_stays_and_another_is_written_anew(run: Path) -> None:
    card_of(run)
    write_adapter(run / "pytorch_lora_weights.safetensors", steps=99)
    assert "99 steps" in card_of(run)
    card = run / "model-card" / "README.md"
    edited = card.read_text(encoding="utf-8").replace("99 steps", "many steps")
    card.write_text(edited, encoding="utf-8")
    assert card_of(run) == edited
    card.write_text("Mine.", encoding="utf-8")
    assert card_of(run) == "Mine."


def test_a_standard_lora_is_loaded_by_diffusers(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", lora_type="standard", lycoris_config=None, lora_rank=16)
    card = card_of(folder, repository="somebody/my-cat")
    assert "load_lora_weights('somebody/my-cat', weight_name='pytorch_lora_weights.safetensors')" in card
    assert re.search(r"lora_rank\s+16\s", shown(body(card)))


def test_without_a_final_adapter_the_card_is_that_of_the_newest_checkpoint(run: Path) -> None:
    (run / "pytorch_lora_weights.safetensors").unlink()
    with pytest.raises(PublishError):
        card_of(run)
    for step in (2, 10):
        write_adapter(run / f"checkpoint-{step}" / "pytorch_lora_weights.safetensors", steps=step)
    assert "10 steps" in card_of(run)
    assert "checkpoint-10/pytorch_lora_weights.safetensors" in card_of(run)


def test_the_card_holds_no_path(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", pretrained_model_name_or_path="/private/place/model")
    card = card_of(folder)
    assert "/private" not in card
    assert str(tmp_path) not in card


def test_a_folder_named_by_the_environment_gives_no_heading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "clients" / "clientfolder"
    monkeypatch.setenv("CARD_OUTPUT", str(folder))
    write_run(folder, output_dir="{env:CARD_OUTPUT}", hub_model_id=None, tracker_run_name=None)
    assert "clientfolder" not in card_of(folder)


def test_a_folder_that_is_none_of_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PublishError):
        card_of(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_images_of_a_slider_say_their_strength(run: Path) -> None:
    manifest = json.loads((run / "run.json").read_text())
    for shot, strength in zip(manifest["shots"], (-0.5, 1.0), strict=True):
        shot["strength"] = strength
    (run / "run.json").write_text(json.dumps(manifest))
    text = card_of(run)
    assert "| 64x64, seed 7, strength -0.5 |" in text
    assert "| 64x64, seed 7 |" in text


@pytest.mark.parametrize("lora_type", ["lycoris", "standard"])
def test_the_use_of_a_slider_has_the_strength_of_the_first_image(lora_type: str, tmp_path: Path) -> None:
    other = {} if lora_type == "lycoris" else {"lycoris_config": None, "lora_rank": 16}
    run = write_run(tmp_path / "run", lora_type=lora_type, **other)
    manifest = json.loads((run / "run.json").read_text())
    assert "strength" not in card_of(run)
    manifest["shots"][0]["strength"] = -0.5
    (run / "run.json").write_text(json.dumps(manifest))
    text = card_of(run)
    assert "--strength -0.5" in text
    in_python = "strength=-0.5)" if lora_type == "lycoris" else "pipeline.set_adapters('adapter', -0.5)"
    assert in_python in text
