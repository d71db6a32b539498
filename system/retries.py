"""Requests to the Hub: transient errors are retried, the others are summarized in one sentence."""

from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from tenacity import retry, retry_if_exception, stop_after_attempt, wait_exponential

Function = TypeVar("Function", bound=Callable)

ATTEMPTS = 5
FIRST_WAIT_SECONDS = 1.0  # doubled each time


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: the server is busy or failing, or the connection broke."""
    status = _status(error)
    if status is not None:
        return status in (408, 412, 429) or status >= 500
    # Wrong names, offline mode and missing files are permanent; what remains is the network.
    return not isinstance(_first_cause(error), ValueError | TypeError | OfflineModeIsEnabled | FileNotFoundError)


def retried(function: Function) -> Function:
    """Wrap a function so that it is retried up to four times on transient errors.

    huggingface_hub itself retries single requests of an upload, but neither the commit nor the creation of a repository. A
    commit that arrived although its response was lost is not repeated: the client skips files that are there already.
    """
    return retry(
        retry=retry_if_exception(is_transient),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential(FIRST_WAIT_SECONDS),
        reraise=True,
    )(function)


def error_summary(error: BaseException, repo_id: str) -> str:
    """Why a request to a repository failed, and what to do where that is known."""
    status = _status(error)
    if status == 401:
        return "invalid or missing Hub token (401): run `hf auth login` or set HF_TOKEN"
    if status == 403:
        return f"the Hub token has no write access to {repo_id} (403): use a token with write access, or a repository of your own"
    if status == 404:
        return f"{repo_id} or the revision does not exist (404)"
    if status == 409:
        return f"{repo_id} already exists (409): choose another name"
    lines = [line.strip() for line in str(_first_cause(error)).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0].rstrip(".")


def _first_cause(error: BaseException) -> BaseException:
    # The client wraps the error of one file in a RuntimeError that names only the file.
    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError | ValueError):
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    cause = _first_cause(error)
    return cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
