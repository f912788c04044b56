"""Instructions to use the run's adapter: a command line and a Python snippet."""

from __future__ import annotations

from pathlib import Path

from simpletuner.helpers.io.run_folder import EMBEDDING_FILE, embedding_file
from simpletuner.helpers.models import registry
from simpletuner.helpers.publishing.usage import (
    FAMILY,
    WeightFiles,
    export_command,
    pipeline_code,
    sample_command,
    whole_model_code,
)
from simpletuner.helpers.reporting.html_report.folder import RunSnapshot, relative_path
from simpletuner.helpers.reporting.html_report.markup import escape

COMMAND_ID = "use-command"
PYTHON_ID = "use-python"
SWAPPED = tuple(f"pretrained_{part}_model_name_or_path" for part in ("unet", "transformer", "vae", "t5"))
"""Keys that replace a component of the base model."""


def render_usage(run: RunSnapshot) -> str:
    """Command and snippet for the newest adapter; "" before the first one."""
    if run.adapter is None:
        return ""
    where = "" if run.adapter.parent == run.path else f" of {run.adapter.parent.name}, the newest so far"
    noun = "file of the new token" if run.adapter.name == EMBEDDING_FILE else "adapter"
    if run.adapter.is_dir():
        return _model_usage(run, run.adapter, where=where)
    blocks = [
        f"<p>The {noun}{escape(where)} is <code>{escape(relative_path(run.adapter))}</code>. "
        "The command and the code below generate an image with it, in the working directory of the run.</p>",
        _block(COMMAND_ID, "On the command line", command_line(run)),
        _block(PYTHON_ID, "In Python", python_snippet(run)),
    ]
    for key in SWAPPED:
        if run.config.get(key):
            text = f"This run replaced a component: {key} {relative_path(run.config[key])}."
            blocks.append(f'<p class="note">{escape(text)} Load it into the pipeline too.</p>')
    if run.beside_adapter is not None:
        name = f"<code>{escape(relative_path(run.beside_adapter))}</code>"
        is_main = run.config.get("ema_adapter_file") == "main"
        weights = "the trained ones; the adapter has the average of them" if is_main else "their average"
        blocks.append(f"<p>This run kept a moving average (EMA) of its weights. {name} has {weights}.</p>")
    if run.comfyui is not None:
        blocks.append(f"<p>For ComfyUI: <code>{escape(relative_path(run.comfyui))}</code></p>")
    return "\n".join(blocks)


def _model_usage(run: RunSnapshot, folder: Path, *, where: str) -> str:
    """The same for a whole model."""
    spec = registry.specs().get(str(run.config.get(FAMILY)))
    model, name = (
        relative_path(str(each)) for each in (run.config.get("pretrained_model_name_or_path"), folder)
    )
    code = whole_model_code(run.config, run.manifest, model=model, folder=name, spec=spec)
    blocks = [
        f"<p>The trained model{escape(where)} is <code>{escape(name)}</code>, in diffusers' layout.</p>",
        _block(PYTHON_ID, "In Python", code),
        _block(COMMAND_ID, "One file for ComfyUI", export_command(name)),
    ]
    if run.beside_adapter is not None:
        beside = escape(relative_path(run.beside_adapter))
        blocks.append(f"<p><code>{beside}</code> has the other weights of the moving average (EMA).</p>")
    return "\n".join(blocks)


def command_line(run: RunSnapshot) -> str:
    """The `simpletuner sample` command that generates the run's first validation image."""
    return sample_command(run.config, run.manifest, adapter=relative_path(run.adapter or run.path))


def python_snippet(run: RunSnapshot) -> str:
    """Python code that generates the same image through diffusers."""
    model = relative_path(str(run.config.get("pretrained_model_name_or_path")))
    adapter, spec = run.adapter or run.path, registry.specs().get(str(run.config.get(FAMILY)))
    embedding, has_token = embedding_file(adapter), run.config.get("placeholder_token") is not None
    files = WeightFiles(
        adapter=None if adapter == embedding else repr(relative_path(adapter)),
        embedding=repr(relative_path(embedding)) if has_token and embedding.is_file() else None,
    )
    return pipeline_code(run.config, run.manifest, model=model, files=files, spec=spec)


def _block(anchor: str, title: str, text: str) -> str:
    return (
        f'<h3>{escape(title)}</h3>\n<div class="code">'
        f'<button type="button" data-copy="{anchor}">Copy</button>'
        f'<pre id="{anchor}"><code>{escape(text)}</code></pre></div>'
    )
