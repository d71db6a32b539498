"""Laws of `--lora_rank`: only what shall learn does, what is saved is a plain model, a resumed run ends on the same weights."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_train_vit_gpt2 import SMALL, dataset  # noqa: F401
from transformers import GPT2Config, GPT2LMHeadModel, VisionEncoderDecoderModel

import train_vit_gpt2
from data_scripts.train_tokenizer import train_tokenizer
from modeling.captioner import load_captioner
from modeling.vit_gpt2 import build_vit_gpt2, encoder_config
from training import lora
from training.lora import add_lora, merged

pytest.importorskip("peft", reason="needs peft (pip install 'peft>=0.18')")


@pytest.fixture
def decoder(tmp_path):
    """A folder with a trained decoder, without cross attention, and its tokenizer."""
    tokenizer = train_tokenizer(["all is red green blue white", "an image from one side to the other"], 60)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "decoder")
    tokenizer.save_pretrained(tmp_path / "decoder")
    return tmp_path / "decoder", tokenizer


@pytest.mark.parametrize("fresh", [True, False])
def test_merged_says_the_same_and_only_adapters_and_fresh_cross_attention_learn(decoder, fresh):
    folder, tokenizer = decoder
    model = build_vit_gpt2(encoder_config(32, 16, 32, 1, 2), str(folder), tokenizer, dropout=0.0)
    before = model.state_dict().keys()
    add_lora(model.decoder, 2, fresh_cross_attention=fresh)
    for name, value in model.decoder.named_parameters():
        assert value.requires_grad == ("lora_" in name or (fresh and "cross" in name)), name
        assert not (fresh and "cross" in name and "lora_" in name), name
    with torch.no_grad():
        for value in model.decoder.parameters():
            if value.requires_grad:
                value.normal_(std=0.3)
    plain, inputs = (
        merged(model),
        {"pixel_values": torch.ones(1, 3, 32, 32), "decoder_input_ids": torch.tensor([[1, 5, 6]])},
    )
    assert plain.state_dict().keys() == before
    torch.testing.assert_close(plain(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert [name for name, _ in model.named_parameters() if "lora_A" in name]  # is still what it was


def test_a_run_resumes_exactly_and_leaves_a_plain_model(dataset, decoder, tmp_path, capsys):  # noqa: F811
    def train(name: str, **options):
        given = SMALL | {"dataset_name": dataset, "decoder": decoder[0], "output_dir": tmp_path / name, "dropout": 0.1}
        given |= {"pretrained_decoder": "true", "lora_rank": 2, "num_train_epochs": 3, "learning_rate": 1e-2} | options
        train_vit_gpt2.main([word for option, value in given.items() for word in (f"--{option}", str(value))])
        return load_file(tmp_path / name / "model.safetensors")

    undisturbed = train("undisturbed", load_best_model_at_end="false")
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "undisturbed" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = train("resumed", load_best_model_at_end="false", resume_from_checkpoint="last")
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in undisturbed)
    assert type(load_captioner(str(tmp_path / "undisturbed"))[0]) is VisionEncoderDecoderModel
    source = load_file(decoder[0] / "model.safetensors")
    moved = {name for name in source if not torch.equal(source[name], undisturbed[f"decoder.{name}"])}
    assert moved and all(name.endswith("weight") and "wte" not in name and "ln_" not in name for name in moved)
    continued = train("continued", decoder=tmp_path / "undisturbed")  # whose cross attention is not fresh
    moved = {name for name in continued if not torch.equal(continued[name], undisturbed[name])}
    assert any("crossattention" in name for name in moved)
    assert all(name.endswith("weight") for name in moved if name.startswith("decoder.")), moved
    with pytest.raises(SystemExit):
        train("undisturbed", resume_from_checkpoint="last", lora_rank=3)
    assert "checkpoint-" in capsys.readouterr().err


def test_what_cannot_be_is_one_sentence(monkeypatch):
    with pytest.raises(ValueError, match="1 or more"):
        lora.check_lora(0, True)
    with pytest.raises(ValueError, match="--pretrained_decoder"):
        lora.check_lora(4, False)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="FSDP"):
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        lora.check_lora(4, True)
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install 'peft"):
        lora.check_lora(4, True)
