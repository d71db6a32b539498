"""The two ONNX models of a captioner: its encoder, and one step of its decoder."""

import warnings
from pathlib import Path

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, VisionEncoderDecoderModel

from . import InceptionLSTMForConditionalGeneration
from .captioner import Captioner
from .transformers_versions import CACHE

OPSET = 20
MAX_BYTES_IN_FILE = 1_800_000_000  # of weights; an .onnx file ends at 2 GiB, and more goes into a .data file beside it
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
        outputs, _, memory = self.model.decode(inputs, tuple(grid) or None, tuple(state))  # (batch, 1, hidden)
        return [self.model.lm_head(outputs)[:, -1], *memory]

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
        # Each token sees those before it and itself: (1, 1, length, read and length)
        visible = torch.arange(num_read + num_tokens) <= (num_read + torch.arange(num_tokens)).unsqueeze(1)
        outputs = self.model.decoder(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None],
            encoder_hidden_states=image[0][:, 0],  # only for its length: keys and values are there already
            use_cache=True,
            **{CACHE: cache},
        )
        layers = outputs[CACHE].self_attention_cache.layers
        return [outputs.logits[:, -1], *(tensor for layer in layers for tensor in (layer.keys, layer.values))]

    def state(self) -> dict[str, torch.Tensor]:
        config = self.model.config.decoder
        shape = (BATCH, config.num_attention_heads, PAST, config.hidden_size // config.num_attention_heads)
        return {name: torch.randn(shape) for name in _cache_names(self.model)}


def _cache_names(model: VisionEncoderDecoderModel) -> list[str]:
    layers = range(model.config.decoder.num_hidden_layers)
    return [f"{kind}_{layer}" for layer in layers for kind in ("keys", "values")]


def export_captioner(captioner: Captioner, folder: Path) -> None:
    """Write encoder.onnx, step.onnx, the processor and generation_config.json into a folder."""
    model, processor = captioner.model.eval().float(), captioner.processor
    is_lstm = isinstance(model, InceptionLSTMForConditionalGeneration)
    if not is_lstm:
        model.set_attn_implementation("eager")
    encoder, step = (
        (LSTMEncoder(model), LSTMStep(model)) if is_lstm else (TransformerEncoder(model), TransformerStep(model))
    )
    image_processor = processor.image_processor
    size = image_processor.crop_size if getattr(image_processor, "do_center_crop", False) else image_processor.size
    pixels = torch.randn(BATCH, 3, size["height"], size["width"])
    image, state = encoder(pixels), step.state()
    batch = torch.export.Dim("batch", min=1, max=4096)
    names = [f"image.{name}" for name in encoder.names()]
    _export(encoder, (pixels,), folder / "encoder.onnx", ["pixel_values"], names, ({0: batch},))

    length, past = torch.export.Dim("length", min=1, max=1024), torch.export.Dim("past", min=0, max=4096)
    ids = torch.ones(BATCH, 1 if is_lstm else 2, dtype=torch.int64)
    of_state = {1: batch} if is_lstm else {0: batch, 2: past}
    _export(
        step,
        (ids, torch.tensor(PAST), image, [*state.values()]),
        folder / "step.onnx",
        ["input_ids", "position", *names, *(f"state.{name}" for name in state)],
        ["logits", *(f"new.{name}" for name in state)],
        ({0: batch} if is_lstm else {0: batch, 1: length}, {}, [{0: batch}] * len(image), [of_state] * len(state)),
    )
    processor.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def _export(module: nn.Module, inputs: tuple, path: Path, input_names: list, output_names: list, shapes: tuple) -> None:
    num_bytes = sum(parameter.nbytes for parameter in module.parameters())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            inputs,
            path,
            input_names=input_names,
            output_names=output_names,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            external_data=num_bytes > MAX_BYTES_IN_FILE,
            verbose=False,
        )
