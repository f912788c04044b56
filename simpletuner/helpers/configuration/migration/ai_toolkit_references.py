"""Control images of an ai-toolkit job, as the reference images of an editing model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import JsonValue

from simpletuner.helpers.configuration.migration.draft import Settings
from simpletuner.helpers.configuration.migration.paths import Place, unique_id
from simpletuner.helpers.configuration.migration.table import load_table

FOLDERS = ("control_path", "control_path_1", "control_path_2", "control_path_3")
IMAGES = ("ctrl_img", "ctrl_img_1", "ctrl_img_2", "ctrl_img_3")
_TEXTS = {
    "reference_strict": "One of another aspect ratio than its image ends the run; reference_loose takes it.",
    "reference_loose": "Each reference keeps its own aspect ratio, as there.",
}


def reference_entries(
    own: Settings, entries: Sequence[dict[str, JsonValue]], place: Place, *, taken: Sequence[str]
) -> list[dict[str, JsonValue]]:
    """The entries of references for a dataset's control images; names them in the dataset's entries.

    Args:
        own: The dataset.
        entries: Our entries of its images.
        place: Where its paths begin.
        taken: Ids that other entries have.
    """
    found: list[dict[str, JsonValue]] = []
    ids = list(taken)
    keep_aspect = load_table("ai-toolkit").facts["families_of_raw_references"]
    kind = "reference_loose" if own.draft.config["model_family"] in keep_aspect else "reference_strict"
    for key in FOLDERS:
        for folder in own.items(key):
            path = place.path(str(folder))
            ids.append(unique_id(f"{Path(path).name or 'images'}-references", ids))
            kinds = {"dataset_type": "conditioning", "conditioning_type": kind}
            found.append({"id": ids[-1], "type": "local", **kinds, "instance_data_dir": path})
        if own.items(key):
            own.decide(key, "approximate", ours="conditioning_data", text=_TEXTS[kind])
    names: list[JsonValue] = [str(each["id"]) for each in found]
    for entry in entries if names else ():
        entry["conditioning_data"] = names[0] if len(names) == 1 else names
    if len(names) > 1:
        own.draft.config["conditioning_multidataset_sampling"] = "combined"
    return found


def prompt_images(options: Mapping[str, JsonValue], place: Place) -> tuple[str, ...]:
    """The control images of a prompt; ctrl_img and ctrl_img_1 are the first one."""
    first = options.get("ctrl_img") or options.get("ctrl_img_1")
    given = [first, *(options.get(name) for name in IMAGES[2:])]
    return tuple(place.path(str(each)) for each in given if each)
