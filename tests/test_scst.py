"""Laws of self-critical training: the gradient is the exact one, the optimum is found, and the script keeps its promises."""

import copy
import itertools
import json
import math
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import kill_points
import numpy as np
import pytest
import torch
from kill_points import SCRIPTS, differences, log_of, run_together, what_is_left
from safetensors.torch import load_file, save_file
from small_captioners import IMAGES, build
from transformers import (
    BertConfig,
    MinLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)
from transformers.modeling_outputs import BaseModelOutput

import train_lstm
import train_scst
import train_vit_gpt2
from metrics import CaptionScorer, CiderD
from modeling import InceptionLSTMConfig, InceptionLSTMForConditionalGeneration
from modeling.captioner import Captioner
from modeling.vit_gpt2 import build_vit_gpt2, decoder_config, encoder_config
from system.errors import UserError
from training import checkpoints, self_critical
from training.arguments import DataArguments, parse_recipe
from training.sampling import (
    UNCONSTRAINED,
    InverseCDFSampling,
    SamplingConstraints,
    caption_log_probs,
    plain_decoding,
    sample_captions,
    sampling_numbers,
    set_sampling_mode,
)
from training.self_critical import SelfCriticalLoss, advantages, logit_adjustments

ROOT = Path(__file__).parent.parent
KINDS = ("lstm", "vit_gpt2")
EOS = 1  # of the smallest captioners, whose tokens are start, EOS and two words


def options(rules: SamplingConstraints = UNCONSTRAINED, **given) -> SimpleNamespace:
    plain = {"num_samples": 2, "baseline": "leave_one_out", "bleu_weight": 0.0, "rouge_weight": 0.0}
    plain |= {"kl_coef": 0.0, "xe_weight": 0.0, "dropout": 0.0}
    plain |= {f"sample_{name}": value for name, value in rules._asdict().items()}
    return SimpleNamespace(**plain | given)


# ------------------------------------------------------------------------------------------------- the gradient


def smallest(kind: str) -> tuple[Captioner, torch.Tensor]:
    """A captioner of four tokens that generates two at most, with dropout, and encoder states of one image."""
    torch.manual_seed(0)
    if kind == "lstm":
        sizes = {"vocab_size": 4, "image_embed_dim": 8, "hidden_size": 8, "num_hidden_layers": 2, "dropout": 0.5}
        ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": EOS}
        config = InceptionLSTMConfig(encoder_name="test_efficientnet", attention=True, **sizes, **ids)
        model = InceptionLSTMForConditionalGeneration(config)
        states = torch.randn(1, 4, model.encoder.output_size)
    else:
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}

        class Tokenizer:
            bos_token_id, eos_token_id, pad_token_id = 0, EOS, EOS

            def __len__(self):
                return 4

            def __call__(self, prompt, **_):
                return SimpleNamespace(input_ids=[2])

        tokenizer = Tokenizer()
        model = build_vit_gpt2(
            encoder_config(32, 16, **sizes), decoder_config(4, **sizes), tokenizer, prompt="a", dropout=0.5
        )
        states = torch.randn(1, 5, 8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("encoder.") and parameter.ndim > 1:
                parameter.normal_(std=0.5)
    model.get_encoder().requires_grad_(False)
    model.generation_config.update(max_length=2 + (1 if kind == "lstm" else 2))
    set_sampling_mode(model)
    return Captioner(model, None), states


ALL_CAPTIONS = [[EOS], *([first, second] for first in (0, 2, 3) for second in range(4))]


def under_rules(
    read: torch.Tensor, scores: torch.Tensor, rules: SamplingConstraints, num_start: int, eos: int
) -> torch.Tensor:
    """Scores (rows, vocabulary) of what follows on the tokens `read`, under transformers' own rules."""
    scores = MinLengthLogitsProcessor(rules.min_length + num_start, eos)(read, scores)
    size = rules.no_repeat_ngram_size
    return NoRepeatNGramLogitsProcessor(size)(read, scores) if size else scores


def exact_log_probs(captioner: Captioner, states: torch.Tensor, rules: SamplingConstraints) -> torch.Tensor:
    """Of all captions there are, token after token, by the model's own logits."""
    model, start = captioner.model, captioner.start_token_ids
    log_probs = []
    for caption in ALL_CAPTIONS:
        total = 0.0
        for place, token in enumerate(caption):
            read = torch.tensor([[*start, *caption[:place]]])
            outputs = model(encoder_outputs=BaseModelOutput(last_hidden_state=states), decoder_input_ids=read)
            scores = under_rules(read, outputs.logits[:, -1], rules, len(start), EOS)
            total = total + scores.log_softmax(-1)[0, token]
        log_probs.append(total)
    return torch.stack(log_probs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "baseline", "kl_coef", "share", "rules"),
    [
        ("lstm", "leave_one_out", 0.0, 0.0, SamplingConstraints()),
        ("vit_gpt2", "leave_one_out", 0.3, 0.25, SamplingConstraints(min_length=1)),
        ("lstm", "greedy", 0.3, 0.25, SamplingConstraints()),
        ("lstm", "leave_one_out", 0.0, 0.25, SamplingConstraints(min_length=2)),
        ("vit_gpt2", "leave_one_out", 0.3, 0.0, SamplingConstraints(no_repeat_ngram_size=1)),
    ],
)
def test_the_mean_gradient_over_all_samples_is_that_of_the_expected_reward(kind, baseline, kl_coef, share, rules):
    """All captions of two tokens at most are counted out, and all pairs of samples."""
    captioner, states = smallest(kind)
    model, start = captioner.model, Captioner(copy.deepcopy(captioner.model), None)
    with torch.no_grad():
        for parameter in start.model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    rewards = 10 * torch.rand(len(ALL_CAPTIONS))
    reference = [2, 3]
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    log_probs = exact_log_probs(captioner, states, rules)
    assert log_probs.exp().sum().item() == pytest.approx(1, abs=1e-5)
    possible = [place for place in range(len(ALL_CAPTIONS)) if log_probs[place] > -torch.inf]
    assert (len(possible) < len(ALL_CAPTIONS)) == any(rules)
    log_probs, rewards = log_probs[possible], rewards[possible]
    from_start = log_probs - exact_log_probs(start, states, rules)[possible].detach()
    expected = (log_probs.exp() * (rewards - kl_coef * from_start)).sum()
    cross_entropy = -exact_log_probs(captioner, states, SamplingConstraints())[ALL_CAPTIONS.index(reference)]
    exact = share * cross_entropy - (1 - share) * expected
    gradients = torch.autograd.grad(exact, list(learning.values()), allow_unused=True)

    criterion = SelfCriticalLoss(
        captioner,
        None,
        options(rules, baseline=baseline, kl_coef=kl_coef, xe_weight=share),
        seed=0,
        ref_model=start.model if kl_coef else None,
    )
    greedy = torch.tensor([rewards[0]]) if baseline == "greedy" else None
    references = [reference] if share else []
    probabilities = log_probs.exp().detach()
    for first, second in itertools.combinations_with_replacement(range(len(possible)), 2):
        captions = [ALL_CAPTIONS[possible[first]], ALL_CAPTIONS[possible[second]]]
        loss, _ = criterion.loss_of(model, states, captions, rewards[[first, second]][None], greedy, references)
        weight = probabilities[first] * probabilities[second] * (1 if first == second else 2)
        (weight * loss).backward()
    largest = max(gradient.abs().max() for gradient in gradients if gradient is not None)
    assert largest > 0.1
    for (name, parameter), gradient in zip(learning.items(), gradients, strict=True):
        if gradient is not None:
            assert (parameter.grad - gradient).abs().max() < 1e-5 * largest, name


def test_a_baseline_never_hangs_on_the_sample_itself():
    rewards = torch.rand(3, 4, dtype=torch.float64)
    higher = rewards.clone()
    higher[1, 2] += 5
    for greedy in (None, torch.rand(3, dtype=torch.float64)):
        gain = advantages(higher, greedy)[1, 2] - advantages(rewards, greedy)[1, 2]
        assert gain.item() == pytest.approx(5)
    assert advantages(rewards).sum(dim=1).tolist() == pytest.approx([0, 0, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_on_where_it_learns_and_nowhere_else(kind):
    captioner, states = smallest(kind)
    model = captioner.model
    samples, rewards = [[2, 3], [3, EOS]], torch.tensor([[1.0, 0.0]])

    def gradients(share: float) -> list[torch.Tensor]:
        criterion = SelfCriticalLoss(captioner, None, options(dropout=share), seed=0)
        return [
            torch.autograd.grad(
                criterion.loss_of(model, states, samples, rewards)[0], model.get_output_embeddings().weight
            )[0]
            for _ in range(2)
        ]

    before = [(module.p, module.training) for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    plain, dropped = gradients(0.0), gradients(0.5)
    assert torch.equal(*plain) and not torch.equal(*dropped)
    assert before == [(module.p, module.training) for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert torch.equal(plain[0], gradients(0.0)[0])


def test_a_reward_adds_bleu_and_rouge_by_their_weights():
    references = [["a dog runs on the grass"], ["two birds sing on a wire"]]
    texts = {2: "a dog runs on a wire", 3: "birds sing"}
    processor = SimpleNamespace(batch_decode=lambda captions, **_: [texts[caption[0]] for caption in captions])
    captions, images = [[2, EOS], [3, EOS]], [0, 1]

    def rewards(**weights) -> torch.Tensor:
        criterion = SelfCriticalLoss(
            Captioner(smallest("lstm")[0].model, processor), CiderD(references), options(**weights), seed=0
        )
        return criterion.rewards(captions, images, [0, 0]).double()

    scores = [CaptionScorer([references[image]]).score([texts[image + 2]]) for image in images]
    added = rewards(bleu_weight=3.0, rouge_weight=5.0) - rewards()
    assert added.tolist() == pytest.approx([3 * score["bleu_4"] + 5 * score["rouge_l"] for score in scores], abs=1e-5)


def test_what_is_left_in_a_mirror_image_is_right_in_the_references(monkeypatch):
    """Of two samples, "left" and "right", the one that the reference has is the better one, or its mirror image."""
    captioner, states = smallest("lstm")
    texts = {2: "a dog left of a cat", 3: "a dog right of a cat"}
    processor = SimpleNamespace(batch_decode=lambda captions, **_: [texts[caption[0]] for caption in captions])
    monkeypatch.setattr(self_critical, "sample_captions", lambda *_: [[2, EOS], [3, EOS]])
    cider = CiderD([["a dog left of a cat"], ["two birds sing"]], count_end=True)
    of_rows = [[[[2, EOS]], [[3, 3]]], [[[3, EOS]], [[3, 3]]]]  # of the images, of their mirror images
    token_ids = [SimpleNamespace(of_row=captions.__getitem__) for captions in of_rows]
    captioner = Captioner(captioner.model, processor)
    criterion = SelfCriticalLoss(
        captioner, cider, options(xe_weight=0.5), seed=0, token_ids=token_ids, num_augmentations=2
    )
    given = []
    monkeypatch.setattr(criterion, "loss_of", lambda *values: (given.append(values), (torch.tensor(0.0), 0.0))[1])
    batch = {"index": torch.tensor([0]), "encoder_outputs": BaseModelOutput(last_hidden_state=states)}
    for epoch in (0, 1):
        criterion.loss(captioner.model, batch, epoch)
    (_, _, _, rewards, _, references), (_, _, _, mirrored_rewards, _, mirrored_references) = given
    assert rewards[0, 0] > 9.9 and rewards[0, 1] < 9
    assert torch.equal(mirrored_rewards, rewards.flip(1))
    assert references == [[2, EOS]] and mirrored_references == [[3, EOS]]


# --------------------------------------------------------------------------------------- samples, probabilities


@pytest.mark.parametrize("rules", [SamplingConstraints(), SamplingConstraints(no_repeat_ngram_size=2, min_length=2)])
@pytest.mark.parametrize(("kind", "prompt"), [("lstm", "attention"), ("vit_gpt2", ""), ("vit_gpt2", "a red")])
def test_a_captions_probability_is_what_generate_says_token_by_token(kind, prompt, rules, monkeypatch):
    """EOS included, and nothing of what stands behind it; also where the scores are held a few tokens at a time."""
    captioner = build(kind, prompt)
    model, processor = captioner.model, captioner.processor
    set_sampling_mode(model)
    with torch.no_grad():
        states = model.get_encoder()(processor(images=IMAGES, return_tensors="pt")["pixel_values"]).last_hidden_state
        torch.manual_seed(1)
        shortest = rules.min_length + len(captioner.start_token_ids)
        sampling = {"do_sample": True, "top_k": 0, "num_return_sequences": 12, "min_length": shortest}
        with plain_decoding(model, **sampling, no_repeat_ngram_size=rules.no_repeat_ngram_size):
            made = model.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=states),
                return_dict_in_generate=True,
                output_scores=True,
            )
    first = made.sequences.shape[1] - len(made.scores)
    scores = torch.stack(made.scores, dim=1).log_softmax(-1)  # (captions, tokens, vocabulary)
    captions, expected = [], []
    for words, of_caption in zip(made.sequences[:, first:].tolist(), scores, strict=True):
        length = words.index(2) + 1 if 2 in words else len(words)
        captions.append(words[:length])
        expected.append(of_caption[range(length), words[:length]].sum())
    ended = [caption[-1] == 2 for caption in captions]
    assert any(ended) and not all(ended) and len(set(map(len, captions))) > 1
    image_index = [place for place in range(len(IMAGES)) for _ in range(12)]
    whole = caption_log_probs(model, captioner, states, captions, image_index, [rules] * len(captions))
    assert torch.allclose(whole, torch.stack(expected), atol=1e-4)
    gradient = torch.autograd.grad(whole.sum(), model.get_output_embeddings().weight)[0]
    monkeypatch.setattr("modeling.caption_loss.MAX_LOGITS_PER_CHUNK", 7 * 18)
    parts = caption_log_probs(model, captioner, states, captions, image_index, [rules] * len(captions))
    assert torch.allclose(parts, whole, atol=1e-5)
    assert torch.allclose(
        torch.autograd.grad(parts.sum(), model.get_output_embeddings().weight)[0], gradient, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_number_draws_each_token_as_often_as_it_is_likely(dtype):
    torch.manual_seed(0)
    scores = 2 * torch.randn(1, 12)
    scores[0, [3, 11]] = -torch.inf
    numbers = (torch.arange(10_000, dtype=torch.float64) + 0.5)[:, None] / 10_000
    drawn = InverseCDFSampling(numbers.to(dtype), 1)(
        torch.zeros(10_000, 1, dtype=torch.int64), scores.expand(10_000, -1)
    )
    assert ((drawn == 0).sum(dim=1) == 1).all() and ((drawn == -torch.inf).sum(dim=1) == 11).all()
    shares = (drawn == 0).double().mean(dim=0)
    assert torch.allclose(shares, scores[0].double().softmax(-1), atol=1.1e-4)
    last = InverseCDFSampling(torch.ones(1, 1, dtype=dtype), 1)(torch.zeros(1, 1, dtype=torch.int64), scores)
    assert last.argmax() == 10  # not 11, which is never said


@pytest.mark.parametrize("kind", KINDS)
def test_samples_hang_on_seed_epoch_and_image_and_on_no_saved_rule(kind):
    captioner = build(kind)
    model, processor = captioner.model, captioner.processor
    set_sampling_mode(model)
    with torch.no_grad():
        states = model.get_encoder()(processor(images=IMAGES, return_tensors="pt")["pixel_values"]).last_hidden_state
    numbers = sampling_numbers(7, 3, range(5), 4, 9)
    together = sample_captions(captioner, states, numbers)
    model.generation_config.update(no_repeat_ngram_size=1, num_beams=3, min_length=8, repetition_penalty=5.0, top_k=2)
    assert sample_captions(captioner, states, numbers) == together
    assert model.generation_config.num_beams == 3 and model.generation_config.no_repeat_ngram_size == 1
    alone = sample_captions(captioner, states[3:4], sampling_numbers(7, 3, [3], 4, 9))
    assert alone == together[12:16]
    for seed, epoch in ((7, 4), (8, 3)):
        assert sample_captions(captioner, states, sampling_numbers(seed, epoch, range(5), 4, 9)) != together
    # Token by token: the first whose cumulative probability is above its number.
    outputs = BaseModelOutput(last_hidden_state=states[3:4])
    start = captioner.start_token_ids
    for sample, row in zip(alone, sampling_numbers(7, 3, [3], 4, 9).numpy(), strict=True):
        assert sample[-1] == 2 or len(sample) == model.generation_config.max_length - len(start)
        for place, token in enumerate(sample):
            read = torch.tensor([[*start, *sample[:place]]])
            logits = model(encoder_outputs=outputs, decoder_input_ids=read).logits[0, -1]
            assert token == np.searchsorted(logits.double().softmax(-1).cumsum(-1).detach().numpy(), row[place])


@pytest.mark.parametrize("rules", [SamplingConstraints(), SamplingConstraints(no_repeat_ngram_size=2, min_length=2)])
@pytest.mark.parametrize(("kind", "prompt"), [("lstm", "attention"), ("vit_gpt2", ""), ("vit_gpt2", "a red")])
def test_a_sample_ends_with_eos_or_at_the_longest(kind, prompt, rules):
    """What is drawn by the model's own scores, one token after the other, is said to its first EOS or to the longest length."""
    captioner = build(kind, prompt)
    model, processor = captioner.model, captioner.processor
    set_sampling_mode(model)
    eos, start = model.generation_config.eos_token_id, captioner.start_token_ids
    longest = model.generation_config.max_length - len(start)
    with torch.no_grad():
        states = model.get_encoder()(processor(images=IMAGES, return_tensors="pt")["pixel_values"]).last_hidden_state
        numbers = sampling_numbers(7, 3, range(5), 6, longest)
        samples = sample_captions(captioner, states, numbers, rules)
        rows = torch.tensor([[*start]] * 30)
        for place in range(longest):
            outputs = BaseModelOutput(last_hidden_state=states.repeat_interleave(6, dim=0))
            scores = model(encoder_outputs=outputs, decoder_input_ids=rows).logits[:, -1]
            scores = under_rules(rows, scores, rules, len(start), eos)
            cumulative = scores.double().softmax(-1).cumsum(-1)
            rows = torch.cat([rows, torch.searchsorted(cumulative, numbers[:, [place]], right=True)], dim=1)
    criterion = SelfCriticalLoss(captioner, None, options(), seed=0)
    for sample, row in zip(samples, rows[:, len(start) :].tolist(), strict=True):
        length = row.index(eos) + 1 if eos in row else longest
        assert sample == row[:length] and criterion.has_ended(sample) == (eos in row)
    kinds = {(criterion.has_ended(sample), len(sample) == longest) for sample in samples}
    assert kinds >= {(True, False), (False, True)}  # both came up


# -------------------------------------------------------------------------------------------------- the optimum

BEST = ["a red dog runs", "green cat sits", "the blue dog", "small cat under it", "big dog sits on it"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_best_caption_is_found(kind):
    """It knows five captions and not which is whose; by the reward alone each image gets its own, from beginning to end."""
    captioner = build(kind)
    model, processor = captioner.model, captioner.processor
    model.get_encoder().requires_grad_(False)
    size = model.encoder.output_size if kind == "lstm" else 32
    states = torch.randn(5, 1, size, generator=torch.Generator().manual_seed(0))
    set_sampling_mode(model)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def learn(loss_of_step, num_steps: int, learning_rate: float) -> None:
        optimizer = torch.optim.AdamW(learning, lr=learning_rate, weight_decay=0)
        for step in range(num_steps):
            loss_of_step(step).backward()
            optimizer.step()
            optimizer.zero_grad()

    everybodys = processor.tokenizer(BEST).input_ids * 5
    learn(lambda _: -caption_log_probs(model, captioner, states, everybodys, np.repeat(range(5), 5)).mean(), 60, 1e-2)
    cider = CiderD([[best] for best in BEST], count_end=True)
    criterion = SelfCriticalLoss(captioner, cider, options(num_samples=20), seed=0)
    batch = {"index": torch.arange(5), "encoder_outputs": BaseModelOutput(last_hidden_state=states)}
    sums = criterion.loss(model, batch, 0)[1]
    reward, num_samples = sums["reward"], sums["samples"]
    assert (
        num_samples == 100 and reward / num_samples < 3
    )  # one in five is its own, and worth 10, or 7.5 with three words
    learn(lambda step: criterion.loss(model, batch, step)[0] / 5, 30, 5e-3)
    captions = sample_captions(captioner, states, None)
    assert processor.batch_decode(captions, skip_special_tokens=True) == BEST
    assert all(caption[-1] == 2 for caption in captions)


# --------------------------------------------------------------------------------------------------- the script

# 24 images in steps of 8, evaluated inside the epochs and at their ends: after steps 0, 2, 3, 4 and 6.
SMALL = [
    *("--num_train_epochs", "2", "--per_device_train_batch_size", "8", "--num_samples", "3", "--eval_steps", "2"),
    *("--learning_rate", "3e-3", "--early_stopping_patience", "9", "--max_length", "14"),
    *("--num_augmentations", "2"),
]
MAINS = {"lstm": train_lstm.main, "vit_gpt2": train_vit_gpt2.main}


@pytest.fixture(scope="module")
def started(small_scenes, tmp_path_factory) -> dict[str, Path]:
    """Captioners of either kind that have learned a little."""
    folders = {}
    for kind, main in MAINS.items():
        folders[kind] = tmp_path_factory.mktemp("started") / kind
        main(
            [
                *(*SCRIPTS[f"train_{kind}"], "--dataset_name", small_scenes, "--output_dir", str(folders[kind])),
                *("--num_train_epochs", "4", "--per_device_train_batch_size", "24", "--learning_rate", "1e-2"),
                *("--train_sampling_strategy", "group_by_image", "--report_to", "none"),
                *("--eval_epochs", "4", "--save_epochs", "4"),
            ]
        )
    return folders


def scst(start: Path, dataset: str, folder: Path, *given: str) -> list[dict]:
    """Run the script small, in this process, and give its history."""
    arguments = [
        "--model_name_or_path",
        str(start),
        "--dataset_name",
        dataset,
        "--output_dir",
        str(folder),
        *SMALL,
        *given,
    ]
    train_scst.main(arguments)
    return json.loads((folder / "history.json").read_text())


@pytest.fixture(scope="module")
def whole(started, small_scenes, tmp_path_factory) -> dict[str, Path]:
    """An undisturbed run of each kind, with a checkpoint after each step."""
    folders = {kind: tmp_path_factory.mktemp("whole") / kind for kind in KINDS}
    for kind, folder in folders.items():
        scst(started[kind], small_scenes, folder, "--save_steps", "1")
    return folders


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_what_the_contract_says(kind, whole, started):
    folder = whole[kind]
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "results.json", "captions.jsonl", "captions.html"} <= names
    assert {"README.md", "curves.png", "history.json", "logs", *(f"checkpoint-{step}" for step in range(1, 7))} <= names
    assert not [name for name in names if name.startswith(".") and name != ".lock"]
    history = json.loads((folder / "history.json").read_text())
    assert [(row["epoch"], row["step"]) for row in history] == [(0, 0), (0.6667, 2), (1, 3), (1.3333, 4), (2, 6)]
    assert {"cider", "bleu_4", "rouge_l", "shuffled_cider", "unique_words", "eval_loss"} <= history[0].keys()
    assert all({"reward", "sample_length", "sample_ended", "cider"} <= row.keys() for row in history[1:])
    # What stands at step 0 is the captioner it started from.
    before = json.loads((started[kind] / "history.json").read_text())[-1]
    assert history[0]["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-4)
    results = json.loads((folder / "results.json").read_text())
    assert results["train"]["epochs"] == 2 and results["train"]["images_per_second"] > 0
    card = (folder / "README.md").read_text()
    assert started[kind].name.replace("_", r"\_") in card and "1612.00563" in card
    # The encoder is what it was, to the bit.
    weights, first = (
        load_file(folder / "checkpoint-6" / "model.safetensors"),
        load_file(started[kind] / "model.safetensors"),
    )
    encoder = [name for name in first if name.startswith("encoder.")]
    assert encoder and all(torch.equal(weights[name], first[name]) for name in encoder if name in weights)
    assert any(not torch.equal(value, weights[name]) for name, value in first.items() if name in weights)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_goes_on_ends_on_every_bit_of_an_undisturbed_one(kind, whole, started, small_scenes, tmp_path):
    """From a checkpoint inside an epoch, before the evaluation in it."""
    shutil.copytree(whole[kind], tmp_path / kind)
    for step in range(2, 7):
        shutil.rmtree(tmp_path / kind / f"checkpoint-{step}")
    shutil.copy(started[kind] / "model.safetensors", tmp_path / kind)  # the best after the first step
    scst(started[kind], small_scenes, tmp_path / kind, "--save_steps", "1", "--resume_from_checkpoint", "last")
    assert not differences(what_is_left(tmp_path / kind), what_is_left(whole[kind]))


def test_sigterm_saves_and_leaves(whole, started, small_scenes, tmp_path, monkeypatch):
    """In the fifth step, after which no checkpoint is due."""
    plain, steps = torch.optim.AdamW.step, []

    def interrupted(optimizer, *arguments, **given):
        steps.append(1)
        if len(steps) == 5:
            signal.raise_signal(signal.SIGTERM)
        return plain(optimizer, *arguments, **given)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    with pytest.raises(SystemExit) as stopped:
        scst(started["lstm"], small_scenes, tmp_path / "lstm")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert {path.name for path in (tmp_path / "lstm").glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-5"}
    time.sleep(1)  # TensorBoard reads files in the order of their names, in which those of one second stand anyhow
    scst(started["lstm"], small_scenes, tmp_path / "lstm", "--resume_from_checkpoint", "last")
    left, expected = what_is_left(tmp_path / "lstm"), what_is_left(whole["lstm"])
    for name in ("weights", "history", "captions", "curve"):
        assert not differences(left[name], expected[name], name)


def test_two_processes_give_the_weights_of_one_with_the_double_batch(whole, started, small_scenes, tmp_path):
    """Each samples for its images what one process samples for them."""
    arguments = [
        "--model_name_or_path",
        str(started["lstm"]),
        "--dataset_name",
        small_scenes,
        "--output_dir",
        str(tmp_path / "two"),
        *SMALL,
    ]
    arguments += ["--per_device_train_batch_size", "4", "--report_to", "none"]
    codes = run_together(kill_points.start_server(), "train_scst", arguments, tmp_path / "cache", [None, None])
    assert codes == [0, 0], log_of("train_scst", tmp_path / "cache").read_text()[-2000:]
    ours, theirs = (
        load_file(folder / "checkpoint-6" / "model.safetensors") for folder in (tmp_path / "two", whole["lstm"])
    )
    assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) < 1e-5
    rows, expected = (json.loads((folder / "history.json").read_text()) for folder in (tmp_path / "two", whole["lstm"]))
    for row, other in zip(rows, expected, strict=True):
        for name in {"reward", "sample_length", "sample_ended", "eval_loss", "cider"} & other.keys():
            assert row[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


def test_accumulated_batches_give_the_step_of_one_big_batch(whole, started, small_scenes, tmp_path):
    sizes = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4", "--report_to", "none"]
    scst(started["lstm"], small_scenes, tmp_path / "run", *sizes, "--eval_epochs", "2", "--eval_steps", "99")
    ours, theirs = (
        load_file(folder / "checkpoint-6" / "model.safetensors") for folder in (tmp_path / "run", whole["lstm"])
    )
    assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) < 1e-5


def test_early_stopping_leaves_the_captioner_it_started_from(started, small_scenes, tmp_path):
    options = ["--learning_rate", "0", "--early_stopping_patience", "2", "--report_to", "none"]
    history = scst(started["lstm"], small_scenes, tmp_path / "run", *options)
    assert [row["step"] for row in history] == [0, 2, 3]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", started["lstm"]))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_cross_entropy_and_the_bound_keep_a_run_near_its_start(started, small_scenes, tmp_path):
    def last_row(*given: str) -> dict:
        options = ["--learning_rate", "1e-2", "--eval_steps", "99", "--eval_epochs", "2", "--report_to", "none", *given]
        return scst(started["lstm"], small_scenes, tmp_path / "-".join(given[1::2]), *options)[-1]

    free, bound = last_row("--kl_coef", "1e-6"), last_row("--kl_coef", "2")
    assert 0 <= bound["kl"] < 0.5 * free["kl"]
    taught = last_row("--kl_coef", "1e-6", "--xe_weight", "0.9")
    assert taught["eval_loss"] < free["eval_loss"] - 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_is_mixed_with_the_start_and_what_learns_is_not(kind, whole, started, small_scenes, tmp_path):
    given = ["--init_weight_share", "0.25", "--load_best_model_at_end", "false", "--save_steps", "6"]
    history = scst(started[kind], small_scenes, tmp_path, *given)
    folders = (started[kind], whole[kind] / "checkpoint-6", tmp_path / "checkpoint-6", tmp_path)
    first, undisturbed, saved, kept = (load_file(folder / "model.safetensors") for folder in folders)
    assert not differences(saved, kept)  # a checkpoint's model is the one that is evaluated
    learned = load_file(tmp_path / "checkpoint-6" / "trained_weights.safetensors")
    assert not differences(learned, {name: undisturbed[name] for name in learned})
    assert any(not torch.equal(value, first[name]) for name, value in kept.items())
    for name, value in kept.items():
        mixed = 0.25 * first[name] + 0.75 * learned.get(name, first[name])
        assert torch.allclose(value.float(), mixed, atol=1e-6), name
    # What is scored is what is kept, not what learns.
    assert history[-1]["eval_loss"] != json.loads((whole[kind] / "history.json").read_text())[-1]["eval_loss"]


def test_decoding_options_are_of_evaluation_alone(whole, started, small_scenes, tmp_path):
    """They change what is generated, and not what is sampled."""
    start = Captioner.load(started["lstm"])
    processor = start.processor
    saved = {
        name: getattr(start.model.generation_config, name) for name in ("min_length", "length_penalty", "num_beams")
    }
    given = ["--min_length", "12", "--length_penalty", "0.6", "--num_beams", "2"]
    scst(started["lstm"], small_scenes, tmp_path / "run", *given, "--learning_rate", "0", "--num_train_epochs", "1")
    still = ["--learning_rate", "0", "--num_train_epochs", "1", "--report_to", "none"]
    plain = scst(started["lstm"], small_scenes, tmp_path / "plain", *still)
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    for row, other in zip(history[1:], plain[1:], strict=True):
        assert all(row[name] == other[name] for name in ("reward", "sample_length", "sample_ended"))
    decoding = Captioner.load(tmp_path / "run").model.generation_config
    assert (decoding.min_length, decoding.length_penalty, decoding.num_beams) == (13, 0.6, 2)  # with the start token
    told = [json.loads(line)["caption"] for line in (tmp_path / "run" / "captions.jsonl").read_text().splitlines()]
    assert min(len(ids) for ids in processor.tokenizer(told).input_ids) >= 12
    decoding = Captioner.load(tmp_path / "plain").model.generation_config
    assert {name: getattr(decoding, name) for name in saved} == saved


def test_rare_tokens_gain_by_how_rare_they_are():
    """Of 3,000 tokens three are one in 1,000; the end of a caption is as it was, however rare."""
    captions = np.array([*[5] * 2993, 7, 8, 8, 9, 9, 9, EOS])
    boosts = logit_adjustments(captions, 2.0, special_ids=[0, EOS])
    assert boosts == [
        [[7], pytest.approx(2 * math.log(3), abs=1e-3)],
        [[8], pytest.approx(2 * math.log(1.5), abs=1e-3)],
    ]
    assert logit_adjustments(captions, 0.0, special_ids=[0, EOS]) == []
    assert logit_adjustments(np.array([5, 6, EOS]), 2.0, special_ids=[0, EOS]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_boost_of_rare_tokens_is_saved_kept_and_taken_back(kind, started, small_scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(self_critical, "RARE", 0.05)  # of so few captions hardly a token is rarer than one in 1,000
    still = ["--learning_rate", "0", "--num_train_epochs", "1", "--eval_steps", "9"]
    scst(started[kind], small_scenes, tmp_path / "plain", *still)
    boosted = scst(started[kind], small_scenes, tmp_path / "boosted", *still, "--logit_adjustment_tau", "3")
    scst(tmp_path / "boosted", small_scenes, tmp_path / "on", *still)
    scst(tmp_path / "boosted", small_scenes, tmp_path / "back", *still, "--logit_adjustment_tau", "0")
    captions = {name: (tmp_path / name / "captions.jsonl").read_text() for name in ("plain", "boosted", "on", "back")}
    assert captions["plain"] == captions["back"] != captions["boosted"] == captions["on"]
    # What is sampled, and how likely the captions are, know nothing of it.
    plain = json.loads((tmp_path / "plain" / "history.json").read_text())
    for row, other in zip(plain, boosted, strict=True):
        assert all(row[name] == other[name] for name in ("eval_loss", "reward", "sample_length") if name in row)
    bias = Captioner.load(tmp_path / "on").model.generation_config.sequence_bias
    assert bias and all(nats > 0 for _, nats in bias)
    results = json.loads((tmp_path / "on" / "results.json").read_text())
    assert results["decoding"]["sequence_bias"] == f"of {len(bias)} tokens"


# -------------------------------------------------------------------------------------------------- bad options


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--model_name_or_path", "no/such/model"], "no/such/model"),
        (["--num_samples", "1"], "--num_samples 1"),
        (["--num_samples", "0"], "--num_samples 0"),
        (["--baseline", "median"], "--baseline"),
        (["--kl_coef", "-1"], "--kl_coef -1"),
        (["--logit_adjustment_tau", "-1"], "--logit_adjustment_tau -1"),
        (["--bleu_weight", "nan"], "--bleu_weight nan"),
        (["--xe_weight", "1"], "--xe_weight 1"),
        (["--sample_no_repeat_ngram_size", "-1"], "--sample_no_repeat_ngram_size -1"),
        (["--sample_min_length", "15"], "--sample_min_length 15"),
        (["--dropout", "0.1", "--kl_coef", "0.1"], "--dropout and --kl_coef"),
        (["--eval_steps", "0"], "--eval_steps 0"),
        (["--min_length", "15"], "--min_length 15"),
        (["--train_sampling_strategy", "random"], "--train_sampling_strategy"),
    ],
)
def test_what_a_user_gets_wrong_is_said_in_one_sentence(given, sentence, started, small_scenes, tmp_path, capsys):
    assert sentence in refused(started["lstm"], small_scenes, tmp_path, capsys, *given)


def refused(start: Path, dataset: str, folder: Path, capsys, *given: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        scst(start, dataset, folder / "run", *given)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in error
    left = (folder / "run").iterdir() if (folder / "run").exists() else ()
    assert not [path for path in left if path.name != ".lock"]
    (sentence,) = re.findall(r"^(?:\S+: )?error: (.*)", error.replace("\r", "\n"), flags=re.MULTILINE)
    return sentence


def test_no_model_and_a_model_of_neither_kind_are_refused(started, small_scenes, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_scst.main(["--dataset_name", small_scenes, "--output_dir", str(tmp_path / "run")])
    assert stopped.value.code == 2 and "--model_name_or_path is missing" in capsys.readouterr().err
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    decoder = BertConfig(vocab_size=30, is_decoder=True, add_cross_attention=True, **sizes)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(image_size=32, patch_size=16, **sizes),
        decoder,
        decoder_start_token_id=1,
        pad_token_id=0,
        eos_token_id=2,
    )
    other = tmp_path / "other"
    VisionEncoderDecoderModel(config).save_pretrained(other)
    build("vit_gpt2").processor.save_pretrained(other)
    sentence = refused(other, small_scenes, tmp_path, capsys)
    assert f"--model_name_or_path {other}" in sentence


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_a_model_that_is_to_be_shared_out_is_refused(name, starts, small_scenes, tmp_path, capsys, monkeypatch):
    """And nobody is sent to a recipe that is refused as well."""
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    sentence = refused(Path(starts["lstm"]), small_scenes, tmp_path, capsys)
    assert "several_gpus.yaml" in sentence


def test_a_checkpoint_of_another_version_is_refused(whole, started, small_scenes, tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(whole["lstm"] / "checkpoint-3", checkpoint)
    path = checkpoint / checkpoints.TRAINER_STATE
    progress = json.loads(path.read_text())
    del progress["running_sums"]
    path.write_text(json.dumps(progress | {"epoch_nats": 1.0, "epoch_tokens": 2}))
    (checkpoint / checkpoints.CHECKSUMS).unlink()
    checkpoints._write_checksums(checkpoint)
    sentence = refused(started["lstm"], small_scenes, tmp_path, capsys, "--resume_from_checkpoint", str(checkpoint))
    assert str(path) in sentence and "epoch_nats, epoch_tokens, running_sums" in sentence


def test_a_checkpoint_of_another_script_or_of_other_steps_is_refused(whole, started, small_scenes, tmp_path, capsys):
    (checkpoint,) = started["lstm"].glob("checkpoint-*")
    sentence = refused(started["lstm"], small_scenes, tmp_path, capsys, "--resume_from_checkpoint", str(checkpoint))
    assert str(checkpoint) in sentence
    given = ["--resume_from_checkpoint", str(whole["lstm"] / "checkpoint-3"), "--per_device_train_batch_size", "5"]
    assert "8 images a step" in refused(started["lstm"], small_scenes, tmp_path, capsys, *given)


def test_a_checkpoint_that_went_on_from_another_captioner_is_refused(whole, started, small_scenes, tmp_path, capsys):
    """Its rest would be mixed with, or held near, weights that it never had."""
    other = shutil.copytree(started["lstm"], tmp_path / "other", ignore=shutil.ignore_patterns("checkpoint-*"))
    weights = load_file(other / "model.safetensors")
    weights["lm_head.bias"] += 0.1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    given = ["--resume_from_checkpoint", str(whole["lstm"] / "checkpoint-3")]
    sentence = refused(other, small_scenes, tmp_path, capsys, *given)
    assert "checkpoint-3" in sentence and "--model_name_or_path" in sentence


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("scst_*.yaml")), ids=lambda path: path.name)
def test_the_recipes_name_only_options_there_are(recipe):
    kinds = (DataArguments, train_scst.SCSTArguments, train_scst.DecodingArguments, train_scst.TrainingArguments)
    assert len(parse_recipe(kinds, [str(recipe), "--model_name_or_path", "any"])) == 4


def test_n_grams_of_one_token_are_refused_where_samples_could_not_end():
    captioner, constraints = build("vit_gpt2"), SamplingConstraints(no_repeat_ngram_size=1)
    SelfCriticalLoss(captioner, None, options(constraints), seed=0)  # captions start from another token than EOS
    captioner.model.generation_config.eos_token_id = captioner.start_token_ids[0]  # as GPT-2 has them
    with pytest.raises(UserError, match="--sample_no_repeat_ngram_size 1"):
        SelfCriticalLoss(captioner, None, options(constraints), seed=0)
