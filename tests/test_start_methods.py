"""Processes that decode images work however they are started: macOS and Windows spawn them, Python 3.14 uses a fork server."""

import multiprocessing

import pytest
import torch
from kill_points import start_server
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessor

import caption
import train_lstm
from data_scripts import load_captions
from data_scripts.train_tokenizer import train_tokenizer
from modeling.processing import build_processor
from training.arguments import DataArguments
from training.batches import CaptionCollator, CaptionPairs, CaptionSampler
from training.features import encode_splits


class MeanColor(torch.nn.Module):
    """An encoder whose features are an image's mean color."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, pixels):
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=self.scale * pixels.mean((2, 3))[:, None])


@pytest.mark.slow
def test_batches_of_a_worker_that_inherits_nothing_are_the_same(small_scenes):
    """From images and from cached features. What it gets is pickled, as for a spawned one, which has to import all libraries."""
    context = start_server()
    dataset = load_captions(small_scenes)
    tokenizer = train_tokenizer([text for texts in dataset["train"]["captions"] for text in texts], 120)
    image_processor = CLIPImageProcessor(size={"height": 16, "width": 16}, do_center_crop=False)
    processor = build_processor(image_processor, tokenizer)
    cached = encode_splits(dataset, MeanColor(), image_processor, DataArguments(), 2)["train"]
    for features in ([None] * 2, cached):
        pairs = CaptionPairs(dataset["train"], tokenizer, features=features)
        sampler = CaptionSampler(pairs.lengths, 40, images=pairs.row_of_pair, num_augmentations=2)
        loading = {"batch_size": 40, "sampler": sampler, "collate_fn": CaptionCollator(processor, "index")}
        here = list(DataLoader(pairs, **loading))
        there = list(DataLoader(pairs, num_workers=1, multiprocessing_context=context, **loading))
        for one, other in zip(here, there, strict=True):
            assert one.keys() == other.keys()
            for name in one.keys() - {"encoder_outputs"}:
                assert torch.equal(one[name], other[name])
            if "encoder_outputs" in one:
                assert torch.equal(one["encoder_outputs"][0], other["encoder_outputs"][0])


@pytest.fixture
def inheriting_nothing():
    """Processes that this one starts are forked from the server of `start_server`, unless told otherwise."""
    start_server()
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.slow
@pytest.mark.usefixtures("inheriting_nothing")
def test_a_training_and_a_captioning_run_whose_workers_inherit_nothing(small_scenes, tmp_path):
    """As on macOS and Windows: all that a worker needs is pickled. A fork server has the libraries at hand, which saves their import."""
    run, image = tmp_path / "run", tmp_path / "red.png"
    load_captions(small_scenes)["test"][0]["image"].save(image)
    train = {
        **{"dataset_name": small_scenes, "output_dir": run, "report_to": "none", "num_train_epochs": 1},
        **{"encoder": "test_efficientnet", "pretrained_encoder": "false", "image_size": 64, "image_embed_dim": 16},
        **{"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 120, "dataloader_num_workers": 1},
    }
    generate = {"model_name_or_path": run, "num_workers": 1, "output": tmp_path / "c.jsonl"}
    options = [[f"--{name}={value}" for name, value in of.items()] for of in (train, generate)]
    train_lstm.main(options[0])
    caption.main([*options[1], str(image)])
    assert (run / "results.json").is_file() and len((tmp_path / "c.jsonl").read_text().splitlines()) == 1
