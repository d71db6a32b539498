"""What every exchange with the Hub shares: trying again what may pass, and saying in one sentence what does not."""

from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from tenacity import retry, retry_if_exception, stop_after_attempt, wait_exponential

Function = TypeVar("Function", bound=Callable)

ATTEMPTS = 5
FIRST_WAIT_SECONDS = 1.0  # doubled each time


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: the server is busy or broken, or the line was cut."""
    status = _status(error)
    if status is not None:
        return status in (408, 412, 429) or status >= 500
    # Wrong names, being told to stay offline and files that vanished do not mend themselves; the rest is the network's.
    return not isinstance(_first_cause(error), ValueError | TypeError | OfflineModeIsEnabled | FileNotFoundError)


def retried(function: Function) -> Function:
    """The function, called again up to four times where its error may pass.

    huggingface_hub repeats single requests of an upload by itself, but neither the commit nor the making of a repository. A commit
    that arrived, and whose answer was lost, is not made twice: the client leaves out files that are there already.
    """
    return retry(
        retry=retry_if_exception(is_transient),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential(FIRST_WAIT_SECONDS),
        reraise=True,
    )(function)


def error_summary(error: BaseException, repo_id: str) -> str:
    """Why an exchange with a repository failed, and what to do where that is known."""
    status = _status(error)
    if status == 401:
        return "the Hub wants a token that is valid there (401): log in with `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return f"the token may not write to {repo_id} (403): take a token that may, or a repository of your own"
    if status == 404:
        return f"there is no {repo_id}, or no such revision of it (404)"
    if status == 409:
        return f"{repo_id} has that name already (409): take another"
    lines = [line.strip() for line in str(_first_cause(error)).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0].rstrip(".")


def _first_cause(error: BaseException) -> BaseException:
    # The client wraps what went wrong with one file into a RuntimeError that tells only the file.
    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError | ValueError):
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    cause = _first_cause(error)
    return cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
