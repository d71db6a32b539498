"""Captions as token ids in one flat array on disk, memory-mapped by every process: a few bytes a caption in memory.

A folder of the cache holds, for one data set, tokenizer and max length: `ids`, int32, the tokens of all captions one after the other;
`starts`, int64, where each caption begins and, last, where the last one ends; `lengths`, int32; and `rows`, int32, the row of each
caption. One process writes it, whole or not at all, while the others of its machine wait.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from data_scripts.augmentations import augment_caption
from data_scripts.caption_texts import caption_batches
from system.files import atomic_folder

FORMAT = 1  # of the files; another one is another folder
ARRAYS = {"ids": np.int32, "starts": np.int64, "lengths": np.int32, "rows": np.int32}


def _array(name: str) -> cached_property:
    """An array of the folder, memory-mapped when it is first read."""
    return cached_property(lambda store: np.load(store.folder / f"{name}.npy", mmap_mode="r"))


class TokenStore(Sequence):
    """The token ids of captions, EOS included; an item is the list of a caption's.

    Args:
        folder: What `token_store` has written.

    `lengths` are the captions' numbers of tokens, `rows` the row of each, and `num_truncated` counts those that were cut.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.num_truncated = json.loads((folder / "store.json").read_text())["num_truncated"]

    def __getstate__(self) -> dict:
        """A process that decodes images opens the files itself: a pickled memory map is a copy of all of it."""
        return {name: value for name, value in vars(self).items() if name not in ARRAYS}

    ids, starts, lengths, rows = map(_array, ARRAYS)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, caption: int) -> list[int]:
        if not 0 <= caption < len(self):
            raise IndexError(f"there is no caption {caption} among {len(self)}")
        return self.ids[self.starts[caption] : self.starts[caption + 1]].tolist()

    def of_row(self, row: int) -> list[list[int]]:
        """The captions of a row."""
        first, last = np.searchsorted(self.rows, [row, row + 1])
        return [self[caption] for caption in range(first, last)]


def token_store(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    blank: str = "",
    augmentation: int = 0,
) -> TokenStore:
    """The token ids of the captions of rows, tokenized unless they have been before.

    Args:
        rows: Rows with `captions`, known by the fingerprint that `datasets` gives them.
        max_length: Max length of a caption in tokens, EOS included; longer ones are truncated.
        blank: What stands before each caption.
        augmentation: Of the captions, see `augment_caption`.
    """
    key = repr((FORMAT, rows._fingerprint, len(rows), max_length, blank, augmentation % 2))
    digest = hashlib.sha256(f"{key} {tokenizer_digest(tokenizer)}".encode()).hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "showtell_tokens" / digest
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                _write(folder, rows, tokenizer, max_length, blank, augmentation)
    return TokenStore(folder)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of all that decides which tokens a caption has."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["truncation"] = state["padding"] = None  # of the last call
    else:
        state = tokenizer.get_vocab()
    settings = {name: value for name, value in tokenizer.init_kwargs.items() if name != "name_or_path"}
    about = [type(tokenizer).__name__, state, settings, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


def tokenize(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> tuple[list[list[int]], int]:
    """The token ids of captions, EOS last, and how many captions were cut to `max_length` tokens.

    A caption is text: what looks like a special token in it is none.
    """
    cut = None if max_length is None else max_length - 1
    options = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
    tokens = tokenizer(list(texts), **options).input_ids if texts else []
    num_truncated = 0 if cut is None else sum(len(ids) > cut for ids in tokens)
    return [[*ids[:cut], tokenizer.eos_token_id] for ids in tokens], num_truncated


def _write(folder: Path, rows: Dataset, tokenizer, max_length: int | None, blank: str, augmentation: int) -> None:
    columns: dict[str, list[np.ndarray]] = {"lengths": [], "rows": []}
    num_truncated = num_rows = 0
    with atomic_folder(folder) as (whole, scratch):
        with open(scratch / "ids", "wb") as file:
            for texts, captions_of_row in caption_batches(rows):
                texts = [blank + augment_caption(text, augmentation) for text in texts]
                tokens, cut = tokenize(texts, tokenizer, max_length)
                num_truncated += cut
                lengths = np.fromiter(map(len, tokens), dtype=np.int32, count=len(tokens))
                ids = np.fromiter(_flat(tokens), dtype=np.int32, count=int(lengths.sum(dtype=np.int64)))
                file.write(ids.tobytes())
                columns["lengths"].append(lengths)
                of_batch = np.arange(num_rows, num_rows + len(captions_of_row), dtype=np.int32)
                columns["rows"].append(np.repeat(of_batch, captions_of_row))
                num_rows += len(captions_of_row)
        arrays = {name: np.concatenate([np.empty(0, np.int32), *parts]) for name, parts in columns.items()}
        arrays["starts"] = np.concatenate(([0], np.cumsum(arrays["lengths"], dtype=np.int64)))
        for name, values in arrays.items():
            np.save(whole / f"{name}.npy", values.astype(ARRAYS[name], copy=False))
        _save_flat(scratch / "ids", whole / "ids.npy", int(arrays["starts"][-1]))
        about = {"num_truncated": num_truncated, "num_captions": len(arrays["lengths"])}
        (whole / "store.json").write_text(json.dumps(about))


def _save_flat(raw: Path, path: Path, length: int) -> None:
    """Put numpy's header before the raw int32 values of a file, in pieces."""
    with open(raw, "rb") as source, open(path, "wb") as target:
        header = {"descr": np.dtype(np.int32).str, "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(target, header)
        while piece := source.read(2**24):
            target.write(piece)


def _flat(tokens: Sequence[Sequence[int]]) -> Iterator[int]:
    return (token for ids in tokens for token in ids)
