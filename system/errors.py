"""Errors that a user can fix end in one sentence; every other error is a bug of ours and keeps its traceback."""

import errno
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """What a user did wrong, in one sentence that names the file, row or option and what to do."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a `UserError`, and an OSError that names a file or is of a full disk, into `error: ...` on stderr and exit code 2."""
    with warnings.catch_warnings():
        # Pillow's warnings about single images lack the image's name; the summary names it.
        warnings.filterwarnings("ignore", module="PIL")
        try:
            yield
        except UserError as error:
            _exit_with(error)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                _exit_with(
                    UserError("no space left on the device that is written to: free some, and give the command again")
                )
            if error.filename is None:
                raise
            _exit_with(error)


def _exit_with(error: Exception) -> None:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2) from error


def printable(text: str) -> str:
    """Escape what does not print in a name of unknown origin: terminal escape sequences, line ends, lone surrogates."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
