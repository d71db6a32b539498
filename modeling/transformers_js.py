"""A ViT-GPT2 captioner as the files that transformers.js 4 captions from: `pipeline("image-to-text", FOLDER)` of its npm package.

The file names and tensor names are those of `@huggingface/transformers` 4.3.1, src/models/session_config.js and modeling_utils.js.
Its own resizing does not average when it shrinks an image, so the encoder's graph resizes and normalizes.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx
import torch
from onnx import compose
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, VisionEncoderDecoderModel

from . import onnx_files
from .captioner import Captioner
from .onnx_export import BATCH, PAST, causal_mask
from .onnx_files import convert, export_module
from .onnx_pixels import export_pixel_processor
from .transformers_versions import CACHE, set_attn_implementation

# Settings of a generation config that the npm package accepts and ignores: beams and sampling.
GREEDY = {"num_beams": 1, "do_sample": False} | dict.fromkeys(
    ("length_penalty", "num_return_sequences", "early_stopping", "top_p", "top_k", "temperature", "sequence_bias")
)
ENCODER, DECODER = "encoder_model", "decoder_model_merged"


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
        num_tokens, num_read = input_ids.shape[1], past[0].shape[2]
        outputs = self.decoder(
            input_ids=input_ids,
            position_ids=num_read + torch.arange(num_tokens).unsqueeze(0),  # (1, length)
            attention_mask=causal_mask(num_read, num_tokens),
            encoder_hidden_states=encoder_hidden_states,
            use_cache=True,
            **{CACHE: EncoderDecoderCache(DynamicCache([*zip(past[::2], past[1::2], strict=True)]), DynamicCache())},
        )
        layers = outputs[CACHE].self_attention_cache.layers
        return [outputs.logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values))]


def export_transformers_js(captioner: Captioner, folder: Path, suffixes: Mapping[str, str]) -> None:
    """Write onnx/, the configs, the tokenizer and the preprocessor's settings into a folder.

    Args:
        suffixes: Of the names of the files of each data type: fp32, fp16, q8, q4.

    Raises:
        ValueError: The decoder is no GPT-2, the weights are too many for one file, or the image processor does what the encoder's
            graph cannot.
    """
    model = captioner.model.eval().float()
    if model.config.decoder.model_type != "gpt2":
        raise ValueError(f"its decoder is of the kind {model.config.decoder.model_type}, not gpt2")
    if sum(weight.nbytes for weight in model.parameters()) > onnx_files.MAX_BYTES_IN_FILE:
        raise ValueError("its weights are too many for one file")
    set_attn_implementation(model, "eager")
    (folder / "onnx").mkdir()
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        pixels, encoder, decoder = (Path(beside) / f"{name}.onnx" for name in ("pixels", "encoder", "decoder"))
        size = export_pixel_processor(captioner.image_processor, pixels)
        export_encoder(model, size, encoder)
        export_decoder(model, decoder)
        for dtype, suffix in suffixes.items():
            converted = Path(beside) / f"converted{suffix}.onnx"
            convert(encoder, converted, dtype)
            join(pixels, converted, folder / "onnx" / f"{ENCODER}{suffix}.onnx")
            convert(decoder, folder / "onnx" / f"{DECODER}{suffix}.onnx", dtype)
    save_settings(captioner, folder)


def export_encoder(model: VisionEncoderDecoderModel, size: tuple[int, int], path: Path) -> None:
    batch = torch.export.Dim("batch_size", min=1, max=4096)
    pixels = torch.randn(BATCH, 3, *size)
    export_module(ImageStates(model), (pixels,), path, ["pixel_values"], ["last_hidden_state"], ({0: batch},))


def export_decoder(model: VisionEncoderDecoderModel, path: Path) -> None:
    config = model.config.decoder
    shape = (BATCH, config.num_attention_heads, PAST, config.hidden_size // config.num_attention_heads)
    names = [f"{layer}.{kind}" for layer in range(config.num_hidden_layers) for kind in ("key", "value")]
    # The package replaces this name of a dimension by the batch's size; others become 0.
    batch, positions = (torch.export.Dim(name, min=1, max=65_536) for name in ("batch_size", "positions"))
    length, past_length = torch.export.Dim("length", min=1, max=1024), torch.export.Dim("past", min=0, max=4096)
    states = torch.randn(BATCH, 5, config.hidden_size)
    export_module(
        MergedDecoder(model),
        (torch.ones(BATCH, 2, dtype=torch.int64), states, [torch.randn(shape) for _ in names]),
        path,
        ["input_ids", "encoder_hidden_states", *(f"past_key_values.{name}" for name in names)],
        ["logits", *(f"present.{name}" for name in names)],
        ({0: batch, 1: length}, {0: batch, 1: positions}, [{0: batch, 2: past_length}] * len(names)),
    )


def join(pixels: Path, encoder: Path, target: Path) -> None:
    """Write the image processor and the encoder as one graph: pixels of any size, 0 to 255, to the encoder's states."""
    first = compose.add_prefix(onnx.load(pixels), "pixels.")
    joined = compose.merge_models(first, onnx.load(encoder), io_map=[("pixels.pixel_values", "pixel_values")])
    (given,) = joined.graph.input
    for node in joined.graph.node:
        node.input[:] = ["pixel_values" if name == given.name else name for name in node.input]
    given.name = "pixel_values"
    onnx.save(joined, target)


def save_settings(captioner: Captioner, folder: Path) -> None:
    """Write the configs, the tokenizer, and a preprocessor that hands over an image's pixels as they are, 0 to 255."""
    captioner.model.config.save_pretrained(folder)
    captioner.tokenizer.save_pretrained(folder)
    settings = captioner.model.generation_config.to_diff_dict() | GREEDY
    settings = {name: value for name, value in settings.items() if value is not None}
    image_processor = {"image_processor_type": "ViTImageProcessor", "do_convert_rgb": True}
    image_processor |= dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), False)
    processor = {"processor_class": "VisionTextDualEncoderProcessor", "image_processor": image_processor}
    files = {
        "generation_config": settings,
        "preprocessor_config": image_processor,  # the one that the package reads
        "processor_config": processor,
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
