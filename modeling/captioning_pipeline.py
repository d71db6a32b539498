"""The pipeline from images to captions, removed in transformers 5, for both captioners and for old ViT-GPT2 checkpoints.

    pipeline("image-to-text", model="OWNER/NAME", trust_remote_code=True)("image.jpg")

This file travels with every saved model, whose config.json names it, so that the line above runs where `modeling` is not. A
checkpoint without it goes by a name of ours, registered once `modeling` is imported, since transformers takes "image-to-text" of
such for "image-text-to-text":

    import modeling
    pipeline("image-captioning", model="nlpconnect/vit-gpt2-image-captioning")("image.jpg")
"""

import base64
import os
import shutil
from io import BytesIO
from typing import Any

import numpy as np
import transformers
from PIL import Image, ImageOps
from transformers import Pipeline

# What config.json says of this file; transformers then runs it for `pipeline("image-to-text")`.
CUSTOM_PIPELINES = {
    "image-to-text": {"impl": "captioning_pipeline.ImageToTextPipeline", "pt": ["AutoModelForImageTextToText"]}
}


class ImageToTextPipeline(Pipeline):
    """Images (PIL, file names, URLs, base64; one or a list) to [{"generated_text": caption}] each.

    Options of `generate()` are given with the call or once for all: `captioner("a.jpg", num_beams=4)`, or as a dict,
    `generate_kwargs={"num_beams": 4}`; `batch_size` is every pipeline's.
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = True

    def _sanitize_parameters(
        self, timeout: float | None = None, generate_kwargs: dict[str, Any] | None = None, **generation: Any
    ) -> tuple[dict, dict, dict]:
        generate_kwargs = generate_kwargs or {}
        if twice := sorted(generate_kwargs.keys() & generation.keys()):
            raise ValueError(f"{', '.join(twice)}: give it in generate_kwargs or by itself, not both")
        return {"timeout": timeout}, {**generate_kwargs, **generation}, {}

    def preprocess(self, image: Any, timeout: float | None = None) -> dict:
        loaded = to_rgb(open_image(image, timeout))
        pixels = self.image_processor(images=loaded, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels.to(self.dtype)}  # (1, 3, height, width)

    def _forward(self, inputs: dict, **generation: Any) -> dict:
        config = self.model.generation_config
        start = config.bos_token_id if config.decoder_start_token_id is None else config.decoder_start_token_id
        num_start = len(start[0]) if isinstance(start, list) else 1  # a prompt stands behind the start token
        sequences = self.model.generate(**inputs, **generation)  # (batch x returned, start and caption)
        num_images = len(inputs["pixel_values"])
        # (batch, returned, caption): one row an image, as the pipeline takes batches apart
        return {"token_ids": sequences[:, num_start:].reshape(num_images, -1, sequences.shape[1] - num_start)}

    def postprocess(self, outputs: dict) -> list[dict[str, str]]:
        texts = self.tokenizer.batch_decode(outputs["token_ids"].flatten(0, -2), skip_special_tokens=True)
        return [{"generated_text": text.strip()} for text in texts]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save model, tokenizer, image processor and this file, under the name of the line above."""
        super().save_pretrained(save_directory, **kwargs)
        self.model.config.custom_pipelines = CUSTOM_PIPELINES
        self.model.config.save_pretrained(save_directory)
        shutil.copy(__file__, save_directory)


class VisionTextDualEncoderProcessor(transformers.VisionTextDualEncoderProcessor):
    """transformers' own processor, which saves this file beside itself.

    transformers copies the code of a config, a model or a processor that is not its own, and of no pipeline. ViT-GPT2 is a model of its
    own, so that the file goes with the processor. By its name, the processor loads as transformers' own without remote code.
    """


VisionTextDualEncoderProcessor.register_for_auto_class("AutoProcessor")


def open_image(image: Any, timeout: float | None = None) -> Image.Image:
    """An image as it is stored, where transformers' `load_image` converts it to RGB; its sources are the same.

    Raises:
        ValueError: It is neither a URL, nor a file, nor base64.
    """
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, os.PathLike) or os.path.isfile(image):
        return Image.open(image)
    if image.startswith(("http://", "https://")):
        from huggingface_hub.utils import httpx  # its own: httpx2 since 2.0, which does not install httpx

        return Image.open(BytesIO(httpx.get(image, timeout=timeout, follow_redirects=True).content))
    try:
        return Image.open(BytesIO(base64.decodebytes(image.split(",")[-1].encode())))
    except Exception as error:
        raise ValueError(f"{image[:200]} is no image: it is neither a URL, nor a file, nor base64") from error


def to_rgb(image: Image.Image, window: tuple[float, float] | None = None) -> Image.Image:
    """An image as 8-bit RGB, with its EXIF orientation applied.

    Gray values of more than 8 bits (integers of 16 or 32 bits, floats), which Pillow clips to white, are scaled: the image's minimum
    becomes black and its maximum white, as ImageJ and matplotlib show it; or those of `window`, beyond which it is black or white.
    """
    tags = getattr(image, "tag_v2", {})  # of a TIFF; the upright copy has none
    if image.getexif().get(0x0112, 1) != 1:  # else the same is a copy
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
