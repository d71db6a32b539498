"""One processor a model: an image processor and a tokenizer, saved beside the weights, back through `AutoProcessor`."""

import math

import timm
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    VisionTextDualEncoderProcessor,
)
from transformers.image_utils import PILImageResampling


def timm_image_processor(backbone, image_size: int | None = None, center_crop: bool = True) -> CLIPImageProcessor:
    """The images a timm model was trained on, as an image processor that saves: resize, center crop, normalize.

    Args:
        backbone: A timm model; its own data configuration is read.
        image_size: Side of the square given to the model, in pixels; the model's own where None.
        center_crop: Whether the model sees an image's middle, as it was trained to; else all of it, squeezed into the square.
    """
    data = timm.data.resolve_model_data_config(backbone)
    crop_size = image_size or data["input_size"][-1]
    square = {"height": crop_size, "width": crop_size}
    return CLIPImageProcessor(
        size={"shortest_edge": math.floor(crop_size / data["crop_pct"])} if center_crop else square,
        do_center_crop=center_crop,
        crop_size=square,
        resample=PILImageResampling[data["interpolation"].upper()],
        image_mean=list(data["mean"]),
        image_std=list(data["std"]),
    )


def center_crop(image_processor) -> float | None:
    """Side of the square in an image's middle that a model sees, in shares of its short side; None where it sees all of it."""
    short_side = (image_processor.size or {}).get("shortest_edge")
    if not getattr(image_processor, "do_center_crop", False) or not short_side:
        return None
    return min(image_processor.crop_size["height"] / short_side, 1.0)


def resized_side(image_processor) -> int:
    """To how many pixels images are resized: their short side, or the longer of two that are given."""
    return max(dict(image_processor.size).values())


def build_processor(image_processor, tokenizer) -> VisionTextDualEncoderProcessor:
    """Both in one; called with `images=` it gives pixels, with `text=` token ids, and it decodes."""
    return VisionTextDualEncoderProcessor(image_processor=image_processor, tokenizer=tokenizer)


def load_processor(name_or_path: str):
    """The processor saved with a captioner.

    Checkpoints of the time before processors (ViT-GPT2) have a preprocessor and a tokenizer only: those are put together.
    """
    processor = AutoProcessor.from_pretrained(name_or_path)
    if hasattr(processor, "tokenizer") and hasattr(processor, "image_processor"):
        return processor
    return build_processor(
        AutoImageProcessor.from_pretrained(name_or_path), AutoTokenizer.from_pretrained(name_or_path)
    )
