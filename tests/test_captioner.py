"""Laws of `Captioner`: generated captions, their tokens' probability and attention, streams, decoding settings, loading."""

import copy
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from small_captioners import build
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    EncoderDecoderCache,
    GPT2TokenizerFast,
    ViTImageProcessor,
    ViTModel,
)

from data_scripts.train_tokenizer import train_tokenizer
from modeling import InceptionLSTMConfig, InceptionLSTMForConditionalGeneration
from modeling.captioner import Captioner, attention_grids, token_texts
from modeling.processing import build_processor, center_crop
from modeling.transformers_versions import set_attn_implementation
from modeling.vit_gpt2 import build_vit_gpt2, decoder_config, encoder_config, vit_image_processor
from system.errors import UserError

CAPTIONS = ["a red dog on the left", "the blue cats run", "犬が走る and a dog runs", "naïve cafés, 12 of them!"] * 5
LSTM_WITH_ATTENTION = pytest.mark.parametrize("captioner", ["lstm with attention"], indirect=True)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS, 300)


@pytest.fixture(params=["lstm", "lstm with attention", "vit_gpt2", "vit_gpt2 with prompt"])
def captioner(request, tokenizer):
    """A small captioner with random weights."""
    torch.manual_seed(0)
    if request.param.startswith("lstm"):
        config = InceptionLSTMConfig(
            encoder_name="test_efficientnet",
            vocab_size=len(tokenizer),
            image_embed_dim=32,
            hidden_size=32,
            num_hidden_layers=1,
            attention="attention" in request.param,
            num_attention_heads=2,
        )
        model = InceptionLSTMForConditionalGeneration(config)
        image_processor = CLIPImageProcessor(size={"shortest_edge": 72}, crop_size={"height": 64, "width": 64})
    else:
        encoder = encoder_config(48, 16, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        decoder = decoder_config(len(tokenizer), hidden_size=48, num_hidden_layers=2, num_attention_heads=4)
        model = build_vit_gpt2(encoder, decoder, tokenizer, "the dog" if "prompt" in request.param else "")
        image_processor = vit_image_processor(encoder)
    model.generation_config.update(max_length=9)
    return Captioner(model.eval(), build_processor(image_processor, tokenizer))


@pytest.fixture
def pixels(captioner):
    side = 64 if captioner.model.config.model_type == "inception_lstm" else 48
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_a_tokens_probability_is_the_one_it_was_generated_with(captioner, pixels):
    model, processor = captioner.model, captioner.processor
    made = model.generate(pixels, output_logits=True, return_dict_in_generate=True)
    wanted = model.compute_transition_scores(made.sequences, made.logits, normalize_logits=True).exp()
    for row, told in enumerate(captioner.inspect({"pixel_values": pixels}, made.sequences)):
        words = made.sequences[row, len(captioner.start_token_ids) :].tolist()
        end = [*words, processor.tokenizer.eos_token_id].index(processor.tokenizer.eos_token_id)
        of_pieces = [wanted[row, places].prod().item() for _, places in token_texts(processor.tokenizer, words[:end])]
        assert [token["probability"] for token in told["tokens"]] == pytest.approx(of_pieces, abs=1e-6)


def test_attention_is_where_generate_looked(captioner, pixels):
    model, processor = captioner.model, captioner.processor
    if getattr(model, "decoder", None):
        set_attn_implementation(model.decoder, "eager")
    made = model.generate(pixels, output_attentions=True, return_dict_in_generate=True)
    if getattr(model, "decoder", None):
        set_attn_implementation(model.decoder, "sdpa")
    told = captioner.inspect({"pixel_values": pixels}, made.sequences)
    if made.cross_attentions[0] is None:  # the LSTM captioner without attention looks at one summary
        assert all("attention" not in token for caption in told for token in caption["tokens"])
        return
    for row, caption in enumerate(told):
        words = made.sequences[row, len(captioner.start_token_ids) :].tolist()
        end = [*words, processor.tokenizer.eos_token_id].index(processor.tokenizer.eos_token_id)
        # One step a token: (layers, heads) of the last position, their mean; the class token stands before the grid.
        steps = [torch.stack(step)[:, row, :, -1].mean((0, 1)) for step in made.cross_attentions[:end]]
        for (_, places), token in zip(token_texts(processor.tokenizer, words[:end]), caption["tokens"], strict=True):
            grid = torch.tensor(token["attention"])
            assert grid.shape[0] == grid.shape[1] > 1
            of_steps = torch.stack([steps[place] for place in places]).mean(0)[-grid.numel() :]
            torch.testing.assert_close(grid.flatten(), of_steps, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_inspecting_changes_neither_captions_nor_model(captioner, pixels, num_beams):
    model = captioner.model
    before = captioner.generate({"pixel_values": pixels}, num_beams=num_beams)
    told = captioner.generate({"pixel_values": pixels}, inspect=True, num_beams=num_beams)
    assert [{key: caption[key] for key in ("caption", "ended")} for caption in told] == before
    for caption in told:
        assert "".join(token["text"] for token in caption["tokens"]).strip() == caption["caption"]
    if getattr(model, "decoder", None):
        assert model.decoder.config._attn_implementation == "sdpa"
    states = model.get_encoder()(pixels)
    by_states = captioner.generate({"encoder_outputs": states}, inspect=True, num_beams=num_beams)
    for one, other in zip(told, by_states, strict=True):
        assert [token["text"] for token in one["tokens"]] == [token["text"] for token in other["tokens"]]
        for first, second in zip(one["tokens"], other["tokens"], strict=True):
            assert first["probability"] == pytest.approx(second["probability"], abs=1e-5)


def test_inspecting_encodes_no_image_twice(captioner, pixels):
    model = captioner.model
    seen = []
    model.get_encoder().register_forward_hook(lambda module, args, output: seen.append(len(output[0])))
    captioner.generate({"pixel_values": pixels}, inspect=True)
    assert seen == [len(pixels)]


def test_kept_states_are_read_in_the_models_own_numbers(captioner, pixels):
    model = captioner.model
    states = model.get_encoder()(pixels)[0].float()
    model.to(dtype=torch.bfloat16)
    told = captioner.generate({"encoder_outputs": (states,)}, inspect=True)
    cast = captioner.generate({"encoder_outputs": (states.bfloat16(),)}, inspect=True)
    assert told == cast and len(told) == len(pixels)


def test_a_pooler_that_no_captioner_reads_is_left_out(tmp_path):
    captioner = build("vit_gpt2")
    captioner.model.encoder = ViTModel(captioner.model.config.encoder)
    captioner.save(tmp_path)
    assert captioner.encoder.pooler is not None and Captioner.load(tmp_path).encoder.pooler is None


def test_a_saved_captioner_has_all_weights_that_transformers_builds(captioner, tmp_path):
    captioner.save(tmp_path)
    _, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report


@pytest.mark.parametrize("captioner", ["lstm with attention", "vit_gpt2"], indirect=True)
def test_a_checkpoint_with_other_weights_than_its_config_is_refused(captioner, pixels, tmp_path):
    captioner.save(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith(("lm_head.bias", "ln_f.bias")))
    damages = [
        ({key: value for key, value in weights.items() if key != name}, name),
        (weights | {"decoder.extra": pixels}, "decoder.extra"),
        (weights | {name: weights[name][:3]}, name),
    ]
    for damaged, named in damages:
        save_file(damaged, file, {"format": "pt"})
        with pytest.raises(UserError) as refused:
            Captioner.load(tmp_path)
        assert named in str(refused.value)


def test_a_captioner_saved_without_its_pooler_loads_in_silence(tmp_path, capfd):
    captioner = build("vit_gpt2")
    captioner.model.save_pretrained(tmp_path)
    captioner.processor.save_pretrained(tmp_path)
    capfd.readouterr()
    Captioner.load(tmp_path)
    assert "pooler" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("generation", [{"num_beams": 4}, {"do_sample": True, "top_k": 0}])
def test_further_captions_of_an_image_stand_beside_the_first(captioner, pixels, generation):
    model, processor = captioner.model, captioner.processor
    generation = generation | {"num_return_sequences": 3, "max_length": 12}
    torch.manual_seed(0)
    made = captioner.generate({"pixel_values": pixels}, inspect=True, **generation)
    torch.manual_seed(0)
    sequences = model.generate(pixels, **generation)
    words = processor.batch_decode(sequences[:, len(captioner.start_token_ids) :], skip_special_tokens=True)
    texts = [[told["caption"], *told["others"]] for told in made]
    assert [text for of_image in texts for text in of_image] == [text.strip() for text in words]
    assert len(texts) == len(pixels) and all(len(set(of_image)) > 1 for of_image in texts)
    for told in made:  # it is the first that is looked at
        assert "".join(token["text"] for token in told["tokens"]).split() == told["caption"].split()


def test_beams_leave_what_the_image_says_where_it_is_and_write_the_same(captioner, pixels, monkeypatch):
    """transformers' own cache moves keys and values of the image from beam to beam, all of which have the same."""
    # In float32 beams that are near each other may change places.
    model, processor = copy.deepcopy(captioner.model).double(), captioner.processor
    captioner = Captioner(model, processor)
    sequences = model.generate(pixels.double(), num_beams=3, max_length=12)
    words = processor.batch_decode(sequences[:, len(captioner.start_token_ids) :], skip_special_tokens=True)
    monkeypatch.setattr(EncoderDecoderCache, "reorder_cache", None)
    made = captioner.generate({"pixel_values": pixels.double()}, num_beams=3, max_length=12)
    assert [caption["caption"] for caption in made] == [text.strip() for text in words]


@pytest.mark.parametrize("generation", [{"no_repeat_ngram_size": 1}, {"num_beams": 3}, {"do_sample": True}], ids=str)
def test_a_stream_grows_word_by_word_into_the_caption(captioner, pixels, generation):
    for one in pixels[:, None]:
        torch.manual_seed(0)
        whole = captioner.generate({"pixel_values": one}, **generation)[0]["caption"]
        torch.manual_seed(0)
        seen = list(captioner.stream({"pixel_values": one}, **generation))
        assert seen[-1] == whole
        if "num_beams" in generation:
            assert len(seen) == 1
            continue
        words = whole.split()
        grown = {" ".join(text.split()) for text in seen}
        # A Chinese character is shown at once, and brings the word that was held back before it.
        ends = [number for number in range(1, len(words)) if words[number].isascii()] + [len(words)]
        assert grown >= {" ".join(words[:number]) for number in ends}
        assert all(" ".join(words).startswith(text) for text in grown)


@pytest.mark.parametrize("without_beams", [{"num_beams": 1}, {"top_p": 0.9}])
def test_beams_can_be_taken_back(without_beams, tmp_path, monkeypatch):
    captioner = build("lstm")
    model = captioner.model
    captioner.set_decoding(num_beams=3, length_penalty=0.7)
    assert model.generation_config.length_penalty == 0.7
    warned = []
    monkeypatch.setattr(logging.getLogger("transformers.generation.configuration_utils"), "handle", warned.append)
    captioner.set_decoding(**without_beams)
    assert not warned and model.generation_config.length_penalty is None
    with pytest.raises(UserError, match="length_penalty"):
        captioner.set_decoding(length_penalty=0.7, **without_beams)
    captioner.save(tmp_path)  # transformers saves no settings that contradict each other
    assert Captioner.load(tmp_path).model.generation_config.num_beams == 1


def test_a_size_of_n_grams_that_lets_no_caption_end_is_refused():
    captioner = build("vit_gpt2")
    config = captioner.model.generation_config
    start, end = captioner.start_token_ids[0], config.eos_token_id
    for eos in (start, [start, end]):
        config.eos_token_id = eos
        with pytest.raises(UserError, match="no_repeat_ngram_size 1"):
            captioner.set_decoding(no_repeat_ngram_size=1)
        captioner.set_decoding(no_repeat_ngram_size=2)
    config.eos_token_id = start + 1
    captioner.set_decoding(no_repeat_ngram_size=1)
    assert config.no_repeat_ngram_size == 1


def test_a_max_length_counts_where_a_checkpoint_from_elsewhere_has_max_new_tokens(captioner, pixels):
    captioner.generation_config.update(max_new_tokens=7, min_new_tokens=6)
    captioner.set_decoding(max_length=3, min_length=3)
    assert captioner.model.generate(pixel_values=pixels).shape[1] - len(captioner.start_token_ids) == 3
    made, shorter, as_it_is = (
        captioner.generate({"pixel_values": pixels}, max_new_tokens=limit)[0]["caption"] for limit in (None, 1, 9)
    )
    assert made == as_it_is and made.startswith(shorter) and made != shorter


@pytest.mark.slow
def test_the_smallest_nucleus_is_greedy_and_the_largest_is_the_models_own_law(captioner, pixels):
    model = captioner.model
    inputs = {"pixel_values": pixels[:1].expand(256, -1, -1, -1)}
    model.generation_config.num_beams = 3
    captioner.set_decoding(top_p=1e-6)
    sampled = captioner.generate(inputs)
    assert sampled == captioner.generate(inputs, do_sample=False, num_beams=1)
    captioner.set_decoding(top_p=1.0)
    torch.manual_seed(0)
    start = torch.tensor([captioner.start_token_ids] * 256)
    sampled = model.generate(**inputs, max_length=start.shape[1] + 1)[:, -1]
    with torch.no_grad():
        law = model(pixel_values=pixels[:1], decoder_input_ids=start[:1]).logits[0, -1].softmax(0)
    rare = torch.ones(len(law), dtype=torch.bool).index_fill(
        0, law.topk(50).indices, False
    )  # what top_k would leave out
    expected = law[rare].sum()
    assert 0.2 < expected < 0.8
    assert (rare[sampled].float().mean() - expected).abs() < 4 * (0.25 / 256) ** 0.5  # standard errors at most


def test_a_stream_that_fails_says_so(captioner, pixels):
    with pytest.raises(ValueError, match="temperature"):
        list(captioner.stream({"pixel_values": pixels[:1]}, do_sample=True, temperature=-1.0))


@LSTM_WITH_ATTENTION
def test_the_weights_told_are_the_weights_used(captioner, pixels):
    model = captioner.model
    attention = model.attention
    hidden = torch.randn(3, 5, 32)
    grid = attention.project_keys_values(model.encoder(pixels)[0])
    weights = attention.attention_weights(hidden, grid)  # (3, 2 heads, 5, 4 places)
    seen = torch.cat([weights[:, head] @ grid[1].chunk(2, dim=2)[head] for head in range(2)], dim=2)
    outputs = torch.tanh(attention.output(torch.cat([hidden, seen], dim=2)))
    torch.testing.assert_close(attention(hidden, grid), outputs)


@LSTM_WITH_ATTENTION
def test_a_loaded_model_tells_its_attention_through_generate(captioner, pixels, tmp_path):
    captioner.save(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    made = loaded.generate(pixels, num_beams=2, output_attentions=True, return_dict_in_generate=True)
    for (step,) in made.cross_attentions:
        assert step.shape == (6, 2, 1, 4)  # two beams of three images; two heads; one new word; a grid of 2 x 2
        torch.testing.assert_close(step.sum(-1), torch.ones(6, 2, 1))


def test_heads_layers_and_positions_before_the_grid():
    # Two layers of one head over a class token and four places; the caption's first token is said at position 1.
    first, second = torch.zeros(1, 1, 3, 5), torch.zeros(1, 1, 3, 5)
    first[0, 0, 1, 2], second[0, 0, 1, 0] = 1.0, 1.0
    grids = attention_grids((first, second), first=1, num_tokens=2)
    assert grids.tolist() == [[[0, 0.5], [0, 0]], [[0, 0], [0, 0]]]
    assert attention_grids((None, None), 0, 1) is None
    assert attention_grids(None, 0, 1) is None


@pytest.fixture(scope="module")
def bytes_tokenizer():
    """A byte a token, so that most characters below are cut."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({character: place for place, character in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return GPT2TokenizerFast(tokenizer_object=raw)


@settings(deadline=None, max_examples=60)
@given(text=some.text(some.sampled_from("a bé犬🐶.,'n t!"), max_size=12))
def test_pieces_of_any_caption_are_the_caption(bytes_tokenizer, text):
    tokenizer = bytes_tokenizer
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces = token_texts(tokenizer, ids)
    assert "".join(piece for piece, _ in pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece, _ in pieces)
    told = [place for _, places in pieces for place in places]
    assert told == sorted(set(told))


@pytest.mark.parametrize("shape", [(200, 120), (120, 200)])
def test_the_center_crop_is_what_the_pixels_hold(shape):
    processor = CLIPImageProcessor(size={"shortest_edge": 80}, crop_size={"height": 60, "width": 60})
    share = center_crop(processor)
    assert share == 0.75
    # White where the model is said to look, black around: its pixels are white but for the seam.
    image = Image.new("RGB", shape)
    half = share * min(shape) / 2
    middle = (shape[0] / 2, shape[1] / 2)
    box = [middle[0] - half, middle[1] - half, middle[0] + half - 1, middle[1] + half - 1]
    ImageDraw.Draw(image).rectangle(box, fill="white")
    pixels = processor(images=image, return_tensors="pt")["pixel_values"][0, 0]
    assert pixels[2:-2, 2:-2].min() == pixels.max()
    outside = Image.new("RGB", shape, "white")
    ImageDraw.Draw(outside).rectangle(box, fill="black")
    pixels = processor(images=outside, return_tensors="pt")["pixel_values"][0, 0]
    assert pixels[2:-2, 2:-2].max() == pixels.min()


def test_an_image_resized_whole_has_no_crop():
    assert center_crop(ViTImageProcessor(size={"height": 32, "width": 32})) is None
    assert center_crop(CLIPImageProcessor(do_center_crop=False)) is None


# ------------------------------------------------------------------------------------------------- numbers


def test_captions_in_bfloat16_are_as_likely_as_in_float32(captioner, pixels):
    """Their words may be others; what float32 says of their tokens is what bfloat16 said, as far as its digits go."""
    model = captioner.model
    captioner.to("cpu", "bfloat16")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    with torch.inference_mode():
        sequences = model.generate(pixel_values=pixels)
    told = captioner.generate({"pixel_values": pixels}, inspect=True)
    captioner.to("cpu", "float32")
    exact = captioner.inspect({"pixel_values": pixels}, sequences)
    for caption, same in zip(told, exact, strict=True):
        assert [token["text"] for token in caption["tokens"]] == [token["text"] for token in same["tokens"]]
        for token, other in zip(caption["tokens"], same["tokens"], strict=True):
            assert token["probability"] == pytest.approx(other["probability"], rel=0.1)


@pytest.mark.parametrize(
    ("instructions", "dtype"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({}, torch.float32),
    ],
)
def test_auto_is_what_the_processor_has_instructions_for(captioner, instructions, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    captioner.to("cpu", "auto")
    assert captioner.model.dtype == dtype


def test_a_device_that_is_not_there_is_said(captioner):
    with pytest.raises(ValueError, match="--device abacus cannot be used"):
        captioner.to("abacus", "auto")


def test_a_missing_folder_is_not_taken_for_a_name_on_the_hub(tmp_path):
    with pytest.raises(UserError) as raised:
        Captioner.load(tmp_path / "outputs" / "demo")
    assert "repo" not in str(raised.value).replace(str(tmp_path), "").lower()
