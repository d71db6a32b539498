#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.14.1 and accelerate 1.15.0: Trainer's label_smoothing_factor and BLIP.
#
# Expected: label_smoothing_factor mixes a little of a uniform target into the loss of the model, which for a captioner
# that reads its own caption is that of the next token. BLIP memorizes three captions with .1 as it does with 0.
# Seen: with any factor above 0 Trainer computes the loss itself, and shifts logits against labels only for classes in the
# table of AutoModelForCausalLM. BLIP, BLIP-2, InstructBLIP, LLaVA, PaliGemma, SmolVLM (Idefics3) and Qwen-VL are not in
# it: each position is trained to give the token that it has just read. The loss falls to a plausible value, without a
# warning, and generate() repeats the start token; argmax over the caption gives the caption itself, not the next tokens.
# For users: leave label_smoothing_factor at 0 for these models, and smooth in compute_loss_func over shifted labels.
# Encoder-decoders that shift labels into decoder inputs are not concerned, nor are GIT and Gemma 3, which are in the table.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1 HF_HOME="$work/hf" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check transformers==5.24.0 accelerate==1.15.0 torch==2.14.1 numpy

venv/bin/python -W ignore - <<'PY'
import torch
from transformers import BlipConfig, BlipForConditionalGeneration, PrinterCallback, Trainer, TrainingArguments

START, EOS = 1, 2
sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=1)
config = BlipConfig(
    text_config=dict(
        **sizes, vocab_size=20, encoder_hidden_size=32, max_position_embeddings=16, projection_dim=32, pad_token_id=0,
        bos_token_id=START, eos_token_id=EOS, sep_token_id=EOS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        label_smoothing=0.0,
    ),
    vision_config=dict(**sizes, image_size=16, patch_size=8),
    projection_dim=32,
    image_text_hidden_size=32,
)  # fmt: skip
torch.manual_seed(0)
images = torch.randn(3, 3, 16, 16)
captions = torch.tensor([[START, 5, 6, 7, EOS], [START, 8, 9, 10, EOS], [START, 11, 12, 13, EOS]])
rows = [{"pixel_values": image, "input_ids": ids, "labels": ids} for image, ids in zip(images, captions)]


def trained(factor):
    """Captions and logged loss of BLIP after 150 steps on three captioned images, and its choice after each token."""
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(config)
    arguments = TrainingArguments(
        "out", max_steps=150, per_device_train_batch_size=3, learning_rate=5e-3, label_smoothing_factor=factor,
        logging_steps=50, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, log_level="error",
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    loss = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry][-1]
    model.eval()
    with torch.no_grad():
        choices = model(pixel_values=images, input_ids=captions).logits.argmax(-1)
    return model.generate(pixel_values=images, max_new_tokens=5).tolist(), loss, choices


generated, loss, choices = trained(0.0)
assert generated == captions.tolist() and loss < 0.1, (generated, loss)
assert torch.equal(choices[:, :-1], captions[:, 1:]), choices
generated, loss, choices = trained(0.1)
assert all(set(ids) == {START} for ids in generated), generated
assert torch.equal(choices, captions), choices
print(
    "BLIP trained on three captions with label_smoothing_factor 0 generates them; with .1 it learns to repeat the token"
    f" it has read (loss {loss:.2f}) and generates the start token alone"
)
PY
