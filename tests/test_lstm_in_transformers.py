"""The LSTM captioner does what transformers, peft, accelerate and torch expect of a model."""

import copy

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from small_captioners import IMAGES, build
from torch.nn.parallel import scatter_gather
from torch.utils import _pytree
from transformers import Trainer, TrainingArguments

from modeling import InceptionLSTMForConditionalGeneration, LSTMState
from modeling.modeling_inception_lstm import TimmEncoder
from modeling.transformers_versions import CACHE

CAPTIONS = ["red", "a green dog", "the blue cat sits", "a small cat", "big"]
KINDS = pytest.mark.parametrize("prompt", ["", "attention"], ids=["plain", "attention"])


def build_lstm(prompt: str = "") -> tuple:
    captioner = build("lstm", prompt)
    return captioner.model, captioner.processor


def batch_of(processor) -> dict:
    encoded = processor.tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    labels = encoded.input_ids.masked_fill(encoded.attention_mask == 0, -100)
    return {"pixel_values": processor(images=IMAGES, return_tensors="pt")["pixel_values"], "labels": labels}


@pytest.mark.slow
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_transformers_own_trainer_trains_evaluates_and_keeps_the_best(tmp_path, label_smoothing):
    model, processor = build_lstm()
    batch = batch_of(processor)
    rows = [{name: values[row] for name, values in batch.items()} for row in range(len(CAPTIONS))]
    seen = []

    def collate(rows: list[dict]) -> dict:
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return batch | {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])}

    def compute_metrics(prediction) -> dict:
        seen.append((prediction.predictions.shape, prediction.label_ids.shape))
        guesses = np.argmax(prediction.predictions, axis=-1)
        return {"accuracy": float((guesses == prediction.label_ids)[prediction.label_ids != -100].mean())}

    arguments = TrainingArguments(
        output_dir=tmp_path,
        num_train_epochs=3,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=5,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        label_smoothing_factor=label_smoothing,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
    )
    trainer = Trainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=compute_metrics,
        processing_class=processor.tokenizer,
    )
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 3
    assert trainer.state.best_metric == max(entry["eval_accuracy"] for entry in evaluations)
    assert seen[0] == ((5, 5, model.config.vocab_size), (5, 5))
    kept = trainer.evaluate()["eval_accuracy"]
    assert kept == trainer.state.best_metric
    if not label_smoothing:  # the Trainer's own smoothing has another loss
        assert trainer.evaluate()["eval_loss"] == pytest.approx(model.eval()(**batch).loss.item(), rel=1e-5)


@KINDS
def test_the_head_is_called_where_it_is_more_than_its_weight(prompt):
    """Offloaded weights are loaded by the call, an adapter adds to it, hooks see it."""
    from peft import LoraConfig, inject_adapter_in_model

    model, processor = build_lstm(prompt)
    batch = batch_of(processor)
    expected = model(**batch).loss
    offloaded = cpu_offload(copy.deepcopy(model), torch.device("cpu"))
    torch.testing.assert_close(offloaded(**batch, skip_logits=True).loss, expected)

    calls = []
    handle = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model(**batch, skip_logits=True).loss, expected)
    handle.remove()
    assert len(calls) == 1

    adapted = inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False), copy.deepcopy(model)
    )
    loss = adapted(**batch, skip_logits=True).loss
    assert abs(loss - expected) > 1e-3
    loss.backward()
    grads = [value.grad for name, value in adapted.named_parameters() if "lora" in name]
    assert grads and all(grad.abs().max() > 0 for grad in grads)


@KINDS
@pytest.mark.parametrize(
    "lost",
    ["encoder.backbone.conv_stem.weight", "encoder.backbone.bn1.running_var", "lstm.weight_hh_l0", "lm_head.bias"],
)
def test_missing_weights_are_initialized_and_the_others_are_not(tmp_path, prompt, lost):
    model, _ = build_lstm(prompt)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    value = weights.pop(lost)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    torch.manual_seed(7)
    loaded, report = InceptionLSTMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {lost}
    state = loaded.state_dict()
    assert all(torch.equal(state[name], kept) for name, kept in weights.items())
    new = state[lost]
    if lost.endswith("running_var"):
        assert torch.equal(new, torch.ones_like(new))
    elif lost.endswith("bias"):
        assert torch.equal(new, torch.zeros_like(new))
    else:  # of the size that an initialization has
        assert new.isfinite().all() and 0 < new.std() < 1 and not torch.equal(new, value)


@KINDS
def test_outputs_are_what_their_options_and_the_config_ask_for(prompt):
    model, processor = build_lstm(prompt)
    batch = batch_of(processor)
    outputs = model(**batch, output_hidden_states=True, output_attentions=True, use_cache=True)
    hidden = outputs.decoder_hidden_states
    assert all(states.shape == (5, 5, 32) for states in hidden) and len(hidden) == (3 if prompt else 2)
    torch.testing.assert_close(model.lm_head(hidden[-1]), outputs.logits)
    assert (outputs.cross_attentions is not None) == bool(prompt)
    as_tuple = model(**batch, output_hidden_states=True, output_attentions=True, use_cache=True, return_dict=False)
    assert len(as_tuple) == len(outputs.to_tuple())
    assert torch.equal(as_tuple[0], outputs.loss) and torch.equal(as_tuple[1], outputs.logits)
    model.config.output_hidden_states, model.config.output_attentions = True, True
    by_config = model(**batch)
    assert by_config.decoder_hidden_states is not None and (by_config.cross_attentions is not None) == bool(prompt)
    model.config.return_dict = False
    assert isinstance(model(**batch), tuple)


def test_in_training_the_logits_are_skipped_and_in_evaluation_on_request():
    model, processor = build_lstm()
    batch = batch_of(processor)
    assert model.eval()(**batch).logits is not None and model(**batch, skip_logits=True).logits is None
    assert model.train()(**batch).logits is None and model(**batch, skip_logits=False).logits is not None


@KINDS
def test_generation_goes_on_from_a_state_and_decodes_no_token_twice(prompt):
    model, processor = build_lstm(prompt)
    pixels = batch_of(processor)["pixel_values"]
    whole = model.generate(pixel_values=pixels, max_length=9, eos_token_id=None)
    state = model(pixel_values=pixels, decoder_input_ids=whole[:, :4])[CACHE]
    given = {"pixel_values": pixels, "decoder_input_ids": whole[:, :5], "max_length": 9, "eos_token_id": None}
    assert torch.equal(model.generate(**{CACHE: state}, **given), whole)
    state = model(pixel_values=pixels, decoder_input_ids=whole[:, :5])[CACHE]
    with pytest.raises(ValueError, match="has decoded all 5 tokens"):
        model.generate(**{CACHE: state}, **given)


@pytest.mark.slow
@KINDS
def test_a_state_is_a_tree_of_tensors_and_the_model_can_be_exported(prompt):
    model, processor = build_lstm(prompt)
    batch = batch_of(processor)
    inputs = {"pixel_values": batch["pixel_values"], "decoder_input_ids": batch["labels"].clamp(min=0)}
    outputs = model(**inputs)
    state = outputs[CACHE]
    doubled = _pytree.tree_map(lambda value: 2 * value, state)
    assert isinstance(doubled, LSTMState) and torch.equal(doubled.hidden, 2 * state.hidden)
    exported = torch.export.export(model, (), inputs).module()(**inputs)
    torch.testing.assert_close(exported.logits, outputs.logits)
    torch.testing.assert_close(exported[CACHE].hidden, state.hidden)


@KINDS
def test_outputs_of_several_devices_are_put_together(monkeypatch, prompt):
    """By `DataParallel`, whose gathering alone is run: it joins tensors of GPUs, here of halves of a batch."""

    class Join:
        @staticmethod
        def apply(target, dim, *parts):
            return torch.cat(parts, dim)

    monkeypatch.setattr(scatter_gather, "Gather", Join)
    model, processor = build_lstm(prompt)
    batch = batch_of(processor)
    inputs = {"pixel_values": batch["pixel_values"], "decoder_input_ids": batch["labels"].clamp(min=0)}
    halves = [{name: values[part] for name, values in inputs.items()} for part in (slice(0, 2), slice(2, 5))]
    gathered = scatter_gather.gather([model(**half) for half in halves], "cpu")
    whole = model(**inputs)
    torch.testing.assert_close(gathered.logits, whole.logits)
    token = torch.full((5, 1), 7)
    torch.testing.assert_close(
        *(model(decoder_input_ids=token, **{CACHE: outputs[CACHE]}).logits for outputs in (gathered, whole))
    )
    assert gathered[CACHE].num_tokens == whole[CACHE].num_tokens


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model, x: model(pixel_values=x), "labels"),
        (lambda model, x: model(decoder_input_ids=torch.ones(1, 2, dtype=torch.int64)), "pixel_values"),
        (lambda model, x: model.generate(), "pixel_values"),
        (lambda model, x: model.generate(x[0]), "pixel_values"),
        (lambda model, x: model.generate(pixel_values=x, prompt_lookup_num_tokens=2), "assisted"),
        (lambda model, x: model.generate(pixel_values=x, assistant_model=model), "assisted"),
    ],
)
def test_a_call_that_cannot_be_done_is_refused_in_a_sentence(call, words):
    model, _ = build_lstm()
    with pytest.raises(ValueError, match=words):
        call(model, torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("size", [30, 12])
def test_the_vocabulary_can_be_resized(tmp_path, size):
    model, processor = build_lstm()
    before = model.lm_head.weight.clone(), model.lm_head.bias.clone(), model.token_embedding.weight.clone()
    model.resize_token_embeddings(size)
    kept = min(size, len(before[1]))
    after = model.lm_head.weight, model.lm_head.bias, model.token_embedding.weight
    for old, new in zip(before, after, strict=True):
        assert len(new) == size and torch.equal(new[:kept], old[:kept])
    model.save_pretrained(tmp_path)
    loaded = InceptionLSTMForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == size and loaded.lm_head.out_features == size
    embedding = torch.nn.Embedding(size, 32)
    model.set_input_embeddings(embedding)
    assert model.get_input_embeddings() is embedding
    pixels = batch_of(processor)["pixel_values"]
    assert model(pixels, torch.ones(5, 2, dtype=torch.int64)).logits.shape == (5, 2, size)


@pytest.mark.parametrize(
    ("name", "order"), [("repvgg_a0", "contiguous"), ("mobileone_s0", "contiguous"), ("test_resnet", "last")]
)
def test_memory_order_is_plain_where_a_one_by_one_convolution_of_the_image_is_trained(name, order):
    """Asked of the encoder, which is not run: on a CPU torch 2.14 does not come back from the other order."""
    with torch.device("meta"):
        encoder = TimmEncoder(name)
    cpu, last, plain = torch.device("cpu"), torch.channels_last, torch.contiguous_format
    assert encoder.memory_format(cpu) == (plain if order == "contiguous" else last)
    assert encoder.memory_format(torch.device("cuda")) == last
    with torch.no_grad():
        assert encoder.memory_format(cpu) == last
    encoder.requires_grad_(False)
    assert encoder.memory_format(cpu) == last
