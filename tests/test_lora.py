"""Laws of `--lora_rank`: only what shall be trained is, what is saved is a plain model, and merging is undone bit for bit.

tests/test_training.py resumes and evaluates such runs.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from small_captioners import word_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, VisionEncoderDecoderModel

import train_vit_gpt2
from modeling.captioner import Captioner
from modeling.vit_gpt2 import build_vit_gpt2, encoder_config
from system.errors import UserError
from training import lora
from training.lora import add_lora, check_lora, merged

pytest.importorskip("peft", reason="needs peft (pip install 'peft>=0.18')")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A folder with a decoder without cross attention, and its tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("parts") / "decoder", word_tokenizer()
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fresh", [True, False])
def test_merged_computes_the_same_and_is_undone_bit_for_bit(decoder, fresh):
    model = build_vit_gpt2(encoder_config(32, 16, 32, 1, 2), str(decoder), word_tokenizer(), dropout=0.0).eval()
    plain = model.state_dict().keys()
    add_lora(model.decoder, 2, fresh_cross_attention=fresh)
    for name, value in model.decoder.named_parameters():
        assert value.requires_grad == ("lora_" in name or (fresh and "cross" in name)), name
        assert not (fresh and "cross" in name and "lora_" in name), name
    with torch.no_grad():
        for value in model.decoder.parameters():
            if value.requires_grad:
                value.normal_(std=0.3)
    inputs = {"pixel_values": torch.ones(1, 3, 32, 32), "decoder_input_ids": torch.tensor([[1, 5, 6]])}
    adapted = {name: value.clone() for name, value in model.state_dict().items()}
    logits = model(**inputs).logits
    with merged(model):
        assert model.state_dict().keys() == plain
        torch.testing.assert_close(model(**inputs).logits, logits, rtol=1e-4, atol=1e-4)
    assert model.state_dict().keys() == adapted.keys() and any("lora_A" in name for name in adapted)
    assert all(torch.equal(value, adapted[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(**inputs).logits, logits)


@pytest.fixture(scope="module")
def train(colors, decoder, tmp_path_factory):
    def run(**options):
        folder = tmp_path_factory.mktemp("runs") / "run"
        given = {"pretrained_encoder": "false", "image_size": 32, "hidden_size": 32, "num_hidden_layers": 1}
        given |= {"num_attention_heads": 2, "prompt": "", "dropout": 0.1, "report_to": "none", "max_steps": 3}
        given |= {"dataset_name": colors, "decoder": decoder, "output_dir": folder, "lora_rank": 2}
        given |= {"learning_rate": 1e-2, "load_best_model_at_end": "false"} | options
        train_vit_gpt2.main([str(word) for option, value in given.items() for word in (f"--{option}", value)])
        return folder

    return run


@pytest.mark.slow
def test_a_run_leaves_a_plain_model_of_which_a_few_matrices_have_moved(train, decoder, capsys):
    folder = train()
    assert type(Captioner.load(folder).model) is VisionEncoderDecoderModel
    source, trained = load_file(decoder / "model.safetensors"), load_file(folder / "model.safetensors")
    moved = {name for name in source if not torch.equal(source[name], trained[f"decoder.{name}"])}
    assert moved and all(name.endswith("weight") and "wte" not in name and "ln_" not in name for name in moved)
    assert json.loads((folder / "results.json").read_text())["num_images"] == 5

    continued = load_file(train(decoder=folder) / "model.safetensors")  # whose cross attention is not fresh
    moved = {name for name in continued if not torch.equal(continued[name], trained[name])}
    assert any("crossattention" in name for name in moved)
    assert all(name.endswith("weight") for name in moved if name.startswith("decoder.")), moved

    checkpoint = folder / "checkpoint-3"
    for other in ({"lora_rank": 1}, {"lora_rank": 3}, {"decoder": folder}):
        with pytest.raises(SystemExit) as stopped:
            train(resume_from_checkpoint=checkpoint, max_steps=4, **other)
        assert stopped.value.code == 2 and str(checkpoint) in capsys.readouterr().err, other


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(UserError, match="--pretrained_decoder"):
        check_lora(4, False)
    with pytest.raises(UserError, match="--ema_decay"):
        check_lora(4, True, ema_decay=0.9)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="--lora_rank"):
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        check_lora(4, True)
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install 'peft"):
        check_lora(4, True)
