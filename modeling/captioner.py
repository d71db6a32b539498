"""A captioner is a model and its processor: load them, save them, write captions with them.

Either system goes through here, in scripts, app and evaluation alike.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, GPT2LMHeadModel, PreTrainedModel, TextIteratorStreamer
from transformers.modeling_outputs import BaseModelOutput

from system.errors import UserError

from . import captioning_pipeline
from .caption_loss import computes_in_bfloat16
from .modeling_inception_lstm import STATE_NAME
from .processing import center_crop, load_processor
from .vit_gpt2 import BeamCache

# What config.json says of the pipeline beside it; transformers then runs that for `pipeline("image-to-text")`.
CUSTOM_PIPELINES = {
    "image-to-text": {"impl": "captioning_pipeline.ImageToTextPipeline", "pt": ["AutoModelForImageTextToText"]}
}


def load_captioner(name_or_path: str) -> tuple:
    """Model (in eval) and processor from a folder or the Hub.

    The LSTM captioner's class is known once `modeling` is imported: neither system runs code that came with the weights.

    Raises:
        ValueError: There is no captioner, or it is damaged.
    """
    try:
        model = AutoModelForImageTextToText.from_pretrained(name_or_path)
        processor = load_processor(name_or_path)
    except Exception as error:  # transformers, safetensors, tokenizers and the Hub's client each have their own
        raise UserError(f"model {name_or_path} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    encoder = getattr(model, "encoder", None)  # other kinds of captioner have none by that name
    if getattr(encoder, "pooler", None) is not None:
        # No captioner reads it. Where none was saved, it has random weights now, and would hide that the encoder is the same.
        del encoder.pooler
        encoder.pooler = None
    return model.eval(), processor


def move_to_device(model: PreTrainedModel, device: str | torch.device, dtype: str = "float32") -> None:
    """Move a captioner to a device, and its weights to the numbers that it is to compute in there.

    Args:
        dtype: "float32", "bfloat16", or "auto": bfloat16 where the device has instructions for it.

    Raises:
        ValueError: The device cannot be used.
    """
    try:
        device = torch.device(device)
        if dtype == "auto":
            dtype = "bfloat16" if computes_in_bfloat16(device) else "float32"
        model.to(device, getattr(torch, dtype))
    except (RuntimeError, AssertionError) as error:  # torch's for a device that is not there
        raise UserError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error


def set_decoding(
    model: PreTrainedModel,
    max_length: int | None = None,
    min_length: int | None = None,
    top_p: float | None = None,
    **settings,
) -> None:
    """Put decoding settings into a captioner's generation config; those that are None stay as they are.

    Args:
        max_length, min_length: Of a caption, in tokens; `generate()` counts the tokens it starts from as well.
        top_p: Share of the probability whose likeliest tokens each word is sampled from, without beams (Holtzman et al., 2020,
            https://arxiv.org/abs/1904.09751, section 3.1).
        settings: Others of `GenerationConfig`.

    Raises:
        ValueError: The shortest caption would be longer than the longest.
    """
    num_start = len(start_token_ids(model))
    if top_p is not None:
        settings |= {"do_sample": True, "top_p": top_p, "top_k": 0, "num_beams": 1}
    settings |= {
        "max_length": max_length and max_length + num_start,
        "min_length": min_length and min_length + num_start,
    }
    decoding = model.generation_config
    settings = {name: value for name, value in settings.items() if value is not None}
    if (settings.get("num_beams", decoding.num_beams) or 1) == 1:
        settings["length_penalty"] = None  # it is of beams: transformers warns of it without them, and does not save it
    decoding.update(**settings)
    if decoding.max_length is not None and (decoding.min_length or 0) > decoding.max_length:
        raise UserError(
            f"the shortest caption is to have {decoding.min_length - num_start} tokens and the longest "
            f"{decoding.max_length - num_start}: give a lower least length or a higher longest one"
        )


def save_captioner(model: PreTrainedModel, processor, folder: str | os.PathLike) -> None:
    """Save both into a folder, and the pipeline's code with them.

    File by file beside and renamed, so that a kill leaves the old model or the new one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as beside:
        model.save_pretrained(beside)
        config = Path(beside) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"custom_pipelines": CUSTOM_PIPELINES}, indent=2))
        shutil.copy(captioning_pipeline.__file__, beside)
        processor.save_pretrained(beside)
        for path in Path(beside).iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # else a power cut can leave the new name on an empty file
            os.replace(path, folder / path.name)


def start_token_ids(model: PreTrainedModel) -> list[int]:
    """What every caption of a model starts from: the start token, and its prompt's tokens where it has a prompt.

    A prompt lives in the generation config alone, as `decoder_start_token_id = [[start, prompt, ...]]`: it is saved and read
    back with it, and plain `generate()` starts from it.
    """
    start = model.generation_config.decoder_start_token_id
    return list(start[0]) if isinstance(start, list) else [start]


def max_caption_tokens(model: PreTrainedModel) -> int | None:
    """Tokens of the longest caption, EOS included, that a decoder's positions leave room for; None where they have no end."""
    if not hasattr(model, "decoder"):
        return None
    # The last token of a caption is said, and not read.
    return model.config.decoder.max_position_embeddings - len(start_token_ids(model)) + 1


@torch.inference_mode()
def generate_captions(
    model: PreTrainedModel, processor, inputs: dict, inspect: bool = False, **generation
) -> list[dict]:
    """Caption one batch of images.

    Args:
        model: A captioner in eval; its generation config holds the decoding settings.
        processor: Its processor.
        inputs: `pixel_values` (batch, 3, height, width), or `encoder_outputs` with states (batch, positions, size).
        inspect: Whether to tell of each token how sure the model was and where it looked, too.
        generation: What `generate()` takes, over the generation config.

    Returns:
        For each image {"caption": text, "ended": whether EOS ended it before the longest length did}, where
        `num_return_sequences` is more than 1 "others", the texts of the rest, and what `inspect_captions` tells of the first
        where that is wanted.
    """
    if inspect and "encoder_outputs" not in inputs:  # read twice: to write the captions, and to look at them
        inputs = {"encoder_outputs": model.get_encoder()(inputs["pixel_values"])}
    given = dict(inputs)
    if "encoder_outputs" in given:  # a copy: generate() repeats the states for each beam, in place
        given["encoder_outputs"] = BaseModelOutput(last_hidden_state=given["encoder_outputs"][0].to(model.dtype))
    if isinstance(getattr(model, "decoder", None), GPT2LMHeadModel):
        given[STATE_NAME] = BeamCache()
    sequences = model.generate(**given, **generation)  # (batch, start tokens and caption)
    words = sequences[:, len(start_token_ids(model)) :]
    ended = (words == processor.tokenizer.eos_token_id).any(dim=1).tolist()
    texts = [text.strip() for text in processor.batch_decode(words, skip_special_tokens=True)]
    returned = generation.get("num_return_sequences") or model.generation_config.num_return_sequences or 1
    captions = []
    for first in range(0, len(texts), returned):  # an image's captions follow each other
        others = {"others": texts[first + 1 : first + returned]} if returned > 1 else {}
        captions.append({"caption": texts[first], "ended": ended[first], **others})
    if inspect:
        details = inspect_captions(model, processor, inputs, sequences[::returned])
        captions = [made | more for made, more in zip(captions, details, strict=True)]
    return captions


@torch.inference_mode()
def inspect_captions(model: PreTrainedModel, processor, inputs: dict, sequences: torch.Tensor) -> list[dict]:
    """How sure a model is of each token of captions that are there already, and where it looks at each.

    The encoder runs once; each caption is then read in one parallel pass with teacher forcing.

    Args:
        inputs: As in `generate_captions`.
        sequences: int64 (batch, start tokens and caption), as `generate()` gave them.

    Returns:
        For each image {"tokens", "center_crop"}. A token is {"text", "probability"}: the model's own, before any rule of
        decoding; where the model attends to a grid also "attention": rows of the grid, all together at most 1. Tokens that
        are no whole character by themselves stand together. "center_crop" is where the grid lies, see `center_crop`.
    """
    states = (inputs.get("encoder_outputs") or model.get_encoder()(inputs["pixel_values"]))[0].to(model.dtype)
    first = len(start_token_ids(model))
    decoder = getattr(model, "decoder", None)  # the LSTM captioner has none, and tells its weights in any case
    implementation = decoder and decoder.config._attn_implementation
    if decoder:
        decoder.set_attn_implementation("eager")  # the fused kernels keep the weights to themselves
    captions = []
    for state, ids in zip(states, sequences, strict=True):
        words = ids[first:].tolist()
        end = words.index(processor.tokenizer.eos_token_id) if processor.tokenizer.eos_token_id in words else len(words)
        outputs = model(
            encoder_outputs=BaseModelOutput(last_hidden_state=state[None]),
            # The last token is not read: as in generation, a caption may fill all of the decoder's positions.
            decoder_input_ids=ids[None, : max(first + end - 1, first)],
            output_attentions=True,
        )
        # What stands behind a token says the next one: the last start token the caption's first.
        logits = outputs.logits[0, first - 1 : first - 1 + end].float()  # (tokens, vocabulary)
        chosen = logits.softmax(dim=-1).gather(1, ids[first : first + end, None])[:, 0]  # (tokens,)
        grids = attention_grids(outputs.cross_attentions, first - 1, end)
        tokens = []
        for text, places in token_texts(processor.tokenizer, words[:end]):
            token = {"text": text, "probability": chosen[places].prod().item()}
            if grids is not None:
                token["attention"] = grids[places].mean(0).tolist()
            tokens.append(token)
        captions.append({"tokens": tokens, "center_crop": center_crop(processor.image_processor)})
    if decoder:
        decoder.set_attn_implementation(implementation)
    return captions


def attention_grids(cross_attentions: tuple | None, first: int, num_tokens: int) -> torch.Tensor | None:
    """Where a decoder looked at each token of one caption, (tokens, side, side); None where it looks at no grid.

    The plain mean over layers and heads: each head's weights sum to one, and so do those of their mean; no layer or head is
    picked as the one that shows what one hopes to see. What goes to positions before the grid, such as ViT's class token, is
    left out, so that a grid may sum to less than one.

    Args:
        cross_attentions: A layer each, (1, heads, length, positions).
        first: Position at which the first token was said.
    """
    if not cross_attentions or cross_attentions[0] is None:
        return None
    weights = torch.cat(cross_attentions, dim=1)[0].float().mean(0)[first : first + num_tokens]  # (tokens, positions)
    side = math.isqrt(weights.shape[1])
    return weights[:, weights.shape[1] - side**2 :].unflatten(1, (side, side))  # (tokens, side, side)


def token_texts(tokenizer, token_ids: list[int]) -> list[tuple[str, list[int]]]:
    """The text each token adds to a caption, blanks included, with its place; together they are the decoded caption.

    A character may be cut over several tokens, or change one before it: such tokens come as one, with all their places.
    """
    pieces, places = [], []
    for place in range(len(token_ids)):
        places.append(place)
        text = tokenizer.decode(token_ids[: place + 1], skip_special_tokens=True)
        while not text.startswith("".join(piece for piece, _ in pieces)):  # half a character stood there
            places = pieces.pop()[1] + places
        if added := text[sum(len(piece) for piece, _ in pieces) :]:
            pieces.append((added, places))
            places = []
    return pieces


def stream_caption(model: PreTrainedModel, processor, inputs: dict, **generation) -> Iterator[str]:
    """Caption one image, giving the caption so far again at each new word; beams, which change their mind, once at the end.

    Args as in `generate_captions`, with one image.
    """
    if (generation.get("num_beams") or model.generation_config.num_beams or 1) > 1:
        yield generate_captions(model, processor, inputs, **generation)[0]["caption"]
        return
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with ThreadPoolExecutor(max_workers=1) as executor:
        generated = executor.submit(model.generate, **inputs, **generation, streamer=streamer)
        generated.add_done_callback(lambda _: streamer.end())  # after an error too: else the loop below waits for ever
        caption = ""
        for words in streamer:
            caption += words
            yield caption.strip()
        generated.result()  # raises what generate() raised


def caption_images(
    model: PreTrainedModel, processor, loader: DataLoader, accelerator: Accelerator, num_inspected: int = 0
) -> list[dict]:
    """Caption every image of a prepared loader, under any number of processes.

    Args:
        model: A captioner in eval, not wrapped.
        loader: Batches with `index` and what `generate_captions` takes.
        accelerator: The run's; gathers what each process has written.
        num_inspected: So many of the first images, rounded up to whole batches, get what `inspect_captions` tells.

    Returns:
        On every process the same list, in the order of `index`, each image once.
    """
    captions = {}
    for batch in tqdm(loader, desc="captioning", leave=False, disable=not accelerator.is_local_main_process):
        inputs = {name: batch[name] for name in ("pixel_values", "encoder_outputs") if name in batch}
        made = generate_captions(model, processor, inputs, inspect=min(batch["index"]) < num_inspected)
        captions.update(zip(batch["index"].tolist(), made, strict=True))
    captions = dict(gather_object(list(captions.items())))  # an image dealt to two processes counts once
    return [captions[index] for index in sorted(captions)]
