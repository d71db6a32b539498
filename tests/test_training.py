"""Laws of the training loop that all three scripts share, each tried in the script where it can go wrong."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_captioners import COLORS, IMAGES

import train_lstm
import train_scst
import train_vit_gpt2
import training.evaluation
from modeling.captioner import Captioner
from training.checkpoints import checkpoints

MAINS = {"train_lstm": train_lstm.main, "train_vit_gpt2": train_vit_gpt2.main, "train_scst": train_scst.main}
# Ten captions in batches of four, or five images in batches of two: three steps an epoch, the third with one half.
OPTIONS = [
    *("--max_steps", "5", "--eval_steps", "2", "--save_steps", "2", "--logging_steps", "1", "--learning_rate", "0.1"),
    *("--max_length", "8", "--dropout", "0", "--report_to", "none", "--disable_tqdm", "true"),
]
# By name: script, kind of captioner it starts from, and what makes the weights that are saved others than those that are trained.
RUNS = {
    "LSTM, BatchNorm averaged": ("train_lstm", "lstm", ["--ema_decay", "0.5", "--freeze_encoder", "false"]),
    "ViT-GPT2 averaged": ("train_vit_gpt2", "vit_gpt2", ["--ema_decay", "0.5"]),
    "ViT-GPT2 with LoRA": ("train_vit_gpt2", "vit_gpt2", ["--lora_rank", "2"]),
    "SCST mixed": ("train_scst", "vit_gpt2", ["--init_weight_share", "0.3"]),
    "SCST": ("train_scst", "lstm", []),
}
MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors", "processor_config.json", "tokenizer.json"}
STATE_FILES = {"checksums.json", "optimizer.pt", "rng_state_0.pt", "trainer_state.json"}


def start_options(script: str, start: str) -> list[str]:
    if script == "train_vit_gpt2":
        sizes = ["--hidden_size", "32", "--num_hidden_layers", "1", "--num_attention_heads", "4", "--image_size", "32"]
        return [*sizes, "--pretrained_encoder", "false", "--prompt", "", "--decoder", start]
    own = ["--num_samples", "2", "--early_stopping_patience", "9"] if script == "train_scst" else []
    return ["--model_name_or_path", start, *own]


@pytest.fixture(scope="module")
def train(colors, starts, tmp_path_factory):
    """Trains by the options of RUNS and more; gives the folder, and the captions of each evaluation by step."""

    def run(name: str, *options: str) -> tuple[Path, dict[int, list[str]]]:
        script, kind, own = RUNS[name]
        pytest.importorskip("peft") if "--lora_rank" in own else None
        folder, evaluated = tmp_path_factory.mktemp("runs") / "run", []
        score = training.evaluation.score_and_show
        size = "2" if script == "train_scst" else "4"
        arguments = [*OPTIONS, *own, *start_options(script, starts[kind]), "--per_device_train_batch_size", size]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                training.evaluation,
                "score_and_show",
                lambda captions, *rest: evaluated.append(captions) or score(captions, *rest),
            )
            MAINS[script]([*arguments, "--dataset_name", colors, "--output_dir", str(folder), *options])
        steps = [row["step"] for row in history(folder) if "cider" in row]
        return folder, dict(zip(steps[-len(evaluated) :], evaluated, strict=True))  # a resumed run's are the last

    return run


@pytest.fixture(scope="module")
def runs(train):
    """Each run of RUNS once."""
    made = {}
    return lambda name: made[name] if name in made else made.setdefault(name, train(name))


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "history.json").read_text())


def captions_of(folder: Path) -> list[str]:
    captioner = Captioner.load(folder)
    inputs = captioner.processor(images=[image.convert("RGB") for image in IMAGES], return_tensors="pt")
    return [made["caption"] for made in captioner.generate(dict(inputs))]


@pytest.mark.parametrize("name", RUNS)
def test_every_checkpoint_is_the_model_that_was_evaluated_at_its_step(runs, name):
    folder, evaluated = runs(name)
    found = checkpoints(folder)
    assert [path.name for path in found] == [f"checkpoint-{step}" for step in (2, 3, 4, 5)]
    for path in found:
        assert captions_of(path) == evaluated[int(path.name.split("-")[1])]
    assert len({tuple(evaluated[step]) for step in evaluated}) > 1
    assert any(len(set(captions)) > 1 for captions in evaluated.values())
    trained = path / "trained_weights.safetensors"
    names = {file.name for file in path.iterdir()} - {"tokenizer_config.json"}
    code = {"captioning_pipeline.py", "caption_loss.py", "modeling_inception_lstm.py", "transformers_versions.py"}
    assert names - code == MODEL_FILES | STATE_FILES | ({trained.name} if RUNS[name][2] else set())
    if trained.exists():  # others than those of the model
        weights, own = load_file(path / "model.safetensors"), load_file(trained)
        differ = [key for key in own if key not in weights or not torch.equal(own[key], weights[key])]
        assert [key for key in differ if "lora_" in key or key in weights]
        if name.startswith("LSTM"):
            assert "running_mean" in str(differ)  # BatchNorm's statistics are averaged, too


def test_a_checkpoint_captions_images_from_the_command_line(runs, tmp_path, capsys):
    import caption

    folder, evaluated = runs("ViT-GPT2 averaged")
    paths = [tmp_path / f"{color}.png" for color in COLORS]
    for image, path in zip(IMAGES, paths, strict=True):
        image.save(path)
    capsys.readouterr()  # what the run printed
    caption.main(["--model_name_or_path", str(folder / "checkpoint-4"), "--dtype", "float32", *map(str, paths)])
    lines = [line.split("\t")[1] for line in capsys.readouterr().out.splitlines()]
    assert lines == evaluated[4]


@pytest.mark.parametrize("name", ["LSTM, BatchNorm averaged", "ViT-GPT2 with LoRA", "SCST"])
def test_the_history_has_a_row_at_each_log_and_evaluation(runs, name):
    folder, _ = runs(name)
    rows = history(folder)
    if name == "SCST":
        start = rows.pop(0)
        assert (start["step"], start["epoch"]) == (0, 0) and "reward" not in start and "cider" in start
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["epoch"] for row in rows] == [0.3333, 0.6667, 1, 1.3333, 1.6667]
    assert [row["step"] for row in rows if "cider" in row and "eval_loss" in row] == [2, 3, 4, 5]
    assert all(("reward" if name == "SCST" else "train_loss") in row for row in rows)


@pytest.mark.parametrize(("name", "count"), [("ViT-GPT2 averaged", 18), ("SCST", 9)])
def test_throughput_counts_what_its_unit_says(runs, name, count):
    """In the five steps of one epoch and two thirds: ten captions, or five images, and two whole batches."""
    folder, _ = runs(name)
    unit = "images" if name == "SCST" else "captions"
    results = json.loads((folder / "results.json").read_text())["train"]
    state = json.loads((folder / "checkpoint-5" / "trainer_state.json").read_text())
    assert results[f"{unit}_per_second"] == pytest.approx(count / state["train_seconds"], abs=0.06)
    assert results["epochs"] == pytest.approx(5 / 3, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-GPT2 with LoRA", "SCST mixed"])
def test_evaluated_often_or_seldom_it_ends_on_the_same_bits(runs, train, name):
    seldom, _ = train(name, "--eval_steps", "5", "--eval_epochs", "9", "--save_steps", "5", "--save_epochs", "9")
    for file in ("model.safetensors", "trained_weights.safetensors"):
        often = load_file(runs(name)[0] / "checkpoint-5" / file)
        found = load_file(seldom / "checkpoint-5" / file)
        assert often.keys() == found.keys() and all(torch.equal(often[key], found[key]) for key in often)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_resumed_inside_an_epoch_it_ends_on_the_same_bits(runs, train, name):
    folder, _ = runs(name)
    resumed, _ = train(name, "--resume_from_checkpoint", str(folder / "checkpoint-2"))
    for file in checkpoints(folder)[-1].glob("*.safetensors"):
        expected, found = load_file(file), load_file(resumed / "checkpoint-5" / file.name)
        assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in found)
    drop = [
        [{key: value for key, value in row.items() if "seconds" not in key} for row in history(run)]
        for run in (folder, resumed)
    ]
    assert drop[0] == drop[1]


def test_few_validation_images_are_warned_of_and_libraries_log_once(train, caplog):
    train("SCST", "--max_steps", "1")
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "training.evaluation"]
    assert warning.startswith("5 validation images")
    for name in ("datasets", "huggingface_hub"):
        assert logging.getLogger(name).handlers and not logging.getLogger(name).propagate
