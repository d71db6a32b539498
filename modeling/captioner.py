"""A captioner is a model and its processor: load, save, generate, inspect, stream.

Both kinds of captioner go through this class, in scripts, app and evaluation alike; third-party models through its subclass in
image_text_to_text.py.
"""

import copy
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL.Image import Image
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    GenerationConfig,
    GPT2LMHeadModel,
    PreTrainedModel,
    TextIteratorStreamer,
)
from transformers.modeling_outputs import BaseModelOutput

from system.errors import UserError

from . import captioning_pipeline
from .caption_loss import computes_in_bfloat16
from .confidence import caption_confidences, token_texts
from .fingerprint import weights_digest
from .loading import POOLER, check_weights, is_trained_here, kind_of, loading
from .processing import ImagesToPixels, center_crop, load_processor, resized_side
from .transformers_versions import CACHE, set_attn_implementation
from .vit_gpt2 import BeamCache

DEFAULT_NEW_TOKENS = 20  # of transformers' `generate()`, where the generation config has no limit


class Captioner:
    """A model and its processor.

    Args:
        model: An encoder-decoder with `generate()`; its generation config holds the decoding settings.
        processor: Image processor and tokenizer in one, see `build_processor`.
    """

    is_third_party = False  # see image_text_to_text.py
    captions_only = False  # whether it is not inspected, and encodes by itself

    def __init__(self, model: PreTrainedModel, processor):
        self.model = model
        self.processor = processor

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    @property
    def image_processor(self):
        return self.processor.image_processor

    @property
    def encoder(self) -> torch.nn.Module:
        return self.model.get_encoder()

    @property
    def generation_config(self) -> GenerationConfig:
        """The decoding settings, which `set_decoding` changes and options of `generate` override."""
        return self.model.generation_config

    @property
    def decoding(self) -> GenerationConfig:
        """What a report says of how captions are generated."""
        return self.generation_config

    def settings(self) -> dict:
        """What captions depend on, of JSON's types: a digest of weights and image processor, and the generation config."""
        weights = weights_digest(self.model, self.image_processor.to_json_string())
        return {"weights": weights, "decoding": self.decoding.to_diff_dict()}

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def num_captions(self) -> int:
        """Captions that are generated of each image."""
        return self.generation_config.num_return_sequences or 1

    @property
    def min_image_side(self) -> int | None:
        """Pixels of the short side below which no image is shrunk as it is decoded; None where none may be shrunk at all."""
        return 2 * resized_side(self.image_processor)

    @property
    def preprocess(self) -> Callable[[list[Image]], dict]:
        """RGB images to what `generate` takes; without the model, so that processes which decode images can have it."""
        return ImagesToPixels(self.processor)

    @classmethod
    def load(cls, name_or_path: str | os.PathLike) -> "Captioner":
        """The captioner of a folder or Hub repository, in eval. No code that came with the weights is run.

        Raises:
            UserError: There is no captioner, it is damaged, of a kind of others, or its weights are not exactly those of its config.
        """
        if not is_trained_here(name_or_path):
            raise UserError(
                f"model {name_or_path} is of the kind {kind_of(name_or_path)}, which caption.py, evaluate_captions.py, app.py and "
                "serve.py take: give a captioner of train_lstm.py or train_vit_gpt2.py, or another vision-encoder-decoder"
            )
        with loading(name_or_path):
            model, report = AutoModelForImageTextToText.from_pretrained(
                name_or_path, output_loading_info=True, ignore_mismatched_sizes=True, dtype=torch.float32
            )
            processor = load_processor(name_or_path)
        check_weights(name_or_path, report)
        if getattr(getattr(model, "encoder", None), "pooler", None) is not None:
            # It may be of random weights, which would give the same encoder another fingerprint each time. Deleted first, so that no
            # layer of that name is left, as in an encoder built without one.
            del model.encoder.pooler
            model.encoder.pooler = None
        return cls(model.eval(), processor)

    def save(self, folder: str | os.PathLike) -> None:
        """Save model, processor and the pipeline's code into a folder.

        Each file is written beside its place and renamed, so that a kill leaves the old one or the new one.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as beside:
            self.model.save_pretrained(beside, state_dict=_complete_state_dict(self.model))
            config = Path(beside) / "config.json"
            pipelines = {"custom_pipelines": captioning_pipeline.CUSTOM_PIPELINES}
            config.write_text(json.dumps(json.loads(config.read_text()) | pipelines, indent=2))
            shutil.copy(captioning_pipeline.__file__, beside)
            self.processor.save_pretrained(beside)
            for path in Path(beside).iterdir():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())  # else a power cut can leave the new name on an empty file
                os.replace(path, folder / path.name)

    def to(self, device: str | torch.device, dtype: str = "float32") -> "Captioner":
        """Move the model to a device and its weights to the dtype it is to compute in there.

        Args:
            dtype: "float32", "bfloat16", or "auto": bfloat16 where the device has instructions for it.

        Raises:
            UserError: The device cannot be used.
        """
        try:
            device = torch.device(device)
            if dtype == "auto":
                dtype = "bfloat16" if computes_in_bfloat16(device) else "float32"
            self.model.to(device, getattr(torch, dtype))
        except (RuntimeError, AssertionError) as error:  # torch's for a device that is not there
            raise UserError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
        return self

    def prepare(self, image: Image) -> torch.Tensor:
        """What `collate` needs of one RGB image."""
        return self.preprocess([image])["pixel_values"][0]

    def collate(self, prepared: list) -> dict:
        """Images, each from `prepare`, as one batch that `generate` takes."""
        return {"pixel_values": torch.stack(prepared)}

    def on_device(self, inputs: dict) -> dict:
        """Inputs of `generate` where the model is."""
        return {
            name: values.to(self.model.device) if isinstance(values, torch.Tensor) else values
            for name, values in inputs.items()
        }

    def set_decoding(
        self,
        max_length: int | None = None,
        min_length: int | None = None,
        top_p: float | None = None,
        **settings,
    ) -> None:
        """Put decoding settings into the generation config; those that are None stay as they are.

        Args:
            max_length, min_length: Of a caption, in tokens; `generate()` counts the tokens it starts from as well.
            top_p: Probability mass of nucleus sampling, without beams (Holtzman et al., 2020,
                https://arxiv.org/abs/1904.09751, section 3.1).
            settings: Others of `GenerationConfig`.

        Raises:
            UserError: The minimum length exceeds the maximum length, there are fewer beams than captions, or no caption could end.
        """
        self.check_no_repeat("--no_repeat_ngram_size", settings.get("no_repeat_ngram_size"))
        num_start = len(self.start_token_ids)
        if top_p is not None:
            settings |= {"do_sample": True, "top_p": top_p, "top_k": 0, "num_beams": 1}
        settings |= {
            "max_length": max_length and max_length + num_start,
            "min_length": min_length and min_length + num_start,
        }
        decoding = self.generation_config
        settings = {name: value for name, value in settings.items() if value is not None}
        num_beams = settings.get("num_beams", decoding.num_beams) or 1
        if num_beams == 1:
            if "length_penalty" in settings:
                raise UserError(
                    f"--length_penalty {settings['length_penalty']} has no effect without beams: give --num_beams 2 or more"
                )
            settings["length_penalty"] = None  # of beams: transformers warns of it without them, and does not save it
        returned = settings.get("num_return_sequences", decoding.num_return_sequences) or 1
        if returned > num_beams and not settings.get("do_sample", decoding.do_sample):
            raise UserError(
                f"--num_return_sequences {returned}: the number of beams, {num_beams}, must not be less; "
                "give a higher --num_beams, or sample with --top_p"
            )
        decoding.update(**settings)
        for kind in ("max", "min"):  # of a checkpoint made elsewhere: it would take precedence, with a warning
            if f"{kind}_length" in settings:
                decoding.update(**{f"{kind}_new_tokens": None})
        if decoding.max_length is not None and (decoding.min_length or 0) > decoding.max_length:
            raise UserError(
                f"min_length {decoding.min_length - num_start} exceeds max_length {decoding.max_length - num_start}: "
                "give a lower --min_length or a higher --max_length"
            )

    def check_no_repeat(self, option: str, size: int | None) -> None:
        """Refuse a size of n-grams with which no caption could end: transformers counts the start token, which may be EOS.

        Args:
            option: Name of the option that gives `size`.
            size: Size of n-grams that occur at most once.

        Raises:
            UserError: `size` is 1, and captions start from EOS, as GPT-2's do (`findings/transformers_start_is_eos.sh`).
        """
        if size != 1 or not self.model.config.is_encoder_decoder:  # a decoder alone continues its prompt
            return
        ends = self.model.generation_config.eos_token_id
        if set(self.start_token_ids) & set(ends if isinstance(ends, list) else [ends]):
            raise UserError(
                f"{option} 1: captions of this model start from its EOS token, which could not occur again, so that no caption "
                f"would end; give {option} 2 or more"
            )

    @property
    def start_token_ids(self) -> list[int]:
        """The tokens every caption starts from: the start token, and a prompt's tokens where there is a prompt.

        A prompt lives in the generation config alone, as `decoder_start_token_id = [[start, prompt, ...]]`: it is saved and
        loaded with it, and plain `generate()` starts from it.
        """
        config = self.model.generation_config
        start = config.bos_token_id if config.decoder_start_token_id is None else config.decoder_start_token_id
        return list(start[0]) if isinstance(start, list) else [start]

    @property
    def max_caption_tokens(self) -> int | None:
        """Tokens, EOS included, of the longest caption that the decoder's positions allow; None where they have no end."""
        if not hasattr(self.model, "decoder"):
            return None
        # The last token of a caption is generated, and never an input.
        return self.model.config.decoder.max_position_embeddings - len(self.start_token_ids) + 1

    @torch.inference_mode()
    def generate(
        self,
        inputs: dict,
        inspect: bool = False,
        confidence: bool = False,
        max_new_tokens: int | None = None,
        **generation,
    ) -> list[dict]:
        """Caption one batch of images; the model must be in eval.

        Args:
            inputs: `pixel_values` (batch, 3, height, width), or `encoder_outputs` with states (batch, positions, size).
            inspect: Whether to return probability and attention of each token, too.
            confidence: Whether to return how probable each caption is, too, see `caption_confidences`.
            max_new_tokens: Of a caption, see `lower_max_length`.
            generation: What else `generate()` takes, over the generation config.

        Returns:
            For each image {"caption": text, "ended": whether EOS ended it before the maximum length did}, where
            `num_return_sequences` is more than 1 "others", the texts of the rest, and of the first, with `inspect`, what
            `inspect()` returns, and with `confidence`, what `caption_confidences()` returns.
        """
        if (inspect or confidence) and "encoder_outputs" not in inputs:  # read twice: to generate, and to inspect
            inputs = {"encoder_outputs": self.encoder(inputs["pixel_values"])}
        given = dict(inputs)
        if "encoder_outputs" in given:  # a copy: generate() repeats the states for each beam, in place
            states = given["encoder_outputs"][0].to(self.model.dtype)
            given["encoder_outputs"] = BaseModelOutput(last_hidden_state=states)
        if isinstance(getattr(self.model, "decoder", None), GPT2LMHeadModel):
            given[CACHE] = BeamCache()
        generation |= self.lower_max_length(max_new_tokens, len(self.start_token_ids))
        sequences = self.model.generate(**given, **generation)  # (batch x returned, start tokens and caption)
        token_ids = sequences[:, len(self.start_token_ids) :]
        returned = self._num_returned(generation)
        ended = (token_ids == self.tokenizer.eos_token_id).any(dim=1).tolist()
        captions = self._captions(token_ids, ended, returned)
        if inspect:
            details = self.inspect(inputs, sequences[::returned])
            captions = [caption | more for caption, more in zip(captions, details, strict=True)]
        if confidence:
            states = inputs["encoder_outputs"][0].to(self.model.dtype)
            found = caption_confidences(
                self.model, self.tokenizer, states, sequences[::returned], len(self.start_token_ids)
            )
            captions = [caption | more for caption, more in zip(captions, found, strict=True)]
        return captions

    def lower_max_length(self, max_new_tokens: int | None, num_start: int) -> dict:
        """Options of `generate()` for shorter captions than the generation config allows; the config's own max length is not exceeded.

        Args:
            max_new_tokens: Of a caption; None for the config's own.
            num_start: Tokens that the config's `max_length` and `min_length` count besides.
        """
        decoding = self.generation_config
        own = decoding.max_new_tokens
        if own is None and decoding.max_length is not None:
            own = decoding.max_length - num_start
        if max_new_tokens is None or max_new_tokens >= (DEFAULT_NEW_TOKENS if own is None else own):
            return {}
        # One limit alone, and a minimum within it: transformers warns otherwise.
        options = {"max_new_tokens": max_new_tokens, "max_length": None}
        for name, limit in {"min_new_tokens": max_new_tokens, "min_length": max_new_tokens + num_start}.items():
            if (getattr(decoding, name) or 0) > limit:
                options[name] = limit
        return options

    def _num_returned(self, generation: dict) -> int:
        """Number of captions of each image."""
        return generation.get("num_return_sequences") or self.generation_config.num_return_sequences or 1

    def _captions(self, token_ids: torch.Tensor, ended: list[bool], returned: int) -> list[dict]:
        """What `generate` returns, of generated tokens (batch x returned, length)."""
        texts = [text.strip() for text in self.processor.batch_decode(token_ids, skip_special_tokens=True)]
        captions = []
        for first in range(0, len(texts), returned):  # an image's captions follow each other
            others = {"others": texts[first + 1 : first + returned]} if returned > 1 else {}
            captions.append({"caption": texts[first], "ended": ended[first], **others})
        return captions

    @torch.inference_mode()
    def inspect(self, inputs: dict, sequences: torch.Tensor) -> list[dict]:
        """Probability and attention of each token of generated captions.

        The encoder runs once; each caption is then read in one parallel pass with teacher forcing.

        Args:
            inputs: As in `generate`.
            sequences: int64 (batch, start tokens and caption), as the model's `generate()` returns them.

        Returns:
            For each image {"tokens", "center_crop"}. A token is {"text", "probability"}: the model's own, before any
            logits processor; where the model attends to a grid also "attention": rows of the grid, at most 1 in sum. Tokens
            that are no whole character by themselves stand together. "center_crop" is where the grid lies, see `center_crop`.
        """
        states = (inputs.get("encoder_outputs") or self.encoder(inputs["pixel_values"]))[0].to(self.model.dtype)
        first, eos_token_id = len(self.start_token_ids), self.tokenizer.eos_token_id
        decoder = getattr(
            self.model, "decoder", None
        )  # the LSTM captioner has none, and returns its weights in any case
        implementation = decoder and decoder.config._attn_implementation
        if decoder:
            set_attn_implementation(decoder, "eager")  # the fused kernels return no weights
        captions = []
        for state, ids in zip(states, sequences, strict=True):
            token_ids = ids[first:].tolist()
            end = token_ids.index(eos_token_id) if eos_token_id in token_ids else len(token_ids)
            outputs = self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=state[None]),
                # Without the last token: as in generation, a caption may fill all of the decoder's positions.
                decoder_input_ids=ids[None, : max(first + end - 1, first)],
                output_attentions=True,
            )
            # A token is predicted at the position before it: the caption's first one at the last start token.
            logits = outputs.logits[0, first - 1 : first - 1 + end].float()  # (tokens, vocabulary)
            chosen = logits.softmax(dim=-1).gather(1, ids[first : first + end, None])[:, 0]  # (tokens,)
            grids = attention_grids(outputs.cross_attentions, first - 1, end)
            tokens = []
            for text, places in token_texts(self.tokenizer, token_ids[:end]):
                token = {"text": text, "probability": chosen[places].prod().item()}
                if grids is not None:
                    token["attention"] = grids[places].mean(0).tolist()
                tokens.append(token)
            captions.append({"tokens": tokens, "center_crop": center_crop(self.image_processor)})
        if decoder:
            set_attn_implementation(decoder, implementation)
        return captions

    def stream(self, inputs: dict, **generation) -> Iterator[str]:
        """Caption one image, yielding the caption so far at each new word; with beams, which revise it, once at the end.

        Args as in `generate`, with one image.
        """
        if (generation.get("num_beams") or self.generation_config.num_beams or 1) > 1:
            yield self.generate(inputs, **generation)[0]["caption"]
            return
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with ThreadPoolExecutor(max_workers=1) as executor:
            generated = executor.submit(self.model.generate, **inputs, **generation, streamer=streamer)
            generated.add_done_callback(lambda _: streamer.end())  # after an error too: else the loop below never ends
            caption = ""
            for text in streamer:
                caption += text
                yield caption.strip()
            generated.result()  # raises what generate() raised


def _complete_state_dict(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's weights, and zeros for the pooler that transformers builds for such an encoder whenever it loads it.

    Without them everybody who loads the model is told that weights are missing, and an encoder offloaded to disk fails.
    """
    weights = model.state_dict()
    encoder = getattr(model, "encoder", None)
    if getattr(encoder, "pooler", encoder) is None:
        with torch.device("meta"):
            # Eager, since an attention implementation of the whole may not suit a part of it, as the ResNet of a hybrid ViT.
            pooler = AutoModel.from_config(copy.deepcopy(encoder.config), attn_implementation="eager").pooler
        shapes = {} if pooler is None else pooler.state_dict()
        weights |= {POOLER + name: torch.zeros(value.shape, dtype=model.dtype) for name, value in shapes.items()}
    return weights


def attention_grids(cross_attentions: tuple | None, first: int, num_tokens: int) -> torch.Tensor | None:
    """Attention of each token of one caption, (tokens, side, side); None where the model attends to no grid.

    The plain mean over layers and heads: each head's weights sum to one, and so do those of their mean; no layer or head is
    picked as the one that shows what one hopes for. What goes to positions before the grid, such as ViT's class token, is
    left out, so that a grid may sum to less than one.

    Args:
        cross_attentions: A layer each, (1, heads, length, positions).
        first: Position at which the first token was predicted.
    """
    if not cross_attentions or cross_attentions[0] is None:
        return None
    weights = torch.cat(cross_attentions, dim=1)[0].float().mean(0)[first : first + num_tokens]  # (tokens, positions)
    side = math.isqrt(weights.shape[1])
    return weights[:, weights.shape[1] - side**2 :].unflatten(1, (side, side))  # (tokens, side, side)
