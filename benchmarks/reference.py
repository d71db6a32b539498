"""The reference implementation that the benchmarks compare with: captioning as the course report did it, written plainly.

Each image is decoded whenever it is needed, every caption is padded to the longest of the dataset, the frozen encoder runs in
every step, the loss takes the logits of all tokens at once, and generation has no cache: each token is generated from the whole
prefix. The models are the same as showtell's, and so are losses and captions.
"""

import torch
from torch import nn
from transformers import VisionEncoderDecoderModel

from modeling import InceptionLSTMForConditionalGeneration


class CaptionDataset(torch.utils.data.Dataset):
    """(image, caption) pairs, decoded, resized and padded on access.

    Args:
        rows: Rows with `image` and `captions`, of which the first is used.
        processor: Image processor and tokenizer.
        longest: Number of tokens that every caption is padded to, EOS included.
    """

    def __init__(self, rows, processor, longest: int):
        self.rows, self.processor, self.longest = rows, processor, longest

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row, tokenizer = self.rows[index], self.processor.tokenizer
        pixels = self.processor(images=row["image"], return_tensors="pt")["pixel_values"][0]
        ids = [*tokenizer(row["captions"][0], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        padded = torch.full((self.longest,), -100)
        padded[: len(ids)] = torch.tensor(ids[: self.longest])
        return {"pixel_values": pixels, "labels": padded}


def lstm_logits(model: InceptionLSTMForConditionalGeneration, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Logits of each next token, (batch, length, vocabulary), from states (batch, positions, size) and `ids` (batch, length)."""
    image = model.image_projection(states.mean(1))  # (batch, image embedding)
    inputs = torch.cat([image.unsqueeze(1), model.token_embedding(ids)[:, 1:]], dim=1)
    outputs, _ = model.lstm(inputs)  # (batch, length, hidden)
    return model.lm_head(outputs)


def logits_of(model, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    if isinstance(model, VisionEncoderDecoderModel):
        return model.decoder(input_ids=ids, encoder_hidden_states=states, use_cache=False).logits
    return lstm_logits(model, states, ids)


def caption_loss(model, pixel_values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens, in nats, from pixels (batch, 3, height, width) and labels (batch, length)."""
    states = model.get_encoder()(pixel_values).last_hidden_state
    start = labels.new_full((len(labels), 1), model.config.decoder_start_token_id)
    ids = torch.cat([start, labels[:, :-1]], dim=1).clamp(min=0)  # padding has no label, so any token will do
    logits = logits_of(model, states, ids)  # (batch, length, vocabulary)
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def train_step(model, optimizer, pixel_values: torch.Tensor, labels: torch.Tensor) -> None:
    caption_loss(model, pixel_values, labels).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def generate(model, states: torch.Tensor, start_id: int, eos_id: int, pad_id: int, max_length: int) -> torch.Tensor:
    """Greedy captions, int64 (batch, length), start token first, from states (batch, positions, size); no cache."""
    ids = torch.full((len(states), 1), start_id, device=states.device)
    ended = torch.zeros(len(states), dtype=torch.bool, device=states.device)
    while ids.shape[1] < max_length and not ended.all():
        tokens = logits_of(model, states, ids)[:, -1].argmax(-1).masked_fill(ended, pad_id)  # (batch,)
        ended |= tokens == eos_id
        ids = torch.cat([ids, tokens.unsqueeze(1)], dim=1)
    return ids
