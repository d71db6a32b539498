"""Requests that arrive together are captioned together."""

import threading
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from system.errors import UserError

if TYPE_CHECKING:
    from captioning.onnx_captioner import OnnxCaptioner
    from modeling.captioner import Captioner

SECONDS_TO_GATHER = 0.01  # that the first image of a batch waits for others


class BatchingCaptioner:
    """A captioner that takes single images from any thread, and captions in one thread what has gathered.

    Args:
        captioner: In eval, on its device.
        batch_size: Images captioned together.
    """

    def __init__(self, captioner: "Captioner | OnnxCaptioner", batch_size: int):
        self.captioner, self.batch_size = captioner, batch_size
        self._waiting: deque[tuple[Any, int | None, Future]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, prepared: Any, max_new_tokens: int | None = None) -> Future:
        """The future of one image's caption, as `Captioner.generate` returns it.

        Args:
            prepared: What the captioner's `prepare` makes of the image.
            max_new_tokens: Of the caption; None for the captioner's own.
        """
        future: Future = Future()
        with self._changed:
            self._waiting.append((prepared, max_new_tokens, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Caption what waits, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _gather(self) -> list[tuple]:
        """The next images with the same settings; none once the captioner is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            self._changed.wait_for(lambda: len(self._waiting) >= self.batch_size or self._closed, SECONDS_TO_GATHER)
            batch = [one for one in self._waiting if one[1] == self._waiting[0][1]][: self.batch_size]
            taken = {id(one) for one in batch}
            self._waiting = deque(one for one in self._waiting if id(one) not in taken)
            return batch

    def _work(self) -> None:
        while batch := self._gather():
            self._caption(batch)

    def _caption(self, batch: list[tuple]) -> None:
        try:
            inputs = self.captioner.on_device(self.captioner.collate([one[0] for one in batch]))
            length = {"max_new_tokens": batch[0][1]} if batch[0][1] else {}
            captions = self.captioner.generate(inputs, **length)
        except UserError as error:  # of one image, which only who asked for it gets
            if len(batch) == 1:
                batch[0][2].set_exception(error)
                return
            for one in batch:
                self._caption([one])
        except Exception as error:  # whoever asked gets it
            for *_, future in batch:
                future.set_exception(error)
        else:
            for (*_, future), caption in zip(batch, captions, strict=True):
                future.set_result(caption)
