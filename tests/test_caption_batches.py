"""Laws of pairs, their order, the collator and the feature cache."""

from functools import partial

import datasets
import numpy as np
import pytest
import timm
import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from PIL import Image, ImageOps
from small_captioners import build
from torch.utils.data import DataLoader
from torchvision.transforms import functional
from transformers import CLIPImageProcessor, ViTConfig, ViTModel

from data_scripts import load_captions
from data_scripts.augmentations import CROP_SIZE, MAX_AUGMENTATIONS, augment_caption, augment_image
from data_scripts.train_tokenizer import train_tokenizer
from modeling.captioner import Captioner
from modeling.modeling_inception_lstm import TimmEncoder
from modeling.processing import build_processor, timm_image_processor
from modeling.vit_gpt2 import build_vit_gpt2, decoder_config, encoder_config, vit_image_processor
from system.errors import UserError
from training.arguments import DataArguments
from training.batches import CaptionCollator, CaptionPairs, CaptionSampler, ImageDataset
from training.features import (
    Features,
    PixelCollator,
    cache_features,
    compiled_for_batches,
    encode_splits,
    encoder_fingerprint,
    features_folder,
    sharing_processes,
)


@pytest.fixture(scope="module")
def rows(small_scenes):
    return load_captions(small_scenes)["train"]


@pytest.fixture(scope="module")
def processor(rows):
    tokenizer = train_tokenizer([text for texts in rows["captions"] for text in texts], 120)
    image_processor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    return build_processor(image_processor, tokenizer)


class CountingEncoder:
    """An encoder that counts the images it has seen."""

    def __init__(self):
        torch.manual_seed(0)
        self.encoder = TimmEncoder("test_efficientnet").eval()
        self.num_images = 0

    def __call__(self, pixel_values):
        self.num_images += len(pixel_values)
        return self.encoder(pixel_values).last_hidden_state


def features_of(rows: datasets.Dataset, *args, **options) -> Features:
    """The features of one split that is not augmented."""
    return cache_features(DatasetDict(test=rows), *args, **options)["test"][0]


def states_of(features: Features) -> np.ndarray:
    return np.stack(features[np.arange(len(features))]["encoder_features"])


def pairs_of(sampler: CaptionSampler) -> list[int]:
    return [pair for pair, _ in sampler]


def test_each_caption_meets_its_own_image(rows, processor):
    pairs = CaptionPairs(rows, processor.tokenizer)
    assert len(pairs) == sum(map(len, rows["captions"]))
    items = pairs.__getitems__(list(range(len(pairs))))
    told = [(item["index"], processor.tokenizer.decode(item["labels"], skip_special_tokens=True)) for item in items]
    assert told == [(row, text) for row, texts in enumerate(rows["captions"]) for text in texts]
    assert all(item["image"] == rows[item["index"]]["image"] for item in items[::7])


def test_eos_is_a_target_also_where_a_caption_is_cut(rows, processor):
    pairs = CaptionPairs(rows, processor.tokenizer, max_length=5)
    assert {len(ids) for ids in pairs.token_ids} == {5}
    batch = CaptionCollator(processor)(pairs.__getitems__([0, 1, 2]))
    assert (batch["labels"][:, -1] == processor.tokenizer.eos_token_id).all()


def test_labels_end_where_the_caption_ends(rows, processor):
    pairs = CaptionPairs(rows, processor.tokenizer)
    indices = [int(np.argmin(pairs.lengths)), int(np.argmax(pairs.lengths))]
    batch = CaptionCollator(processor)(pairs.__getitems__(indices))
    assert batch["labels"].shape == (2, pairs.lengths.max())
    for index, labels in zip(indices, batch["labels"].tolist(), strict=True):
        length = pairs.lengths[index]
        assert labels[:length] == pairs.token_ids[index] and set(labels[length:]) <= {-100}
    assert batch["pixel_values"].shape == (2, 3, 64, 64) and batch["pixel_values"].dtype == torch.float32


@pytest.mark.parametrize("group_by_length", [True, False])
def test_an_epoch_holds_every_pair_once_in_an_order_of_its_own(group_by_length):
    lengths = np.random.default_rng(0).integers(5, 60, 1003)
    orders = []
    for epoch in (0, 1, 0):
        sampler = CaptionSampler(lengths, 16, group_by_length, seed=3)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == [(pair, 0) for pair in range(1003)]
    assert orders[0] == orders[2] != orders[1]
    assert orders[0] != list(CaptionSampler(lengths, 16, group_by_length, seed=4))


def test_grouping_saves_the_padding():
    lengths = np.random.default_rng(0).integers(5, 60, 3200)

    def padding(group_by_length: bool) -> float:
        order = pairs_of(CaptionSampler(lengths, 16, group_by_length))
        batches = lengths[order].reshape(-1, 16)
        return 1 - batches.sum() / (16 * batches.max(axis=1)).sum()

    assert padding(True) < 0.05 < 0.3 < padding(False)


@pytest.mark.slow
@pytest.mark.parametrize("share", ["index", "pack"])
def test_evaluation_reads_every_pair_once_and_next_to_no_padding(processor, share):
    words, random = ["red", "blue", "dog", "left"], np.random.default_rng(0)
    blank = Image.new("RGB", (8, 8))
    captions = [[" ".join(random.choice(words, random.integers(1, 60)))] for _ in range(800)]
    rows = Dataset.from_dict({"image": [blank] * 800, "captions": captions}).cast_column("image", datasets.Image())
    pairs = CaptionPairs(rows, processor.tokenizer)
    sorted_pairs = pairs.by_length()
    assert sorted(sorted_pairs.indices) == list(range(800))
    loader = DataLoader(sorted_pairs, 16, collate_fn=CaptionCollator(processor, share))
    labels = [batch["labels"] for batch in loader]
    told = sum((batch != -100).sum() for batch in labels)
    assert told == pairs.lengths.sum() and told / sum(batch.numel() for batch in labels) > 0.95


def test_in_evaluation_the_captions_of_an_image_stay_together(rows, processor):
    pairs = CaptionPairs(rows, processor.tokenizer)
    images = pairs.row_of_pair[pairs.by_length().indices]
    assert (np.diff(images) != 0).sum() == len(rows) - 1
    tokens = np.bincount(pairs.row_of_pair, weights=pairs.lengths)[images]
    assert (np.diff(tokens) >= 0).all()


def test_batches_of_grouped_pairs_come_in_no_order_of_length():
    lengths = np.random.default_rng(0).integers(5, 60, 3200)
    means = lengths[pairs_of(CaptionSampler(lengths, 16))].reshape(-1, 16).mean(axis=1)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3


def test_grouped_by_image_the_captions_of_an_image_stand_together_beside_those_of_as_many_tokens():
    random = np.random.default_rng(0)
    images = np.repeat(np.arange(640), 5)
    lengths = random.integers(5, 30, len(images))
    order = pairs_of(CaptionSampler(lengths, 60, images=images, group_by_image=True))
    assert sorted(order) == list(range(len(images)))
    turns = images[order]
    assert (np.diff(turns) != 0).sum() == 639  # each image once
    tokens = np.bincount(images, weights=lengths)[turns[::5]]  # of each image, in the order of their turn
    batches = tokens[: len(tokens) // 12 * 12].reshape(-1, 12)
    assert 1 - batches.sum() / (12 * batches.max(axis=1)).sum() < 0.05
    assert abs(np.corrcoef(batches.mean(axis=1)[:-1], batches.mean(axis=1)[1:])[0, 1]) < 0.4


def test_views_are_those_of_ten_crops(rows):
    image = rows[0]["image"]
    sizes = [round(CROP_SIZE * side) for side in (image.height, image.width)]
    corners = functional.five_crop(image, sizes)[:4]
    views = [image, functional.hflip(image), *(view for crop in corners for view in (crop, functional.hflip(crop)))]
    assert len(views) == MAX_AUGMENTATIONS
    for view, expected in enumerate(views):
        assert np.array_equal(augment_image(image, view), expected)


def test_a_mirrored_caption_swaps_left_and_right():
    caption = "Left of the leftmost man a bright left-handed cleft, to its RIGHT all is lefty. The right one"
    mirrored = "Right of the rightmost man a bright right-handed cleft, to its Left all is lefty. The left one"
    assert augment_caption(caption, 3) == mirrored and augment_caption(caption, 2) == caption


@pytest.mark.parametrize("group_by_image", [False, True])
def test_an_image_is_seen_in_each_view_in_turn_and_with_the_captions_of_that_view(rows, processor, group_by_image):
    captions = [text for texts in rows["captions"] for text in texts]
    assert any("left" in caption for caption in captions) and any("right" in caption for caption in captions)
    pairs = CaptionPairs(rows, processor.tokenizer, features=[None] * 3)
    sampler = CaptionSampler(pairs.lengths, 16, True, 0, pairs.row_of_pair, group_by_image, num_augmentations=3)
    plain = CaptionSampler(pairs.lengths, 16, True, 0, pairs.row_of_pair, group_by_image)
    seen = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        plain.set_epoch(epoch)
        order = list(sampler)
        assert pairs_of(sampler) == pairs_of(plain)
        augmentation_of_row = {}
        for (pair, view), item in zip(order, pairs.__getitems__(order), strict=True):
            row = pairs.row_of_pair[pair]
            assert augmentation_of_row.setdefault(row, view) == view
            assert item["index"] == row
            assert np.array_equal(item["image"], augment_image(rows[int(row)]["image"], view))
            told = processor.tokenizer.decode(item["labels"], skip_special_tokens=True)
            assert told == augment_caption(captions[pair], view)
        seen += order
    assert sorted(seen) == [(pair, augmentation) for pair in range(len(pairs)) for augmentation in range(3)]


@pytest.mark.parametrize("kind", ["lstm", "vit_gpt2"])
def test_pixels_that_a_card_finishes_are_the_image_processors(kind):
    """Resized and cropped by workers, as bytes, and scaled and normalized on the device."""
    image_processor, draw = build(kind).image_processor, np.random.default_rng(0)
    sizes = ((40, 60, 3), (50, 50, 3), (300, 200, 3), (40, 60, 3))
    images = [Image.fromarray(draw.integers(0, 256, size, dtype=np.uint8)) for size in sizes]
    collator = PixelCollator(image_processor, "cuda")
    collator.device = torch.device("cpu")
    pixels = collator(images)
    assert pixels.dtype == torch.uint8
    assert torch.equal(collator.finish(pixels), PixelCollator(image_processor)(images))


def test_features_of_a_view_are_those_of_the_image_seen_so(rows, processor):
    encoder = CountingEncoder()
    images = rows.select_columns(["image"]).select(range(20))
    splits = DatasetDict(train=images, validation=images.select(range(5)))
    kept = cache_features(splits, encoder, processor.image_processor, "views", num_augmentations={"train": 2})
    assert encoder.num_images == 1 + 2 * 20 + 5  # one is the example
    assert [len(views) for views in kept.values()] == [2, 1]
    plain, mirrored = kept["train"]
    by_hand = images.map(lambda row: {"image": ImageOps.mirror(row["image"])})
    expected = features_of(by_hand, encoder, processor.image_processor, "by hand")
    assert np.array_equal(states_of(mirrored), states_of(expected))
    assert not np.array_equal(states_of(mirrored), states_of(plain))
    few, many = (
        states_of(kept["validation"][0]),
        states_of(plain)[:5],
    )  # in batches of two sizes, to the last bit of float16
    assert np.abs(few - many).max() <= 1e-3 * np.abs(many).max()


def test_packed_captions_are_whole_and_told_apart_by_their_positions(rows, processor):
    pairs = CaptionPairs(rows, processor.tokenizer)
    indices = [0, 7, 1, 5, 2]  # three captions of the first image, two of the second
    batch = CaptionCollator(processor, share_images="pack")(pairs.__getitems__(indices))
    assert len(batch["pixel_values"]) == 2 and "index" not in batch
    for row, members in enumerate([(0, 1, 2), (7, 5)]):
        items = [pairs.tokens(member) for member in members]
        length = sum(len(item["labels"]) for item in items)
        assert batch["labels"][row, :length].tolist() == [label for item in items for label in item["labels"]]
        told = [token for item in items for token in item["decoder_input_ids"]]
        assert batch["decoder_input_ids"][row, :length].tolist() == told
        positions = [place for item in items for place in range(len(item["labels"]))]
        assert batch["decoder_position_ids"][row, :length].tolist() == positions
        assert (batch["labels"][row, length:] == -100).all() and (
            batch["decoder_position_ids"][row, length:] == 0
        ).all()
    apart = CaptionCollator(processor, share_images="pack")(pairs.__getitems__([0, 5]))
    assert "decoder_position_ids" not in apart  # nothing to tell apart: the decoder's plain causal way


def test_features_are_the_encoders_own_in_half_precision_and_computed_once(rows, processor):
    encoder = CountingEncoder()
    fingerprint = encoder_fingerprint(encoder.encoder, processor.image_processor)
    features = features_of(rows, encoder, processor.image_processor, fingerprint)
    pixels = processor(images=list(rows["image"]), return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = encoder.encoder(pixels).last_hidden_state
    batch = CaptionCollator(processor)(ImageDataset(rows, features).__getitems__(range(len(rows))))
    torch.testing.assert_close(batch["encoder_outputs"].last_hidden_state, expected, atol=1e-3, rtol=1e-3)
    assert states_of(features).dtype == "float16"
    seen = encoder.num_images
    again = features_of(rows, encoder, processor.image_processor, fingerprint)
    assert encoder.num_images == seen and len(again) == len(rows)


def test_features_in_8_bits_are_half_as_large_and_nearly_the_same(rows, processor):
    encoder = CountingEncoder()
    kept = {int8: features_of(rows, encoder, processor.image_processor, "eight", int8=int8) for int8 in (False, True)}
    assert states_of(kept[True]).dtype == "int8"
    told = [
        CaptionCollator(processor)(ImageDataset(rows, features).__getitems__(range(len(rows))))["encoder_outputs"][0]
        for features in kept.values()
    ]
    largest = told[0].abs().amax(dim=-1, keepdim=True)
    # A step is a 127th of it, half of one is lost; float16's own loss is less.
    assert ((told[1] - told[0]).abs() <= largest / 235).all() and not torch.equal(*told)
    folders = [features_folder("eight", int8) for int8 in (False, True)]
    sizes = [sum(path.stat().st_size for path in folder.iterdir()) for folder in folders]
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.slow
@pytest.mark.parametrize("compiles", [True, False])
def test_a_compiled_encoder_sees_whole_batches_and_says_the_same(compiles, monkeypatch):
    """The compiler itself is torch's, and takes half a minute: here it hands back what it was given, or is not there."""
    torch.manual_seed(0)
    encoder, seen = TimmEncoder("test_efficientnet").eval(), []

    def backend(graph, inputs):
        if not compiles:
            raise RuntimeError("no C++ compiler")

        def call(*inputs):
            seen.extend(len(value) for value in inputs if value.ndim == 4 and value.shape[1:] == (3, 64, 64))
            return graph(*inputs)

        return call

    monkeypatch.setattr("torch.compile", partial(torch.compile, backend=backend))
    encode = compiled_for_batches(encoder, batch_size=4)
    pixels = torch.randn(6, 3, 64, 64)
    with torch.inference_mode():
        if not compiles:
            with pytest.raises(UserError, match="--compile_encoder"):
                encode(pixels[:4])
            return
        for batch in (pixels[:4], pixels[2:], pixels[:2], pixels[:1]):
            assert torch.equal(encode(batch).last_hidden_state, encoder(batch).last_hidden_state)
    assert seen == [4, 4]


def test_a_run_that_finds_the_features_has_the_random_numbers_of_one_that_makes_them(rows, processor):
    encoder = CountingEncoder()
    state = torch.get_rng_state()
    features_of(rows, encoder, processor.image_processor, "random")
    assert torch.equal(torch.get_rng_state(), state)


def test_images_that_come_twice_are_one_file_and_mix_up_no_other(rows, processor, monkeypatch):
    monkeypatch.setattr("training.features.IMAGES_PER_PART", 8)
    monkeypatch.setattr("training.features.MAX_FILE_BYTES", 1)
    encoder = CountingEncoder()
    plain = states_of(features_of(rows, encoder, processor.image_processor, "plain"))
    places = [*range(8), *range(8), *range(8, 24)]
    doubled = states_of(features_of(rows.select(places), encoder, processor.image_processor, "doubled"))
    assert np.array_equal(doubled, plain[places])


def test_processes_that_decode_change_no_feature(rows, processor, monkeypatch):
    monkeypatch.setattr("training.features.IMAGES_PER_PART", 10)
    encoder = CountingEncoder()
    options = {"image_processor": processor.image_processor, "batch_size": 4}
    alone = features_of(rows, encoder, fingerprint="alone", **options)
    shared = features_of(rows, encoder, fingerprint="shared", num_workers=2, **options)
    assert np.array_equal(states_of(alone), states_of(shared))


def test_changed_images_crop_or_weights_never_meet_old_features(rows, processor):
    encoder = CountingEncoder()
    fingerprint = encoder_fingerprint(encoder.encoder, processor.image_processor)
    features_of(rows, encoder, processor.image_processor, fingerprint)
    seen = encoder.num_images
    reordered = rows.select(range(len(rows) - 1, -1, -1))
    backwards = features_of(reordered, encoder, processor.image_processor, fingerprint)
    assert encoder.num_images > seen
    forwards = features_of(rows, encoder, processor.image_processor, fingerprint)
    assert np.array_equal(states_of(backwards)[0], states_of(forwards)[-1])

    other_crop = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56})
    assert encoder_fingerprint(encoder.encoder, other_crop) != fingerprint
    next(buffer for name, buffer in encoder.encoder.named_buffers() if name.endswith("running_mean"))[0] += 1e-3
    assert encoder_fingerprint(encoder.encoder, processor.image_processor) != fingerprint


def test_encoders_of_the_same_weights_that_say_something_else_never_share_features(processor):
    """Neither a grid in place of one summary nor the number of heads shows in the weights."""
    encoders = []
    for grid in (False, True):
        torch.manual_seed(1)
        encoders.append(TimmEncoder("test_vit", grid))
    for heads in (1, 2):
        torch.manual_seed(1)
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8, "image_size": 8, "patch_size": 4}
        encoders.append(ViTModel(ViTConfig(num_attention_heads=heads, **sizes), add_pooling_layer=False))
    for one, other in (encoders[:2], encoders[2:]):
        assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    assert len({encoder_fingerprint(encoder, processor.image_processor) for encoder in encoders}) == 4


@pytest.mark.parametrize("shared", [True, False])
def test_machines_with_a_cache_each_have_their_own_processes_encode_all(tmp_path, monkeypatch, shared):
    """The second process of the second machine: it shares with all four where it sees the first one's file."""
    state = PartialState()
    places = {"process_index": 3, "local_process_index": 1, "num_processes": 4, "wait_for_everyone": lambda: None}
    for name, value in places.items():
        monkeypatch.setattr(state, name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    if shared:
        (tmp_path / "mark").touch()
    monkeypatch.setattr("training.features.broadcast_object_list", lambda names: ["mark"])
    monkeypatch.setattr("training.features.gather_object", lambda seen: seen)
    assert sharing_processes(tmp_path) == ((3, 4) if shared else (1, 2))


def test_it_is_said_where_features_are_read_and_why_they_are_not_kept(rows, processor, caplog):
    caplog.set_level("INFO", "training.features")
    encoder = TimmEncoder("test_vit").eval().requires_grad_(False)

    def told(**options) -> str:
        caplog.clear()
        encode_splits(DatasetDict(test=rows), encoder, processor.image_processor, DataArguments(**options))
        return caplog.text

    assert "Encoding" in told() and "read from" not in caplog.text
    assert f"{len(rows)} images are read from" in told() and "Encoding" not in caplog.text
    assert "--feature_cache none" in told(feature_cache="none")
    encoder.requires_grad_(True)
    assert "trainable" in told()


def test_the_disk_space_of_all_splits_and_views_is_told_before_the_first_is_made(rows, processor, caplog, monkeypatch):
    caplog.set_level("INFO", "training.features")
    encoder = TimmEncoder("test_vit").eval().requires_grad_(False)
    splits = DatasetDict(train=rows, validation=rows.select(range(8)))
    monkeypatch.setattr("training.features._write_parts", lambda *args, **options: None)
    with pytest.raises(UserError):  # nothing has been written
        encode_splits(splits, encoder, processor.image_processor, DataArguments(), num_augmentations=3)
    number, size = 3 * len(rows) + 8, encoder.output_size
    assert [record.getMessage().split(" in ")[0] for record in caplog.records] == [
        f"Encoding {number} images and augmentations once: 1 x {size} features each, {number * size * 2 / 1e6:.0f} MB"
    ]


@pytest.mark.parametrize("file_bytes", [1, 10**9])
def test_a_kill_costs_only_the_images_not_yet_written(rows, processor, monkeypatch, file_bytes):
    """In files of one part, and in one file of three parts."""
    monkeypatch.setattr("training.features.IMAGES_PER_PART", 8)
    monkeypatch.setattr("training.features.MAX_FILE_BYTES", file_bytes)
    encoder, name = CountingEncoder(), f"killed-{file_bytes}"

    def killed_at_the_third_part(pixel_values):
        if encoder.num_images >= 17:  # one image tells the shape, sixteen are in the first two parts
            raise KeyboardInterrupt
        return encoder(pixel_values)

    with pytest.raises(KeyboardInterrupt):
        features_of(rows, killed_at_the_third_part, processor.image_processor, name, batch_size=8)
    encoder.num_images = 0
    features = features_of(rows, encoder, processor.image_processor, name, batch_size=8)
    assert encoder.num_images == 8  # the third part
    undisturbed = features_of(rows, encoder, processor.image_processor, f"undisturbed-{file_bytes}", batch_size=8)
    assert np.array_equal(states_of(features), states_of(undisturbed))
    files = [path.name for path in features_folder(name).iterdir() if not path.name.startswith("shapes")]
    assert len(files) == (3 if file_bytes == 1 else 1) and all(file.endswith(".npy") for file in files)


def test_features_are_found_by_content_hash_and_no_image_is_read(rows, processor, monkeypatch):
    encoder = CountingEncoder()
    first = features_of(rows, encoder, processor.image_processor, "hashed")
    unreadable = rows.map(lambda row: {"image": None}, features=rows.features)
    encoder.num_images = 0
    again = features_of(unreadable, encoder, processor.image_processor, "hashed")
    assert not encoder.num_images and np.array_equal(states_of(first), states_of(again))


def test_an_item_is_a_pair_and_an_augmentation_and_none_lies_beyond_the_end(rows, processor):
    pairs = CaptionPairs(rows, processor.tokenizer, features=[None] * 2)
    assert pairs[3]["labels"] == pairs[3, 0]["labels"] == pairs.token_ids[3]
    assert pairs[3, 1]["labels"] == pairs.mirrored_ids[3]
    for beyond in (len(pairs), -1, (len(pairs), 1)):
        with pytest.raises(IndexError):
            pairs[beyond]


def test_special_tokens_spelled_out_in_a_caption_are_text(rows, processor):
    tokenizer = processor.tokenizer
    captions = [[f"a sign that reads {tokenizer.eos_token}"]]
    pairs = CaptionPairs(Dataset.from_dict({"image": [None], "captions": captions}), tokenizer)
    assert pairs.token_ids[0].count(tokenizer.eos_token_id) == 1


def test_captions_that_are_truncated_are_counted(rows, processor):
    lengths = CaptionPairs(rows, processor.tokenizer).lengths
    assert CaptionPairs(rows, processor.tokenizer, max_length=9).num_truncated == (lengths > 9).sum() > 0


def test_a_captioner_that_has_been_saved_finds_the_features_of_the_one_that_has_not(tmp_path):
    backbone = timm.create_model("test_resnet", num_classes=0)
    captioner = build("lstm")
    captioner.processor = build_processor(timm_image_processor(backbone), captioner.tokenizer)
    before = encoder_fingerprint(captioner.encoder, captioner.image_processor)
    captioner.save(tmp_path)
    assert encoder_fingerprint(captioner.encoder, captioner.image_processor) == before
    loaded = Captioner.load(tmp_path)
    assert encoder_fingerprint(loaded.encoder, loaded.image_processor) == before
    loaded.image_processor.crop_mode = "squash"
    assert encoder_fingerprint(loaded.encoder, loaded.image_processor) != before


@pytest.mark.parametrize("convolutional_stem", [False, True])
def test_a_vit_gpt2_that_has_been_saved_finds_the_features_of_the_one_that_has_not(convolutional_stem, tmp_path):
    """Loading adds a pooler for a moment, and a type to the configs inside the encoder's: none of it is computed with."""
    tokenizer, sizes = (
        build("vit_gpt2").tokenizer,
        {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
    )
    encoder = encoder_config(32, 16, **sizes, convolutional_stem=convolutional_stem)
    model = build_vit_gpt2(encoder, decoder_config(len(tokenizer), **sizes), tokenizer)
    captioner = Captioner(model.eval(), build_processor(vit_image_processor(encoder), tokenizer))
    before = encoder_fingerprint(captioner.encoder, captioner.image_processor)
    captioner.save(tmp_path)
    for _ in range(2):
        captioner = Captioner.load(tmp_path)
        assert encoder_fingerprint(captioner.encoder, captioner.image_processor) == before
        captioner.save(tmp_path)


def test_any_setting_of_an_encoder_is_part_of_its_fingerprint(processor):
    """Not only those that somebody has thought of: one more patch dropped or another activation changes what is computed."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8, "image_size": 8, "patch_size": 4}
    digests = set()
    for settings in ({}, {"hidden_act": "relu"}, {"layer_norm_eps": 1e-3}, {"qkv_bias": True, "my_scale": 2.0}):
        torch.manual_seed(1)
        config = ViTConfig(num_attention_heads=1, **sizes, **settings)
        digests.add(encoder_fingerprint(ViTModel(config, add_pooling_layer=False), processor.image_processor))
    assert len(digests) == 4
