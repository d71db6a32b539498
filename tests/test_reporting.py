"""Laws of what a run writes: results, captions, page, card, curves, and the comparison of runs."""

import ast
import base64
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from datasets import Dataset, Value
from fresh import run_fresh
from huggingface_hub import ModelCard
from matplotlib.axes import Axes
from PIL import Image
from transformers import GenerationConfig

from data_scripts.captions_file import read_captions
from data_scripts.scene_truth import TRUTHS
from metrics import CaptionScorer
from reporting import compare, sheet
from reporting.compare import comparison_table, main
from reporting.curves import draw_curves, draw_line, finish_axis, new_figure, points
from reporting.model_card import markdown_line, usage, write_model_card
from reporting.page import IMAGE_SIZE, image_data_uri, write_page
from reporting.push import push_to_hub
from reporting.report import command_line, dataset_title, report_captions
from reporting.results import (
    METRIC_TITLES,
    read_history,
    read_results,
    write_captions,
    write_file,
    write_history,
    write_results,
)
from reporting.samples import read_samples, write_samples
from system.errors import UserError

HOSTILE = (
    "<script>document.title = 'hacked'</script>",
    "</script></style></title><img src=x onerror=\"document.title='hacked'\">",
    "\" autofocus onfocus=\"document.title='hacked'\" x='",
    "{{ 7 * 7 }} {% raw %} &lt;b&gt; <!-- ",
    "a | b\n\n# not a heading\n---\n`code` [link](javascript:alert(1))",
    "line\u2028separator, half a pair \ud83d, quotes \"'`, 犬が走る",
)
REPORT_FEATURES = {"image": datasets.Image(), "image_id": Value("string"), "captions": [Value("string")]}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def some_results(**changes: object) -> dict:
    metrics = {name: 0.1 * (index + 1) for index, name in enumerate(METRIC_TITLES)} | {"cider": 1.25}
    return {
        "dataset": "scenes",
        "split": "test",
        "num_images": 3,
        "references_per_image": 2.0,
        "decoding": {"num_beams": 3},
        "metrics": metrics,
        "intervals": {name: [score * 0.9, score * 1.1] for name, score in metrics.items()},
        "shuffled": {name: score / 3 for name, score in metrics.items()},
        "constant": {name: score / 4 for name, score in metrics.items()} | {"caption": "a dog runs"},
        "diagnostics": {"ended": 1.0, "novel": None},
        "beats_shuffled": True,
        "warning": None,
        "train": {"epochs": 2, "seconds": 12345.6, "captions_per_second": 80.5},
    } | changes


def some_records(texts: tuple[str, ...] = ("a red cat", "a blue dog", "a green cat")) -> list[dict]:
    return [
        {
            "image_id": f"{index}{text}",
            "caption": text,
            "references": [text, f"{text} again"],
            "shuffled_caption": f"shuffled {text}",
            "cider": float((index * 7) % 5),
        }
        for index, text in enumerate(texts)
    ]


def some_images(number: int) -> list[Image.Image]:
    return [Image.new("RGB", (30 + index, 20), (40 * index % 256, 90, 120)) for index in range(number)]


class Structure(HTMLParser):
    """The elements of a page, the names of their attributes, and its text, as a browser parses them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements, self.text = [], []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, [name for name, _ in attributes]))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


# results.json, captions.jsonl, history.json


def test_results_are_written_in_a_fixed_order(tmp_path):
    results = some_results(extra="kept")
    backwards = dict(reversed([*results.items()])) | {"metrics": dict(reversed([*results["metrics"].items()]))}
    path = write_results(tmp_path, backwards)
    assert read_results(tmp_path) == results
    written = json.loads(path.read_text(encoding="utf-8"))
    assert list(written) == list(results)
    assert list(written["metrics"]) == list(METRIC_TITLES)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused_by_name(tmp_path, number):
    for changes, key in (
        ({"metrics": {"cider": number}}, "metrics.cider"),
        ({"intervals": {"bleu_4": [0.1, number]}}, "intervals.bleu_4.1"),
    ):
        with pytest.raises(ValueError, match=re.escape(key)):
            write_results(tmp_path, some_results(**changes))
    assert not list(tmp_path.iterdir())


def test_any_caption_is_read_back(tmp_path):
    records = some_records(HOSTILE)
    path = write_captions(tmp_path, records)
    wanted = [{key: record[key] for key in ("image_id", "caption", "references")} for record in records]
    assert read_captions(path) == wanted
    # Another reader of JSON lines finds the same: one object a line, in UTF-8.
    assert [json.loads(line) for line in path.open(encoding="utf-8", newline="\n")] == wanted
    assert "犬が走る" in path.read_text(encoding="utf-8")


def test_captions_written_by_an_editor_are_read(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"image_id": "1", "caption": "", "references": []}\r\n\r\n')
    assert read_captions(path) == [{"image_id": "1", "caption": "", "references": []}]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"image_id": "2", ', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1, 2]", "not a JSON object"),
        ('{"image_id": "2", "references": []}', '"caption" is missing'),
        ('{"image_id": 2.5, "caption": "a", "references": []}', '"image_id" must be a string'),
        ('{"image_id": "2", "caption": null, "references": []}', '"caption" must be a string'),
        ('{"image_id": "2", "caption": "a", "references": "a"}', '"references" must be a list'),
        ('{"image_id": "2", "caption": "a", "references": ["a", 3]}', '"references" must be a list'),
        ('{"image_id": "1", "caption": "a", "references": []}', "on line 1 already"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, complaint):
    path = tmp_path / "captions.jsonl"
    path.write_text('{"image_id": "1", "caption": "a", "references": ["a"]}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2")) as error:
        read_captions(path)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"caption": "caf\xe9"}')
    (tmp_path / "results.json").write_text('{"metrics": {"cider": "high"}}', encoding="utf-8")
    (tmp_path / "history.json").write_text("{}", encoding="utf-8")
    readers = ((read_captions, "latin.jsonl"), (read_captions, "absent.jsonl"))
    for reader, name in readers:
        with pytest.raises(ValueError, match=name):
            reader(tmp_path / name)
    for reader, name in ((read_results, "results.json"), (read_history, "history.json")):
        with pytest.raises(ValueError, match=name):
            reader(tmp_path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write_file(tmp_path / "file", b"old")

    def no_room(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match="no space"):
        write_file(tmp_path / "file", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


def test_a_reader_keeps_the_old_file_while_a_new_one_is_written(tmp_path):
    path = write_file(tmp_path / "file", b"old")
    with open(path, "rb") as reader:
        write_file(path, b"new")
        assert (reader.read(), path.read_bytes()) == (b"old", b"new")


def test_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    assert write_file(tmp_path / "ours", b"").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_the_history_of_a_run_that_diverged_is_read_back(tmp_path):
    assert read_history(tmp_path) == []
    write_history(tmp_path, [{"step": 1, "train_loss": math.nan}, {"step": 2, "train_loss": 3.5}])
    assert read_history(tmp_path) == [{"step": 1, "train_loss": None}, {"step": 2, "train_loss": 3.5}]


# captions.html


def page_of(output_dir: Path, texts: tuple[str, ...], **changes: object) -> str:
    path = write_page(output_dir, some_images(len(texts)), some_records(texts), some_results(**changes))
    return path.read_text(encoding="utf-8")


@pytest.mark.slow
def test_hostile_text_adds_no_element_and_no_attribute(tmp_path):
    for text in HOSTILE:
        everywhere = {"dataset": text, "split": text, "warning": text, "decoding": {text: text}}
        harmless = {"dataset": "a", "split": "a", "warning": "a", "decoding": {"a": "a"}}
        hostile = Structure(page_of(tmp_path, (text, text), **everywhere))
        assert hostile.elements == Structure(page_of(tmp_path, ("a", "a"), **harmless)).elements
        # and it is there to be read, as it was written
        assert f"{text} again".encode("utf-8", "replace").decode() in hostile.text


def test_the_page_needs_nothing_from_outside(tmp_path):
    draw_curves(tmp_path, [{"step": 1, "train_loss": 2.0}])
    page = page_of(tmp_path, ("a", "b"))
    assert page.count('src="data:image/png;base64,') == 1
    assert page.count('src="data:image/jpeg;base64,') == 2
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|url\(|@import|https?://""", page)
    assert not list(tmp_path.glob(".*"))


def test_the_page_shows_scores_intervals_baselines_and_warning(tmp_path):
    text = Structure(page_of(tmp_path, ("a",), warning="It may ignore its images.")).text
    for number in ("1.250", "1.125 to 1.375", "0.417", "0.312", "It may ignore its images."):
        assert any(number in piece for piece in text), number
    assert "Warning." in text
    assert "Warning." not in Structure(page_of(tmp_path, ("a",))).text


def test_a_page_of_captions_without_scores_or_optional_keys(tmp_path):
    records = [{"image_id": "1", "caption": "", "references": []}]
    structure = Structure(write_page(tmp_path, some_images(1), records, {}).read_text(encoding="utf-8"))
    assert "table" not in dict(structure.elements)
    assert "(empty caption)" in structure.text
    assert "worst first" not in structure.text


def test_no_more_images_are_decoded_than_shown(tmp_path):
    records = some_records(("a", "b", "c", "d"))
    images = iter(some_images(4))
    page = write_page(tmp_path, images, records, some_results(), num_images=3).read_text(encoding="utf-8")
    assert page.count("<article") == 3
    assert len(list(images)) == 1
    assert "the first 3 are below" in page


def test_a_missing_image_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="1 images, 2 records"):
        write_page(tmp_path, some_images(1), some_records(("a", "b")), some_results())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_every_kind_of_image_becomes_a_small_jpeg(mode):
    uri = image_data_uri(Image.new(mode, (1000, 500)))
    image = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (IMAGE_SIZE, IMAGE_SIZE // 2))
    if mode in ("LA", "RGBA"):
        assert image.getpixel((5, 5)) == (255, 255, 255)  # transparent, so white, not black


def in_browser(page: str, tmp_path: Path) -> str:
    """The page as headless Chromium has it after its scripts have run."""
    path = tmp_path / "in_browser.html"
    path.write_text(page, encoding="utf-8")
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    command = [CHROMIUM, *quiet.split(), "--disable-component-update", "--disable-sync", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
    return subprocess.run(command, capture_output=True, timeout=120, check=True).stdout.decode()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_a_browser_our_script_runs_and_no_other(tmp_path):
    # An event handler that got past the escaping, and a script that did: the content policy stops both.
    page = page_of(tmp_path, HOSTILE, dataset=HOSTILE[1])
    smuggled = "<script>document.title = 'hacked'</script><img src=x onerror=\"document.title='hacked'\">"
    parsed = in_browser(page.replace("</main>", smuggled + "</main>"), tmp_path)
    assert "<title>hacked" not in parsed
    assert f"{len(HOSTILE)} of {len(HOSTILE)}" in parsed


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_a_browser_images_are_sorted_filtered_and_walked(tmp_path):
    page = page_of(tmp_path, ("a red cat", "a blue dog", "a green cat"))  # CIDEr 0, 2, 4
    steps = """
    const found = {};
    const shown = () => [...document.querySelectorAll("#cards > li")].filter((card) => !card.hidden)
      .map((card) => card.querySelector(".caption").textContent);
    const here = () => document.activeElement.querySelector(".caption")?.textContent ?? document.activeElement.id;
    const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
    const type = (text) => { filter.value = text; filter.dispatchEvent(new Event("input")); };
    const sort = (way) => { order.value = way; order.dispatchEvent(new Event("change")); };
    sort("best"); found.best = shown();
    sort("worst"); found.worst = shown();
    sort("best"); press("j"); found.first = here(); press("ArrowRight"); found.second = here();
    press("j"); press("j"); found.last = here(); press("k"); found.back = here();
    press("k"); press("k"); found.stays = here();
    press("/"); found.slash = here(); press("j"); found.typing = here();
    type("CAT again"); found.cats = shown(); found.count = document.getElementById("count").textContent;
    press("Escape"); found.all = shown().length;
    type("shuffled"); found.shuffled = shown();
    type("zebra"); found.nothing = !document.getElementById("nothing").hidden;
    document.title = JSON.stringify(found);
    """
    own = re.search(r"script-src '(sha256-[^']+)'", page).group(0)
    page = page.replace(own, "script-src 'unsafe-inline'").replace("</body>", f"<script>{steps}</script></body>")
    title = Structure(in_browser(page, tmp_path).partition("</title>")[0]).text[-1]
    red, blue, green = "a red cat", "a blue dog", "a green cat"
    assert json.loads(title) == {
        "best": [green, blue, red],
        "worst": [red, blue, green],
        "first": green,
        "second": blue,
        "last": red,
        "back": blue,
        "stays": green,
        "slash": "filter",
        "typing": "filter",
        "cats": [green, red],
        "count": "2 of 3",
        "all": 3,
        "shuffled": [],
        "nothing": True,
    }


# True captions, where the truth about the images is known


def truth_of(false_aspects: str = "", false_words: tuple[tuple[int, int], ...] = ()) -> dict:
    return {key: key not in false_aspects.split() for key in TRUTHS} | {"false_words": false_words}


def test_true_captions_are_counted_printed_and_shown_on_page_and_card(tmp_path, capsys):
    rows = [
        {"image": image, "image_id": str(index), "captions": ["a red ring"]}
        for index, image in enumerate(some_images(4))
    ]
    rows = Dataset.from_list(rows, features=datasets.Features(REPORT_FEATURES))
    captions = [
        {"caption": text, "ended": True} for text in ("a red ring", "a blue ring", "a blue cross", "a red ring")
    ]
    truth = [truth_of(), truth_of("all color", ((2, 6),)), truth_of("all color shape", ((2, 6), (7, 12))), truth_of()]
    arguments = {
        "rows": rows,
        "dataset": "scenes",
        "split": "test",
        "captions": captions,
        "decoding": GenerationConfig(),
    }
    arguments["scorer"] = CaptionScorer(rows["captions"])
    rates = {"all": 0.5, "number": 1.0, "shape": 0.75, "color": 0.5, "size": 1.0, "relation": 1.0}

    results = report_captions(tmp_path, **arguments, truth=truth)
    assert results["true_captions"] == read_results(tmp_path)["true_captions"] == rates
    assert re.search(r"True +0\.500 .*shape 0\.750, color 0\.500", capsys.readouterr().out)
    text = "".join(Structure((tmp_path / "captions.html").read_text(encoding="utf-8")).text)
    assert all(f"{100 * rate:.1f}%" in text for rate in rates.values())
    card = card_of(tmp_path, true_captions=rates)
    assert "| 0.500 | 1.000 | 0.750 | 0.500 | 1.000 | 1.000 |" in card.read_text(encoding="utf-8")
    assert "drawn scenes only" in card.read_text(encoding="utf-8")
    assert {score.metric_type: score.metric_value for score in ModelCard.load(card).data.eval_results}[
        "true_captions"
    ] == 0.5
    assert "True captions" in comparison_table({"drawn": results, "other": some_results()})

    rich = [caption | {"background": index < 3} for index, caption in enumerate(truth)]
    results = report_captions(tmp_path, **arguments, truth=rich)
    assert results["true_captions"] == rates | {"background": 0.75} and "background 0.750" in capsys.readouterr().out
    assert "Background" in "".join(Structure((tmp_path / "captions.html").read_text(encoding="utf-8")).text)
    assert "| Background |" in card_of(tmp_path, true_captions=rates | {"background": 0.75}).read_text(encoding="utf-8")

    results = report_captions(tmp_path, **arguments)
    assert "true_captions" not in results and "True" not in capsys.readouterr().out
    assert "drawn scenes only" not in card_of(tmp_path).read_text(encoding="utf-8")
    assert "True captions" not in comparison_table({"other": results})


# README.md, the model card


def card_of(output_dir: Path, kind: str = "inception-lstm", **changes: object) -> Path:
    return write_model_card(
        output_dir,
        kind=kind,
        model_name="somebody/captioner",
        results=some_results(**changes),
        command="accelerate launch train_lstm.py recipes/lstm_demo.yaml",
        options={"learning_rate": 4e-4, "output_dir": Path("outputs")},
        started_from=["timm/inception_resnet_v2.tf_in1k"],
    )


def test_the_hub_reads_scores_and_license_from_the_card(tmp_path):
    data = ModelCard.load(card_of(tmp_path)).data
    results = some_results()
    assert {score.metric_name: score.metric_value for score in data.eval_results} == {
        title: round(results["metrics"][name], 4) for name, title in METRIC_TITLES.items()
    }
    assert {(score.dataset_name, score.dataset_split) for score in data.eval_results} == {("scenes", "test")}
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "image-to-text")
    assert data.base_model == ["timm/inception_resnet_v2.tf_in1k"]


def test_scores_that_are_numpy_numbers_reach_the_card(tmp_path):
    metrics = {name: np.float32(0.25) for name in METRIC_TITLES}
    data = ModelCard.load(card_of(tmp_path, metrics=metrics)).data
    assert [score.metric_value for score in data.eval_results] == [0.25] * len(METRIC_TITLES)


def test_hostile_names_break_neither_metadata_nor_tables(tmp_path):
    for text in HOSTILE:
        constant = some_results()["constant"] | {"caption": text}
        card = ModelCard.load(card_of(tmp_path, dataset=text, split=text, warning=text, constant=constant))
        assert {score.dataset_name for score in card.data.eval_results} == {text}
        headings = [line for line in card.text.splitlines() if line.startswith("#")]
        assert headings == [
            line for line in ModelCard.load(card_of(tmp_path)).text.splitlines() if line.startswith("#")
        ]
        assert "<img" not in card.text.replace("\\<", "") and "<script" not in card.text.replace("\\<", "")


def test_markdown_shows_any_text_as_it_is_on_one_line(tmp_path):
    for text in HOSTILE:
        line = markdown_line(text)
        # CommonMark: a backslash before punctuation is that punctuation, and nothing else comes of it.
        assert re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", line) == " ".join(text.split())
        assert not re.search(r"[|<>`*_\[\]#$&]", re.sub(r"\\.", "", line))
        rows = card_of(tmp_path, decoding={text: text}).read_text("utf-8").partition("## Decoding")[2].splitlines()[2:]
        cells = [re.sub(r"\\.", "", row).count("|") for row in rows[: rows.index("")]]
        assert cells == [3, 3, 3]


def test_the_card_holds_the_options_and_the_curves_there_are(tmp_path):
    assert "curves.png" not in card_of(tmp_path).read_text(encoding="utf-8")
    draw_curves(tmp_path, [{"step": 1, "train_loss": 2.0}])
    text = card_of(tmp_path, warning="It may ignore its images.").read_text(encoding="utf-8")
    assert "(curves.png)" in text and "It may ignore its images." in text
    assert yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL).group(1)) == {
        "learning_rate": 4e-4,
        "output_dir": "outputs",
    }


def test_the_card_of_a_run_that_knows_only_its_scores(tmp_path):
    path = write_model_card(
        tmp_path, kind="vit-gpt2", model_name="m", results={"metrics": {"cider": 0.5}}, command="train", options={}
    )
    assert "| CIDEr | **0.500** | — | — | — |" in path.read_text(encoding="utf-8")
    assert "random weights" in path.read_text(encoding="utf-8")


def test_remote_code_is_asked_for_only_where_it_is_needed(tmp_path):
    assert "trust_remote_code=True" in card_of(tmp_path).read_text(encoding="utf-8")
    of_both = re.findall(r"```python\n(.*?)```", card_of(tmp_path, kind="vit-gpt2").read_text("utf-8"), re.DOTALL)
    assert ["trust_remote_code" in lines for lines in of_both] == [
        True,
        False,
    ]  # the pipeline is code, the model is not


@pytest.mark.slow
def test_the_python_on_the_card_captions_an_image(tmp_path):
    """A tiny ViT-GPT2 saved as train_vit_gpt2.py saves one, then the card's own lines in a fresh process."""
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "dog": 3, "cat": 4}, unk_token="<pad>"))
    words.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = transformers.ViTConfig(image_size=32, patch_size=16, **size)
    decoder = transformers.GPT2Config(
        vocab_size=5, n_embd=16, n_layer=1, n_head=2, is_decoder=True, add_cross_attention=True
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    model = transformers.VisionEncoderDecoderModel(config)
    model.generation_config.update(decoder_start_token_id=1, pad_token_id=0, eos_token_id=2, max_new_tokens=3)
    model.save_pretrained(tmp_path / "model")
    image_processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    transformers.VisionTextDualEncoderProcessor(image_processor, tokenizer).save_pretrained(tmp_path / "model")
    Image.new("RGB", (50, 40), "red").save(tmp_path / "image.jpg")

    card = write_model_card(
        tmp_path / "model", kind="vit-gpt2", model_name="model", results=some_results(), command="train", options={}
    )
    _, lines = re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)
    printed = run_fresh(lines, folder=tmp_path)
    assert set(printed.split()) <= {"dog", "cat"}
    assert printed.endswith("\n")


def test_the_lines_of_both_kinds_name_what_transformers_has():
    import transformers

    for kind in ("inception-lstm", "vit-gpt2"):
        module = ast.parse(usage(kind, 'a "quoted" name'))
        imported = [node for node in module.body if isinstance(node, ast.ImportFrom) and node.module == "transformers"]
        assert all(hasattr(transformers, alias.name) for node in imported for alias in node.names)


# curves.png, comparison


def test_curves_keep_every_point_there_is():
    history = [
        {"step": 1, "epoch": 0.5, "train_loss": 3.0},
        {"step": 2, "epoch": 1.0, "train_loss": math.nan, "eval_loss": 2.0, "cider": 0.5},
        {"step": 3, "epoch": 1.5, "train_loss": None, "eval_loss": 1.5},
    ]
    assert points(history, "train_loss") == ([0.5], [3.0])
    assert points(history, "eval_loss") == ([1.0, 1.5], [2.0, 1.5])
    # One row without its epoch, and steps are the only time all rows share.
    assert points([*history, {"step": 4, "cider": 0.7}], "cider") == ([2, 4], [0.5, 0.7])


@pytest.mark.slow
def test_curves_have_a_panel_for_each_kind_of_value(tmp_path):
    widths = []
    history = [{"step": 1, "train_loss": 3.0}]
    for more in ({}, {"cider": 0.4, "shuffled_cider": 0.1}, {"bleu_4": 0.2}):
        history.append({"step": len(history) + 1} | more)
        widths.append(Image.open(draw_curves(tmp_path, history)).width)
    assert widths == pytest.approx([widths[0], 2 * widths[0], 3 * widths[0]], rel=0.03)  # and a margin
    with pytest.raises(ValueError, match="no loss and no score"):
        draw_curves(tmp_path, [{"step": 1, "train_loss": math.nan}])


def test_runs_are_compared_in_a_table_and_a_plot(tmp_path, capsys):
    runs = [tmp_path / "one", tmp_path / "two"]
    for score, run in zip((0.5, 0.75), runs, strict=True):
        write_results(run, some_results(metrics={"cider": score}))
    write_history(runs[0], [{"step": 1, "epoch": 1, "cider": 0.3, "eval_loss": 2.0}])
    main([*map(str, runs), "--output", str(tmp_path / "plot.png")])
    table = [re.split(r" *\| *", line)[1:-1] for line in capsys.readouterr().out.splitlines()]
    cider = table[0].index("CIDEr")
    assert [row[cider] for row in table[2:]] == ["0.500", "0.750"]
    assert len({len(row) for row in table}) == 1
    assert Image.open(tmp_path / "plot.png").format == "PNG"


@pytest.mark.slow
def test_too_few_true_captions_are_named_with_exit_code_1(tmp_path, capsys):
    rates = {"right": 0.96, "wrong": 0.944, "unknown": None}
    for name, rate in rates.items():
        truth = {"true_captions": {"all": rate}} if rate else {}
        write_results(tmp_path / name, some_results(**truth))

    def compared(names: list[str], required: str) -> tuple[int, str]:
        command = [*(str(tmp_path / name) for name in names), "--output", str(tmp_path / "plot.png")]
        try:
            main([*command, "--min_true_captions", required])
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err.splitlines()[-1].replace(str(tmp_path), "")
        return 0, capsys.readouterr().err

    assert compared(["right"], "0.95")[0] == 0 and compared(["right", "wrong"], "0.94")[0] == 0
    code, sentence = compared([*rates], "0.95")
    assert code == 1 and "/wrong has 0.944" in sentence and "/unknown" in sentence and "/right" not in sentence
    assert compared(["right"], "95")[0] == 2


def test_the_comparison_plots_the_shuffled_baseline_of_each_run(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(compare, "draw_line", lambda axis, times, values, **style: drawn.append((values, style)))
    histories = {
        "one": [{"step": 1, "epoch": 1, "cider": 0.3, "shuffled_cider": 0.1}],
        "two": [{"step": 1, "epoch": 1}],
    }
    compare.draw_comparison(tmp_path / "plot.png", dict.fromkeys(histories, some_results()), histories)
    (ours, solid), (shuffled, dotted) = [line for line in drawn if line[0]]
    assert (ours, shuffled) == ([0.3], [0.1])
    assert solid["color"] == dotted["color"] and solid.get("style", "-") != dotted["style"]


def test_no_word_of_a_plot_is_cut_off(tmp_path):
    """The names of runs are paths, beside which little is left for the panel and less for its title."""
    names = ["outputs/a_folder_with_a_long_name/of_a_run", "outputs/another"]
    path = compare.draw_comparison(tmp_path / "plot.png", dict.fromkeys(names, some_results()), {})
    pixels = np.asarray(Image.open(path).convert("L"))
    assert all(edge.min() == 255 for edge in (pixels[:8], pixels[-8:], pixels[:, :8], pixels[:, -8:]))


def test_epochs_are_counted_in_whole_numbers():
    figure, (axis,) = new_figure(1)
    draw_line(axis, [1, 2], [0.5, 0.4], label=None, color="red")
    finish_axis(axis, "Loss", "epoch")
    figure.canvas.draw()
    assert all(float(tick).is_integer() for tick in axis.get_xticks())


def test_a_sheet_shows_so_many_samples_with_their_captions(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        sheet.main([str(tmp_path), "--output", str(tmp_path / "sheet.png")])
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "--publish_images true" in said and said.count("\n") == 1
    rows = Dataset.from_dict({"image": some_images(6)}).cast_column("image", datasets.Image())
    captions = ["a dog", "$\\frac{1}$ and $", "", "word " * 60, "five", "six"]
    write_samples(tmp_path, rows, captions, publish=True)
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda axis, title, **style: titles.append((title, style["parse_math"])))
    sheet.main([str(tmp_path), "--output", str(tmp_path / "sheet.png"), "--num_images", "5"])
    assert [title for title, _ in titles][:3] == ["a dog", captions[1], "(empty caption)"] and len(titles) == 5
    assert titles[3][0].count("\n") == 2 and not any(parse for _, parse in titles)
    assert Image.open(tmp_path / "sheet.png").format == "PNG"


def test_a_comparison_names_runs_scored_on_different_images():
    one, two = some_results(), some_results(split="train")
    assert "not comparable" in comparison_table({"one": one, "two": two})
    assert "not comparable" not in comparison_table({"one": one, "two": one})


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path):
    command = [sys.executable, "-m", "reporting.compare", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 2
    assert run.stderr.startswith("error: ") and "results.json" in run.stderr and run.stderr.count("\n") == 1


def test_samples_that_were_edited_are_one_sentence(tmp_path):
    (tmp_path / "samples").mkdir()
    for text in ("[", "{}", '[{"file": "../../secret.png", "caption": "a"}]', '[{"file": "01.jpg"}]'):
        (tmp_path / "samples" / "samples.json").write_text(text)
        with pytest.raises(UserError, match=r"samples\.json"):
            read_samples(tmp_path)


@pytest.mark.parametrize("option", ["--hub_token", "--hub_tok", "--hub_t", "--wandb_token"])
def test_the_command_on_the_card_has_no_token(option, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["/opt/train.py", option, "secret", f"{option}=secret", "--tokenizer_name", "gpt2"]
    )
    assert command_line() == f"accelerate launch train.py {option} ... {option}=... --tokenizer_name gpt2"


def test_a_data_set_is_named_as_on_the_hub_or_by_its_folder(tmp_path, monkeypatch):
    (tmp_path / "data" / "flowers").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    names = {"scenes": "scenes", "me/flowers": "me/flowers", "data/flowers": "flowers", str(tmp_path / "data"): "data"}
    assert {name: dataset_title(name) for name in names} == names


def test_a_failed_push_is_logged_and_raises_nothing(tmp_path, monkeypatch, caplog):
    (tmp_path / "run").mkdir()
    assert push_to_hub(tmp_path / "run") is None
    assert "was not pushed to run" in caplog.text
