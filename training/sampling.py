"""Captions sampled from a captioner, and their probabilities.

The policy is the model's own distribution over captions, dropout off, up to its max length: samples are drawn from it with none of
the saved decoding settings but those of `SamplingConstraints`, which are part of the policy, and their probabilities are computed for
it. Were one of the two constrained and the other not, the gradient would be that of no expected reward. EOS is a token like any
other.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from modeling.caption_loss import chunk_size, hidden_states_before_head
from modeling.captioner import Captioner
from training.batches import CaptionCollator
from training.compiling import uncompiled


class SamplingConstraints(NamedTuple):
    """What has no probability under the policy, both where captions are sampled and where they are trained on.

    no_repeat_ngram_size: Size of n-grams that occur at most once in a caption; 0 allows all.
    min_length: Min number of tokens before EOS.
    """

    no_repeat_ngram_size: int = 0
    min_length: int = 0


UNCONSTRAINED = SamplingConstraints()


def share_images_by(model: PreTrainedModel) -> str:
    """How captions of an image share it in one batch, see `CaptionCollator`: the LSTM captioner by index, ViT-GPT2 packed."""
    return "pack" if hasattr(model, "decoder") else "index"


def set_sampling_mode(model: nn.Module) -> None:
    """Put the model into the mode in which it samples and is trained: dropout off, statistics fixed."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.LSTM):  # on a GPU it gives gradients in train mode alone
            module.dropout = 0.0
            module.train()


# ---- Sampling -------------------------------------------------------------------------------------------------------


def sampling_numbers(seed: int, epoch: int, images: Sequence[int], num_samples: int, length: int) -> torch.Tensor:
    """The random numbers of the samples of images, float64 (images x num_samples, length), in 0 .. 1.

    They depend on seed, epoch and image alone: not on the process, nor on what was sampled before.
    """
    draws = [np.random.default_rng([seed, epoch, image]).random((num_samples, length)) for image in images]
    return torch.from_numpy(np.concatenate(draws))


class InverseCDFSampling(LogitsProcessor):
    """Samples each token by a number between 0 and 1 and the inverse cumulative distribution, and leaves `generate()` only it.

    Args:
        numbers: float64, or float32 where the device has no float64, (rows, max length).
        first: Decoder positions before the first sampled token.
    """

    def __init__(self, numbers: torch.Tensor, first: int):
        self.numbers = numbers
        self.first = first

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        cumulative = scores.float().softmax(dim=-1).cumsum(dim=-1, dtype=self.numbers.dtype)  # (rows, vocabulary)
        number = self.numbers[:, input_ids.shape[1] - self.first, None]
        # What is rounded to 1 must not lie behind the last token there is.
        number = number.clamp(max=1 - torch.finfo(number.dtype).eps) * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, number, right=True)  # (rows, 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


@contextmanager
def plain_decoding(model: PreTrainedModel, **settings) -> Iterator[None]:
    """Let `generate()` use these settings, with nothing of the saved generation config but start, end and max length."""
    saved = model.generation_config
    names = ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id", "max_length")
    model.generation_config = GenerationConfig(**{name: getattr(saved, name) for name in names}, **settings)
    try:
        yield
    finally:
        model.generation_config = saved


@torch.no_grad()
def sample_captions(
    captioner: Captioner,
    states: torch.Tensor,
    numbers: torch.Tensor | None,
    constraints: SamplingConstraints = UNCONSTRAINED,
) -> list[list[int]]:
    """Captions of images, sampled from the policy.

    Args:
        states: Encoder output, (images, positions, size).
        numbers: float64 (images x samples, max length), see `sampling_numbers`; None for the greedy caption of each.
        constraints: Of the policy.

    Returns:
        Token ids, the samples of an image one after the other; EOS included where a caption has ended.
    """
    model, start_ids, processors = captioner.model, captioner.start_token_ids, LogitsProcessorList()
    num_rows = len(states) if numbers is None else len(numbers)
    rows = torch.arange(len(states), device=states.device).repeat_interleave(num_rows // len(states))
    if numbers is not None:
        dtype = torch.float32 if states.device.type == "mps" else torch.float64  # MPS has no float64
        processors.append(InverseCDFSampling(numbers.to(states.device, dtype), len(start_ids)))
    if share_images_by(model) == "index":
        # An image is encoded once for all its captions; `generate()` takes their number from the start tokens.
        starts = torch.tensor([start_ids], device=states.device).expand(num_rows, -1)
        inputs = {"encoder_outputs": (states,), "image_index": rows, "decoder_input_ids": starts}
    else:
        inputs = {"encoder_outputs": BaseModelOutput(last_hidden_state=states[rows])}
    # `generate()` counts the start tokens as well.
    min_length = constraints.min_length and constraints.min_length + len(start_ids)
    with (
        plain_decoding(model, no_repeat_ngram_size=constraints.no_repeat_ngram_size, min_length=min_length),
        uncompiled(),
    ):
        sequences = model.generate(**inputs, logits_processor=processors)
    eos = model.generation_config.eos_token_id
    return [until_eos(token_ids, eos) for token_ids in sequences[:, len(start_ids) :].tolist()]


def until_eos(token_ids: list[int], eos: int) -> list[int]:
    """A generated row up to its EOS, without the padding behind."""
    return token_ids[: token_ids.index(eos) + 1] if eos in token_ids else token_ids


# ---- Probabilities --------------------------------------------------------------------------------------------------


def teacher_forcing(
    captions: Sequence[list[int]], image_index: Sequence[int], start_ids: list[int], share: str
) -> dict[str, torch.Tensor]:
    """Captions of images in one batch, in which each token is the target of those before it.

    Args:
        captions: Token ids, EOS included where there is one.
        image_index: Of each caption, its image among those of the batch.
        start_ids: Tokens that every caption starts with.
        share: See `share_images_by`.

    Returns:
        decoder_input_ids: int64 (rows, longest row), padded on the right
        labels: int64, same shape, -100 where there is no target
        caption_index: int64, same shape, the caption that a label is of
        image_index: int64 (captions,), where a caption is a row; or decoder_position_ids, where an image is one
    """
    no_target = [-100] * (len(start_ids) - 1)
    rows = [
        {
            "decoder_input_ids": [*start_ids, *ids[:-1]],
            "labels": [*no_target, *ids],
            "caption_index": [place] * (len(no_target) + len(ids)),
        }
        for place, ids in enumerate(captions)
    ]
    shared = {"image_index": torch.tensor(image_index)}
    if share == "pack":
        rows, shared = CaptionCollator.pack(rows, list(image_index)), {}
    batch = {}
    for name in rows[0]:
        values = [torch.tensor(row[name]) for row in rows]
        padding = -100 if name == "labels" else 0
        batch[name] = nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding)
    return batch | shared


def caption_log_probs(
    forward: nn.Module,
    captioner: Captioner,
    states: torch.Tensor,
    captions: Sequence[list[int]],
    image_index: Sequence[int],
    constraints: Sequence[SamplingConstraints] | None = None,
) -> torch.Tensor:
    """The log probability of each caption, (captions,), in one parallel pass with teacher forcing.

    Args:
        forward: The model, or what Accelerate has wrapped it in.
        captioner: With the model itself.
        states: Encoder output, (images, positions, size).
        captions, image_index: See `teacher_forcing`.
        constraints: Of the policy, for each caption; none where None.
    """
    model, start_ids = captioner.model, captioner.start_token_ids
    batch = teacher_forcing(captions, image_index, start_ids, share_images_by(model))
    batch = {name: values.to(states.device) for name, values in batch.items()}
    labels, caption_index = batch.pop("labels"), batch.pop("caption_index")
    outputs = BaseModelOutput(last_hidden_state=states)
    hidden, head = hidden_states_before_head(forward, model, encoder_outputs=outputs, **batch)
    has_label = labels != -100
    # The tokens of a row stand in the order of its captions, and the rows in that of the images.
    order = caption_index[has_label].unique_consecutive().tolist()
    eos, constraints = model.generation_config.eos_token_id, constraints or [UNCONSTRAINED] * len(captions)
    banned = [tokens for i in order for tokens in banned_tokens(captions[i], start_ids, eos, constraints[i])]
    log_probs = token_log_probs(hidden[has_label], labels[has_label], head, banned)
    return log_probs.new_zeros(len(captions)).index_add(0, caption_index[has_label], log_probs)


def banned_tokens(
    token_ids: list[int], start_ids: list[int], eos: int, constraints: SamplingConstraints
) -> list[list[int]]:
    """For each token of a caption, those without probability in its place: they would repeat an n-gram, or end it too early."""
    banned = [[eos] if place < constraints.min_length else [] for place in range(len(token_ids))]
    size = constraints.no_repeat_ngram_size
    if not size:
        return banned
    sequence, first, followers = [*start_ids, *token_ids], len(start_ids), defaultdict(list)
    for place in range(len(sequence)):
        if place >= size:  # the n-gram that ends before this place
            followers[tuple(sequence[place - size : place - 1])].append(sequence[place - 1])
        if place >= max(first, size - 1):
            banned[place - first] += followers.get(tuple(sequence[place - size + 1 : place]), [])
    return banned


def token_log_probs(
    hidden: torch.Tensor, labels: torch.Tensor, head: nn.Module, banned: Sequence[list[int]]
) -> torch.Tensor:
    """The log probability of each token, (tokens,), computed in chunks.

    Where the logits do not fit at once, they are computed a second time for the gradient. (`linear_cross_entropy` of torch gives the
    same without `banned`.)

    Args:
        hidden: (tokens, hidden size).
        labels: int64 (tokens,).
        head: The output layer.
        banned: For each token, those without probability in its place.
    """
    row = torch.tensor([row for row, tokens in enumerate(banned) for _ in tokens], dtype=torch.int64)
    column = torch.tensor([token for tokens in banned for token in tokens], dtype=torch.int64)

    def of_chunk(hidden, labels, row, column):
        logits = head(hidden).float()
        logits = logits.index_put((row, column), logits.new_tensor(-torch.inf)) if len(row) else logits
        return -nn.functional.cross_entropy(logits, labels, reduction="none")

    size = chunk_size(len(hidden), head.out_features, hidden.device)
    if len(hidden) <= size:
        return of_chunk(hidden, labels, row.to(hidden.device), column.to(hidden.device))
    chunks = []
    for start in range(0, len(hidden), size):
        here = (row >= start) & (row < start + size)
        places = ((row[here] - start).to(hidden.device), column[here].to(hidden.device))
        part = slice(start, start + size)
        chunks.append(checkpoint(of_chunk, hidden[part], labels[part], *places, use_reentrant=False))
    return torch.cat(chunks)
