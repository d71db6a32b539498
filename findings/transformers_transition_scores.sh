#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0.
#
# Expected: compute_transition_scores gives the log-probabilities of a caption's tokens, whose sum (or mean) is how sure
# the model is of the caption, in a batch as alone; with beam search it is so, since tokens after the end score 0.
# Seen: after greedy search or sampling a caption that ended before others of its batch goes on to be scored: each pad token after the
# end has the log-probability that the decoder gives it when it reads pads, minus several each. The caption is the same
# as alone and its sum is not, the worse the longer the longest caption of the batch, so that short captions look unsure
# and a ranking or a filter by confidence depends on which images shared a batch. No warning, and nothing masks them.
# For users: set the scores to zero after the first end of each row before summing, and count tokens up to there.
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

END, PAD, START, LENGTH = 9, 8, 7, 12


def captioner(seed):
    torch.manual_seed(seed)
    encoder = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=16
    )
    decoder = GPT2Config(
        vocab_size=10, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=START, eos_token_id=END, initializer_range=0.5
    )
    model = VisionEncoderDecoderModel(VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)).eval()
    model.generation_config.update(
        decoder_start_token_id=START, eos_token_id=END, pad_token_id=PAD, max_new_tokens=LENGTH, suppress_tokens=[START]
    )
    return model, torch.randn(8, 3, 32, 32) * 2


def captions(model, images, beams):
    """The tokens of each caption up to its end, and the sum of the scores of its row."""
    output = model.generate(
        images, do_sample=False, num_beams=beams, return_dict_in_generate=True, output_scores=True
    )
    indices = output.beam_indices if beams > 1 else None
    scores = model.compute_transition_scores(output.sequences, output.scores, indices, normalize_logits=True)
    rows = output.sequences[:, 1:].tolist()
    return [row[: row.index(END) + 1] if END in row else row for row in rows], scores.sum(1)


for seed in range(1000):  # a random model whose captions differ in length by six tokens or more
    model, images = captioner(seed)
    together, sums = captions(model, images, 1)
    lengths = [len(caption) for caption in together]
    if 2 <= min(lengths) <= LENGTH - 6 and max(lengths) == LENGTH:
        break
else:
    raise SystemExit("no model whose captions differ in length")
short = lengths.index(min(lengths))
apart = {}
for beams in (1, 3):
    together, sums = captions(model, images, beams)
    alone = [captions(model, image[None], beams) for image in images]
    assert [caption for (caption,), _ in alone] == together, (beams, together)
    apart[beams] = (torch.cat([value for _, value in alone]) - sums).abs()
assert apart[3].max() < 1e-3, apart
greedy = captions(model, images, 1)[1][short], captions(model, images[short, None], 1)[1][0]
assert greedy[1] - greedy[0] > 3, greedy
print(
    f"log-probability of one greedy caption of {lengths[short]} tokens: {greedy[1]:.2f} alone, {greedy[0]:.2f} beside one of {max(lengths)};"
    " with beam search equal"
)
PY
