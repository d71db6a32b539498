"""Prepare captioned images of any layout: recognize which it is, say so, and run the command that reads it.

    python -m data_scripts images/ --output_dir data/mine
    python -m data_scripts captions_train2017.json captions_val2017.json --images coco/ --output_dir data/coco

SOURCE is a folder, a zip, a csv or JSON file, tars, a Parquet file, or a dataset on the Hub; it stands before the options, which are those
of the layout's own command: `python -m data_scripts images/ --help` shows them.
"""

import argparse
import importlib
import sys

from data_scripts.layouts import LAYOUTS, recognize
from system.errors import one_line_errors


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    num_sources = next((number for number, word in enumerate(argv) if word.startswith("-")), len(argv))
    sources, options = argv[:num_sources], argv[num_sources:]
    layouts = "\n".join(
        f"  {name:12}{layout.title}; python -m data_scripts.{layout.command}" for name, layout in LAYOUTS.items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m data_scripts",
        usage="python -m data_scripts SOURCE [SOURCE ...] --output_dir DIR [--layout NAME] [options of the layout]",
        description=__doc__,
        epilog=f"layouts:\n{layouts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=not sources,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--layout", choices=LAYOUTS, metavar="NAME", help="layout of SOURCE, see below (default: recognized)"
    )
    arguments, options = parser.parse_known_args(options)
    if not sources:
        parser.error("SOURCE is missing; it stands before the options")
    with one_line_errors():
        name = arguments.layout or recognize(sources)
    command = LAYOUTS[name].command
    if command == "image_folder":
        options = [*options, "--layout", name]
    importlib.import_module(f"data_scripts.{command}").main([*sources, *options])


if __name__ == "__main__":
    main()
