"""SIGTERM as a request: the run saves a checkpoint at the end of its step and exits."""

import os
import signal
import sys

from accelerate import Accelerator
from tqdm.auto import tqdm

EXIT_CODE = 128 + signal.SIGTERM  # what a shell reports of a program that SIGTERM has ended


class StopSignal:
    """Inside its `with` block SIGTERM is remembered; outside it, and when it is left, SIGTERM ends the process."""

    def __init__(self):
        self.stop_requested = self.stop_confirmed = False

    def __enter__(self) -> "StopSignal":
        self._previous_handler = signal.signal(signal.SIGTERM, self._remember)
        return self

    def __exit__(self, *error) -> None:
        signal.signal(signal.SIGTERM, self._previous_handler)
        if self.stop_requested and not self.stop_confirmed:
            os.kill(os.getpid(), signal.SIGTERM)

    def _remember(self, *_) -> None:
        self.stop_requested = True

    def confirm(self, accelerator: Accelerator) -> bool:
        """Whether any process has been asked to stop. All processes must call this after the same steps."""
        if accelerator.num_processes == 1:
            self.stop_confirmed = self.stop_requested
        elif not self.stop_confirmed:
            if self.stop_requested:
                accelerator.set_trigger()
            self.stop_confirmed = accelerator.check_trigger()
        return self.stop_confirmed

    def exit_after_checkpoint(self, accelerator: Accelerator, step: int) -> None:
        """End the process after `checkpoint-STEP` has been saved."""
        if accelerator.is_main_process:
            tqdm.write(
                f"stopped by SIGTERM; checkpoint-{step} is saved: resume with --resume_from_checkpoint last",
                file=sys.stderr,
            )
        raise SystemExit(EXIT_CODE)
