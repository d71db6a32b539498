#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0.
#
# Expected: no_repeat_ngram_size=1 lets every word stand once in a caption, and repetition_penalty makes tokens less likely
# that the caption has already.
# Seen: both count the token that starts the decoder. Where it is the end-of-text token as well, as GPT-2 has it (every
# ViT-GPT2) and BART too, the end counts as said before the first word: with no_repeat_ngram_size=1 no caption ever ends, by
# greedy and beam search alike, and all of them run on to the maximum length; repetition_penalty changes the end's
# score, and no other one, in the very first step. With another start token than the end's the same model ends as before. No warning.
# For users: give such a model a start token of its own, or penalize by a processor that leaves out the first token.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check transformers==5.24.0 torch==2.13.0 numpy==2.4.6

venv/bin/python - 2>log.txt <<'PY' || { cat log.txt; exit 1; }
import torch
from transformers import GPT2Config, ViTConfig, VisionEncoderDecoderConfig, VisionEncoderDecoderModel

END, OTHER, IMAGES, LENGTH = 9, 8, 8, 6  # 8 words, so that 6 tokens can differ without the end's


def captioner(start):
    """A tiny ViT-GPT2 whose steps all give the same scores: the end first, then words 0, 1, 2 and so on."""
    encoder = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=8, patch_size=8
    )
    decoder = GPT2Config(
        vocab_size=10, n_embd=8, n_layer=1, n_head=1, n_positions=32, bos_token_id=END, eos_token_id=END, tie_word_embeddings=False
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    model = VisionEncoderDecoderModel(config).eval()
    with torch.no_grad():
        model.decoder.transformer.ln_f.weight.zero_()
        model.decoder.transformer.ln_f.bias.fill_(1.0)
        scores = torch.tensor([1.5, 1.4, 1.3, 1.2, 1.1, 1.0, 0.9, 0.8, -9.0, 1.6])
        model.decoder.lm_head.weight.copy_(scores[:, None].expand(-1, 8) / 8)
    model.generation_config.update(decoder_start_token_id=start, eos_token_id=END, pad_token_id=END)
    return model


def generate(start, **options):
    images = torch.zeros(IMAGES, 3, 8, 8)
    options = {"max_new_tokens": LENGTH, "do_sample": False, "return_dict_in_generate": True, "output_scores": True} | options
    return captioner(start).generate(images, output_logits=True, **options)


def ended(start, **options):
    """The number of captions of IMAGES that have an end."""
    return int((generate(start, **options).sequences[:, 1:] == END).any(1).sum())


assert ended(END) == ended(OTHER) == IMAGES
seen = [ended(END, no_repeat_ngram_size=1, num_beams=beams) for beams in (1, 3)]
assert seen == [0, 0], seen
other = [ended(OTHER, no_repeat_ngram_size=1, num_beams=beams) for beams in (1, 3)]
assert other == [IMAGES, IMAGES], other
changed = {}
for start in (END, OTHER):
    output = generate(start, repetition_penalty=1.2)
    changed[start] = (output.scores[0] != output.logits[0]).nonzero()[:, 1].unique().tolist()
assert changed == {END: [END], OTHER: [OTHER]}, changed
print(
    f"captions that end with no_repeat_ngram_size=1: {seen[0]} of {IMAGES} (greedy), {seen[1]} (beams) where start and end are one token,"
    f" {other[0]} and {other[1]} where not; repetition_penalty changes the end alone in the first step"
)
PY
