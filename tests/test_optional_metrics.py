"""CLIPScore against its formula, hallucinated objects counted by hand, Java's scores where Java is; all in one table."""

import json
import math
import shutil
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from PIL import Image
from small_captioners import COLORS, IMAGES, WORDS, word_tokenizer

import evaluate_captions
from metrics.caption_scores.clip_score import ClipScorer
from metrics.caption_scores.command import main as caption_scores
from metrics.caption_scores.intervals import bootstrap_interval
from metrics.caption_scores.object_hallucination import ObjectVocabulary, count_mentions, read_synonyms
from reporting.optional_metrics import image_hashes

CAPTIONS = ["a red dog", "the green cat sits", "a blue dog runs", "a white cat and a dog", "black"]
REFERENCES = [[f"a {color} dog", f"the small cat sits on a {color} big dog and runs"] for color in COLORS]


@pytest.fixture(scope="module", params=["clip", "siglip"])
def clip(request, tmp_path_factory) -> str:
    """A folder with a tiny CLIP or SigLIP of random weights."""
    folder = str(tmp_path_factory.mktemp("clip") / request.param)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(WORDS), "max_position_embeddings": 20, "eos_token_id": 2, "pad_token_id": 0}
    text |= {"projection_size": 16} if request.param == "siglip" else {}
    vision = sizes | {"image_size": 16, "patch_size": 8}
    kind = {"clip": "CLIP", "siglip": "Siglip"}[request.param]
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    square = {"height": 16, "width": 16}
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=square)
    transformers.CLIPProcessor(images, word_tokenizer()).save_pretrained(folder)
    return folder


def by_formula(folder: str) -> tuple[list[float], list[float]]:
    """The paper's two formulas, one caption at a time, with transformers alone."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    padded = {"padding": "max_length", "max_length": 20} if "siglip" in folder else {}

    def unit(output) -> list[float]:
        vector = output.pooler_output[0].tolist()
        return [number / math.hypot(*vector) for number in vector]

    def of_text(text: str) -> list[float]:
        inputs = processor(text=[f"A photo depicts {text}"], return_tensors="pt", **padded)
        return unit(model.get_text_features(**inputs))

    def cosine(first: list[float], second: list[float]) -> float:
        return sum(one * other for one, other in zip(first, second, strict=True))

    clip, ref = [], []
    for image, caption, references in zip(IMAGES, CAPTIONS, REFERENCES, strict=True):
        features = unit(model.get_image_features(**processor(images=[image], return_tensors="pt")))
        clip.append(2.5 * max(cosine(of_text(caption), features), 0))
        nearest = max(max(cosine(of_text(caption), of_text(text)) for text in references), 0)
        ref.append(2 * clip[-1] * nearest / (clip[-1] + nearest) if clip[-1] + nearest else 0.0)
    return clip, ref


def test_clip_scores_are_the_formulas_and_nothing_is_encoded_twice(clip, tmp_path, monkeypatch):
    hashes = [f"image {number}" for number in range(5)]
    scores = ClipScorer(clip, batch_size=2, cache_dir=tmp_path).score(IMAGES, hashes, CAPTIONS, REFERENCES)
    expected = by_formula(clip)
    assert any(expected[0])
    assert scores["clip_score"].tolist() == pytest.approx(expected[0], abs=1e-5)
    assert scores["ref_clip_score"].tolist() == pytest.approx(expected[1], abs=1e-5)

    again = ClipScorer(clip, cache_dir=tmp_path)
    encoded = []
    for name in ("_encode_images", "_encode_texts"):
        encode = getattr(again, name)
        monkeypatch.setattr(again, name, lambda items, encode=encode: encoded.extend(items) or encode(items))
    cached = again.score([None] * 5, hashes, CAPTIONS, REFERENCES)
    assert not encoded
    assert cached["clip_score"].tolist() == scores["clip_score"].tolist()
    # of a new image and a new text, only these
    again.score([None] * 4 + IMAGES[:1], [*hashes[:4], "new"], [*CAPTIONS[:4], "under it"], REFERENCES)
    assert encoded == [IMAGES[0], "A photo depicts under it"]


def test_a_model_without_text_features_is_one_sentence(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(tmp_path)
    transformers.ViTImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ViTModel, which gives no features of images and texts"):
        ClipScorer(str(tmp_path), cache_dir=tmp_path)


SYNONYMS = {"person": ["man", "men", "woman"], "dog": ["puppy"], "hot dog": [], "bus": [], "knife": ["knives"]}


def test_objects_are_found_by_synonym_plural_and_longest_name():
    vocabulary = ObjectVocabulary(["person", "dog", "hot dog", "bus", "knife", "sandwich"], SYNONYMS)
    found = vocabulary.find("Two men and their puppies eat hot dogs and sandwiches on buses, with knives.")
    assert found == ["person", "dog", "hot dog", "sandwich", "bus", "knife"]
    assert vocabulary.find("a glass of grass") == []


def test_hallucinated_objects_are_those_of_neither_annotations_nor_references():
    captions = ["A man with two dogs.", "A puppy and a bus on a bus.", "nothing"]
    objects = [["person", "person"], ["dog"], []]
    references = [["a man"], ["a puppy near a bus stop"], ["a bus"]]
    mentions = count_mentions(captions, objects, references, ObjectVocabulary(["bus"], SYNONYMS))
    assert mentions.named.tolist() == [2, 3, 0] and mentions.hallucinated.tolist() == [1, 0, 0]
    assert mentions.scores() == {"chair_i": 1 / 5, "chair_s": 1 / 3}
    low, high = mentions.intervals()["chair_s"]
    assert low == 0 and high == pytest.approx(1)


def test_an_interval_of_a_mean_is_that_of_its_standard_error():
    values = np.random.default_rng(0).random(400)
    error = 1.96 * values.std() / 20
    interval = bootstrap_interval(values)
    assert interval == pytest.approx([values.mean() - error, values.mean() + error], abs=0.15 * error)
    # a ratio of two sums, here the same mean twice over
    assert bootstrap_interval(values, np.full(400, 2.0)) == pytest.approx([end / 2 for end in interval])


@pytest.mark.slow
def test_one_table_has_all_scores_with_intervals(clip, colors, tmp_path, capsys):
    predictions, instances, synonyms = (tmp_path / name for name in ("p.json", "instances.json", "synonyms.txt"))
    rows = [{"image_id": f"test/{color}", "caption": text} for color, text in zip(COLORS, CAPTIONS, strict=True)]
    predictions.write_text(json.dumps(rows[:4]))
    content = {"images": [{"id": f"test/{color}"} for color in COLORS], "categories": [{"id": 7, "name": "dog"}]}
    content["categories"].append({"id": 8, "name": "horse"})
    content["annotations"] = [{"image_id": f"test/{color}", "category_id": 7} for color in COLORS]
    instances.write_text(json.dumps(content))
    synonyms.write_text("dog, puppy\n\nhorse,cat , pony\n")
    assert read_synonyms(synonyms) == {"dog": ["puppy"], "horse": ["cat", "pony"]}
    options = ["--predictions", predictions, "--dataset_name", colors, "--output_dir", tmp_path / "scores"]
    options += ["--clip_model", clip, "--objects", instances, "--object_synonyms", synonyms]
    evaluate_captions.main([*map(str, options), "--metric_tokenizer", "intl"])
    results = json.loads((tmp_path / "scores" / "results.json").read_text())
    printed = capsys.readouterr().out
    for name, title in (("clip_score", "CLIPScore"), ("ref_clip_score", "RefCLIPScore"), ("chair_i", "CHAIRi")):
        low, high = results["intervals"][name]
        assert low <= results["metrics"][name] <= high and title in printed and name in results["shuffled"]
    assert results["metrics"]["clip_score"] == pytest.approx(np.mean(by_formula(clip)[0][:4]), abs=1e-5)
    assert results["metrics"]["chair_s"] == 0  # references name the cat
    assert results["tokenizer"] == "intl" and results["clip_model"] in ("clip", "siglip")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--objects", "missing.json"], "cannot be read"),
        (["--object_synonyms", "list.txt"], "no effect without --objects"),
        (["--clip_model", "/nowhere/clip"], "--clip_model"),
        (["--meteor"], "no `java`"),
        (["--metric_tokenizer", "ptp"], "--metric_tokenizer"),
    ],
)
def test_what_is_missing_is_named_in_one_sentence(options, sentence, colors, tmp_path, capsys, monkeypatch):
    predictions = tmp_path / "p.json"
    predictions.write_text(json.dumps([{"image_id": "test/red", "caption": "a dog"}]))
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ["--predictions", str(predictions), "--dataset_name", colors, "--output_dir", str(tmp_path / "scores")]
    with pytest.raises(SystemExit) as stop:
        evaluate_captions.main([*words, *options])
    assert stop.value.code == 2 and sentence in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "scores").exists()


def test_the_packages_command_scores_objects_too(tmp_path, capsys):
    results, annotations, instances = (tmp_path / f"{name}.json" for name in ("results", "annotations", "instances"))
    results.write_text(json.dumps([{"image_id": 1, "caption": "a dog"}, {"image_id": 2, "caption": "a cat"}]))
    rows = [{"image_id": number, "caption": "an animal"} for number in (1, 2)]
    annotations.write_text(json.dumps({"annotations": rows}))
    content = {"categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]}
    content["annotations"] = [{"image_id": number, "category_id": 1} for number in (1, 2)]
    instances.write_text(json.dumps(content))
    command = [str(results), str(annotations), "--objects", str(instances)]
    assert caption_scores([*command, "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["metrics"]["chair_i"] == report["metrics"]["chair_s"] == 0.5
    assert report["intervals"]["chair_s"] == [0, 1] and "chair_i" in capsys.readouterr().out
    instances.write_text(json.dumps({"1": ["dog"], "2": ["cat"]}))
    assert caption_scores(command) == 0 and "chair_i   0.0000" in capsys.readouterr().out
    for other, sentence in ((content | {"annotations": []}, "2 of 2 images"), ([], "has no objects")):
        instances.write_text(json.dumps(other))
        assert caption_scores(command) == 2
        assert f"instances.json: {sentence}" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("java") is None or find_spec("pycocoevalcap") is None, reason="needs Java and pycocoevalcap"
)
def test_meteor_is_on_the_table_with_its_interval(colors, tmp_path):
    predictions = tmp_path / "p.json"
    rows = [{"image_id": f"test/{color}", "caption": text} for color, text in zip(COLORS, CAPTIONS, strict=True)]
    predictions.write_text(json.dumps(rows))
    evaluate_captions.main(
        ["--predictions", str(predictions), "--dataset_name", colors, "--output_dir", str(tmp_path), "--meteor"]
    )
    results = json.loads((tmp_path / "results.json").read_text())
    low, high = results["intervals"]["meteor"]
    assert 0 < low <= results["metrics"]["meteor"] <= high < 1


def test_the_packages_command_gives_clip_scores_of_image_files(clip, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    results, annotations, report = (tmp_path / f"{name}.json" for name in ("results", "annotations", "report"))
    rows = [{"image_id": number, "caption": text} for number, text in enumerate(CAPTIONS)]
    results.write_text("\ufeff" + json.dumps(rows), encoding="utf-8")  # as editors of Windows save it
    rows = [{"image_id": number, "caption": text} for number, texts in enumerate(REFERENCES) for text in texts]
    named = [{"id": number, "file_name": f"{color}.png"} for number, color in enumerate(COLORS)]
    annotations.write_text(json.dumps({"annotations": rows, "images": named}))
    for image, row in zip(IMAGES, named, strict=True):
        image.save(tmp_path / row["file_name"])
    command = [str(results), str(annotations), "--clip_model", clip, "--images", str(tmp_path), "--json", str(report)]
    assert caption_scores(command) == 0
    found, printed = json.loads(report.read_text()), capsys.readouterr().out
    for name, expected in zip(("clip_score", "ref_clip_score"), by_formula(clip), strict=True):
        assert found["metrics"][name] == pytest.approx(np.mean(expected), abs=1e-5)
        low, high = found["intervals"][name]
        assert low <= found["metrics"][name] <= high and found["shuffled"][name] != found["metrics"][name]
        assert f"{name:14} {found['metrics'][name]:7.4f}" in printed
    before = report.read_bytes()

    (tmp_path / "red.png").write_bytes(b"no image")
    assert caption_scores(command) == 2 and "red.png is no image" in capsys.readouterr().err
    (tmp_path / "red.png").unlink()
    assert caption_scores(command) == 2 and "1 of 5 images are missing" in capsys.readouterr().err
    annotations.write_text(json.dumps({"annotations": rows}))
    assert caption_scores(command) == 2 and "no `file_name`" in capsys.readouterr().err
    assert report.read_bytes() == before


def test_the_packages_command_refuses_what_has_no_effect_and_a_report_it_cannot_write(tmp_path, capsys):
    rows = [{"image_id": 1, "caption": "a dog"}]
    results, annotations = tmp_path / "results.json", tmp_path / "annotations.json"
    results.write_text(json.dumps(rows))
    annotations.write_text(json.dumps({"annotations": rows}))
    command = [str(results), str(annotations)]
    for options in (["--synonyms", "words.txt"], ["--clip_model", "clip"], ["--images", str(tmp_path)]):
        with pytest.raises(SystemExit) as stop:
            caption_scores([*command, *options])
        assert stop.value.code == 2 and "--" in capsys.readouterr().err.splitlines()[-1]
    for path in (tmp_path / "absent" / "report.json", tmp_path):
        assert caption_scores([*command, "--json", str(path)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(path) in error
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "annotations.json"}


# Stands in for pycocoevalcap.spice.spice, whose models are in no package index: what `compute_score` returns is its shape.
SPICE = """
class Spice:
    def compute_score(self, references, predictions):
        assert list(references) == list(predictions) == [0, 1] and predictions[1] == ["a cat sits"]
        return 0.4, [{"All": {"f": f, "pr": 1.0}, "Object": {"f": 1.0}} for f in (0.1, 0.7)]
"""


def test_spice_runs_through_pycocoevalcap_or_says_what_is_missing(tmp_path, monkeypatch, capsys):
    results, annotations = tmp_path / "results.json", tmp_path / "annotations.json"
    rows = [{"image_id": number, "caption": text} for number, text in enumerate(("a dog runs", "A cat sits."))]
    results.write_text(json.dumps(rows))
    annotations.write_text(json.dumps({"annotations": rows}))
    command = [str(results), str(annotations), "--spice"]
    jars = tmp_path / "site" / "pycocoevalcap" / "spice" / "lib"
    jars.mkdir(parents=True)
    for folder in (jars.parents[1], jars.parent):
        (folder / "__init__.py").touch()
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.write_text("#!/bin/sh")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(java.parent))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    for name in [name for name in sys.modules if name.partition(".")[0] == "pycocoevalcap"]:
        monkeypatch.delitem(sys.modules, name)

    (jars / "stanford-corenlp-3.6.0.jar").touch()
    assert caption_scores(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "get_stanford_models" in error
    (jars / "stanford-corenlp-3.6.0-models.jar").touch()
    module = jars.parent / "spice.py"
    module.write_text(
        "import sys\nprint('Exception in thread: no Semgrex\\n\\tat Spice.java', file=sys.stderr)\nsys.exit(1)"
    )
    assert caption_scores(command) == 2 and "(Exception in thread: no Semgrex)" in capsys.readouterr().err
    module.write_text(SPICE)
    assert caption_scores([*command, "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["metrics"]["spice"] == 0.4 and report["intervals"]["spice"] == pytest.approx([0.1, 0.7])
    assert "spice     0.4000" in capsys.readouterr().out


def test_images_without_hashes_are_known_by_their_pixels():
    rows = Dataset.from_dict({"image": [*IMAGES, IMAGES[0], Image.new("L", (50, 40))]})
    hashes = image_hashes(rows)
    assert hashes[0] == hashes[5] and len(set(hashes)) == 6
