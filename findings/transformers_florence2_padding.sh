#!/usr/bin/env bash
# transformers 5.24.0 (Florence2Processor), with torch 2.14.1.
#
# Expected: a batch decoded with skip_special_tokens=False and given to post_process_generation, as the documentation has
# it, gives the captions; padding behind a shorter one is no part of it.
# Seen: <s> and </s> are taken out, <pad> is not. A caption that is "a dog" alone is "a dog  <pad> <pad>" beside a longer
# one in the batch. With one image at a time it does not show.
# For users: captions of a batch carry pad tokens into files, training data and scores. Decode <CAPTION> tasks with
# skip_special_tokens=True, or take the pad token out before.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1 HF_HOME="$work/hf" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 transformers==5.24.0

venv/bin/python - <<'PY'
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessor, Florence2Processor, PreTrainedTokenizerFast

WORDS = "<pad> <s> </s> <unk> <image> a red dog runs What does the image describe ?".split()
words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, **special, extra_special_tokens={"image_token": "<image>"}
)
image_processor = CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
image_processor.image_seq_length = 5
processor = Florence2Processor(image_processor, tokenizer, post_processor_config={"pure_text": {}})


def captions(generated: torch.Tensor) -> list[str]:
    texts = processor.batch_decode(generated, skip_special_tokens=False)
    task = "<CAPTION>"
    return [processor.post_process_generation(text, task=task, image_size=(32, 32))[task] for text in texts]


# As generate() returns them: start token, words, EOS, padding.
batch = torch.tensor([[2, 1, 5, 6, 7, 8, 2], [2, 1, 5, 7, 2, 0, 0]])
(alone,), (_, beside) = captions(batch[1:, :5]), captions(batch)
assert alone == "a dog" and beside.split() == ["a", "dog", "<pad>", "<pad>"], (alone, beside)
print(f"Florence-2's caption of an image alone: {alone!r}; in a batch with a longer one: {beside!r}")
PY
