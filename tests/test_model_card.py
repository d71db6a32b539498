"""Laws of the model card beyond its scores: no paths or tokens on it, samples only if images may be published."""

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset, Features, Image
from huggingface_hub import ModelCard
from PIL import Image as PillowImage

from reporting.model_card import TrainingData, name_on_card, training_data_of, without_path, write_model_card
from reporting.results import TRUTH_TITLES
from reporting.samples import NUM_SAMPLES, read_samples, write_samples

RESULTS = {"dataset": "scenes", "split": "test", "metrics": {"cider": 0.5}}


def card(folder: Path, name: str = "me/captioner", command: str = "train", **options: object) -> str:
    return write_model_card(
        folder, kind="vit-gpt2", model_name=name, results=RESULTS, command=command, options=options
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "reward"),
    [
        ({"bleu_weight": 0.0, "rouge_weight": 0.0}, "CIDEr-D"),
        ({"bleu_weight": 4.0, "rouge_weight": 0.0}, "CIDEr-D + BLEU-4"),
        ({"bleu_weight": 4.0, "rouge_weight": 5.0}, "CIDEr-D + BLEU-4 + ROUGE-L"),
    ],
)
def test_the_card_names_the_reward(tmp_path, options, reward):
    arguments = {"kind": "vit-gpt2", "model_name": "me/captioner", "results": RESULTS, "command": "train"}
    text = write_model_card(
        tmp_path, **arguments, options=options, started_from=["me/start"], self_critical=True
    ).read_text(encoding="utf-8")
    assert f"with {reward} as the reward." in text


@pytest.mark.parametrize(
    ("started_from", "expected", "on_the_hub"),
    [
        (["me/start"], "Initialized from [me/start](https://huggingface.co/me/start).", ["me/start"]),
        (
            ["a_folder", "me/start"],
            r"Initialized from a\_folder and [me/start](https://huggingface.co/me/start).",
            ["me/start"],
        ),
        (["a_folder"], r"Initialized from a\_folder.", None),
        ([], "Trained from random weights.", None),
    ],
)
def test_the_card_names_pretrained_weights_and_links_those_of_the_hub(tmp_path, started_from, expected, on_the_hub):
    (tmp_path / "a_folder").mkdir()
    names = [str(tmp_path / name) if name == "a_folder" else name for name in started_from]
    asked = {"kind": "vit-gpt2", "model_name": "me/captioner", "results": RESULTS, "command": "train", "options": {}}
    path = write_model_card(tmp_path, **asked, started_from=names)
    assert expected in path.read_text(encoding="utf-8") and str(tmp_path) not in path.read_text(encoding="utf-8")
    assert ModelCard.load(path).data.base_model == on_the_hub


@pytest.mark.parametrize(("number", "expected"), [(1.0, "1 reference each"), (4.98, "4.98 references each")])
def test_references_are_counted_in_english(tmp_path, number, expected):
    results = RESULTS | {"num_images": 3, "references_per_image": number}
    asked = {"kind": "vit-gpt2", "model_name": "me/captioner", "results": results, "command": "train", "options": {}}
    assert f"3 images with {expected}:" in write_model_card(tmp_path, **asked).read_text(encoding="utf-8")


def make_images(number: int, **info: object) -> Dataset:
    made = [PillowImage.new("RGB", (300 + index, 200), (20 * index % 256, 90, 120)) for index in range(number)]
    return Dataset.from_dict({"image": made}, features=Features({"image": Image()}))


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("/home/ann/weights/lite2", "lite2"),
        ("/home/ann/weights/lite2/", "lite2"),
        ("--encoder=/home/ann/lite2", "--encoder=lite2"),
        ("~/models/gpt2", "gpt2"),
        ("../../ann/data", "data"),
        (r"C:\Users\ann\weights", "weights"),
        (r"\\server\ann\weights", "weights"),
        ("recipes/lstm_reference.yaml", "recipes/lstm_reference.yaml"),
        ("timm/inception_resnet_v2.tf_in1k", "timm/inception_resnet_v2.tf_in1k"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("a dog / a cat", "a dog / a cat"),
        ("...", "..."),
        ("1e-3", "1e-3"),
    ],
)
def test_paths_from_outside_are_shortened_to_their_last_name(word, expected):
    assert without_path(word) == expected


def test_no_path_and_no_token_is_on_the_card(tmp_path, monkeypatch):
    (tmp_path / "weights" / "lite2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    text = card(
        tmp_path / "run",
        name=str(tmp_path / "run"),
        command=f"accelerate launch train.py recipes/x.yaml --encoder weights/lite2 --dataset_name '{tmp_path}/my data' --prompt 'a b'",
        encoder="weights/lite2",
        dataset=tmp_path / "my data",
        learning_rate=0.1,
        hub_token="secret",
    )
    assert "hub_token" not in text and "secret" not in text
    assert str(tmp_path) not in text and tmp_path.parts[2] not in text and "weights/" not in text
    assert "accelerate launch train.py recipes/x.yaml --encoder lite2 --dataset_name 'my data' --prompt 'a b'" in text
    assert 'from_pretrained("run")' in text and "encoder: lite2" in text and "learning_rate: 0.1" in text


def test_the_python_on_a_pushed_card_loads_the_repository(tmp_path):
    text = card(tmp_path, name='a "quoted" name')
    pushed = name_on_card(text, "me/captioner")
    assert re.findall(r'(?:from_pretrained\(|model=)("[^"]*")', pushed) == ['"me/captioner"'] * 3
    assert name_on_card(pushed, 'a "quoted" name') == text


def test_samples_are_a_table_of_images_spread_over_the_split(tmp_path):
    rows = make_images(30)
    captions = [f"caption {number} | *" for number in range(30)]
    write_samples(tmp_path, rows, captions, publish=True)
    samples = read_samples(tmp_path)
    assert len(samples) == NUM_SAMPLES and [sample["caption"] for sample in samples[::11]] == [
        captions[0],
        captions[28],
    ]
    for sample in samples:
        image = PillowImage.open(tmp_path / "samples" / sample["file"])
        number = captions.index(sample["caption"])
        assert max(image.size) == 256 and abs(image.getpixel((9, 9))[0] - 20 * number % 256) < 8
    text = card(tmp_path)
    lines = text.partition("## Samples\n\n")[2].splitlines()
    table = lines[: lines.index("")]
    assert len(table) == 2 + NUM_SAMPLES / 3  # no empty line inside, which would end the table
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 4 for line in table)
    assert sum(line.count("](samples/") for line in table) == NUM_SAMPLES


def test_samples_of_an_earlier_run_are_removed_if_images_may_not_be_published(tmp_path):
    write_samples(tmp_path, make_images(3), ["a", "b", "c"], publish=True)
    assert len(read_samples(tmp_path)) == 3
    write_samples(tmp_path, make_images(3), ["a", "b", "c"], publish=False)
    assert not (tmp_path / "samples").exists() and "## Samples" not in card(tmp_path)


def test_samples_have_no_metadata_of_the_camera(tmp_path):
    PillowImage.new("RGB", (40, 40)).save(tmp_path / "noted.jpg", comment=b"GPS 1.2 3.4", exif=b"Exif\0\0secret")
    rows = Dataset.from_dict({"image": [str(tmp_path / "noted.jpg")]}, features=Features({"image": Image()}))
    write_samples(tmp_path, rows, ["a"], publish=True)
    content = (tmp_path / "samples" / "01.jpg").read_bytes()
    assert b"GPS" not in content and b"secret" not in content
    assert json.loads((tmp_path / "samples" / "samples.json").read_text()) == [{"file": "01.jpg", "caption": "a"}]


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ({"dataset": "scenes"}, TrainingData("scenes", is_scenes=True)),
        ({"dataset": "my_shapes", "true_captions": {"all": 0.9}}, TrainingData("my_shapes", is_scenes=True)),
        ({"dataset": "flickr8k"}, TrainingData("flickr8k", is_scenes=False)),
    ],
)
def test_the_training_data_are_read_back_from_a_card(tmp_path, results, expected):
    truth = {"true_captions": dict.fromkeys(TRUTH_TITLES, 0.9)} if "true_captions" in results else {}
    write_model_card(
        tmp_path,
        kind="vit-gpt2",
        model_name="me/captioner",
        results={"metrics": {"cider": 0.5}} | results | truth,
        command="train",
        options={},
    )
    assert training_data_of(str(tmp_path)) == expected


@pytest.mark.parametrize(
    ("card", "dataset"),
    [
        ("---\ndatasets:\n- coco\n- me/mine\n---\n# Of others", "coco, me/mine"),
        ("---\ndatasets: coco\n---\n", "coco"),
        ("---\nlicense: mit\n---\n", None),
        ("# No metadata", None),
        ("---\na: [\n---\n", None),
        ("---\ntags: [showtell]\nmodel-index: 3\n---\n", None),
        (None, None),
    ],
)
def test_cards_of_others_name_their_datasets_or_nothing_is_known(tmp_path, card, dataset):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert training_data_of(str(tmp_path)) == TrainingData(dataset)
    assert training_data_of("me/not-cached") == TrainingData()  # offline
