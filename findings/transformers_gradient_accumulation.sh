#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0 and accelerate 1.15.0: Trainer and VisionEncoderDecoderModel, the class of
# ViT-GPT2 captioners.
#
# Expected: 8 images in 1 batch of 8, 4 batches of 2 or 8 batches of 1 (gradient_accumulation_steps) give one and the
# same step, since all captions here have the same number of tokens.
# Seen: loss and gradient are 4 and 8 times as large. Trainer does not divide by the number of steps for a model whose
# forward takes **kwargs, because such a model is thought to divide by num_items_in_batch itself; this one takes the
# argument and ignores it.
# For users: the logged loss depends on the accumulation, gradient clipping bites earlier, and with SGD the learning
# rate is multiplied; with Adam the step is hidden by its scaling and only clipping and the loss curve tell. Set
# model.accepts_loss_kwargs = False before making the Trainer.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1 HF_HOME="$work/hf" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check transformers==5.24.0 accelerate==1.15.0 torch==2.13.0 numpy

venv/bin/python -W ignore - <<'PY'
import copy

import torch
from transformers import (
    GPT2Config,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

torch.manual_seed(0)
vit = ViTConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16
)
gpt2 = GPT2Config(
    n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=32, is_decoder=True, add_cross_attention=True,
    bos_token_id=1, eos_token_id=2, pad_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
)  # fmt: skip
config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, gpt2)
config.decoder_start_token_id, config.pad_token_id = 1, 0
start = VisionEncoderDecoderModel(config)
rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": torch.randint(3, 30, (5,))} for _ in range(8)]


def first_step(batch_size, accumulation, accepts_loss_kwargs=None):
    """Logged loss and gradient norm of the first step over all eight rows."""
    model = copy.deepcopy(start)
    if accepts_loss_kwargs is not None:
        model.accepts_loss_kwargs = accepts_loss_kwargs
    arguments = TrainingArguments(
        "out", per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, max_steps=1,
        logging_steps=1, max_grad_norm=1e9, optim="sgd", learning_rate=0.01, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, log_level="error",
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return float(log["loss"]), float(log["grad_norm"])


whole, quarters, eighths = first_step(8, 1), first_step(2, 4), first_step(1, 8)
mended = first_step(2, 4, accepts_loss_kwargs=False)
for value in (0, 1):
    assert abs(quarters[value] / whole[value] - 4) < 0.01, (whole, quarters)
    assert abs(eighths[value] / whole[value] - 8) < 0.01, (whole, eighths)
    assert abs(mended[value] / whole[value] - 1) < 0.01, (whole, mended)
print(
    f"8 images in batches of 8, 2, 1 with 1, 4, 8 accumulation steps: loss {whole[0]:.2f}, {quarters[0]:.2f},"
    f" {eighths[0]:.2f}; gradient norm {whole[1]:.2f}, {quarters[1]:.2f}, {eighths[1]:.2f}"
)
PY
