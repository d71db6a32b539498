"""From captions to words: coco-caption's tokenizer, and others for what it cannot split, chosen by what references are written in."""

import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module

from .ptb_tokenizer import tokenize_in_order

Split = Callable[[Sequence[str]], list[list[str]]]  # from captions to the words of each

TOKENIZERS = {
    "ptb": "coco-caption's; English and most languages that put blanks between words",
    "ptb_in_order": "bit for bit as coco-caption, which may read a caption with the beginning of the next one",
    "intl": "mteval-v14's, by Unicode classes; every language that puts blanks between words",
    "char": "every character a word; Chinese, Japanese, Thai and what else has no blanks",
    "none": "words between blanks, for captions that are tokenized already",
    "13a": "sacrebleu's, mteval-v13a's",
    "zh": "sacrebleu's, every Chinese character a word",
    "ja-mecab": "sacrebleu's, Japanese words by MeCab",
}
SACREBLEU = {
    "13a": ("tokenizer_13a", "Tokenizer13a"),
    "zh": ("tokenizer_zh", "TokenizerZh"),
    "ja-mecab": ("tokenizer_ja_mecab", "TokenizerJaMecab"),
}
# scripts without blanks between words: Thai, Lao, Tibetan, Myanmar, Khmer, kana, Han
# (both are compiled when a reference is not in ASCII: a large class takes milliseconds)
NO_BLANKS = (
    "[\u0e01-\u0e5b\u0e81-\u0edf\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)
EUROPEAN = "[A-Za-z\u00aa-\u058f\u1e00-\u1fff]"  # Latin, Greek, Cyrillic, Armenian
NOT_BLANK = re.compile(r"(?:\S|\xa0)+")  # PTBTokenizer's words may hold a no-break space
NUM_SAMPLED = 2000


class MissingTokenizer(ValueError):
    """A tokenizer of a library that is not installed; the message says what to install."""


def get_split(name: str) -> Split | None:
    """The function that splits captions; None for "ptb", which goes a faster way.

    Raises:
        ValueError: No tokenizer of that name.
        MissingTokenizer: One of a library that is not installed.
    """
    if name == "ptb":
        return None
    if name == "ptb_in_order":
        return tokenize_in_order
    if name == "none":
        return lambda captions: [NOT_BLANK.findall(caption) for caption in captions]
    if name == "char":
        return lambda captions: [_without_punctuation(caption.lower().replace(" ", "")) for caption in captions]
    if name == "intl":
        return lambda captions: [_without_punctuation(_intl(caption).lower().split()) for caption in captions]
    if name in SACREBLEU:
        line = _sacrebleu(name)
        return lambda captions: [_without_punctuation(line(caption).lower().split()) for caption in captions]
    raise ValueError(f"there is no tokenizer {name!r}: choose auto, {', '.join(TOKENIZERS)}")


def choose_tokenizer(references: Sequence[str]) -> str:
    """Choose the tokenizer by the script that most letters of the references belong to.

    "ptb" for European scripts, so that scores equal coco-caption's; "char" for scripts without blanks between words; "intl" for
    all others, of which PTB leaves the punctuation in the captions as words.
    """
    if not (letters := _letters(references)) or len(re.findall(EUROPEAN, letters)) > len(letters) / 2:
        return "ptb"
    return "char" if _has_no_blanks(letters) else "intl"


def describe_misfit(name: str, references: Sequence[str]) -> str | None:
    """One sentence where a tokenizer meets captions that it cannot split, else None."""
    if name not in ("ptb", "ptb_in_order", "intl", "13a") or not _has_no_blanks(_letters(references)):
        return None
    return (
        f"The references are in a script without blanks between words, and the tokenizer {name!r} takes a whole sentence for one "
        "word: CIDEr and BLEU are 0 unless a caption equals a reference. Use the tokenizer 'char', 'zh' or 'ja-mecab'."
    )


def _letters(captions: Sequence[str]) -> str:
    text = "".join(captions[:: 1 + len(captions) // NUM_SAMPLED])
    return "" if text.isascii() else "".join(filter(str.isalpha, text))


def _has_no_blanks(letters: str) -> bool:
    return bool(letters) and len(re.findall(NO_BLANKS, letters)) > len(letters) / 2


def _without_punctuation(words: Sequence[str]) -> list[str]:
    return [word for word in words if not _is_punctuation(word)]


@lru_cache(maxsize=1 << 16)
def _is_punctuation(word: str) -> bool:
    return all(character.isspace() or unicodedata.category(character)[0] == "P" for character in word)


@lru_cache(maxsize=1)
def _intl_rules() -> list[tuple[re.Pattern, str]]:
    classes: dict[str, list[str]] = {"N": [], "P": [], "S": []}
    for character in map(chr, range(sys.maxunicode + 1)):
        kind = unicodedata.category(character)[0]
        if kind in classes:
            classes[kind].append(re.escape(character))
    number, mark, sign = map("".join, classes.values())
    return [
        (re.compile(f"([^{number}])([{mark}])"), r"\1 \2 "),
        (re.compile(f"([{mark}])([^{number}])"), r" \1 \2"),
        (re.compile(f"([{sign}])"), r" \1 "),
    ]


def _intl(caption: str) -> str:
    """Put blanks around punctuation, but between digits, and around symbols, as sacrebleu's `intl` does."""
    for rule, replacement in _intl_rules():
        caption = rule.sub(replacement, caption)
    return caption


def _sacrebleu(name: str) -> Callable[[str], str]:
    module, class_name = SACREBLEU[name]
    try:
        return getattr(import_module(f"sacrebleu.tokenizers.{module}"), class_name)()
    except (ImportError, RuntimeError) as error:  # sacrebleu raises RuntimeError where MeCab is missing
        extra = "sacrebleu[ja]" if name == "ja-mecab" else "sacrebleu"
        raise MissingTokenizer(
            f"the tokenizer {name!r} is sacrebleu's ({str(error).splitlines()[0]}): pip install '{extra}', or choose 'char'"
        ) from None
