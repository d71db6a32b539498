"""The tokenizer of a run: loaded, or trained on its captions by one process for all."""

import logging
from collections.abc import Iterable
from itertools import chain

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_scripts.augmentations import augment_caption
from data_scripts.train_tokenizer import check_special_tokens, train_tokenizer
from data_scripts.trim_vocabulary import trim_tokenizer

logger = logging.getLogger(__name__)


def load_or_train_tokenizer(
    name_or_path: str | None, training_captions: Iterable[str], vocab_size: int, accelerator: Accelerator
) -> PreTrainedTokenizerBase:
    """The tokenizer that is named, or one of `vocab_size` tokens trained on the training captions.

    Raises:
        UserError: It has no start or no end token, or `vocab_size` is too small for the captions' characters.
    """
    if name_or_path:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
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
