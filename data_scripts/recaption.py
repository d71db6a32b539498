r"""Give the training images of a data set the captions that a captioner writes for them, in place of their own.

    accelerate launch evaluate_captions.py --model_name_or_path outputs/lstm --dataset_name data/mine --split train \
        --num_beams 8 --num_return_sequences 8 --output_dir outputs/written
    python -m data_scripts.recaption data/mine outputs/written/best_captions.jsonl --output_dir data/mine_recaptioned

A captioner that goes on learning from what it, or a larger one, has written with beams writes as well without them: sequence-level
knowledge distillation from captions.jsonl, interpolation from best_captions.jsonl, whose captions are the nearest to the image's
own (Kim and Rush 2016, https://arxiv.org/abs/1606.07947, sections 3.2 and 3.3). The other splits stay as they are.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from data_scripts.caption_table import write_caption_table
from data_scripts.hub import dataset_rows
from data_scripts.load import load_captions
from data_scripts.row_checks import SourceRow
from reporting.results import read_captions
from system.errors import UserError, one_line_errors, printable


def recaptioned(rows: Sequence[SourceRow], files: Sequence[str]) -> list[SourceRow]:
    """The same rows; a training image's captions are those that the files have for it, one each.

    Raises:
        ValueError: A file has none for a training image.
    """
    captions = [{record["image_id"]: record["caption"] for record in read_captions(file)} for file in files]
    for file, written in zip(files, captions, strict=True):
        for row in rows:
            if row.split == "train" and row.image_id not in written:
                raise UserError(
                    f"{file} has no caption of the training image {printable(row.image_id)}: caption all of them, "
                    "with evaluate_captions.py --split train"
                )
    return [
        replace(row, captions=[written[row.image_id] for written in captions]) if row.split == "train" else row
        for row in rows
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="caption table saved by a command of data_scripts, other data set, or scenes")
    parser.add_argument(
        "captions",
        nargs="+",
        help="captions.jsonl, or best_captions.jsonl, of its training split; several give several captions",
    )
    parser.add_argument("--output_dir", required=True, help="where the caption table is saved; must be new or empty")
    arguments = parser.parse_args(argv)
    with one_line_errors():
        rows = dataset_rows(load_captions(arguments.source, splits=("train",)), source=arguments.source)
        rows = recaptioned(rows, arguments.captions)
        summary = write_caption_table(rows, arguments.output_dir, validation_share=0, test_share=0)
        print(f"{arguments.output_dir} is ready\n{summary}")


if __name__ == "__main__":
    main()
