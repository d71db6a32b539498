"""Words and n-grams as numbers, many captions at once: what BLEU, ROUGE-L and CIDEr-D are computed from.

Numpy sorts, joins and sums the numbers: no Python loop runs over n-grams.
"""

import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, compress
from types import MappingProxyType

import numpy as np

from .ptb_tokenizer import BEGINS_SPAN, ENDS_SPAN, HOLDS_SPAN, TWO_WORDS, split_piece, tokenize
from .tokenizers import Split

MAX_ORDER = 4
SHIFT = 32  # two numbers below 2**31 share one int64 key: (high << SHIFT) | low
CAPTIONS_AT_ONCE = 4096
CHUNK = 8  # bytes of an int64
LOWER_BYTES = np.array([(1 << 8 * size) - 1 for size in range(CHUNK)] + [-1], dtype=np.int64)
CHAINED, PART_BITS = np.int64(-(1 << 56)), 28  # a first byte that no UTF-8 has, and two numbers below 2**28
LAST_BLANK, LINE_END = ord(" "), ord("\n")
IS_BLANK = np.array([chr(code).isspace() for code in range(LAST_BLANK + 1)])
IS_DROPPED = np.array([chr(code) in ",!?" for code in range(256)])
UNICODE_BLANKS = re.compile(r"[^\S\x00-\x7f]")
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # multiplicative hashing (Knuth, TAOCP 6.4)


def first_of_runs(values: np.ndarray) -> np.ndarray:
    """Positions at which, in a sorted array, a run of equal values begins."""
    if not len(values):
        return np.empty(0, dtype=np.int64)
    return np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1])))


def ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The integers start, start + 1, ..., start + size - 1 of every range, one range after the other."""
    integers = np.repeat(starts - (np.cumsum(sizes, dtype=np.int64) - sizes), sizes)
    integers += np.arange(len(integers))
    return integers


class Captions:
    """Tokenized captions.

    coco-caption's BLEU and CIDEr split words at a no-break space, too, its ROUGE-L does not: `parts` has the parts of those.

    Attributes:
        words: The numbers of all words, one caption after the other, int32.
        lengths: The number of words of each caption, int32.
        ends, starts: Where the words of each end and begin.
        parts: By the number of a word.
    """

    def __init__(
        self, words: np.ndarray, lengths: np.ndarray, parts: Mapping[int, list[int]] = MappingProxyType({})
    ) -> None:
        self.words, self.lengths, self.parts = words, lengths, parts
        self.ends = np.cumsum(lengths, dtype=np.int64)
        self.starts = self.ends - lengths

    def take(self, captions: np.ndarray) -> "Captions":
        """Choose captions by their places; they may come again."""
        lengths = self.lengths[captions]
        return Captions(self.words[ranges(self.starts[captions], lengths)], lengths, self.parts)

    def keys(self) -> Iterator[bytes]:
        """For each caption what equals another's exactly if they have the same words."""
        content, ends = self.words.tobytes(), (self.ends * self.words.itemsize).tolist()
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
        return Captions(np.array(words, dtype=np.int32), np.diff(before[self.ends], prepend=0).astype(np.int32))

    def append_word(self, number: int, where: np.ndarray) -> "Captions":
        """Append one word to the captions for which `where` is true."""
        return Captions(np.insert(self.words, self.ends[where], number), self.lengths + where, self.parts)


def cut_pieces(captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cut captions at blanks, all at once.

    Returns:
        text: All captions, of which no line ends and zeros are left, as UTF-8, uint8, with `CHUNK` zeros behind.
        start, length: Of each piece between blanks, in bytes.
        ends: Of each caption, the number of pieces up to its end.
    """
    joined = "\n".join(captions)
    if joined.count("\n") >= len(captions) or "\0" in joined:
        joined = "\n".join([caption.replace("\n", " ").replace("\0", "\1") for caption in captions])
    if not joined.isascii():  # bytes know the blanks of ASCII alone
        joined = UNICODE_BLANKS.sub(" ", joined)
    text = np.frombuffer(joined.encode("utf-8", "surrogatepass") + b"\n" + bytes(CHUNK), dtype=np.uint8)
    blank = np.flatnonzero(text[:-CHUNK] <= LAST_BLANK)
    code = text.take(blank)
    if not (is_blank := IS_BLANK.take(code)).all():
        blank, code = blank[is_blank], code[is_blank]
    # before each blank is a piece, which may be empty
    length = np.diff(blank, prepend=-1)
    length -= 1
    ends = np.flatnonzero(code == LINE_END) + 1
    if not length.all():
        there = np.flatnonzero(length)
        ends = np.searchsorted(there, ends)
        blank, length = blank[there], length[there]
    return text, blank - length, length, ends


class PieceNumbers:
    """Numbers texts by their content, without collisions: chunks of eight bytes, each numbered with those before it.

    A chunk is an int64 key. With chunks before it, whose number is known, the key is that number and the chunk's own, below a byte
    that no UTF-8 has. Chunks share the numbers of whole texts.
    """

    def __init__(self) -> None:
        self.keys = KeyNumbers()

    def number(self, text: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        """The number of the text of so many bytes at each start, without zeros; new ones are learned."""
        # eight bytes from every position on, as one number
        eight = np.ndarray(len(text) - CHUNK + 1, dtype="<i8", buffer=text, strides=(1,))
        number = self.keys.number(eight[start] & LOWER_BYTES.take(length, mode="clip"))
        long, done = np.flatnonzero(length > CHUNK), CHUNK
        while len(long):
            left = LOWER_BYTES.take(length[long] - done, mode="clip")
            chunk = self.keys.number(eight[start[long] + done] & left)
            number[long] = self.keys.number((number[long].astype(np.int64) << PART_BITS) | chunk | CHAINED)
            done += CHUNK
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
        size = self._sizes(text, start, length, piece)
        words = np.frombuffer(self.flat, dtype=np.int32).take(ranges(self.first.take(piece), size))
        words_before = np.concatenate(([0], np.cumsum(size)))
        lengths = np.diff(words_before[ends], prepend=0).astype(np.int32)
        flags = self.flags.take(piece)
        spans = (flags & HOLDS_SPAN) != 0
        spans[:-1] |= (flags[:-1] & ENDS_SPAN != 0) & (flags[1:] & BEGINS_SPAN != 0)
        if spans.any():
            words, lengths = self._encode_whole(captions, words, lengths, np.flatnonzero(spans), ends)
        return words, lengths

    def _sizes(self, text: np.ndarray, start: np.ndarray, length: np.ndarray, piece: np.ndarray) -> np.ndarray:
        """How many words each piece has; those that were not split before are split."""
        if (more := self.pieces.keys.size - len(self.size)) > 0:
            more = max(more, len(self.size) // 2)
            self.first = np.concatenate((self.first, np.zeros(more, dtype=np.int32)))
            self.size = np.concatenate((self.size, np.full(more, -1, dtype=np.int32)))
            self.flags = np.concatenate((self.flags, np.zeros(more, dtype=np.int8)))
        size = self.size.take(piece)
        if len(unsplit := np.flatnonzero(size < 0)):
            last = np.full(len(self.size), -1)
            last[piece[unsplit]] = unsplit
            new = last[last >= 0]
            self._split_new(text, start[new], (start + length)[new], piece[new])
            size[unsplit] = self.size.take(piece[unsplit])
        return size

    def _split_new(self, text: np.ndarray, start: np.ndarray, end: np.ndarray, numbers: np.ndarray) -> None:
        """Split pieces that were not split before, from start to end in the text."""
        content = text.tobytes()
        # nearly all are one word each: letters alone, and at most one mark that is dropped
        unmarked = end - IS_DROPPED[text[end - 1]]
        texts = [content[first:last] for first, last in zip(start.tolist(), unmarked.tolist(), strict=True)]
        alone = np.fromiter(map(bytes.isalpha, texts), dtype=bool, count=len(texts))
        words = b" ".join(compress(texts, alone)).decode().lower().split()
        if not TWO_WORDS.isdisjoint(words):
            alone[np.flatnonzero(alone)[[word in TWO_WORDS for word in words]]] = False
            words = [word for word in words if word not in TWO_WORDS]
        known = self.words
        self._keep(numbers[alone], [known.setdefault(word, len(known)) for word in words], 1, 0)
        others = zip(start[~alone].tolist(), end[~alone].tolist(), strict=True)
        split = [split_piece(content[first:last].decode("utf-8", "surrogatepass")) for first, last in others]
        sizes = np.array([len(words) for words, _ in split], dtype=np.int32)
        flags = np.array([flags for _, flags in split], dtype=np.int8)
        words = chain.from_iterable(words for words, _ in split)
        self._keep(numbers[~alone], [self.number(word) for word in words], sizes, flags)

    def _keep(self, pieces: np.ndarray, words: list[int], sizes: np.ndarray | int, flags: np.ndarray | int) -> None:
        """Keep of pieces their words, one piece after the other, how many of them each has, and its flags."""
        self.size[pieces], self.flags[pieces] = sizes, flags
        sizes = self.size[pieces]
        self.first[pieces] = len(self.flat) + np.cumsum(sizes) - sizes
        self.flat.extend(words)

    def _encode_whole(self, captions, words, lengths, spans, ends) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize again, as a whole, the captions in which a token may reach over a blank."""
        word_ends = np.cumsum(lengths)
        parts, done = [], 0
        for caption in np.unique(np.searchsorted(ends, spans, side="right")).tolist():
            parts.append(words[done : word_ends[caption] - lengths[caption]])
            done = word_ends[caption]
            whole = [self.number(word) for word in tokenize(captions[caption].replace("\0", "\1"))]
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
        while len(others := np.flatnonzero(self.keys.take(held) != wanted)):
            wanted, slot = wanted[others], (slot[others] + 1) & (len(self.slots) - 1)
            place = others if place is None else place[others]
            numbers[place] = held = self._held(wanted, slot)
        return numbers

    def _held(self, keys: np.ndarray, slot: np.ndarray) -> np.ndarray:
        """The numbers in slots, of which keys take the free ones first."""
        held = self.slots.take(slot)
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


class NgramIndex:
    """Weighs the n-grams, of one to four words, of a reference set by how many images' references hold them.

    Numbered are those of at least `least` images. All others have the weight of an n-gram of one image, so that, with the usual two,
    nothing is lost, and few n-grams of three and four words are ever looked at: only those made of two that are numbered. An n-gram
    is known by the number of its first n-1 words and its last word, so every order is looked up the same way.

    Attributes:
        words: The numbers of words.
        squares: Of each order, by number, the square of an n-gram's weight, which is the log of the number of images over the number
            of those whose references hold it; then that of all others; then 0, at -1, for the places where no n-gram begins.
        keys: Of each order from two words on, the keys of those numbered, sorted: their places are their numbers.
    """

    def __init__(self, words: WordIndex, least: int = 2) -> None:
        self.words, self.least = words, least
        self.squares: list[np.ndarray] = []
        self.keys: list[np.ndarray] = []

    def learn(self, captions: Captions, images: np.ndarray, num_images: int) -> list[np.ndarray]:
        """Learn the n-grams of the reference set, whose images are given in ascending order; returns what `number` does."""
        image = np.repeat(images.astype(np.int32), captions.lengths)
        squares = (np.log(float(num_images)) - np.log(np.maximum(np.arange(num_images + 1.0), 1))) ** 2
        # words and their images in the smallest numbers, which are sorted fastest
        kind = np.int32 if len(self.words.words) * num_images < 1 << 31 else np.int64
        word = captions.words.astype(kind) * kind(num_images) + image.astype(kind)
        word.sort()
        images_with = np.bincount(word[first_of_runs(word)] // kind(num_images), minlength=len(self.words.words))
        self.squares = [np.append(squares[images_with], [squares[1], 0.0])]

        def learn_order(_, keys: np.ndarray, first: np.ndarray, place: np.ndarray) -> np.ndarray:
            images_with = count_images(image.take(place), first)
            numbered = images_with >= self.least
            keep = np.flatnonzero(numbered)
            self.keys.append(keys[keep])
            self.squares.append(np.append(squares[images_with[keep]], [squares[1], 0.0]))
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
        words_left = np.repeat(captions.ends.astype(np.int32), captions.lengths)
        words_left -= np.arange(len(words_left), dtype=np.int32)
        numbers = [np.minimum(captions.words, len(self.squares[0]) - 2)]
        for order in range(1, MAX_ORDER):
            begins, known = words_left > order, numbers[-1] < len(self.squares[order - 1]) - 2
            place = np.flatnonzero(begins[:-1] & known[:-1] & known[1:])
            keys, first, place = sort_pairs(numbers[-1].take(place), captions.words.take(place + order), place)
            of_key = number_keys(order, keys, first, place).astype(np.int32)
            # without a number: len(numbered) where an n-gram begins, and -1 elsewhere
            number = begins.astype(np.int32)
            number *= len(self.squares[order]) - 1
            number -= 1
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
    key = key.take(first)
    return ((key >> low_bits) << SHIFT) | (key & ((1 << low_bits) - 1)), first, place


def count_images(image: np.ndarray, first: np.ndarray) -> np.ndarray:
    """How many different images each run of n-grams has, in which images ascend; `first` is where the runs begin."""
    new = np.ones(len(image), dtype=bool)
    np.not_equal(image[1:], image[:-1], out=new[1:])
    new[first] = True
    before = np.cumsum(new, dtype=np.int32)
    return np.diff(before.take(first), append=before[-1:] + 1)
