"""A ViT-GPT2 captioner as the files that transformers.js 4 captions from: `pipeline("image-to-text", FOLDER)` of its npm package.

The file names and tensor names are those of `@huggingface/transformers` 4.3.1, src/models/session_config.js and modeling_utils.js.
Its own resizing does not average when it shrinks an image, so the encoder's graph resizes and normalizes.
"""

import json
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, VisionEncoderDecoderModel

from .captioner import Captioner
from .onnx_export import BATCH, PAST, export_module

RESIZE = {0: ("nearest", {}), 2: ("linear", {"antialias": 1}), 3: ("cubic", {"antialias": 1, "cubic_coeff_a": -0.5})}
# Settings of a generation config that the npm package accepts and ignores: beams and sampling.
GREEDY = {"num_beams": 1, "do_sample": False} | dict.fromkeys(
    ("length_penalty", "num_return_sequences", "early_stopping", "top_p", "top_k", "temperature", "sequence_bias")
)


class ImageStates(nn.Module):
    """The encoder's states, projected to the decoder's size where that is another."""

    def __init__(self, model: VisionEncoderDecoderModel):
        super().__init__()
        self.encoder, self.projection = model.encoder, getattr(model, "enc_to_dec_proj", nn.Identity())

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.projection(self.encoder(pixel_values).last_hidden_state)  # (batch, positions, decoder size)


class MergedDecoder(nn.Module):
    """The logits of every token given, with the keys and values of those before; none, of length 0, at a caption's start."""

    def __init__(self, model: VisionEncoderDecoderModel):
        super().__init__()
        self.decoder = model.decoder

    def forward(
        self, input_ids: torch.Tensor, encoder_hidden_states: torch.Tensor, past: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        read = DynamicCache([*zip(past[::2], past[1::2], strict=True)])
        num_tokens, num_read = input_ids.shape[1], past[0].shape[2]
        # Each token sees those before it and itself: (length, read and length)
        visible = torch.arange(num_read + num_tokens) <= (num_read + torch.arange(num_tokens)).unsqueeze(1)
        outputs = self.decoder(
            input_ids=input_ids,
            position_ids=num_read + torch.arange(num_tokens).unsqueeze(0),  # (1, length)
            attention_mask=torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None],
            encoder_hidden_states=encoder_hidden_states,
            use_cache=True,
            cache=EncoderDecoderCache(read, DynamicCache()),
        )
        layers = outputs.cache.self_attention_cache.layers
        return [outputs.logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values))]


def export_transformers_js(captioner: Captioner, folder: Path) -> None:
    """Write onnx/, both configs, the tokenizer and preprocessor_config.json into a folder.

    Raises:
        ValueError: The image processor crops, pads or resizes in a way that the encoder's graph does not have.
    """
    model, processor = captioner.model.eval().float(), captioner.processor
    check_image_processor(processor.image_processor)
    model.set_attn_implementation("eager")
    size, decoder = processor.image_processor.size, model.config.decoder
    batch = torch.export.Dim("batch_size", min=1, max=4096)
    length, past_length = torch.export.Dim("length", min=1, max=1024), torch.export.Dim("past", min=0, max=4096)
    encoder = ImageStates(model)
    pixels = torch.randn(BATCH, 3, size["height"], size["width"])
    with torch.no_grad():
        states = encoder(pixels)
    (folder / "onnx").mkdir()
    path = folder / "onnx" / "encoder_model.onnx"
    export_module(encoder, (pixels,), path, ["pixel_values"], ["last_hidden_state"], ({0: batch},))
    resize_in_graph(path, processor.image_processor)
    shape = (BATCH, decoder.num_attention_heads, PAST, decoder.hidden_size // decoder.num_attention_heads)
    names = [f"{layer}.{kind}" for layer in range(decoder.num_hidden_layers) for kind in ("key", "value")]
    export_module(
        MergedDecoder(model),
        (torch.ones(BATCH, 2, dtype=torch.int64), states, [torch.randn(shape) for _ in names]),
        folder / "onnx" / "decoder_model_merged.onnx",
        ["input_ids", "encoder_hidden_states", *(f"past_key_values.{name}" for name in names)],
        ["logits", *(f"present.{name}" for name in names)],
        ({0: batch, 1: length}, {0: batch}, [{0: batch, 2: past_length}] * len(names)),
    )
    save_settings(captioner, folder)


def save_settings(captioner: Captioner, folder: Path) -> None:
    """Write the configs, the tokenizer, and a preprocessor that hands over an image's pixels as they are, 0 to 255."""
    captioner.model.config.save_pretrained(folder)
    captioner.processor.tokenizer.save_pretrained(folder)
    settings = captioner.model.generation_config.to_diff_dict() | GREEDY
    settings = {name: value for name, value in settings.items() if value is not None}
    image_processor = {"image_processor_type": "ViTImageProcessor", "do_convert_rgb": True}
    image_processor |= dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), False)
    for name, content in (("generation_config", settings), ("preprocessor_config", image_processor)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_image_processor(image_processor) -> None:
    """Raise ValueError for an image processor that does more than resize to one size, rescale and normalize."""
    kind = int(getattr(image_processor, "resample", 2))
    sides = {side for side, pixels in dict(image_processor.size).items() if pixels}
    if getattr(image_processor, "do_center_crop", False) or not {"height", "width"} <= sides:
        raise ValueError("its image processor crops or keeps the aspect ratio")
    if kind not in RESIZE or not (image_processor.do_resize and image_processor.do_rescale):
        raise ValueError("its image processor does not resize by nearest, bilinear or bicubic and rescale")


def resize_in_graph(path: Path, image_processor) -> None:
    """Put resizing (antialiased), rounding to gray levels, rescaling and normalizing before an encoder's first node.

    Its pixel_values become float32 (batch, 3, any height, any width) from 0 to 255.
    """
    proto = onnx.load(path)
    graph = proto.graph
    mode, attributes = RESIZE[int(image_processor.resample)]
    size, normalizes = image_processor.size, image_processor.do_normalize
    mean, std = (image_processor.image_mean, image_processor.image_std) if normalizes else ([0.0] * 3, [1.0] * 3)
    per_channel = (1, 3, 1, 1)
    constants = {
        "resize.start": np.array([size["height"], size["width"]], dtype=np.int64),
        "resize.low": np.float32(0),
        "resize.high": np.float32(255),
        "resize.factor": (image_processor.rescale_factor / np.array(std, dtype=np.float32)).reshape(per_channel),
        "resize.shift": (np.array(mean, dtype=np.float32) / np.array(std, dtype=np.float32)).reshape(per_channel),
    }
    for name, value in constants.items():
        graph.initializer.append(numpy_helper.from_array(np.asarray(value, dtype=value.dtype), name))
    for node in graph.node:
        node.input[:] = ["resize.normalized" if name == "pixel_values" else name for name in node.input]
    steps = [
        helper.make_node(
            "Resize", ["pixel_values", "", "", "resize.start"], ["resize.size"], mode=mode, axes=[2, 3], **attributes
        ),
        helper.make_node("Round", ["resize.size"], ["resize.round"]),
        helper.make_node("Clip", ["resize.round", "resize.low", "resize.high"], ["resize.clip"]),
        helper.make_node("Mul", ["resize.clip", "resize.factor"], ["resize.mul"]),
        helper.make_node("Sub", ["resize.mul", "resize.shift"], ["resize.normalized"]),
    ]
    for number, node in enumerate(steps):
        graph.node.insert(number, node)
    for axis, name in ((2, "height"), (3, "width")):
        graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    onnx.save(proto, path)
