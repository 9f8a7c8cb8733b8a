"""One picture of images side by side, for a first look."""

import math
from pathlib import Path

import numpy as np

from utils.files import atomic
from utils.units import WINDOWS


def write_preview(path: Path, images: dict[str, np.ndarray], title: str) -> None:
    """A PNG of HU images (H, H) {label: image} in the headline window, labelled, at least 320 pixels each."""
    from PIL import Image, ImageDraw

    width, centre = WINDOWS[0]
    grey = [np.uint8((np.clip((hu - centre) / width + 0.5, 0, 1) * 255).round()) for hu in images.values()]
    scale = math.ceil(320 / len(grey[0]))
    side = scale * len(grey[0])
    picture = Image.new("L", (side * len(grey), side + 40))
    draw = ImageDraw.Draw(picture)
    for i, (label, image) in enumerate(zip(images, grey, strict=True)):
        picture.paste(Image.fromarray(image.repeat(scale, 0).repeat(scale, 1)), (i * side, 20))
        draw.text((i * side + 6, 4), label, fill=255)
    draw.text((6, side + 24), f"{title}; window {centre - width // 2} to {centre + width // 2} HU", fill=255)
    with atomic(path) as partial:
        picture.save(partial, format="png")
