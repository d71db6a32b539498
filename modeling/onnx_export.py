"""The ONNX models of a captioner: its image processor, its encoder, and one step of its decoder."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, VisionEncoderDecoderModel

from . import InceptionLSTMForConditionalGeneration
from .captioner import Captioner
from .onnx_files import convert, export_module
from .onnx_pixels import export_pixel_processor
from .transformers_versions import CACHE, set_attn_implementation

BATCH, PAST = 2, 3  # of the example that is traced; the exported model takes any


class LSTMEncoder(nn.Module):
    """The LSTM captioner's image: its embedding and, with attention, keys and values of the encoder's grid."""

    def __init__(self, model: InceptionLSTMForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        states = self.model.encoder(pixel_values).last_hidden_state  # (batch, positions, encoder size)
        embedding = self.model.image_projection(states.mean(1))  # (batch, image embedding)
        return [embedding, *(self.model.attention.project_keys_values(states) if self.model.attention else ())]

    def names(self) -> list[str]:
        return ["embedding", "keys", "values"] if self.model.attention else ["embedding"]


class LSTMStep(nn.Module):
    """The LSTM captioner's next word, from one token and the LSTM's state; at position 0 the image takes the token's place."""

    def __init__(self, model: InceptionLSTMForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, position: torch.Tensor, image: list[torch.Tensor], state: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        embedding, *grid = image
        token = self.model.token_embedding(input_ids)  # (batch, 1, image embedding)
        inputs = torch.where(position == 0, embedding.unsqueeze(1), token)  # (batch, 1, image embedding)
        outputs, query, memory = self.model.decode(inputs, tuple(grid) or None, tuple(state))  # (batch, 1, hidden)
        results = [self.model.lm_head(outputs)[:, -1], *memory]
        if grid:
            results.append(self.model.attention.attention_weights(query, tuple(grid))[:, :, -1].mean(1))
        return results

    def state(self) -> dict[str, torch.Tensor]:
        shape = (self.model.config.num_hidden_layers, BATCH, self.model.config.hidden_size)
        return {"hidden": torch.zeros(shape), "cell": torch.zeros(shape)}


class TransformerEncoder(nn.Module):
    """ViT-GPT2's image: keys and values for the cross attention of every layer of the decoder."""

    def __init__(self, model: VisionEncoderDecoderModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        # The decoder reads one token to fill its cache; what of it the keys and values do not need falls out of the export.
        token = torch.zeros(pixel_values.shape[0], 1, dtype=torch.int64)
        outputs = self.model(pixel_values=pixel_values, decoder_input_ids=token, use_cache=True)
        layers = outputs[CACHE].cross_attention_cache.layers
        return [tensor for layer in layers for tensor in (layer.keys, layer.values)]  # (batch, heads, positions, size)

    def names(self) -> list[str]:
        return _cache_names(self.model)


class TransformerStep(nn.Module):
    """ViT-GPT2's next word, from the tokens not yet read and the keys and values of those read before."""

    def __init__(self, model: VisionEncoderDecoderModel):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, position: torch.Tensor, image: list[torch.Tensor], state: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        read, seen = (DynamicCache([*zip(tensors[::2], tensors[1::2], strict=True)]) for tensors in (state, image))
        cache = EncoderDecoderCache(read, seen)
        num_tokens, num_read = input_ids.shape[1], state[0].shape[2]
        position_ids = position + torch.arange(num_tokens).unsqueeze(0)  # (1, length)
        outputs = self.model.decoder(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=causal_mask(num_read, num_tokens),
            encoder_hidden_states=image[0][:, 0],  # only for its length: keys and values are there already
            use_cache=True,
            **{CACHE: cache},
            output_attentions=True,
        )
        layers = outputs[CACHE].self_attention_cache.layers
        attention = torch.stack(outputs.cross_attentions)[:, :, :, -1].mean((0, 2))  # (batch, positions)
        return [
            outputs.logits[:, -1],
            *(tensor for layer in layers for tensor in (layer.keys, layer.values)),
            attention,
        ]

    def state(self) -> dict[str, torch.Tensor]:
        config = self.model.config.decoder
        shape = (BATCH, config.num_attention_heads, PAST, config.hidden_size // config.num_attention_heads)
        return {name: torch.randn(shape) for name in _cache_names(self.model)}


def causal_mask(num_read: int, num_tokens: int) -> torch.Tensor:
    """What is added to attention scores, (1, 1, tokens, read and tokens): each token attends to those before it and itself."""
    visible = torch.arange(num_read + num_tokens) <= (num_read + torch.arange(num_tokens)).unsqueeze(1)
    return torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]


def _cache_names(model: VisionEncoderDecoderModel) -> list[str]:
    layers = range(model.config.decoder.num_hidden_layers)
    return [f"{kind}_{layer}" for layer in layers for kind in ("keys", "values")]


def export_captioner(captioner: Captioner, folder: Path, suffixes: Mapping[str, str]) -> str | None:
    """Write preprocess.onnx, encoder.onnx, step.onnx, the processor and generation_config.json into a folder.

    Args:
        suffixes: Of the names of encoder and step of each data type: fp32, fp16, q8, q4.

    Returns:
        Why there is no preprocess.onnx, where the image processor does what `PixelProcessor` does not.
    """
    model, processor = captioner.model.eval().float(), captioner.processor
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        export_encoder_and_step(captioner, Path(beside))
        for dtype, suffix in suffixes.items():
            for name in ("encoder", "step"):
                convert(Path(beside) / f"{name}.onnx", folder / f"{name}{suffix}.onnx", dtype)
    processor.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    try:
        export_pixel_processor(processor.image_processor, folder / "preprocess.onnx")
    except ValueError as error:
        return str(error)
    return None


def export_encoder_and_step(captioner: Captioner, folder: Path) -> None:
    """Write encoder.onnx and step.onnx, float32, into a folder."""
    model, image_processor = captioner.model, captioner.image_processor
    is_lstm = isinstance(model, InceptionLSTMForConditionalGeneration)
    attends = not is_lstm or model.attention is not None
    if not is_lstm:
        set_attn_implementation(model, "eager")
    encoder, step = (
        (LSTMEncoder(model), LSTMStep(model)) if is_lstm else (TransformerEncoder(model), TransformerStep(model))
    )
    size = image_processor.crop_size if getattr(image_processor, "do_center_crop", False) else image_processor.size
    pixels = torch.randn(BATCH, 3, size["height"], size["width"])
    image, state = encoder(pixels), step.state()
    batch = torch.export.Dim("batch", min=1, max=4096)
    names = [f"image.{name}" for name in encoder.names()]
    export_module(encoder, (pixels,), folder / "encoder.onnx", ["pixel_values"], names, ({0: batch},))

    length, past = torch.export.Dim("length", min=1, max=1024), torch.export.Dim("past", min=0, max=4096)
    ids = torch.ones(BATCH, 1 if is_lstm else 2, dtype=torch.int64)
    of_state = {1: batch} if is_lstm else {0: batch, 2: past}
    export_module(
        step,
        (ids, torch.tensor(PAST), image, [*state.values()]),
        folder / "step.onnx",
        ["input_ids", "position", *names, *(f"state.{name}" for name in state)],
        ["logits", *(f"new.{name}" for name in state), *(["attention"] if attends else [])],
        ({0: batch} if is_lstm else {0: batch, 1: length}, {}, [{0: batch}] * len(image), [of_state] * len(state)),
    )
