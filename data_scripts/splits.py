"""The three splits: their names, and making a missing one from training images."""

import random
from collections.abc import Iterable, Sequence
from typing import Any

from system.errors import UserError

DEFAULT_SHARE = 0.05
SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}


class SplitNames:
    """What a source's names of splits mean: "train", "validation", "test", or None for a name that is not used.

    Args:
        given: `--splits train=NAME,validation=NAME,test=NAME`; where not given, the usual names count.

    Raises:
        UserError: `given` is not of that form.
    """

    def __init__(self, given: str | None = None):
        self.names: dict[str, str] | None = None
        self.default = "train" if given is None else None  # of what has no split of its own
        if given is not None:
            self.names = {}
            for part in given.split(","):
                split, equals, names = part.partition("=")
                if not equals or split.strip() not in SPLITS:
                    raise UserError(f"--splits {given}: give train=NAME,validation=NAME,test=NAME, or fewer of them")
                for name in names.split("+"):
                    if self.names.setdefault(name.strip(), split.strip()) != split.strip():
                        raise UserError(f"--splits {given}: '{name}' is named twice")

    def __call__(self, name: Any) -> str | None:
        """The split that a name of the source, or a number in its place, means."""
        if not isinstance(name, str | int):
            return None
        name = str(name)
        if self.names is None:
            return SPLIT_NAMES.get(name.strip().casefold())
        return self.names.get(name)

    def check(self, there: Iterable[Any]) -> None:
        """Raise UserError if `--splits` names something that is not `there`."""
        there = list(dict.fromkeys(map(str, there)))
        for name in self.names or ():
            if name not in there:
                raise UserError(f"--splits: there is no split '{name}', only {', '.join(there)}")


def cut_missing_splits(
    row_numbers: dict[str, list[int]],
    content_hashes: Sequence[str],
    shares: dict[str, float],
    seed: int,
) -> dict[str, list[int]]:
    """Make each missing split from images of the training split.

    Rows with the same image stay together, so that no image is in two splits. A split that is there keeps its rows;
    without a training split none is made.

    Args:
        row_numbers: The rows of each split that the source has.
        content_hashes: Hash of every row's image, by row number.
        shares: Fraction of the training images for "validation" and "test" where the source has none; 0 for no split.
        seed: Random seed; the choice depends on it and on the rows, nothing else.

    Raises:
        UserError: There are too few training images.
    """
    result = {split: list(row_numbers[split]) for split in SPLITS if row_numbers.get(split)}
    missing = [split for split in ("validation", "test") if split not in result and shares[split] > 0]
    if "train" not in result or not missing:
        return result

    rows_by_hash: dict[str, list[int]] = {}
    for row in result["train"]:
        rows_by_hash.setdefault(content_hashes[row], []).append(row)
    if len(rows_by_hash) <= len(missing):
        raise UserError(
            f"{len(rows_by_hash)} training images are too few for {' and '.join(missing)} splits: give more, "
            "or make no splits with --validation_share 0 --test_share 0"
        )
    groups = list(rows_by_hash.values())
    random.Random(seed).shuffle(groups)
    num_train = len(result["train"])
    for split in missing:
        wanted = max(1, round(shares[split] * num_train))
        result[split] = []
        while len(result[split]) < wanted and len(groups) > 1:
            result[split] += groups.pop()
    taken = {row for split in missing for row in result[split]}
    # In the source's own order.
    result["train"] = [row for row in result["train"] if row not in taken]
    for split in missing:
        if not result[split]:
            raise UserError(f"no training image is left for {split}: lower --validation_share and --test_share")
        result[split].sort()
    return result
