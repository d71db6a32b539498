"""The evaluation transform of timm models as an image processor of transformers.

This file travels to the Hub with every captioner that has such an encoder.
"""

import torch
from torchvision.transforms.v2 import functional
from transformers import CLIPImageProcessor
from transformers.image_utils import SizeDict


class TimmImageProcessor(CLIPImageProcessor):
    """Resize, crop, rescale and normalize images as `timm.data.create_transform` does.

    transformers' own processors know none of the crop modes but "center", and their center crop may lie one pixel to the left
    of timm's or above it.

    Args:
        crop_mode: How an image becomes `size`, before its center is cropped to `crop_size`. "center": it is resized until it
            covers `size`, whose shortest edge alone may be given. "border": it is resized until it fits into `size`, with a
            border of the mean color around it. "squash": it is resized to `size`, whatever its aspect ratio.
        kwargs: Of `CLIPImageProcessor`.
    """

    def __init__(self, crop_mode: str = "center", **kwargs):
        super().__init__(**kwargs)
        self.crop_mode = crop_mode

    def resize(self, image: torch.Tensor, size: SizeDict, **kwargs) -> torch.Tensor:
        """Resize images (batch, 3, height, width)."""
        if self.crop_mode != "squash" and not size.shortest_edge:
            ratios = image.shape[-2] / size.height, image.shape[-1] / size.width
            ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
            size = SizeDict(height=round(image.shape[-2] / ratio), width=round(image.shape[-1] / ratio))
        return super().resize(image, size, **kwargs)

    def center_crop(self, image: torch.Tensor, size: SizeDict, **kwargs) -> torch.Tensor:
        """Crop images (batch, 3, height, width) to `size`; what is smaller gets a border, black but in the mode "border"."""
        if self.crop_mode == "border":
            missing = [max(size.width - image.shape[-1], 0), max(size.height - image.shape[-2], 0)]
            padding = [pixels // 2 for pixels in missing] + [(pixels + 1) // 2 for pixels in missing]
            image = functional.pad(image, padding, fill=[round(255 * mean) for mean in self.image_mean])
        return functional.center_crop(image, [size.height, size.width])


TimmImageProcessor.register_for_auto_class("AutoImageProcessor")
