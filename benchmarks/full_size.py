"""Both captioners of the reference recipes at full size, with random weights, and captions of the lengths of Stanford Paragraphs."""

import io

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import set_seed

from data_scripts.caption_table import FEATURES
from data_scripts.train_tokenizer import train_tokenizer
from modeling import InceptionLSTMConfig, InceptionLSTMForConditionalGeneration
from modeling.captioner import Captioner
from modeling.processing import build_processor, timm_image_processor
from modeling.vit_gpt2 import build_vit_gpt2, decoder_config, encoder_config, vit_image_processor

VOCABULARY = {"lstm": 8000, "vit_gpt2": 50257}
BATCH_SIZE = {"lstm": 64, "vit_gpt2": 8}  # of the reference recipes


def paragraphs(dataset_name: str | None, num_images: int) -> datasets.Dataset:
    """A caption table of random rows of a prepared dataset; or, where None, of noise and captions of made-up words, whose lengths
    are distributed as those of the Stanford Paragraphs subset (60 words on average, 5 to 95 %: 28 to 99)."""
    if dataset_name:
        # Shuffled: the first captions of the subset are shorter than the rest.
        rows = datasets.load_from_disk(dataset_name)["train"].shuffle(seed=0)
        return rows.select(range(min(num_images, len(rows))))
    random = np.random.default_rng(0)
    syllables = [first + second for first in "bdfgklmnprst" for second in "aeiou"]
    words = ["".join(random.choice(syllables, random.integers(1, 4))) for _ in range(9000)]
    shares = 1 / np.arange(1, len(words) + 1)
    lengths = np.clip(random.lognormal(np.log(57), 0.38, num_images), 5, 259).astype(int)
    captions = [[" ".join(random.choice(words, length, p=shares / shares.sum()))] for length in lengths]
    images = [{"bytes": noise(random), "path": None} for _ in range(num_images)]
    names = [str(number) for number in range(num_images)]
    columns = {"image": images, "image_id": names, "captions": captions, "content_hash": names}
    return datasets.Dataset.from_dict(columns, features=FEATURES)


def noise(random: np.random.Generator) -> bytes:
    """A JPEG of 320 x 240 pixels; `datasets` would write a PNG, which takes 70 times as long."""
    image = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    file = io.BytesIO()
    image.resize((320, 240), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def build_captioner(kind: str, captions: list[str]) -> Captioner:
    """The LSTM captioner ("lstm": Inception-ResNet-v2, three layers of 1,024) or ViT-GPT2 ("vit_gpt2": ViT-base, GPT-2 small).

    Args:
        captions: Training captions of the tokenizer; ViT-GPT2 has 50,257 logits however few tokens these have.
    """
    set_seed(0)
    tokenizer = train_tokenizer(captions, VOCABULARY["lstm"])
    if kind == "lstm":
        model = InceptionLSTMForConditionalGeneration(InceptionLSTMConfig(vocab_size=VOCABULARY["lstm"]))
        return Captioner(model, build_processor(timm_image_processor(model.encoder.backbone), tokenizer))
    encoder = encoder_config(224, 16, 768, 12, 12)
    model = build_vit_gpt2(encoder, decoder_config(VOCABULARY["vit_gpt2"], 768, 12, 12), tokenizer)
    return Captioner(model, build_processor(vit_image_processor(encoder), tokenizer))


def random_states(kind: str, num_images: int, device: str) -> torch.Tensor:
    """Random numbers in the shape of either encoder's states, float32 (images, positions, size)."""
    shape = {"lstm": (1, 1536), "vit_gpt2": (197, 768)}[kind]
    return torch.randn(num_images, *shape, generator=torch.Generator().manual_seed(0)).to(device)
