"""Deterministic augmentations of a training image, with captions to match: corner crops and horizontal flips.

The ten variants of Krizhevsky et al., 2012 (section 4.1), with the whole image in place of the center crop. Nothing is random, so
that a frozen encoder's features of each can be cached.
"""

import re

import numpy as np
from PIL import Image, ImageOps

MAX_AUGMENTATIONS = 10
CROP_SIZE = 7 / 8  # of width and height
CORNERS = ((0, 0), (1, 0), (0, 1), (1, 1))  # left or right, upper or lower

OTHER_SIDE = {"left": "right", "right": "left"}


def augment_image(image: Image.Image, augmentation: int) -> Image.Image:
    """Augmentation 0 is the image itself; 2, 4, 6 and 8 are its corner crops; each odd one is the one before it, flipped."""
    if augmentation >= 2:
        width, height = image.size
        crop = round(CROP_SIZE * width), round(CROP_SIZE * height)
        left, upper = (
            corner * (full - part)
            for corner, full, part in zip(CORNERS[augmentation // 2 - 1], image.size, crop, strict=True)
        )
        image = image.crop((left, upper, left + crop[0], upper + crop[1]))
    return ImageOps.mirror(image) if augmentation % 2 else image


def augmentation_in_epoch(image: int | np.ndarray, epoch: int, num_augmentations: int) -> int | np.ndarray:
    """The augmentation of a training image, given by its row number, in an epoch; an array for an array of images."""
    return (image + epoch) % num_augmentations


def augment_caption(caption: str, augmentation: int) -> str:
    """The caption; with left and right swapped, in every sense of the words, if the augmentation is a flip.

    Applied twice, it gives the caption itself.
    """
    if augmentation % 2 == 0:
        return caption

    def swap(match: re.Match) -> str:
        other = OTHER_SIDE[match[0].lower()]
        return other.capitalize() if match[0][0].isupper() else other

    return re.sub(r"\b(left|right)(?=\b|most\b)", swap, caption, flags=re.IGNORECASE)
