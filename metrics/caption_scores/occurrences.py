"""Where the n-grams of captions occur in other captions, and longest common subsequences: many captions at once, by bits.

Each word of a caption gets a mask: the places of another caption that hold the word, as bits of one number. An n-gram begins
where the masks of its words, each shifted by its place in the n-gram, agree.
"""

from collections.abc import Iterator

import numpy as np

from .ngrams import MAX_ORDER, Captions, sort_pairs

CELLS_AT_ONCE = 1 << 16  # what is looked at again and again stays in the processor's cache
SIZE_LIMITS = 16 << np.arange(32)  # of blocks; up to 64 these are the bits of numpy's types
NO_WORD = np.iinfo(np.int32).min  # stands behind the end of what captions are compared with
bit_count = getattr(np, "bitwise_count", None) or np.frompyfunc(int.bit_count, 1, 1)  # numpy 1 has no bitwise_count


def similar_sizes(sizes: np.ndarray, columns: np.ndarray | int = 1) -> Iterator[np.ndarray]:
    """Cut captions into blocks of similar size, so that little is padded: the places of those of each block.

    Args:
        sizes: The longest caption that each is compared with, itself included.
        columns: The number of captions that each is compared with.
    """
    order = np.argsort(sizes.astype(np.min_scalar_type(int(sizes.max(initial=0)))), kind="stable")  # counted, if small
    sizes, cells = sizes[order], (np.maximum(sizes, 1).astype(np.int64) * columns)[order]
    block = np.cumsum(cells) // CELLS_AT_ONCE + np.searchsorted(SIZE_LIMITS, sizes)
    return iter(np.split(order, np.flatnonzero(block[1:] != block[:-1]) + 1))


def place_columns(captions: Captions, chosen: np.ndarray, no_word: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Lay captions out side by side, a column each: words and their places, (longest, columns).

    Behind the end of a caption is `no_word` or, by default, negative numbers above `NO_WORD`, each once in a column.
    """
    lengths = captions.lengths[chosen]
    row = np.arange(int(lengths.max(initial=0)), dtype=np.int32)[:, None]
    place = row + captions.starts[chosen]
    words = captions.words.take(place, mode="clip") if place.size else np.empty(place.shape, dtype=np.int32)
    np.copyto(words, ~row if no_word is None else no_word, where=row >= lengths)
    return words, place


def word_masks(words: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each word, the places of the other caption in the same column that hold it, as bits; `MAX_ORDER` rows of zeros behind.

    The bits are those of the smallest unsigned type that has enough, or of as many numbers of 64 as it takes, lowest first:
    (numbers, rows, columns).
    """
    bits = len(others)
    if bits > 64:
        return _long_masks(words, others)
    kind = np.uint16 if bits <= 16 else np.uint32 if bits <= 32 else np.uint64
    masks = np.zeros((1, len(words) + MAX_ORDER, words.shape[1]), dtype=kind)
    for position, other in enumerate(others):
        masks[0, : len(words)] |= (words == other) * kind(1 << position)
    return masks


def _long_masks(words: np.ndarray, others: np.ndarray) -> np.ndarray:
    """As `word_masks`: the places of each word of a column are found by sorting, not by comparing all with all."""
    columns = words.shape[1]
    cells = np.concatenate((others.ravel(), words.ravel()))
    place = np.flatnonzero(cells >= 0)
    _, first, place = sort_pairs(place % columns, cells.take(place), place)
    run = np.repeat(np.arange(len(first)), np.diff(first, append=len(place)))
    in_other = place < others.size
    row = place[in_other] // columns
    of_run = np.zeros((-(-len(others) // 64), len(first)), dtype=np.uint64)
    np.bitwise_or.at(
        of_run.ravel(), row // 64 * len(first) + run[in_other], np.uint64(1) << (row % 64).astype(np.uint64)
    )
    masks = np.zeros((len(of_run), (len(words) + MAX_ORDER) * columns), dtype=np.uint64)
    masks[:, place[~in_other] - others.size] = of_run[:, run[~in_other]]
    return masks.reshape(len(masks), -1, columns)


def occurrences(masks: np.ndarray, place: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The n-grams that occur in the other caption of their column, order after order.

    Yields:
        of each, row after row: its column, its place, and how often it occurs there, int64.
    """
    numbers, rows, columns = masks.shape
    column = np.tile(np.arange(columns), rows)
    masks, place = masks.reshape(numbers, -1), place.ravel()
    at = np.flatnonzero(masks.any(axis=0))
    column, place, found = column.take(at), place.take(at), masks.take(at, axis=1)
    yield column, place, bit_count(found).sum(axis=0, dtype=np.int64)
    for order in range(1, MAX_ORDER):
        next_word = masks.take(at + order * columns, axis=1)
        found[:-1] &= next_word[:-1] >> order | next_word[1:] << (64 - order)
        found[-1] &= next_word[-1] >> order
        keep = np.flatnonzero(found.any(axis=0))
        at, column, place, found = at.take(keep), column.take(keep), place.take(keep), found.take(keep, axis=1)
        yield column, place, bit_count(found).sum(axis=0, dtype=np.int64)


def common_subsequences(masks: np.ndarray) -> np.ndarray:
    """The length of the longest common subsequence of the two captions of each column, int64 (Hyyro 2004)."""
    unmatched = np.full((len(masks), masks.shape[2]), ~masks.dtype.type(0))
    for row in range(masks.shape[1] - MAX_ORDER):
        hit = unmatched & masks[:, row]
        total = unmatched + hit
        carry = (total < hit)[:-1]
        while carry.any():
            total[1:] += carry
            carry[1:] = carry[:-1] & (total[1:-1] == 0)
            carry[:1] = False
        unmatched = total | (unmatched - hit)
    return bit_count(~unmatched).sum(axis=0, dtype=np.int64)


def own_counts(captions: Captions) -> np.ndarray:
    """How often the n-gram that begins at each word occurs in its caption, (4, words); 1 where too few words are left."""
    kind = np.min_scalar_type(int(captions.lengths.max(initial=0)))
    counts = np.ones((MAX_ORDER, len(captions.words)), dtype=kind)
    for chosen in similar_sizes(captions.lengths):
        words, place = place_columns(captions, chosen)
        masks = word_masks(words, words)
        bits = 8 * masks.itemsize
        for position in range(len(words)):  # the others alone: few n-grams occur twice
            masks[position // bits, position] &= ~masks.dtype.type(1 << position % bits)
        for of_order, (_, at, count) in zip(counts, occurrences(masks, place), strict=True):
            of_order[at] += count.astype(kind)
    return counts
