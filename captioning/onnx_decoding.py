"""Caption with an exported model: greedy decoding and beam search as `generate()` has them, by onnxruntime and numpy alone."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from packaging.version import Version

from system.errors import UserError

DEFAULT_NEW_TOKENS = 20  # of transformers' `generate()`, where the generation config has no limit
# Of a file's name, as transformers.js has them.
SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "q4": "_q4"}
LOWEST = np.float32(-1e9)  # score of what is not to be chosen, as in `generate()`


class ExportedCaptioner:
    """The sessions of an exported model and its decoding settings.

    Args:
        folder: Written by export_onnx.py, in either format.
        dtype: Of the files, one of `SUFFIXES`.

    Raises:
        UserError: A file is missing, or onnxruntime refuses it.
    """

    def __init__(self, folder: str | Path, dtype: str = "fp32"):
        folder = Path(folder)
        self.is_transformers_js = (folder / "onnx").is_dir()
        names = ("onnx/encoder_model", "onnx/decoder_model_merged") if self.is_transformers_js else ("encoder", "step")
        self.files = [folder / f"{name}{SUFFIXES[dtype]}.onnx" for name in names]
        self.encoder, self.decoder = map(open_session, self.files)
        path = folder / "preprocess.onnx"
        self.pixel_processor = open_session(path) if path.exists() else None
        self.has_pixel_processor = self.is_transformers_js or self.pixel_processor is not None
        self.settings = read_settings(folder / "generation_config.json")
        inputs = {wanted.name: wanted.shape for wanted in self.decoder.get_inputs()}
        encoded = {"encoder_hidden_states"} if self.is_transformers_js else {o.name for o in self.encoder.get_outputs()}
        if missing := ({"input_ids"} | encoded) - inputs.keys():
            raise UserError(f"{self.files[1]} has no input {min(missing)}: it is not of the encoder beside it")
        self.states = {name: shape for name, shape in inputs.items() if name.startswith(("state.", "past_key_values."))}
        self.has_position = "position" in inputs

    def preprocess(self, image: np.ndarray) -> np.ndarray:
        """The encoder's input, float32 (1, 3, height, width), for one RGB image, uint8 (height, width, 3) of any size."""
        pixels = image.astype(np.float32).transpose(2, 0, 1)[None]
        return pixels if self.is_transformers_js else self.pixel_processor.run(None, {"pixels": pixels})[0]

    def encode(self, pixel_values: np.ndarray) -> dict[str, np.ndarray]:
        """What every step attends to, by the name of the step's input."""
        names = [output.name for output in self.encoder.get_outputs()]
        names = ["encoder_hidden_states"] if self.is_transformers_js else names
        return dict(zip(names, self.encoder.run(None, {"pixel_values": pixel_values}), strict=True))

    def first_state(self, num_rows: int) -> dict[str, np.ndarray]:
        """Zeros, or keys and values of length 0, before the first token of so many captions."""
        sizes = {"batch": num_rows, "batch_size": num_rows, "past": 0}
        return {
            name: np.zeros([sizes.get(size, size) for size in shape], dtype=np.float32)
            for name, shape in self.states.items()
        }

    def step(self, tokens: np.ndarray, position: int, image: dict, state: dict) -> tuple[np.ndarray, dict]:
        """Logits, (rows, vocabulary), after tokens, (rows, length), of which the first is at `position`; and the new state."""
        inputs = {"input_ids": tokens, **image, **state}
        if self.has_position:
            inputs["position"] = np.array(position)
        wanted = [output.name for output in self.decoder.get_outputs() if output.name != "attention"]
        logits, *new = self.decoder.run(wanted, inputs)
        logits = logits[:, -1] if logits.ndim == 3 else logits  # transformers.js has those of every token
        return logits, dict(zip(state, new, strict=True))

    def select(self, state: dict, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The state of these rows, in this order."""
        axes = {name: 0 if shape[0] in ("batch", "batch_size") else 1 for name, shape in self.states.items()}
        return {name: value.take(rows, axis=axes[name]) for name, value in state.items()}

    def generate(
        self, pixel_values: np.ndarray, max_length: int | None = None, num_beams: int | None = None
    ) -> list[list[int]]:
        """The token ids of each image's caption: what the model's `generate()` returns without sampling.

        Args:
            pixel_values: float32 (batch, 3, height, width), as `preprocess` or the folder's processor returns them.
            max_length: Max length of a caption in tokens, start tokens included; the exported model's own where None.
            num_beams: Number of beams, 1 for greedy decoding; the exported model's own where None.

        Returns:
            As many ids for each image, start tokens left out, padded after EOS: what the folder's tokenizer decodes.
        """
        rules = Rules.of(self.settings, max_length)
        num_beams = num_beams or self.settings.get("num_beams") or 1
        search = greedy_search if num_beams == 1 else beam_search
        return search(self, self.encode(pixel_values), len(pixel_values), rules, num_beams)


def caption_images(
    folder: str | Path, pixel_values: np.ndarray, max_length: int | None = None, dtype: str = "fp32"
) -> list[list[int]]:
    """The token ids of each image's caption, see `ExportedCaptioner.generate`."""
    return ExportedCaptioner(folder, dtype).generate(pixel_values, max_length)


def open_session(path: Path):
    """An onnxruntime session on the CPU; nothing of the file is run.

    Raises:
        UserError: There is no such file, or onnxruntime refuses it: an operator it does not have, damage, weights outside the
            file's folder.
    """
    import onnxruntime

    if not path.is_file():
        raise UserError(f"{path}: no such file; export_onnx.py writes it")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # warnings are about the graph, which the exporter made
    threads = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]  # a comma stands before those of nested loops
    options.intra_op_num_threads = int(threads) if threads.isdigit() else 0  # as torch; 0 is all cores
    try:
        if Version(onnxruntime.__version__) < Version("1.32"):  # Python 3.10 has no newer one than 1.23
            import onnx

            onnx.load(path)  # refuses weights outside its folder, as onnxruntime does from 1.32 on
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common class of their own
        raise UserError(f"{path} is refused by onnxruntime: {str(error).strip().splitlines()[0]}") from error


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a generation_config.json.

    Raises:
        UserError: There is no such file, or it is no JSON object.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} is no JSON object")
    return settings


@dataclass
class Rules:
    """What a generation config says of every caption.

    start: int64 (start tokens,). eos: int64 (EOS tokens,). Lengths in tokens, start tokens included.
    """

    settings: dict[str, Any]
    start: np.ndarray
    eos: np.ndarray
    pad: int | None
    min_length: int
    max_length: int

    @classmethod
    def of(cls, settings: dict[str, Any], max_length: int | None) -> "Rules":
        start = start_token_ids(settings)
        eos = np.atleast_1d(settings.get("eos_token_id") if settings.get("eos_token_id") is not None else [])
        return cls(
            settings=settings,
            start=start,
            eos=eos.astype(np.int64),
            pad=settings.get("pad_token_id"),
            min_length=length_limit(settings, "min", len(start)) or 0,
            max_length=max_length or length_limit(settings, "max", len(start)) or len(start) + DEFAULT_NEW_TOKENS,
        )

    def apply(self, scores: np.ndarray, captions: np.ndarray) -> None:
        """Change scores, (rows, vocabulary), of the next token of captions, (rows, length), in place."""
        bias = token_bias(self.settings)
        scores[:, list(bias)] += np.array(list(bias.values()), dtype=np.float32)
        penalize_repetition(scores, captions, self.settings.get("repetition_penalty") or 1.0)
        if captions.shape[1] < self.min_length:
            scores[:, self.eos] = -np.inf
        for row, repeats in enumerate(repeated_tokens(captions, self.settings.get("no_repeat_ngram_size") or 0)):
            scores[row, repeats] = -np.inf
        bad = [ids[0] for ids in self.settings.get("bad_words_ids") or [] if len(ids) == 1]
        scores[:, [token for token in bad if token not in self.eos]] = -np.inf
        scores[:, self.settings.get("suppress_tokens") or []] = -np.inf


def greedy_search(model: ExportedCaptioner, image: dict, num_images: int, rules: Rules, _: int = 1) -> list[list[int]]:
    """The most probable token at each step."""
    pad = rules.pad if rules.pad is not None else next(iter(rules.eos.tolist()), 0)  # as `generate()`: the first EOS
    captions = tokens = np.tile(rules.start, (num_images, 1))  # (batch, start tokens)
    state, position, ended = model.first_state(num_images), 0, np.zeros(num_images, dtype=bool)
    while captions.shape[1] < rules.max_length and not ended.all():
        logits, state = model.step(tokens, position, image, state)
        position += tokens.shape[1]
        rules.apply(logits, captions)
        tokens = np.where(ended, pad, logits.argmax(-1))[:, None]  # (batch, 1)
        ended |= np.isin(tokens[:, 0], rules.eos)
        captions = np.concatenate([captions, tokens], axis=1)
    return captions[:, len(rules.start) :].tolist()


@dataclass
class Beams:
    """Captions of each image, the best first: tokens (batch, beams, length), scores (batch, beams), ended (batch, beams).

    lengths: int64 (batch, beams), tokens generated, of captions that have ended.
    """

    tokens: np.ndarray
    scores: np.ndarray
    ended: np.ndarray
    lengths: np.ndarray

    def best(self, scores: np.ndarray, number: int) -> tuple["Beams", np.ndarray]:
        """The `number` best by these scores, and their places, (batch, number)."""
        places = np.argsort(-scores, axis=1, kind="stable")[:, :number]
        chosen = Beams(
            np.take_along_axis(self.tokens, places[..., None], axis=1),
            *(np.take_along_axis(values, places, axis=1) for values in (scores, self.ended, self.lengths)),
        )
        return chosen, places

    def joined(self, others: "Beams") -> "Beams":
        pairs = ((getattr(self, name), getattr(others, name)) for name in ("tokens", "scores", "ended", "lengths"))
        return Beams(*(np.concatenate(pair, axis=1) for pair in pairs))


def beam_search(
    model: ExportedCaptioner, image: dict, num_images: int, rules: Rules, num_beams: int
) -> list[list[int]]:
    """Beam search as transformers 5.24's `generate()` has it, of which the best caption is returned."""
    num_start, settings = len(rules.start), rules.settings
    penalty = settings["length_penalty"] if settings.get("length_penalty") is not None else 1.0
    early_stopping = settings.get("early_stopping") or False
    # After the end of a caption: `generate()` takes EOS also where the padding token is 0.
    fill = rules.pad or (rules.eos[0] if len(rules.eos) else -1)
    image = {name: value.repeat(num_beams, axis=0) for name, value in image.items()}
    tokens = np.full((num_images, num_beams, rules.max_length), fill)
    tokens[..., :num_start] = rules.start
    shape = (num_images, num_beams)
    lowest, no_length = np.full(shape, LOWEST), np.zeros(shape, dtype=np.int64)
    first_alone = np.where(np.arange(num_beams) > 0, LOWEST, np.float32(0))  # else all beams would be the same
    running = Beams(tokens, np.tile(first_alone, (num_images, 1)), np.zeros(shape, dtype=bool), no_length)
    finished = Beams(tokens.copy(), lowest, np.zeros(shape, dtype=bool), no_length)
    improvable = np.ones((num_images, 1), dtype=bool)
    state, fresh = model.first_state(num_images * num_beams), slice(0, num_start)
    for length in range(num_start, rules.max_length):
        flat = running.tokens[..., :length].reshape(num_images * num_beams, length)
        logits, state = model.step(flat[:, fresh], fresh.start, image, state)
        continued, parents = continuations(running, logits, flat, rules)
        running, places = continued.best(continued.scores + continued.ended * LOWEST, num_beams)
        rows = np.take_along_axis(parents, places, axis=1) + np.arange(num_images)[:, None] * num_beams
        state = model.select(state, rows.ravel())
        finished = with_ended(finished, continued, improvable, early_stopping is True, penalty)
        longest = rules.max_length if early_stopping == "never" and penalty > 0 else length + 1
        possible = running.scores[:, :1] / (longest - num_start) ** penalty
        worst = np.where(finished.ended, finished.scores.min(axis=1, keepdims=True), LOWEST)
        improvable &= (possible > worst).any(axis=1, keepdims=True)
        full = early_stopping is True and finished.ended.all()
        if not improvable.any() or full or continued.ended.all():
            break
        fresh = slice(length, length + 1)
    longest = finished.lengths[:, 0].max()
    return finished.tokens[:, 0, num_start : num_start + longest].tolist()


def continuations(running: Beams, logits: np.ndarray, flat: np.ndarray, rules: Rules) -> tuple[Beams, np.ndarray]:
    """The best captions that are one token longer, enough for all beams to go on, and the beams that they continue.

    Args:
        running: Captions so far.
        logits, flat: Logits, (batch x beams, vocabulary), after the captions so far, (batch x beams, length).
    """
    num_images, num_beams = running.scores.shape
    length, vocabulary = flat.shape[1], logits.shape[1]
    scores = log_softmax(logits)
    rules.apply(scores, flat)
    scores = (scores.reshape(num_images, num_beams, vocabulary) + running.scores[..., None]).reshape(num_images, -1)
    number = max(2, 1 + len(rules.eos)) * num_beams
    places = np.argsort(-scores, axis=1, kind="stable")[:, :number]  # (batch, number)
    parents, ids = places // vocabulary, places % vocabulary
    tokens = np.take_along_axis(running.tokens, parents[..., None], axis=1)
    tokens[..., length] = ids
    ended = np.isin(ids, rules.eos) | (length + 1 >= rules.max_length)
    lengths = np.full_like(parents, length + 1 - len(rules.start))
    return Beams(tokens, np.take_along_axis(scores, places, axis=1), ended, lengths), parents


def with_ended(finished: Beams, continued: Beams, improvable: np.ndarray, stops_full: bool, penalty: float) -> Beams:
    """The best captions that have ended, those included that end now and are among the first of all."""
    num_beams = finished.scores.shape[1]
    ends_now = continued.ended & (np.arange(continued.ended.shape[1]) < num_beams)
    scores = continued.scores / continued.lengths.astype(np.float32) ** penalty
    if stops_full:
        scores = scores + finished.ended.all(axis=1, keepdims=True) * LOWEST
    scores = (scores + ~improvable * LOWEST + ~ends_now * LOWEST).astype(np.float32)
    joined = finished.joined(Beams(continued.tokens, scores, ends_now, continued.lengths))
    return joined.best(joined.scores, num_beams)[0]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def start_token_ids(settings: dict[str, Any]) -> np.ndarray:
    """The token ids that every caption starts from: a start token, and a prompt's behind it, which make a list in a list."""
    start = settings.get("decoder_start_token_id")
    return np.atleast_1d(np.squeeze(settings["bos_token_id"] if start is None else start))


def length_limit(settings: dict[str, Any], kind: str, num_start: int) -> int | None:
    """Tokens of a caption, start tokens included, at least ("min") or at most ("max"); None where nothing limits them."""
    new_tokens = settings.get(f"{kind}_new_tokens")  # takes precedence
    return settings.get(f"{kind}_length") if new_tokens is None else new_tokens + num_start


def token_bias(settings: dict[str, Any]) -> dict[int, float]:
    """What is added to the logits of single tokens."""
    return {ids[0]: bias for ids, bias in settings.get("sequence_bias") or [] if len(ids) == 1}


def penalize_repetition(logits: np.ndarray, captions: np.ndarray, penalty: float) -> None:
    """Scale the logits, (batch, vocabulary), of the tokens in captions, (batch, length), away from 0 or to it, in place."""
    seen = np.take_along_axis(logits, captions, axis=1)
    np.put_along_axis(logits, captions, np.where(seen < 0, seen * penalty, seen / penalty), axis=1)


def repeated_tokens(captions: np.ndarray, size: int) -> list[list[int]]:
    """For each caption so far, (batch, length), the tokens that would complete an n-gram of `size` which it has already."""
    if not size or captions.shape[1] < size:
        return []
    ngrams = np.lib.stride_tricks.sliding_window_view(captions, size, axis=1)  # (batch, ngrams, size)
    last = captions[:, None, captions.shape[1] - size + 1 :]  # (batch, 1, size - 1)
    known = (ngrams[..., :-1] == last).all(-1)  # (batch, ngrams)
    return [row[same, -1].tolist() for row, same in zip(ngrams, known, strict=True)]
