#!/usr/bin/env bash
# torchmetrics 1.9.0 (multimodal.CLIPScore) with transformers 5.24.0; torch 2.14.1, Pillow 12.3.0.
#
# Expected: the CLIPScore of an image and a caption, by a CLIP that transformers loads.
# Seen: AttributeError: 'BaseModelOutputWithPooling' object has no attribute 'norm'. In transformers 5, `get_image_features` and
# `get_text_features` return an output whose `pooler_output` are the features; torchmetrics takes it for the features.
# For users: give CLIPScore a function that returns a CLIPModel whose two methods return `pooler_output`, and its processor.
# Even then the number is 100 times the cosine, without the paper's prefix "A photo depicts": times 2.5 / 100, with the prefix before
# each caption, it is the paper's.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check \
  torch==2.14.1 torchvision==0.29.1 transformers==5.24.0 torchmetrics==1.9.0 pillow==12.3.0

venv/bin/python - 2>/dev/null <<'PY'
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torchmetrics.multimodal.clip_score import CLIPScore

words = ["<pad>", "<s>", "</s>", "a", "photo", "dog"]
tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
processor = transformers.CLIPProcessor(images, tokenizer)
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
text = sizes | {"vocab_size": len(words), "max_position_embeddings": 8, "eos_token_id": 2, "pad_token_id": 0}
config = transformers.CLIPConfig(text_config=text, vision_config=sizes | {"image_size": 16, "patch_size": 8})


class WithTensors(transformers.CLIPModel):
    def get_image_features(self, *args, **options):
        return super().get_image_features(*args, **options).pooler_output

    def get_text_features(self, *args, **options):
        return super().get_text_features(*args, **options).pooler_output


def score(kind):
    torch.manual_seed(0)
    metric = CLIPScore(lambda: (kind(config).eval(), processor))
    metric.update(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), ["a photo dog"])
    return float(metric.compute())


try:
    score(transformers.CLIPModel)
    raise SystemExit("CLIPScore works")
except AttributeError as error:
    assert "BaseModelOutputWithPooling" in str(error), error
assert 0 <= score(WithTensors) <= 100
print("torchmetrics' CLIPScore ends in an AttributeError with transformers 5.24.0, and works where CLIP returns tensors")
PY
