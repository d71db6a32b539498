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
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    BartConfig,
    BlipConfig,
    GPT2Config,
    LlavaConfig,
    VisionEncoderDecoderConfig,
    ViTConfig,
)

import caption
import evaluate_captions
import train_lstm
import train_scst
import train_vit_gpt2
from data_scripts import load_captions
from data_scripts.train_tokenizer import train_tokenizer
from modeling.captioner import Captioner
from system.errors import UserError
from training import features
from training.arguments import (
    CaptionDataArguments,
    CaptionTrainingArguments,
    DecodingArguments,
    TrainingArguments,
    parse_recipe,
)
from training.checkpoints import checkpoint_problem, checkpoints, new_checkpoint
from training.launch import start_accelerator

ROOT = Path(__file__).parent.parent
MAINS = {"train_lstm": train_lstm.main, "train_vit_gpt2": train_vit_gpt2.main, "train_scst": train_scst.main}
SMALL = ["--num_train_epochs", "1", "--per_device_train_batch_size", "24", "--report_to", "none"]


@pytest.fixture
def arguments(small_scenes, starts, tmp_path) -> Callable:
    """The arguments of a small run of a script, and more."""

    def of(script: str, *more: object) -> list[str]:
        start = ["--model_name_or_path", starts["lstm"]] if script == "train_scst" else []
        where = ["--dataset_name", small_scenes, "--output_dir", tmp_path / "run"]
        return [str(word) for word in (*SCRIPTS[script], *start, *SMALL, *where, *more)]

    return of


@pytest.fixture(scope="module")
def trained(small_scenes, tmp_path_factory) -> dict[str, Path]:
    """Runs of five steps."""
    folders = {}
    for script in ("train_lstm", "train_vit_gpt2"):
        folders[script] = tmp_path_factory.mktemp(script) / "run"
        where = ["--dataset_name", small_scenes, "--output_dir", str(folders[script])]
        MAINS[script]([*SCRIPTS[script], *SMALL, *where])
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


# Options of the loop, the data and the decoding are the same dataclasses in every script.
OPTIONS = [
    ("train_lstm", "--num_train_epochs", "0"),
    ("train_scst", "--num_train_epochs", "-1"),
    ("train_vit_gpt2", "--max_steps", "-2"),
    ("train_lstm", "--per_device_train_batch_size", "0"),
    ("train_lstm", "--per_device_eval_batch_size", "0"),
    ("train_lstm", "--gradient_accumulation_steps", "0"),
    ("train_scst", "--learning_rate", "-1"),
    ("train_lstm", "--learning_rate", "nan"),
    ("train_lstm", "--weight_decay", "-1"),
    ("train_lstm", "--lr_scheduler_type", "spiral"),
    ("train_lstm", "--warmup_steps", "-1"),
    ("train_lstm", "--max_grad_norm", "-1"),
    ("train_lstm", "--report_to", "nobody"),
    ("train_lstm", "--logging_steps", "0"),
    ("train_lstm", "--eval_epochs", "0"),
    ("train_lstm", "--eval_steps", "0"),
    ("train_lstm", "--save_epochs", "0"),
    ("train_lstm", "--save_steps", "0"),
    ("train_lstm", "--save_total_limit", "0"),
    ("train_lstm", "--early_stopping_patience", "0"),
    ("train_lstm", "--max_length", "0"),
    ("train_lstm", "--min_length", "-1"),
    ("train_lstm", "--length_penalty", "nan"),
    ("train_scst", "--length_penalty", "1e9"),
    ("train_lstm", "--num_augmentations", "0"),
    ("train_scst", "--num_augmentations", "11"),
    ("train_lstm", "--num_beams", "0"),
    ("train_lstm", "--no_repeat_ngram_size", "-1"),
    ("train_lstm", "--seed", "-1"),
    ("train_lstm", "--dataloader_num_workers", "-1"),
    ("train_lstm", "--max_train_samples", "0"),
    ("train_lstm", "--max_eval_samples", "0"),
    ("train_vit_gpt2", "--max_caption_length", "0"),
    ("train_lstm", "--ema_decay", "1"),
    ("train_vit_gpt2", "--encoder_learning_rate", "-1"),
    ("train_vit_gpt2", "--resume_from_checkpoint", "no/such/checkpoint"),
    # of one script
    ("train_lstm", "--num_trainable_encoder_blocks", "-1"),
    ("train_lstm", "--num_trainable_encoder_blocks", "99"),
    ("train_lstm", "--tokenizer_name", "no/such/tokenizer"),
    ("train_lstm", "--image_embed_dim", "0"),
    ("train_lstm", "--hidden_size", "0"),
    ("train_lstm", "--num_hidden_layers", "0"),
    ("train_lstm", "--image_size", "0"),
    ("train_lstm", "--dropout", "1.5"),
    ("train_lstm", "--vocab_size", "2"),
    ("train_lstm", "--attention_dropout", "1"),
    ("train_vit_gpt2", "--num_trainable_encoder_blocks", "99"),
    ("train_vit_gpt2", "--hidden_size", "0"),
    ("train_vit_gpt2", "--num_hidden_layers", "0"),
    ("train_vit_gpt2", "--image_size", "0"),
    ("train_vit_gpt2", "--dropout", "1.5"),
    ("train_vit_gpt2", "--vocab_size", "2"),
    ("train_vit_gpt2", "--num_attention_heads", "0"),
    ("train_vit_gpt2", "--num_attention_heads", "5"),
    ("train_vit_gpt2", "--patch_size", "0"),
    ("train_vit_gpt2", "--patch_size", "64"),
    ("train_vit_gpt2", "--prompt", "a word " * 2000),
    ("train_scst", "--model_name_or_path", "no/such/captioner"),
    ("train_scst", "--num_samples", "0"),
    ("train_scst", "--num_samples", "1"),  # and no other to compare with
    ("train_scst", "--baseline", "others"),
    ("train_scst", "--xe_weight", "1"),
    ("train_scst", "--init_weight_share", "1"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("script", "option", "value"), OPTIONS)
def test_an_impossible_value_is_refused_and_its_option_named(arguments, tmp_path, capsys, script, option, value):
    sentence = refused(capsys, MAINS[script], arguments(script, option, value))
    assert option.removeprefix("--") in sentence or value in sentence
    assert not (tmp_path / "run").exists() or [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


# What would be left out in silence: what is given, and the option without which, or with which, it has no effect.
WITHOUT_EFFECT = [
    ("train_lstm", ["--warmup_steps", "5"], "--lr_scheduler_type"),
    ("train_lstm", ["--fp16", "true", "--bf16", "true"], "--bf16"),
    ("train_lstm", ["--feature_cache", "int8", "--freeze_encoder", "false"], "--feature_cache"),
    ("train_lstm", ["--compile_encoder", "true", "--feature_cache", "none"], "--feature_cache"),
    ("train_lstm", ["--compile_encoder", "true", "--freeze_encoder", "false"], "--compile_encoder"),
    ("train_lstm", ["--hub_strategy", "checkpoint"], "--push_to_hub"),
    ("train_lstm", ["--num_attention_heads", "2"], "--attention"),
    ("train_lstm", ["--attention_dropout", "0.2"], "--attention"),
    ("train_lstm", ["--vocab_size", "200", "--tokenizer_name", "x"], "--tokenizer_name"),
    ("train_lstm", ["--encoder_learning_rate", "1e-4"], "--encoder_learning_rate"),  # of a frozen one
    ("train_lstm", ["--num_beams", "1", "--length_penalty", "0.7"], "--length_penalty"),
    ("train_vit_gpt2", ["--length_penalty", "0.7"], "--num_beams"),  # of a new model, which is greedy
    (
        "train_vit_gpt2",
        ["--pretrained_encoder", "true", "--encoder", "x", "--patch_size", "8"],
        "--pretrained_encoder",
    ),  # SCRIPTS has sizes
    ("train_vit_gpt2", ["--loss_on_prompt", "true", "--prompt", ""], "--prompt"),
    ("train_vit_gpt2", ["--encoder_learning_rate", "1e-4"], "--encoder_learning_rate"),
]


@pytest.mark.parametrize(("script", "options", "named"), WITHOUT_EFFECT)
def test_an_option_without_effect_is_refused(arguments, tmp_path, capsys, script, options, named):
    assert named in refused(capsys, MAINS[script], arguments(script, *options))


@pytest.mark.parametrize("script", ["train_lstm", "train_vit_gpt2"])
def test_a_rate_of_a_frozen_encoder_is_refused_before_it_encodes(arguments, capsys, monkeypatch, script):
    monkeypatch.setattr(features, "encode_splits", lambda *_: pytest.fail("images were encoded"))
    assert "--encoder_learning_rate" in refused(
        capsys, MAINS[script], arguments(script, "--encoder_learning_rate", "1e-4")
    )


def test_a_number_of_a_recipe_can_be_taken_back(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("encoder_learning_rate: 1e-4\nmax_train_samples: 5\n")
    kinds = (CaptionDataArguments, CaptionTrainingArguments)
    data_args, args = parse_recipe(kinds, [str(tmp_path / "recipe.yaml"), "--encoder_learning_rate", "None"])
    assert (args.encoder_learning_rate, data_args.max_train_samples) == (None, 5)
    for option, kind in (("--max_train_samples", "int"), ("--encoder_learning_rate", "float"), ("--max_steps", "int")):
        with pytest.raises(SystemExit):
            parse_recipe(kinds, [option, "none" if option == "--max_steps" else "few"])
        told = capsys.readouterr().err
        assert f"{option}: invalid {kind} value" in told and told.count("\n") == 2 and "recipe.yaml" in told


def test_the_sizes_of_new_parts_have_no_effect_where_both_are_loaded(capsys):
    assert "--hidden_size" in refused(capsys, train_vit_gpt2.main, ["--hidden_size", "32"])


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_has_options_that_there_are_and_that_have_an_effect(recipe):
    """Also those of encoder and captioner, which its command may add."""
    script = {"lstm": train_lstm, "vit": train_vit_gpt2, "scst": train_scst}[recipe.stem.split("_")[0]]
    data = script.DataArguments if script is train_scst else CaptionDataArguments
    own = script.SCSTArguments if script is train_scst else script.ModelArguments
    decoding = getattr(script, "DecodingArguments", DecodingArguments)
    start = ["--model_name_or_path", "x"] if script is train_scst else []
    parsed = parse_recipe((data, own, decoding, script.TrainingArguments), [str(recipe), *start])
    assert parsed[3].output_dir.startswith("outputs/")


def test_a_recipe_is_read_and_the_command_line_is_over_it(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 1e-2\nnum_train_epochs: 1\nhidden_size: 16\nhub_private_repo: null\n")
    kinds = (train_lstm.ModelArguments, train_lstm.TrainingArguments)
    model_args, args = parse_recipe(kinds, [str(recipe), "--hidden_size", "24"])
    assert (args.learning_rate, args.num_train_epochs, model_args.hidden_size) == (0.01, 1, 24)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("hub_strategy: sometimes", "hub_strategy"),
        ("learning_rate:", "learning_rate"),
        ("learning_rate: fast", "learning_rate"),
        ("dropout: [0.1]", "dropout"),
        ("no_such_option: 1", "no_such_option"),
        ("- dropout", "recipe.yaml"),
        ("a: b: c", "recipe.yaml"),
    ],
)
def test_what_a_recipe_has_is_checked_as_the_command_line_is(tmp_path, capsys, line, named):
    (tmp_path / "recipe.yaml").write_text(line)
    assert named in refused(capsys, train_lstm.main, [tmp_path / "recipe.yaml"])


@pytest.mark.parametrize("words", [["no_such.yaml"], ["--no_such_option", "1"], ["--learning_rate", "fast"]])
def test_what_is_no_option_is_named(capsys, words):
    assert words[0].removeprefix("--") in refused(capsys, train_lstm.main, words)


def test_a_caption_has_to_be_no_longer_than_it_may(capsys):
    sentence = refused(capsys, train_lstm.main, ["--min_length", "9", "--max_length", "8"])
    assert "--min_length 9" in sentence and "--max_length 8" in sentence


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--activation_checkpointing", "true"], "--activation_checkpointing"),
        (
            [
                *("--activation_checkpointing", "true", "--freeze_encoder", "false"),
                *("--encoder", "inception_resnet_v2", "--image_size", "96"),
            ],
            "--activation_checkpointing",
        ),
        (["--attention", "true", "--encoder", "deit_tiny_distilled_patch16_224"], "--attention"),
        (["--num_attention_heads", "5", "--attention", "true"], "--num_attention_heads"),
        (["--encoder", "no_such_encoder"], "no_such_encoder"),
    ],
)
def test_what_an_encoder_cannot_do_is_named(arguments, capsys, options, named):
    assert named in refused(capsys, train_lstm.main, arguments("train_lstm", *options))


def test_an_lstm_captioner_is_no_decoder_of_vit_gpt2(arguments, starts, capsys):
    options = ["--pretrained_decoder", "true", "--decoder", starts["lstm"], "--vocab_size", "8000"]
    assert starts["lstm"] in refused(capsys, train_vit_gpt2.main, arguments("train_vit_gpt2", *options))


@pytest.mark.parametrize(
    ("start", "options", "named"),
    [
        ("no/such/captioner", [], "no/such/captioner"),
        ("vit_gpt2", [], "--model_name_or_path"),
        ("lstm", ["--tokenizer_name", "mine", "--vocab_size", "8000"], "--tokenizer_name"),
        ("lstm", ["--attention_dropout", "0.2"], "--attention_dropout"),
        ("lstm", ["--hidden_size", "99"], "--hidden_size"),
        ("lstm", ["--encoder", "test_resnet"], "--encoder"),
    ],
)
def test_what_does_not_go_with_a_captioner_to_fine_tune_is_named(
    small_scenes, tmp_path, starts, capsys, start, options, named
):
    run = ["--dataset_name", small_scenes, "--output_dir", str(tmp_path / "run"), "--report_to", "none"]
    sentence = refused(capsys, train_lstm.main, [*run, "--model_name_or_path", starts.get(start, start), *options])
    assert named in sentence and not (tmp_path / "run" / "model.safetensors").exists()


@pytest.fixture(scope="module")
def wrong_starts(tmp_path_factory, starts) -> dict[str, str]:
    """Folders of configs alone, of kinds that some script or no script fine-tunes, and of whole captioners."""
    folder = tmp_path_factory.mktemp("wrong")
    configs = {
        "gpt2": GPT2Config(),
        "blip": BlipConfig(),
        "llava": LlavaConfig(),
        "bart": VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(), BartConfig()),
    }
    for name, config in configs.items():
        config.save_pretrained(folder / name)
    return {name: str(folder / name) for name in configs} | starts


@pytest.mark.parametrize(
    ("script", "start", "named"),
    [
        *(("train_vit_gpt2", start, f"kind {start}") for start in ("gpt2", "blip", "llava")),
        *(("train_lstm", start, f"kind {start}") for start in ("gpt2", "blip")),
        *(("train_scst", start, f"kind {start}") for start in ("gpt2", "blip", "bart")),
        ("train_vit_gpt2", "lstm", "kind inception_lstm"),
        ("train_lstm", "vit_gpt2", "kind vision-encoder-decoder"),
    ],
)
def test_a_captioner_of_a_kind_that_a_script_does_not_fine_tune_is_refused_before_any_data_are_looked_for(
    wrong_starts, tmp_path, capsys, script, start, named
):
    options = ["--model_name_or_path", wrong_starts[start], "--dataset_name", "no/such/data"]
    with pytest.raises(SystemExit) as ended:
        MAINS[script]([*options, "--output_dir", str(tmp_path / "run")])
    sentence = capsys.readouterr().err
    assert ended.value.code == 2 and named in sentence and "no/such/data" not in sentence
    assert sentence.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("script", "start"),
    [("train_lstm", "lstm"), ("train_vit_gpt2", "vit_gpt2"), ("train_scst", "lstm"), ("train_scst", "vit_gpt2")],
)
def test_of_a_captioner_that_fits_the_data_are_looked_for(starts, tmp_path, capsys, script, start):
    options = ["--model_name_or_path", starts[start], "--dataset_name", "no/such/data"]
    with pytest.raises(SystemExit):
        MAINS[script]([*options, "--output_dir", str(tmp_path / "run")])
    assert "no/such/data" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["train_lstm", "train_scst"])
def test_a_run_does_not_overwrite_the_captioner_it_starts_from(small_scenes, starts, capsys, script):
    start = ["--model_name_or_path", starts["lstm"], "--output_dir", starts["lstm"]]
    sentence = refused(capsys, MAINS[script], ["--dataset_name", small_scenes, *start])
    assert "--output_dir" in sentence and "--model_name_or_path" in sentence


def test_a_min_length_above_the_models_max_length_is_refused_where_captions_are_generated(
    starts, small_scenes, tmp_path, capsys
):
    model = ["--model_name_or_path", starts["lstm"], "--min_length", "900"]
    evaluation = [*model, "--dataset_name", small_scenes, "--output_dir", tmp_path / "scores"]
    for main, words in ((caption.main, [*model, "image.jpg"]), (evaluate_captions.main, evaluation)):
        assert "--min_length" in refused(capsys, main, words)


# ------------------------------------------------------------------------------------------------------- precision


@pytest.fixture
def processor_with(monkeypatch) -> Iterator[Callable]:
    """Lets torch believe that the processor has these instructions; no later run of this process is in bfloat16 for it."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield lambda **instructions: monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.parametrize("asked", [["--bf16", "true"], []], ids=["by option", "by launcher"])
def test_where_the_processor_has_no_bfloat16_training_is_in_float32(
    arguments, tmp_path, monkeypatch, processor_with, asked
):
    """There torch has no LSTM in it, and its products take a hundred times as long."""
    processor_with(avx2=True)
    if not asked:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    plain = torch.autocast

    def refused(*given, enabled=True, **named):
        assert not enabled  # not so much as tried
        return plain(*given, enabled=enabled, **named)

    monkeypatch.setattr(torch, "autocast", refused)
    train_lstm.main(arguments("train_lstm", "--max_steps", "1", *asked))
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float32}


def test_where_the_processor_has_bfloat16_it_is_used(tmp_path, processor_with):
    processor_with(avx512_bf16=True)
    args = TrainingArguments(output_dir=str(tmp_path / "run"), bf16=True, report_to="none")
    assert start_accelerator(args).mixed_precision == "bf16"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("by_launcher", [False, True])
def test_float16_needs_a_gpu(tmp_path, monkeypatch, processor_with, by_launcher):
    processor_with()
    if by_launcher:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    args = TrainingArguments(output_dir=str(tmp_path / "run"), fp16=not by_launcher, report_to="none")
    with pytest.raises(UserError, match="fp16"):
        start_accelerator(args)


# ------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize(
    ("main", "option", "value"),
    [
        (caption.main, "--batch_size", "0"),
        (caption.main, "--num_beams", "0"),
        (caption.main, "--min_length", "-1"),
        (caption.main, "--num_workers", "-1"),
        (caption.main, "--top_p", "1.1"),
        (evaluate_captions.main, "--top_p", "0"),
        (evaluate_captions.main, "--top_p", "nan"),
        (evaluate_captions.main, "--num_beams", "0"),
        (evaluate_captions.main, "--num_return_sequences", "0"),
        (evaluate_captions.main, "--max_eval_samples", "-5"),
        (evaluate_captions.main, "--length_penalty", "nan"),
    ],
)
def test_an_impossible_number_is_refused_where_captions_are_generated(tmp_path, capsys, main, option, value):
    words = {caption.main: ["--model_name_or_path", tmp_path, "image.jpg"]}
    words[evaluate_captions.main] = ["--model_name_or_path", tmp_path, "--dataset_name", tmp_path]
    words[evaluate_captions.main] += ["--output_dir", tmp_path / "scores"]
    assert option in refused(capsys, main, [*words[main], option, value])


# ---------------------------------------------------------------------------------------------------- data and models


def test_a_size_that_the_encoder_cannot_encode_is_refused(arguments, capsys):
    options = ["--encoder", "test_vit", "--image_size", "100"]
    assert "--image_size 100" in refused(capsys, train_lstm.main, arguments("train_lstm", *options))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_missing_split_is_named(small_scenes, arguments, tmp_path, capsys, split):
    dataset = load_from_disk(small_scenes)
    del dataset[split]
    dataset.save_to_disk(tmp_path / "part")
    sentence = refused(capsys, train_lstm.main, arguments("train_lstm", "--dataset_name", tmp_path / "part"))
    assert str(tmp_path / "part") in sentence and f"'{split}'" in sentence


@pytest.mark.parametrize(("script", "name"), [("train_lstm", "bos_token"), ("train_vit_gpt2", "eos_token")])
def test_a_tokenizer_that_cannot_begin_or_end_a_caption_is_refused(arguments, tmp_path, capsys, script, name):
    tokenizer = train_tokenizer(["a dog runs", "a red cat"], 40)
    setattr(tokenizer, name, None)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = ["--tokenizer_name", tmp_path / "tokenizer", "--vocab_size", "8000"]
    sentence = refused(capsys, MAINS[script], arguments(script, *options))
    assert name in sentence and str(tmp_path / "tokenizer") in sentence


def test_a_tokenizer_larger_than_its_decoder_is_refused(arguments, starts, tmp_path, capsys):
    Captioner.load(starts["vit_gpt2"]).model.decoder.save_pretrained(tmp_path / "decoder")
    tokenizer = AutoTokenizer.from_pretrained(starts["vit_gpt2"])
    tokenizer.add_tokens([f"<{number}>" for number in range(50)])
    tokenizer.save_pretrained(tmp_path / "decoder")
    options = ["--pretrained_decoder", "true", "--decoder", tmp_path / "decoder", "--vocab_size", "8000"]
    assert str(len(tokenizer)) in refused(capsys, train_vit_gpt2.main, arguments("train_vit_gpt2", *options))


@pytest.mark.parametrize(
    ("script", "name"), [("train_lstm", "test_efficientnet.r160_in1k"), ("train_vit_gpt2", "no/such_encoder")]
)
def test_encoder_weights_that_cannot_be_fetched_are_named(arguments, capsys, script, name):
    """Offline, as all tests are."""
    options = ["--encoder", name, "--pretrained_encoder", "true", *(["--image_size", "224"] if "vit" in script else [])]
    assert name in refused(capsys, MAINS[script], arguments(script, *options))


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("train_lstm", ["--hidden_size", "16"]),
        ("train_vit_gpt2", ["--hidden_size", "16"]),
        ("train_vit_gpt2", ["--num_trainable_encoder_blocks", "1"]),  # other parts were trained
        ("train_lstm", ["--ema_decay", "0.9"]),
        ("train_lstm", ["--per_device_train_batch_size", "12"]),
    ],
)
def test_a_checkpoint_of_another_model_or_training_is_refused(arguments, trained, capsys, script, options):
    (checkpoint,) = checkpoints(trained[script])
    more = [*options, "--resume_from_checkpoint", checkpoint]
    assert str(checkpoint) in refused(capsys, MAINS[script], arguments(script, *more))


def test_too_little_room_for_the_features_is_found_before_they_are_encoded(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 100, 100))
    assert "--feature_cache" in refused(capsys, train_lstm.main, arguments("train_lstm"))
    assert not list((tmp_path / "cache").rglob("*.npy"))


@pytest.mark.parametrize(("step", "named"), [(7, "loss"), (6, ".weight")])
def test_what_is_not_finite_ends_the_run_and_is_never_saved(arguments, tmp_path, monkeypatch, capsys, step, named):
    """A weight is spoilt in a step of the second epoch; a checkpoint is due after the sixth, whose loss was still finite."""
    plain, steps = torch.optim.AdamW.step, []

    def spoiling(optimizer, *arguments, **options):
        result = plain(optimizer, *arguments, **options)
        steps.append(1)
        if len(steps) == step:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].fill_(float("nan"))
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", spoiling)
    more = ["--num_train_epochs", "3", *(["--save_steps", "6"] if step == 6 else [])]
    sentence = refused(capsys, train_lstm.main, arguments("train_lstm", *more))
    assert named in sentence and "--learning_rate" in sentence
    (last,) = checkpoints(tmp_path / "run")
    assert last.name == "checkpoint-5" and str(last) in sentence and checkpoint_problem(last) is None


# --------------------------------------------------------------------------------------------- captions, evaluation


@pytest.fixture
def image(small_scenes, tmp_path) -> Path:
    load_captions(small_scenes)["test"][0]["image"].save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(starts, image, capsys):
    words = ["--model_name_or_path", starts["lstm"], image, "--device", "cuda"]
    assert "--device cuda" in refused(capsys, caption.main, words)


@pytest.mark.parametrize(
    "harm", ["no folder", "no weights", "half the weights", "no tokenizer", "no config", "no json"]
)
@pytest.mark.parametrize("kind", ["lstm", "vit_gpt2"])
def test_a_model_that_does_not_load_is_named(starts, image, tmp_path, capsys, kind, harm):
    folder = tmp_path / "model"
    if harm != "no folder":
        shutil.copytree(starts[kind], folder)
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
    assert str(folder) in refused(capsys, caption.main, ["--model_name_or_path", folder, image])
    words = ["--model_name_or_path", folder, "--dataset_name", tmp_path / "none", "--output_dir", tmp_path / "scores"]
    assert str(folder) in refused(capsys, evaluate_captions.main, words)  # before the data are looked for
    assert not (tmp_path / "scores").exists()


class Command:
    """What a pickle may have in it."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_weights_that_are_a_pickle_are_not_run(starts, image, tmp_path, capsys):
    """A file of weights of the old kind, with a command in it."""
    folder = tmp_path / "model"
    shutil.copytree(starts["vit_gpt2"], folder)
    (folder / "model.safetensors").unlink()
    torch.save({"decoder": Command(tmp_path / "owned")}, folder / "pytorch_model.bin")
    refused(capsys, caption.main, ["--model_name_or_path", folder, image])
    assert not (tmp_path / "owned").exists()


def test_a_checkpoint_with_a_command_in_it_is_not_run(arguments, trained, tmp_path):
    """Checksums keep no stranger out, who can write them anew; what keeps them out is `weights_only`."""
    (source,) = checkpoints(trained["train_vit_gpt2"])
    pickles = [path.name for path in source.iterdir() if path.suffix == ".pt"]
    assert sorted(pickles) == ["optimizer.pt", "rng_state_0.pt"]
    for name in pickles:
        folder = tmp_path / name / "checkpoint-5"
        folder.parent.mkdir()
        with new_checkpoint(folder.parent, 5) as written:
            shutil.copytree(source, written, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checksums.json"))
            command = Command(tmp_path / "owned")
            torch.save({"optimizer": command, "scaler": command, "python": command}, written / name)
        with contextlib.suppress(SystemExit, Exception):
            train_vit_gpt2.main(
                arguments("train_vit_gpt2", "--num_train_epochs", "2", "--resume_from_checkpoint", folder)
            )
        assert not (tmp_path / "owned").exists(), name
