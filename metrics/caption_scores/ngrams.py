"""Words and n-grams as numbers, many captions at once: what BLEU, ROUGE-L and CIDEr-D are computed from.

Numpy sorts, joins and sums the numbers: no Python loop runs over n-grams.
"""

import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
LOWER_BYTES = np.array([(1 << 8 * size) - 1 for size in range(CHUNK)] + [-1], dtype=np.int64)
SIZE_SHIFT = 8 * (CHUNK - 1)
LAST_BLANK, LINE_END = ord(" "), ord("\n")
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
        text: All captions as UTF-8, uint8, with `2 * CHUNK` zeros behind.
        start, length: Of each piece between blanks, in bytes.
        ends: Of each caption, the number of pieces up to its end.
    """
    joined = "\n".join(captions)
    if joined.count("\n") >= len(captions):
        joined = "\n".join([caption.replace("\n", " ") for caption in captions])
    if not joined.isascii():  # bytes know the blanks of ASCII alone
        joined = UNICODE_BLANKS.sub(" ", joined)
    text = np.frombuffer(joined.encode("utf-8", "surrogatepass") + b"\n" + bytes(2 * CHUNK), dtype=np.uint8)
    blank = np.flatnonzero(text[: -2 * CHUNK] <= LAST_BLANK)
    code = text[blank]
    if not (is_blank := IS_BLANK[code]).all():
        blank, code = blank[is_blank], code[is_blank]
    # before each blank is a piece, which may be empty
    length = np.diff(blank, prepend=-1) - 1
    ends = np.flatnonzero(code == LINE_END) + 1
    if not length.all():
        there = np.flatnonzero(length)
        ends = np.searchsorted(there, ends)
        blank, length = blank[there], length[there]
    return text, blank - length, length, ends


class PieceNumbers:
    """Numbers texts by their content, without collisions.

    A text of up to 15 bytes is two int64: its first eight bytes, and the others with its length. A longer one is the number of what
    comes before its last bytes, and those with how many they are.
    """

    def __init__(self) -> None:
        self.keys = KeyNumbers()

    def number(self, text: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        """The number of the text of so many bytes at each start; new ones are learned."""
        # eight bytes from every position on, as one number
        eight = np.ndarray(len(text) - CHUNK + 1, dtype="<i8", buffer=text, strides=(1,))
        first = eight[start] & LOWER_BYTES[np.minimum(length, CHUNK)]
        second = np.minimum(length, 2 * CHUNK - 1) << SIZE_SHIFT
        long, done = np.flatnonzero(length > CHUNK), CHUNK
        second[long] |= eight[start[long] + done] & LOWER_BYTES[np.minimum(length[long] - done, CHUNK - 1)]
        number = self.keys.number(first, second)
        while len(long := long[length[long] >= done + CHUNK]):
            done += CHUNK - 1
            left = np.minimum(length[long] - done, CHUNK - 1)
            last = eight[start[long] + done] & LOWER_BYTES[left] | left << SIZE_SHIFT
            number[long] = self.keys.number(~number[long].astype(np.int64), last)
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
        alone = np.fromiter(map(bytes.isalpha, texts), dtype=bool, count=len(texts))
        words = b" ".join(compress(texts, alone)).decode().lower().split()
        alone[np.flatnonzero(alone)[[word in TWO_WORDS for word in words]]] = False
        self._keep(numbers[alone], [word for word in words if word not in TWO_WORDS], 1, 0)
        split = [split_piece(other.decode("utf-8", "surrogatepass")) for other in compress(texts, ~alone)]
        sizes = np.array([len(words) for words, _ in split], dtype=np.int32)
        flags = np.array([flags for _, flags in split], dtype=np.int8)
        self._keep(numbers[~alone], chain.from_iterable(words for words, _ in split), sizes, flags)

    def _keep(self, pieces: np.ndarray, words: Iterable[str], sizes: np.ndarray | int, flags: np.ndarray | int) -> None:
        """Keep of pieces their words, one piece after the other, how many of them each has, and its flags."""
        self.size[pieces], self.flags[pieces] = sizes, flags
        sizes = self.size[pieces]
        self.first[pieces] = len(self.flat) + np.cumsum(sizes) - sizes
        numbers = self.words
        self.flat.extend([numbers[word] if word in numbers else self.number(word) for word in words])

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
    """Numbers pairs of int64 0, 1, 2, ...: a hash table with linear probing that takes all pairs of two arrays at once."""

    def __init__(self) -> None:
        self.size = 0
        self.first, self.second = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
        self.slots = np.full(2, -1, dtype=np.int32)

    def number(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """The number of each pair, int32; new ones get the next numbers."""
        self._reserve(len(first))
        slot = self._slot(first, second)
        numbers = held = self._held(first, second, slot)
        place = None
        # where a slot holds another pair, the next slot is looked at
        while len(others := np.flatnonzero((self.first[held] != first) | (self.second[held] != second))):
            first, second, slot = first[others], second[others], (slot[others] + 1) & (len(self.slots) - 1)
            place = others if place is None else place[others]
            numbers[place] = held = self._held(first, second, slot)
        return numbers

    def _held(self, first: np.ndarray, second: np.ndarray, slot: np.ndarray) -> np.ndarray:
        """The numbers in slots, of which pairs take the free ones first."""
        held = self.slots[slot]
        if len(free := np.flatnonzero(held < 0)):
            wanted = slot[free]
            self.slots[wanted] = free  # of several pairs that want a slot, the last gets it
            gets = np.flatnonzero(self.slots[wanted] == free)
            new, free_new = np.arange(self.size, self.size + len(gets)), free[gets]
            self.slots[wanted[gets]] = new
            self.first[new], self.second[new] = first[free_new], second[free_new]
            self.size += len(gets)
            held[free] = self.slots[wanted]
        return held

    def _slot(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        shift = np.uint64(64 - (len(self.slots) - 1).bit_length())
        mixed = (first.view(np.uint64) * GOLDEN) ^ second.view(np.uint64)
        return ((mixed * GOLDEN) >> shift).view(np.int64)

    def _reserve(self, num_pairs: int) -> None:
        """Make room for so many new pairs: at most three quarters of the slots are ever taken."""
        room = self.size + num_pairs
        if room > len(self.first):
            known = self.first[: self.size], self.second[: self.size]
            self.first, self.second = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.int64)
            self.first[: self.size], self.second[: self.size] = (
                known  # the room behind takes no memory before it is used
            )
        if 4 * room <= 3 * len(self.slots):
            return
        self.slots = np.full(1 << (4 * room // 3).bit_length(), -1, dtype=np.int32)
        number = np.arange(self.size, dtype=np.int32)
        slot = self._slot(self.first[: self.size], self.second[: self.size])
        while len(number):
            free = self.slots[slot] < 0
            self.slots[slot[free]] = number[free]
            homeless = self.slots[slot] != number
            number, slot = number[homeless], (slot[homeless] + 1) & (len(self.slots) - 1)


class NgramIndex:
    """Weighs the n-grams, of one to four words, of a reference set by how many images' references hold them.

    Numbered are those of at least `least` images. All others have the weight of an n-gram of one image, so that, with the usual two,
    nothing is lost, and few n-grams of three and four words are ever looked at: only those made of two that are numbered. An n-gram
    is known by the number of its first n-1 words and its last word, so every order is looked up the same way.

    Attributes:
        words: The numbers of words.
        weights: Of each order, by number: the log of the number of images over the number of those whose references hold the
            n-gram; then that of all others; then 0, at -1, for the places where no n-gram begins.
        keys: Of each order from two words on, the keys of those numbered, sorted: their places are their numbers.
    """

    def __init__(self, words: WordIndex, least: int = 2) -> None:
        self.words, self.least = words, least
        self.weights: list[np.ndarray] = []
        self.keys: list[np.ndarray] = []

    def learn(self, captions: Captions, images: np.ndarray, num_images: int) -> list[np.ndarray]:
        """Learn the n-grams of the reference set, whose images are given in ascending order; returns what `number` does."""
        image = np.repeat(images.astype(np.int32), captions.lengths)
        weights = np.log(float(num_images)) - np.log(np.maximum(np.arange(num_images + 1.0), 1))
        # words and their images in the smallest numbers, which are sorted fastest
        kind = np.int32 if len(self.words.words) * num_images < 1 << 31 else np.int64
        word = captions.words.astype(kind) * kind(num_images) + image.astype(kind)
        word.sort()
        images_with = np.bincount(word[first_of_runs(word)] // kind(num_images), minlength=len(self.words.words))
        self.weights = [np.append(weights[images_with], [weights[1], 0.0])]

        def learn_order(_, keys: np.ndarray, first: np.ndarray, place: np.ndarray) -> np.ndarray:
            images_with = count_images(image[place], first)
            numbered = images_with >= self.least
            keep = np.flatnonzero(numbered)
            self.keys.append(keys[keep])
            self.weights.append(np.append(weights[images_with[keep]], [weights[1], 0.0]))
            return np.where(numbered, np.cumsum(numbered) - 1, len(keep))

        return self._number(captions, learn_order)

    def number(self, captions: Captions) -> list[np.ndarray]:
        """For each order, the number of the n-gram that begins at each word, int32 (words,).

        It is that of all others where the n-gram has none, and -1 where too few words are left in the caption.
        """

        def look_up(order: int, keys: np.ndarray, *_) -> np.ndarray:
            known = self.keys[order - 1]
            number = np.searchsorted(known, keys)
            if len(known):
                number[known.take(number, mode="clip") != keys] = len(known)
            return number

        return self._number(captions, look_up)

    def _number(self, captions: Captions, number_keys: Callable[..., np.ndarray]) -> list[np.ndarray]:
        words_left = np.repeat(captions.ends(), captions.lengths) - np.arange(len(captions.words))
        numbers = [np.minimum(captions.words, len(self.weights[0]) - 2)]
        for order in range(1, MAX_ORDER):
            begins, known = words_left > order, numbers[-1] < len(self.weights[order - 1]) - 2
            place = np.flatnonzero(begins[:-1] & known[:-1] & known[1:])
            keys, first, place = sort_pairs(numbers[-1][place], captions.words[place + order], place)
            of_key = number_keys(order, keys, first, place).astype(np.int32)
            number = np.where(begins, np.int32(len(self.weights[order]) - 2), np.int32(-1))
            number[place] = np.repeat(of_key, np.diff(first, append=len(place)))
            numbers.append(number)
        return numbers


def sort_pairs(high: np.ndarray, low: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort pairs of numbers.

    Returns:
        the distinct pairs, as keys `(high << SHIFT) | low`; where the run of each begins among all; and the places of all.
    """
    low_bits, place_bits = int(low.max(initial=0)).bit_length(), int(place.max(initial=0)).bit_length()
    key = high.astype(np.int64)
    key <<= low_bits
    key |= low
    if int(high.max(initial=0)).bit_length() + low_bits + place_bits < 64:
        # with the place in the same number: sorted at once, several times as fast as by argsort
        key <<= place_bits
        key |= place
        key.sort()
        place = key & ((1 << place_bits) - 1)
        key >>= place_bits
    else:
        order = np.argsort(key, kind="stable")
        key, place = key[order], place[order]
    first = first_of_runs(key)
    key = key[first]
    return ((key >> low_bits) << SHIFT) | (key & ((1 << low_bits) - 1)), first, place


def count_images(image: np.ndarray, first: np.ndarray) -> np.ndarray:
    """How many different images each run of n-grams has, in which images ascend; `first` is where the runs begin."""
    new = np.ones(len(image), dtype=bool)
    np.not_equal(image[1:], image[:-1], out=new[1:])
    new[first] = True
    before = np.cumsum(new, dtype=np.int32)
    return np.diff(before[first], append=before[-1:] + 1)
