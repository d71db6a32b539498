"""Words and n-grams as numbers, many captions at once: what BLEU, ROUGE-L and CIDEr-D are computed from.

Numpy sorts, joins and sums the numbers: no Python loop runs over n-grams.
"""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from .ptb_tokenizer import BEGINS_SPAN, ENDS_SPAN, HOLDS_SPAN, split_piece, tokenize
from .tokenizers import Split

MAX_ORDER = 4
SHIFT = 32  # two numbers below 2**31 share one int64 key: (high << SHIFT) | low
CAPTIONS_AT_ONCE, LISTS_AT_ONCE = 8192, 512
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # multiplicative hashing (Knuth, TAOCP 6.4)


def first_of_runs(values: np.ndarray) -> np.ndarray:
    """Positions at which, in a sorted array, a run of equal values begins."""
    if not len(values):
        return np.empty(0, dtype=np.int64)
    return np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1])))


def ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The integers start, start + 1, ..., start + size - 1 of every range, one range after the other."""
    ends = np.cumsum(sizes, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - sizes), sizes) + np.arange(total)


class Captions(NamedTuple):
    """Tokenized captions: the numbers of all words, one caption after the other, and the number of words of each.

    coco-caption's BLEU and CIDEr split words at a no-break space, too, its ROUGE-L does not: `parts` has the parts of those.
    """

    words: np.ndarray
    lengths: np.ndarray
    parts: Mapping[int, list[int]] = MappingProxyType({})

    def ends(self) -> np.ndarray:
        """Where the words of each caption end."""
        return np.cumsum(self.lengths, dtype=np.int64)

    def positions(self) -> np.ndarray:
        """The place of each word in its caption."""
        return ranges(np.zeros(len(self.lengths), dtype=np.int64), self.lengths)

    def of(self, caption: int) -> np.ndarray:
        """The words of one caption."""
        end = int(self.lengths[: caption + 1].sum(dtype=np.int64))
        return self.words[end - self.lengths[caption] : end]

    def take(self, captions: np.ndarray) -> "Captions":
        """Choose captions by their places; they may come again."""
        lengths = self.lengths[captions]
        return Captions(self.words[ranges((self.ends() - self.lengths)[captions], lengths)], lengths, self.parts)

    def cut(self, stops: np.ndarray) -> Iterator[tuple[int, "Captions"]]:
        """The captions up to each of the stops, and the rest; each part with the place of its first caption."""
        ends, start = np.concatenate(([0], self.ends())), 0
        for stop in [*stops.tolist(), len(self.lengths)]:
            if stop > start:
                yield start, Captions(self.words[ends[start] : ends[stop]], self.lengths[start:stop], self.parts)
            start = stop

    def blocks(self, size: int) -> Iterator[tuple[int, "Captions"]]:
        """Parts of so many captions."""
        return self.cut(np.arange(size, len(self.lengths), size))

    def keys(self) -> Iterator[bytes]:
        """For each caption what equals another's exactly if they have the same words."""
        content, ends = self.words.tobytes(), (self.ends() * self.words.itemsize).tolist()
        return (content[start:end] for start, end in zip([0, *ends], ends, strict=False))

    def split_words(self) -> "Captions":
        """Split the words that hold a no-break space; the same captions if there are none."""
        if not self.parts or not len(whole := np.flatnonzero(np.isin(self.words, list(self.parts)))):
            return self
        words, size = self.words.tolist(), np.ones(len(self.words), dtype=np.int32)
        for place in reversed(whole.tolist()):
            parts = self.parts[words[place]]
            words[place : place + 1], size[place] = parts, len(parts)
        before = np.concatenate(([0], np.cumsum(size)))
        return Captions(np.array(words, dtype=np.int32), np.diff(before[self.ends()], prepend=0).astype(np.int32))

    def append_word(self, number: int, where: np.ndarray) -> "Captions":
        """Append one word to the captions for which `where` is true."""
        return Captions(np.insert(self.words, self.ends()[where], number), self.lengths + where, self.parts)


class WordIndex(dict):
    """Numbers the words of captions. As a dict: from a piece of text between blanks to the number of that piece.

    With the PTB tokenizer, the words of a piece do not depend on the pieces beside it, but for the captions that
    the flags of `split_piece` tell. So each distinct piece is split once. With another tokenizer, each caption is split as a whole and
    each word is a piece.

    Args:
        split: Another tokenizer than PTB: from captions to the words of each.
    """

    def __init__(self, split: Split | None = None) -> None:
        super().__init__()
        self.split = split
        self.words: dict[str, int] = {}
        self.parts: dict[int, list[int]] = {}
        # of each piece: where its words begin in `flat`, how many they are, and its flags
        self.first, self.size, self.flags, self.flat = array("i"), array("i"), array("b"), array("i")

    def __missing__(self, piece: str) -> int:
        words, flags = ((piece,), 0) if self.split else split_piece(piece)
        self.first.append(len(self.flat))
        self.size.append(len(words))
        self.flags.append(flags)
        for word in words:
            self.flat.append(self.words[word] if word in self.words else self.number(word))
        self[piece] = number = len(self)
        return number

    def number(self, word: str) -> int:
        number = self.words.setdefault(word, len(self.words))
        if "\xa0" in word and number not in self.parts:
            self.parts[number] = [self.number(part) for part in word.split()]
        return number

    def split_text(self, caption: str) -> tuple[str, ...]:
        """The words of one caption."""
        return tuple(self.split([caption])[0]) if self.split else tuple(tokenize(caption))

    def texts(self, words: np.ndarray) -> list[str]:
        """The words that these numbers stand for."""
        texts = list(self.words)
        return [texts[number] for number in words.tolist()]

    def encode(self, captions: Sequence[str], learn: bool) -> Captions:
        """Tokenize captions. Unless they are to be learned, words that are new have a number in this result alone."""
        num_words, num_pieces, num_flat = len(self.words), len(self), len(self.flat)
        split = self.split(captions) if self.split else captions
        parts = [
            self._encode(split[start : start + CAPTIONS_AT_ONCE]) for start in range(0, len(split), CAPTIONS_AT_ONCE)
        ]
        word_parts = dict(self.parts)
        if not learn:
            for _ in range(len(self.words) - num_words):
                self.parts.pop(self.words.popitem()[1], None)
            for _ in range(len(self) - num_pieces):
                self.popitem()
            del self.first[num_pieces:], self.size[num_pieces:], self.flags[num_pieces:], self.flat[num_flat:]
        if not parts:
            return Captions(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32))
        words, lengths = map(np.concatenate, zip(*parts, strict=True))
        return Captions(words, lengths, word_parts)

    def _encode(self, captions: Sequence[str] | Sequence[list[str]]) -> tuple[np.ndarray, np.ndarray]:
        pieces, num_pieces = [], []
        # few lists at a time: the garbage collector visits all that live, again and again
        for start in range(0, len(captions), LISTS_AT_ONCE):
            lists = captions[start : start + LISTS_AT_ONCE]
            lists = lists if self.split else list(map(str.split, lists))
            sizes = list(map(len, lists))
            num_pieces += sizes
            numbers = map(self.__getitem__, chain.from_iterable(lists))
            pieces.append(np.fromiter(numbers, dtype=np.int32, count=sum(sizes)))
        piece, ends = np.concatenate(pieces), np.cumsum(num_pieces)
        size = np.array(self.size, dtype=np.int32)[piece]
        first = np.array(self.first, dtype=np.int32)[piece]
        words = np.array(self.flat, dtype=np.int32)[ranges(first, size)]
        words_before = np.concatenate(([0], np.cumsum(size)))
        lengths = np.diff(words_before[ends], prepend=0).astype(np.int32)
        if self.split:
            return words, lengths

        flags = np.array(self.flags, dtype=np.int8)[piece]
        spans = (flags & HOLDS_SPAN) != 0
        spans[:-1] |= (flags[:-1] & ENDS_SPAN != 0) & (flags[1:] & BEGINS_SPAN != 0)
        if spans.any():
            words, lengths = self._encode_whole(captions, words, lengths, np.flatnonzero(spans), ends)
        return words, lengths

    def _encode_whole(self, captions, words, lengths, spans, ends) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize again, as a whole, the captions in which a token may reach over a blank."""
        word_ends = np.cumsum(lengths)
        parts, done = [], 0
        for caption in np.unique(np.searchsorted(ends, spans, side="right")).tolist():
            parts.append(words[done : word_ends[caption] - lengths[caption]])
            done = word_ends[caption]
            whole = [self.number(word) for word in tokenize(captions[caption])]
            parts.append(np.array(whole, dtype=np.int32))
            lengths[caption] = len(whole)
        return np.concatenate([*parts, words[done:]]), lengths


class KeyNumbers:
    """Numbers int64 keys 0, 1, 2, ...: a hash table with linear probing that takes all keys of an array at once."""

    def __init__(self) -> None:
        self.size = 0
        self.keys = np.zeros(1, dtype=np.int64)
        self.slots = np.full(2, -1, dtype=np.int32)

    def number(self, keys: np.ndarray, learn: bool) -> np.ndarray:
        """The number of each key, int32. Unless new keys are learned, each has one beyond the known, in this result alone."""
        if learn:
            self.reserve(len(keys))
        slot = self._slot(keys)
        numbers = held = self._held(keys, slot, learn)
        wanted, place = keys, None
        # where a slot holds another key, the next slot is looked at
        while len(others := np.flatnonzero((self.keys[held] != wanted) & (held >= 0))):
            wanted, slot = wanted[others], (slot[others] + 1) & (len(self.slots) - 1)
            place = others if place is None else place[others]
            held = self._held(wanted, slot, learn)
            numbers[place] = held
        if not learn and len(unknown := np.flatnonzero(numbers < 0)):
            numbers[unknown] = self.size + np.unique(keys[unknown], return_inverse=True)[1]
        return numbers

    def _held(self, keys: np.ndarray, slot: np.ndarray, learn: bool) -> np.ndarray:
        """The numbers in slots, -1 in free ones; to learn, keys take the free ones first."""
        held = self.slots[slot]
        if learn and len(free := np.flatnonzero(held < 0)):
            wanted = slot[free]
            self.slots[wanted] = free  # of several keys that want a slot, the last gets it
            first = np.flatnonzero(self.slots[wanted] == free)
            self.slots[wanted[first]] = np.arange(self.size, self.size + len(first))
            self.keys[self.size : self.size + len(first)] = keys[free[first]]
            self.size += len(first)
            held[free] = self.slots[wanted]
        return held

    def _slot(self, keys: np.ndarray) -> np.ndarray:
        shift = np.uint64(64 - (len(self.slots) - 1).bit_length())
        return ((keys.view(np.uint64) * GOLDEN) >> shift).view(np.int64)

    def reserve(self, num_keys: int) -> None:
        """Make room for so many new keys: at most three quarters of the slots are ever taken."""
        room = self.size + num_keys
        if room > len(self.keys):
            self.keys = np.concatenate((self.keys[: self.size], np.empty(num_keys, dtype=np.int64)))
        if 4 * room <= 3 * len(self.slots):
            return
        self.slots = np.full(1 << (4 * room // 3).bit_length(), -1, dtype=np.int32)
        number = np.arange(self.size, dtype=np.int32)
        slot = self._slot(self.keys[: self.size])
        while len(number):
            free = self.slots[slot] < 0
            self.slots[slot[free]] = number[free]
            homeless = self.slots[slot] != number
            number, slot = number[homeless], (slot[homeless] + 1) & (len(self.slots) - 1)


class Ngrams(NamedTuple):
    """The n-grams of one order in the order of the text: the caption of each, its number, and, of words, the place there."""

    caption: np.ndarray
    ngram: np.ndarray
    position: np.ndarray | None = None

    def rows(self, start: int, stop: int) -> "Ngrams":
        """Those of the captions from start up to stop, numbered from zero again."""
        first, last = np.searchsorted(self.caption, [start, stop])
        position = None if self.position is None else self.position[first:last]
        return Ngrams(self.caption[first:last] - start, self.ngram[first:last], position)

    def count(self) -> "NgramCounts":
        pair = np.sort((self.caption << SHIFT) | self.ngram)
        first = first_of_runs(pair)
        return NgramCounts(pair[first] >> SHIFT, pair[first] & ((1 << SHIFT) - 1), np.diff(first, append=len(pair)))


class NgramCounts(NamedTuple):
    """How often each n-gram of one order occurs in each caption, sorted by caption."""

    caption: np.ndarray
    ngram: np.ndarray
    count: np.ndarray


class NgramIndex:
    """Numbers the n-grams, of one to four words, of a reference set; others have higher numbers, for one call.

    An n-gram is known by the number of its first n-1 words and its last word, so every order is looked up the same way.
    """

    def __init__(self, split: Split | None = None) -> None:
        self.words = WordIndex(split)
        self.orders = [KeyNumbers() for _ in range(MAX_ORDER - 1)]

    def reserve(self, num_ngrams: int) -> None:
        """Make room for so many n-grams of each order: faster than room made again and again."""
        for order in self.orders:
            order.reserve(num_ngrams)

    def number(self, captions: Captions, learn: bool = False, first_caption: int = 0) -> list[Ngrams]:
        """Number the n-grams of captions, for good or for this call; one result per order. Captions count from the first."""
        caption = np.repeat(np.arange(first_caption, first_caption + len(captions.lengths)), captions.lengths)
        position = captions.positions()
        words_left = np.repeat(captions.lengths, captions.lengths) - position
        start, ngram = np.arange(len(captions.words)), captions.words
        results = [Ngrams(caption, ngram, position)]
        for order in range(1, MAX_ORDER):
            keep = np.flatnonzero(words_left[start] > order)
            start = start[keep]
            key = (ngram[keep].astype(np.int64) << SHIFT) | captions.words[start + order]
            ngram = self.orders[order - 1].number(key, learn)
            results.append(Ngrams(caption[start], ngram))
        return results
