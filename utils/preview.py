"""One picture of images side by side, for a first look."""

import math
from pathlib import Path

import numpy as np

from utils.files import atomic


def write_preview(path: Path, images: dict[str, tuple[np.ndarray, tuple[int, int]]], title: str) -> None:
    """A PNG of HU images {label: (image (H, H), its window (width, centre))}, labelled, at least 320 pixels each."""
    from PIL import Image, ImageDraw

    grey = [np.uint8((np.clip((hu - centre) / width + 0.5, 0, 1) * 255).round())
            for hu, (width, centre) in images.values()]
    scale = math.ceil(320 / len(grey[0]))
    side = scale * len(grey[0])
    picture = Image.new("L", (side * len(grey), side + 40))
    draw = ImageDraw.Draw(picture)
    for i, (label, (_, (width, centre))) in enumerate(images.items()):
        picture.paste(Image.fromarray(grey[i].repeat(scale, 0).repeat(scale, 1)), (i * side, 20))
        draw.text((i * side + 6, 4), label, fill=255)
        text = f"{centre - width // 2} to {centre + width // 2} HU" + ("" if i else f"; {title}")
        draw.text((i * side + 6, side + 24), text, fill=255)
    with atomic(path) as partial:
        picture.save(partial, format="png")
