"""Laws of what is trained of an encoder, and of what can be trained at all."""

import pytest
import torch
from small_captioners import build, word_tokenizer
from transformers import CLIPVisionConfig, SiglipVisionConfig, ViTImageProcessor

from modeling import InceptionLSTMConfig, InceptionLSTMForConditionalGeneration
from modeling.captioner import Captioner
from modeling.processing import build_processor, timm_image_processor
from modeling.round_trip import check_round_trip
from modeling.vit_gpt2 import build_vit_gpt2, decoder_config
from system.errors import UserError
from training.encoder_training import freeze_unused

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def lstm_captioner(encoder: str, attention: bool = False) -> Captioner:
    tokenizer = word_tokenizer()
    sizes = {"image_embed_dim": 32, "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": len(tokenizer)}
    config = InceptionLSTMConfig(encoder_name=encoder, attention=attention, freeze_encoder=False, **sizes)
    model = InceptionLSTMForConditionalGeneration(config)
    return Captioner(model, build_processor(timm_image_processor(model.encoder.backbone), tokenizer))


def vit_captioner(encoder) -> Captioner:
    tokenizer = word_tokenizer()
    model = build_vit_gpt2(encoder, decoder_config(len(tokenizer), **SIZES), tokenizer, freeze_encoder=False)
    images = ViTImageProcessor(size={"height": 32, "width": 32})
    return Captioner(model, build_processor(images, tokenizer))


TWO_TOWERS = {**SIZES, "image_size": 32, "patch_size": 16, "intermediate_size": 64}
ENCODERS = {
    "CLIP": (lambda: vit_captioner(CLIPVisionConfig(**TWO_TOWERS)), "post_layernorm"),
    "SigLIP": (lambda: vit_captioner(SiglipVisionConfig(**TWO_TOWERS)), "head."),
    "timm pooled": (lambda: lstm_captioner("test_vit"), None),
    "timm grid": (lambda: lstm_captioner("test_vit4", attention=True), None),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_what_the_states_do_not_depend_on_is_frozen(name):
    build_captioner, unused = ENCODERS[name]
    captioner = build_captioner()
    encoder = captioner.model.train().encoder
    names = freeze_unused(captioner)
    assert encoder.training
    assert bool(names) == bool(unused) and all(unused in name for name in names)
    pixels = captioner.image_processor(images=torch.zeros(3, 40, 40, dtype=torch.uint8), return_tensors="pt")
    encoder(**pixels).last_hidden_state.square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert (name in names) == (not parameter.requires_grad) == (parameter.grad is None), name


def test_of_a_frozen_encoder_nothing_is_left_to_freeze():
    captioner = build("lstm")
    assert freeze_unused(captioner) == []


@pytest.mark.parametrize("kind", ["lstm", "vit_gpt2"])
def test_a_captioner_that_comes_back_passes_and_stays_as_it_is(tmp_path, kind):
    captioner = build(kind)
    before = {name: value.clone() for name, value in captioner.model.train().state_dict().items()}
    check_round_trip(captioner, tmp_path)
    assert captioner.model.training and not list(tmp_path.iterdir())
    assert all(torch.equal(value, before[name]) for name, value in captioner.model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["convit_tiny", "coat_tiny"])
def test_a_captioner_that_cannot_come_back_is_refused(tmp_path, encoder):
    """ConViT's buffer of positions grows in forward; CoaT's layers share tensors."""
    with pytest.raises(UserError, match="saved and loaded") as refused:
        check_round_trip(lstm_captioner(encoder), tmp_path)
    assert len(str(refused.value)) < 500 and str(tmp_path) not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_captioner_that_predicts_something_else_when_loaded_is_refused(tmp_path):
    captioner = build("lstm")
    captioner.model.lm_head.register_forward_hook(lambda module, args, logits: logits + 1)  # which is not saved
    with pytest.raises(UserError, match="predicts something else"):
        check_round_trip(captioner, tmp_path)
