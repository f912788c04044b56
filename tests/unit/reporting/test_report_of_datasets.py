"""The datasets of a run on its page."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any, cast

from simpletuner.helpers.reporting.html_report.sections import render_datasets


def test_masks_are_named_at_their_images_and_are_no_dataset() -> None:
    entries = [
        {"id": "photos", "instance_data_dir": "images", "conditioning_data": ["white on the left"]},
        {"id": "cut out", "instance_data_dir": "others", "conditioning_data": [], "alpha_mask": True},
        {"id": "white on the left", "dataset_type": "conditioning", "instance_data_dir": "hidden"},
    ]
    run = SimpleNamespace(manifest={}, config={"data_backend_config": entries})
    page = render_datasets(cast(Any, run))
    assert [name in page for name in ("images", "white on the left", "alpha channel", "hidden")] == [
        True,
        True,
        True,
        False,
    ]
    assert page.count("<h3>") == 2


def test_references_are_named_apart_from_masks() -> None:
    entries = [
        {
            "id": "photos",
            "instance_data_dir": "images",
            "conditioning_data": ["white", "before"],
            "conditioning": [{"type": "canny"}],
        },
        {"id": "white", "dataset_type": "conditioning", "conditioning_type": "mask"},
        {"id": "before", "dataset_type": "conditioning", "conditioning_type": "reference_loose"},
    ]
    run = SimpleNamespace(manifest={}, config={"data_backend_config": entries})
    page = render_datasets(cast(Any, run))
    values = dict(re.findall(r"<dt>(\w+)</dt>\s*<dd>(.*?)</dd>", page))
    assert (values["masks"], values["references"]) == ("white", "before, canny")


def test_held_out_images_are_counted_and_drawn_in_no_epoch() -> None:
    entries = [
        {"id": "photos", "dataset_type": "image", "instance_data_dir": "images", "eval_share": 0.25},
        {"id": "others", "dataset_type": "eval", "instance_data_dir": "others"},
        {"id": "plain", "dataset_type": "image", "instance_data_dir": "plain"},
    ]
    known = {"without_caption": 0, "distinct_captions": 1}
    counts = {"photos": (8, 2), "others": (3, 3), "plain": (4, 0)}
    datasets = [
        {"id": name, "images": images, "held_out": held_out, **known}
        for name, (images, held_out) in counts.items()
    ]
    run = SimpleNamespace(manifest={"datasets": datasets}, config={"data_backend_config": entries})
    page = render_datasets(cast(Any, run))
    parts = [dict(re.findall(r"<dt>([\w ]+)</dt>\s*<dd>(.*?)</dd>", part)) for part in page.split("<h3>")[1:]]
    assert [part.get("held out") for part in parts] == ["2", "3", None]
    draws = [part["draws per epoch"] for part in parts]
    assert draws == ["1 x each image", "none, they are held out", "1 x each image"]
