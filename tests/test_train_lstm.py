"""Laws of the LSTM captioner's training: the script trains, stops, goes on, and leaves a folder that loads."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import timm
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import caption
import evaluate_captions
import train_lstm
from data_scripts import load_captions
from data_scripts.captions_file import read_captions
from data_scripts.train_tokenizer import train_tokenizer
from metrics import CaptionScorer
from modeling.captioner import generate_captions, load_captioner
from training.averaging import WeightAverage
from training.batches import CaptionCollator, CaptionPairs

ROOT = Path(__file__).parent.parent
SMALL = [
    *("--encoder", "test_efficientnet", "--pretrained_encoder", "false", "--image_size", "64"),
    *("--image_embed_dim", "32", "--hidden_size", "32", "--num_hidden_layers", "1", "--vocab_size", "120"),
    *("--per_device_train_batch_size", "16", "--num_train_epochs", "2", "--report_to", "none"),
]


def train(folder: Path, dataset: str, *options: str) -> dict:
    """Train small, in this process, and give the trained weights."""
    train_lstm.main([*SMALL, "--dataset_name", dataset, "--output_dir", str(folder), *options])
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
    train(folder, small_scenes, "--num_train_epochs", "3", "--learning_rate", "1e-2", "--report_to", "tensorboard")
    return folder


def test_a_run_leaves_what_the_contract_says(trained, small_scenes):
    names = {path.name for path in trained.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "modeling_inception_lstm.py"} <= names
    assert {
        "results.json",
        "captions.jsonl",
        "captions.html",
        "README.md",
        "curves.png",
        "history.json",
        "logs",
    } <= names
    assert {"checkpoint-8", "checkpoint-16", "checkpoint-24"} <= names  # 24 images x 5 captions in batches of 16
    assert not [name for name in names if name.startswith(".")]
    results = json.loads((trained / "results.json").read_text())
    assert (results["dataset"], results["split"], results["num_images"]) == ("scenes", "test", 9)
    assert results["references_per_image"] == 5 and results["decoding"]["num_beams"] == 1
    assert (
        results["metrics"].keys()
        == results["shuffled"].keys()
        == {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"}
    )
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


def test_evaluation_takes_what_training_has_kept(trained, small_scenes, tmp_path, caplog):
    caplog.set_level("INFO", "training.features")
    evaluate(trained, small_scenes, tmp_path / "kept")
    assert "is read from" in caplog.text and "Encoding" not in caplog.text
    evaluate(trained, small_scenes, tmp_path / "bfloat16", "--dtype", "bfloat16")
    caplog.clear()
    evaluate(trained, small_scenes, tmp_path / "anew", "--cache_features", "false")
    assert "is read from" not in caplog.text and "sees every image anew" in caplog.text
    kept, low, anew = (
        json.loads((tmp_path / name / "results.json").read_text())["metrics"]["cider"]
        for name in ("kept", "bfloat16", "anew")
    )
    assert kept == pytest.approx(anew, abs=0.05) and low == pytest.approx(anew, abs=0.3)


def test_the_longest_caption_generated_is_the_99th_percentile(trained, small_scenes):
    model, processor = load_captioner(str(trained))
    texts = [text for texts in load_captions(small_scenes)["train"]["captions"] for text in texts]
    lengths = sorted(len(ids) for ids in processor.tokenizer(texts).input_ids)
    assert lengths[int(0.98 * len(lengths))] <= model.generation_config.max_length - 1 <= lengths[-1]


def test_no_caption_is_shorter_or_longer_than_it_may_be(trained, small_scenes, tmp_path):
    _, processor = load_captioner(str(trained))
    evaluate(trained, small_scenes, tmp_path, "--min_length", "14", "--max_length", "15")
    told = [json.loads(line)["caption"] for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert {len(ids) for ids in processor.tokenizer(told).input_ids} <= {14, 15, 16}  # a cut caption gets its EOS here


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
    with pytest.raises(SystemExit):
        evaluate(trained, small_scenes, tmp_path / "scores", "--num_beams", beams, "--num_return_sequences", "4")
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "num_return_sequences" in said and "Traceback" not in said
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
    (tmp_path / "outputs" / "demo").mkdir(parents=True)
    (tmp_path / "outputs" / "demo" / "lstm").symlink_to(trained)
    (tmp_path / "lstm").symlink_to(trained)  # the card names the folder alone
    monkeypatch.chdir(tmp_path)
    model, processor = load_captioner(str(trained))
    inputs = processor(images=Image.open("image.jpg"), return_tensors="pt")
    expected = generate_captions(model, processor, dict(inputs))[0]["caption"]
    for document in (trained / "README.md", ROOT / "README.md"):
        for lines in re.findall(r"```python\n(.*?)```", document.read_text(), flags=re.DOTALL):
            capsys.readouterr()
            exec(lines, {})
            assert capsys.readouterr().out.strip() == expected


def test_a_run_that_goes_on_ends_where_an_undisturbed_one_ends(small_scenes, tmp_path):
    options = [
        "--dropout",
        "0.3",
        "--lr_scheduler_type",
        "cosine",
        "--warmup_steps",
        "3",
        "--load_best_model_at_end",
        "false",
        *("--num_trainable_encoder_blocks", "1", "--encoder_learning_rate", "1e-4", "--num_augmentations", "2"),
    ]
    undisturbed = train(tmp_path / "whole", small_scenes, *options)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoint-16")
    (tmp_path / "killed" / "model.safetensors").unlink()
    resumed = train(tmp_path / "killed", small_scenes, *options, "--resume_from_checkpoint", "last")
    assert_same_weights(resumed, undisturbed)
    of_both = [json.loads((tmp_path / run / "history.json").read_text()) for run in ("whole", "killed")]
    of_both = [[{k: v for k, v in row.items() if not k.endswith("seconds")} for row in history] for history in of_both]
    assert of_both[0] == of_both[1]


def test_of_a_frozen_encoder_the_last_block_learns_at_its_own_rate_where_it_shall(trained, small_scenes, tmp_path):
    options = ["--num_trainable_encoder_blocks", "1", "--learning_rate", "0", "--encoder_learning_rate", "1e-3"]
    first = load_file(trained / "model.safetensors")  # of the same seed, its whole encoder frozen
    last = train(tmp_path / "last", small_scenes, *options)
    moved = {name for name in first if name.startswith("encoder.") and not torch.equal(last[name], first[name])}
    learns = tuple(f"encoder.backbone.{part}." for part in ("blocks.4", "conv_head", "bn2"))
    assert moved == {name for name in first if name.startswith(learns) and "running" not in name and "num_" not in name}


def test_a_captioner_goes_on_from_where_another_run_has_left_it(trained, small_scenes, tmp_path):
    before = load_file(trained / "model.safetensors")
    once = ["--model_name_or_path", str(trained), "--num_train_epochs", "1"]
    # Sizes and tokenizer are its own, whatever the options say (SMALL's hidden size is 32).
    unchanged = train(tmp_path / "unchanged", small_scenes, *once, "--learning_rate", "0", "--hidden_size", "16")
    assert_same_weights(unchanged, before)
    assert (tmp_path / "unchanged" / "tokenizer.json").read_text() == (trained / "tokenizer.json").read_text()
    assert f"It started from {trained.name}." in (tmp_path / "unchanged" / "README.md").read_text()

    options = ["--num_trainable_encoder_blocks", "1", "--dropout", "0.5", "--save_epochs", "1"]
    after = train(tmp_path / "after", small_scenes, *once, *options, "--min_length", "3")
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    learns = tuple(f"encoder.backbone.{part}." for part in ("blocks.4", "conv_head", "bn2"))
    assert "lm_head.weight" in moved and any(name.startswith(learns) for name in moved)
    assert not [name for name in moved if name.startswith("encoder.") and not name.startswith(learns)]
    model, _ = load_captioner(str(tmp_path / "after"))
    assert (model.config.dropout, model.generation_config.min_length) == (0.5, 4)  # the start token is counted
    # How it was saved to write is no matter of the next run's, and the start stays as it was.
    train(tmp_path / "third", small_scenes, "--model_name_or_path", str(tmp_path / "after"), "--num_train_epochs", "1")
    model, _ = load_captioner(str(tmp_path / "third"))
    assert (model.config.dropout, model.generation_config.min_length) == (0.0, None)
    assert_same_weights(load_file(trained / "model.safetensors"), before)


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


@pytest.mark.parametrize(("side", "warned"), [("32", True), ("64", False)])
def test_a_grid_of_one_place_is_warned_of(small_scenes, tmp_path, caplog, side, warned):
    options = ["--attention", "true", "--image_size", side, "--num_train_epochs", "1", "--max_eval_samples", "2"]
    train(tmp_path, small_scenes, *options)
    assert ("gives one place for 32 pixels" in caplog.text) == warned


def test_accumulated_batches_give_the_step_of_one_big_batch(small_scenes, tmp_path):
    options = ["--num_train_epochs", "1", "--train_sampling_strategy", "random", "--max_eval_samples", "2"]
    big = train(tmp_path / "big", small_scenes, *options, "--per_device_train_batch_size", "24")
    options += ["--per_device_train_batch_size", "6", "--gradient_accumulation_steps", "4"]
    assert_same_weights(train(tmp_path / "small", small_scenes, *options), big, tolerance=1e-5)


def test_two_processes_give_the_weights_of_one_with_the_double_batch(small_scenes, tmp_path):
    options = ["--num_train_epochs", "1", "--dataset_name", small_scenes]
    one = train(tmp_path / "one", small_scenes, *options, "--per_device_train_batch_size", "24")
    # `accelerate launch --cpu --num_processes 2` starts one process (accelerate 1.15); with --multi_gpu it starts two.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    launch += [
        "train_lstm.py",
        *SMALL,
        *options,
        "--per_device_train_batch_size",
        "12",
        "--output_dir",
        str(tmp_path / "two"),
    ]
    on_cpu = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    ran = subprocess.run(launch, cwd=ROOT, env=on_cpu, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    checkpoint = tmp_path / "two" / "checkpoint-5"  # 120 captions in steps of 24
    assert len(list(checkpoint.glob("random_states_*"))) == 2
    assert_same_weights(load_file(tmp_path / "two" / "model.safetensors"), one, tolerance=1e-5)
    captions = (tmp_path / "two" / "captions.jsonl").read_text()
    assert len(captions.splitlines()) == 9  # every test image once, though two processes share nine


def test_the_full_size_default_trains_validates_and_saves(small_scenes, tmp_path):
    texts = [text for texts in load_captions(small_scenes)["train"]["captions"] for text in texts]
    tokenizer = train_tokenizer(texts)
    tokenizer.add_tokens([f"<filler {number}>" for number in range(8000 - len(tokenizer))])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    arguments = [
        "--encoder",
        "inception_resnet_v2",
        "--pretrained_encoder",
        "false",
        "--tokenizer_name",
        str(tmp_path / "tokenizer"),
    ]
    arguments += [
        "--max_train_samples",
        "1",
        "--max_eval_samples",
        "1",
        "--num_train_epochs",
        "1",
        "--report_to",
        "none",
    ]
    arguments += [
        "--per_device_train_batch_size",
        "3",
        "--dataset_name",
        small_scenes,
        "--output_dir",
        str(tmp_path / "lstm"),
    ]
    train_lstm.main(arguments)
    progress = json.loads((tmp_path / "lstm" / "checkpoint-2" / "progress.json").read_text())
    assert progress["step"] == 2
    assert progress["history"][0]["train_loss"] == pytest.approx(math.log(8000), rel=0.3)
    weights = load_file(tmp_path / "lstm" / "model.safetensors")
    assert weights["lm_head.weight"].shape == (8000, 1024) and weights["image_projection.weight"].shape == (1024, 1536)


def test_labels_are_smoothed_in_training_and_nowhere_else(small_scenes, tmp_path):
    """Weights that stay as they are (learning rate 0) tell both losses: torch's own, of the same model."""
    told = {}
    for smoothing in ("0", "0.3"):
        options = ["--learning_rate", "0", "--weight_decay", "0", "--num_train_epochs", "1"]
        train(tmp_path / smoothing, small_scenes, *options, "--label_smoothing_factor", smoothing)
        (told[smoothing],) = json.loads((tmp_path / smoothing / "history.json").read_text())
    assert told["0.3"]["eval_loss"] == told["0"]["eval_loss"]
    model, processor = load_captioner(str(tmp_path / "0"))
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


def test_a_recipe_is_read_and_the_command_line_is_over_it(small_scenes, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"dataset: {small_scenes}\nlearning_rate: 1e-2\nnum_train_epochs: 1\nhidden_size: 16\n")
    (_, model_args, args) = train_lstm.parse_recipe(
        (train_lstm.DataArguments, train_lstm.LSTMArguments, train_lstm.LoopArguments),
        [str(recipe), "--hidden_size", "24"],
    )
    assert (args.learning_rate, args.num_train_epochs, model_args.hidden_size) == (0.01, 1, 24)


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("lstm_*.yaml")), ids=lambda path: path.name)
def test_the_recipes_name_only_options_there_are(recipe):
    groups = (train_lstm.DataArguments, train_lstm.LSTMArguments, train_lstm.LoopArguments)
    assert len(train_lstm.parse_recipe(groups, [str(recipe)])) == 3


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("hub_strategy: sometimes", "--hub_strategy sometimes: it must be one of end, every_save"),
        ("learning_rate:", "learning_rate wants one value, as in `learning_rate: 0.001`"),
        ("dropout: [0.1]", "dropout wants one value, as in `dropout: 0.0`"),
    ],
)
def test_what_a_recipe_says_is_looked_at_as_the_command_line_is(tmp_path, capsys, line, sentence):
    (tmp_path / "recipe.yaml").write_text(line)
    with pytest.raises(SystemExit) as stopped:
        train_lstm.main([str(tmp_path / "recipe.yaml")])
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["no_such.yaml"], "no_such.yaml cannot be read"),
        (["--no_such_option", "1"], "no_such_option"),
        (["--dataset_name", "no/such/folder"], "no/such/folder"),
        (["--learning_rate", "fast"], "learning_rate"),
        (["--encoder", "no_such_encoder"], "no_such_encoder"),
        (["--resume_from_checkpoint", "no/such/checkpoint"], "no/such/checkpoint"),
    ],
)
def test_what_a_user_gets_wrong_is_said_in_one_sentence(small_scenes, tmp_path, arguments, sentence, capsys):
    first = (
        []
        if arguments[0].endswith(".yaml")
        else [*SMALL, "--dataset_name", small_scenes, "--output_dir", str(tmp_path / "run")]
    )
    with pytest.raises(SystemExit) as stopped:
        train_lstm.main([*first, *arguments])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


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
    assert [Path(line["image_id"]).name for line in told] == ["0.png", "1.png", "2.png", "0.png"]
    model, processor = load_captioner(str(trained))
    inputs = processor(images=[rows[number]["image"] for number in range(3)], return_tensors="pt")
    made = [made["caption"] for made in generate_captions(model, processor, dict(inputs))]
    assert [line["caption"] for line in told] == [*made, made[0]]
    assert "broken.jpg: image does not decode" in capsys.readouterr().err

    caption.main([*options, str(images / "0.png"), "--output", str(tmp_path / "captions.html")])
    page = (tmp_path / "captions.html").read_text()
    assert made[0] in re.sub("<[^>]*>", "", page)  # each token stands in its own tag
    caption.main([*options, str(images / "0.png")])
    assert capsys.readouterr().out == f"{images / '0.png'}\t{made[0]}\n"
    with pytest.raises(SystemExit) as stopped:
        caption.main(["--model_name_or_path", str(trained), str(tmp_path / "nowhere.png")])
    assert stopped.value.code == 2
    assert "nowhere.png: cannot be read" in capsys.readouterr().err


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

    monkeypatch.setattr(caption, "NUM_IMAGES_ON_PAGE", 2)
    page = tmp_path / "captions.html"
    caption.main(["--model_name_or_path", str(trained), str(images / "a.png"), str(images), "--output", str(page)])
    assert "shows the first 2 of 4 images" in capsys.readouterr().err
    before = page.read_bytes()
    with pytest.raises(SystemExit):
        caption.main(["--model_name_or_path", str(trained), "no/such.png", "--output", str(page)])
    assert page.read_bytes() == before


def test_caption_reads_a_image_from_the_network(trained, small_scenes, tmp_path, capsys):
    load_captions(small_scenes)["test"][0]["image"].save(tmp_path / "image.png")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path))
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    caption.main(["--model_name_or_path", str(trained), str(tmp_path / "image.png")])
    from_file = capsys.readouterr().out.split("\t")[1]
    caption.main(["--model_name_or_path", str(trained), f"{address}/image.png", f"{address}/nowhere.png"])
    told = capsys.readouterr()
    assert told.out == f"{address}/image.png\t{from_file}"
    assert f"{address}/nowhere.png: cannot be read: 404" in told.err
    server.shutdown()


def test_the_average_is_that_of_torch():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model[0].requires_grad_(False)
    average = WeightAverage(model, 0.05)  # below what the first steps leave, so that it is the same at each
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.05))
    theirs.update_parameters(model)  # the first only copies
    for step in range(1, 6):
        with torch.no_grad():
            for parameter in model[1].parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(step)
        theirs.update_parameters(model)
    last = {name: value.clone() for name, value in model.state_dict().items()}
    with average.in_place():
        torch.testing.assert_close(model.state_dict(), theirs.module.state_dict())
        assert not torch.equal(model[1].weight, last["1.weight"])
    assert_same_weights(model.state_dict(), last)


def test_the_first_steps_are_soon_forgotten():
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
        average = WeightAverage(model, 0.999)
        model.weight.fill_(1.0)
    left = 1.0
    for step in range(1, 41):
        average.update(step)
        left *= step / (step + 9)
    assert average.values[0].item() == pytest.approx(1 - left) and left < 1e-6


def test_what_is_kept_is_the_average_and_a_checkpoint_without_one_is_refused(small_scenes, tmp_path, capsys):
    last = train(tmp_path / "last", small_scenes, "--learning_rate", "1e-2", "--load_best_model_at_end", "false")
    options = ("--learning_rate", "1e-2", "--load_best_model_at_end", "false", "--ema_decay", "0.9")
    averaged = train(tmp_path / "averaged", small_scenes, *options)
    saved = load_file(tmp_path / "averaged" / "checkpoint-16" / "average.safetensors")
    assert_same_weights({name: averaged[name] for name in saved}, saved)
    raw = load_file(tmp_path / "averaged" / "checkpoint-16" / "model.safetensors")
    assert_same_weights(raw, last)  # the training itself does not change
    assert not torch.equal(averaged["lm_head.weight"], last["lm_head.weight"])
    resume = ("--resume_from_checkpoint", str(tmp_path / "last" / "checkpoint-8"))
    with pytest.raises(SystemExit):
        train(tmp_path / "other", small_scenes, *options, *resume)
    assert "another --ema_decay" in capsys.readouterr().err
    resume = ("--resume_from_checkpoint", str(tmp_path / "averaged" / "checkpoint-8"))
    with pytest.raises(SystemExit):
        train(tmp_path / "other", small_scenes, *options[:-2], *resume)
    assert "another --ema_decay" in capsys.readouterr().err
