"""ai-toolkit's folders of control images, as entries of references."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import JsonValue

from simpletuner.helpers.configuration.migration.draft import Settings
from simpletuner.helpers.configuration.migration.paths import Place, unique_id

_NUMBERED = ("control_path_1", "control_path_2", "control_path_3")
_ONE = "control_path"


def put_control_images(
    own: Settings, datasets: Sequence[dict[str, JsonValue]], *, place: Place, kind: str | None
) -> list[dict[str, JsonValue]]:
    """Name the entries of an entry's control images in its datasets; returns these entries.

    Args:
        own: Keys of the entry.
        datasets: Those made of it.
        place: Of the file.
        kind: conditioning_type of the entries; None if the model sees no references.
    """
    numbered = [key for key in _NUMBERED if own.text(key)]
    paths = [own.text(key) for key in numbered] or [str(each) for each in own.items(_ONE)]
    keys = numbered or [_ONE]
    if not paths or kind is None:
        for key in keys:
            own.skip(key, "This model sees no reference images; the run trains the images alone.")
        return []
    folders = [place.path(path) for path in paths]
    entries: list[dict[str, JsonValue]] = []
    for folder in folders:
        taken = [str(each["id"]) for each in (*own.draft.datasets, *entries)]
        identity = unique_id(f"{datasets[0]['id']} {Path(folder).name}", taken)
        entries.append({"id": identity, "instance_data_dir": folder, "conditioning_type": kind})
    for dataset in datasets:
        dataset["conditioning_data"] = [each["id"] for each in entries]
    if len(entries) > 1:
        own.draft.config["conditioning_multidataset_sampling"] = "combined"
    for key in keys:
        own.decide(key, "translated", ours=f"conditioning_type: {kind}", text=own.rows[key].text)
    return entries
