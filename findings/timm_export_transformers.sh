#!/usr/bin/env bash
# timm 1.0.31 and transformers 5.24.0 with torch 2.14.1.
#
# Expected: a model that timm saves for the Hub (save_for_hf, push_to_hf_hub) loads by transformers' AutoModel, which
# wraps timm's models, as those of timm's own repositories do.
# Seen: timm now writes the arguments that build the model into config.json as model_args, the number of classes among
# them. transformers passes them on beside its own num_classes=0, and AutoModel.from_pretrained ends in a TypeError
# ("got multiple values for keyword argument 'num_classes'"). timm itself loads the same folder.
# For users: an encoder fine-tuned and shared with today's timm is none for transformers; repositories made before have
# no model_args and load. Remove num_classes from model_args, or load with timm.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1 HF_HOME="$work/hf" HF_HUB_OFFLINE=1
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check timm==1.0.31 transformers==5.24.0 torch==2.14.1 torchvision==0.29.1

venv/bin/python - <<'PY'
import json

import timm
from timm.models import save_for_hf
from transformers import AutoModel

save_for_hf(timm.create_model("test_vit", num_classes=3), "saved", safe_serialization=True)
with open("saved/config.json") as file:
    about = json.load(file)
assert about["model_args"]["num_classes"] == 3, about
assert timm.create_model("local-dir:saved", pretrained=True).num_classes == 3
try:
    AutoModel.from_pretrained("saved")
except TypeError as error:
    assert "num_classes" in str(error), error
else:
    raise SystemExit("transformers loads it now")
del about["model_args"]["num_classes"]
with open("saved/config.json", "w") as file:
    json.dump(about, file)
AutoModel.from_pretrained("saved")
print("AutoModel.from_pretrained of a folder that timm saved: TypeError for num_classes, none without it in model_args")
PY
