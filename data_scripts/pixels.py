"""Pixels of any depth as 8-bit RGB, and what Pillow (12.3) makes of those of more than 8 bits."""

import numpy as np
from PIL import Image, ImageOps

# `to_rgb` stands in modeling/captioning_pipeline.py, too, which travels with saved models and can import nothing; a test holds them equal.


def has_deep_gray(image: Image.Image) -> bool:
    """Whether an image has gray values of more than 8 bits, which Pillow and `datasets` clip to white."""
    return image.mode.startswith(("I", "F"))


def has_deep_color(image: Image.Image) -> bool:
    """Whether an image that is open and not yet loaded has 16 bits a channel of color (or gray and alpha): Pillow drops the lower 8."""
    return not has_deep_gray(image) and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def is_misread(image: Image.Image) -> bool:
    """Whether a TIFF is of the uncompressed kinds that Pillow takes for others: 16 bits a channel in separate planes, and YCbCr."""
    tags = getattr(image, "tag_v2", {})
    is_planar_and_deep = tags.get(284) == 2 and max(tags.get(258, (8,))) > 8
    return tags.get(259) == 1 and (is_planar_and_deep or tags.get(262) == 6)


def to_rgb(image: Image.Image, window: tuple[float, float] | None = None) -> Image.Image:
    """An image as 8-bit RGB, with its EXIF orientation applied.

    Gray values of more than 8 bits (integers of 16 or 32 bits, floats), which Pillow clips to white, are scaled: the image's minimum
    becomes black and its maximum white, as ImageJ and matplotlib show it; or those of `window`, beyond which it is black or white.
    """
    tags = getattr(image, "tag_v2", {})  # of a TIFF; the upright copy has none
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        if image.mode == "I" and tags.get(258) == (32,) and tags.get(339, (1,)) == (1,):
            values = values.view(np.uint32)  # Pillow reads 32 bits without a sign as if they had one
        finite = values[np.isfinite(values)]
        low, high = window or ((float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0))
        values = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
        values = np.clip((values - low) / ((high - low) or 1.0), 0, 1)
        if tags.get(262) == 0:  # WhiteIsZero, which Pillow inverts at 8 bits only
            values = 1 - values
        image = Image.fromarray((values * 255).round().astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")
