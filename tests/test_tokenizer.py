"""The tokenizer gives SentencePiece's own ids and text, ends every caption, and loads without SentencePiece."""

import json
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from data_scripts import scenes, train_tokenizer
from data_scripts.caption_table import write_caption_table

# Real language, with more of it than the scenes have, for merges that compete.
SENTENCES = [
    "Two dogs are running through the tall grass .",
    "A man in a blue shirt, holding 3 ropes, climbs the rock-face!",
    "The café's naïve owner pays £5.50 for crème brûlée ½ off",
    "Children play -- near the well ; bananas, banana, anna, ana.",
    "한국어 글 ガギグ Việt Nam, Ελληνικά και русский",
    "مُحَمَّد שָׁלוֹם",
    'He said "don\'t (ever) [go]..." #1 & left @ 10:30',
]
NASTY = [
    "",
    " ",
    "  two  spaces ",
    "line\nbreak\r\nand\ttab",
    "ﬁne dogs \uff34\uff57\uff4f ™ № ㎏",
    unicodedata.normalize("NFD", "Việt Nam café 한국어 ガギ"),
    "ｶﾞｷﾞ",
    "\uff21\uff5e\uff22",
    "</s> <pad> <unk> <s>",
    "a▁b ▁ c▁▁",
    "👨‍👩‍👧 dogs ❤️",
    "☃☃ ☃☃ a☃b ☃",
    "\u200bzero\u200dwidth\ufeff",
    "\u00a0nbsp\u3000wide\u2028line",
    "a" * 41,
    "ana" * 20,
    "banananananana",
    "\x00null\x01control\x7f",
    "soft\u00adhyphen",
    "مُحَمَّد and שָׁלוֹם",
    "!!!!....,,,,((((",
    "dog" * 2000,
]


def training_captions() -> list[str]:
    rows = scenes.scene_rows({"train": 300, "validation": 30, "test": 30})
    return [caption for row in rows if row.split == "train" for caption in row.captions] + SENTENCES * 3


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_tokenizer.train_sentencepiece(training_captions(), 600)


@pytest.fixture(scope="module")
def reference(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.fixture(scope="module")
def saved(model: bytes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer.as_fast_tokenizer(model, model_max_length=12).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(saved: Path):
    return AutoTokenizer.from_pretrained(saved)


def all_texts() -> list[str]:
    rows = scenes.scene_rows({"train": 300, "validation": 60, "test": 60})
    generator = random.Random(0)
    rubbish = ["".join(generator.choices("aabnx .,  thedog", k=40)) for _ in range(2000)]
    return [caption for row in rows for caption in row.captions] + SENTENCES + NASTY + rubbish


def composed(text: str) -> str:
    """The text with accents and syllables composed, and one plain space for every run of blanks and control characters."""
    text = unicodedata.normalize("NFC", text).replace("▁", " ")
    return " ".join("".join(" " if unicodedata.category(c) in ("Zs", "Zl", "Zp", "Cc") else c for c in text).split(" "))


@pytest.mark.slow
def test_ids_are_sentencepieces_own_and_eos(tokenizer, reference) -> None:
    for text in all_texts():
        expected = [*reference.encode(composed(text)), reference.eos_id()]
        assert tokenizer(text)["input_ids"] == expected, repr(text)


def test_decoded_text_is_sentencepieces_own(tokenizer, reference) -> None:
    for text in all_texts():
        ids = reference.encode(composed(text))
        expected = reference.decode(ids)
        assert tokenizer.decode([*ids, reference.eos_id()]).removesuffix("</s>") == expected, repr(text)
        if reference.unk_id() not in ids:
            assert tokenizer.decode([*ids, reference.eos_id()], skip_special_tokens=True) == expected


SPELLINGS = [
    "Persian: \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",  # a zero-width non-joiner inside a word
    "Hindi: \u0915\u094d\u200d\u0937 \u0930\u093e\u0937\u094d\u091f\u094d\u0930",  # a zero-width joiner
    "Thai: \u0e01\u0e33\u0e25\u0e31\u0e07 \u0e19\u0e49\u0e33",  # sara am, which NFKC takes apart
    "Lao: \u0e99\u0ecd\u0ec9\u0eb2 \u0e81\u0eb3",
    "Khmer: \u1788\u17d2\u1798\u17c4\u17c7\u200b\u1781\u17d2\u1789\u17bb\u17c6",  # a zero-width space between words
    "Arabic: \u0643\u064e\u0644\u0652\u0628\u064c \ufdfa \u0640\u0640",
    "Hebrew: \u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd",
    "Korean: \ud55c\uad6d\uc5b4 \u3131\u314f \u1112\u119e\u11ab",  # syllables, letters, an old syllable without a code of its own
    "Japanese: \uff21\uff11\u3000\uff76\uff9e \u332b \u30ac",  # full and half width, a square, a composed kana
    "Chinese: \uf900 \u8eca\ufe00",
    "Vietnamese: Ti\u1ebfng Vi\u1ec7t",
    "Tamil: \u0b95\u0bca \u0b95\u0bcb",
    "fractions and ligatures: \u00bd \u2153 \ufb01ne 10\u00b2 \u2116 5 \u2122",
    "family: \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f \U0001f44d\U0001f3fd",
]


def test_captions_of_any_script_come_back_as_they_are_scored() -> None:
    """From a table, whose captions are in NFC, through token IDs and back: only blanks may differ."""
    captions = [unicodedata.normalize("NFC", text) for text in SPELLINGS]
    tokenizer = train_tokenizer.train_tokenizer([unicodedata.normalize("NFD", text) for text in captions], 1000)
    for caption in captions:
        decoded = tokenizer.decode(tokenizer(caption)["input_ids"], skip_special_tokens=True)
        assert decoded.split() == caption.split(), caption


def test_special_tokens_are_set_and_distinct(tokenizer, reference) -> None:
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    theirs = [reference.pad_id(), reference.bos_id(), reference.eos_id(), reference.unk_id()]
    assert ids == theirs and len(set(ids)) == 4
    assert len(tokenizer) == tokenizer.vocab_size == reference.get_piece_size()


def test_eos_survives_truncation_and_is_attended_to(tokenizer) -> None:
    assert tokenizer.model_max_length == 12
    batch = tokenizer(["a dog", " ".join(SENTENCES)], truncation=True, padding=True)
    assert [len(ids) for ids in batch["input_ids"]] == [12, 12]
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        last = sum(mask) - 1
        assert mask == [1] * (last + 1) + [0] * (11 - last)
        assert ids[last] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[:last]
        assert set(ids[last + 1 :]) <= {tokenizer.pad_token_id}
        assert tokenizer.bos_token_id not in ids


@pytest.mark.slow
def test_loads_and_encodes_without_sentencepiece_and_protobuf(saved: Path, tokenizer, tmp_path: Path) -> None:
    code = """
import json, sys
sys.modules.update({'sentencepiece': None, 'google.protobuf': None})
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print(json.dumps([tokenizer(text)['input_ids'] for text in json.loads(sys.argv[2])]))
"""
    texts = SENTENCES + [text for text in NASTY if len(text) < 200]
    command = [sys.executable, "-c", code, str(saved), json.dumps(texts)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert json.loads(result.stdout.splitlines()[-1]) == [tokenizer(text)["input_ids"] for text in texts]


def test_long_captions_are_learnt_from(capfd) -> None:
    """SentencePiece leaves lines over 4,192 bytes out unless told otherwise."""
    long = "filler words " * 400 + "Zyzzyva"
    tokenizer = train_tokenizer.train_tokenizer([long, "a b c"], vocab_size=100)
    assert tokenizer.unk_token_id not in tokenizer("Zyzzyva")["input_ids"]


def test_command_trains_on_training_captions_only_and_says_how_many_tokens(tmp_path: Path, capsys) -> None:
    rows = scenes.scene_rows({"train": 40, "validation": 4, "test": 4})
    for row in rows:
        if row.split != "train":
            row.captions.append("Ω")
    write_caption_table(rows, tmp_path / "table")
    command = [str(tmp_path / "table"), "--output_dir", str(tmp_path / "tokenizer"), "--max_length", "9"]
    train_tokenizer.main(command)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    shown = capsys.readouterr().out
    num_captions = sum(len(row.captions) for row in rows if row.split == "train")
    assert f"{len(tokenizer)} tokens, trained on {num_captions} captions\nfewer than 8,000 tokens" in shown
    assert tokenizer.unk_token_id in tokenizer("Ω")["input_ids"]
    assert tokenizer.model_max_length == 9
    with pytest.raises(SystemExit) as stop:
        train_tokenizer.main(command)  # there is a tokenizer already
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("captions", "size", "length", "sentence"),
    [
        ([], 100, None, "no captions"),
        ([" "], 100, None, "no captions"),
        (["abc"], 3, None, "tokenizer of 3 tokens"),
        (["abc"], 50, 1, "no room"),
    ],
)
def test_impossible_wishes_are_one_sentence(captions: list[str], size: int, length: int | None, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        train_tokenizer.train_tokenizer(captions, size, length)
