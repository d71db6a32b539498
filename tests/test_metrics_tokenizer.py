"""The tokenizer gives what coco-caption's Java program gives. The fixtures: strings of our own, and the program's tokens."""

import json
import random
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from metrics import tokenize
from metrics.caption_scores.ptb_tokenizer import _lex, tokenize_in_order

FIXTURES = Path(__file__).parent / "fixtures"
PAIRS = json.loads((FIXTURES / "ptb_tokens.json").read_text(encoding="utf-8"))
# one caption after the other, as they went through the program
IN_ORDER = json.loads((FIXTURES / "ptb_tokens_in_order.json").read_text(encoding="utf-8"))


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


def test_a_caption_alone_does_not_depend_on_the_next_one_and_in_order_it_does_as_in_coco_caption():
    captions, tokens = map(list, zip(*IN_ORDER, strict=True))
    assert tokenize_in_order(captions) == tokens
    assert [tokenize(caption) for caption in captions] != tokens
    assert tokenize("the letter B.") == ["the", "letter", "b."]
    assert tokenize_in_order(["the letter B.", "A dog"])[0] == ["the", "letter", "b"]


@pytest.mark.skipif(
    shutil.which("java") is None or find_spec("pycocoevalcap") is None, reason="needs Java and pycocoevalcap"
)
def test_against_java_live():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    generator = random.Random(0)
    words = "a dog man's don't U.S. non-U.S. mid-a.m. Ph.D. Inc. 1/2 3.5 $5 No. (a) [c] “hi” it’s … AT&T www.x.com a@b.c :-) 50% 'em"
    words += " o'clock 7-11 and/or B. She\" -lrb- -rrb- -LCB- `` '' 's n't ca u.s. ph.d. t-shirt - . , THE The '90S www.x-y.com a#b.com http://a{b}"
    captions = [text for text, _ in PAIRS]
    for _ in range(3000):
        pieces = generator.choices(words.split(), k=6)
        captions.append("".join(word + generator.choice(["", " ", " ", " ", "-", "."]) for word in pieces))
    # a neutral caption between any two: Java lets the next caption's first word decide over "letter B."
    spaced = [text for caption in captions for text in (caption, "so")]
    lines = PTBTokenizer().tokenize({position: [{"caption": text}] for position, text in enumerate(spaced)})
    wrong = []
    for position, caption in enumerate(captions):
        if lines[2 * position][0] != " ".join(tokenize(caption)):
            wrong.append((caption, lines[2 * position][0], tokenize(caption)))
    assert not wrong
