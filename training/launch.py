"""Checks of how a run is launched."""

from collections.abc import Sequence
from importlib.util import find_spec

from accelerate.utils import LoggerType

from system.errors import UserError


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError if a tracker is not installed: Accelerate would skip it silently."""
    for name in names:
        if name in LoggerType.list() and name != "all" and find_spec(name) is None:
            raise UserError(
                f"--report_to {name}: {name} is not installed; pip install {name.replace('_', '-')}, or --report_to none"
            )
