"""An exported captioner in place of one of torch: it starts in a fraction of the time that importing torch takes."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from captioning.onnx_decoding import SUFFIXES, ExportedCaptioner, Rules, read_settings
from system.errors import UserError
from system.files import sha256_of

if TYPE_CHECKING:
    from PIL.Image import Image


# What an exported captioner cannot do, and the values that ask for no more than it does.
NOT_EXPORTED = {
    **dict.fromkeys(("prompt", "confidence", "min_confidence", "encoder_engine", "top_p"), ()),
    **{"device": ("cpu",), "dtype": ("float32",), "num_workers": (0,), "num_return_sequences": (1,)},
}


def is_exported(name_or_path: str) -> bool:
    """Whether a model is a folder that export_onnx.py has written in its own format."""
    return exported_dtype(name_or_path) is not None


def exported_dtype(folder: str) -> str | None:
    """The data type that an exported folder is captioned in: the first of `SUFFIXES` that it has; None where it has none."""
    return next((dtype for dtype, suffix in SUFFIXES.items() if (Path(folder) / f"step{suffix}.onnx").is_file()), None)


def load_exported(folder: str, *options: object, **decoding) -> "OnnxCaptioner":
    """The captioner of a folder of export_onnx.py; torch is not imported.

    Args:
        options: Dataclasses of the command's options, of which some ask for what is not exported.
        decoding: What `set_decoding` takes.

    Raises:
        UserError: onnxruntime is not installed, an option asks for what is not exported, or the folder is damaged.
    """
    if find_spec("onnxruntime") is None:
        raise UserError("an exported captioner needs onnxruntime: pip install --editable '.[onnx]'")
    for given in options:
        for name in NOT_EXPORTED:
            if getattr(given, name, None) not in (getattr(type(given), name, None), *NOT_EXPORTED[name]):
                raise UserError(
                    f"--{name} does not go with {folder}, an exported captioner: give the one that it was exported from"
                )
    captioner = OnnxCaptioner(folder)
    captioner.set_decoding(**decoding)
    return captioner


class OnnxCaptioner:
    """Images in, captions out, by onnxruntime, tokenizers and numpy; what of `modeling.captioner.Captioner` job, server and app need.

    Args:
        folder: Written by export_onnx.py in its own format.

    Raises:
        UserError: A file is missing or damaged, or the captions need transformers.
    """

    captions_only = True  # it is not inspected, and encodes by itself
    device = "cpu"
    num_captions = 1

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.model = ExportedCaptioner(folder, exported_dtype(folder))
        if not self.model.has_pixel_processor:
            raise UserError(
                f"{folder} has no preprocess.onnx, since ONNX has no such image processor: give the captioner that it was exported from"
            )
        self.tokenizer = load_tokenizer(self.folder)

    @property
    def min_image_side(self) -> int | None:
        """Pixels of the short side below which no image is shrunk as it is decoded; None where the folder has no size."""
        processor = read_settings(self.folder / "processor_config.json").get("image_processor") or {}
        sides = [side for side in (processor.get("size") or {}).values() if side]
        return 2 * max(sides) if sides else None

    @property
    def preprocess(self) -> Callable[[list["Image"]], dict]:
        """RGB images to what `generate` takes."""
        return lambda images: {
            "pixel_values": np.concatenate([self.model.preprocess(np.asarray(image)) for image in images])
        }

    def prepare(self, image: "Image") -> np.ndarray:
        """What `collate` needs of one RGB image."""
        return self.preprocess([image])["pixel_values"][0]

    def collate(self, prepared: list[np.ndarray]) -> dict:
        """Images, each from `prepare`, as one batch that `generate` takes."""
        return {"pixel_values": np.stack(prepared)}

    def on_device(self, inputs: dict) -> dict:
        return inputs

    def set_decoding(self, max_length: int | None = None, min_length: int | None = None, **settings) -> None:
        """Put decoding settings over those of the folder; those that are None stay as they are.

        Args:
            max_length, min_length: Of a caption, in tokens.
            settings: Others that `caption_images` applies.

        Raises:
            UserError: The minimum length exceeds the maximum length, or a length penalty has no beams.
        """
        settings |= {"max_new_tokens": max_length, "min_new_tokens": min_length}
        self.model.settings |= {name: value for name, value in settings.items() if value is not None}
        if settings.get("length_penalty") is not None and (self.model.settings.get("num_beams") or 1) == 1:
            raise UserError(
                f"--length_penalty {settings['length_penalty']} has no effect without beams: give --num_beams 2 or more"
            )
        rules = Rules.of(self.model.settings, None)
        if rules.min_length > rules.max_length:
            shortest, longest = (length - len(rules.start) for length in (rules.min_length, rules.max_length))
            raise UserError(
                f"min_length {shortest} exceeds max_length {longest}: give a lower --min_length or a higher --max_length"
            )

    def settings(self) -> dict:
        """What captions depend on, of JSON's types: a digest of the files, and the generation config."""
        files = [*self.model.files, *sorted(self.folder.glob("*.onnx.data")), self.folder / "preprocess.onnx"]
        return {"weights": sha256_of(*files), "decoding": self.model.settings}

    def generate(
        self,
        inputs: dict,
        inspect: bool = False,
        max_new_tokens: int | None = None,
        num_beams: int | None = None,
        do_sample: bool = False,
        **_,
    ) -> list[dict]:
        """Caption one batch of images.

        Args:
            inputs: `pixel_values`, float32 (batch, 3, height, width).
            max_new_tokens: Of a caption; the folder's own max length is not exceeded.
            num_beams: 1 for greedy decoding; the folder's own where None.

        Returns:
            For each image {"caption": text, "ended": whether EOS ended it before the maximum length did}.

        Raises:
            UserError: Captions are to be sampled.
        """
        if do_sample:
            raise UserError(f"{self.folder} does not sample: give the captioner that it was exported from")
        rules = Rules.of(self.model.settings, None)
        longest = min(rules.max_length, len(rules.start) + max_new_tokens) if max_new_tokens else rules.max_length
        token_ids = self.model.generate(inputs["pixel_values"], longest, num_beams)
        eos = set(rules.eos.tolist())
        texts = self.tokenizer.decode_batch(token_ids, skip_special_tokens=True)
        return [
            {"caption": text.strip(), "ended": not eos.isdisjoint(ids)}
            for text, ids in zip(texts, token_ids, strict=True)
        ]

    def stream(self, inputs: dict, **generation) -> Iterator[str]:
        """Caption one image, yielding the caption at the end. Args as of `generate`."""
        yield self.generate(inputs, **generation)[0]["caption"]


def load_tokenizer(folder: Path):
    """The tokenizer of a folder, as transformers decodes with it.

    Raises:
        UserError: It cannot be read, or transformers would change its texts.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises Exception itself
        raise UserError(f"{path} cannot be read: {error}") from error
    cleans_up = read_settings(folder / "tokenizer_config.json").get("clean_up_tokenization_spaces")
    if cleans_up and type(tokenizer.model).__name__ != "BPE":  # as transformers asks
        raise UserError(
            f"{folder}: its tokenizer deletes spaces before punctuation, which transformers does: give the captioner that it was "
            "exported from"
        )
    return tokenizer
