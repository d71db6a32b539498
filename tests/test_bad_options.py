"""What a user gets wrong in options and models: one sentence, exit code 2, before any long work, and no traceback."""

import contextlib
import re
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import load_from_disk
from kill_points import SCRIPTS
from transformers import AutoTokenizer

import caption
import evaluate_captions
import train_lstm
import train_vit_gpt2
from data_scripts import load_captions
from data_scripts.train_tokenizer import train_tokenizer
from training.checkpoints import IN_FLOAT32, checkpoint_problem, checkpoints, new_checkpoint
from training.loop import start_accelerator

MAINS = {"train_lstm": train_lstm.main, "train_vit_gpt2": train_vit_gpt2.main}
SMALL = ["--num_train_epochs", "1", "--per_device_train_batch_size", "24", "--report_to", "none"]


@pytest.fixture(scope="module")
def trained(small_scenes, tmp_path_factory) -> dict[str, Path]:
    folders = {}
    for script, main in MAINS.items():
        folders[script] = tmp_path_factory.mktemp(script) / "run"
        main([*SCRIPTS[script], *SMALL, "--dataset_name", small_scenes, "--output_dir", str(folders[script])])
    return folders


def refused(capsys, main: Callable, arguments: list[object]) -> str:
    """The one sentence of a command that goes no further, ours or argparse's."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2, (stopped.value.code, error[-500:])
    assert "Traceback" not in error
    (sentence,) = re.findall(r"^(?:\S+: )?error: (.*)", error.replace("\r", "\n"), flags=re.MULTILINE)
    return sentence


BOTH = [
    ("--num_train_epochs", "0"),
    ("--num_train_epochs", "-1"),
    ("--per_device_train_batch_size", "0"),
    ("--per_device_eval_batch_size", "0"),
    ("--gradient_accumulation_steps", "0"),
    ("--learning_rate", "-1"),
    ("--learning_rate", "nan"),
    ("--weight_decay", "-1"),
    ("--lr_scheduler_type", "spiral"),
    ("--warmup_steps", "-1"),
    ("--max_grad_norm", "-1"),
    ("--report_to", "nobody"),
    ("--eval_epochs", "0"),
    ("--save_epochs", "0"),
    ("--save_steps", "0"),
    ("--save_total_limit", "0"),
    ("--early_stopping_patience", "0"),
    ("--max_length", "0"),
    ("--min_length", "-1"),
    ("--length_penalty", "nan"),
    ("--length_penalty", "1e9"),
    ("--num_augmentations", "0"),
    ("--num_augmentations", "11"),
    ("--num_trainable_encoder_blocks", "-1"),
    ("--num_trainable_encoder_blocks", "99"),
    ("--num_beams", "0"),
    ("--no_repeat_ngram_size", "-1"),
    ("--seed", "-1"),
    ("--dataloader_num_workers", "-1"),
    ("--max_train_samples", "0"),
    ("--max_eval_samples", "0"),
    ("--max_caption_length", "0"),
    ("--tokenizer_name", "no/such/tokenizer"),
    ("--hidden_size", "0"),
    ("--num_hidden_layers", "0"),
    ("--image_size", "0"),
    ("--dropout", "1.5"),
    ("--vocab_size", "2"),
    ("--resume_from_checkpoint", "no/such/checkpoint"),
]
OPTIONS = [
    *((script, option, value) for option, value in BOTH for script in SCRIPTS),
    ("train_lstm", "--image_embed_dim", "0"),
    ("train_lstm", "--ema_decay", "1"),
    ("train_lstm", "--num_attention_heads", "0"),
    ("train_lstm", "--attention_dropout", "1"),
    ("train_lstm", "--attention_dropout", "0.2"),  # of no attention
    ("train_lstm", "--num_attention_heads", "5"),
    ("train_lstm", "--encoder_learning_rate", "-1"),
    ("train_lstm", "--mixed_precision", "int3"),
    ("train_vit_gpt2", "--num_attention_heads", "0"),
    ("train_vit_gpt2", "--num_attention_heads", "5"),
    ("train_vit_gpt2", "--patch_size", "0"),
    ("train_vit_gpt2", "--patch_size", "64"),
    ("train_vit_gpt2", "--prompt", "a word " * 2000),
    ("train_vit_gpt2", "--optim", "no_such_optimizer"),
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_caption_has_to_be_no_longer_than_it_may(capsys, script):
    sentence = refused(capsys, MAINS[script], ["--min_length", "9", "--max_length", "8"])
    assert "--min_length 9" in sentence and "--max_length 8" in sentence


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--activation_checkpointing", "true"], "wants an encoder that learns"),
        (
            [
                "--activation_checkpointing",
                "true",
                "--freeze_encoder",
                "false",
                "--encoder",
                "inception_resnet_v2",
                "--image_size",
                "96",
            ],
            "has it not",
        ),
        (["--attention", "true", "--encoder", "deit_tiny_distilled_patch16_224"], "gives no grid to look at"),
        (["--compile_encoder", "true", "--cache_features", "false"], "give one of them up"),
    ],
)
def test_what_an_encoder_cannot_do_is_said(small_scenes, tmp_path, capsys, options, said):
    arguments = [
        *SCRIPTS["train_lstm"],
        *SMALL,
        "--dataset_name",
        small_scenes,
        "--output_dir",
        tmp_path / "run",
        *options,
    ]
    assert said in refused(capsys, train_lstm.main, arguments)


def test_a_captioner_of_system_a_is_no_decoder_of_system_b(trained, small_scenes, tmp_path, capsys):
    arguments = [*SCRIPTS["train_vit_gpt2"], *SMALL, "--dataset_name", small_scenes, "--output_dir", tmp_path / "run"]
    arguments += ["--pretrained_decoder", "true", "--decoder", trained["train_lstm"]]
    said = refused(capsys, train_vit_gpt2.main, arguments)
    assert (
        f"decoder {trained['train_lstm']} is of the kind inception_lstm" in said
        and "train_vit_gpt2.py has saved" in said
    )


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("no/such/captioner", [], "model no/such/captioner cannot be loaded"),
        ("train_vit_gpt2", [], "is a VisionEncoderDecoderModel: give a captioner that train_lstm.py has made"),
        ("train_lstm", ["--tokenizer_name", "mine"], "--tokenizer_name mine does not go with --model_name_or_path"),
        ("train_lstm", ["--attention_dropout", "0.2"], "--attention_dropout 0.2: --model_name_or_path"),
    ],
)
def test_what_does_not_go_on_is_said(trained, small_scenes, tmp_path, capsys, model, options, said):
    arguments = [*SCRIPTS["train_lstm"], *SMALL, "--dataset_name", small_scenes, "--output_dir", tmp_path / "run"]
    assert said in refused(
        capsys, train_lstm.main, [*arguments, "--model_name_or_path", trained.get(model, model), *options]
    )


def test_a_run_does_not_write_over_the_captioner_it_goes_on_from(trained, small_scenes, capsys):
    start = trained["train_lstm"]
    arguments = [
        *SCRIPTS["train_lstm"],
        *SMALL,
        "--dataset_name",
        small_scenes,
        "--model_name_or_path",
        start,
        "--output_dir",
        start,
    ]
    assert "is the --model_name_or_path's own folder" in refused(capsys, train_lstm.main, arguments)


def test_a_least_length_above_the_models_longest_is_refused_where_captions_are_made(trained, tmp_path, capsys):
    model = ["--model_name_or_path", trained["train_lstm"]]
    evaluation = [*model, "--output_dir", tmp_path / "scores", "--split", "validation"]
    for main, arguments, option in (
        (caption.main, [*model, "image.jpg"], "--min_length"),
        (evaluate_captions.main, evaluation, "--min_length"),
    ):
        sentence = refused(capsys, main, [*arguments, option, "900"])
        assert sentence.startswith("the shortest caption is to have 900 tokens and the longest")


@pytest.mark.parametrize(("script", "option", "value"), OPTIONS)
def test_an_impossible_value_is_refused_and_its_option_named(small_scenes, tmp_path, capsys, script, option, value):
    arguments = [
        *SCRIPTS[script],
        *SMALL,
        "--dataset_name",
        small_scenes,
        "--output_dir",
        tmp_path / "run",
        option,
        value,
    ]
    sentence = refused(capsys, MAINS[script], arguments)
    assert option.removeprefix("--") in sentence or value in sentence
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


@pytest.fixture
def processor_with(monkeypatch) -> Iterator[Callable]:
    """Lets torch believe that the processor has these instructions; no later run of this process is in bfloat16 for it."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield lambda **instructions: monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("script", "asked"),
    [
        ("train_lstm", ["--mixed_precision", "bf16"]),
        ("train_vit_gpt2", ["--bf16", "true"]),
        ("train_lstm", []),
        ("train_vit_gpt2", []),
    ],
)
def test_where_the_processor_has_no_bfloat16_training_is_in_float32_and_says_so(
    small_scenes, tmp_path, monkeypatch, caplog, processor_with, script, asked
):
    """There torch has no LSTM in it, and its products take a hundred times as long. Asked for by the launcher where not by us."""
    caplog.set_level("INFO")
    processor_with(avx2=True)
    if not asked:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    arguments = [*SCRIPTS[script], *SMALL, "--dataset_name", small_scenes, "--output_dir", tmp_path / "run", *asked]
    monkeypatch.setattr(torch, "autocast", None)  # not so much as tried
    MAINS[script]([str(argument) for argument in arguments])
    assert caplog.messages.count(IN_FLOAT32) == 1
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_where_the_processor_has_bfloat16_it_is_used(tmp_path, caplog, processor_with):
    processor_with(avx512_bf16=True)
    args = train_vit_gpt2.LoopArguments(output_dir=str(tmp_path / "run"), bf16=True, report_to="none")
    assert args.bf16 and args.mixed_precision == "bf16" and not args.in_float32
    args = train_lstm.LoopArguments(output_dir=str(tmp_path / "run"), mixed_precision="bf16", report_to="none")
    assert start_accelerator(args).mixed_precision == "bf16" and IN_FLOAT32 not in caplog.messages


@pytest.mark.parametrize("top_p", ["0", "1.1", "nan"])
def test_a_share_of_the_probability_is_more_than_0_and_1_at_most(tmp_path, capsys, top_p):
    evaluation = ["--model_name_or_path", tmp_path, "--dataset_name", tmp_path, "--output_dir", tmp_path / "scores"]
    for main, arguments in (
        (evaluate_captions.main, evaluation),
        (caption.main, ["--model_name_or_path", tmp_path, "image.jpg"]),
    ):
        assert f"--top_p {float(top_p)}" in refused(capsys, main, [*arguments, "--top_p", top_p])


@pytest.mark.parametrize(
    ("main", "option", "value"),
    [
        (caption.main, "--batch_size", "0"),
        (caption.main, "--num_beams", "0"),
        (caption.main, "--min_length", "-1"),
        (caption.main, "--num_workers", "-1"),
        (evaluate_captions.main, "--num_beams", "0"),
        (evaluate_captions.main, "--num_return_sequences", "0"),
        (evaluate_captions.main, "--max_eval_samples", "-5"),
        (evaluate_captions.main, "--length_penalty", "nan"),
    ],
)
def test_an_impossible_number_is_refused_where_captions_are_made(tmp_path, capsys, main, option, value):
    arguments = {caption.main: ["--model_name_or_path", tmp_path, "image.jpg"]}
    arguments[evaluate_captions.main] = [
        "--model_name_or_path",
        tmp_path,
        "--dataset_name",
        tmp_path,
        "--output_dir",
        tmp_path / "scores",
    ]
    assert refused(capsys, main, [*arguments[main], option, value]).startswith(f"{option} {value}: it must be")


# ---------------------------------------------------------------------------------------------------- data and models


def test_a_size_that_the_encoder_cannot_see_is_refused(small_scenes, tmp_path, capsys):
    arguments = ["--dataset_name", small_scenes, "--output_dir", tmp_path / "run", "--encoder", "test_vit", *SMALL]
    arguments += ["--pretrained_encoder", "false", "--vocab_size", "120", "--image_size", "100"]
    assert refused(capsys, train_lstm.main, arguments).startswith("--image_size 100: test_vit cannot see it")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_missing_split_is_named(small_scenes, tmp_path, capsys, script, split):
    dataset = load_from_disk(small_scenes)
    del dataset[split]
    dataset.save_to_disk(tmp_path / "part")
    arguments = [*SCRIPTS[script], *SMALL, "--dataset_name", tmp_path / "part", "--output_dir", tmp_path / "run"]
    assert f"part has no split '{split}'" in refused(capsys, MAINS[script], arguments)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_a_tokenizer_that_cannot_begin_or_end_a_caption_is_refused(small_scenes, tmp_path, capsys, script, name):
    tokenizer = train_tokenizer(["a dog runs", "a red cat"], 40)
    setattr(tokenizer, name, None)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    arguments = [*SCRIPTS[script], *SMALL, "--dataset_name", small_scenes, "--output_dir", tmp_path / "run"]
    sentence = refused(capsys, MAINS[script], [*arguments, "--tokenizer_name", tmp_path / "tokenizer"])
    assert name in sentence and str(tmp_path / "tokenizer") in sentence


def test_a_tokenizer_larger_than_its_decoder_is_refused(small_scenes, trained, tmp_path, capsys):
    model = caption.load_captioner(str(trained["train_vit_gpt2"]))[0]
    model.decoder.save_pretrained(tmp_path / "decoder")
    tokenizer = AutoTokenizer.from_pretrained(trained["train_vit_gpt2"])
    tokenizer.add_tokens([f"<{number}>" for number in range(50)])
    tokenizer.save_pretrained(tmp_path / "decoder")
    arguments = [*SCRIPTS["train_vit_gpt2"], *SMALL, "--dataset_name", small_scenes, "--output_dir", tmp_path / "run"]
    arguments += ["--pretrained_decoder", "true", "--decoder", tmp_path / "decoder"]
    sentence = refused(capsys, MAINS["train_vit_gpt2"], arguments)
    assert f"the tokenizer has {len(tokenizer)} tokens, the decoder {model.decoder.config.vocab_size}" in sentence


@pytest.mark.parametrize(
    ("script", "name"), [("train_lstm", "test_efficientnet.r160_in1k"), ("train_vit_gpt2", "no/such_encoder")]
)
def test_encoder_weights_that_cannot_be_fetched_are_named(small_scenes, tmp_path, capsys, script, name):
    """Offline, as all tests are."""
    arguments = [*SCRIPTS[script], *SMALL, "--dataset_name", small_scenes, "--output_dir", tmp_path / "run"]
    sentence = refused(capsys, MAINS[script], [*arguments, "--encoder", name, "--pretrained_encoder", "true"])
    assert name in sentence


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_checkpoint_of_other_sizes_is_refused(small_scenes, trained, tmp_path, capsys, script):
    (checkpoint,) = checkpoints(trained[script])
    arguments = [*SCRIPTS[script], *SMALL, "--dataset_name", small_scenes, "--output_dir", tmp_path / "run"]
    arguments += ["--hidden_size", "16", "--resume_from_checkpoint", checkpoint]
    assert f"{checkpoint} is of another model" in refused(capsys, MAINS[script], arguments)


def test_too_little_room_for_the_features_is_said_before_they_are_made(small_scenes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 100, 100))
    arguments = [*SCRIPTS["train_lstm"], *SMALL, "--dataset_name", small_scenes, "--output_dir", tmp_path / "run"]
    assert "--cache_features false" in refused(capsys, train_lstm.main, arguments)
    assert not list((tmp_path / "cache").rglob("*.arrow"))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("step", "what"), [(7, "the loss is nan"), (6, "holds what is no number")])
def test_what_is_no_number_ends_the_run_and_is_never_saved(small_scenes, tmp_path, monkeypatch, script, step, what):
    """A weight is spoilt in a step of the second epoch; a checkpoint is due after the sixth, whose loss was still a number."""
    plain, steps = torch.optim.AdamW.step, []

    def spoiling(optimizer, *arguments, **options):
        result = plain(optimizer, *arguments, **options)
        steps.append(1)
        if len(steps) == step:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].fill_(float("nan"))
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", spoiling)
    arguments = [*SCRIPTS[script], *SMALL, "--dataset_name", small_scenes, "--output_dir", str(tmp_path / "run")]
    arguments += ["--num_train_epochs", "3", *(["--save_steps", "6"] if step == 6 else [])]
    with pytest.raises(SystemExit) as stopped:
        MAINS[script](arguments)
    sentence = str(stopped.value.code)
    assert what in sentence and "--learning_rate" in sentence and "at step" in sentence
    (last,) = checkpoints(tmp_path / "run")
    assert last.name == "checkpoint-5" and str(last) in sentence and checkpoint_problem(last) is None


# --------------------------------------------------------------------------------------------- captions, evaluation


@pytest.fixture
def image(small_scenes, tmp_path) -> Path:
    load_captions(small_scenes)["test"][0]["image"].save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said(trained, image, capsys):
    arguments = ["--model_name_or_path", trained["train_lstm"], image, "--device", "cuda"]
    assert "--device cuda cannot be used" in refused(capsys, caption.main, arguments)


@pytest.mark.parametrize(
    "harm", ["no folder", "no weights", "half the weights", "no tokenizer", "no config", "no json"]
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_model_that_does_not_load_is_named(trained, image, tmp_path, capsys, script, harm):
    folder = tmp_path / "model"
    if harm != "no folder":
        shutil.copytree(trained[script], folder)
    weights = folder / "model.safetensors"
    if harm == "no weights":
        weights.unlink()
    elif harm == "half the weights":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif harm == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    elif harm == "no config":
        (folder / "config.json").unlink()
    elif harm == "no json":
        (folder / "config.json").write_text("{")
    sentence = refused(capsys, caption.main, ["--model_name_or_path", folder, image])
    assert f"model {folder} cannot be loaded: " in sentence
    refused(capsys, evaluate_captions.main, ["--model_name_or_path", folder, "--output_dir", tmp_path / "scores"])
    assert not (tmp_path / "scores").exists()


def test_weights_that_are_a_pickle_are_not_run(trained, image, tmp_path, capsys):
    """A file of weights of the old kind, with a command in it."""

    class Command:
        def __reduce__(self):
            return Path.touch, (tmp_path / "owned",)

    folder = tmp_path / "model"
    shutil.copytree(trained["train_vit_gpt2"], folder)
    (folder / "model.safetensors").unlink()
    torch.save({"decoder": Command()}, folder / "pytorch_model.bin")
    refused(capsys, caption.main, ["--model_name_or_path", folder, image])
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_checkpoint_with_a_command_in_it_is_not_run(small_scenes, trained, tmp_path, script):
    """Checksums keep no stranger out, who can write them anew; what keeps him out is `weights_only`."""

    class Command:
        def __reduce__(self):
            return Path.touch, (tmp_path / "owned",)

    (source,) = checkpoints(trained[script])
    pickles = [path.name for path in source.iterdir() if path.suffix not in (".json", ".safetensors")]
    assert len(pickles) >= 2  # the optimizer's and the random states
    for name in pickles:
        folder = tmp_path / name / "checkpoint-5"
        with new_checkpoint(folder.parent, 5) as written:
            shutil.copytree(source, written, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checksums.json"))
            torch.save({"state": Command(), "random_state": Command(), "python": Command()}, written / name)
        arguments = [*SCRIPTS[script], *SMALL, "--dataset_name", small_scenes, "--output_dir", str(tmp_path / "run")]
        arguments += ["--num_train_epochs", "2", "--resume_from_checkpoint", str(folder)]
        with contextlib.suppress(SystemExit, Exception):
            MAINS[script](arguments)
        assert not (tmp_path / "owned").exists(), name


def test_every_load_of_torch_is_for_weights_only():
    """And nothing unpickles, switches on remote code, or runs a shell."""
    root = Path(__file__).parent.parent
    sources = [path for path in root.rglob("*.py") if not {".venv", "tests"} & set(path.relative_to(root).parts)]
    text = "\n".join(path.read_text() for path in sources)
    assert len(sources) > 30
    for call in re.findall(r"torch\.load\([^)]*\)", text):
        assert "weights_only=True" in call
    for forbidden in (
        "import pickle",
        "pickle.load",
        "joblib",
        "shell=True",
        "os.system",
        "weights_only=False",
        "eval(",
    ):
        uses = [
            line
            for line in text.splitlines()
            if forbidden in line and not re.search(r"\w" + re.escape(forbidden), line)
        ]
        assert not [line for line in uses if ".eval(" not in line], forbidden
    # In the lines of Python that the card of the LSTM captioner shows, whose reader decides; nowhere in what we run.
    assert not re.findall(r"^[^#\"']*trust_remote_code\s*=\s*True", text, flags=re.MULTILINE)
