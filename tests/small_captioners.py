"""Small captioners of either kind for the tests: random weights, images of one color, captions that differ."""

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast, ViTImageProcessor

from modeling import InceptionLSTMConfig, InceptionLSTMForConditionalGeneration
from modeling.captioner import Captioner
from modeling.processing import build_processor
from modeling.vit_gpt2 import build_vit_gpt2, decoder_config, encoder_config

VOCABULARY = "<pad> <s> </s> <unk> a the red green blue white black small big dog cat runs sits on under it and"
WORDS = VOCABULARY.split()
COLORS = ("red", "green", "blue", "white", "black")
IMAGES = [Image.new("RGB", (50, 40), color) for color in COLORS]


def word_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def build(kind: str, prompt: str = "", num_layers: int = 2) -> Captioner:
    """A small captioner with random weights, drawn wide so that images differ in their captions."""
    torch.manual_seed(0)
    if kind == "lstm":
        sizes = {"image_embed_dim": 32, "hidden_size": 32, "num_hidden_layers": num_layers, "vocab_size": len(WORDS)}
        config = InceptionLSTMConfig(
            encoder_name="test_efficientnet",
            attention=prompt == "attention",
            num_attention_heads=4,
            **sizes,
        )
        model = InceptionLSTMForConditionalGeneration(config)
        square = {"height": 64, "width": 64}
        crops = prompt != "attention"  # else the whole image, ignoring its aspect ratio
        size = {"shortest_edge": 64} if crops else square
        images = CLIPImageProcessor(size=size, do_center_crop=crops, crop_size=square)
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": num_layers, "num_attention_heads": 4}
        model = build_vit_gpt2(
            encoder_config(32, 16, **sizes), decoder_config(len(WORDS), **sizes), word_tokenizer(), prompt, dropout=0.0
        )
        images = ViTImageProcessor(size={"height": 32, "width": 32})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("encoder.backbone") and parameter.ndim > 1:
                parameter.normal_(std=0.5)
        if kind == "vit_gpt2":
            model.decoder.transformer.ln_f.weight.fill_(1.0)
    model.generation_config.update(max_length=10)
    return Captioner(model.eval(), build_processor(images, word_tokenizer()))
