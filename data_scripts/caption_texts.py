"""All captions of a split, read from disk in batches: what grows with the data set never stands in memory."""

from collections.abc import Iterator

import numpy as np
from datasets import Dataset

ROWS_PER_BATCH = 10_000


def caption_batches(rows: Dataset) -> Iterator[tuple[list[str], np.ndarray]]:
    """The captions of 10,000 rows at a time, one list for all of them, and how many each row has, int64 (rows,)."""
    for table in rows.select_columns(["captions"]).with_format("arrow").iter(ROWS_PER_BATCH):
        captions = table["captions"].combine_chunks()
        yield captions.flatten().to_pylist(), np.asarray(captions.value_lengths()).astype(np.int64)


class CaptionTexts:
    """The captions of rows in their order, to be iterated over as often as one likes.

    Args:
        rows: Rows with `captions`.
    """

    def __init__(self, rows: Dataset):
        self.rows = rows
        self._length: int | None = None

    def __len__(self) -> int:
        if self._length is None:
            self._length = sum(len(texts) for texts, _ in caption_batches(self.rows))
        return self._length

    def __iter__(self) -> Iterator[str]:
        for texts, _ in caption_batches(self.rows):
            yield from texts
