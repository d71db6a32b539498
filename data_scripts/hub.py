"""Prepare any dataset on the Hub, or a folder that `datasets` can read or has saved.

    python -m data_scripts.hub OWNER/NAME --image_column image --caption_column caption --output_dir data/name

The caption column holds a text or a list of texts; several columns may be named. The image column holds images, or their files'
bytes. Rows with the same image are its captions; where there is a column `image_id`, if they share that, too.
"""

import argparse

from data_scripts.archives import open_files
from data_scripts.command_line import add_split_options, add_table_options, prepare
from data_scripts.image_folder import has_metadata, image_folder_rows
from system.errors import one_line_errors


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="ID of a dataset on the Hub, a folder, or a Parquet file")
    parser.add_argument("--image_column", default="image", help="image column (default: image)")
    parser.add_argument("--caption_column", nargs="+", help="caption columns (default: captions, caption or text)")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub (default: main)")
    parser.add_argument("--config_name", help="configuration, of a dataset that has several")
    add_split_options(parser)
    add_table_options(parser)
    arguments = parser.parse_args(argv)
    columns = arguments.caption_column, arguments.split_column, arguments.splits
    if has_metadata(arguments.source):
        with one_line_errors(), open_files(arguments.source) as files:
            prepare(image_folder_rows(files, *columns), arguments, "images beside a metadata file")
        return
    with one_line_errors():
        from data_scripts.dataset_rows import (  # here, so that --help need not import datasets
            dataset_rows,
            open_dataset,
        )

        dataset = open_dataset(arguments.source, arguments.revision, arguments.config_name)
        rows = dataset_rows(dataset, arguments.source, arguments.image_column, *columns)
        prepare(rows, arguments, "dataset that `datasets` reads")


if __name__ == "__main__":
    main()
