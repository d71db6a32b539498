"""SIGTERM as a request: the run saves at the end of its step and leaves."""

import ctypes
import os
import signal
import sys

from accelerate import Accelerator

EXIT_CODE = 128 + signal.SIGTERM  # what a shell reports of a program that SIGTERM has ended
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def follow_launcher() -> None:
    """Have Linux send this process SIGTERM when `accelerate launch` has ended, however it has.

    With one process the launcher passes no signal on, and a run would go on behind the back of whoever has stopped it; with
    several it does, but not where it is killed itself.
    """
    # The launcher alone sets this. A run started without it shall outlive the shell it was started from.
    if sys.platform == "linux" and "ACCELERATE_DYNAMO_BACKEND" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class StopSignal:
    """Remembers, inside its `with` block, that SIGTERM has come; outside it, and at its end, SIGTERM ends the process.

    `heard` is whether all processes know of it.
    """

    def __init__(self):
        self.received = self.heard = False

    def __enter__(self) -> "StopSignal":
        self.handler_before = signal.signal(signal.SIGTERM, self._remember)
        return self

    def __exit__(self, *error) -> None:
        signal.signal(signal.SIGTERM, self.handler_before)
        if self.received and not self.heard:
            os.kill(os.getpid(), signal.SIGTERM)

    def _remember(self, *_) -> None:
        self.received = True

    def ask(self, accelerator: Accelerator) -> bool:
        """Whether any process has got it. All processes have to ask after the same steps."""
        if accelerator.num_processes == 1:
            self.heard = self.received
        elif not self.heard:
            if self.received:
                accelerator.set_trigger()
            self.heard = accelerator.check_trigger()
        return self.heard

    def leave(self, accelerator: Accelerator, step: int) -> None:
        """End the process, after `checkpoint-STEP` has been saved."""
        if accelerator.is_main_process:
            print(
                f"stopped by SIGTERM; checkpoint-{step} is saved: go on with --resume_from_checkpoint last",
                file=sys.stderr,
            )
        raise SystemExit(EXIT_CODE)
