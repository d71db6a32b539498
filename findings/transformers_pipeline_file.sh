#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0.
#
# Expected: a model with a pipeline of its own, saved by that pipeline's save_pretrained, is still usable by pipeline(folder) after it
# was loaded and saved once more, as a model with code of its own is, whose files are copied along.
# Seen: the second folder's config.json still names the pipeline's module under custom_pipelines, and the module's file is not there:
# pipeline() ends in an OSError that the folder has no such file. Saving says nothing. Only pipeline.save_pretrained copies the file;
# model.save_pretrained, push_to_hub and Trainer.save_model keep the entry and lose what it names.
# For users: save through the pipeline, copy the .py file by hand, or give the model a processor or config with code of its own in
# the same module, which transformers does copy.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1 HF_HOME="$work/hf" HF_HUB_OFFLINE=1
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check transformers==5.24.0 torch==2.13.0

cat > lengths.py <<'PY'
from transformers import Pipeline


class LengthPipeline(Pipeline):
    def _sanitize_parameters(self, **options):
        return {}, {}, {}

    def preprocess(self, text):
        import torch

        return {"input_ids": torch.tensor([[len(word) for word in text.split()]])}

    def _forward(self, inputs):
        return self.model(**inputs)

    def postprocess(self, outputs):
        return outputs.logits.shape[-1]
PY
venv/bin/python - <<'PY'
import json
import os

from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from lengths import LengthPipeline

PIPELINE_REGISTRY.register_pipeline("count-labels", LengthPipeline, pt_model=AutoModelForSequenceClassification)
sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 9}
model = BertForSequenceClassification(BertConfig(**sizes, num_labels=3)).eval()
pipeline("count-labels", model=model).save_pretrained("first")
assert os.path.exists("first/lengths.py")
assert pipeline("count-labels", model="first", trust_remote_code=True)("a b cd") == 3

AutoModelForSequenceClassification.from_pretrained("first").save_pretrained("second")
with open("second/config.json") as file:
    assert json.load(file)["custom_pipelines"]["count-labels"]["impl"] == "lengths.LengthPipeline"
assert not os.path.exists("second/lengths.py")
del PIPELINE_REGISTRY.supported_tasks["count-labels"]
try:
    pipeline("count-labels", model="second", trust_remote_code=True)
except OSError as error:
    assert "lengths.py" in str(error), error
else:
    raise SystemExit("the pipeline's file is found now")
print("a model saved again names its pipeline's file, which is not in the folder: OSError from pipeline()")
PY
