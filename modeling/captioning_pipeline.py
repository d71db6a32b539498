"""The pipeline from images to captions, which transformers 5 has no more, for both captioners and for old ViT-GPT2 checkpoints.

    pipeline("image-to-text", model="OWNER/NAME", trust_remote_code=True)("image.jpg")

This file travels with every saved model, whose config.json names it, so that the line above runs where `modeling` is not. A
checkpoint without it goes by a name of ours, known once `modeling` is imported, since transformers takes "image-to-text" of such
for "image-text-to-text":

    import modeling
    pipeline("image-captioning", model="nlpconnect/vit-gpt2-image-captioning")("image.jpg")
"""

from typing import Any

from transformers import Pipeline
from transformers.image_utils import load_image


class ImageToTextPipeline(Pipeline):
    """Images (PIL, file names, addresses; one or a list) to [{"generated_text": caption}] each.

    Options of `generate()` are given with the call or once for all: `captioner("a.jpg", num_beams=4)`; `batch_size` is every
    pipeline's.
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = True

    def _sanitize_parameters(self, timeout: float | None = None, **generation: Any) -> tuple[dict, dict, dict]:
        return {"timeout": timeout}, generation, {}

    def preprocess(self, image: Any, timeout: float | None = None) -> dict:
        loaded = load_image(image, timeout=timeout)  # upright, RGB
        pixels = self.image_processor(images=loaded, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels.to(self.dtype)}  # (1, 3, height, width)

    def _forward(self, inputs: dict, **generation: Any) -> dict:
        start = self.model.generation_config.decoder_start_token_id
        num_start = len(start[0]) if isinstance(start, list) else 1  # a prompt stands behind the start token
        sequences = self.model.generate(**inputs, **generation)  # (batch x returned, start and caption)
        num_images = len(inputs["pixel_values"])
        # (batch, returned, caption): one row an image, as the pipeline takes batches apart
        return {"words": sequences[:, num_start:].reshape(num_images, -1, sequences.shape[1] - num_start)}

    def postprocess(self, outputs: dict) -> list[dict[str, str]]:
        texts = self.tokenizer.batch_decode(outputs["words"].flatten(0, -2), skip_special_tokens=True)
        return [{"generated_text": text.strip()} for text in texts]
