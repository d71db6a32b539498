"""The processes of `accelerate launch` or `torchrun` that share one job. They wait for one another, and count."""

import os
from dataclasses import dataclass
from datetime import timedelta

LONGEST_WAIT = timedelta(days=30)  # for a process that has more to do


@dataclass
class Processes:
    """This process among those that were launched together.

    Args:
        index: This one's number, 0 is the first.
        number: Of all of them.
        local_index: This one's number on its machine: that of its GPU.
    """

    index: int = 0
    number: int = 1
    local_index: int = 0

    @classmethod
    def launched(cls) -> "Processes":
        """As the launcher's environment says."""
        names = {"index": "RANK", "number": "WORLD_SIZE", "local_index": "LOCAL_RANK"}
        return cls(**{name: int(os.environ[variable]) for name, variable in names.items() if variable in os.environ})

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def wait_for_all(self) -> None:
        """Return when every process is here."""
        self.total(0)

    def total(self, *numbers: int) -> list[int]:
        """The sum of each number over all processes."""
        if self.number == 1:
            return list(numbers)
        import torch
        import torch.distributed

        if not torch.distributed.is_initialized():
            # gloo, although there may be GPUs: nothing but this is sent.
            torch.distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
        totals = torch.tensor(numbers)
        torch.distributed.all_reduce(totals)
        return totals.tolist()

    def end(self) -> None:
        """Leave the others in order."""
        if self.number > 1:
            import torch.distributed

            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
