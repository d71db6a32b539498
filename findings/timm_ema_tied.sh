#!/usr/bin/env bash
# timm 1.0.31, torch 2.14.1, torchvision 0.29.1.
#
# Expected: ModelEmaV3(model, decay=0.9) keeps 0.9 of the average of every weight at each update.
# Seen: of a weight that is tied, as a decoder's token embedding and output layer are, it keeps 0.81, the square: the average
# is taken over the entries of state_dict, where a tied weight stands under each of its names, and is moved once for
# each. With decay 0.9998 the embedding is averaged over 2,500 steps and all the rest over 5,000, so that the averaged model
# is made of weights that do not belong together. ModelEmaV2 does the same; ModelEmaV3(exclude_buffers=True) is right. No
# warning, and the average is still tied.
# For users: exclude_buffers=True, or torch's AveragedModel, where weights are tied.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check timm==1.0.31 torch==2.14.1 torchvision==0.29.1 numpy==2.4.6

venv/bin/python - <<'PY'
import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Decoder(torch.nn.Module):
    """An embedding, a layer, and an output layer that has the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 4)
        self.layer = torch.nn.Linear(4, 4)
        self.output = torch.nn.Linear(4, 10, bias=False)
        self.output.weight = self.embedding.weight


def fill(model, value):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def kept(average):
    """What an average of weights of 1 keeps of embedding and layer when all weights become 0."""
    model = Decoder()
    fill(model, 1.0)
    averaged = average(model)
    if isinstance(averaged, AveragedModel):
        averaged.update_parameters(model)  # the first update is a copy
    fill(model, 0.0)
    getattr(averaged, "update_parameters", averaged.update if hasattr(averaged, "update") else None)(model)
    assert averaged.module.output.weight is averaged.module.embedding.weight
    weights = averaged.module.embedding.weight, averaged.module.layer.weight
    return tuple(round(float(weight.detach().mean()), 4) for weight in weights)


wrong = [
    kept(lambda model: ModelEmaV3(model, decay=0.9)),
    kept(lambda model: ModelEmaV3(model, decay=0.9, foreach=False)),
    kept(lambda model: ModelEmaV2(model, decay=0.9)),
]
assert wrong == [(0.81, 0.9)] * 3, wrong
right = [
    kept(lambda model: ModelEmaV3(model, decay=0.9, exclude_buffers=True)),
    kept(lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))),
]
assert right == [(0.9, 0.9)] * 2, right
print(f"ModelEmaV3 with decay 0.9 keeps {wrong[0][0]} of a tied embedding and {wrong[0][1]} of another layer; {right[0][0]} of both with exclude_buffers")
PY
