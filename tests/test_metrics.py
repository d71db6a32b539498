"""Laws of the caption scores, held against plain implementations written from the papers and, where it is there, pycocoevalcap."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from fresh import run_fresh
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import metrics as benchmark
from metrics import METRIC_NAMES, CaptionScorer, CiderD, compute_score, tokenize
from metrics.caption_scores import coco_caption as drop_in
from metrics.caption_scores.baselines import derangement
from metrics.caption_scores.command import main
from metrics.caption_scores.java_metrics import JavaMetricError, meteor
from metrics.caption_scores.ngrams import KeyNumbers, PieceNumbers, cut_pieces, sort_pairs
from metrics.caption_scores.occurrences import CELLS_AT_ONCE, similar_sizes

REPOSITORY = Path(__file__).parents[1]
PREDICTIONS, REFERENCES = benchmark.make_captions(40)
WORDS = ["a", "dog", "cat", "runs", "on", "red", "grass", "the", ",", "."]
captions = st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join)


def prediction_sets(num_references: int) -> dict[str, tuple[list[str], list[list[str]]]]:
    # images with different numbers of references, but for one each
    references = [texts[: 1 + position % num_references] for position, texts in enumerate(REFERENCES)]
    predictions = {
        "related": PREDICTIONS,
        "shuffled": PREDICTIONS[1:] + PREDICTIONS[:1],
        "constant": ["A dog runs."] * len(references),
        "empty": [""] * len(references),
        "copied": [texts[0] for texts in references],
        "unknown words": ["zyx zyx wvu zyx wvu"] * len(references),
    }
    return {name: (texts, references) for name, texts in predictions.items()}


def ngrams(words: list[str], order: int) -> Counter:
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))


def plain_bleu(predictions: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    length = sum(map(len, predictions))
    closest = sum(
        min((abs(len(text) - len(words)), len(text)) for text in texts)[1]
        for words, texts in zip(predictions, references, strict=True)
    )
    scores, product = [], 1.0
    for order in range(1, 5):
        matches = guesses = 0
        for words, texts in zip(predictions, references, strict=True):
            largest = Counter()
            for text in texts:
                largest |= ngrams(text, order)
            matches += (ngrams(words, order) & largest).total()
            guesses += max(0, len(words) - order + 1)
        product *= (matches + 1e-15) / (guesses + 1e-9)
        scores.append(product ** (1 / order))
    ratio = (length + 1e-15) / (closest + 1e-9)
    return [score * math.exp(min(0, 1 - 1 / ratio)) for score in scores]


def plain_rouge_l(words: list[str], texts: list[list[str]]) -> float:
    def common(first: list[str], second: list[str]) -> int:
        row = [0] * (len(second) + 1)
        for one in first:
            last = row[:]
            for j, other in enumerate(second):
                row[j + 1] = last[j] + 1 if one == other else max(last[j + 1], row[j])
        return row[-1]

    words, texts = words or [""], [text or [""] for text in texts]
    precision = max(common(words, text) / len(words) for text in texts)
    recall = max(common(words, text) / len(text) for text in texts)
    return 0.0 if not precision * recall else 2.44 * precision * recall / (recall + 1.44 * precision)


def plain_cider_d(predictions: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    document_frequency = Counter()
    for texts in references:
        document_frequency.update({gram for text in texts for n in range(1, 5) for gram in ngrams(text, n)})

    def vector(words: list[str], order: int) -> dict[tuple, float]:
        idf = {g: math.log(len(references)) - math.log(max(1, document_frequency[g])) for g in ngrams(words, order)}
        return {gram: count * idf[gram] for gram, count in ngrams(words, order).items()}

    scores = []
    for words, texts in zip(predictions, references, strict=True):
        total = 0.0
        for text in texts:
            difference = max(0, len(words) - 1) - max(0, len(text) - 1)
            for order in range(1, 5):
                ours, theirs = vector(words, order), vector(text, order)
                dot = sum(min(weight, theirs.get(gram, 0)) * theirs.get(gram, 0) for gram, weight in ours.items())
                norm = math.hypot(*ours.values()) * math.hypot(*theirs.values())
                total += math.exp(-(difference**2) / 72) * (dot / norm if norm else 0)
        scores.append(10 * total / 4 / len(texts))
    return scores


@pytest.mark.parametrize("num_references", [1, 3, 5])
def test_scores_are_those_of_plain_implementations(num_references):
    for name, (predictions, references) in prediction_sets(num_references).items():
        words = [tokenize(text) for text in predictions]
        texts = [[tokenize(text) for text in of_image] for of_image in references]
        cider = plain_cider_d(words, texts)
        rouge = [plain_rouge_l(*pair) for pair in zip(words, texts, strict=True)]
        expected = [*plain_bleu(words, texts), np.mean(rouge), np.mean(cider)]
        scorer = CaptionScorer(references)
        assert list(scorer.score(predictions).values()) == pytest.approx(expected, abs=1e-9), name
        assert scorer.per_image_cider(predictions) == pytest.approx(cider, abs=1e-9), name


def test_a_long_caption_makes_no_wide_block_of_short_ones():
    sizes = np.array([9] * 5000 + [0, 5000, 16, 17])
    blocks = list(similar_sizes(sizes))
    assert sorted(np.concatenate(blocks).tolist()) == list(range(len(sizes)))
    assert all(len(block) * sizes[block].max() <= 2 * CELLS_AT_ONCE for block in blocks)


@pytest.mark.parametrize("longest", [16, 17, 33, 64, 65, 150])
def test_captions_of_any_length_have_the_scores_of_plain_implementations(longest):
    """Their words are bits of numbers of 16, 32 and 64 bits, and of several of those beyond."""
    generator = random.Random(longest)
    words = [[generator.choices("abcdef", k=generator.choice([3, longest])) for _ in range(4)] for _ in range(5)]
    predictions, references = [texts[0] for texts in words], [texts[1:] for texts in words]
    cider = plain_cider_d(predictions, references)
    rouge = [plain_rouge_l(*pair) for pair in zip(predictions, references, strict=True)]
    expected = [*plain_bleu(predictions, references), np.mean(rouge), np.mean(cider)]
    scorer = CaptionScorer([[" ".join(text) for text in texts] for texts in references])
    assert list(scorer.score([" ".join(text) for text in predictions]).values()) == pytest.approx(expected, abs=1e-12)


def test_words_in_the_wrong_order_with_hundreds_of_words_between_are_no_longer_subsequence():
    """What an addition carries passes through whole numbers of 64 bits."""
    reference = ["a", *["word"] * 250, "b"]
    scores = CaptionScorer([[" ".join(reference)]]).score(["b a"])
    assert scores["rouge_l"] == pytest.approx(plain_rouge_l(["b", "a"], [reference]), abs=1e-12)


@pytest.mark.skipif(find_spec("pycocoevalcap") is None, reason="the comparison needs pycocoevalcap")
@pytest.mark.parametrize("num_references", [1, 2, 5])
def test_scores_are_those_of_pycocoevalcap(num_references):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    for name, (predictions, references) in prediction_sets(num_references).items():
        theirs = {i: [" ".join(tokenize(text)) for text in texts] for i, texts in enumerate(references)}
        ours = {i: [" ".join(tokenize(text))] for i, text in enumerate(predictions)}
        bleus, _ = Bleu(4).compute_score(theirs, ours, verbose=0)
        expected = [*bleus, Rouge().compute_score(theirs, ours)[0], Cider().compute_score(theirs, ours)[0]]
        scores = CaptionScorer(references).score(predictions)
        assert list(scores.values()) == pytest.approx(expected, abs=1e-9), name


def test_a_perfect_prediction_has_bleu_and_rouge_one():
    scores = CaptionScorer(REFERENCES).score([texts[-1] for texts in REFERENCES])
    assert all(scores[name] == pytest.approx(1, abs=1e-8) for name in METRIC_NAMES[:5])


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(captions, st.lists(captions, min_size=1, max_size=4)), min_size=2, max_size=6), st.randoms())
def test_order_of_images_and_of_references_does_not_matter(pairs, random):
    predictions, references = zip(*pairs, strict=True)
    before = CaptionScorer(references).score(predictions)
    random.shuffle(pairs)
    shuffled = [(text, random.sample(texts, len(texts))) for text, texts in pairs]
    predictions, references = zip(*shuffled, strict=True)
    assert CaptionScorer(references).score(predictions) == pytest.approx(before, abs=1e-9)


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(captions, st.lists(captions, min_size=1, max_size=3), captions)
def test_another_reference_never_lowers_rouge_l(prediction, texts, another):
    fewer = CaptionScorer([texts]).score([prediction])["rouge_l"]
    assert CaptionScorer([[*texts, another]]).score([prediction])["rouge_l"] >= fewer - 1e-12


def test_the_derangement_is_a_fixed_permutation_without_fixed_point():
    for size in range(2, 200):
        source = derangement(size)
        assert sorted(source) == list(range(size))
        assert (source != np.arange(size)).all()
        assert (source == derangement(size)).all()


def test_rewards_of_a_batch_are_the_scores_of_its_images_in_the_whole_set():
    whole = CaptionScorer(REFERENCES).per_image_cider(PREDICTIONS)
    fitted = CiderD(REFERENCES)
    rewards = fitted.score(PREDICTIONS[5:9], REFERENCES[5:9])
    assert rewards.tolist() == pytest.approx(whole[5:9], abs=1e-9)
    # words that no reference of the fitted set holds still match each other
    assert fitted.score(["zyx wvu tsr qpo"], [["zyx wvu tsr qpo"]])[0] == pytest.approx(10, abs=1e-9)


def test_a_reward_is_the_score_of_the_caption_by_itself():
    images, ended = [7, 2, 7, 0], [True, False, True, True]
    captions = [PREDICTIONS[7], PREDICTIONS[2], REFERENCES[7][0], PREDICTIONS[0]]
    fitted = CiderD(REFERENCES)
    cider, bleu_4, rouge_l = fitted.reward(captions, ended, images)
    assert cider.tolist() == fitted.score(captions, [REFERENCES[image] for image in images]).tolist()
    for caption, image, *scores in zip(captions, images, bleu_4, rouge_l, strict=True):
        alone = CaptionScorer([REFERENCES[image]]).score([caption])
        assert scores == pytest.approx([alone["bleu_4"], alone["rouge_l"]], abs=1e-9)


def test_an_end_that_counts_is_a_word_of_references_and_of_captions_that_ended():
    references = [["a dog runs", "the dog"], ["a cat on a mat", "a dog"]]
    as_word = CiderD([[f"{caption} zzz" for caption in captions] for captions in references])
    counted = CiderD(references, count_end=True)
    captions, ended = ["a dog runs", "a dog runs", "a cat on a"], [True, False, False]
    by_hand = ["a dog runs zzz", "a dog runs", "a cat on a"]
    for ours, theirs in zip(
        counted.reward(captions, ended, [0, 0, 1]), as_word.reward(by_hand, ended, [0, 0, 1]), strict=True
    ):
        assert ours.tolist() == pytest.approx(theirs.tolist(), abs=1e-9)
    whole, broken_off, _ = counted.reward(captions, ended, [0, 0, 1])[0]
    assert whole > broken_off


@pytest.mark.parametrize(
    ("references", "predictions", "sentence"),
    [
        ([["a dog"], []], ["a", "b"], r"references\[1\] is empty"),
        ([], [], "references must be a list"),
        ([["a dog"], "a cat"], ["a", "b"], r"references\[1\] is 'a cat', not a list"),
        ([["a dog"], float("nan")], ["a", "b"], r"references\[1\] is nan, not a list"),
        ([["a dog"], ["a", None]], ["a", "b"], r"references\[1\] holds None, not a string"),
        ([["a dog"], ["a cat"]], ["a"], "1 as predictions for 2 images"),
        ([["a dog"]], "a dog", "one string as predictions"),
        ([["a dog"], ["a cat"]], ["a", float("nan")], r"predictions\[1\] is nan, not a string"),
    ],
)
def test_bad_input_is_one_clear_sentence(references, predictions, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        CaptionScorer(references).score(predictions)
    assert "\n" not in str(error.value)


def test_captions_of_their_own_images_beat_the_shuffled_baseline_and_others_do_not():
    scorer = CaptionScorer(REFERENCES)
    report = scorer.report(PREDICTIONS)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["beats_shuffled"] and report["warning"] is None
    shuffled = [PREDICTIONS[source] for source in derangement(len(PREDICTIONS))]
    assert report["shuffled"] == scorer.score(shuffled)
    for captions in (shuffled, ["a dog runs"] * len(REFERENCES), [""] * len(REFERENCES)):
        report = scorer.report(captions)
        assert not report["beats_shuffled"] and report["warning"]
    one_image = CaptionScorer(REFERENCES[:1]).report(PREDICTIONS[:1])
    assert not one_image["beats_shuffled"] and one_image["warning"]


def test_intervals_are_those_of_the_mean():
    """For a mean over images the bootstrap's interval is known: 1.96 standard errors to either side."""
    predictions, references = benchmark.make_captions(400)
    scorer = CaptionScorer(references)
    values = np.array(scorer.per_image_cider(predictions))
    low, high = scorer.report(predictions)["intervals"]["cider"]
    error = values.std() / math.sqrt(len(values))
    assert [low, high] == pytest.approx([values.mean() - 1.96 * error, values.mean() + 1.96 * error], abs=0.25 * error)
    report = scorer.report(predictions)
    assert all(low < report["metrics"][name] < high for name, (low, high) in report["intervals"].items())


def test_the_best_constant_caption_beats_its_rivals():
    references = [["a dog runs on grass"], ["a dog runs on sand"], ["a dog sits"], ["two men in a boat"]]
    rivals = [texts[0] for texts in references]
    scorer = CaptionScorer(references)
    constant = scorer.report(rivals)["constant"]
    by_hand = {text: scorer.score([text] * 4)["cider"] for text in rivals}
    assert constant["caption"] == "a dog runs on grass"  # of captions as good, the first
    assert constant["cider"] == pytest.approx(max(by_hand.values()))
    trained = CaptionScorer(references, training_captions=["a dog", "zyx"]).report(rivals)["constant"]
    assert trained["caption"] == "a dog"


def test_diagnostics_count_what_they_say():
    scorer = CaptionScorer([["A dog."], ["Three red cats."]], training_captions=["a DOG", "a cat"])
    diagnostics = scorer.report(["A dog!", "red cat red cat red cat"], ended=[True, False])["diagnostics"]
    expected = {"ended": 0.5, "repeated_trigram": 0.5, "mean_length": 4, "mean_reference_length": 2.5}
    assert diagnostics == {**expected, "unique_words": 4, "novel": 0.5}
    with pytest.raises(ValueError, match="1 values of `ended` for 2 images"):
        scorer.report(["a", "b"], ended=[True])


@pytest.mark.slow
def test_evaluate_loads_the_metric_offline_in_another_process(tmp_path):
    program = (
        "import os; os.environ['HF_EVALUATE_OFFLINE'] = '1'\n"
        "import evaluate, json, sys\n"
        "metric = evaluate.load(sys.argv[1])\n"
        "print(json.dumps(metric.compute(predictions=['a dog runs'], references=[['A dog runs.', 'It sits.']])))"
    )
    printed = run_fresh(program, REPOSITORY / "metrics" / "caption_scores", folder=tmp_path)
    scores = json.loads(printed.splitlines()[-1])
    assert scores == CaptionScorer([["A dog runs.", "It sits."]]).score(["a dog runs"])


@pytest.fixture
def coco_files(tmp_path) -> tuple[Path, Path]:
    annotations, results = tmp_path / "annotations.json", tmp_path / "results.json"
    rows = [{"image_id": i, "caption": text} for i, texts in enumerate(REFERENCES) for text in texts]
    annotations.write_text(json.dumps({"annotations": rows, "images": []}))
    results.write_text(json.dumps([{"image_id": i, "caption": text} for i, text in enumerate(PREDICTIONS)][1:]))
    return results, annotations


def test_the_command_scores_cocos_files_with_numpy_alone(coco_files, tmp_path):
    """In a process of its own, from the package's folder, as it is when installed."""
    program = (
        "import sys; from caption_scores.command import main; code = main(sys.argv[1:]);"
        "assert not {'evaluate', 'datasets', 'torch', 'sacrebleu', 'pycocoevalcap'} & set(sys.modules); sys.exit(code)"
    )
    process = subprocess.run(
        [sys.executable, "-c", program, *map(str, coco_files), "--json", "report.json"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPOSITORY / "metrics")}, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    expected = CaptionScorer(REFERENCES[1:]).report(PREDICTIONS[1:])
    for name, (low, high) in expected["intervals"].items():
        assert f"{name:8} {expected['metrics'][name]:7.4f}  {low:.4f} to {high:.4f}" in process.stdout
    assert process.stderr.startswith("1 annotated image")
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row.pop("image_id") for row in report["per_image"]] == list(range(1, len(REFERENCES)))
    assert report == expected


def test_the_command_names_what_is_wrong_with_a_file(coco_files, tmp_path, monkeypatch, capsys):
    results, annotations = coco_files
    broken = tmp_path / "broken.json"
    monkeypatch.setenv("PATH", str(tmp_path))
    for content in (
        None, "{", "[]", '{"annotations": []}', '[{"image_id": 4711, "caption": "a dog"}]', '[{"image_id": 1}]',
        '[{"image_id": 1, "caption": null}]', '[{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}]',
    ):  # fmt: skip
        broken.write_text(content) if content else broken.unlink(missing_ok=True)
        assert main([str(broken), str(annotations)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and "broken.json" in error and error.count("\n") == 1
    broken.write_text('[{"image_id": "1", "caption": "a dog"}]')  # the annotations have numbers
    assert main([str(broken), str(annotations)]) == 2 and "which has 1" in capsys.readouterr().err
    assert main([str(results), str(annotations), "--spice"]) == 2
    assert "no `java`" in capsys.readouterr().err


@pytest.mark.parametrize("num_references", [1, 5])
def test_pycocoevalcaps_classes_give_what_pycocoevalcap_gives(num_references):
    """Against it where it is installed, else against the scorer."""
    predictions, references = PREDICTIONS, [texts[:num_references] for texts in REFERENCES]
    rows = {f"image {i}": [{"caption": text} for text in texts] for i, texts in enumerate(references)}
    gts = drop_in.PTBTokenizer().tokenize(rows)
    res = drop_in.PTBTokenizer().tokenize({f"image {i}": [{"caption": text}] for i, text in enumerate(predictions)})
    bleus, of_images = drop_in.Bleu(4).compute_score(gts, res)
    rouge, rouges = drop_in.Rouge().compute_score(gts, res)
    cider, ciders = drop_in.Cider().compute_score(gts, res)
    scorer = CaptionScorer(references)
    assert [*bleus, rouge, cider] == pytest.approx(list(scorer.score(predictions).values()), abs=1e-12)
    assert ciders.tolist() == pytest.approx(scorer.per_image_cider(predictions), abs=1e-12)
    assert compute_score(gts, res, "none")[0]["cider"] == cider
    if find_spec("pycocoevalcap"):
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge

        expected, expected_of_images = Bleu(4).compute_score(gts, res, verbose=0)
        assert bleus == pytest.approx(expected, abs=1e-12)
        assert np.array(of_images) == pytest.approx(np.array(expected_of_images), abs=1e-12)
        assert rouges == pytest.approx(Rouge().compute_score(gts, res)[1], abs=1e-12)
        assert ciders == pytest.approx(Cider().compute_score(gts, res)[1], abs=1e-12)

    class Coco:  # what COCOEvalCap uses of pycocotools' COCO
        def __init__(self, captions):
            self.imgToAnns = captions

        def getImgIds(self):
            return list(self.imgToAnns)

    evaluation = drop_in.COCOEvalCap(
        Coco(rows), Coco({f"image {i}": [{"caption": text}] for i, text in enumerate(predictions)})
    )
    evaluation.evaluate()
    assert evaluation.eval["CIDEr"] == pytest.approx(cider, abs=1e-12)
    assert evaluation.imgToEval["image 3"]["Bleu_4"] == pytest.approx(of_images[3][3], abs=1e-12)
    with pytest.raises(drop_in.InputError, match="image 3"):
        compute_score(gts, {image: texts for image, texts in res.items() if image != "image 3"})


def test_words_with_a_no_break_space_count_as_in_coco_caption():
    """BLEU and CIDEr-D split "1 1/2" in two, ROUGE-L does not; also where no reference has the word."""
    references = [["half of 1 1/2 apples", "it is 1 1/2 apples"], ["a dog", "two dogs run"]]
    for predictions in (["1 1/2 apples", "a dog"], ["2 1/2 apples", "2 1/4 apples"]):
        scorer = CaptionScorer(references)
        split = [[" ".join(tokenize(text)).replace("\xa0", " ") for text in texts] for texts in references]
        as_split = CaptionScorer(split, tokenizer="none").score([" ".join(tokenize(text)) for text in predictions])
        scores = scorer.score(predictions)
        assert {name: scores[name] for name in METRIC_NAMES if name != "rouge_l"} == pytest.approx(
            {name: as_split[name] for name in METRIC_NAMES if name != "rouge_l"}, abs=1e-12
        )
        rouge = [
            plain_rouge_l(tokenize(text), [*map(tokenize, texts)])
            for text, texts in zip(predictions, references, strict=True)
        ]
        assert scores["rouge_l"] == pytest.approx(np.mean(rouge), abs=1e-12)
        # the same by pycocoevalcap's classes, from what PTBTokenizer gives
        gts, res = (
            drop_in.PTBTokenizer().tokenize(
                {i: [{"caption": text} for text in texts] for i, texts in enumerate(captions)}
            )
            for captions in (references, [[text] for text in predictions])
        )
        assert drop_in.Rouge().compute_score(gts, res)[0] == pytest.approx(np.mean(rouge), abs=1e-12)
        assert drop_in.Cider().compute_score(gts, res)[0] == pytest.approx(scores["cider"], abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(-3, 60), max_size=40), max_size=5))
def test_keys_are_numbered_as_by_a_dict(batches):
    table, numbers = KeyNumbers(), {}
    for batch in batches:
        given_ = table.number(np.array(batch, dtype=np.int64) << 40).tolist()
        for key, number in zip(batch, given_, strict=True):
            assert numbers.setdefault(key, number) == number
    assert sorted(numbers.values()) == list(range(table.size))


@pytest.mark.parametrize("largest", [7, (1 << 31) - 1])
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=40))
def test_pairs_are_sorted_with_their_places(largest, pairs):
    """By one sort where a pair and its place fit in one number, and by argsort where they do not."""
    pairs = [(largest - high, largest - low) for high, low in pairs]
    place = np.arange(len(pairs)) * 3
    high, low = (np.array([pair[side] for pair in pairs], dtype=np.int32) for side in (0, 1))
    keys, first, sorted_place = sort_pairs(high, low, place)
    in_order = sorted(zip(pairs, place.tolist(), strict=True))
    assert [(key >> 32, key & (1 << 32) - 1) for key in keys.tolist()] == sorted(set(pairs))
    assert first.tolist() == [
        position for position, (pair, _) in enumerate(in_order) if pair != in_order[position - 1][0] or not position
    ]
    assert sorted_place.tolist() == [where for _, where in in_order]


PIECES = st.lists(
    st.one_of(
        st.sampled_from(["a", "b" * 7, "b" * 8, "b" * 9, "b" * 16, "b" * 17, "ü" * 9, "ü" * 16]), st.text(max_size=24)
    )
)


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(st.lists(PIECES.map("  ".join), min_size=1, max_size=6), st.lists(PIECES.map("\u3000".join), max_size=3))
def test_captions_are_cut_at_blanks_and_the_same_pieces_have_the_same_number(captions, others):
    """As str.split cuts them, and as a dict numbers them; chunks of long pieces are not taken for short pieces."""
    numbers, place_of = PieceNumbers(), {}
    for texts in (captions, others or [""], captions):
        text, start, length, ends = cut_pieces(texts)
        split = [caption.replace("\0", "\1").split() for caption in texts]  # the tokenizer knows neither
        assert np.diff(ends, prepend=0).tolist() == list(map(len, split))
        pieces = [text[begin : begin + size].tobytes() for begin, size in zip(start, length, strict=True)]
        assert [piece.decode("utf-8", "surrogatepass") for piece in pieces] == [piece for row in split for piece in row]
        for piece, number in zip(pieces, numbers.number(text, start, length).tolist(), strict=True):
            assert place_of.setdefault(piece, number) == number
    assert len(set(place_of.values())) == len(place_of)


def test_java_metrics_say_what_is_missing_and_do_not_hang(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(JavaMetricError, match="no `java` on the PATH"):
        meteor(PREDICTIONS, REFERENCES)
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    java.chmod(0o755)
    if find_spec("pycocoevalcap") is None:
        with pytest.raises(JavaMetricError, match="pip install pycocoevalcap"):
            meteor(PREDICTIONS, REFERENCES)
    else:
        with pytest.raises(JavaMetricError, match="not done after 2 s"):
            meteor(PREDICTIONS, REFERENCES, time_limit=2)


def test_the_benchmark_says_that_it_needs_java(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        benchmark.main([])
    assert stop.value.code == 2
    assert ("install a Java runtime" in capsys.readouterr().err) or find_spec("pycocoevalcap") is None


def readmes_reward(references: list[list[str]]):
    """The function of metrics/README.md."""
    readme = (REPOSITORY / "metrics" / "README.md").read_text(encoding="utf-8")
    block = next(part for part in readme.split("```python\n")[1:] if "cider_reward" in part).split("```")[0]
    lines = [
        line.replace("from caption_scores", "from metrics") for line in block.splitlines() if "Trainer" not in line
    ]
    names = {"references": references}
    exec("\n".join(lines), names)
    return names["cider_reward"]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("trl") is None, reason="needs trl")
@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_trl_trains_a_small_model_on_the_readmes_reward(method, tmp_path):
    import transformers
    import trl
    from datasets import Dataset
    from small_captioners import WORDS, word_tokenizer

    references = [["a dog runs"], ["the cat sits"], ["a big dog"], ["the red cat"]]
    reward, given = readmes_reward(references), []

    def cider_reward(completions, **columns):
        given.extend(reward(completions, **columns))
        return given[-len(completions) :]

    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.GPT2Config(vocab_size=len(WORDS), **sizes, **tokens)
    transformers.GPT2LMHeadModel(config).save_pretrained(
        tmp_path / "model"
    )  # RLOO loads its reference model from there
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "model")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    args = getattr(trl, f"{method}Config")(
        str(tmp_path), per_device_train_batch_size=8, num_generations=8, max_completion_length=5, max_steps=2,
        learning_rate=0.1, report_to="none", use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_dict({"prompt": ["a"] * 4, "references": references})
    trainer = getattr(trl, f"{method}Trainer")
    trainer(model, cider_reward, args, train_dataset=rows, processing_class=word_tokenizer()).train()
    assert len(given) == 16 and max(given) > 0
    assert any((old != new).any() for old, new in zip(before, model.parameters(), strict=True))


def test_the_readmes_reward_for_trl_has_the_signature_that_trl_calls():
    """trl calls a reward by keyword: completions, and every column of the data set, repeated for each completion."""
    completions = [PREDICTIONS[3], PREDICTIONS[5], PREDICTIONS[3]]
    rewards = readmes_reward(REFERENCES)(
        prompts=[""] * 3, completions=completions, completion_ids=[[0]] * 3, trainer_state=None,
        references=[REFERENCES[3], REFERENCES[3], REFERENCES[4]],
    )  # fmt: skip
    of_images = CaptionScorer(REFERENCES).per_image_cider(PREDICTIONS)
    assert rewards[0] == pytest.approx(of_images[3], abs=1e-12) and rewards[0] > max(rewards[1:])
    assert all(type(reward) is float for reward in rewards)


def test_a_caption_of_words_that_no_reference_has_is_novel_or_not_by_its_words():
    references, training = [["a dog runs"], ["a dog sits"]], ["a cat", "a horse"]
    for predictions, novel in ((["a zebra", "a cat"], 0.5), (["a horse", "a cat"], 0.0), (["a zebra", "a bear"], 1.0)):
        report = CaptionScorer(references, training).report(predictions, num_resamples=2)
        assert report["diagnostics"]["novel"] == novel, predictions


@pytest.mark.slow
def test_the_wheel_installs_with_numpy_alone_and_its_command_runs(coco_files, tmp_path):
    """Built as `pip wheel ./metrics` does it, unpacked as pip does it, and run from there."""
    source, site = tmp_path / "metrics", tmp_path / "site"
    shutil.copytree(REPOSITORY / "metrics", source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w"]
    built = subprocess.run([*build, str(tmp_path), str(source)], capture_output=True, text=True)
    if any(reason in built.stderr for reason in ("Cannot import 'setuptools", "No module named", "project.license")):
        pytest.skip("needs pip, and setuptools 77 or newer")
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(tmp_path.glob("caption_scores-*.whl"))) as wheel:
        wheel.extractall(site)
    (about,) = site.glob("caption_scores-*.dist-info")
    metadata = (about / "METADATA").read_text(encoding="utf-8")
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert required == ["Requires-Dist: numpy>=1.26"] and (about / "licenses" / "LICENSE").exists()
    (command,) = re.findall(r"caption-scores = (\S+):(\w+)", (about / "entry_points.txt").read_text())
    program = f"import sys; from {command[0]} import {command[1]} as command; sys.exit(command(sys.argv[1:]))"
    run = subprocess.run(
        [sys.executable, "-c", program, *map(str, coco_files)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert f"cider    {CaptionScorer(REFERENCES[1:]).score(PREDICTIONS[1:])['cider']:7.4f}" in run.stdout
