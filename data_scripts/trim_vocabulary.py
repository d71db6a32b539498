"""Trim a decoder's vocabulary to the tokens of the training captions: GPT-2's 50,257 tokens dominate a small decoder's compute."""

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from system.errors import UserError

TEXTS_AT_ONCE = 10_000


def trim_tokenizer(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]
) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """Keep the tokens of `texts`, the intermediate tokens of BPE's merges, the 256 bytes and all added tokens.

    BPE applies the earliest learned merge first. All merges used in `texts` are kept and no others compete, so `texts` are
    tokenized as before; other texts are split into more and shorter tokens, down to single bytes.

    Returns:
        The trimmed tokenizer, and for each new token ID the old one, ascending: the rows of the decoder's embeddings to keep.

    Raises:
        UserError: The tokenizer is not a byte-level BPE.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"model": {"type": None}}
    model, alphabet = state["model"], set(pre_tokenizers.ByteLevel.alphabet())
    if model["type"] != "BPE" or model["end_of_word_suffix"] or not alphabet <= model["vocab"].keys():
        raise UserError(
            f"--trim_vocabulary: the tokenizer {tokenizer.name_or_path} is not a byte-level BPE like GPT-2's; leave the option out"
        )
    parts = defaultdict(set)
    for left, right in model["merges"]:
        parts[left + right] |= {left, right}
    used, texts = set(), iter(texts)
    while batch := list(islice(texts, TEXTS_AT_ONCE)):
        for ids in tokenizer(batch, add_special_tokens=False, split_special_tokens=True).input_ids:
            used.update(ids)
    added = [token["content"] for token in state["added_tokens"]]
    waiting = {*tokenizer.convert_ids_to_tokens(list(used)), *added, *tokenizer.all_special_tokens, *alphabet}
    kept = set()
    while waiting:
        token = waiting.pop()
        kept.add(token)
        waiting |= parts[token] - kept

    old_ids = {token: tokenizer.convert_tokens_to_ids(token) for token in kept}
    new_ids = {token: new_id for new_id, token in enumerate(sorted(kept, key=old_ids.get))}
    model["vocab"] = {token: new_ids[token] for token in model["vocab"] if token in kept}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in kept]
    for token in state["added_tokens"]:
        token["id"] = new_ids[token["content"]]
    _renumber(state["post_processor"] or {}, new_ids)
    state["padding"] = None  # holds a token ID, too; transformers sets it at each call
    return _rebuild(tokenizer, state), sorted(old_ids.values())


def _renumber(post_processor: dict, new_ids: dict[str, int]) -> None:
    """Update the IDs of the special tokens that a post-processor of any kind adds."""
    for part in post_processor.get("processors", [post_processor]):
        for special in part.get("special_tokens", {}).values():
            special["ids"] = [new_ids[token] for token in special["tokens"]]
        for name in {"cls", "sep"} & part.keys():  # pairs of token and ID
            part[name][1] = new_ids[part[name][0]]


def _rebuild(tokenizer: PreTrainedTokenizerBase, state: dict) -> PreTrainedTokenizerBase:
    """The tokenizer with another `tokenizer.json`, by way of a folder: exactly as it will be loaded."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        Path(folder, "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
        trimmed = type(tokenizer).from_pretrained(folder)
    trimmed.name_or_path = tokenizer.name_or_path
    return trimmed
