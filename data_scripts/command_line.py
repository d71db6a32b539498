"""What the commands of all sources share: options and the closing summary."""

import argparse
from collections.abc import Sequence

from data_scripts.archives import MAX_UNPACKED_GIGABYTES
from data_scripts.caption_table import DEFAULT_SHARE, write_caption_table
from data_scripts.row_checks import SourceRow


def add_table_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every source's command has."""
    parser.add_argument("--output_dir", required=True, help="where the caption table is saved; must be new or empty")
    parser.add_argument("--strict", action="store_true", help="stop at a row that cannot be used, writing nothing")
    parser.add_argument(
        "--validation_share",
        type=float,
        default=DEFAULT_SHARE,
        help="part of the training images cut off where there is no validation split; 0 leaves it out",
    )
    parser.add_argument("--test_share", type=float, default=DEFAULT_SHARE, help="the same for the test split")
    parser.add_argument("--seed", type=int, default=0, help="of the cut")


def add_archive_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max_unpacked_gigabytes",
        type=float,
        default=MAX_UNPACKED_GIGABYTES,
        help="refuse a zip that unpacks, or a download that comes, to more GiB than this",
    )


def prepare(rows: Sequence[SourceRow], arguments: argparse.Namespace) -> None:
    """Write the caption table that the command line asks for and print the closing summary."""
    summary = write_caption_table(
        rows,
        arguments.output_dir,
        strict=arguments.strict,
        validation_share=arguments.validation_share,
        test_share=arguments.test_share,
        seed=arguments.seed,
    )
    print(f"{arguments.output_dir} is ready\n{summary}")
