"""Captions in other languages: the tokenizer is chosen by what references are written in, and gives the words a reader knows."""

import json
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

import evaluate_captions
from metrics import CaptionScorer, CiderD
from metrics.caption_scores.tokenizers import TOKENIZERS, choose_tokenizer, get_split
from metrics.caption_scores.tokenizers import _intl as put_blanks
from reporting.model_card import write_model_card
from reporting.page import write_page

# language, caption, the tokenizer chosen, its words
SENTENCES = [
    ("English", "A dog's ball, on the grass.", "ptb", "a dog 's ball on the grass"),
    ("German", "Ein Hund läuft über die grüne Wiese.", "ptb", "ein hund läuft über die grüne wiese"),
    ("Vietnamese", "Một con chó đang chạy trên bãi cỏ.", "ptb", "một con chó đang chạy trên bãi cỏ"),
    ("Russian", "Собака бежит по «траве».", "ptb", "собака бежит по траве"),
    ("Arabic", "كلب يركض على العشب، ورجل يجلس.", "intl", "كلب يركض على العشب ورجل يجلس"),
    ("Persian", "یک سگ روی چمن می\u200cدود؟", "intl", "یک سگ روی چمن می\u200cدود"),
    ("Hindi", "एक कुत्ता घास पर दौड़ रहा है।", "intl", "एक कुत्ता घास पर दौड़ रहा है"),
    ("Korean", "개가 풀밭 위를 달리고 있다.", "intl", "개가 풀밭 위를 달리고 있다"),
    ("Chinese", "一只狗在 草地上。", "char", "一 只 狗 在 草 地 上"),
    ("Thai", "สุนัขวิ่ง", "char", "ส ุ น ั ข ว ิ ่ ง"),
    ("Japanese", "犬が、芝生の上を走る。", "char", "犬 が 芝 生 の 上 を 走 る"),
]


@pytest.mark.parametrize(("language", "caption", "name", "words"), SENTENCES, ids=[row[0] for row in SENTENCES])
def test_the_tokenizer_is_chosen_by_the_script_and_gives_the_known_words(language, caption, name, words):
    scorer = CaptionScorer([[caption], ["zzz"]])
    assert scorer.tokenizer == choose_tokenizer([caption]) == name
    tokens = scorer.table.tokens.words[: scorer.table.tokens.ends[0]]
    assert scorer.index.words.texts(tokens) == words.split(" ")
    report = scorer.report([caption, "zzz"])
    assert report["tokenizer"] == name and report["metrics"]["cider"] > 0
    assert CiderD([[caption]]).tokenizer == name


def test_a_better_chinese_caption_scores_higher_where_ptb_gives_zero_to_both():
    references = [["一只狗在草地上奔跑"], ["两个男人坐在船上"], ["一个女孩在吃苹果"]]
    better, worse = ["一只狗在草地上", "男人在船上", "女孩吃苹果"], ["一辆红色汽车", "猫睡觉", "下雪的山"]
    chosen = CaptionScorer(references)
    assert chosen.score(better)["cider"] > 1 > chosen.score(worse)["cider"]
    with pytest.warns(UserWarning, match="'char'"):
        ptb = CaptionScorer(references, tokenizer="ptb")
    assert ptb.score(better)["cider"] == ptb.score(worse)["cider"] == 0


def test_english_with_a_few_names_in_other_scripts_stays_with_ptb_and_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CaptionScorer([["A sign says 北京 in red letters"], ["a dog"]]).tokenizer == "ptb"


def test_unknown_and_missing_tokenizers_are_named():
    with pytest.raises(ValueError, match="there is no tokenizer 'ptp'"):
        CaptionScorer([["a dog"]], tokenizer="ptp")
    if find_spec("sacrebleu") is None:
        with pytest.raises(ValueError, match="pip install 'sacrebleu'"):
            CaptionScorer([["a dog"]], tokenizer="zh")
    else:
        assert get_split("13a")(["A dog, 3,000 cats."]) == [["a", "dog", "3,000", "cats"]]
        assert get_split("zh")(["一只dog在跑。"]) == [["一", "只", "dog", "在", "跑"]]
    if find_spec("MeCab"):
        assert get_split("ja-mecab")(["犬が芝生の上を走る。"]) == [["犬", "が", "芝生", "の", "上", "を", "走る"]]


def test_evaluation_takes_the_tokenizer_says_it_and_warns_where_it_cannot_split(tmp_path, capsys):
    predictions = tmp_path / "captions.jsonl"
    rows = [{"image_id": str(i), "caption": text, "references": [text]} for i, text in enumerate(["一只狗", "两个人"])]
    predictions.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    options = ["--predictions", str(predictions), "--output_dir", str(tmp_path)]
    for chosen, said in (("auto", "char"), ("ptb", "ptb"), ("char", "char")):
        evaluate_captions.main([*options, "--metric_tokenizer", chosen])
        results = json.loads((tmp_path / "results.json").read_text())
        printed = capsys.readouterr()
        assert results["tokenizer"] == said and f"Tokenizer: {said}" in printed.out
        assert ("warning:" in printed.err) == (chosen == "ptb")
        page = write_page(tmp_path, [], [], results).read_text(encoding="utf-8")
        assert f"<b>Tokenizer</b>: {said}" in page
        card = write_model_card(
            tmp_path, kind="vit-gpt2", model_name="me/model", results=results, command="train", options={}
        )
        assert f"tokenizer `{said}`" in card.read_text(encoding="utf-8")


def test_intl_puts_blanks_where_sacrebleu_puts_them():
    """The fixture: strings of ours, and what sacrebleu's tokenizer gives (version in the file)."""
    fixture = json.loads((Path(__file__).parent / "fixtures" / "intl_tokens.json").read_text(encoding="utf-8"))
    for caption, tokens in fixture["captions"]:
        assert put_blanks(caption).split() == tokens
    assert set(TOKENIZERS) >= {"ptb", "intl", "char", "13a", "zh", "ja-mecab"}
