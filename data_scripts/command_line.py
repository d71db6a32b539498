"""What the commands of all sources share: options and the closing summary."""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from data_scripts.archives import MAX_UNPACKED_GIGABYTES
from data_scripts.row_checks import SourceRow, listed_captions
from data_scripts.splits import DEFAULT_SHARE
from system.errors import UserError


def add_output_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", required=True, help="folder for the caption table; must be new or empty")


def add_table_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that the commands of all sources of a user's data have."""
    add_output_option(parser)
    parser.add_argument(
        "--strict", action="store_true", help="stop at the first row that cannot be used and write nothing"
    )
    parser.add_argument(
        "--validation_share",
        type=float,
        default=DEFAULT_SHARE,
        help="fraction of the training images moved to a validation split where the source has none; 0 for no split "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--test_share", type=float, default=DEFAULT_SHARE, help="the same for a test split (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of these splits (default: %(default)s)")
    parser.add_argument(
        "--num_proc", type=int, default=1, help="number of processes that read and check images (default: %(default)s)"
    )
    parser.add_argument(
        "--window",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="values that become black and white of gray images with more than 8 bits (default: each image's minimum and maximum)",
    )


def add_split_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--split_column", help="column that holds each row's split (default: split, where its values are splits)"
    )
    parser.add_argument(
        "--splits",
        metavar="train=NAME,validation=NAME,test=NAME",
        help="the source's names of the splits, several joined by +; the others are not used (default: the usual names)",
    )


def add_archive_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max_unpacked_gigabytes",
        type=float,
        default=MAX_UNPACKED_GIGABYTES,
        help="maximum size in GiB of a download, and of a zip's unpacked files (default: %(default)g)",
    )


def prepare(rows: Sequence[SourceRow], arguments: argparse.Namespace, layout: str) -> None:
    """Write the caption table that the command line asks for; print what the source is taken for, and the closing summary.

    Args:
        layout: The source's layout, in words.
    """
    print(f"recognized: {layout}, {_numbers(rows)}", flush=True)
    if arguments.window:
        low, high = arguments.window
        if not low < high:
            raise UserError(f"--window {low:g} {high:g}: the first must be below the second")
        rows = [replace(row, window=(low, high)) for row in rows]
    write_table(
        rows,
        arguments.output_dir,
        strict=arguments.strict,
        validation_share=arguments.validation_share,
        test_share=arguments.test_share,
        seed=arguments.seed,
        num_proc=arguments.num_proc,
    )


def _numbers(rows: Sequence[SourceRow]) -> str:
    """How many images a source has, and captions for each."""
    captions = [sum(len(listed_captions(cell)) for cell in row.captions) for row in rows if row.read]
    low, high = min(captions, default=0), max(captions, default=0)
    each = (
        f"{low:,} {'caption' if low == 1 else 'captions'} each" if low == high else f"{low:,} to {high:,} captions each"
    )
    return f"{len(captions):,} {'image' if len(captions) == 1 else 'images'}, {each}"


def write_table(rows: Sequence[SourceRow], output_dir: str, **options) -> None:
    """Write a caption table, with the options of `write_caption_table`, and print the closing summary."""
    from data_scripts.caption_table import write_caption_table  # here, so that --help need not import datasets

    summary = write_caption_table(rows, output_dir, **options)
    print(f"{output_dir} is ready\n{summary}")
