"""B13: decode photographs, against Pillow without the checks for damage.

python tests/benchmarks/bench_images.py [--quick]
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))
from measure import arguments, report, side_by_side

from simpletuner.helpers.data.images import decode_image, inspect_image
from tests.unit.data.image_samples import encoded, photograph

WAYS: dict[str, tuple[str, dict[str, object]]] = {
    "JPEG": ("JPEG", {"quality": 90}),
    "JPEG, progressive": ("JPEG", {"quality": 90, "progressive": True}),
    "JPEG of a camera": ("JPEG", {"quality": 97, "subsampling": 0}),
    "PNG": ("PNG", {"compress_level": 1}),
    "WebP": ("WEBP", {"quality": 85, "method": 1}),
    "WebP, lossless": ("WEBP", {"lossless": True, "method": 0}),
    "AVIF": ("AVIF", {"quality": 70, "speed": 10}),
}


def main() -> None:
    """Make one photograph in each format, then decode it each way."""
    options = arguments(__doc__)
    width, height = (120, 80) if options.quick else (4000, 3000)
    results = []
    for name, (file_format, settings) in WAYS.items():
        data = encoded(photograph(width, height), file_format, **settings)

        def pillow(data: bytes = data) -> None:
            Image.open(io.BytesIO(data)).convert("RGB")

        contenders = {
            "Pillow": pillow,
            "decode_image": lambda data=data: decode_image(data),
            "inspect_image (the scan)": lambda data=data: inspect_image(data),
        }
        case = f"{name}, {width}x{height}, {len(data) / 1e6:.1f} MB"
        results += side_by_side("B13", case, contenders, turns=options.turns, device=torch.device("cpu"))
    report(results, options)


if __name__ == "__main__":
    main()
