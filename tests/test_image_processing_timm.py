"""Images reach a timm encoder as they do in timm."""

from types import SimpleNamespace

import PIL
import pytest
import timm
import torch
import torchvision
from PIL import Image
from timm.data import create_transform, resolve_data_config

from modeling import TimmImageProcessor
from modeling.processing import timm_image_processor


def gray_levels_apart(pretrained_cfg: dict, size: tuple[int, int], use_test_size: bool = False) -> float:
    """Largest difference between our pixels and timm's, in gray levels of 255."""
    data = resolve_data_config(pretrained_cfg=pretrained_cfg, use_test_size=use_test_size)
    image = Image.effect_mandelbrot(size, (-2, -1, 1, 1), 60).convert("RGB")
    theirs = create_transform(**data, is_training=False)(image)
    processor = timm_image_processor(SimpleNamespace(pretrained_cfg=pretrained_cfg), use_test_size=use_test_size)
    ours = processor(images=image, return_tensors="pt").pixel_values[0]
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs() * torch.tensor(data["std"])[:, None, None] * 255).max().item()


@pytest.mark.slow
def test_pixels_are_timms_for_all_its_pretrained_configurations():
    """Up to what Pillow and torchvision round otherwise; an image one pixel aside is some 100 levels apart."""
    different = {}
    for name in timm.list_pretrained():
        pretrained_cfg = timm.get_pretrained_cfg(name).to_dict()
        for use_test_size in (False, True):
            data = resolve_data_config(pretrained_cfg=pretrained_cfg, use_test_size=use_test_size)
            different[repr(data)] = (pretrained_cfg, use_test_size, data["crop_mode"])
    assert len(different) > 190 and {mode for *_, mode in different.values()} == {"center", "squash", "border"}
    for pretrained_cfg, use_test_size, _ in different.values():
        assert gray_levels_apart(pretrained_cfg, (320, 200), use_test_size) <= 2.01, (pretrained_cfg, use_test_size)


@pytest.mark.parametrize(
    "changes",
    [
        {"input_size": (3, 299, 299), "crop_pct": 0.8975},
        {"input_size": (3, 64, 64), "crop_pct": 0.95},
        {"input_size": (3, 40, 64), "crop_pct": 0.9},
        {"input_size": (3, 64, 40), "crop_pct": 1.15, "crop_mode": "border"},
        {"input_size": (3, 65, 64), "crop_pct": 0.91, "crop_mode": "border"},
        {"input_size": (3, 64, 40), "crop_pct": 0.91, "crop_mode": "squash"},
    ],
    ids=str,
)
def test_pixels_are_timms_for_images_of_any_size(changes):
    pretrained_cfg = timm.get_pretrained_cfg("inception_resnet_v2.tf_in1k").to_dict() | changes
    sizes = [(500, 334), (334, 500), (640, 480), (50, 40), (7, 300), *((320 + step, 200) for step in range(9))]
    for size in sizes:
        # torchvision 0.21, and Pillow 13, resize an image 7 pixels wide by up to four gray levels otherwise than the other does.
        others = torchvision.__version__.startswith("0.21.") or int(PIL.__version__.split(".")[0]) >= 13
        loose = others and min(size) < 8
        assert gray_levels_apart(pretrained_cfg, size) <= (4.01 if loose else 2.01), size


def test_a_saved_image_processor_comes_back(tmp_path):
    changes = {"input_size": (3, 1024, 768), "crop_pct": 1.0, "crop_mode": "squash"}
    pretrained_cfg = timm.get_pretrained_cfg("inception_resnet_v2.tf_in1k").to_dict() | changes
    processor = timm_image_processor(SimpleNamespace(pretrained_cfg=pretrained_cfg))
    processor.save_pretrained(tmp_path)
    loaded = TimmImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.crop_mode == "squash" and loaded.crop_size == {"height": 1024, "width": 768}


def test_without_center_crop_the_whole_image_is_resized():
    backbone = SimpleNamespace(pretrained_cfg=timm.get_pretrained_cfg("test_resnet.r160_in1k").to_dict())
    processor = timm_image_processor(backbone, image_size=64, center_crop=False)
    image = Image.new("RGB", (300, 100), "white")
    image.paste("black", (0, 0, 50, 100))
    pixels = processor(images=image, return_tensors="pt").pixel_values[0]
    assert pixels.shape == (3, 64, 64) and (pixels[0, :, :10] < 0).all() and (pixels[0, :, 12:] > 0).all()
