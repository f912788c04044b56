"""Rules between sections, and between them and the model family."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Workspace


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"prediction_type": "flow_matching"}, "toy predicts v_prediction, epsilon."),
        ({"prediction_type": "epsilonn"}, "Did you mean epsilon?"),
        ({"model_flavour": "lrge"}, '"lrge": must be one of small, large. Did you mean large?'),
        (
            {"model_flavour": "lrge", "pretrained_model_name_or_path": "a/b"},
            '"lrge": must be one of small, large.',
        ),
        ({"aspect_bucket_alignment": 12}, "12: must be a multiple of 8. Use 32."),
        ({"resolution": 24}, "24 is 24 px, below aspect_bucket_alignment 32. Raise it."),
        ({"validation_resolution": "100x64"}, "100x64: width and height must be multiples of 8. Use 96x64."),
        ({"validation_resolution": "64x100"}, "64x100: width and height must be multiples of 8. Use 64x96."),
    ],
)
def test_what_the_family_does_not_have_is_refused(
    workspace: Workspace, changes: dict[str, object], text: str
) -> None:
    message = workspace.problems(**changes)
    assert message.startswith("config.json: 1 problem\n")
    assert text in message


def test_what_the_family_has_is_accepted(workspace: Workspace) -> None:
    config = workspace.load(
        prediction_type="epsilon", aspect_bucket_alignment=8, validation_resolution="104x64"
    )
    assert config.model.prediction_type == "epsilon"
    assert config.data.aspect_bucket_alignment == 8


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({"resolution": 512}, "512x512"),
        ({"resolution": 520}, "512x512"),
        ({"resolution": 530}, "544x544"),
        ({"resolution": 530, "aspect_bucket_alignment": 8}, "528x528"),
        ({"resolution": 1.0, "resolution_type": "area"}, "992x992"),
        ({"resolution_type": "area"}, "512x512"),
    ],
)
def test_validation_pictures_have_the_training_resolution(
    workspace: Workspace, changes: dict[str, object], size: str
) -> None:
    assert [str(each) for each in workspace.load(**changes).validation.validation_resolution] == [size]


def test_a_flavour_goes_unnamed_with_a_model_of_the_users_own(workspace: Workspace) -> None:
    assert workspace.load(pretrained_model_name_or_path="me/mine").model.model_flavour is None
