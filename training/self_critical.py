"""Self-critical sequence training: sampled captions that are better than their baseline become more likely.

Rennie et al., 2017 (https://arxiv.org/abs/1612.00563), with the baseline of Luo, 2020 (https://arxiv.org/abs/2003.09971).
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from data_scripts.augmentations import augment_caption, augmentation_in_epoch
from modeling.captioner import Captioner
from system.errors import UserError
from training.batches import CaptionPairs
from training.fine_tuning import LSTM, VIT_GPT2, check_start
from training.sampling import (
    UNCONSTRAINED,
    SamplingConstraints,
    caption_log_probs,
    sample_captions,
    sampling_numbers,
)

RARE = 1 / 1000  # of all tokens: below it, a token is rare


# ---- The captioner to start from ------------------------------------------------------------------------------------


def check_scst_start(name: str, output_dir: str | os.PathLike) -> None:
    """Refuse a captioner that train_scst.py does not fine-tune, see `check_start`.

    Raises:
        UserError: As `check_start`, or its decoder is no GPT-2.
    """
    decoder = getattr(check_start(name, output_dir, (LSTM, VIT_GPT2)), "decoder", None)
    if decoder is not None and decoder.model_type != "gpt2":
        raise UserError(
            f"--model_name_or_path {name} has a decoder of the kind {decoder.model_type}: give an LSTM captioner, or a ViT-GPT2 with "
            "a GPT-2"
        )


def load_start(name: str) -> Captioner:
    """The captioner to fine-tune, its encoder frozen.

    Raises:
        UserError: It cannot be loaded.
    """
    captioner = Captioner.load(name)
    captioner.encoder.requires_grad_(False)
    return captioner


def set_decoding(captioner: Captioner, args, captions: CaptionPairs, sample_min_length: int = 0) -> None:
    """Put the decoding options that are given into the generation config; the others stay as they were saved.

    Raises:
        UserError: Min length, of captions or samples, exceeds max length.
    """
    settings, config = args.settings(), captioner.model.generation_config
    if settings["max_length"] is None and config.max_length is None:
        settings = args.within(captions.lengths, captioner.max_caption_tokens)
    captioner.set_decoding(**settings)
    if args.logit_adjustment_tau is not None:
        special_ids = captioner.tokenizer.all_special_ids
        config.sequence_bias = logit_adjustments(captions.token_ids.ids, args.logit_adjustment_tau, special_ids) or None
    longest = config.max_length - len(captioner.start_token_ids)
    if sample_min_length > longest:
        raise UserError(
            f"--sample_min_length {sample_min_length} exceeds the max length of {longest} tokens: give a lower "
            "--sample_min_length or a higher --max_length"
        )


def logit_adjustments(token_ids: np.ndarray, tau: float, special_ids: Sequence[int]) -> list[list]:
    """Logit adjustments of rare tokens: self-critical training makes them rarer, since they are seldom sampled (Honda et al., 2023,
    https://arxiv.org/abs/2212.03230).

    A token that is a fraction p of all gains `tau` * log(RARE / p) nats: the logit adjustment of Menon et al. (2021,
    https://arxiv.org/abs/2007.07314), for rare tokens alone.

    Args:
        token_ids: Of all training captions, one after the other, int32 (tokens,).
        tau: Scale of the adjustment.
        special_ids: Tokens left as they are, EOS among them.

    Returns:
        `sequence_bias` of a generation config: [[token], nats] of each that gains something.
    """
    counts = np.zeros(0, dtype=np.int64)
    for start in range(0, len(token_ids), 2**20):
        here = np.bincount(token_ids[start : start + 2**20], minlength=len(counts))
        counts = here + np.pad(counts, (0, len(here) - len(counts)))
    rare = RARE * counts.sum()
    return [
        [[token], round(tau * math.log(rare / counts[token]), 3)]
        for token in np.flatnonzero((counts > 0) & (counts < rare)).tolist()
        if tau and token not in special_ids
    ]


# ---- Loss -----------------------------------------------------------------------------------------------------------


def advantages(rewards: torch.Tensor, greedy: torch.Tensor | None = None) -> torch.Tensor:
    """Rewards minus their baseline, which does not depend on the sample itself, so that the gradient has no bias.

    Args:
        rewards: float (images, samples).
        greedy: Of the greedy caption, (images,): the baseline of Rennie et al.; where None, it is the mean of the image's other
            samples, that of Luo.
    """
    if greedy is not None:
        return rewards - greedy[:, None]
    num_samples = rewards.shape[1]
    others = (rewards.sum(dim=1, keepdim=True) - rewards) / (num_samples - 1)
    return rewards - others


@contextmanager
def dropout(model: PreTrainedModel, rate: float) -> Iterator[None]:
    """Dropout in the decoder's layers, and in its attention under SDPA, which reads its rate; 0 leaves the model as it is."""
    # SDPA takes the rate of `attn_dropout` only where its attention module is in train mode.
    kinds = (module for module in model.modules() if isinstance(module, nn.Dropout) or hasattr(module, "attn_dropout"))
    saved = [(module, module.training, getattr(module, "p", None)) for module in kinds if rate]
    for module, _, own_rate in saved:
        module.training = True
        if own_rate is not None:
            module.p = rate
    try:
        yield
    finally:
        for module, training, own_rate in saved:
            module.training = training
            if own_rate is not None:
                module.p = own_rate


class SelfCriticalLoss:
    """Samples captions of a batch of images, rewards them, and gives the loss whose gradient makes the better ones more likely.

    The mean of its gradient over the samples is the gradient of `xe_weight` * cross entropy - (1 - `xe_weight`) * (expected reward -
    `kl_coef` * KL divergence from the starting model), all for whole captions: a caption of the training set counts as a sample
    does whose advantage is 1. With `dropout` the policy that is trained is another than the one that samples, and this holds no
    more; it regularizes small datasets.

    Args:
        captioner: The captioner that is trained; its encoder is not.
        cider: `metrics.CiderD` of the training images' captions, which counts the end.
        options: `num_samples`, `baseline`, `bleu_weight`, `rouge_weight`, `kl_coef`, `xe_weight`, `dropout`,
            `sample_no_repeat_ngram_size`, `sample_min_length`.
        seed: Of the samples.
        ref_model: The starting model, where there is a KL penalty.
        token_ids: `TokenStore` of the training captions, and of those of the mirror images where there are augmentations, for the cross
            entropy; an epoch takes one of each image.
        num_augmentations: Of the images, see `data_scripts.augmentations`.
    """

    def __init__(
        self,
        captioner: Captioner,
        cider,
        options,
        seed: int,
        ref_model=None,
        token_ids=None,
        num_augmentations: int = 1,
    ):
        self.captioner = captioner
        self.cider = cider
        self.options = options
        self.seed = seed
        self.ref = None if ref_model is None else Captioner(ref_model, captioner.processor)
        self.token_ids = token_ids
        self.num_augmentations = num_augmentations
        captioner.check_no_repeat("--sample_no_repeat_ngram_size", options.sample_no_repeat_ngram_size)
        self.constraints = SamplingConstraints(options.sample_no_repeat_ngram_size, options.sample_min_length)

    def loss(self, forward: nn.Module, batch: dict, epoch: int) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of a batch, summed over its images, and sums over its samples.

        Args:
            forward: The model, or what Accelerate has wrapped it in.
            batch: `index`, the index of each image among the training images, and `pixel_values` or `encoder_outputs`.
            epoch: Decides on the samples, and on the augmentation.

        Returns:
            The loss; and sums over the samples of the reward, the nats between policy and starting model, tokens with EOS, ends, and
            their number.
        """
        options, images = self.options, batch["index"].tolist()
        augmentations = [augmentation_in_epoch(image, epoch, self.num_augmentations) for image in images]
        states = self._encode(batch)
        length = self.captioner.model.generation_config.max_length - len(self.captioner.start_token_ids)
        numbers = sampling_numbers(self.seed, epoch, images, options.num_samples, length)
        samples = sample_captions(self.captioner, states, numbers, self.constraints)
        of_samples = (np.repeat(values, options.num_samples) for values in (images, augmentations))
        rewards = self.rewards(samples, *of_samples).view(len(images), -1)
        greedy = None
        if options.baseline == "greedy":
            captions = sample_captions(self.captioner, states, None, self.constraints)
            greedy = self.rewards(captions, images, augmentations).to(states.device)
        references = []
        if options.xe_weight:
            captions = [
                self.token_ids[flip % 2].of_row(image) for image, flip in zip(images, augmentations, strict=True)
            ]
            references = [of_image[epoch % len(of_image)] for of_image in captions]
        loss, divergence = self.loss_of(forward, states, samples, rewards.to(states.device), greedy, references)
        return loss, {
            "reward": rewards.sum().item(),
            "kl": divergence,
            "tokens": sum(map(len, samples)),
            "ended": sum(map(self.has_ended, samples)),
            "samples": len(samples),
        }

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        """Means over the samples, for the history."""
        row = {"reward": "reward", "sample_length": "tokens", "sample_ended": "ended"}
        if self.ref is not None:
            row["kl"] = "kl"
        return {name: sums[total] / sums["samples"] for name, total in row.items()}

    def loss_of(
        self,
        forward: nn.Module,
        states: torch.Tensor,
        samples: list[list[int]],
        rewards: torch.Tensor,
        greedy: torch.Tensor | None = None,
        references: Sequence[list[int]] = (),
    ) -> tuple[torch.Tensor, float]:
        """The loss of given samples, summed over images, and their divergence from the starting model, in nats.

        Args:
            states: Encoder output, (images, positions, size).
            samples: Token ids, as many of each image.
            rewards, greedy: See `advantages`.
            references: A caption of each image, where there is cross entropy.
        """
        options, constraints = self.options, [self.constraints] * len(samples)
        image_index = [image for image in range(len(states)) for _ in range(rewards.shape[1])]
        with dropout(self.captioner.model, options.dropout):
            log_probs = caption_log_probs(
                forward,
                self.captioner,
                states,
                [*samples, *references],
                [*image_index, *range(len(references))],
                constraints + [UNCONSTRAINED] * len(references),
            )
        of_samples = log_probs[: len(samples)].view_as(rewards)
        divergence = torch.zeros_like(rewards)
        if self.ref is not None:
            with torch.no_grad():
                ref_log_probs = caption_log_probs(self.ref.model, self.ref, states, samples, image_index, constraints)
            # Its mean is the KL divergence; as a part of the reward, its effect on later tokens has a gradient, too.
            divergence = of_samples.detach() - ref_log_probs.view_as(rewards)
        gain = advantages(rewards - options.kl_coef * divergence, greedy)
        loss = -(gain * of_samples).sum() / rewards.shape[1]
        if references:
            loss = (1 - options.xe_weight) * loss - options.xe_weight * log_probs[len(samples) :].sum()
        return loss, divergence.sum().item()

    def rewards(self, captions: list[list[int]], images: Sequence[int], augmentations: Sequence[int]) -> torch.Tensor:
        """CIDEr-D of captions of augmented training images, plus weighted BLEU-4 and ROUGE-L, float32 (captions,)."""
        texts = self.captioner.processor.batch_decode(captions, skip_special_tokens=True)
        # What is left in a mirror image is right in the image that the references describe.
        texts = [augment_caption(text, augmentation) for text, augmentation in zip(texts, augmentations, strict=True)]
        cider, bleu_4, rouge_l = self.cider.reward(texts, [self.has_ended(caption) for caption in captions], images)
        reward = cider + self.options.bleu_weight * bleu_4 + self.options.rouge_weight * rouge_l
        return torch.tensor(reward, dtype=torch.float32)

    def has_ended(self, caption: list[int]) -> bool:
        return caption[-1] == self.captioner.model.generation_config.eos_token_id

    @torch.no_grad()
    def _encode(self, batch: dict) -> torch.Tensor:
        """Encoder output of each image, computed once for all its captions."""
        outputs = batch.get("encoder_outputs") or self.captioner.encoder(batch["pixel_values"])
        return outputs.last_hidden_state
