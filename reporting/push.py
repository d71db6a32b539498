"""Push the output directory of a run to the Hub, or download a checkpoint from there.

    python -m reporting.push outputs/lstm me/captioner --private --tag v1

The repository is created if it does not exist. Checkpoints and logs are not pushed, nor are images that may not be
published (see `--publish_images` of the training scripts).
"""

import argparse
import logging
import math
import os
import re
import shutil
import tempfile
from concurrent.futures import Future
from pathlib import Path

import yaml
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.utils import httpx
from transformers.trainer_utils import HubStrategy

from reporting.model_card import name_on_card
from reporting.results import ALL_TITLES, is_hub_id, read_results
from system.errors import UserError, one_line_errors
from system.files import write_file
from system.retries import error_summary, retried

logger = logging.getLogger(__name__)

# Checkpoints have optimizer states, logs have paths, and names that begin with a dot are temporary.
NOT_PUSHED = re.compile(r"checkpoint-.*|logs|runs|\..*")
EVAL_RESULTS = ".eval_results/showtell.yaml"  # read by the Hub for the data set's leaderboard
LAST_CHECKPOINT = "last-checkpoint"  # as transformers' Trainer names it
# What the client raises: network and HTTP errors, invalid names and metadata, and what it wraps a failed file into.
HUB_ERRORS = (OSError, httpx.HTTPError, ValueError, RuntimeError)


def push_to_hub(
    output_dir: str | os.PathLike,
    repo_id: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str | None:
    """Push model, processor, results, page and card of an output directory at the end of a training run.

    Args:
        repo_id: Repository, created if it does not exist; if None, the folder's name under the user's own.
        private: Whether a new repository is private; if None, the account's default.
        revision: Branch, created if it does not exist; main if None.
        token: Access token of the Hub; if None, that of `hf auth login` or HF_TOKEN.

    Returns:
        The URL of the commit, or None if the upload failed: the reason is logged, and the run ends as usual.
    """
    repo_id = repo_id or Path(output_dir).resolve().name
    try:
        with staged(output_dir) as stage:
            return upload(HfApi(token=token), stage, repo_id, private, revision)
    except Exception as error:  # of any kind: an upload must not end a training run of days
        _log_failure(
            error,
            f"{output_dir} was not pushed to {repo_id}: {error_summary(error, repo_id)}. It is complete on disk: "
            f"`python -m reporting.push {output_dir} {repo_id}` pushes it again.",
        )
        return None


def staged(
    output_dir: str | os.PathLike, checkpoint: Path | None = None, as_folder: str = ""
) -> tempfile.TemporaryDirectory:
    """Make a folder of hard links to what is pushed, so that training can replace and delete files during the upload.

    Args:
        checkpoint: Checkpoint to include, as the folder `as_folder`.
    """
    output_dir = Path(output_dir)
    names = [path.name for path in output_dir.iterdir() if not NOT_PUSHED.fullmatch(path.name)]
    if "captions.html" in names and not _may_publish_images(output_dir):
        names.remove("captions.html")  # it contains the images
    stage = tempfile.TemporaryDirectory(dir=output_dir, prefix=".pushing-")
    for name in names:
        _link(output_dir / name, Path(stage.name) / name)
    if checkpoint:
        _link(checkpoint, Path(stage.name) / as_folder)
    return stage


def upload(
    api: HfApi,
    stage: str,
    repo_id: str,
    private: bool | None,
    revision: str | None,
    tag: str | None = None,
    replace: str = "",
) -> str:
    """Create repository and branch if they do not exist, and commit a staged folder.

    Args:
        tag: Tag for the commit.
        replace: Folder of the repository whose other files are deleted.

    Returns:
        The URL of the commit.
    """
    repo_id = retried(api.create_repo)(repo_id, private=private, exist_ok=True).repo_id
    if revision:
        retried(api.create_branch)(repo_id, branch=revision, exist_ok=True)
    card = Path(stage) / "README.md"
    if card.exists():
        write_file(card, name_on_card(card.read_text(encoding="utf-8"), repo_id).encode())
    if entries := _eval_results(Path(stage)):
        write_file(Path(stage) / EVAL_RESULTS, entries)
    commit = retried(api.upload_folder)(
        repo_id=repo_id,
        folder_path=stage,
        revision=revision,
        delete_patterns=f"{replace}/*" if replace else None,
        commit_message="Trained with showtell",
    )
    if tag:
        retried(api.create_tag)(repo_id, tag=tag, revision=commit.oid)
    return str(commit)


def _eval_results(folder: Path) -> bytes | None:
    """The scores in the Hub's `.eval_results` format; None unless the data set is one of the Hub."""
    try:
        results = read_results(folder)
        from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    except (UserError, ImportError):  # no results.json yet; huggingface_hub before the format
        return None
    dataset = results.get("dataset") or ""
    if not is_hub_id(dataset):
        return None
    entries = [
        EvalResultEntry(
            dataset_id=dataset,
            task_id=name,
            value=round(float(results["metrics"][name]), 4),
            notes=f"{title}, {results.get('split') or 'unnamed'} split",
        )
        for name, title in ALL_TITLES.items()
        if name in results["metrics"]
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True).encode()


class CheckpointPush:
    """Pushes checkpoints to the Hub in the background during training, one at a time.

    Args:
        args: Options under their names in `transformers.TrainingArguments`: `output_dir`, `hub_model_id`,
            `hub_private_repo`, `hub_revision`, and `hub_strategy`, which decides what each checkpoint pushes:
            "every_save" the output directory (the best model so far), "checkpoint" that and the checkpoint as
            `last-checkpoint`, "all_checkpoints" that and the checkpoint under its own name, "end" nothing before the
            end of the run.
        active: Whether this process pushes.
        token: As in `push_to_hub`.

    Raises:
        ValueError: Unknown `hub_strategy`.
    """

    def __init__(self, args, active: bool, token: str | None = None):
        self.args = args
        self.strategy = HubStrategy(args.hub_strategy)
        self.active = active and self.strategy != HubStrategy.END
        self.repo_id = args.hub_model_id or Path(args.output_dir).resolve().name
        self.api = HfApi(token=token)
        self.running: Future | None = None

    def send(self, step: int) -> None:
        """Start to push the checkpoint of a step; it is skipped while the previous one is still being pushed."""
        if not self.active:
            return
        if self.running is not None and not self.running.done():
            logger.info(f"checkpoint-{step} is not pushed: the previous one is still being pushed.")
            return
        self.finish()
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{step}"
        name = {HubStrategy.CHECKPOINT: LAST_CHECKPOINT, HubStrategy.ALL_CHECKPOINTS: checkpoint.name}.get(
            self.strategy, ""
        )
        try:
            stage = staged(self.args.output_dir, checkpoint if name else None, name)
        except OSError as error:
            self._log_failure(error, step)
            return
        self.running = self.api.run_as_future(self._upload, stage, name, step)

    def finish(self) -> None:
        """Wait until the current push has ended."""
        if self.running is not None:
            self.running.result()

    def _upload(self, stage: tempfile.TemporaryDirectory, replace: str, step: int) -> None:
        try:
            with stage:
                private, revision = self.args.hub_private_repo, self.args.hub_revision
                upload(self.api, stage.name, self.repo_id, private, revision, replace=replace)
        except Exception as error:  # as in push_to_hub
            self._log_failure(error, step)

    def _log_failure(self, error: Exception, step: int) -> None:
        _log_failure(
            error, f"checkpoint-{step} was not pushed to {self.repo_id}: {error_summary(error, self.repo_id)}."
        )


def download_checkpoint(name: str) -> Path:
    """Download the newest checkpoint of a Hub repository, for `--resume_from_checkpoint OWNER/NAME[@REVISION]`.

    The files beside it, which are the best model so far, come with it. Nothing is executed: weights are safetensors,
    optimizer and random states are read by `torch.load(weights_only=True)`, the rest is JSON. The LSTM captioner's code
    is among the files, for those who load the model with remote code.

    Raises:
        UserError: The repository does not exist, cannot be read, or has no checkpoint.
    """
    repo_id, _, revision = name.partition("@")
    try:
        paths = retried(HfApi().list_repo_files)(repo_id, revision=revision or None)
        folders = {path.split("/")[0] for path in paths if re.match(rf"({LAST_CHECKPOINT}|checkpoint-\d+)/", path)}
        if not folders:
            raise UserError("it has no checkpoint; `--hub_strategy checkpoint` pushes them")
        newest = max(folders, key=lambda folder: math.inf if folder == LAST_CHECKPOINT else int(folder.split("-")[1]))
        beside = [path for path in paths if "/" not in path]
        patterns = [f"{newest}/*", *beside]
        folder = Path(retried(snapshot_download)(repo_id, revision=revision or None, allow_patterns=patterns))
    except HUB_ERRORS as error:
        raise UserError(
            f"--resume_from_checkpoint {name}: no such checkpoint folder, and on the Hub: "
            f"{error_summary(error, repo_id)}; give a checkpoint folder, `last`, or a repository"
        ) from error
    return folder / newest


def _may_publish_images(output_dir: Path) -> bool:
    try:
        return read_results(output_dir).get("publish_images") is True
    except UserError:  # no results.json: not without permission
        return False


def _log_failure(error: Exception, sentence: str) -> None:
    """Log why a push failed; with a traceback if the error is ours rather than the network's or the Hub's."""
    logger.error(sentence, exc_info=None if isinstance(error, HUB_ERRORS) else error)


def _link(source: Path, target: Path) -> None:
    """Hard-link a file, or every file of a folder; copy where the file system has no hard links."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    if source.is_dir():
        shutil.copytree(source, target, copy_function=link)
    else:
        link(str(source), str(target))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", help="output directory of a run")
    parser.add_argument("repo_id", help="OWNER/NAME on the Hub, or NAME for one of your own")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch to push to, created if it does not exist (default: main)")
    parser.add_argument("--tag", help="tag for the commit, such as v1")
    arguments = parser.parse_args(argv)
    with one_line_errors():
        if not (Path(arguments.output_dir) / "config.json").is_file():
            raise UserError(f"{arguments.output_dir} has no model (no config.json): give the --output_dir of a run")
        private = arguments.private or None
        try:
            with staged(arguments.output_dir) as stage:
                print(upload(HfApi(), stage, arguments.repo_id, private, arguments.revision, arguments.tag))
        except HUB_ERRORS as error:
            reason = error_summary(error, arguments.repo_id)
            raise UserError(f"{arguments.output_dir} was not pushed to {arguments.repo_id}: {reason}") from error


if __name__ == "__main__":
    main()
