"""Laws of ViT-GPT2's training script, on images of one color."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from PIL import Image
from safetensors.torch import load_file
from small_captioners import build as small_captioner
from transformers import VisionEncoderDecoderModel
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

import train_vit_gpt2
from data_scripts.caption_table import FEATURES
from modeling import caption_loss
from modeling.captioner import Captioner
from modeling.transformers_versions import CACHE
from modeling.vit_gpt2 import build_vit_gpt2, decoder_config, encoder_config, vit_image_processor
from system.errors import UserError
from training import launch

COLORS = {"red": (220, 30, 30), "green": (30, 170, 40), "blue": (30, 50, 220), "white": (250, 250, 250)}
SMALL = {
    "pretrained_encoder": "false",
    "pretrained_decoder": "false",
    "image_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 60,
    "dropout": 0.0,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "report_to": "none",
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Four images of one color for training, each with two captions of unlike length, and the same for validation."""
    folder = tmp_path_factory.mktemp("colors")
    rows = [
        {
            "image": Image.new("RGB", (40, 30), color),
            "image_id": name,
            "content_hash": name,
            "captions": [f"all is {name}", f"an image that is {name} from one side to the other"],
        }
        for name, color in COLORS.items()
    ]
    table = Dataset.from_list(rows).cast(FEATURES)
    DatasetDict({"train": table, "validation": table}).save_to_disk(folder)
    return folder


@pytest.fixture
def train(dataset, tmp_path, monkeypatch):
    """Runs the script in a folder of the test, and gives that folder."""

    def run(name: str, **options) -> Path:
        options = {"dataset_name": dataset, "output_dir": tmp_path / name, **SMALL, **options}
        train_vit_gpt2.main([word for option, value in options.items() for word in (f"--{option}", str(value))])
        return tmp_path / name

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "history.json").read_text())


@pytest.mark.slow
def test_run_leaves_what_the_contract_says(train, dataset):
    folder = train("whole", num_train_epochs=2, save_epochs=2, max_eval_samples=2)
    for name in ("results.json", "captions.jsonl", "captions.html", "README.md", "history.json", "curves.png"):
        assert (folder / name).stat().st_size > 0, name
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    results = json.loads((folder / "results.json").read_text())
    assert (results["split"], results["num_images"], results["train"]["epochs"]) == ("validation", 4, 2)
    rows = history(folder)
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 1), (2, 2)]
    expected = {"train_loss", "eval_loss", "cider", "shuffled_cider", "bleu_4", "generation_seconds", "scoring_seconds"}
    assert all(expected <= row.keys() for row in rows)

    captioner = Captioner.load(folder)
    assert type(captioner.model) is VisionEncoderDecoderModel
    images = [Image.new("RGB", (40, 30), color) for color in COLORS.values()]
    made = captioner.generate(dict(captioner.processor(images=images, return_tensors="pt")))
    written = [json.loads(line)["caption"] for line in (folder / "captions.jsonl").read_text().splitlines()]
    assert [caption["caption"] for caption in made] == written


@pytest.mark.slow
def test_accumulated_batches_weigh_as_one_large_one(train):
    """Four batches of two captions against one of eight, of unlike lengths: the same step."""
    options = {"adam_epsilon": 1.0, "learning_rate": 0.5, "train_sampling_strategy": "random", "max_grad_norm": 0}
    one = train("one", per_device_train_batch_size=8, **options)
    four = train("four", per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    assert history(four)[0]["train_loss"] == pytest.approx(history(one)[0]["train_loss"], rel=1e-5)
    assert history(four)[0]["step"] == 1
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(four)[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_gold_captions_never_reach_generate_and_the_prompt_does(train, monkeypatch):
    given, plain_generate = [], VisionEncoderDecoderModel.generate

    def watched(model, *args, **kwargs):
        if set(kwargs) == {"encoder_outputs", "decoder_input_ids", "max_new_tokens", "num_beams"}:
            return plain_generate(model, *args, **kwargs)  # the trial of a decoder, before there are captions
        given.append((args, set(kwargs), kwargs[CACHE].get_seq_length()))
        sequences = plain_generate(model, *args, **kwargs)
        starts.append(sequences[:, 1:-1].tolist())
        return sequences

    starts = []
    monkeypatch.setattr(VisionEncoderDecoderModel, "generate", watched)
    folder = train("watched", prompt="red green", max_length=2)
    assert given and all(call == ((), {"encoder_outputs", CACHE}, 0) for call in given)  # a cache, empty
    prompt_ids = Captioner.load(folder).tokenizer("red green", add_special_tokens=False).input_ids
    assert all(row[: len(prompt_ids)] == prompt_ids for rows in starts for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["encoder", "encoder's last block", "decoder"])
def test_only_what_shall_learn_moves(train, tmp_path, part):
    """A frozen encoder stays; what of it is not frozen learns at its own rate, here the only one above zero."""
    rates = {"learning_rate": 0, "encoder_learning_rate": 1e-3}
    options = {
        "encoder": {"freeze_encoder": "false", **rates},
        "encoder's last block": {"num_trainable_encoder_blocks": 1, **rates},
        "decoder": {},
    }
    trained = VisionEncoderDecoderModel.from_pretrained(train("trained", **options[part])).state_dict()
    arguments = train_vit_gpt2.ModelArguments(
        pretrained_encoder=False,
        pretrained_decoder=False,
        image_size=32,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        dropout=0.0,
        prompt="",
    )
    data_args = train_vit_gpt2.CaptionDataArguments(tokenizer_name=str(tmp_path / "trained"))
    torch.manual_seed(42)
    first = train_vit_gpt2.build_captioner(arguments, data_args, [], None).model.state_dict()
    moved = {name for name in first if not torch.equal(trained[name], first[name])}
    frozen_names = {"decoder.transformer.h.0.attn.bias"}
    learns = {name for name in first if name.startswith(part.removesuffix("'s last block"))}
    if part.endswith("last block"):  # the one there is, with the normalization behind it
        learns = {name for name in learns if "embeddings" not in name}
    assert moved == learns - frozen_names


@pytest.mark.slow
def test_cached_features_train_as_images_do(train):
    options = {"learning_rate": 1e-2, "num_train_epochs": 12, "eval_epochs": 12, "save_epochs": 12}
    cached, uncached = (train(name, feature_cache=name, **options) for name in ("float16", "none"))
    for name in ("train_loss", "eval_loss"):
        assert history(cached)[-1][name] == pytest.approx(history(uncached)[-1][name], rel=1e-3)


@pytest.mark.slow
def test_activation_checkpointing_computes_blocks_again_and_learns_the_same(train, monkeypatch):
    """With captions packed in a row, dropout, which draws, and an encoder that learns."""
    calls = []
    forward = GPT2MLP.forward

    def counted(self, *args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GPT2MLP, "forward", counted)
    options = {
        "dropout": 0.1,
        "freeze_encoder": "false",
        "train_sampling_strategy": "group_by_image",
        "num_train_epochs": 2,
    }
    folders, learned = [], []
    for asked in ("false", "true"):
        calls.clear()
        folders.append(train(asked, activation_checkpointing=asked, **options))
        learned.append(sum(calls))
    assert learned[1] > learned[0]
    told = [[row["train_loss"] for row in history(folder)] for folder in folders]
    assert told[1] == pytest.approx(told[0], rel=1e-5)
    for name, value in weights(folders[0]).items():
        torch.testing.assert_close(weights(folders[1])[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_compiled_blocks_learn_the_same(train, monkeypatch):
    """As `accelerate launch --dynamo_backend` has them; of several lengths, and never compiled for `generate()`."""
    options = {"num_hidden_layers": 2, "num_train_epochs": 2, "per_device_train_batch_size": 3}
    plain = train("plain", **options)
    monkeypatch.setattr(caption_loss, "chunk_gradients", caption_loss.chunk_gradients)  # as it was, afterwards
    monkeypatch.setattr(caption_loss, "HAS_LINEAR_CROSS_ENTROPY", False)
    monkeypatch.setattr(launch, "follow_launcher", lambda: None)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    frames, start = torch._dynamo.utils.counters["frames"], torch._dynamo.utils.counters["frames"]["ok"]
    compiled = train("compiled", **options)
    assert 3 <= frames["ok"] - start <= 12  # a block, the loss, and both again for any length, in eval too
    assert weights(plain).keys() == weights(compiled).keys()
    for row, expected in zip(history(compiled), history(plain), strict=True):
        assert row["cider"] == expected["cider"]
        for name in ("train_loss", "eval_loss"):
            assert row[name] == pytest.approx(expected[name], rel=1e-5)


@pytest.mark.slow
def test_training_and_validation_measure_the_same_loss(train):
    """The same captions in both splits and nothing trained: training, which skips the prompt, must come to the same."""
    (row,) = history(train("measured", learning_rate=0))
    assert row["train_loss"] == pytest.approx(row["eval_loss"], rel=1e-5)


@pytest.mark.slow
def test_stops_early_and_keeps_the_first_of_equals(train):
    folder = train("stopped", learning_rate=0, num_train_epochs=9, early_stopping_patience=1)
    assert [row["epoch"] for row in history(folder)] == [1, 2]
    assert json.loads((folder / "results.json").read_text())["train"]["epochs"] == 2


@pytest.mark.slow
def test_where_cider_cannot_choose_the_lower_validation_loss_does(train):
    """Of one validation image every CIDEr is 0."""
    options = {"max_eval_samples": 1, "num_train_epochs": 3, "learning_rate": 1e-2}
    folder = train("tied", early_stopping_patience=1, save_epochs=1, **options)
    rows = history(folder)
    assert [row["cider"] for row in rows] == [0, 0, 0]
    assert rows[0]["eval_loss"] > rows[1]["eval_loss"] > rows[2]["eval_loss"]
    last = weights(folder / "checkpoint-3")
    assert all(torch.equal(value, last[name]) for name, value in weights(folder).items())


def test_a_run_tries_its_captioner_before_it_trains_it(train, tmp_path, monkeypatch, capsys):
    """Whether it can be saved and loaded; and what of its encoder the states do not depend on is not trained."""
    frozen = []
    monkeypatch.setattr("training.encoder_training.freeze_unused", frozen.append)

    def refuse(captioner: Captioner, folder: Path) -> None:
        assert frozen == [captioner]
        raise UserError("it does not come back")

    monkeypatch.setattr("training.run.check_round_trip", refuse)
    with pytest.raises(SystemExit) as ended:
        train("refused")
    assert ended.value.code == 2 and "does not come back" in capsys.readouterr().err
    assert not (tmp_path / "refused" / "history.json").exists()


@pytest.mark.slow
def test_pretrained_parts_and_decoders_own_tokenizer(train, dataset, tmp_path):
    """Folders of trained parts, the tokenizer without a pad token as GPT-2's is; captions too long for it are cut."""
    tokenizer = Captioner.load(train("source")).tokenizer
    encoder = encoder_config(32, 16, 32, 1, 2)
    decoder = decoder_config(len(tokenizer), 32, 1, 2)
    decoder.n_positions = 8
    parts = build_vit_gpt2(encoder, decoder, tokenizer)
    parts.encoder.save_pretrained(tmp_path / "encoder")
    vit_image_processor(encoder).save_pretrained(tmp_path / "encoder")
    parts.decoder.save_pretrained(tmp_path / "decoder")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "decoder")
    folder = tmp_path / "pretrained"
    arguments = ["--encoder", tmp_path / "encoder", "--decoder", tmp_path / "decoder", "--dataset_name", dataset]
    arguments += ["--learning_rate", 0, "--prompt", "a", "--num_train_epochs", 1, "--report_to", "none"]
    train_vit_gpt2.main([str(word) for word in [*arguments, "--output_dir", folder]])
    saved = VisionEncoderDecoderModel.from_pretrained(folder).state_dict()
    for name, value in parts.state_dict().items():
        assert torch.equal(saved[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ours", "nlpconnect", "distilvit"])
def test_a_whole_captioner_is_fine_tuned_with_its_prompt_and_processor(dataset, train, tmp_path, monkeypatch, kind):
    """Ours; one of the time before processors, without a padding token; distilgpt2's shape, whose one token starts, ends and pads."""
    start = tmp_path / "start"
    captioner = small_captioner("vit_gpt2", prompt="a red" if kind == "ours" else "", num_layers=1)
    captioner.save(start)
    if kind != "ours":
        (start / "processor_config.json").unlink()
        captioner.image_processor.save_pretrained(start)
        if kind == "distilvit":
            captioner.tokenizer.bos_token = captioner.tokenizer.pad_token = captioner.tokenizer.eos_token
            captioner.model.generation_config.update(decoder_start_token_id=2, bos_token_id=2, pad_token_id=2)
            captioner.model.generation_config.save_pretrained(start)
        else:
            captioner.tokenizer.pad_token = None
        captioner.tokenizer.save_pretrained(start)
    common = ["--dataset_name", str(dataset), "--num_train_epochs", "1", "--report_to", "none", "--output_dir"]
    train_vit_gpt2.main(["--model_name_or_path", str(start), *common, str(tmp_path / "tuned")])
    before, after = Captioner.load(start), Captioner.load(tmp_path / "tuned")
    assert after.start_token_ids == before.start_token_ids
    assert after.image_processor.size == before.image_processor.size
    changed = {
        name.split(".")[0]
        for name, value in before.model.state_dict().items()
        if not torch.equal(value, after.model.state_dict()[name])
    }
    assert changed == {"decoder"}
    with pytest.raises(SystemExit):
        train_vit_gpt2.main(
            ["--model_name_or_path", str(start), "--prompt", "other", *common, str(tmp_path / "refused")]
        )
