"""The three splits: their names, and cutting a missing one off the training images."""

import random
from collections.abc import Sequence

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
}


def cut_missing_splits(
    row_numbers: dict[str, list[int]],
    content_hashes: Sequence[str],
    shares: dict[str, float],
    seed: int,
) -> dict[str, list[int]]:
    """Cut each split that is missing off the training split, by image.

    Rows with the same image stay together, so that no cut puts an image on both sides. A split that is there
    keeps its rows; without a training split nothing is cut.

    Args:
        row_numbers: The rows of each split that the source has.
        content_hashes: Of every row's image, by row number.
        shares: Of the training images, for "validation" and "test" where the source has none; 0 leaves it out.
        seed: Which images are drawn depends on this and on the rows, nothing else.

    Raises:
        UserError: There are too few training images to cut from.
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
            f"{len(rows_by_hash)} training images are too few to cut {' and '.join(missing)} off: give more, "
            "or leave the splits out with --validation_share 0 --test_share 0"
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
    # In the source's own order, whatever the draw.
    result["train"] = [row for row in result["train"] if row not in taken]
    for split in missing:
        if not result[split]:
            raise UserError(f"no training image is left for {split}: lower --validation_share and --test_share")
        result[split].sort()
    return result
