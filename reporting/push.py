"""Send what a run has left to the Hub."""

import logging
import os
from pathlib import Path

from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

# Checkpoints hold optimiser states, logs name paths.
LEFT_HERE = ["checkpoint-*", ".checkpoint-*", ".saving-*", "logs/*", "runs/*"]


def push_to_hub(output_dir: str | os.PathLike, repo_id: str | None = None, private: bool = False) -> str | None:
    """Upload model, processor, results, page and card of an output directory; checkpoints and logs stay.

    Args:
        repo_id: Repository, made where it does not exist; the folder's name, of the user who is logged in, where None.
        private: Whether a new repository is a private one.

    Returns:
        The address of the commit, or None where the upload failed: that is said, and never ends a training.
    """
    api = HfApi()
    repo_id = repo_id or Path(output_dir).resolve().name
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=output_dir, ignore_patterns=LEFT_HERE, commit_message="Trained with showtell"
        )
    except Exception as error:  # whatever it is, a training of days is not to end with a traceback over an upload
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        logger.error(
            f"{output_dir} was not pushed to {repo_id}: {reason}. It is whole on disk; log in (`hf auth login`) and push again."
        )
        return None
    return str(commit)
