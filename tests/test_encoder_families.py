"""Laws of the encoders that a ViT-GPT2 may have: each family trains, saves, loads and captions, and what it does not read is frozen."""

import json
import re

import pytest
import timm
import torch
from fresh import run_fresh
from small_captioners import word_tokenizer
from timm.models import save_for_hf
from transformers import (
    Aimv2VisionConfig,
    AutoModel,
    BeitConfig,
    CLIPVisionConfig,
    ConvNextConfig,
    DeiTConfig,
    Dinov2Config,
    DINOv3ViTConfig,
    HieraConfig,
    ResNetConfig,
    SamVisionConfig,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    SwinConfig,
    ViTConfig,
    ViTImageProcessor,
)

from modeling.caption_loss import teacher_forcing_loss
from modeling.captioner import Captioner
from modeling.processing import build_processor
from modeling.vit_gpt2 import build_vit_gpt2, check_parts, decoder_config, freeze, load_encoder
from system.errors import UserError
from training.encoder_training import freeze_unused, unfreeze_last_blocks

SIDE = 32
OF_TIMM = {"img_size": SIDE, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 4}
OURS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
OURS |= {"image_size": SIDE, "patch_size": 16}
STAGES = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
SWIN = {**STAGES, "image_size": SIDE, "patch_size": 2, "window_size": 4}
HIERA = {**STAGES, "image_size": [SIDE, SIDE], "patch_stride": [2, 2], "num_query_pool": 1, "masked_unit_size": [2, 2]}
# Family: timm's name and sizes, or transformers' config; the last block's parameters; those that the states do not depend on.
FAMILIES = {
    "timm DINOv3": (("vit_small_patch16_dinov3", OF_TIMM), r"blocks\.1\.", None),
    "timm DINOv2": (("vit_small_patch14_reg4_dinov2", OF_TIMM), r"blocks\.1\.", None),
    "timm SigLIP": (("vit_base_patch16_siglip_224", OF_TIMM), r"blocks\.1\.", r"attn_pool\."),
    "timm EVA": (("eva02_tiny_patch14_224", OF_TIMM), r"blocks\.1\.", r"fc_norm\."),
    "timm PE": (("vit_pe_core_tiny_patch16_384", OF_TIMM), r"blocks\.1\.", r"attn_pool\."),
    "timm ConvNeXt": (("test_convnext", {}), r"stages_3\.", None),
    "timm EfficientNet": (("test_efficientnet", {}), r"blocks\.4\.", None),
    "ViT": (ViTConfig(**OURS), r"layers?\.1\.", None),
    "DeiT": (DeiTConfig(**OURS), r"layers?\.1\.", None),
    "BEiT": (BeitConfig(**OURS), r"layers?\.1\.", None),
    "DINOv2": (Dinov2Config(**OURS), r"layer\.1\.", r"mask_token"),
    "DINOv3": (DINOv3ViTConfig(**OURS), r"layer\.1\.", r"mask_token"),
    "SigLIP": (SiglipVisionConfig(**OURS), r"layers\.1\.", r"head\."),
    "CLIP": (CLIPVisionConfig(**OURS), r"layers\.1\.", r"post_layernorm\."),
    "Swin": (SwinConfig(**SWIN), r"layers\.1\.", None),
    "Hiera": (HieraConfig(**HIERA), r"stages\.1\.", r"pooler\."),
}
UNFIT = {
    "ConvNeXt": ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
    "ResNet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
    "SigLIP 2 for images of any size": Siglip2VisionConfig(**OURS, num_patches=4),
    "AIMv2": Aimv2VisionConfig(**OURS),
    "SAM": SamVisionConfig(**OURS, output_channels=32, global_attn_indexes=[1], window_size=2),
}
FRESH_PROCESS = """
import json, sys
import torch
from transformers import AutoModelForImageTextToText
for folder in sys.argv[1:]:
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    side = model.config.encoder.image_size
    side = side if isinstance(side, int) else side[0]
    pixels = torch.linspace(-1, 1, 3 * side * side).sin().reshape(1, 3, side, side)
    print(json.dumps(model.generate(pixel_values=pixels, max_length=8, num_beams=2).tolist()))
"""


def save_family(name: str, folder) -> str:
    """A folder of random weights, as timm or transformers saves it."""
    torch.manual_seed(0)
    source = FAMILIES[name][0] if name in FAMILIES else UNFIT[name]
    if isinstance(source, tuple):
        save_for_hf(timm.create_model(source[0], **source[1]), str(folder), model_args=source[1] or None)
    else:
        AutoModel.from_config(source).save_pretrained(folder)
        ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return str(folder)


def captioner_of(name: str, folder) -> Captioner:
    """A captioner whose encoder is all trained."""
    source = save_family(name, folder)
    check_parts(encoder=source)
    encoder, image_processor = load_encoder(source, image_size=64 if "Ne" in name else SIDE)
    tokenizer = word_tokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    decoder = decoder_config(len(tokenizer), **sizes)
    model = build_vit_gpt2(encoder, decoder, tokenizer, freeze_encoder=False, dropout=0.0)
    model.generation_config.update(max_length=8)
    return Captioner(model, build_processor(image_processor, tokenizer))


def pixels_of(captioner: Captioner) -> torch.Tensor:
    side = captioner.image_processor.size["height"]
    return torch.linspace(-1, 1, 3 * side * side).sin().reshape(1, 3, side, side)


def loss_of(captioner: Captioner) -> torch.Tensor:
    ids = torch.tensor([[1, 5, 9, 13]])
    batch = {"pixel_values": pixels_of(captioner), "decoder_input_ids": ids, "labels": ids}
    return teacher_forcing_loss(captioner.model, captioner.model, batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_trained_whole_or_in_its_last_block_and_is_the_same_when_loaded(tmp_path, name):
    _, last, unread = FAMILIES[name]
    captioner = captioner_of(name, tmp_path / "encoder")
    model, encoder = captioner.model, captioner.encoder
    named = dict(encoder.named_parameters())
    frozen = freeze_unused(captioner)
    assert bool(frozen) == bool(unread) and all(re.search(unread, one) for one in frozen)
    loss_of(captioner).backward()
    assert all((one.grad is not None) == one.requires_grad for one in model.parameters())

    freeze(encoder)
    model.zero_grad()
    with pytest.raises(UserError, match="--num_trainable_encoder_blocks 99"):
        unfreeze_last_blocks(captioner, 99)
    unfreeze_last_blocks(captioner, 1)
    freeze_unused(captioner)
    trained = {one for one in named if named[one].requires_grad}
    block = {one for one in named if re.search(last, one)}
    assert block and block <= trained and not trained & {*frozen}
    assert not any(re.search(r"patch_embed|layers?\.0\.|(blocks|stages)[._]0\.|stem", one) for one in trained - block)
    loss_of(captioner).backward()
    assert {one for one in named if named[one].grad is not None} == trained

    torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1).step()
    captioner.save(tmp_path / "saved")
    model.eval()
    loaded, pixels = Captioner.load(tmp_path / "saved"), pixels_of(captioner)
    with torch.no_grad():
        expected, states = (one.encoder(pixels).last_hidden_state for one in (captioner, loaded))
    torch.testing.assert_close(states, expected)
    made = [one.generate({"pixel_values": pixels}, num_beams=2)[0]["caption"] for one in (captioner, loaded)]
    assert made[0] == made[1]


@pytest.mark.parametrize("name", UNFIT)
def test_an_encoder_that_gives_no_sequence_of_states_is_refused(tmp_path, name):
    source = save_family(name, tmp_path / "encoder")
    with pytest.raises(UserError, match="ViT kind"):
        check_parts(encoder=source)
        load_encoder(source)


@pytest.mark.slow
def test_families_load_in_a_fresh_process_without_remote_code(tmp_path):
    folders, expected = [], []
    for name in ("timm DINOv3", "timm SigLIP", "timm EVA", "timm PE", "timm ConvNeXt", "SigLIP", "Swin"):
        captioner = captioner_of(name, tmp_path / f"{name} encoder")
        folders.append(tmp_path / name)
        captioner.save(folders[-1])
        captioner.model.eval()
        made = captioner.model.generate(pixel_values=pixels_of(captioner), max_length=8, num_beams=2)
        expected.append(made.tolist())
    made = run_fresh(FRESH_PROCESS, *folders, folder=tmp_path / "elsewhere")
    assert [json.loads(line) for line in made.splitlines() if line.startswith("[[")] == expected
