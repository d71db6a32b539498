"""Self-critical sequence training: captions that a captioner samples and that beat their like become more likely.

Rennie et al., 2017 (https://arxiv.org/abs/1612.00563), with the baseline of Luo, 2020 (https://arxiv.org/abs/2003.09971).

The policy is the model's own distribution over captions, dropout off, up to its longest length: samples are drawn from it as it
is, with none of the saved rules of decoding but those of `SamplingConstraints`, which are part of the policy, and their probabilities are
recomputed for it. Were one of the two done under a rule and the other not, the gradient would be that of no expected reward.
EOS is a token like any other.
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

from data_scripts.augmentations import augment_caption, augmentation_in_epoch
from modeling.caption_loss import tokens_at_once
from modeling.captioner import start_token_ids
from modeling.vit_gpt2 import hidden_states_as_logits
from training.batches import CaptionCollator


def shares_by(model: PreTrainedModel) -> str:
    """How captions of an image share it in one batch, as `CaptionCollator` names it: the LSTM captioner by index, B packed."""
    return "pack" if hasattr(model, "decoder") else "index"


class SamplingConstraints(NamedTuple):
    """What the policy never says: what has no probability, both where captions are sampled and where they are learned from.

    no_repeat_ngram_size: Runs of so many tokens are not said twice; 0 allows all.
    min_length: Tokens before EOS, at least.
    """

    no_repeat_ngram_size: int = 0
    min_length: int = 0


UNCONSTRAINED = SamplingConstraints()


def set_sampling_mode(model: PreTrainedModel) -> None:
    """Put the model in the state in which it samples and learns: dropout off, statistics fixed."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.LSTM):  # on a GPU it gives gradients in train mode alone
            module.dropout = 0.0
            module.train()


# What is told of a batch: sums over its samples of the reward, the nats between policy and starting model, tokens with EOS, ends;
# their number; and the loss, which says nothing but whether it is a number.
METRICS = ("reward", "kl", "tokens", "ended", "samples", "loss")


# ---- Sampling -------------------------------------------------------------------------------------------------------


def sampling_numbers(seed: int, epoch: int, images: Sequence[int], num_samples: int, length: int) -> torch.Tensor:
    """What decides on the samples of images, float64 (images x num_samples, length), in 0 .. 1.

    It hangs on seed, epoch and image alone: not on the process, nor on what was sampled before.
    """
    draws = [np.random.default_rng([seed, epoch, image]).random((num_samples, length)) for image in images]
    return torch.from_numpy(np.concatenate(draws))


class InverseCDFSampling(LogitsProcessor):
    """Draws each token by a number between 0 and 1 (the inverse of the cumulative distribution), and leaves `generate()` only that.

    Args:
        numbers: float64, or float32 where the device has no float64, (rows, longest caption).
        first: Decoder positions before the first drawn token.
    """

    def __init__(self, numbers: torch.Tensor, first: int):
        self.numbers = numbers
        self.first = first

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        cumulative = scores.float().softmax(dim=-1).cumsum(dim=-1, dtype=self.numbers.dtype)  # (rows, vocabulary)
        number = self.numbers[:, input_ids.shape[1] - self.first, None]
        # What is rounded to 1 must not fall behind the last token there is.
        number = number.clamp(max=1 - torch.finfo(number.dtype).eps) * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, number, right=True)  # (rows, 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


@contextmanager
def dropout(model: PreTrainedModel, share: float) -> Iterator[None]:
    """Zero such a share of the values that pass the model's dropout layers; 0 leaves it as it is."""
    layers = [module for module in model.modules() if share and isinstance(module, nn.Dropout)]
    saved = [(layer.p, layer.training) for layer in layers]
    for layer in layers:
        layer.p, layer.training = share, True
    try:
        yield
    finally:
        for layer, state in zip(layers, saved, strict=True):
            layer.p, layer.training = state


@contextmanager
def plain_decoding(model: PreTrainedModel, **settings) -> Iterator[None]:
    """Let `generate()` do what `settings` say, with nothing of the saved generation config but start, end and length."""
    saved = model.generation_config
    names = ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id", "max_length")
    model.generation_config = GenerationConfig(**{name: getattr(saved, name) for name in names}, **settings)
    try:
        yield
    finally:
        model.generation_config = saved


@torch.no_grad()
def sample_captions(
    model: PreTrainedModel,
    states: torch.Tensor,
    numbers: torch.Tensor | None,
    rules: SamplingConstraints = UNCONSTRAINED,
) -> list[list[int]]:
    """Captions of images as the policy makes them.

    Args:
        states: What the encoder says, (images, positions, size).
        numbers: float64 (images x samples, longest caption), see `sampling_numbers`; None for the greedy caption of each.
        rules: Of the policy.

    Returns:
        Token ids, those of one image after those of the other; EOS stands behind a caption that came to its end.
    """
    start_ids, processors = start_token_ids(model), LogitsProcessorList()
    num_rows = len(states) if numbers is None else len(numbers)
    rows = torch.arange(len(states), device=states.device).repeat_interleave(num_rows // len(states))
    if numbers is not None:
        dtype = torch.float32 if states.device.type == "mps" else torch.float64  # Apple's has no float64
        processors.append(InverseCDFSampling(numbers.to(states.device, dtype), len(start_ids)))
    if shares_by(model) == "index":
        # An image is read once for all its captions; `generate()` takes their number from the starts.
        starts = torch.tensor([start_ids], device=states.device).expand(num_rows, -1)
        inputs = {"encoder_outputs": (states,), "image_index": rows, "decoder_input_ids": starts}
    else:
        inputs = {"encoder_outputs": BaseModelOutput(last_hidden_state=states[rows])}
    shortest = rules.min_length and rules.min_length + len(start_ids)  # `generate()` counts those as well
    with plain_decoding(model, no_repeat_ngram_size=rules.no_repeat_ngram_size, min_length=shortest):
        sequences = model.generate(**inputs, logits_processor=processors)
    return [until_end(words, model.generation_config.eos_token_id) for words in sequences[:, len(start_ids) :].tolist()]


def until_end(token_ids: list[int], eos: int) -> list[int]:
    """A generated row up to its EOS, without the padding behind."""
    return token_ids[: token_ids.index(eos) + 1] if eos in token_ids else token_ids


# ---- Probabilities --------------------------------------------------------------------------------------------------


def teacher_forcing(
    captions: Sequence[list[int]], image_index: Sequence[int], start_ids: list[int], share: str
) -> dict[str, torch.Tensor]:
    """Captions of images in one batch, in which each token has to say the next.

    Args:
        captions: Token ids, EOS included where there is one.
        image_index: Of each caption, its image among those of the batch.
        start_ids: What every caption starts from.
        share: See `shares_by`.

    Returns:
        decoder_input_ids: int64 (rows, longest row), padded on the right
        labels: int64, likewise, -100 where nothing was said
        caption_index: int64, likewise, the caption that a label is of
        image_index: int64 (captions,), where a caption is a row; or decoder_position_ids, where an image is one
    """
    unsaid = [-100] * (len(start_ids) - 1)
    rows = [
        {
            "decoder_input_ids": [*start_ids, *ids[:-1]],
            "labels": [*unsaid, *ids],
            "caption_index": [place] * (len(unsaid) + len(ids)),
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


def last_states(forward: nn.Module, model: PreTrainedModel, **inputs) -> tuple[torch.Tensor, nn.Linear]:
    """What the last linear layer reads, (rows, length, hidden size), and the layer.

    Args:
        forward: The model, or what Accelerate has made of it.
    """
    with hidden_states_as_logits(model) as head:
        # With a cache, transformers lets packed captions see each other.
        return forward(**inputs, use_cache=False).logits, head


def caption_log_probs(
    forward: nn.Module,
    model: PreTrainedModel,
    states: torch.Tensor,
    captions: Sequence[list[int]],
    image_index: Sequence[int],
    rules: Sequence[SamplingConstraints] | None = None,
) -> torch.Tensor:
    """The logarithm of each caption's probability, (captions,), in one parallel pass with teacher forcing.

    Args:
        forward, model: See `last_states`.
        states: What the encoder says, (images, positions, size).
        captions, image_index: See `teacher_forcing`.
        rules: Of the policy, for each caption; none where None.
    """
    start_ids = start_token_ids(model)
    batch = teacher_forcing(captions, image_index, start_ids, shares_by(model))
    batch = {name: values.to(states.device) for name, values in batch.items()}
    labels, caption_index = batch.pop("labels"), batch.pop("caption_index")
    outputs = BaseModelOutput(last_hidden_state=states)
    hidden, head = last_states(forward, model, encoder_outputs=outputs, **batch)
    said = labels != -100
    # The tokens of a row stand in the order of its captions, and the rows in that of the images.
    order = caption_index[said].unique_consecutive().tolist()
    eos, rules = model.generation_config.eos_token_id, rules or [UNCONSTRAINED] * len(captions)
    banned = [tokens for place in order for tokens in banned_tokens(captions[place], start_ids, eos, rules[place])]
    log_probs = token_log_probs(hidden[said], labels[said], head, banned)
    return log_probs.new_zeros(len(captions)).index_add(0, caption_index[said], log_probs)


def banned_tokens(token_ids: list[int], start_ids: list[int], eos: int, rules: SamplingConstraints) -> list[list[int]]:
    """For each token of a caption, what could not stand in its place: what would have repeated a run, or ended it too early."""
    banned = [[eos] if place < rules.min_length else [] for place in range(len(token_ids))]
    size = rules.no_repeat_ngram_size
    if not size:
        return banned
    sequence, first, followers = [*start_ids, *token_ids], len(start_ids), defaultdict(list)
    for place in range(len(sequence)):
        if place >= size:  # the run that ends before this place
            followers[tuple(sequence[place - size : place - 1])].append(sequence[place - 1])
        if place >= max(first, size - 1):
            banned[place - first] += followers.get(tuple(sequence[place - size + 1 : place]), [])
    return banned


def token_log_probs(
    hidden: torch.Tensor, labels: torch.Tensor, head: nn.Linear, banned: Sequence[list[int]]
) -> torch.Tensor:
    """The logarithm of each token's probability, (tokens,), the scores of the vocabulary held for a few tokens at a time.

    Where they do not fit at once, they are computed a second time for the gradient. (`linear_cross_entropy` of torch gives the
    same without `banned`.)

    Args:
        hidden: (tokens, hidden size).
        labels: int64 (tokens,).
        head: The last linear layer.
        banned: For each token, those that have no probability in its place.
    """
    row = torch.tensor([row for row, tokens in enumerate(banned) for _ in tokens], dtype=torch.int64)
    column = torch.tensor([token for tokens in banned for token in tokens], dtype=torch.int64)

    def of_chunk(hidden, labels, row, column):
        scores = head(hidden).float()
        scores = scores.index_put((row, column), scores.new_tensor(-torch.inf)) if len(row) else scores
        return -nn.functional.cross_entropy(scores, labels, reduction="none")

    chunk_size = tokens_at_once(len(hidden), head.out_features)
    if len(hidden) <= chunk_size:
        return of_chunk(hidden, labels, row.to(hidden.device), column.to(hidden.device))
    chunks = []
    for start in range(0, len(hidden), chunk_size):
        here = (row >= start) & (row < start + chunk_size)
        places = ((row[here] - start).to(hidden.device), column[here].to(hidden.device))
        part = slice(start, start + chunk_size)
        chunks.append(checkpoint(of_chunk, hidden[part], labels[part], *places, use_reentrant=False))
    return torch.cat(chunks)


# ---- Loss -----------------------------------------------------------------------------------------------------------


def advantages(rewards: torch.Tensor, greedy: torch.Tensor | None = None) -> torch.Tensor:
    """By how much each sample beats its baseline, which does not hang on the sample itself, so that no bias comes of it.

    Args:
        rewards: float (images, samples).
        greedy: Of the greedy caption, (images,): the baseline of Rennie et al.; where None, it is the mean of the image's
            other samples, that of Luo.
    """
    if greedy is not None:
        return rewards - greedy[:, None]
    num_samples = rewards.shape[1]
    others = (rewards.sum(dim=1, keepdim=True) - rewards) / (num_samples - 1)
    return rewards - others


class SelfCritic:
    """Samples captions of a batch of images, rewards them, and gives the loss whose gradient makes the better ones likelier.

    The mean of its gradient over the samples is the gradient of `xe_weight` x cross entropy - (1 - `xe_weight`)
    x (expected reward - `kl_coef` x KL divergence from the starting model), all for whole captions: a caption of the training set
    counts as a sample does whose advantage is 1. With `dropout` it is another policy that learns than the one that samples, and
    this holds no more; a small data set is harder to learn by heart then.

    Args:
        model: The captioner that learns; its encoder does not.
        processor: Its processor.
        cider: `metrics.CiderD` of the training images' captions, which counts the end.
        options: `num_samples`, `baseline`, `bleu_weight`, `rouge_weight`, `kl_coef`, `xe_weight`, `dropout`,
            `sample_no_repeat_ngram_size`, `sample_min_length`.
        seed: Of the samples.
        start: The model it started from, where it is to stay near it.
        token_ids: Captions of each training image, and of its mirror image where there are views, for the cross entropy; an
            epoch takes one of each image.
        num_augmentations: Of the images that are sampled for; see `data_scripts.augmentations`.
    """

    def __init__(
        self, model, processor, cider, options, seed: int, start=None, token_ids=None, num_augmentations: int = 1
    ):
        self.model = model
        self.processor = processor
        self.cider = cider
        self.options = options
        self.seed = seed
        self.start = start
        self.token_ids = token_ids
        self.num_augmentations = num_augmentations
        self.rules = SamplingConstraints(options.sample_no_repeat_ngram_size, options.sample_min_length)

    def loss(self, forward: nn.Module, batch: dict, epoch: int, num_images: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of a batch, and what is told of its samples.

        Args:
            forward: The model, or what Accelerate has made of it.
            batch: `index`, the place of each image among the training images, and `pixel_values` or `encoder_outputs`.
            epoch: Decides on the samples, and on the view.
            num_images: Divisor: the images of a whole step.

        Returns:
            The loss, and sums over the samples as in `METRICS`, float64.
        """
        options, images = self.options, batch["index"].tolist()
        views = [augmentation_in_epoch(image, epoch, self.num_augmentations) for image in images]
        states = self._states(batch)
        length = self.model.generation_config.max_length - len(start_token_ids(self.model))
        numbers = sampling_numbers(self.seed, epoch, images, options.num_samples, length)
        samples = sample_captions(self.model, states, numbers, self.rules)
        of_samples = (np.repeat(values, options.num_samples) for values in (images, views))
        rewards = self.rewards(samples, *of_samples).view(len(images), -1)
        greedy = None
        if options.baseline == "greedy":
            greedy = self.rewards(sample_captions(self.model, states, None, self.rules), images, views)
            greedy = greedy.to(states.device)
        references = []
        if options.xe_weight:
            captions = [self.token_ids[view % 2][image] for image, view in zip(images, views, strict=True)]
            references = [of_image[epoch % len(of_image)] for of_image in captions]
        loss, from_start = self.loss_of(forward, states, samples, rewards.to(states.device), greedy, references)
        figures = [
            rewards.sum().item(),
            from_start,
            sum(map(len, samples)),
            sum(map(self.ended, samples)),
            len(samples),
        ]
        return loss / num_images, torch.tensor([*figures, loss.item()], dtype=torch.float64)

    def loss_of(
        self,
        forward: nn.Module,
        states: torch.Tensor,
        samples: list[list[int]],
        rewards: torch.Tensor,
        greedy: torch.Tensor | None = None,
        references: Sequence[list[int]] = (),
    ) -> tuple[torch.Tensor, float]:
        """The loss of samples that are there, summed over images, and their distance from the starting model, in nats.

        Args:
            states: What the encoder says, (images, positions, size).
            samples: Token ids, as many of each image.
            rewards, greedy: See `advantages`.
            references: A caption of each image, where there is cross entropy.
        """
        options, rules = self.options, [self.rules] * len(samples)
        image_index = [image for image in range(len(states)) for _ in range(rewards.shape[1])]
        with dropout(self.model, options.dropout):
            log_probs = caption_log_probs(
                forward,
                self.model,
                states,
                [*samples, *references],
                [*image_index, *range(len(references))],
                rules + [UNCONSTRAINED] * len(references),
            )
        of_samples = log_probs[: len(samples)].view_as(rewards)
        from_start = torch.zeros_like(rewards)
        if self.start is not None:
            with torch.no_grad():
                before = caption_log_probs(self.start, self.start, states, samples, image_index, rules)
            # Its mean is the KL divergence; as a part of the reward, also what it does to later words is learned from.
            from_start = of_samples.detach() - before.view_as(rewards)
        gain = advantages(rewards - options.kl_coef * from_start, greedy)
        loss = -(gain * of_samples).sum() / rewards.shape[1]
        if references:
            share = options.xe_weight
            loss = (1 - share) * loss - share * log_probs[len(samples) :].sum()
        return loss, from_start.sum().item()

    def rewards(self, captions: list[list[int]], images: Sequence[int], views: Sequence[int]) -> torch.Tensor:
        """CIDEr-D of captions of training images' views, BLEU-4 and ROUGE-L by their weights, float32 (captions,)."""
        texts = self.processor.batch_decode(captions, skip_special_tokens=True)
        # What is left in a mirror image is right in the image that the references tell of.
        texts = [augment_caption(text, view) for text, view in zip(texts, views, strict=True)]
        cider, bleu_4, rouge_l = self.cider.reward(texts, [self.ended(caption) for caption in captions], images)
        reward = cider + self.options.bleu_weight * bleu_4 + self.options.rouge_weight * rouge_l
        return torch.tensor(reward, dtype=torch.float32)

    def ended(self, caption: list[int]) -> bool:
        return caption[-1] == self.model.generation_config.eos_token_id

    @torch.no_grad()
    def _states(self, batch: dict) -> torch.Tensor:
        """What the encoder says of each image, computed once for all its captions."""
        outputs = batch.get("encoder_outputs") or self.model.get_encoder()(batch["pixel_values"])
        return outputs.last_hidden_state
