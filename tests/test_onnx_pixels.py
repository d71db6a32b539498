"""An image processor as a graph gives the pixels of the image processor itself, and of Pillow, to a gray level at any size."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, ViTImageProcessor

from modeling.image_processing_timm import TimmImageProcessor
from modeling.onnx_pixels import PixelProcessor

SQUARE = {"height": 64, "width": 64}
BILINEAR, BICUBIC, LANCZOS, NEAREST = (
    getattr(Image.Resampling, name) for name in ("BILINEAR", "BICUBIC", "LANCZOS", "NEAREST")
)
SIZES = [(64, 64), (200, 170), (31, 50), (320, 900), (75, 300)]


def repr_of(image_processor) -> str:
    mode = getattr(image_processor, "crop_mode", "")
    return f"{type(image_processor).__name__}-{int(image_processor.resample)}-{mode}-{dict(image_processor.size)}"


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def processed(image_processor, image: np.ndarray) -> np.ndarray:
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    return PixelProcessor(image_processor)(pixels)[0].numpy()


def resizes_by_another_kernel() -> bool:
    """Whether transformers' image processors take the bicubic kernel for lanczos, with a warning."""
    lanczos, bicubic = (
        ViTImageProcessor(size=SQUARE, resample=resample)(images=[noise(75, 300)], return_tensors="np")["pixel_values"]
        for resample in (LANCZOS, BICUBIC)
    )
    return np.array_equal(lanczos, bicubic)


@pytest.mark.parametrize(
    "image_processor",
    [
        ViTImageProcessor(size=SQUARE, resample=BILINEAR),
        ViTImageProcessor(size={"height": 48, "width": 80}, resample=BICUBIC, do_normalize=False),
        ViTImageProcessor(size=SQUARE, resample=LANCZOS),
        CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 47, "width": 56}),
        TimmImageProcessor(size={"shortest_edge": 73}, crop_size=SQUARE, resample=BICUBIC),
        TimmImageProcessor(size={"height": 73, "width": 80}, crop_size=SQUARE, resample=BICUBIC),
        TimmImageProcessor(crop_mode="squash", size={"height": 73, "width": 80}, crop_size=SQUARE, resample=BILINEAR),
        TimmImageProcessor(crop_mode="squash", size=SQUARE, do_center_crop=False, resample=BILINEAR),
    ],
    ids=repr_of,
)
def test_pixels_are_those_of_the_image_processor(image_processor):
    std = image_processor.image_std if image_processor.do_normalize else [1.0] * 3
    gray_level = 1 / 255 / np.array(std).reshape(3, 1, 1)
    if int(image_processor.resample) == LANCZOS and resizes_by_another_kernel():
        pytest.skip("transformers 5.5, or torchvision before 0.27, resizes bicubically where lanczos is asked for")
    for size in SIZES:
        (expected,) = image_processor(images=[noise(*size)], return_tensors="np")["pixel_values"]
        differences = np.abs(processed(image_processor, noise(*size)) - expected) / gray_level
        assert differences.max() < 2.01  # torchvision's weights are integers of 16 bits
        assert (differences > 0.01).mean() < 0.05 and (differences > 1.01).mean() < 0.001


@pytest.mark.parametrize("resample", [BILINEAR, BICUBIC, LANCZOS])
def test_gray_levels_are_pillows(resample):
    image_processor = ViTImageProcessor(size=SQUARE, resample=resample, image_mean=[0] * 3, image_std=[1 / 255] * 3)
    for size in SIZES:
        expected = Image.fromarray(noise(*size)).resize((64, 64), resample)
        differences = np.abs(processed(image_processor, noise(*size)) - np.asarray(expected).transpose(2, 0, 1))
        assert differences.max() < 1.01
        assert (differences > 0.01).mean() < 0.01


@pytest.mark.parametrize(
    "image_processor",
    [
        ViTImageProcessor(size=SQUARE, resample=NEAREST),
        ViTImageProcessor(size=SQUARE, do_resize=False),
        CLIPImageProcessor(size={"shortest_edge": 64}, do_center_crop=False),
        CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 96, "width": 64}),
        TimmImageProcessor(crop_mode="border", size=SQUARE, crop_size=SQUARE),
    ],
    ids=repr_of,
)
def test_what_it_does_not_do_is_refused(image_processor):
    with pytest.raises(ValueError, match="image processor"):
        PixelProcessor(image_processor)
