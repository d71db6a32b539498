"""Export a captioner of either captioner to ONNX: what reads the image, and one step that writes words.

    python export_onnx.py outputs/demo/lstm outputs/demo/lstm_onnx

It leaves encoder.onnx, step.onnx, the processor and the decoding settings; `caption_images` below captions with them, greedily, and
shows how: what it calls is onnxruntime and numpy alone. Install with `pip install -e '.[onnx]'`.

    encoder.onnx  pixel_values (batch, 3, height, width)  ->  image.*: what every step looks at
    step.onnx     input_ids (batch, length), position (), image.*, state.*  ->  logits (batch, vocabulary) after the last of
                  them, and new.*: the state for the next step; nought, or of length 0, before the first
"""

import argparse
import json
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, VisionEncoderDecoderModel

from modeling import InceptionLSTMForConditionalGeneration
from modeling.captioner import Captioner
from system.errors import one_line_errors
from system.files import atomic_folder

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
        layers = outputs.cache.cross_attention_cache.layers
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
            cache=cache,
        )
        layers = outputs.cache.self_attention_cache.layers
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


def caption_images(folder: str | Path, pixel_values: np.ndarray, max_length: int | None = None) -> list[list[int]]:
    """The ids of the likeliest words of each image, by onnxruntime: what `generate()` gives without beams.

    Args:
        folder: What this script has left.
        pixel_values: float32 (batch, 3, height, width), as the processor of the folder makes them.
        max_length: Longest caption in tokens, start tokens included; the exported model's own where None.

    Returns:
        As many ids for each image, start tokens left out, padded after the end: what the folder's tokenizer decodes.
    """
    import onnxruntime

    encoder, step = (onnxruntime.InferenceSession(Path(folder) / f"{name}.onnx") for name in ("encoder", "step"))
    settings = json.loads((Path(folder) / "generation_config.json").read_text(encoding="utf-8"))
    max_length = max_length or settings["max_length"]
    start = np.atleast_1d(np.squeeze(settings["decoder_start_token_id"]))  # a prompt is a list in a list
    bias = settings.get("sequence_bias") or []  # of single tokens
    boosted, nats = [token for (token,), _ in bias], np.array([nats for _, nats in bias], dtype=np.float32)
    names = [output.name for output in encoder.get_outputs()]
    image = dict(zip(names, encoder.run(None, {"pixel_values": pixel_values}), strict=True))
    sizes = {"batch": len(pixel_values), "past": 0}
    state = {
        wanted.name: np.zeros([sizes.get(size, size) for size in wanted.shape], dtype=np.float32)
        for wanted in step.get_inputs()
        if wanted.name.startswith("state.")
    }
    captions = tokens = np.tile(start, (len(pixel_values), 1))  # (batch, start tokens)
    position, ended = 0, np.zeros(len(pixel_values), dtype=bool)
    while captions.shape[1] < max_length and not ended.all():
        logits, *new = step.run(None, {"input_ids": tokens, "position": np.array(position), **image, **state})
        state = dict(zip(state, new, strict=True))
        position += tokens.shape[1]
        logits[:, boosted] += nats
        if captions.shape[1] < (settings.get("min_length") or 0):
            logits[:, settings["eos_token_id"]] = -np.inf
        for row, repeats in enumerate(repeating(captions, settings.get("no_repeat_ngram_size") or 0)):
            logits[row, repeats] = -np.inf
        tokens = np.where(ended, settings["pad_token_id"], logits.argmax(-1))[:, None]  # (batch, 1)
        ended |= tokens[:, 0] == settings["eos_token_id"]
        captions = np.concatenate([captions, tokens], axis=1)
    return captions[:, len(start) :].tolist()


def repeating(captions: np.ndarray, size: int) -> list[list[int]]:
    """For each caption so far, (batch, length), the tokens with which its last ones would be a run of `size` that it has had."""
    if not size or captions.shape[1] < size:
        return []
    runs = np.lib.stride_tricks.sliding_window_view(captions, size, axis=1)  # (batch, runs, size)
    last = captions[:, None, captions.shape[1] - size + 1 :]  # (batch, 1, size - 1)
    had = (runs[..., :-1] == last).all(-1)  # (batch, runs)
    return [row[same, -1].tolist() for row, same in zip(runs, had, strict=True)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a captioner of either kind")
    parser.add_argument("output_dir", help="where the exported model goes; must be new or empty")
    arguments = parser.parse_args(argv)
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        parser.error(f"{' and '.join(missing)} is missing: pip install --editable '.[onnx]'")
    transformers.logging.disable_progress_bar()
    with one_line_errors():
        captioner = Captioner.load(arguments.model)
        with atomic_folder(arguments.output_dir) as (folder, _):
            export_captioner(captioner, folder)
    for path in sorted(Path(arguments.output_dir).glob("*.onnx")):
        print(f"{path}: {path.stat().st_size / 1e6:,.1f} MB")


if __name__ == "__main__":
    main()
