"""Laws of third-party captioners: what they generate is what plain transformers generates of one image, by its documented use."""

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file, save_file
from small_captioners_of_others import EOS, IDS, KINDS, save
from transformers import AutoModelForImageTextToText, AutoProcessor

import app
import caption
import evaluate_captions
import serve
from captioning.batching import BatchingCaptioner
from modeling.captioner import Captioner
from modeling.image_text_to_text import CHAT_PROMPT, MAX_NEW_TOKENS, PromptedImages, load_captioner
from reporting.compare import comparison_table
from reporting.results import read_results
from system.errors import UserError

CHATS = ("idefics3", "smolvlm", "qwen2_5_vl", "qwen3_vl", "llava")
SIZES = ((50, 40), (30, 70), (64, 64), (100, 30), (40, 40))
NUMBERS = np.random.default_rng(0)
IMAGES = [Image.fromarray(NUMBERS.integers(0, 256, (height, width, 3), np.uint8)) for width, height in SIZES]
DEFAULT = {"paligemma": "caption en", "florence2": "<CAPTION>"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("of_others")
    return {kind: str(save(kind, folder / kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of images of unlike sizes, and a data set of the same."""
    folder = tmp_path_factory.mktemp("images")
    names = [f"{number}.png" for number in range(len(IMAGES))]
    for name, image in zip(names, IMAGES, strict=True):
        image.save(folder / name)
    columns = {"image": IMAGES, "image_id": names, "captions": [["a red dog runs", "the dog"]] * len(IMAGES)}
    kinds = {"image": ImageFeature(mode="RGB"), "image_id": Value("string"), "captions": List(Value("string"))}
    table = Dataset.from_dict(columns, features=Features(kinds))
    data = tmp_path_factory.mktemp("data") / "of_others"
    DatasetDict({"test": table}).save_to_disk(data)
    return folder, str(data)


@cache
def plain(folder: str) -> tuple:
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def documented(kind: str, folder: str, image: Image.Image, prompt: str | None = None, **options) -> str:
    """The caption of one image as transformers' documentation of a kind has it."""
    model, processor = plain(folder)
    prompt = prompt or DEFAULT.get(kind)
    options = {"max_new_tokens": 8} | options
    start = 0
    if kind in CHATS:
        content = [{"type": "image", "image": image}, {"type": "text", "text": prompt or CHAT_PROMPT}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        start = inputs["input_ids"].shape[1]
    elif kind == "git" and prompt:  # its documentation's question answering
        ids = processor.tokenizer(prompt, add_special_tokens=False).input_ids
        input_ids = torch.tensor([processor.tokenizer.cls_token_id, *ids])[None]
        inputs = {"pixel_values": processor(images=image, return_tensors="pt").pixel_values, "input_ids": input_ids}
        start = input_ids.shape[1]
    elif kind == "paligemma":
        inputs = processor(images=image, text=f"<image>{prompt}", return_tensors="pt")
        start = inputs["input_ids"].shape[1]
    else:
        inputs = processor(images=image, text=prompt, return_tensors="pt")
        if prompt and kind == "blip":
            start = inputs["input_ids"].shape[1] - 1  # it drops SEP
        elif prompt and kind == "blip_2":
            start = inputs["input_ids"].shape[1]
    with torch.inference_mode():
        sequence = model.generate(**inputs, **options)[0]
    if kind == "florence2":
        text = processor.decode(sequence, skip_special_tokens=False)
        return processor.post_process_generation(text, task=prompt, image_size=image.size)[prompt].strip()
    return processor.decode(sequence[start:], skip_special_tokens=True).strip()


def captions_of(tmp_path, name: str, images, *options: str) -> list[str]:
    """What caption.py generates of a folder of images, in the order of their names."""
    output = tmp_path / "captions.jsonl"
    model = ["--model_name_or_path", name, "--max_length", "8", "--dtype", "float32"]
    caption.main([str(images[0]), *model, "--output", str(output), *options])
    lines = {line["image_id"]: line["caption"] for line in map(json.loads, output.read_text().splitlines())}
    return [lines[name] for name in sorted(lines)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_images_of_any_sizes_gets_the_captions_of_single_ones(tmp_path, folders, images, kind):
    made = captions_of(tmp_path, folders[kind], images)
    assert made == [documented(kind, folders[kind], image) for image in IMAGES]
    assert len(set(made)) > 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["length", "beams"])
def test_lengths_count_the_caption_alone_and_beams_are_transformers_own(folders, kind, name):
    captioner = load_captioner(folders[kind])
    settings, plain_settings = {
        "length": ({"min_length": 6, "max_length": 6}, {"min_new_tokens": 6, "max_new_tokens": 6}),
        "beams": (
            {"num_beams": 3, "max_length": 6, "length_penalty": 2.0},
            {"num_beams": 3, "max_new_tokens": 6, "length_penalty": 2.0},
        ),
    }[name]
    captioner.set_decoding(**settings)
    made = captioner.generate(captioner.preprocess(IMAGES))
    assert [one["caption"] for one in made] == [
        documented(kind, folders[kind], image, **plain_settings) for image in IMAGES
    ]
    if name == "length":  # none can have ended before
        assert not any(one["ended"] for one in made)
    returned = captioner.generate(captioner.preprocess(IMAGES), num_beams=3, num_return_sequences=2)
    assert len(returned) == len(IMAGES) and all(len(one["others"]) == 1 for one in returned)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_leads_and_is_not_in_the_caption(folders, kind):
    prompt = {"florence2": "<DETAILED_CAPTION>"}.get(kind, "the red dog")
    captioner = load_captioner(folders[kind], prompt)
    captioner.set_decoding(max_length=8)
    made = [one["caption"] for one in captioner.generate(captioner.preprocess(IMAGES))]
    assert made == [documented(kind, folders[kind], image, prompt) for image in IMAGES]
    assert made != [documented(kind, folders[kind], image) for image in IMAGES]


@pytest.mark.slow
def test_a_model_without_a_chat_template_gets_the_image_before_the_prompt(tmp_path, folders):
    save("llava", tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    captioner = load_captioner(tmp_path, "the dog")
    assert captioner.preprocess.text == "<image>\nthe dog"
    captioner.set_decoding(max_length=8)
    model, processor = plain(str(tmp_path))
    made = []
    for image in IMAGES:
        inputs = processor(images=image, text="<image>\nthe dog", return_tensors="pt")
        sequence = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        made.append(processor.decode(sequence, skip_special_tokens=True))
    assert [one["caption"] for one in captioner.generate(captioner.preprocess(IMAGES))] == made
    captioner = load_captioner(tmp_path, "USER: <image> describe it ASSISTANT:")  # who names the place knows it
    assert captioner.preprocess.text == "USER: <image> describe it ASSISTANT:"


@pytest.mark.parametrize("kind", ["blip", "florence2", "qwen2_5_vl"])
def test_words_that_come_one_by_one_make_the_same_caption(folders, kind):
    captioner = load_captioner(folders[kind])
    captioner.set_decoding(max_length=8)
    inputs = captioner.preprocess(IMAGES[:1])
    (made,) = captioner.generate(inputs)
    assert list(captioner.stream(inputs))[-1] == made["caption"]


def test_any_of_several_eos_tokens_ends_a_caption_and_none_is_forced_to(folders):
    captioner = load_captioner(folders["llava"])
    captioner.set_decoding(max_length=8)
    inputs = captioner.preprocess(IMAGES)
    before = captioner.generate(inputs)
    word = next(one["caption"].split()[1] for one in before if not one["ended"])
    captioner.generation_config.eos_token_id = [EOS, IDS[word]]
    for old, new in zip(before, captioner.generate(inputs), strict=True):
        cut = word in old["caption"].split()
        assert new["caption"].split() == (old["caption"].partition(word)[0] + word * cut).split()
        assert new["ended"] == (cut or old["ended"])
    blip = load_captioner(folders["blip"])
    with torch.no_grad():
        blip.model.text_decoder.cls.predictions.bias[EOS] += 1000
    assert blip.generate(blip.preprocess(IMAGES[:1])) == [{"caption": "", "ended": True}]
    forced = load_captioner(folders["florence2"])
    forced.set_decoding(max_length=4)
    assert [one["ended"] for one in forced.generate(forced.preprocess(IMAGES))] == [False] * len(IMAGES)


def test_the_models_own_settings_stand_where_none_are_given(tmp_path, folders):
    folder = save("qwen2_5_vl", tmp_path)
    path = folder / "generation_config.json"
    own = json.loads(path.read_text()) | {"do_sample": True, "top_k": 1, "max_new_tokens": 5}
    path.write_text(json.dumps(own))
    captioner = load_captioner(folder)
    captioner.set_decoding()
    assert (captioner.generation_config.max_new_tokens, captioner.generation_config.do_sample) == (5, True)
    captioner.set_decoding(num_beams=1)  # which is greedy, as the option says
    assert not captioner.generation_config.do_sample
    made = captioner.generate(captioner.preprocess(IMAGES))
    expected = [documented("qwen2_5_vl", folders["qwen2_5_vl"], image, max_new_tokens=5) for image in IMAGES]
    assert [one["caption"] for one in made] == expected
    for kind in ("blip", "llava"):  # those without a length do not stop at transformers' 20 tokens
        captioner = load_captioner(folders[kind])
        assert captioner.generation_config.max_new_tokens == MAX_NEW_TOKENS


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_has_the_same_captions_and_a_row_of_the_table(tmp_path, folders, images, kind):
    options = ["--dataset_name", images[1], "--max_length", "8", "--per_device_eval_batch_size", "3"]
    evaluate_captions.main(["--model_name_or_path", folders[kind], *options, "--output_dir", str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    expected = {f"{number}.png": documented(kind, folders[kind], image) for number, image in enumerate(IMAGES)}
    assert {line["image_id"]: line["caption"] for line in lines} == expected
    results = read_results(tmp_path)
    assert results["decoding"].get("prompt") == DEFAULT.get(kind, CHAT_PROMPT if kind in CHATS else None)
    assert "captions.html" in {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_models_of_others_stand_beside_ours_in_one_table(tmp_path, folders, starts, colors):
    runs = {}
    for kind, folder in {"ours": starts["vit_gpt2"], "blip": folders["blip"]}.items():
        options = ["--dataset_name", colors, "--max_length", "8", "--output_dir", str(tmp_path / kind)]
        evaluate_captions.main(["--model_name_or_path", folder, *options])
        runs[kind] = read_results(tmp_path / kind)
    table = comparison_table(runs)
    assert len({line.count("|") for line in table.splitlines()}) == 1  # nothing is said of other images
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == ["| ours", "| blip"]


def test_a_page_shows_captions_without_probabilities(tmp_path, folders, images):
    page = tmp_path / "page.html"
    options = ["--max_length", "8", "--dtype", "float32", "--output", str(page)]
    caption.main([str(images[0]), "--model_name_or_path", folders["blip"], *options])
    assert documented("blip", folders["blip"], IMAGES[2]) in page.read_text()


def test_another_prompt_does_not_resume_an_output(tmp_path, folders, images, capsys):
    captions_of(tmp_path, folders["blip_2"], images, "--prompt", "the")
    with pytest.raises(SystemExit) as ended:
        captions_of(tmp_path, folders["blip_2"], images, "--prompt", "a")
    assert ended.value.code == 2 and "prompt" in capsys.readouterr().err


def test_the_server_captions_images_of_unlike_sizes_together(folders):
    captioner = load_captioner(folders["idefics3"])
    captioner.set_decoding(max_length=8)
    batching = BatchingCaptioner(captioner, batch_size=8)
    contents = []
    for image in IMAGES:
        image.save(file := io.BytesIO(), "PNG")
        contents.append(base64.b64encode(file.getvalue()).decode())
    answers = serve.caption_images(batching, [serve.from_base64(content) for content in contents])
    batching.close()
    expected = [documented("idefics3", folders["idefics3"], image) for image in IMAGES]
    assert [answer["caption"] for answer in answers] == expected


@pytest.mark.slow
def test_the_app_takes_them_and_gives_the_prompt_to_those_that_take_one(folders, starts, images):
    pytest.importorskip("gradio")
    names = (starts["vit_gpt2"], folders["llava"])
    captioners = app.load_captioners(names, "the dog")
    shown = app.caption_files(captioners, [str(images[0] / "0.png")], {"max_new_tokens": 8})
    expected = documented("llava", folders["llava"], IMAGES[0], "the dog")
    assert any(f"<dd>{expected}</dd>" in str(current) for current, *_ in shown)
    with pytest.raises(UserError, match="--prompt"):
        app.load_captioners(names[:1], "the dog")


def test_an_image_that_a_processor_does_not_take_is_named_and_the_others_are_captioned(
    tmp_path, folders, images, capsys, monkeypatch
):
    name, plain_inputs = folders["qwen2_5_vl"], PromptedImages._inputs

    def picky(self, images):
        if any(image.size == SIZES[2] for image in images):  # as Qwen-VL's does with 200 times as wide as high
            raise ValueError("not this one")
        return plain_inputs(self, images)

    captioner = load_captioner(name)
    captioner.set_decoding(max_length=8)
    monkeypatch.setattr(PromptedImages, "_inputs", picky)
    monkeypatch.setattr("modeling.image_text_to_text.load_captioner", lambda *_: captioner)
    expected = [documented("qwen2_5_vl", name, image) for image in IMAGES]
    assert captions_of(tmp_path, name, images) == expected[:2] + expected[3:]
    errors = capsys.readouterr().err
    assert "2.png" in errors and "not this one" in errors and "1 cannot be" in errors
    batching = BatchingCaptioner(captioner, batch_size=8)
    contents = [path.read_bytes() for path in sorted(images[0].iterdir())]
    with ThreadPoolExecutor(len(contents)) as threads:
        futures = [threads.submit(serve.caption_images, batching, [content]) for content in contents]
    batching.close()
    made = [None if future.exception() else future.result()[0]["caption"] for future in futures]
    assert made == [*expected[:2], None, *expected[3:]] and isinstance(futures[2].exception(), serve.BadRequest)
    options = ["--dataset_name", images[1], "--output_dir", str(tmp_path / "scores")]
    with pytest.raises(SystemExit):
        evaluate_captions.main(["--model_name_or_path", name, *options])
    assert "image 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ("--confidence",),
        ("--min_confidence", "0.5"),
        ("--prompt", "<OD>"),
        ("--prompt", "<CAPTION> and more"),
        ("--length_penalty", "2"),
    ],
)
def test_what_a_model_of_others_cannot_do_is_refused_in_one_sentence(tmp_path, folders, images, options, capsys):
    with pytest.raises(SystemExit) as ended:
        captions_of(tmp_path, folders["florence2"], images, *options)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and options[0].strip("-") in error
    assert not list(tmp_path.iterdir())


def test_ours_take_no_prompt_and_others_are_neither_trained_nor_cached(tmp_path, folders, starts, images, capsys):
    with pytest.raises(UserError, match="--prompt"):
        load_captioner(starts["lstm"], "the dog")
    with pytest.raises(UserError, match="of the kind llava"):  # as train_scst.py, export_onnx.py and others load
        Captioner.load(folders["llava"])
    for option, value in {"--feature_cache": "int8", "--compile_encoder": "true"}.items():
        options = ["--dataset_name", images[1], "--output_dir", str(tmp_path), option, value]
        with pytest.raises(SystemExit) as ended:
            evaluate_captions.main(["--model_name_or_path", folders["git"], *options])
        assert ended.value.code == 2 and option in capsys.readouterr().err


def test_weights_that_a_model_lacks_and_code_that_it_brings_are_refused(tmp_path):
    folder = save("git", tmp_path)
    weights = load_file(folder / "model.safetensors")
    gone = weights.pop(next(name for name in weights if "layer.1" in name))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks weights"):
        load_captioner(folder)
    assert gone.numel()
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "their_own", "auto_map": {"AutoConfig": "code.TheirConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_captioner(folder)
