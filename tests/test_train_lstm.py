"""Laws of the LSTM captioner's training: the script trains, resumes, and leaves a folder that loads and captions."""

import json
import math
import os
import re
from pathlib import Path

import pytest
import timm
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from serving import serving_folder
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import caption
import evaluate_captions
import train_lstm
import training.run
from data_scripts import load_captions
from data_scripts.captions_file import read_captions
from metrics import CaptionScorer
from modeling.captioner import Captioner
from modeling.modeling_inception_lstm import TimmEncoder
from reporting.curves import draw_curves
from training.averaging import ema_of
from training.batches import CaptionCollator, CaptionPairs

ROOT = Path(__file__).parent.parent
SIZES = [
    *("--encoder", "test_efficientnet", "--pretrained_encoder", "false", "--image_size", "64"),
    *("--image_embed_dim", "32", "--hidden_size", "32", "--num_hidden_layers", "1", "--vocab_size", "120"),
]
SHORT = ["--per_device_train_batch_size", "16", "--num_train_epochs", "2", "--report_to", "none"]


def train(folder: Path, dataset: str, *options: str) -> dict:
    """Train small, in this process, and give the trained weights."""
    sizes = [] if "--model_name_or_path" in options else SIZES
    train_lstm.main([*sizes, *SHORT, "--dataset_name", dataset, "--output_dir", str(folder), *options])
    return load_file(folder / "model.safetensors")


def assert_same_weights(ours: dict, theirs: dict, tolerance: float = 0.0) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="module")
def trained(small_scenes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "lstm"
    options = ["--num_train_epochs", "3", "--learning_rate", "1e-2", "--report_to", "tensorboard"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.run, "draw_curves", draw_curves)
        train(folder, small_scenes, *options)
    return folder


def test_a_run_leaves_what_the_contract_says(trained, small_scenes):
    names = {path.name for path in trained.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "modeling_inception_lstm.py"} <= names
    assert {"results.json", "captions.jsonl", "captions.html", "README.md", "curves.png", "history.json"} <= names
    assert Image.open(trained / "curves.png").width > 1000
    assert {"checkpoint-8", "checkpoint-16", "checkpoint-24"} <= names  # 24 images x 5 captions in batches of 16
    assert [name for name in names if name.startswith(".")] == [".lock"]
    results = json.loads((trained / "results.json").read_text())
    assert (results["dataset"], results["split"], results["num_images"]) == ("scenes", "test", 9)
    assert results["references_per_image"] == 5 and results["decoding"]["num_beams"] == 1
    scores = {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"}
    assert results["metrics"].keys() == results["shuffled"].keys() == scores
    assert results["train"]["epochs"] == 3 and results["train"]["captions_per_second"] > 0
    lines = [json.loads(line) for line in (trained / "captions.jsonl").read_text().splitlines()]
    test = load_captions(small_scenes)["test"]
    assert [(line["image_id"], line["references"]) for line in lines] == list(
        zip(test["image_id"], test["captions"], strict=True)
    )
    history = json.loads((trained / "history.json").read_text())
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert history[0]["train_loss"] > history[-1]["train_loss"]
    assert list((trained / "logs").glob("**/events*"))


def evaluate(model: Path, dataset: str, output_dir: Path, *options: str) -> None:
    arguments = {
        "--model_name_or_path": model,
        "--dataset_name": dataset,
        "--split": "validation",
        "--output_dir": output_dir,
    }
    evaluate_captions.main([*(str(word) for option in arguments.items() for word in option), *options])


def test_the_folder_holds_the_model_of_the_best_validation_cider(trained, small_scenes, tmp_path):
    history = json.loads((trained / "history.json").read_text())
    evaluate(trained, small_scenes, tmp_path)
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert metrics["cider"] == pytest.approx(max(row["cider"] for row in history), abs=1e-9)


def test_evaluation_reads_what_training_has_cached(trained, small_scenes, tmp_path, monkeypatch):
    encoded, forward = [], TimmEncoder.forward
    monkeypatch.setattr(TimmEncoder, "forward", lambda *args: encoded.append(1) or forward(*args))
    evaluate(trained, small_scenes, tmp_path / "cached")
    evaluate(trained, small_scenes, tmp_path / "bfloat16", "--dtype", "bfloat16")
    assert not encoded
    evaluate(trained, small_scenes, tmp_path / "anew", "--feature_cache", "none")
    assert encoded
    cached, low, anew = (
        json.loads((tmp_path / name / "results.json").read_text())["metrics"]["cider"]
        for name in ("cached", "bfloat16", "anew")
    )
    assert cached == pytest.approx(anew, abs=0.05) and low == pytest.approx(anew, abs=0.3)


def test_the_longest_caption_generated_is_the_99th_percentile(trained, small_scenes):
    captioner = Captioner.load(trained)
    texts = [text for texts in load_captions(small_scenes)["train"]["captions"] for text in texts]
    lengths = sorted(len(ids) for ids in captioner.tokenizer(texts).input_ids)
    assert lengths[int(0.98 * len(lengths))] <= captioner.model.generation_config.max_length - 1 <= lengths[-1]


def test_no_caption_is_shorter_or_longer_than_it_may_be(trained, small_scenes, tmp_path):
    tokenizer = Captioner.load(trained).tokenizer
    evaluate(trained, small_scenes, tmp_path, "--min_length", "14", "--max_length", "15")
    told = [json.loads(line)["caption"] for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert {len(ids) for ids in tokenizer(told).input_ids} <= {14, 15, 16}  # a cut caption gets its EOS here


def test_of_several_captions_the_first_is_scored_and_the_best_is_kept(trained, small_scenes, tmp_path):
    beams = ("--num_beams", "4")
    evaluate(trained, small_scenes, tmp_path / "one", *beams)
    evaluate(trained, small_scenes, tmp_path / "four", *beams, "--num_return_sequences", "4")
    assert (tmp_path / "one" / "captions.jsonl").read_bytes() == (tmp_path / "four" / "captions.jsonl").read_bytes()
    assert not (tmp_path / "one" / "best_captions.jsonl").exists()
    first, best = (read_captions(tmp_path / "four" / f"{name}.jsonl") for name in ("captions", "best_captions"))
    assert [(row["image_id"], row["references"]) for row in first] == [
        (row["image_id"], row["references"]) for row in best
    ]
    scorer = CaptionScorer([row["references"] for row in best])
    before, after = (scorer.report([row["caption"] for row in rows])["per_image"] for rows in (first, best))
    gains = [b["cider"] - a["cider"] for a, b in zip(before, after, strict=True)]
    assert min(gains) >= -1e-9 and max(gains) > 0.01


@pytest.mark.parametrize("beams", ["1", "3"])
def test_no_more_captions_are_wanted_than_there_are_beams(trained, small_scenes, tmp_path, capsys, beams):
    with pytest.raises(SystemExit) as stopped:
        evaluate(trained, small_scenes, tmp_path / "scores", "--num_beams", beams, "--num_return_sequences", "4")
    assert stopped.value.code == 2 and "num_return_sequences" in capsys.readouterr().err
    assert not (tmp_path / "scores").exists()


def test_the_best_of_several_captions_is_most_like_its_own_image():
    references = [["a red dog runs", "the dog runs"], ["two blue cats sleep", "cats sleep"], ["a green bird sings"]]
    rows = Dataset.from_dict({"image_id": ["0", "1", "2"], "captions": references})
    written = [["two blue cats sleep", "a dog", "the red dog runs"], ["blue cats sleep", "a red dog runs", "cats"]]
    written.append(["a bird", "birds sing", "a green bird sings"])
    told = [{"caption": own, "others": rest} for own, *rest in written]
    best = evaluate_captions.best_captions(rows, told, CaptionScorer(references))
    assert [row["caption"] for row in best] == ["the red dog runs", "blue cats sleep", "a green bird sings"]
    assert [(row["image_id"], row["references"]) for row in best] == list(zip("012", references, strict=True))


def test_a_file_of_captions_scores_as_the_model_did(trained, tmp_path):
    evaluate_captions.main(["--predictions", str(trained / "captions.jsonl"), "--output_dir", str(tmp_path)])
    of_file = json.loads((tmp_path / "results.json").read_text())
    of_model = json.loads((trained / "results.json").read_text())
    for part in ("metrics", "shuffled", "intervals"):
        assert of_file[part] == of_model[part]


def test_the_lines_on_the_card_and_in_the_readme_caption_a_image(trained, small_scenes, tmp_path, monkeypatch, capsys):
    image = load_captions(small_scenes)["test"][0]["image"]
    image.save(tmp_path / "image.jpg")
    image.save(tmp_path / "photo.jpg")
    (tmp_path / "outputs" / "demo").mkdir(parents=True)
    (tmp_path / "outputs" / "demo" / "lstm").symlink_to(trained)
    (tmp_path / "lstm").symlink_to(trained)  # the card names the folder alone
    monkeypatch.chdir(tmp_path)
    captioner = Captioner.load(trained)
    inputs = captioner.processor(images=Image.open("image.jpg"), return_tensors="pt")
    expected = captioner.generate(dict(inputs))[0]["caption"]
    for document in (trained / "README.md", ROOT / "README.md"):
        for lines in re.findall(r"```python\n(.*?)```", document.read_text(), flags=re.DOTALL):
            capsys.readouterr()
            exec(lines, {})
            assert capsys.readouterr().out.strip() == expected


def test_of_a_frozen_encoder_the_last_block_learns_at_its_own_rate_where_it_shall(trained, small_scenes, tmp_path):
    options = ["--num_trainable_encoder_blocks", "1", "--learning_rate", "0", "--encoder_learning_rate", "1e-3"]
    first = load_file(trained / "model.safetensors")  # of the same seed, its whole encoder frozen
    last = train(tmp_path / "last", small_scenes, *options)
    moved = {name for name in first if name.startswith("encoder.") and not torch.equal(last[name], first[name])}
    learns = tuple(f"encoder.backbone.{part}." for part in ("blocks.4", "conv_head", "bn2"))
    assert moved == {name for name in first if name.startswith(learns) and "running" not in name and "num_" not in name}


@pytest.mark.slow
def test_a_captioner_is_fine_tuned_from_where_another_run_has_left_it(trained, small_scenes, tmp_path):
    before = load_file(trained / "model.safetensors")
    once = ["--model_name_or_path", str(trained), "--num_train_epochs", "1"]
    unchanged = train(tmp_path / "unchanged", small_scenes, *once, "--learning_rate", "0")
    assert_same_weights(unchanged, before)
    assert (tmp_path / "unchanged" / "tokenizer.json").read_text() == (trained / "tokenizer.json").read_text()
    assert trained.name in (tmp_path / "unchanged" / "README.md").read_text()

    options = ["--num_trainable_encoder_blocks", "1", "--dropout", "0.5", "--save_epochs", "1"]
    after = train(tmp_path / "after", small_scenes, *once, *options, "--min_length", "3")
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    learns = tuple(f"encoder.backbone.{part}." for part in ("blocks.4", "conv_head", "bn2"))
    assert "lm_head.weight" in moved and any(name.startswith(learns) for name in moved)
    assert not [name for name in moved if name.startswith("encoder.") and not name.startswith(learns)]
    model = Captioner.load(tmp_path / "after").model
    assert (model.config.dropout, model.generation_config.min_length) == (0.5, 4)  # the start token is counted
    # How it was saved to write is no matter of the next run's, and the start stays as it was.
    train(tmp_path / "third", small_scenes, "--model_name_or_path", str(tmp_path / "after"), "--num_train_epochs", "1")
    model = Captioner.load(tmp_path / "third").model
    assert (model.config.dropout, model.generation_config.min_length) == (0.0, None)
    assert_same_weights(load_file(trained / "model.safetensors"), before)


@pytest.mark.slow
def test_activation_checkpointing_computes_the_blocks_again_and_learns_the_same(small_scenes, tmp_path, monkeypatch):
    calls, forward = [], timm.models._efficientnet_blocks.InvertedResidual.forward

    def counted(self, pixels):
        calls.append(torch.is_grad_enabled())
        return forward(self, pixels)

    monkeypatch.setattr(timm.models._efficientnet_blocks.InvertedResidual, "forward", counted)
    options = ["--num_trainable_encoder_blocks", "3", "--num_train_epochs", "1", "--max_eval_samples", "2"]
    weights, learned = [], []
    for asked in ("false", "true"):
        calls.clear()
        weights.append(train(tmp_path / asked, small_scenes, *options, "--activation_checkpointing", asked))
        learned.append(sum(calls))
    assert learned[1] > learned[0]
    assert_same_weights(*weights, tolerance=1e-6)


@pytest.mark.slow
def test_accumulated_batches_give_the_step_of_one_big_batch(small_scenes, tmp_path):
    options = ["--num_train_epochs", "1", "--train_sampling_strategy", "random", "--max_eval_samples", "2"]
    big = train(tmp_path / "big", small_scenes, *options, "--per_device_train_batch_size", "24")
    options += ["--per_device_train_batch_size", "6", "--gradient_accumulation_steps", "4"]
    assert_same_weights(train(tmp_path / "small", small_scenes, *options), big, tolerance=1e-5)


@pytest.mark.slow
def test_labels_are_smoothed_in_training_and_nowhere_else(small_scenes, tmp_path):
    """Weights that stay as they are (learning rate 0) tell both losses: torch's own, of the same model."""
    told = {}
    for smoothing in ("0", "0.3"):
        options = ["--learning_rate", "0", "--weight_decay", "0", "--num_train_epochs", "1"]
        train(tmp_path / smoothing, small_scenes, *options, "--label_smoothing_factor", smoothing)
        (told[smoothing],) = json.loads((tmp_path / smoothing / "history.json").read_text())
    assert told["0.3"]["eval_loss"] == told["0"]["eval_loss"]
    captioner = Captioner.load(tmp_path / "0")
    model, processor = captioner.model, captioner.processor
    rows = load_captions(small_scenes)["train"]
    pairs = CaptionPairs(rows, processor.tokenizer)
    batch = CaptionCollator(processor)(pairs.__getitems__(range(len(pairs))))
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(
            pixel_values=batch["pixel_values"], decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels)
        ).logits
    plain, smoothed = (
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=share).item()
        for share in (0.0, 0.3)
    )
    assert abs(smoothed - plain) > 1e-4 * plain
    assert told["0.3"]["train_loss"] == pytest.approx(smoothed, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "rows"), [(30, [2]), (0, [1, 2, 2])])
def test_curves_are_drawn_at_the_end_and_now_and_then(seconds, rows, small_scenes, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(training.run, "SECONDS_BETWEEN_CURVES", seconds)
    monkeypatch.setattr(training.run, "draw_curves", lambda folder, history: drawn.append(len(history)))
    train(tmp_path / "run", small_scenes, "--learning_rate", "0")
    assert drawn == rows


@pytest.mark.slow
def test_early_stopping_stops(small_scenes, tmp_path):
    options = [
        "--num_train_epochs",
        "6",
        "--learning_rate",
        "0",
        "--early_stopping_patience",
        "2",
        "--save_total_limit",
        "1",
    ]
    train(tmp_path / "run", small_scenes, *options)
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert len(history) == 3  # the best is the first; two more, no better
    # What nobody has taught guesses, and the loss told is a token's, whatever the batches.
    assert [row["train_loss"] for row in history] == pytest.approx([math.log(120)] * 3, rel=0.05)
    kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert kept == ["checkpoint-24", "checkpoint-8"]  # the newest, and the best


def test_caption_tells_files_and_folders_and_names_what_it_cannot_read(trained, small_scenes, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    rows = load_captions(small_scenes)["test"]
    for number in range(3):
        rows[number]["image"].save(images / f"{number}.png")
    (images / "broken.jpg").write_text("no image")
    output = tmp_path / "captions.jsonl"
    options = ["--model_name_or_path", str(trained), "--dtype", "float32"]  # what generate() below computes in
    caption.main([*options, str(images), str(images / "0.png"), "--output", str(output), "--batch_size", "2"])
    told = [json.loads(line) for line in output.read_text().splitlines()]
    assert [Path(line["image_id"]).name for line in told] == ["0.png", "1.png", "2.png"]  # once, though named twice
    captioner = Captioner.load(trained)
    inputs = captioner.processor(images=[rows[number]["image"] for number in range(3)], return_tensors="pt")
    made = [made["caption"] for made in captioner.generate(dict(inputs))]
    assert [line["caption"] for line in told] == made
    errors = capsys.readouterr().err
    assert "broken.jpg" in errors and "1 of 2 inputs" in errors

    caption.main([*options, str(images / "0.png"), "--output", str(tmp_path / "captions.html")])
    page = (tmp_path / "captions.html").read_text()
    assert made[0] in re.sub("<[^>]*>", "", page)  # each token stands in its own tag
    caption.main([*options, str(images / "0.png")])
    assert capsys.readouterr().out == f"{images / '0.png'}\t{made[0]}\n"
    with pytest.raises(SystemExit) as stopped:
        caption.main(["--model_name_or_path", str(trained), str(tmp_path / "nowhere.png")])
    assert stopped.value.code == 2
    assert "nowhere.png" in capsys.readouterr().err


def test_caption_goes_on_after_a_name_that_is_no_text_and_tells_what_a_page_leaves_out(
    trained, small_scenes, tmp_path, capsys, monkeypatch
):
    images = tmp_path / "images"
    images.mkdir()
    image = load_captions(small_scenes)["test"][0]["image"]
    for name in (b"a.png", b"m\xff\x1b[2J.png", b"z.png"):
        image.save(os.fsdecode(os.fsencode(images) + b"/" + name))
    caption.main(["--model_name_or_path", str(trained), str(images)])
    lines = capsys.readouterr().out.encode("utf-8").splitlines()
    assert [line.split(b"\t")[0].rpartition(b"/")[2] for line in lines] == [b"a.png", rb"m\udcff\x1b[2J.png", b"z.png"]

    monkeypatch.setattr("captioning.outputs.Page.num_images", 2)
    page = tmp_path / "captions.html"
    caption.main(["--model_name_or_path", str(trained), str(images / "a.png"), str(images), "--output", str(page)])
    assert "2 of 3" in capsys.readouterr().err
    before = page.read_bytes()
    with pytest.raises(SystemExit):
        caption.main(["--model_name_or_path", str(trained), "no/such.png", "--output", str(page)])
    assert page.read_bytes() == before


def test_caption_reads_a_image_from_the_network(trained, small_scenes, tmp_path, capsys):
    load_captions(small_scenes)["test"][0]["image"].save(tmp_path / "image.png")
    caption.main(["--model_name_or_path", str(trained), str(tmp_path / "image.png")])
    from_file = capsys.readouterr().out.split("\t")[1]
    with serving_folder(tmp_path) as address:
        caption.main(["--model_name_or_path", str(trained), f"{address}/image.png", f"{address}/nowhere.png"])
    told = capsys.readouterr()
    assert told.out == f"{address}/image.png\t{from_file}"
    assert f"{address}/nowhere.png" in told.err and "404" in told.err


def test_the_average_is_that_of_torch_and_follows_statistics():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    model[0].requires_grad_(False)
    ours = ema_of(model, 0.05)  # below what the first steps keep, so that it is the same at each
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.05), use_buffers=True)
    for _ in range(5):
        with torch.no_grad():
            for value in [*model[2].parameters(), model[1].running_mean]:
                value.add_(torch.randn_like(value))
        for average in (ours, theirs):
            average.update_parameters(model)
    averaged, expected = ours.module.state_dict(), theirs.module.state_dict()
    for name in expected.keys() - {"1.num_batches_tracked"}:  # a count, of which torch makes a fraction
        torch.testing.assert_close(averaged[name], expected[name])
    assert torch.equal(averaged["0.weight"], model[0].weight)
    assert not torch.equal(averaged["1.running_mean"], model[1].running_mean)


def test_the_first_steps_are_soon_forgotten():
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
        average = ema_of(model, 0.999)
        average.update_parameters(model)  # the first is a copy
        model.weight.fill_(1.0)
    left = 1.0
    for step in range(2, 42):
        average.update_parameters(model)
        left *= step / (step + 9)
    assert average.module.weight.item() == pytest.approx(1 - left) and left < 1e-5


@pytest.mark.slow
def test_averaging_changes_nothing_of_what_is_trained(small_scenes, tmp_path):
    options = ("--learning_rate", "1e-2", "--load_best_model_at_end", "false", "--num_train_epochs", "1")
    last = train(tmp_path / "last", small_scenes, *options)
    averaged = train(tmp_path / "averaged", small_scenes, *options, "--ema_decay", "0.9")
    raw = load_file(tmp_path / "averaged" / "checkpoint-8" / "trained_weights.safetensors")
    assert_same_weights(raw, {name: last[name] for name in raw})
    assert not torch.equal(averaged["lm_head.weight"], last["lm_head.weight"])
