"""How sure a captioner is of what it generated, from one parallel pass of its decoder over a batch."""

import math
from inspect import signature

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


@torch.inference_mode()
def caption_confidences(
    model: PreTrainedModel, tokenizer, states: torch.Tensor, sequences: torch.Tensor, num_start: int
) -> list[dict]:
    """Probabilities of generated captions, the model's own, before any logits processor, by teacher forcing.

    Args:
        states: The encoder's, (batch, positions, size).
        sequences: int64 (batch, start tokens and caption), as `generate()` returns them.
        num_start: Number of start tokens.

    Returns:
        For each caption {"log_probability": of its tokens together, in nats, EOS included where it ended the caption;
        "confidence": the geometric mean of their probabilities; "least_sure_word": {"word", "probability"} of the least
        probable word, whose tokens count together, or None in a caption without a word}.
    """
    token_ids = sequences[:, num_start:]  # (batch, length)
    inputs = {"decoder_input_ids": sequences[:, :-1]}
    if "decoder_attention_mask" in signature(model.forward).parameters:
        # What pads a caption comes after all that counts; without a mask transformers warns of it.
        inputs["decoder_attention_mask"] = torch.ones_like(inputs["decoder_input_ids"])
    outputs = model(encoder_outputs=BaseModelOutput(last_hidden_state=states), **inputs)
    logits = outputs.logits[
        :, num_start - 1 :
    ].float()  # (batch, length, vocabulary): each predicted at the one before it
    chosen = logits.log_softmax(dim=-1).gather(2, token_ids[..., None])[..., 0]  # (batch, length)
    confidences = []
    for ids, logs in zip(token_ids.tolist(), chosen.tolist(), strict=True):
        end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
        total = sum(logs[: end + 1])
        words = [(sum(logs[place] for place in places), word) for word, places in word_texts(tokenizer, ids[:end])]
        least = min(words, default=None)
        confidences.append(
            {
                "log_probability": total,
                "confidence": math.exp(total / len(logs[: end + 1])),
                "least_sure_word": least and {"word": least[1], "probability": math.exp(least[0])},
            }
        )
    return confidences


def word_texts(tokenizer, token_ids: list[int]) -> list[tuple[str, list[int]]]:
    """The words of a caption, cut at its blanks, with the positions of their tokens."""
    words: list[tuple[str, list[int]]] = []
    for text, places in token_texts(tokenizer, token_ids):
        if words and not text[:1].isspace():
            words[-1] = (words[-1][0] + text, words[-1][1] + places)
        else:
            words.append((text, places))
    return [(word.strip(), places) for word, places in words if word.strip()]


def token_texts(tokenizer, token_ids: list[int]) -> list[tuple[str, list[int]]]:
    """The text each token adds to a caption, blanks included, with its position; together they are the decoded caption.

    A character may be cut over several tokens, or change one before it: such tokens come as one, with all their positions.
    """
    pieces, places = [], []
    for place in range(len(token_ids)):
        places.append(place)
        text = tokenizer.decode(token_ids[: place + 1], skip_special_tokens=True)
        while not text.startswith("".join(piece for piece, _ in pieces)):  # half a character stood there
            places = pieces.pop()[1] + places
        if added := text[sum(len(piece) for piece, _ in pieces) :]:
            pieces.append((added, places))
            places = []
    return pieces
