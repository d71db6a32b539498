"""Laws of the LSTM captioner's model."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate import disk_offload
from fresh import run_fresh
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutput

from modeling import InceptionLSTMConfig, InceptionLSTMForConditionalGeneration
from modeling.captioner import Captioner
from modeling.inception_lstm import build_inception_lstm
from modeling.modeling_inception_lstm import TimmEncoder, run_lstm
from modeling.processing import build_processor, timm_image_processor
from training.encoder_training import unfreeze_last_blocks

ENCODER = "test_efficientnet"  # timm's own test model: BatchNorm, 256 numbers an image
ROOT = Path(__file__).parent.parent
WITH_AND_WITHOUT_ATTENTION = pytest.mark.parametrize("attention", [False, True], ids=["plain", "attention"])


def make_model(**changes) -> InceptionLSTMForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {
        "encoder_name": ENCODER,
        "vocab_size": 40,
        "image_embed_dim": 48,
        "hidden_size": 48,
        "num_hidden_layers": 2,
    }
    return InceptionLSTMForConditionalGeneration(InceptionLSTMConfig(**{**sizes, **changes}))


def random_batch(num_images: int = 4, length: int = 7, vocab_size: int = 40) -> dict:
    torch.manual_seed(1)
    return {
        "pixel_values": torch.randn(num_images, 3, 64, 64),
        "labels": torch.randint(3, vocab_size, (num_images, length)),
    }


@pytest.fixture
def processor():
    """A word-level tokenizer of a few words, EOS at the end, and a 64-pixel image processor."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "red": 4, "green": 5, "blue": 6, "a": 7, "image": 8}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    image_processor = timm_image_processor(timm.create_model(ENCODER), image_size=64)
    return build_processor(image_processor, PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special))


def test_first_loss_is_that_of_guessing():
    model = make_model(vocab_size=5000, image_embed_dim=256, hidden_size=256)
    loss = model(**random_batch(vocab_size=5000, length=20)).loss.item()
    assert loss == pytest.approx(math.log(5000), rel=0.02)


def test_shapes_and_sizes_are_the_reports():
    with torch.device("meta"):
        model = InceptionLSTMForConditionalGeneration(InceptionLSTMConfig())
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert tuple(model.image_projection.weight.shape) == (1024, 1536)
    assert tuple(model.token_embedding.weight.shape) == (8000, 1024)
    assert tuple(model.lm_head.weight.shape) == (8000, 1024)
    assert (model.lstm.num_layers, model.lstm.input_size, model.lstm.hidden_size) == (3, 1024, 1024)
    assert sizes["lstm"] == 3 * 4 * 1024 * (1024 + 1024 + 2)  # four gates; weights of input and state, two biases
    assert sizes["encoder"] == 54_306_464  # Inception-ResNet-v2 without its classifier, as the stack counts it
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == sum(sizes.values()) - sizes["encoder"]


@pytest.mark.slow
def test_three_images_are_memorised_and_come_back(processor):
    model = make_model(vocab_size=9, freeze_encoder=False)
    captions = ["a red image", "green", "image a blue image"]
    images = [Image.new("RGB", (64, 64), color) for color in ("red", "green", "blue")]
    pixel_values = processor(images=images, return_tensors="pt").pixel_values
    tokens = processor.tokenizer(captions, padding=True, return_tensors="pt")
    labels = tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        model.train()
        model(pixel_values=pixel_values, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    generated = Captioner(model.eval(), processor).generate({"pixel_values": pixel_values}, max_length=12)
    assert generated == [{"caption": caption, "ended": True} for caption in captions]


@WITH_AND_WITHOUT_ATTENTION
@pytest.mark.parametrize(
    "decoding",
    [{}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}],
    ids=["greedy", "beam", "sampling"],
)
def test_decoding_with_state_equals_decoding_without(decoding, attention):
    model = make_model(attention=attention).eval()
    pixel_values = random_batch()["pixel_values"]
    sequences = []
    for use_cache in (True, False):
        torch.manual_seed(2)
        sequences.append(model.generate(pixel_values=pixel_values, max_length=15, use_cache=use_cache, **decoding))
    assert sequences[0].shape[1] > 5
    assert torch.equal(*sequences)


@pytest.mark.parametrize("num_layers", [1, 3])
@torch.no_grad()
def test_one_token_of_one_caption_is_what_torchs_lstm_computes(num_layers):
    lstm = torch.nn.LSTM(5, 7, num_layers, batch_first=True).eval()
    inputs, state = torch.randn(1, 1, 5), (torch.randn(num_layers, 1, 7), torch.randn(num_layers, 1, 7))
    found, wanted = run_lstm(lstm, inputs, state), lstm(inputs, state)
    for value, other in zip((found[0], *found[1]), (wanted[0], *wanted[1]), strict=True):
        torch.testing.assert_close(value, other)


@pytest.mark.parametrize("way", ["quantized", "offloaded"])
def test_a_caption_of_one_image_comes_from_a_quantized_and_from_an_offloaded_model(way, tmp_path):
    model, pixel_values = make_model().eval(), random_batch()["pixel_values"][:1]
    wanted = model.generate(pixel_values=pixel_values, max_length=9)
    if way == "offloaded":
        found = disk_offload(model, str(tmp_path), execution_device="cpu")
        assert torch.equal(found.generate(pixel_values=pixel_values, max_length=9), wanted)
    else:
        quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.LSTM}, dtype=torch.qint8)
        assert quantized.generate(pixel_values=pixel_values, max_length=9).shape == wanted.shape


def test_greedy_is_the_likeliest_next_token_of_the_whole_prefix():
    model = make_model().eval()
    pixel_values = random_batch()["pixel_values"]
    tokens = torch.full((4, 1), model.config.decoder_start_token_id)
    for _ in range(8):
        logits = model(pixel_values=pixel_values, decoder_input_ids=tokens).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    generated = model.generate(pixel_values=pixel_values, max_length=9, eos_token_id=None)
    assert torch.equal(generated, tokens)


def test_the_start_token_is_not_read_and_the_image_is():
    model = make_model().eval()
    batch = random_batch()
    tokens = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    logits = model(pixel_values=batch["pixel_values"], decoder_input_ids=tokens).logits
    other_start = torch.cat([tokens[:, :1] + 5, tokens[:, 1:]], dim=1)
    assert torch.equal(model(pixel_values=batch["pixel_values"], decoder_input_ids=other_start).logits, logits)
    other_image = model(pixel_values=batch["pixel_values"].flip(0), decoder_input_ids=tokens).logits
    assert not torch.allclose(other_image, logits)


@WITH_AND_WITHOUT_ATTENTION
def test_no_token_sees_what_comes_after_it(attention):
    model = make_model(attention=attention).eval()
    batch = random_batch()
    tokens = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    changed = torch.cat([tokens[:, :4], tokens[:, 4:].flip(1) + 1], dim=1)
    before = model(pixel_values=batch["pixel_values"], decoder_input_ids=tokens).logits
    after = model(pixel_values=batch["pixel_values"], decoder_input_ids=changed).logits
    torch.testing.assert_close(before[:, :4], after[:, :4])


@WITH_AND_WITHOUT_ATTENTION
def test_padding_changes_no_captions_loss(attention):
    model = make_model(attention=attention).eval()
    batch = random_batch()
    batch["labels"][0, 4:] = batch["labels"][1, 2:] = -100
    alone = [
        model(pixel_values=batch["pixel_values"][i : i + 1], labels=row[row != -100][None], num_items_in_batch=1).loss
        for i, row in enumerate(batch["labels"])
    ]
    together = model(**batch, num_items_in_batch=1).loss
    torch.testing.assert_close(together, sum(alone))
    torch.testing.assert_close(model(**batch).loss, sum(alone) / (batch["labels"] != -100).sum())


@WITH_AND_WITHOUT_ATTENTION
def test_encoder_outputs_give_the_loss_and_captions_of_the_pixels(attention):
    model = make_model(attention=attention).eval()
    batch = random_batch()
    states = model.encoder(batch["pixel_values"]).last_hidden_state
    from_states = model(encoder_outputs=BaseModelOutput(states), labels=batch["labels"]).loss
    torch.testing.assert_close(from_states, model(**batch).loss)
    from_half = model(encoder_outputs=BaseModelOutput(states.half().float()), labels=batch["labels"]).loss
    assert from_half.item() == pytest.approx(model(**batch).loss.item(), rel=1e-3)
    beams = {"max_length": 12, "num_beams": 2}
    assert torch.equal(
        model.generate(encoder_outputs=BaseModelOutput(states), **beams),
        model.generate(pixel_values=batch["pixel_values"], **beams),
    )


@WITH_AND_WITHOUT_ATTENTION
def test_captions_that_share_a_image_lose_what_they_lose_alone(attention):
    model = make_model(attention=attention).eval()
    batch = random_batch()
    shared = {"pixel_values": batch["pixel_values"][:2], "image_index": torch.tensor([1, 0, 0, 1])}
    repeated = batch["pixel_values"][shared["image_index"]]
    words = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    expected = model(pixel_values=repeated, decoder_input_ids=words).logits
    torch.testing.assert_close(model(**shared, decoder_input_ids=words).logits, expected)
    expected = model(pixel_values=repeated, labels=batch["labels"]).loss
    torch.testing.assert_close(model(**shared, labels=batch["labels"]).loss, expected)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["test_efficientnet", "test_vit", "swin_tiny_patch4_window7_224"])
def test_any_timm_encoder_gives_a_grid_whose_places_it_keeps(architecture):
    """Convolutions give sizes first, Swin gives them last, a ViT gives tokens."""
    encoder = TimmEncoder(architecture, grid=True).eval()
    side = encoder.backbone.pretrained_cfg["input_size"][-1]
    pixels = torch.randn(1, 3, side, side)
    with torch.no_grad():
        states = encoder(pixels).last_hidden_state
        features = encoder.backbone.forward_features(pixels)
    assert states.shape[0] == 1 and states.shape[2] == encoder.output_size and states.shape[1] > 1
    place = (
        features[0, :, 1, 0]
        if architecture == "test_efficientnet"
        else features.reshape(1, -1, encoder.output_size)[0, 3]
    )
    row = features.shape[-1] if architecture == "test_efficientnet" else 3
    torch.testing.assert_close(states[0, row], place)


def test_attention_dropout_hides_keys_and_values_in_training_alone():
    """Of a share of them nothing is left, and the others are the larger for it; captions of one image miss the same."""
    model = make_model(attention=True, attention_dropout=0.25).train()
    torch.manual_seed(0)
    states = torch.randn(2, 60, model.encoder.output_size)
    whole = model.attention.key(states), model.attention.value(states)
    dropped = model.attention.project_keys_values(states, torch.tensor([0, 1, 1]))
    for numbers, left in zip(whole, dropped, strict=True):
        assert torch.equal(left[1], left[2])
        gone = left[:2] == 0
        assert gone.float().mean().item() == pytest.approx(0.25, abs=0.02)
        torch.testing.assert_close(left[:2][~gone], (numbers / 0.75)[~gone])
    assert not torch.equal(dropped[0][:2] == 0, dropped[1][:2] == 0)
    for numbers, left in zip(whole, model.eval().attention.project_keys_values(states), strict=True):
        assert torch.equal(numbers, left)


def test_without_attention_there_is_nothing_of_it():
    plain, attentive = make_model(), make_model(attention=True)
    extra = attentive.state_dict().keys() - plain.state_dict().keys()
    assert extra and all(name.startswith("attention.") for name in extra)
    assert attentive.state_dict().keys() - extra == plain.state_dict().keys()


def test_without_attention_it_is_the_reports_model_bit_for_bit():
    """Written out: the projected image and the words behind it, read by the LSTM, scored by one linear layer."""
    model, batch = make_model().eval(), random_batch()
    words = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    with torch.no_grad():
        image = model.image_projection(model.encoder(batch["pixel_values"]).last_hidden_state)  # (batch, 1, embedding)
        outputs, _ = model.lstm(torch.cat([image, model.token_embedding(words[:, 1:])], dim=1))
        assert torch.equal(model(batch["pixel_values"], words).logits, model.lm_head(outputs))


@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "trained"])
def test_what_is_frozen_stays_and_the_rest_moves(freeze):
    model = make_model(freeze_encoder=freeze)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    model(**random_batch()).loss.backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    in_encoder = {name for name in before if name.startswith("encoder.")}
    assert before.keys() - in_encoder <= moved
    if freeze:
        assert not moved & in_encoder
    else:
        assert any(name.endswith("running_mean") for name in moved)
        assert any(name.endswith("conv_stem.weight") for name in moved)


def test_the_encoder_convolves_with_channels_side_by_side():
    """In which convolutions are faster; its output is that of any order, and its own of torch's usual one."""
    encoder, pixels = TimmEncoder(ENCODER, grid=True).eval(), random_batch()["pixel_values"]
    seen = []
    for module in encoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        states = encoder(pixels).last_hidden_state
        plain = encoder.backbone(pixels).flatten(2).transpose(1, 2)
    last = torch.channels_last
    assert [x.is_contiguous(memory_format=last) for x in seen[: len(seen) // 2]] == [True] * (len(seen) // 2)
    assert not seen[len(seen) // 2].is_contiguous(memory_format=last)
    torch.testing.assert_close(states, plain)


def test_of_a_frozen_encoder_the_last_blocks_may_learn_but_no_statistics():
    def captioner(**changes) -> Captioner:
        model = make_model(freeze_encoder=True, **changes)
        return Captioner(model, SimpleNamespace(image_processor=timm_image_processor(model.encoder.backbone)))

    frozen = captioner()
    model = frozen.model
    with pytest.raises(ValueError, match="--num_trainable_encoder_blocks 7: give 6 at most"):
        unfreeze_last_blocks(frozen, 7)
    unfreeze_last_blocks(frozen, 2)
    before = {name: value.clone() for name, value in model.encoder.backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    model(**random_batch()).loss.backward()
    optimizer.step()
    state = model.encoder.backbone.state_dict()
    moved = {name for name, value in state.items() if not torch.equal(value, before[name])}
    last = ("blocks.3.", "blocks.4.", "conv_head.", "bn2.")  # the fourth and fifth stage of five, and what is behind
    learns = {name for name, _ in model.encoder.backbone.named_parameters() if name.startswith(last)}
    assert moved == learns and any(name.startswith("conv_head") for name in moved)
    with pytest.raises(ValueError, match="wants --freeze_encoder true"):
        unfreeze_last_blocks(frozen, 1)
    with pytest.raises(ValueError, match="can only be trained as a whole"):
        unfreeze_last_blocks(captioner(encoder_name="levit_128s"), 1)


def test_a_pretrained_encoder_survives_construction_saving_and_loading(tmp_path):
    torch.manual_seed(3)
    trained = timm.create_model(ENCODER, num_classes=10).train()
    trained(torch.randn(8, 3, 64, 64))  # BatchNorm statistics that no initialization makes
    folder = tmp_path / "timm"
    folder.mkdir()
    save_file(trained.state_dict(), folder / "model.safetensors")
    config = {"architecture": ENCODER, "num_classes": 10, "pretrained_cfg": {"classifier": "classifier"}}
    (folder / "config.json").write_text(json.dumps(config))

    model = make_model()
    model.load_pretrained_encoder(str(folder))
    model.save_pretrained(tmp_path / "saved")
    loaded = InceptionLSTMForConditionalGeneration.from_pretrained(tmp_path / "saved")
    kept = loaded.encoder.backbone.state_dict()
    assert kept.keys() == {name for name in trained.state_dict() if not name.startswith("classifier.")}
    for name, value in kept.items():
        assert torch.equal(value, trained.state_dict()[name]), name


def test_the_arguments_of_a_timm_folder_are_kept(processor, tmp_path):
    """A folder may give its architecture another activation, say; with its own, the weights load and the features are wrong."""
    torch.manual_seed(0)
    trained = timm.create_model(ENCODER, num_classes=10, act_layer="gelu").eval()
    folder = tmp_path / "timm"
    folder.mkdir()
    save_file(trained.state_dict(), folder / "model.safetensors")
    pretrained_cfg = {"classifier": "classifier", "input_size": [3, 64, 64]}
    config = {"architecture": ENCODER, "num_classes": 10, "model_args": {"act_layer": "gelu"}}
    (folder / "config.json").write_text(json.dumps(config | {"pretrained_cfg": pretrained_cfg}))

    with pytest.raises(ValueError, match="has model_args"):
        make_model().load_pretrained_encoder(str(folder))
    captioner = build_inception_lstm(str(folder), processor.tokenizer, hidden_size=48, num_attention_heads=1)
    captioner.save(tmp_path / "saved")
    pixels = random_batch()["pixel_values"]
    with torch.no_grad():
        expected = trained.forward_head(trained.forward_features(pixels), pre_logits=True)
        for model in (captioner.model.eval(), Captioner.load(tmp_path / "saved").model):
            torch.testing.assert_close(model.encoder(pixels).last_hidden_state[:, 0], expected)


def test_timm_initialises_a_fresh_encoder_its_own_way():
    torch.manual_seed(0)
    ours = make_model(encoder_name="test_vit").encoder.backbone.state_dict()  # linear layers, which our head has too
    torch.manual_seed(0)
    theirs = timm.create_model("test_vit", num_classes=0).state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


LOAD_ELSEWHERE = """
import sys, torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
if "modeling" in sys.argv:
    sys.path.insert(0, sys.argv[-1])
    import modeling
folder, auto = sys.argv[1], {"AutoModel": AutoModel, "AutoModelForImageTextToText": AutoModelForImageTextToText}[sys.argv[2]]
remote = {"trust_remote_code": True} if "modeling" not in sys.argv else {}
model = auto.from_pretrained(folder, **remote).eval()
processor = AutoProcessor.from_pretrained(folder, **remote)
from PIL import Image
inputs = processor(images=Image.new("RGB", (90, 70), "purple"), return_tensors="pt")
ids = model.generate(**inputs)
print(ids.tolist(), processor.batch_decode(ids, skip_special_tokens=True), model(**inputs, decoder_input_ids=ids).logits.sum().item())
"""


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForImageTextToText"])
@pytest.mark.parametrize("remote", [True, False], ids=["remote code", "import modeling"])
@pytest.mark.slow
def test_a_saved_folder_captions_the_same_in_a_fresh_process(processor, tmp_path, auto, remote):
    model = make_model(vocab_size=9).eval()
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.generation_config.update(max_length=9, num_beams=2)
    Captioner(model, processor).save(tmp_path / "saved")
    arguments = [tmp_path / "saved", auto] + ([] if remote else ["modeling", ROOT])
    elsewhere = run_fresh(LOAD_ELSEWHERE, *arguments, folder=tmp_path / "elsewhere")
    inputs = processor(images=Image.new("RGB", (90, 70), "purple"), return_tensors="pt")
    ids = model.generate(**inputs)
    logits = model(**inputs, decoder_input_ids=ids).logits.sum().item()
    assert elsewhere.strip() == f"{ids.tolist()} {processor.batch_decode(ids, skip_special_tokens=True)} {logits}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["levit_128s", "eva02_tiny_patch14_224"])
def test_no_buffer_is_lost_in_saving(name, tmp_path):
    """Their tables of positions are no weights, and timm saves none of them."""
    model = make_model(encoder_name=name, attention=True).eval()
    pixels = torch.randn(1, 3, 224, 224)
    model.save_pretrained(tmp_path)
    loaded = InceptionLSTMForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded.encoder(pixels)[0], model.encoder(pixels)[0])


def test_a_captioner_loads_without_remote_code_here(processor, tmp_path):
    Captioner(make_model(vocab_size=9), processor).save(tmp_path)
    loaded = Captioner.load(tmp_path)
    assert type(loaded.model) is InceptionLSTMForConditionalGeneration and not loaded.model.training
    assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
