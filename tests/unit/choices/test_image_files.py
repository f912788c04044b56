"""Names of image files, and of the masks beside them."""

from __future__ import annotations

import pytest

from simpletuner.helpers.choices.image_files import conditioned_stem, image_suffixes, unread_suffixes


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("a-masklabel.png", "a"),
        ("sub/a.b-condlabel.PNG", "sub/a.b"),
        ("a-MaskLabel.png", "a"),
        ("-masklabel.png", ""),
        ("a\nb-masklabel.png", "a\nb"),
        ("_controls/a.depth.jpg", "a"),
        ("sub/_controls/a.b.mask.webp", "sub/a.b"),
        ("_controls/a.png", "a"),
    ],
)
def test_a_mask_or_source_image_belongs_to_the_image_of_its_name(name: str, stem: str) -> None:
    assert conditioned_stem(name) == stem


@pytest.mark.parametrize(
    "name",
    ["a.png", "masklabel.png", "a_mask.png", "a-masklabel-1.png", "my_controls/a.png", "_controls.png"],
)
def test_another_image_belongs_to_itself(name: str) -> None:
    assert conditioned_stem(name) is None


def test_no_suffix_is_both_read_and_unread() -> None:
    assert not image_suffixes() & unread_suffixes().keys()
    assert image_suffixes() >= {".jpg", ".jfif", ".jpe", ".pjpeg", ".avif"}
    assert all(suffix == suffix.lower() for suffix in (*image_suffixes(), *unread_suffixes()))
