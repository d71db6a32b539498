"""Requests to the Hub: retries of transient errors, and one-sentence summaries of the others."""

import re
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from tenacity import retry, retry_if_exception, stop_after_attempt, wait_exponential

Function = TypeVar("Function", bound=Callable)

ATTEMPTS = 5
FIRST_WAIT_SECONDS = 1.0  # doubled each time
# HTTP libraries quote a header that they refuse, and URLs may name user and password.
SECRETS = re.compile(r"(?<=Bearer )[^'\"\s]+|\bhf_[A-Za-z0-9]{20,}|(?<=://)[^/@\s]+(?=@)")


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: the server is busy or down, or the connection broke."""
    status = _status(error)
    if status is not None:
        return status in (408, 412, 429) or status >= 500
    # Invalid names, offline mode and missing files are permanent; the rest is the network's.
    return not isinstance(_first_cause(error), ValueError | TypeError | OfflineModeIsEnabled | FileNotFoundError)


def retried(function: Function) -> Function:
    """Return the function with up to four retries of transient errors.

    huggingface_hub retries the single requests of an upload itself, but neither the commit nor the creation of a
    repository. A commit that was made although its response was lost is not made twice: the client skips files that
    exist already.
    """
    return retry(
        retry=retry_if_exception(is_transient),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential(FIRST_WAIT_SECONDS),
        reraise=True,
    )(function)


def error_summary(error: BaseException, repo_id: str) -> str:
    """Why a request to a repository failed, and what to do about it if that is known. Never contains the token."""
    status = _status(error)
    if status == 401:
        return "invalid or missing Hub token (401): run `hf auth login` or set HF_TOKEN"
    if status == 403:
        return (
            f"the Hub token has no write access to {repo_id} (403): use a token that has, or a repository of your own"
        )
    if status == 404:
        return f"{repo_id} or this revision of it does not exist (404)"
    if status == 409:
        return f"{repo_id} has this name already (409): use another"
    lines = [line.strip() for line in str(_first_cause(error)).splitlines() if line.strip()]
    return SECRETS.sub("...", (lines or [type(error).__name__])[0]).rstrip(".")


def _first_cause(error: BaseException) -> BaseException:
    # The client wraps the error of one file in a RuntimeError that names only the file.
    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError | ValueError):
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    cause = _first_cause(error)
    return cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
