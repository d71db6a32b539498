"""The processor of a captioner: image processor and tokenizer in one, saved beside the weights, loaded by `AutoProcessor`."""

import math

from PIL.Image import Image
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.image_utils import PILImageResampling

from .captioning_pipeline import VisionTextDualEncoderProcessor
from .image_processing_timm import TimmImageProcessor


def timm_image_processor(
    backbone, image_size: int | None = None, center_crop: bool = True, use_test_size: bool = False
) -> TimmImageProcessor:
    """The transform a timm model was evaluated with, as an image processor that saves.

    Args:
        backbone: A timm model; its own data configuration is read.
        image_size: Side of the model's square input, in pixels; its own height and width where None.
        center_crop: Whether to crop as the model was trained to; otherwise resize the whole image, ignoring its aspect ratio.
        use_test_size: Whether to take timm's input size and crop for testing, where a model has its own.
    """
    from timm.data import resolve_model_data_config  # half a second, which ViT-GPT2 need not spend

    data = resolve_model_data_config(backbone, use_test_size=use_test_size)
    height, width = (image_size, image_size) if image_size else data["input_size"][1:]
    mode = data["crop_mode"] if center_crop else "squash"
    crop_pct = data["crop_pct"] if center_crop else 1.0
    size = {"height": math.floor(height / crop_pct), "width": math.floor(width / crop_pct)}
    if mode == "center" and size["height"] == size["width"]:
        size = {"shortest_edge": size["height"]}
    return TimmImageProcessor(
        crop_mode=mode,
        size=size,
        do_center_crop=center_crop,
        crop_size={"height": height, "width": width},
        resample=PILImageResampling[data["interpolation"].upper()],
        image_mean=list(data["mean"]),
        image_std=list(data["std"]),
    )


def center_crop(image_processor) -> float | None:
    """Side of the center crop as a fraction of the image's short side; None where the whole image is resized."""
    short_side = (image_processor.size or {}).get("shortest_edge")
    if not getattr(image_processor, "do_center_crop", False) or not short_side:
        return None
    return min(image_processor.crop_size["height"] / short_side, 1.0)


def resized_side(image_processor) -> int:
    """Pixels that images are resized to: of their short side, or the longer one of two that are given."""
    return max(dict(image_processor.size).values())


def build_processor(image_processor, tokenizer) -> VisionTextDualEncoderProcessor:
    """Both in one; called with `images=` it returns pixels, with `text=` token ids, and it decodes.

    Images of any mode are converted to RGB, where ViT's image processor by itself would refuse RGBA, L, P and CMYK.
    """
    image_processor.do_convert_rgb = True
    return VisionTextDualEncoderProcessor(image_processor=image_processor, tokenizer=tokenizer)


class ImagesToPixels:
    """RGB images as inputs of a captioner, {"pixel_values": (batch, 3, height, width)}."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, images: list[Image]) -> dict:
        return {"pixel_values": self.processor(images=images, return_tensors="pt")["pixel_values"]}


def has_vocabulary(tokenizer) -> bool:
    """Whether a tokenizer has more than special tokens: of no files at all transformers 5 makes one of those alone."""
    added = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    # 5.5's is of <s>, </s>, <pad>, <unk> and [START_REF], not all of them special; T5's and mBART's have the blank besides.
    return any(
        token[0] + token[-1] not in ("<>", "[]", "▁▁")
        for token in tokenizer.get_vocab()
        if token and token not in added
    )


def load_processor(name_or_path: str):
    """The processor saved with a captioner.

    Checkpoints older than processors (ViT-GPT2) have an image processor and a tokenizer only, which are put together.

    Raises:
        ValueError: The tokenizer has no vocabulary. Other errors of transformers' own.
    """
    processor = AutoProcessor.from_pretrained(name_or_path)
    if hasattr(processor, "tokenizer") and hasattr(processor, "image_processor"):
        image_processor, tokenizer = processor.image_processor, processor.tokenizer
    else:
        image_processor = AutoImageProcessor.from_pretrained(name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    if not has_vocabulary(tokenizer):
        raise ValueError("its tokenizer has no vocabulary: the files of a tokenizer are missing")
    return build_processor(image_processor, tokenizer)
