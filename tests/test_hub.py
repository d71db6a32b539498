"""What is pushed can be pulled: models and checkpoints, by the real client, through failures of every kind."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from fresh import run_fresh
from huggingface_hub import HfApi, ModelCard, parse_eval_result_entries
from PIL import Image
from safetensors.torch import load_file

import evaluate_captions
import train_lstm
import train_vit_gpt2
from data_scripts import load_captions
from modeling.captioner import Captioner
from reporting import push
from reporting.results import write_results
from system.files import write_file
from system.retries import error_summary
from training import checkpoints
from training.checkpoints import checkpoint_to_resume, copy_best_model, step_of

ROOT = Path(__file__).parent.parent
COMMON = ["--num_train_epochs", "2", "--max_eval_samples", "3", "--max_train_samples", "12", "--report_to", "none"]
SMALL = {
    "lstm": [
        *("--encoder", "test_efficientnet", "--pretrained_encoder", "false", "--image_size", "64"),
        *("--image_embed_dim", "32", "--hidden_size", "32", "--num_hidden_layers", "1", "--vocab_size", "120"),
        *("--per_device_train_batch_size", "30", "--learning_rate", "1e-2", *COMMON),
    ],
    "vit_gpt2": [
        *("--pretrained_encoder", "false", "--pretrained_decoder", "false", "--image_size", "32"),
        *("--hidden_size", "32", "--num_hidden_layers", "1", "--num_attention_heads", "2", "--vocab_size", "120"),
        *("--prompt", "an image of", "--dropout", "0", "--disable_tqdm", "true"),
        *("--per_device_train_batch_size", "30", "--learning_rate", "1e-2", *COMMON),
    ],
}
SCRIPTS = {"lstm": train_lstm, "vit_gpt2": train_vit_gpt2}
KINDS = pytest.mark.parametrize("kind", SMALL)


def train(kind: str, folder: Path, dataset: str, *options: str) -> Path:
    SCRIPTS[kind].main([*SMALL[kind], "--dataset_name", dataset, "--output_dir", str(folder), *options])
    return folder


@pytest.fixture(scope="module")
def runs(small_scenes, tmp_path_factory) -> dict[str, Path]:
    """A small run of each captioner, with images that may be published."""
    folder = tmp_path_factory.mktemp("runs")
    options = ["--publish_images", "true", "--num_train_epochs", "12", "--eval_epochs", "12", "--save_epochs", "12"]
    return {kind: train(kind, folder / kind, small_scenes, *options) for kind in SMALL}


CARD_LINES = """
import io, json, os, re, sys
from contextlib import redirect_stdout
from huggingface_hub import ModelCard, constants
# What HF_ENDPOINT and the like set in a process that starts with them, as the notebook's does.
endpoint, constants.HF_HUB_CACHE = sys.argv[1:3]
constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = endpoint, False, True
constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
os.environ["HF_TOKEN"] = "hf_me"
printed_lines = {}
for repository in sys.argv[3:]:
    printed_lines[repository] = []
    for lines in re.findall(r"```python\\n(.*?)```", ModelCard.load(repository).text, flags=re.DOTALL):
        with redirect_stdout(io.StringIO()) as printed:
            exec(lines, {})
        printed_lines[repository].append(printed.getvalue().strip())
print(json.dumps(printed_lines))
"""


@pytest.mark.slow
def test_pushed_models_caption_the_same_in_a_fresh_process(runs, hub, small_scenes, tmp_path):
    """Pushed despite a 500, a broken connection and a 503; the Python is that of the model cards."""
    for kind in runs:
        hub.faults.clear()
        hub.fail("POST", ".", first=3, status=500)
        hub.fail("PUT", "/lfs/", first=1)
        hub.fail("POST", "/commit/", first=1, status=503)
        address = push.push_to_hub(runs[kind], f"me/{kind}", private=True)
        assert [fault.seen >= fault.first for fault in hub.faults] == [True] * 3
        repository = hub.repositories["model", f"me/{kind}"]
        assert address.endswith(repository.commits("main")[0].oid) and len(repository.commits("main")) == 2
        assert repository.private
        files = repository.files("main")
        assert files["model.safetensors"].content == (runs[kind] / "model.safetensors").read_bytes()

    load_captions(small_scenes)["test"][0]["image"].save(tmp_path / "image.jpg")
    names = [f"me/{kind}" for kind in runs]
    printed = json.loads(run_fresh(CARD_LINES, hub.endpoint, tmp_path / "cache", *names, folder=tmp_path))
    assert any("/me/lstm/resolve/" in path for _, path, _ in hub.requests)
    for kind, folder in runs.items():
        captioner = Captioner.load(folder)
        pixels = captioner.processor(images=Image.open(tmp_path / "image.jpg"), return_tensors="pt")
        expected = captioner.generate(dict(pixels))[0]["caption"]
        assert expected
        # Plain `generate()`, the second way on the card, gives the prompt back as well.
        whole = f"an image of {expected}" if kind == "vit_gpt2" else expected
        assert printed[f"me/{kind}"] == [expected, whole]


def test_which_files_are_pushed(runs, hub):
    push.push_to_hub(runs["lstm"], "me/lstm")
    files = hub.repositories["model", "me/lstm"].files("main")
    assert {"config.json", "model.safetensors", "tokenizer.json", "modeling_inception_lstm.py"} <= files.keys()
    assert {"captioning_pipeline.py", "README.md", "results.json", "captions.jsonl", "curves.png"} <= files.keys()
    assert {"captions.html", "samples/01.jpg"} <= files.keys()
    assert not [path for path in files if path.startswith(("checkpoint-", "logs/", "."))]
    assert not list(runs["lstm"].glob(".pushing-*"))
    # The card in the folder still names the folder.
    assert 'from_pretrained("me/lstm"' in files["README.md"].content.decode()
    assert 'from_pretrained("lstm"' in (runs["lstm"] / "README.md").read_text()


@pytest.mark.parametrize("option", [[], ["--publish_images", "true"]])
def test_an_evaluation_keeps_the_samples_and_decides_whether_its_page_is_pushed(option, runs, small_scenes, tmp_path):
    folder = shutil.copytree(runs["lstm"], tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (folder / "samples").iterdir()}
    arguments = ["--model_name_or_path", str(folder), "--dataset_name", small_scenes, "--split", "validation", *option]
    evaluate_captions.main([*arguments, "--output_dir", str(folder)])
    assert json.loads((folder / "results.json").read_text())["split"] == "validation"
    assert {path.name: path.read_bytes() for path in (folder / "samples").iterdir()} == before
    with push.staged(folder) as stage:  # this data set is not named scenes, and might be anybody's images
        assert (Path(stage) / "captions.html").exists() == bool(option)
        assert (Path(stage) / "samples" / "01.jpg").exists()


def test_images_that_may_not_be_published_are_not_pushed(small_scenes, hub, tmp_path):
    folder = train("lstm", tmp_path / "run", small_scenes, "--push_to_hub", "true", "--hub_model_id", "me/quiet")
    files = hub.repositories["model", "me/quiet"].files("main")
    assert (folder / "captions.html").exists() and "captions.html" not in files
    assert not [path for path in files if path.endswith((".jpg", ".html"))]
    assert "samples/" not in files["README.md"].content.decode()
    assert (hub.repositories["model", "me/quiet"].private, "captions.jsonl" in files) == (False, True)


@pytest.mark.parametrize(("kind", "token"), [("lstm", "hf_wrong"), ("lstm", "hf_reader"), ("vit_gpt2", "hf_wrong")])
def test_a_bad_token_is_logged_and_the_run_is_complete(kind, token, small_scenes, hub, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", token)
    options = ["--push_to_hub", "true", "--hub_model_id", "me/captioner", "--hub_strategy", "every_save"]
    folder = train(kind, tmp_path / "run", small_scenes, "--num_train_epochs", "1", *options)
    Captioner.load(folder)
    assert (folder / "results.json").exists()
    logged = [line for line in caplog.text.splitlines() if "was not pushed to me/captioner" in line]
    assert len(logged) == 2 and all(("401" if token == "hf_wrong" else "403") in line for line in logged)
    assert f"python -m reporting.push {folder} me/captioner" in logged[-1]
    assert token not in caplog.text
    assert not hub.repositories


def test_hub_token_is_used_and_written_nowhere(small_scenes, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    options = ["--push_to_hub", "true", "--hub_model_id", "me/run", "--hub_strategy", "every_save"]
    train("vit_gpt2", tmp_path / "run", small_scenes, *options, "--num_train_epochs", "1", "--hub_token", "hf_me")
    first, last = (
        hub.repositories["model", "me/run"].commits("main")[-2],
        hub.repositories["model", "me/run"].commits("main")[0],
    )
    assert "model.safetensors" in first.files and "results.json" not in first.files and "results.json" in last.files
    assert not [path for path, file in last.files.items() if b"hf_me" in file.content]
    assert not [path for path in last.files if "checkpoint" in path]


@pytest.mark.slow
@KINDS
def test_each_checkpoint_is_pushed_within_an_epoch_too(kind, small_scenes, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(push.CheckpointPush, "send", lambda _, step: pushed.append(step))
    train(kind, tmp_path / "run", small_scenes, "--num_train_epochs", "1", "--save_steps", "1")
    assert pushed == [step_of(checkpoint) for checkpoint in checkpoints.checkpoints(tmp_path / "run")]
    assert len(pushed) > 1


def test_a_hub_that_is_down_does_not_end_the_run(runs, hub, caplog):
    hub.fail("POST", "/repos/create", count=99, status=503)
    assert push.push_to_hub(runs["lstm"], "me/captioner") is None
    assert hub.faults[0].seen == 5 and "503" in caplog.text


@KINDS
def test_a_run_resumes_from_a_checkpoint_on_the_hub(kind, small_scenes, hub, tmp_path):
    """Two epochs with checkpoints pushed; elsewhere, resumed from the one after the first epoch."""
    options = ["--push_to_hub", "true", "--hub_model_id", "me/run", "--hub_strategy", "all_checkpoints"]
    whole = train(kind, tmp_path / "whole", small_scenes, *options, "--load_best_model_at_end", "false")
    commits = hub.repositories["model", "me/run"].commits("main")
    folders = {path.split("/")[0] for path in commits[0].files if path.startswith("checkpoint-")}
    assert folders and folders <= {
        "checkpoint-2",
        "checkpoint-4",
    }  # the second is skipped while the first is still being pushed
    assert "checkpoint-2" in folders
    first = next(commit for commit in reversed(commits) if any("checkpoint-2/" in path for path in commit.files))
    resumed = train(
        kind,
        tmp_path / "resumed",
        small_scenes,
        *("--resume_from_checkpoint", f"me/run@{first.oid}", "--load_best_model_at_end", "false"),
    )
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(SystemExit) as ended:
        train(kind, tmp_path / "wrong", small_scenes, "--resume_from_checkpoint", "me/nowhere")
    assert ended.value.code == 2


def test_the_last_checkpoint_replaces_the_previous_one_and_comes_with_the_best_model(
    small_scenes, hub, tmp_path, monkeypatch
):
    options = ["--push_to_hub", "true", "--hub_model_id", "me/run", "--hub_strategy", "checkpoint"]
    options += ["--hub_revision", "trial", "--save_total_limit", "1"]
    train("lstm", tmp_path / "run", small_scenes, "--num_train_epochs", "1", *options)
    files = hub.repositories["model", "me/run"].files("trial")
    assert "last-checkpoint/trainer_state.json" in files and not hub.repositories["model", "me/run"].files("main")
    elsewhere, written = tmp_path / "elsewhere", []
    monkeypatch.setattr(
        checkpoints, "write_file", lambda path, content: written.append(path.name) or write_file(path, content)
    )
    for _ in range(2):  # as after a kill before the first checkpoint
        found = checkpoint_to_resume("me/run@trial", str(elsewhere), "train_lstm", push.download_checkpoint)
        copy_best_model(found, str(elsewhere))
        Captioner.load(elsewhere)
    assert (
        written[-1] == "config.json" and "model.safetensors" in written
    )  # last, so that after a kill it is downloaded again
    (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").rename(
        tmp_path / "run" / "checkpoint-2" / "renamed.json"
    )
    args = train_lstm.TrainingArguments(
        output_dir=str(tmp_path / "run"), hub_model_id="me/run", hub_revision="trial", hub_strategy="checkpoint"
    )
    pushing = push.CheckpointPush(args, active=True)
    pushing.send(2)
    pushing.finish()
    files = hub.repositories["model", "me/run"].files("trial")
    assert "last-checkpoint/renamed.json" in files and "last-checkpoint/trainer_state.json" not in files
    checkpoint = push.download_checkpoint("me/run@trial")
    assert (checkpoint / "renamed.json").exists() and checkpoint.name == "last-checkpoint"


@pytest.mark.timeout(60)  # a run that waited would wait forever
def test_a_checkpoint_is_skipped_while_another_is_being_pushed(hub, tmp_path, caplog):
    """Training does not wait: what it deletes meanwhile is pushed nevertheless."""
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-1" / "state.txt").write_text("first")
    args = train_lstm.TrainingArguments(
        output_dir=str(tmp_path / "run"), hub_model_id="me/run", hub_strategy="checkpoint"
    )
    pushing = push.CheckpointPush(args, active=True)
    with hub.lock:  # a slow Hub
        pushing.send(1)
        (tmp_path / "run" / "checkpoint-1" / "state.txt").unlink()
        (tmp_path / "run" / "checkpoint-1").rename(tmp_path / "run" / "checkpoint-2")
        pushing.send(2)
    pushing.finish()
    commits = hub.repositories["model", "me/run"].commits("main")
    assert len(commits) == 2 and commits[0].files["last-checkpoint/state.txt"].content == b"first"
    pushing.send(3)  # which is not there
    assert "checkpoint-3 was not pushed to me/run" in caplog.text


def test_the_command_pushes_to_a_branch_with_a_tag(runs, hub, capsys):
    push.main([str(runs["vit_gpt2"]), "captioner", "--private", "--revision", "trial", "--tag", "v1"])
    repository = hub.repositories["model", "me/captioner"]
    assert repository.private and repository.tags["v1"] is repository.branches["trial"]
    assert capsys.readouterr().out.strip().endswith(repository.tags["v1"].oid)
    assert not repository.files("main")
    assert HfApi().model_info("me/captioner", revision="v1").sha == repository.tags["v1"].oid


@pytest.mark.parametrize(
    ("arguments", "token", "sentence"),
    [
        (["nowhere", "me/x"], "hf_me", "nowhere has no model"),
        (["RUN", "me/x"], "hf_wrong", "401"),
        (["RUN", "somebody/x"], "hf_me", "write access to somebody/x"),
        (["RUN", "a/b/c"], "hf_me", "a/b/c"),
        (["RUN", "me/full", "--tag", "v1"], "hf_me", "409"),
    ],
)
def test_an_impossible_push_is_one_sentence(arguments, token, sentence, runs, hub, monkeypatch, capsys):
    HfApi().create_repo("full")
    HfApi().create_tag("me/full", tag="v1")
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SystemExit) as ended:
        push.main([word if word != "RUN" else str(runs["lstm"]) for word in arguments])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and len(errors) == 1 and sentence in errors[0]


def test_the_card_on_the_hub_is_valid_and_names_no_path_of_this_machine(runs, hub):
    for kind, folder in runs.items():
        push.push_to_hub(folder, f"me/{kind}")
        card = ModelCard.load(f"me/{kind}", ignore_metadata_errors=False)
        card.validate(repo_type="model")
        text = hub.repositories["model", f"me/{kind}"].files("main")["README.md"].content.decode()
        assert str(folder.parent) not in text and str(folder.parents[3]) not in text
        assert re.search(r"from_pretrained\(\"me/", text) and "12 images, 60 captions" in text
        assert "CIDEr" in {score.metric_name for score in card.data.eval_results}


@pytest.mark.parametrize(("dataset", "pushed"), [("me/flowers", True), ("flowers", False)])
def test_scores_on_a_data_set_of_the_hub_are_pushed_in_its_own_format(dataset, pushed, hub, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    write_results(tmp_path, {"dataset": dataset, "split": "test", "metrics": {"bleu_4": 0.25, "cider": 0.75}})
    push.push_to_hub(tmp_path, "me/captioner")
    files = hub.repositories["model", "me/captioner"].files("main")
    assert (push.EVAL_RESULTS in files) == pushed and not (tmp_path / push.EVAL_RESULTS).exists()
    if pushed:
        entries = parse_eval_result_entries(yaml.safe_load(files[push.EVAL_RESULTS].content))
        found = [(entry.dataset_id, entry.task_id, entry.value) for entry in entries]
        assert found == [("me/flowers", "bleu_4", 0.25), ("me/flowers", "cider", 0.75)]


def test_a_failed_upload_of_one_file_is_summarized_by_its_cause():
    try:
        try:
            raise ConnectionError("the connection is dead")
        except ConnectionError as error:
            raise RuntimeError("Error while uploading 'model.safetensors' to the Hub.") from error
    except RuntimeError as error:
        assert error_summary(error, "me/x") == "the connection is dead"


@pytest.mark.parametrize("token", ["hf_" + "x" * 30 + "\n", "secret\nsecret"])
def test_no_error_repeats_the_token(token, runs, hub, caplog):
    """A token copied with its line break: the HTTP library refuses the header and quotes it."""
    assert push.push_to_hub(runs["lstm"], "me/captioner", token=token) is None
    assert "was not pushed to me/captioner" in caplog.text
    assert token.strip()[:6] not in caplog.text.replace("hf_me", "")


def test_a_bug_of_ours_keeps_its_traceback(runs, hub, monkeypatch, caplog):
    monkeypatch.setattr(push, "upload", lambda *given: given[99])
    assert push.push_to_hub(runs["lstm"], "me/captioner") is None  # the run ends as usual
    assert "IndexError" in caplog.text
    with pytest.raises(IndexError):
        push.main([str(runs["lstm"]), "me/captioner"])
