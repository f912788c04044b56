"""The sections of the report with text and tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from simpletuner.helpers.choices.algorithms import display_name_of
from simpletuner.helpers.reporting.html_report.folder import RunSnapshot, display_path
from simpletuner.helpers.reporting.html_report.markup import (
    definition_list,
    disclosure,
    escape,
    format_count,
    format_duration,
    format_number,
)
from simpletuner.helpers.reporting.html_report.series import downsample, smooth

RELOAD_S = 60
PATH_KEYS = ("_dir", "_dir_vae", "_dir_text", "_path", "_config", "_library", "init_lora")


def render_heading(run: RunSnapshot, *, reloads: bool) -> str:
    """Name and state of the run, and its main numbers."""
    of = f" of {run.max_steps:,}" if run.max_steps else ""
    state = (
        f"{run.state} at step {run.step:,}{of}"
        if run.state != "finished"
        else f"finished, {format_count(run.step, 'step')}"
    )
    done = min(run.step / run.max_steps, 1.0) if run.max_steps else 0.0
    bar = (
        f'<div class="bar"><i style="width:{done:.2%}"></i></div>'
        if run.state != "finished" and run.max_steps
        else ""
    )
    again = f'<span data-reload="{RELOAD_S}">, loaded again every minute</span>' if reloads else ""
    return (
        f"<header>\n<p class=over>{escape(_adapter_and_base(run))}</p>\n<h1>{escape(run_title(run))}</h1>\n"
        f'<p><span class="state {run.state}">{state}</span> <small>as of {run.written}{again}</small></p>\n'
        f"{bar}"
        f"{_headline(run)}\n</header>"
    )


def run_title(run: RunSnapshot) -> str:
    """tracker_run_name, else the folder's name."""
    return str(run.config.get("tracker_run_name") or run.path.resolve().name)


def render_datasets(run: RunSnapshot) -> str:
    """Images, captions and buckets of each dataset."""
    known = {each["id"]: each for each in run.manifest.get("datasets", [])}
    entries = run.config.get("data_backend_config", [])
    configured = [each for each in entries if each.get("dataset_type") != "conditioning"]
    kinds = {each.get("id"): str(each.get("conditioning_type")) for each in entries}
    target = run.config.get("regularisation_target")
    return "\n".join(
        _dataset(each, known.get(each.get("id"), {}), kinds=kinds, target=target) for each in configured
    )


def render_changes(run: RunSnapshot) -> str:
    """What was changed when the run was started again, by the last step before."""
    return "\n".join(
        f"<h4>After step {change['step']:,}</h4><ul>"
        + "".join(f"<li>{escape(line)}</li>" for line in change["changes"])
        + "</ul>"
        for change in run.changes
    )


def render_configuration(run: RunSnapshot) -> str:
    """Keys that differ from their default, then the other keys, then the nested files."""
    nested = {
        key: value for key, value in run.config.items() if key in ("lycoris_config", "data_backend_config")
    }
    flat = {
        key: ", ".join(map(str, value)) if isinstance(value, list) else value
        for key, value in sorted(run.config.items())
        if key not in nested and not isinstance(value, dict)
    }
    changed = run.manifest.get("changed_keys")
    blocks = []
    if changed is None:
        blocks.append(_settings(flat))
    else:
        blocks.append(_settings({key: value for key, value in flat.items() if key in changed}))
        rest = {key: value for key, value in flat.items() if key not in changed}
        blocks.append(disclosure(f"{format_count(len(rest), 'setting')} at their default", _settings(rest)))
    for key, value in nested.items():
        text = json.dumps(_with_display_paths(value), indent=2, ensure_ascii=False)
        blocks.append(disclosure(key, f"<pre><code>{escape(text)}</code></pre>"))
    return "\n".join(blocks) if flat else ""


def render_environment(run: RunSnapshot) -> str:
    """Versions, device and machine."""
    return definition_list(run.manifest["environment"].items()) if run.manifest.get("environment") else ""


def _adapter_and_base(run: RunSnapshot) -> str:
    adapter = run.manifest.get("adapter", {})
    lycoris = run.config.get("lycoris_config") or {}
    algorithm = str(adapter.get("kind") or lycoris.get("algo") or run.config.get("lora_type", ""))
    base = run.config.get("pretrained_model_name_or_path")
    return " on ".join(filter(None, (display_name_of(algorithm), display_path(base) if base else None)))


def _headline(run: RunSnapshot) -> str:
    log, adapter = run.log, run.manifest.get("adapter", {})
    if not log.num_rows:
        return "<p>No step is logged yet.</p>"
    steps = log.steps
    losses = downsample(steps, smooth(log.column("loss"))).means
    seconds = log.column("seconds")
    memory = {name: log.column(name) for name in ("memory_mib", "device_memory_mib")}
    peak = {name: float(np.nanmax(values)) for name, values in memory.items() if np.isfinite(values).any()}
    per_step_s = float(np.nanmedian(seconds)) if np.isfinite(seconds).any() else 0.0
    samples = log.column("samples")
    per_step = samples[-1] / steps[-1]
    entries = [
        ("loss, smoothed", format_number(float(losses[-1]))),
        ("samples seen", format_number(float(samples[-1]))),
        ("epochs", format_number(float(log.column("epoch")[-1]) + 1)),
        ("time in steps", format_duration(float(np.nansum(seconds)))),
        ("speed", f"{format_number(per_step / per_step_s)} samples/s" if per_step_s else None),
        ("peak memory", _mib(peak.get("memory_mib"))),
        ("peak GPU memory", _mib(peak.get("device_memory_mib"))),
        ("trained", _parameters(adapter)),
    ]
    return definition_list(entries).replace('class="facts"', 'class="facts headline"')


def _mib(value: float | None) -> str | None:
    return None if value is None else f"{value / 1024:.2f} GiB"


def _parameters(adapter: Mapping[str, Any]) -> str | None:
    count = adapter.get("parameters")
    if not count:
        return None
    size = f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count:,}"
    return f"{size} parameters in {format_count(adapter.get('layers', 0), 'layer')}"


def _dataset(
    config: Mapping[str, Any], known: Mapping[str, Any], *, kinds: Mapping[str, str], target: str | None
) -> str:
    """One dataset; `kinds` is the conditioning_type of each entry, by id."""
    draws = f"{(config.get('repeats', 0) + 1) * config.get('probability', 1):g} x each image"
    keeps_class = bool(config.get("is_regularisation_data"))
    named = config.get("conditioning_data", [])
    references = [each for each in named if kinds.get(each, "").startswith("reference")]
    masks = [each for each in named if each not in references]
    references += [each["type"] for each in config.get("conditioning", [])]
    if keeps_class and target == "data":
        draws = "as many as of the other images"
    entries = [
        ("folder", display_path(config["instance_data_dir"]) if config.get("instance_data_dir") else None),
        ("images", known.get("images")),
        ("held out", known.get("held_out") or None),
        ("left out", known.get("num_skipped")),
        ("captions", _captions_in_words(known)),
        ("sizes as stored", " to ".join(known.get("originals", []))),
        ("trained at", f"{config.get('resolution', 0):g} ({config.get('resolution_type')})"),
        (
            "crop",
            f"{config.get('crop_style')}, {config.get('crop_aspect')}" if config.get("crop") else "none",
        ),
        ("regularisation", f"towards {target}" if keeps_class else None),
        ("masks", "alpha channels" if config.get("alpha_mask") else ", ".join(masks)),
        ("references", ", ".join(references)),
        ("draws per epoch", draws if config.get("dataset_type") != "eval" else "none, they are held out"),
        ("captions from", config.get("caption_strategy")),
        ("instance prompt", config.get("instance_prompt")),
    ]
    return (
        f"<h3>{escape(config.get('id'))}</h3>\n{definition_list(entries)}\n"
        f"{_buckets(known.get('buckets', {}))}"
        f"{_captions(known.get('captions', []))}{_skipped(known)}"
    )


def _captions_in_words(known: Mapping[str, Any]) -> str | None:
    if "images" not in known:
        return None
    with_caption = known["images"] - known["without_caption"]
    texts = format_count(known["distinct_captions"], "distinct text")
    return f"{with_caption:,} of {format_count(known['images'], 'image')}, {texts}"


def _buckets(buckets: Mapping[str, int]) -> str:
    if not buckets:
        return ""
    most = max(buckets.values())
    rows = "".join(
        f'<li><span>{escape(size)}</span><i style="width:{count / most:.1%}"></i><b>{count:,}</b></li>'
        for size, count in buckets.items()
    )
    return f'<h4>Buckets</h4><ul class="buckets">{rows}</ul>\n'


def _captions(captions: list[tuple[str, str]]) -> str:
    rows = "".join(f"<li><small>{escape(path)}</small> {escape(text)}</li>" for path, text in captions)
    return f'<h4>Some captions</h4><ul class="captions">{rows}</ul>\n' if rows else ""


def _skipped(known: Mapping[str, Any]) -> str:
    skipped = known.get("skipped", [])
    if not skipped:
        return ""
    rows = "".join(f"<li><small>{escape(path)}</small> {escape(reason)}</li>" for path, reason in skipped)
    more = known["num_skipped"] - len(skipped)
    end = f"<li>and {more:,} more</li>" if more > 0 else ""
    return f'<h4>Left out</h4><ul class="captions">{rows}{end}</ul>\n'


def _settings(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th scope=row>{escape(key).replace('_', '_<wbr>')}</th><td>{_value(key, value)}</td></tr>"
        for key, value in values.items()
    )
    return f'<table class="settings">{rows}</table>'


def _value(key: str, value: object) -> str:
    if value is None or value == "":
        return "<em>none</em>"
    if isinstance(value, bool):
        return str(value).lower()
    return escape(display_path(value) if isinstance(value, str) and key.endswith(PATH_KEYS) else value)


def _with_display_paths(value: Any) -> Any:
    """A nested configuration with its paths for display."""
    if isinstance(value, list):
        return [_with_display_paths(each) for each in value]
    if isinstance(value, dict):
        return {
            key: display_path(each)
            if isinstance(each, str) and key.endswith(PATH_KEYS)
            else _with_display_paths(each)
            for key, each in value.items()
        }
    return value
