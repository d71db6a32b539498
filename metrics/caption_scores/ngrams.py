"""Words and n-grams as numbers, many captions at once: what BLEU, ROUGE-L and CIDEr-D are computed from.

Numpy sorts, joins and sums the numbers: no Python loop runs over n-grams.
"""

import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, compress
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from .ptb_tokenizer import BEGINS_SPAN, ENDS_SPAN, HOLDS_SPAN, TWO_WORDS, split_piece, tokenize
from .tokenizers import Split

MAX_ORDER = 4
SHIFT = 32  # two numbers below 2**31 share one int64 key: (high << SHIFT) | low
CAPTIONS_AT_ONCE = 8192
CHUNK = 8  # bytes of an int64
LOWER_BYTES = np.array([(1 << 8 * size) - 1 for size in range(CHUNK)], dtype=np.int64)
CHAINED = np.int64(-(1 << 63))
LAST_BLANK = ord(" ")
IS_BLANK = np.array([chr(code).isspace() for code in range(LAST_BLANK + 1)])
UNICODE_BLANKS = re.compile(r"[^\S\x00-\x7f]")
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


def distinct_pairs(high: np.ndarray, low: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What two arrays of numbers hold in pairs.

    Returns:
        the distinct pairs, sorted, as keys `(high << SHIFT) | low`; and for each pair the place of its key, int32.
    """
    low_bits, place_bits = int(low.max(initial=0)).bit_length(), len(low).bit_length()
    if int(high.max(initial=0)).bit_length() + low_bits + place_bits >= 64:
        keys, which = np.unique((high.astype(np.int64) << SHIFT) | low, return_inverse=True)
        return keys, which.astype(np.int32)
    # high, low and the place in one number: sorted at once, several times as fast as by argsort
    key = high.astype(np.int64)
    key <<= low_bits
    key |= low
    key <<= place_bits
    key |= np.arange(len(low))
    key.sort()
    place = key & ((1 << place_bits) - 1)
    key >>= place_bits
    first = np.empty(len(key), dtype=bool)
    first[:1] = True
    np.not_equal(key[1:], key[:-1], out=first[1:])
    which = np.empty(len(key), dtype=np.int32)
    which[place] = np.cumsum(first, dtype=np.int32) - 1
    key = key[first]
    return ((key >> low_bits) << SHIFT) | (key & ((1 << low_bits) - 1)), which


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


def cut_pieces(captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cut captions at blanks, all at once.

    Returns:
        text: All captions as UTF-8, uint8, with `CHUNK` zeros behind.
        start, length: Of each piece between blanks, in bytes.
        ends: Of each caption, the number of pieces up to its end.
    """
    joined = " ".join(captions)
    if joined.isascii():
        content, lengths = joined.encode(), map(len, captions)
    else:
        # bytes know the blanks of ASCII alone
        encoded = [UNICODE_BLANKS.sub(" ", caption).encode("utf-8", "surrogatepass") for caption in captions]
        content, lengths = b" ".join(encoded), map(len, encoded)
    text = np.frombuffer(content + bytes(CHUNK), dtype=np.uint8)
    # between two blanks, those before the text and behind it included, is a piece, which may be empty
    blank = np.flatnonzero(text[:-CHUNK] <= LAST_BLANK)
    blank = np.concatenate(([-1], blank[IS_BLANK[text[blank]]], [len(content)]))
    start, length = blank[:-1] + 1, np.diff(blank) - 1
    there = length > 0
    caption_ends = np.cumsum(np.fromiter(lengths, dtype=np.int64, count=len(captions)) + 1)
    ends = np.cumsum(there)[np.searchsorted(start, caption_ends) - 1]
    return text, start[there], length[there], ends


class PieceNumbers:
    """Numbers texts by their content, without collisions: chunks of seven bytes, each numbered with those before it.

    A chunk is the lower seven bytes of an int64 key; with chunks before it, whose number is known, the key is that number and the
    chunk's own, with a bit that no chunk has. Chunks share the numbers of whole texts.
    """

    def __init__(self) -> None:
        self.keys = KeyNumbers()

    def number(self, text: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        """The number of the text of so many bytes at each start; new ones are learned."""
        # eight bytes from every position on, as one number
        eight = np.ndarray(len(text) - CHUNK, dtype="<i8", buffer=text, strides=(1,))
        number = self.keys.number(eight[start] & LOWER_BYTES[np.minimum(length, CHUNK - 1)])
        long, done = np.flatnonzero(length > CHUNK - 1), CHUNK - 1
        while len(long):
            left = np.minimum(length[long] - done, CHUNK - 1)
            chunk = self.keys.number(eight[start[long] + done] & LOWER_BYTES[left])
            key = (number[long].astype(np.int64) << SHIFT) | chunk | CHAINED
            number[long] = self.keys.number(key)
            done += CHUNK - 1
            long = long[length[long] > done]
        return number


class WordIndex:
    """Numbers the words of captions.

    With the PTB tokenizer, the words of a piece of text between blanks do not depend on the pieces beside it, but for the
    captions that the flags of `split_piece` tell. So each distinct piece is split once; `PieceNumbers` tells which are the same.
    With another tokenizer, each caption is split as a whole.

    Args:
        split: Another tokenizer than PTB: from captions to the words of each.
    """

    def __init__(self, split: Split | None = None) -> None:
        self.split = split
        self.words: dict[str, int] = {}
        self.parts: dict[int, list[int]] = {}
        self.pieces = PieceNumbers()
        # of each piece: where its words begin in `flat`, how many they are (-1: not split yet), and its flags
        self.first, self.size = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32)
        self.flags, self.flat = np.empty(0, dtype=np.int8), array("i")

    def number(self, word: str) -> int:
        number = self.words.setdefault(word, len(self.words))
        if "\xa0" in word and number not in self.parts:
            self.parts[number] = [self.number(part) for part in word.split()]
        return number

    def texts(self, words: np.ndarray) -> list[str]:
        """The words that these numbers stand for."""
        texts = list(self.words)
        return [texts[number] for number in words.tolist()]

    def split_text(self, caption: str) -> tuple[str, ...]:
        """The words of one caption."""
        return tuple(self.split([caption])[0]) if self.split else tuple(tokenize(caption))

    def encode(self, captions: Sequence[str], learn: bool) -> Captions:
        """Tokenize captions. Unless they are to be learned, words that are new have a number in this result alone."""
        num_words, num_flat = len(self.words), len(self.flat)
        split = self.split(captions) if self.split else captions
        encode = self._number_lists if self.split else self._encode
        parts = [encode(split[start : start + CAPTIONS_AT_ONCE]) for start in range(0, len(split), CAPTIONS_AT_ONCE)]
        word_parts = dict(self.parts)
        if not learn:
            for _ in range(len(self.words) - num_words):
                self.parts.pop(self.words.popitem()[1], None)
            self.size[self.first >= num_flat] = -1
            del self.flat[num_flat:]
        if not parts:
            return Captions(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32))
        words, lengths = map(np.concatenate, zip(*parts, strict=True))
        return Captions(words, lengths, word_parts)

    def _number_lists(self, lists: Sequence[list[str]]) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.fromiter(map(len, lists), dtype=np.int32, count=len(lists))
        words = map(self.number, chain.from_iterable(lists))
        return np.fromiter(words, dtype=np.int32, count=int(lengths.sum())), lengths

    def _encode(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        text, start, length, ends = cut_pieces(captions)
        piece = self.pieces.number(text, start, length)
        self._split_new(text, start, length, piece)
        size = self.size[piece]
        words = np.frombuffer(self.flat, dtype=np.int32)[ranges(self.first[piece], size)]
        words_before = np.concatenate(([0], np.cumsum(size)))
        lengths = np.diff(words_before[ends], prepend=0).astype(np.int32)
        flags = self.flags[piece]
        spans = (flags & HOLDS_SPAN) != 0
        spans[:-1] |= (flags[:-1] & ENDS_SPAN != 0) & (flags[1:] & BEGINS_SPAN != 0)
        if spans.any():
            words, lengths = self._encode_whole(captions, words, lengths, np.flatnonzero(spans), ends)
        return words, lengths

    def _split_new(self, text: np.ndarray, start: np.ndarray, length: np.ndarray, piece: np.ndarray) -> None:
        """Split the pieces that were not split before."""
        more = self.pieces.keys.size - len(self.size)
        if more > 0:
            more = max(more, len(self.size) // 2)
            self.first, self.flags = np.pad(self.first, (0, more)), np.pad(self.flags, (0, more))
            self.size = np.pad(self.size, (0, more), constant_values=-1)
        unsplit = np.flatnonzero(self.size[piece] < 0)
        last = np.full(len(self.size), -1)
        last[piece[unsplit]] = unsplit
        new = last[last >= 0]
        content, numbers = text.tobytes(), piece[new]
        texts = [
            content[begin:end] for begin, end in zip(start[new].tolist(), (start + length)[new].tolist(), strict=True)
        ]
        # nearly all are one word each: letters alone
        simple = np.fromiter(map(bytes.isalpha, texts), dtype=bool, count=len(texts))
        words = b" ".join(compress(texts, simple)).decode().lower().split()
        simple[np.flatnonzero(simple)[[word in TWO_WORDS for word in words]]] = False
        words = [word for word in words if word not in TWO_WORDS]
        self.first[numbers[simple]] = len(self.flat) + np.arange(len(words))
        self.size[numbers[simple]], self.flags[numbers[simple]] = 1, 0
        self.flat.extend([self.words.setdefault(word, len(self.words)) for word in words])
        for number, other in zip(numbers[~simple].tolist(), compress(texts, ~simple), strict=True):
            words, flags = split_piece(other.decode("utf-8", "surrogatepass"))
            self.first[number], self.size[number], self.flags[number] = len(self.flat), len(words), flags
            self.flat.extend([self.words[word] if word in self.words else self.number(word) for word in words])

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

    def number(self, keys: np.ndarray) -> np.ndarray:
        """The number of each key, int32; new ones get the next numbers."""
        self._reserve(len(keys))
        slot = self._slot(keys)
        numbers = held = self._held(keys, slot)
        wanted, place = keys, None
        # where a slot holds another key, the next slot is looked at
        while len(others := np.flatnonzero(self.keys[held] != wanted)):
            wanted, slot = wanted[others], (slot[others] + 1) & (len(self.slots) - 1)
            place = others if place is None else place[others]
            numbers[place] = held = self._held(wanted, slot)
        return numbers

    def _held(self, keys: np.ndarray, slot: np.ndarray) -> np.ndarray:
        """The numbers in slots, of which keys take the free ones first."""
        held = self.slots[slot]
        if len(free := np.flatnonzero(held < 0)):
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

    def _reserve(self, num_keys: int) -> None:
        """Make room for so many new keys: at most three quarters of the slots are ever taken."""
        room = self.size + num_keys
        if room > len(self.keys):
            known, self.keys = self.keys[: self.size], np.empty(room, dtype=np.int64)
            self.keys[: self.size] = known  # the room behind takes no memory before it is used
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
        rows = self.cut(*np.searchsorted(self.caption, [start, stop]))
        return rows._replace(caption=rows.caption - start)

    def cut(self, start: int, end: int) -> "Ngrams":
        """Those from one place up to another."""
        position = None if self.position is None else self.position[start:end]
        return Ngrams(self.caption[start:end], self.ngram[start:end], position)

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
        # of each order from two words on, the keys of the known n-grams, sorted: their places are their numbers
        self.known = [np.empty(0, dtype=np.int64) for _ in range(MAX_ORDER - 1)]

    def number(self, captions: Captions, learn: bool = False) -> Iterator[Ngrams]:
        """Number the n-grams of captions, order after order; those of the reference set, given at once, are to be learned."""
        caption = np.repeat(np.arange(len(captions.lengths)), captions.lengths)
        position = captions.positions()
        yield Ngrams(caption, captions.words, position)
        words_left = np.repeat(captions.lengths, captions.lengths) - position
        start, ngram = np.arange(len(captions.words)), captions.words
        for order in range(1, MAX_ORDER):
            keep = np.flatnonzero(words_left[start] > order)
            start = start[keep]
            keys, ngram = distinct_pairs(ngram[keep], captions.words[start + order])
            if learn:
                self.known[order - 1] = keys
            else:
                ngram = self._number_keys(keys, self.known[order - 1])[ngram]
            yield Ngrams(caption[start], ngram)

    @staticmethod
    def _number_keys(keys: np.ndarray, known: np.ndarray) -> np.ndarray:
        """The place of each key, sorted, among the known ones, and numbers beyond for the others; int32."""
        place = np.searchsorted(known, keys)
        new = place == len(known)
        new[~new] = known[place[~new]] != keys[~new]
        place[new] = len(known) + np.arange(np.count_nonzero(new))
        return place.astype(np.int32)
