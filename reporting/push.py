"""Send what a run has left to the Hub, or fetch a checkpoint back.

    python -m reporting.push outputs/lstm me/captioner --private --tag v1

The repository is made where it does not exist. Checkpoints and logs stay, and so do the images of a data set that may not be
shown (see `--publish_images` of the training scripts).
"""

import argparse
import logging
import math
import os
import re
import shutil
import sys
import tempfile
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from transformers.trainer_utils import HubStrategy

from reporting.model_card import name_on_card
from reporting.results import read_results
from system.errors import UserError
from system.files import write_file
from system.retries import error_summary, retried

logger = logging.getLogger(__name__)

# Checkpoints hold optimizer states, logs name paths, what begins with a dot is half done.
LEFT_HERE = re.compile(r"checkpoint-.*|logs|runs|\..*")
LAST = "last-checkpoint"  # where the Trainer of transformers puts it, too


def push_to_hub(
    output_dir: str | os.PathLike,
    repo_id: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str | None:
    """Upload model, processor, results, page and card of an output directory at the end of a training.

    Args:
        repo_id: Repository, made where it does not exist; the folder's name, of the user who is logged in, where None.
        private: Whether a new repository is a private one; as the account is set up where None.
        revision: Branch to push to, made where it does not exist; main where None.
        token: Of the user; that of `hf auth login` or HF_TOKEN where None.

    Returns:
        The address of the commit, or None where the upload failed: that is said, and never ends a training.
    """
    repo_id = repo_id or Path(output_dir).resolve().name
    try:
        with staged(output_dir) as stage:
            return upload(HfApi(token=token), stage, repo_id, private, revision)
    except Exception as error:  # whatever it is, a training of days is not to end with a traceback over an upload
        logger.error(
            f"{output_dir} was not pushed to {repo_id}: {error_summary(error, repo_id)}. "
            f"It is whole on disk: `python -m reporting.push {output_dir} {repo_id}` pushes it again."
        )
        return None


def staged(
    output_dir: str | os.PathLike, checkpoint: Path | None = None, as_folder: str = ""
) -> tempfile.TemporaryDirectory:
    """A folder of links to what is to be pushed, so that the training may go on, replace and delete while it is read.

    Args:
        checkpoint: A checkpoint to send along, under the name `as_folder`.
    """
    output_dir = Path(output_dir)
    names = [path.name for path in output_dir.iterdir() if not LEFT_HERE.fullmatch(path.name)]
    if "captions.html" in names and not _may_be_shown(output_dir):
        names.remove("captions.html")  # has every image in it
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
    """Make repository and branch where they are missing, and commit a staged folder.

    Args:
        tag: Name for the commit.
        replace: Folder of the repository whose other files go.

    Returns:
        The address of the commit.
    """
    repo_id = retried(api.create_repo)(repo_id, private=private, exist_ok=True).repo_id
    if revision:
        retried(api.create_branch)(repo_id, branch=revision, exist_ok=True)
    card = Path(stage) / "README.md"
    if card.exists():
        write_file(card, name_on_card(card.read_text(encoding="utf-8"), repo_id).encode())
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


class CheckpointPush:
    """Checkpoints on their way to the Hub while the training goes on, one at a time.

    Args:
        args: Of a training, with the names of `transformers.TrainingArguments`: `output_dir`, `hub_model_id`, `hub_private_repo`,
            `hub_revision`, and `hub_strategy`: at each checkpoint "every_save" sends what stands in output_dir (the best
            model so far), "checkpoint" the checkpoint as well, as `last-checkpoint`, "all_checkpoints" each under its own
            name; "end" sends nothing before the end.
        active: Whether this process is to send anything.
        token: As of `push_to_hub`.

    Raises:
        ValueError: There is no such strategy.
    """

    def __init__(self, args, active: bool, token: str | None = None):
        self.args = args
        self.strategy = HubStrategy(args.hub_strategy)
        self.active = active and self.strategy != HubStrategy.END
        self.repo_id = args.hub_model_id or Path(args.output_dir).resolve().name
        self.api = HfApi(token=token)
        self.running: Future | None = None

    def send(self, step: int) -> None:
        """Start to send the checkpoint of a step; while the one before is still on its way, this one is left out."""
        if not self.active:
            return
        if self.running is not None and not self.running.done():
            logger.info(f"checkpoint-{step} is not pushed: the one before is still on its way.")
            return
        self.finish()
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{step}"
        name = {HubStrategy.CHECKPOINT: LAST, HubStrategy.ALL_CHECKPOINTS: checkpoint.name}.get(self.strategy, "")
        try:
            stage = staged(self.args.output_dir, checkpoint if name else None, name)
        except OSError as error:
            self._say(error, step)
            return
        self.running = self.api.run_as_future(self._upload, stage, name, step)

    def finish(self) -> None:
        """Wait for what is on its way."""
        if self.running is not None:
            self.running.result()

    def _upload(self, stage: tempfile.TemporaryDirectory, replace: str, step: int) -> None:
        try:
            with stage:
                private, revision = self.args.hub_private_repo, self.args.hub_revision
                upload(self.api, stage.name, self.repo_id, private, revision, replace=replace)
        except Exception as error:  # as in push_to_hub
            self._say(error, step)

    def _say(self, error: Exception, step: int) -> None:
        logger.error(f"Step {step} was not pushed to {self.repo_id}: {error_summary(error, self.repo_id)}.")


def download_checkpoint(name: str) -> Path:
    """The newest checkpoint of a Hub repository, for `--resume_from_checkpoint OWNER/NAME` or `OWNER/NAME@REVISION`.

    Beside it comes what lies beside it there, the best model so far. Nothing of either is run: weights are safetensors, optimizer
    and random states are read by `torch.load(weights_only=True)`, the rest is JSON. The LSTM captioner's code lies beside its model, for who
    asks for remote code when loading that.

    Raises:
        ValueError: There is no such repository, or no checkpoint in it.
    """
    repo_id, _, revision = name.partition("@")
    try:
        paths = retried(HfApi().list_repo_files)(repo_id, revision=revision or None)
        folders = {path.split("/")[0] for path in paths if re.match(rf"({LAST}|checkpoint-\d+)/", path)}
        if not folders:
            raise UserError("it holds no checkpoint; `--hub_strategy checkpoint` sends them")
        newest = max(folders, key=lambda folder: math.inf if folder == LAST else int(folder.split("-")[1]))
        beside = [path for path in paths if "/" not in path]
        patterns = [f"{newest}/*", *beside]
        folder = Path(retried(snapshot_download)(repo_id, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # the client's own are many
        raise UserError(
            f"--resume_from_checkpoint {name}: there is no such folder with a checkpoint, and on the Hub "
            f"{error_summary(error, repo_id)}; give a checkpoint folder, `last`, or a repository"
        ) from error
    return folder / newest


def _may_be_shown(output_dir: Path) -> bool:
    try:
        return read_results(output_dir).get("publish_images") is True
    except ValueError:  # where nothing says so, they may not
        return False


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or for every file of a folder; a copy where the disk has no such names."""

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
    parser.add_argument("output_dir", help="folder that a training has left")
    parser.add_argument("repo_id", help="OWNER/NAME on the Hub, or NAME among your own")
    parser.add_argument("--private", action="store_true", help="make a new repository a private one")
    parser.add_argument("--revision", help="branch to push to, made where it does not exist; main if not given")
    parser.add_argument("--tag", help="name for the commit, such as v1")
    arguments = parser.parse_args(argv)
    try:
        if not (Path(arguments.output_dir) / "config.json").is_file():
            raise UserError(
                f"{arguments.output_dir} holds no model (config.json is missing): give a run's --output_dir"
            )
        with staged(arguments.output_dir) as stage:
            private = arguments.private or None
            print(upload(HfApi(), stage, arguments.repo_id, private, arguments.revision, arguments.tag))
    except Exception as error:  # the client's own are many
        sentence = error_summary(error, arguments.repo_id)
        print(f"error: {arguments.output_dir} was not pushed to {arguments.repo_id}: {sentence}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
