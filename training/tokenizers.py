"""The tokenizer of a run: loaded, or trained on its captions by one process for all."""

import logging
from collections.abc import Iterable
from itertools import chain, islice

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_scripts.augmentations import augment_caption
from data_scripts.train_tokenizer import check_special_tokens, train_tokenizer
from data_scripts.trim_vocabulary import trim_tokenizer
from modeling.processing import has_vocabulary
from system.errors import UserError

logger = logging.getLogger(__name__)


def load_or_train_tokenizer(
    name_or_path: str | None, training_captions: Iterable[str], vocab_size: int, accelerator: Accelerator
) -> PreTrainedTokenizerBase:
    """The tokenizer that is named, or one of `vocab_size` tokens trained on the training captions.

    Raises:
        UserError: It has no vocabulary, no start or no end token, or `vocab_size` is too small for the captions' characters.
    """
    if name_or_path:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        if not has_vocabulary(tokenizer):
            raise UserError(f"{name_or_path}: its tokenizer has no vocabulary, the files of a tokenizer are missing")
        _warn_of_changed_captions(tokenizer, training_captions)
    else:
        trained = [train_tokenizer(training_captions, vocab_size) if accelerator.is_main_process else None]
        tokenizer = broadcast_object_list(trained)[0]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # as with GPT-2; labels are masked by position, so EOS stays a target
    check_special_tokens(tokenizer)
    return tokenizer


def trimmed_to_captions(
    tokenizer: PreTrainedTokenizerBase, training_captions: Iterable[str], prompt: str, num_augmentations: int
) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """The tokenizer with the tokens alone that the captions and the prompt use, and the ids that these have now."""
    blank = " " if prompt else ""  # as `CaptionPairs` puts it
    flips = range(min(num_augmentations, 2))
    texts = (blank + augment_caption(caption, flip) for flip in flips for caption in training_captions)
    num_tokens = len(tokenizer)
    tokenizer, token_ids = trim_tokenizer(tokenizer, chain(texts, [prompt]))
    logger.info(f"Vocabulary trimmed to {len(tokenizer):,} of {num_tokens:,} tokens.")
    return tokenizer, token_ids


def _warn_of_changed_captions(tokenizer: PreTrainedTokenizerBase, captions: Iterable[str]) -> None:
    """Warn where a tokenizer's normalization or unknown tokens change captions, since references stay as they are written."""
    sample = list(islice(captions, 1000))
    if not sample:
        return
    decoded = tokenizer.batch_decode(tokenizer(sample, add_special_tokens=False).input_ids, skip_special_tokens=True)
    changed = [
        (caption, text)
        for caption, text in zip(sample, decoded, strict=True)
        if "".join(caption.split()) != "".join(text.split())  # blanks may be set otherwise
    ]
    if changed:
        caption, text = changed[0]
        logger.warning(
            f"The tokenizer {tokenizer.name_or_path} changes {len(changed):,} of the first {len(sample):,} training captions, "
            f"such as {caption[:80]!r} to {text[:80]!r}: captions are generated in its form and scored against references as written."
        )
