r"""Replace the captions of a dataset's training images by captions that a captioner generated.

    accelerate launch evaluate_captions.py --model_name_or_path outputs/lstm --dataset_name data/mine --split train \
        --num_beams 8 --num_return_sequences 8 --output_dir outputs/generated
    python -m data_scripts.recaption data/mine outputs/generated/best_captions.jsonl --output_dir data/mine_recaptioned

A captioner trained on its own beam-search captions, or on a larger one's, generates as well with greedy decoding: sequence-level
knowledge distillation with captions.jsonl, sequence-level interpolation with best_captions.jsonl, which holds the candidates closest
to the references (Kim and Rush 2016, https://arxiv.org/abs/1606.07947, sections 3.2 and 3.3). The other splits are unchanged.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from data_scripts.captions_file import read_captions
from data_scripts.row_checks import SourceRow
from system.errors import UserError, one_line_errors, printable


def recaptioned(rows: Sequence[SourceRow], files: Sequence[str]) -> list[SourceRow]:
    """Replace each training image's captions by one caption from each file.

    Raises:
        UserError: A file has no caption for a training image.
    """
    captions = [{record["image_id"]: record["caption"] for record in read_captions(file)} for file in files]
    for file, caption_of in zip(files, captions, strict=True):
        for row in rows:
            if row.split == "train" and row.image_id not in caption_of:
                raise UserError(
                    f"{file} has no caption for the training image {printable(row.image_id)}: generate captions for all of "
                    "them with evaluate_captions.py --split train"
                )
    return [
        replace(row, captions=[caption_of[row.image_id] for caption_of in captions]) if row.split == "train" else row
        for row in rows
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="caption table saved by a command of data_scripts, any other dataset, or scenes")
    parser.add_argument(
        "captions",
        nargs="+",
        help="captions.jsonl or best_captions.jsonl of the training split; several files give several captions per image",
    )
    parser.add_argument("--output_dir", required=True, help="folder for the caption table; must be new or empty")
    arguments = parser.parse_args(argv)
    with one_line_errors():
        # Here, so that --help need not import datasets.
        from data_scripts.caption_table import write_caption_table
        from data_scripts.dataset_rows import dataset_rows
        from data_scripts.load import load_captions

        rows = dataset_rows(load_captions(arguments.source, splits=("train",)), source=arguments.source)
        rows = recaptioned(rows, arguments.captions)
        summary = write_caption_table(rows, arguments.output_dir, validation_share=0, test_share=0)
        print(f"{arguments.output_dir} is ready\n{summary}")


if __name__ == "__main__":
    main()
