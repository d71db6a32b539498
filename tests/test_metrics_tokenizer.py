"""The tokenizer gives what coco-caption's Java program gives. The fixture: strings of our own, and the program's tokens."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from metrics import tokenize
from metrics.caption_scores.ptb_tokenizer import _lex

PAIRS = json.loads((Path(__file__).parent / "fixtures" / "ptb_tokens.json").read_text(encoding="utf-8"))


def test_tokens_are_those_of_java():
    assert len(PAIRS) >= 200
    wrong = [(text, tokenize(text), tokens) for text, tokens in PAIRS if tokenize(text) != tokens]
    assert not wrong


def test_word_by_word_gives_what_the_whole_caption_gives():
    """The cache of words and the shortcut for plain words change nothing, whatever stands beside a word."""
    texts = [text for text, _ in PAIRS]
    neighbors = texts + [f"{left} {right}" for left, right in zip(texts, texts[7:], strict=False)]
    wrong = [text for text in neighbors if tokenize(text) != _lex(" ".join(text.splitlines()))]
    assert not wrong


def test_a_line_break_is_a_blank():
    for line_break in ("\n", "\r", "\r\n", "\x0b", "\x0c", "\u2028"):
        assert tokenize(f"a dog{line_break}1 1/2 <b>{line_break}feet.") == tokenize("a dog 1 1/2 <b> feet.")


def test_a_token_is_never_empty_and_never_holds_a_blank():
    for text, _ in PAIRS:
        assert all(token and " " not in token for token in tokenize(text))


def test_against_java_live():
    if shutil.which("java") is None or find_spec("pycocoevalcap") is None:
        pytest.skip("the live comparison needs Java and pycocoevalcap")
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # a neutral caption between any two: Java lets the next caption's first word decide over "letter B."
    captions = {}
    for position, (text, _) in enumerate(PAIRS):
        captions[2 * position] = [{"caption": text}]
        captions[2 * position + 1] = [{"caption": "so"}]
    lines = PTBTokenizer().tokenize(captions)
    wrong = []
    for position, (text, _) in enumerate(PAIRS):
        if lines[2 * position][0] != " ".join(tokenize(text)):
            wrong.append((text, lines[2 * position][0], tokenize(text)))
    assert not wrong
