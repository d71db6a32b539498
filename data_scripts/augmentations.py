"""Other views of a training image: its mirror image, and large parts of either, with captions that go with them.

The ten views of Krizhevsky et al., 2012 (section 4.1), the whole image in the place of its middle: no chance is in them, so that a
frozen encoder's output of each can be kept.
"""

import re

import numpy as np
from PIL import Image, ImageOps

MAX_AUGMENTATIONS = 10
PART = 7 / 8  # of width and height
CORNERS = ((0, 0), (1, 0), (0, 1), (1, 1))  # left or right, upper or lower

OTHER_SIDE = {"left": "right", "right": "left"}


def augment_image(image: Image.Image, view: int) -> Image.Image:
    """View 0 is the image itself, 2, 4, 6 and 8 its corners; the next of each is its mirror image."""
    if view >= 2:
        width, height = image.size
        sizes = round(PART * width), round(PART * height)
        left, upper = (
            at * (whole - part) for at, whole, part in zip(CORNERS[view // 2 - 1], image.size, sizes, strict=True)
        )
        image = image.crop((left, upper, left + sizes[0], upper + sizes[1]))
    return ImageOps.mirror(image) if view % 2 else image


def augmentation_in_epoch(image: int | np.ndarray, epoch: int, num_augmentations: int) -> int | np.ndarray:
    """The view of a training image, named by its row, whose turn it is; of many where `image` is an array."""
    return (image + epoch) % num_augmentations


def augment_caption(caption: str, view: int) -> str:
    """The caption, with left and right swapped where the view is a mirror image, also where they mean something else.

    Twice, it is the caption itself.
    """
    if view % 2 == 0:
        return caption

    def swap(match: re.Match) -> str:
        other = OTHER_SIDE[match[0].lower()]
        return other.capitalize() if match[0][0].isupper() else other

    return re.sub(r"\b(left|right)(?=\b|most\b)", swap, caption, flags=re.IGNORECASE)
