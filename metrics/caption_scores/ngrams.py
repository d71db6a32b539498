"""Count the n-grams of many captions at once: what BLEU and CIDEr-D are made of.

N-grams become numbers, so that numpy can sort, join and sum them: no Python loop runs over them.
"""

from typing import NamedTuple

import numpy as np

MAX_ORDER = 4
SHIFT = 32  # two numbers below 2**31 share one int64 key: (high << SHIFT) | low
LOW = (1 << SHIFT) - 1


def first_of_runs(values: np.ndarray) -> np.ndarray:
    """Where, in a sorted array, each run of equal values begins."""
    return np.flatnonzero(np.append(True, values[1:] != values[:-1])) if len(values) else np.empty(0, dtype=np.int64)


def number_values(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give the distinct values in rising order, and the place of each value among them (np.unique is 3 times slower)."""
    order = np.argsort(values)
    ordered = values[order]
    first = first_of_runs(ordered)
    number = np.empty(len(values), dtype=np.int64)
    number[order] = np.repeat(np.arange(len(first)), np.diff(first, append=len(values)))
    return ordered[first], number


class NgramCounts(NamedTuple):
    """How often each n-gram of one order stands in each caption, sorted by caption, then n-gram."""

    caption: np.ndarray
    ngram: np.ndarray
    count: np.ndarray

    def rows(self, start: int, stop: int) -> "NgramCounts":
        """Keep the captions from start up to stop, numbered from zero again."""
        first, last = np.searchsorted(self.caption, [start, stop])
        return NgramCounts(self.caption[first:last] - start, self.ngram[first:last], self.count[first:last])


def count_words(counts: list[NgramCounts], num_captions: int) -> np.ndarray:
    """The number of words of each caption, from its n-gram counts, int64 (num_captions,)."""
    return np.bincount(counts[0].caption, counts[0].count, minlength=num_captions).astype(np.int64)


class NgramIndex:
    """Numbers the n-grams, of one to four words, of a reference set; others get higher numbers, for one call.

    An n-gram is known by the number of its first n-1 words and its last word, so every order is looked up the same way.
    """

    def __init__(self) -> None:
        self.vocabulary: dict[str, int] = {}
        self.keys = [np.empty(0, dtype=np.int64) for _ in range(MAX_ORDER)]

    def learn(self, captions: list[str]) -> list[NgramCounts]:
        """Number the n-grams of these captions for good, and count them. For a fresh index."""
        return self._count(captions, learning=True)

    def count(self, captions: list[str]) -> list[NgramCounts]:
        """Count the n-grams of captions, given as words between blanks; one result per order."""
        return self._count(captions, learning=False)

    def _count(self, captions: list[str], learning: bool) -> list[NgramCounts]:
        # one flat list, not a list per caption: the garbage collector visits every living list, again and again
        caption_words, lengths = [], []
        for caption in captions:
            words_before = len(caption_words)
            caption_words += caption.split()
            lengths.append(len(caption_words) - words_before)
        words = self._word_numbers(caption_words, learning)
        owner = np.repeat(np.arange(len(captions)), lengths)
        # how many words of its caption follow each word, itself included: an n-gram starts only where n are left
        words_left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(words))

        results, prefix, start = [], words, np.arange(len(words))
        for order in range(MAX_ORDER):
            if order > 0:
                keep = words_left[start] > order
                start, prefix = start[keep], prefix[keep]
                key = (prefix << SHIFT) | words[start + order]
                if learning:
                    self.keys[order], prefix = number_values(key)
                else:
                    prefix = self._number(key, self.keys[order])
            pair = np.sort((owner[start] << SHIFT) | prefix)
            first = first_of_runs(pair)
            count = np.diff(first, append=len(pair))
            results.append(NgramCounts(pair[first] >> SHIFT, pair[first] & LOW, count))
        return results

    def _word_numbers(self, words: list[str], learning: bool) -> np.ndarray:
        numbers = self.vocabulary
        new_words = dict.fromkeys(words).keys() - numbers.keys()
        if new_words:
            numbers = numbers | {word: number for number, word in enumerate(new_words, start=len(numbers))}
        if learning:
            self.vocabulary = numbers
        return np.fromiter(map(numbers.__getitem__, words), dtype=np.int64, count=len(words))

    @staticmethod
    def _number(key: np.ndarray, known: np.ndarray) -> np.ndarray:
        """Number a key by its place among the known ones; unknown keys follow, equal ones under one number."""
        if not len(known):
            return number_values(key)[1]
        number = np.minimum(np.searchsorted(known, key), len(known) - 1)
        unknown = known[number] != key
        if unknown.any():
            number[unknown] = len(known) + number_values(key[unknown])[1]
        return number
