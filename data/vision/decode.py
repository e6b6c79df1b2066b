"""A picture file as RGB, the way a page would show it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Of picture files, upper case too; those of torchvision's ImageFolder."""

# what may lie behind those names. Pillow knows more formats, one of which starts another program (EPS)
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")


def decode(path: Path, least: int | None = None) -> Image.Image:
    """The picture, RGB, turned as its EXIF orientation says.

    least: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, but no smaller than this many pixels on its shorter
    side; that is several times faster, and still reads the whole file. None: at full size.

    What is transparent is laid on white. 16-bit gray keeps its high byte, as Pillow does for 16-bit RGB. Of several
    frames the first counts. Raises whatever Pillow does where the file is damaged or no picture; OSError with an errno
    where the file can't be read at all.
    """
    with Image.open(path, formats=_FORMATS) as image:
        if least is not None:
            image.draft(None, (least, least))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("32-bit float pixels, whose black and white are anyone's guess")
    if image.mode.startswith("I"):  # convert() would clip at 255 instead
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
