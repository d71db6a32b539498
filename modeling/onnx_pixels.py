"""A captioner's image processor as an ONNX graph: resizing, center crop, rescaling and normalization, at any image size."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers.image_utils import PILImageResampling

from .onnx_files import export_module

MAX_SIDE = 65_536  # pixels


def triangle(distance: torch.Tensor) -> torch.Tensor:
    return (1 - distance.abs()).clamp(min=0)


def cubic(distance: torch.Tensor, a: float = -0.5) -> torch.Tensor:
    """The cubic convolution kernel with Pillow's coefficient."""
    x = distance.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def lanczos(distance: torch.Tensor, lobes: float = 3.0) -> torch.Tensor:
    x = torch.where(distance == 0, 1.0, distance) * math.pi
    kernel = lobes * torch.sin(x) * torch.sin(x / lobes) / (x * x)
    return torch.where(distance == 0, 1.0, torch.where(distance.abs() < lobes, kernel, 0.0))


KERNELS: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {
    PILImageResampling.BILINEAR: triangle,
    PILImageResampling.BICUBIC: cubic,
    PILImageResampling.LANCZOS: lanczos,
}


class PixelProcessor(nn.Module):
    """What an image processor does with RGB pixels, called with float32 (batch, 3, height, width) from 0 to 255.

    It resizes as Pillow does: one pass along the rows and one along the columns, each a matrix of kernel weights, widened where it
    shrinks an image and normalized, with gray levels rounded after each pass. ONNX's own `Resize` rounds once, and in noise
    differs from it by 10 levels and more.

    Args:
        image_processor: Of the captioner, such as `ViTImageProcessor`, `CLIPImageProcessor` or `TimmImageProcessor`.

    Raises:
        ValueError: The image processor does something else.
    """

    def __init__(self, image_processor):
        super().__init__()
        check_image_processor(image_processor)
        self.kernel = KERNELS[int(image_processor.resample)]
        self.size = {side: pixels for side, pixels in dict(image_processor.size).items() if pixels}
        self.is_timm = hasattr(image_processor, "crop_mode")
        self.squashes = not getattr(image_processor, "do_center_crop", False) or (
            getattr(image_processor, "crop_mode", None) == "squash"
        )
        crop = image_processor.crop_size if getattr(image_processor, "do_center_crop", False) else self.size
        self.output_size = (crop["height"], crop["width"])
        mean, std = (
            (image_processor.image_mean, image_processor.image_std)
            if image_processor.do_normalize
            else ([0.0] * 3, [1.0] * 3)
        )
        factor = image_processor.rescale_factor if image_processor.do_rescale else 1.0
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1) / factor)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1) / factor)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        rows, columns = (torch.arange(pixels.shape[axis], dtype=torch.float64) + 0.5 for axis in (2, 3))
        height, width = rows[-1:] + 0.5, columns[-1:] + 0.5  # (1,) each: an image's own size, unknown to the graph
        new_height, new_width = self.resized(height, width)
        across = self.weights(columns, width, new_width, self.output_size[1])  # (new width, width)
        down = self.weights(rows, height, new_height, self.output_size[0])  # (new height, height)
        pixels = gray_levels(pixels @ across.T)  # (batch, 3, height, new width)
        pixels = gray_levels(down @ pixels)  # (batch, 3, new height, new width)
        return (pixels - self.mean) / self.std

    def resized(self, height: torch.Tensor, width: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Height and width before the crop, float64 (1,) each, as transformers and timm compute them."""
        short = self.size.get("shortest_edge")
        if short:
            shorter = torch.minimum(height, width)
            return (short * height / shorter).floor(), (short * width / shorter).floor()
        if self.squashes:
            return torch.full_like(height, self.size["height"]), torch.full_like(width, self.size["width"])
        ratio = torch.minimum(height / self.size["height"], width / self.size["width"])
        return (height / ratio).round(), (width / ratio).round()

    def weights(self, centers: torch.Tensor, length: torch.Tensor, resized: torch.Tensor, kept: int) -> torch.Tensor:
        """What each pixel of an axis adds to each pixel of the result, float32 (kept, length).

        Args:
            centers: float64 (length,), of the image's pixels.
            length, resized: float64 (1,), pixels along the axis.
            kept: Pixels of the crop.
        """
        scale = length / resized
        margin = (resized - kept) / 2
        first = margin.round() if self.is_timm else margin.floor()
        positions = (first + torch.arange(kept, dtype=torch.float64) + 0.5) * scale  # (kept,)
        weights = self.kernel((centers - positions[:, None]) / scale.clamp(min=1.0))  # (kept, length)
        return (weights / weights.sum(dim=1, keepdim=True)).float()


def gray_levels(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels + 0.5).floor().clamp(0, 255)


def check_image_processor(image_processor) -> None:
    """Raise ValueError for an image processor that does what `PixelProcessor` does not."""
    size = {side for side, pixels in dict(image_processor.size).items() if pixels}
    crops, mode = getattr(image_processor, "do_center_crop", False), getattr(image_processor, "crop_mode", None)
    if not image_processor.do_resize or int(image_processor.resample) not in KERNELS:
        raise ValueError("its image processor does not resize by bilinear, bicubic or lanczos interpolation")
    if getattr(image_processor, "do_pad", False) or mode not in (None, "center", "squash"):
        raise ValueError("its image processor pads images")
    if size != {"height", "width"} and not (crops and size == {"shortest_edge"}):
        raise ValueError("its image processor gives images of different sizes")
    if crops:
        crop = image_processor.crop_size
        fits = dict(image_processor.size)
        least = {side: fits.get("shortest_edge") or fits[side] for side in ("height", "width")}
        if any(crop[side] > least[side] for side in least):
            raise ValueError("its image processor crops more than it resizes to")


def export_pixel_processor(image_processor, path: Path) -> tuple[int, int]:
    """Write an ONNX model: pixels, float32 (batch, 3, height, width) from 0 to 255, to the model's pixel_values.

    Returns:
        Height and width of the pixel_values.

    Raises:
        ValueError: See `PixelProcessor`.
    """
    processor = PixelProcessor(image_processor)
    sizes = {0: ("batch_size", 4096), 2: ("height", MAX_SIDE), 3: ("width", MAX_SIDE)}
    dims = {axis: torch.export.Dim(name, min=1, max=largest) for axis, (name, largest) in sizes.items()}
    export_module(processor, (torch.rand(2, 3, 40, 48),), path, ["pixels"], ["pixel_values"], (dims,))
    return processor.output_size
