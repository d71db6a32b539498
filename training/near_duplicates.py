"""Find near-duplicate images and captions in two splits: what a captioner is tested on, and has all but seen in training.

    python -m training.near_duplicates data/mine --model_name_or_path outputs/mine --output_dir outputs/near_duplicates

Images are compared by the captioner's own encoder, captions by their words. The pairs are printed, and with --output_dir written to
near_duplicates.json and, side by side, near_duplicates.html. Identical bytes are found by the data_scripts commands already.
"""

import json
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from system.errors import UserError, one_line_errors
from training.arguments import option, parse_recipe

if TYPE_CHECKING:
    import numpy as np
    import torch
    from datasets import DatasetDict

NUM_PRINTED, NUM_SHOWN = 10, 200
ROWS_AT_ONCE = 256


@dataclass
class NearDuplicateArguments:
    dataset_name: str = option(
        "scenes", "Folder made by a data_scripts command, dataset on the Hub, or `scenes`.", positional="?"
    )
    model_name_or_path: str | None = option(
        None, "Folder or Hub id of a captioner whose encoder compares images; captions alone if not given."
    )
    image_threshold: float = option(
        0.85, "Min cosine similarity of a pair of images, of their features less the mean.", above=0, max=1
    )
    caption_threshold: float = option(
        0.9, "Min cosine similarity of a pair of captions, of their words weighted by TF-IDF.", above=0, max=1
    )
    output_dir: str | None = option(
        None, "Folder for near_duplicates.json and near_duplicates.html; printed only if not given."
    )
    feature_cache: Literal["float16", "int8"] = option(
        "float16", "Type in which features are cached, and those of training are read."
    )
    dataloader_num_workers: int = option(
        0, "Number of processes that decode images; 0 decodes in the main process.", min=0
    )

    compile_encoder = False  # what `encode_splits` asks of a run


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_recipe((NearDuplicateArguments,), argv, __doc__)
    with one_line_errors():
        from data_scripts import load_captions

        dataset = load_captions(args.dataset_name)
        if len(dataset) < 2:
            raise UserError(
                f"{args.dataset_name} has one split, {next(iter(dataset))}: near-duplicates are searched for between two"
            )
        found = {"captions": caption_pairs(dataset, args.caption_threshold)}
        if args.model_name_or_path:
            found["images"] = image_pairs(dataset, args)
        for kind, pairs in found.items():
            print_pairs(kind, pairs)
        if args.output_dir:
            write_pairs(args.output_dir, dataset, found)


def image_pairs(dataset: "DatasetDict", args: NearDuplicateArguments) -> list[dict]:
    """Pairs of images of two splits whose features have at least the cosine `image_threshold`, most alike first.

    An image's features are the mean over the encoder's positions, less the mean over all images: without that, what all images have
    in common brings every cosine near 1.
    """
    import torch

    means = encode_means(dataset, args)
    units = unit_rows(means, torch.cat(list(means.values())).mean(dim=0))
    pairs = []
    for first, second in combinations(dataset, 2):
        for i, j, cosine in pairs_above(units[first], units[second], args.image_threshold):
            ids = dataset[first][i]["image_id"], dataset[second][j]["image_id"]
            pairs.append({"splits": [first, second], "rows": [i, j], "image_ids": list(ids), "cosine": cosine})
    return sorted(pairs, key=lambda pair: -pair["cosine"])


def encode_means(dataset: "DatasetDict", args: NearDuplicateArguments) -> dict[str, "torch.Tensor"]:
    """The encoder's features of each split's images, averaged over positions, float32 (images, size)."""
    import torch

    from modeling.captioner import Captioner
    from training.features import encode_splits

    captioner = Captioner.load(args.model_name_or_path)
    captioner.to("cuda" if torch.cuda.is_available() else "cpu")
    encoder = captioner.encoder.requires_grad_(False)
    features = encode_splits(dataset, encoder, captioner.image_processor, args)
    return {split: mean_features(columns[0]) for split, columns in features.items()}


def unit_rows(means: dict[str, "torch.Tensor"], center: "torch.Tensor") -> dict[str, "torch.Tensor"]:
    """Each row less the center, of length one."""
    import torch

    return {split: torch.nn.functional.normalize(rows - center, dim=1) for split, rows in means.items()}


def mean_features(features) -> "torch.Tensor":
    """The mean over positions of each image's features, float32 (images, size)."""
    import numpy as np
    import torch

    means = []
    for row in range(len(features)):
        columns = features[[row]]
        values = np.asarray(columns["encoder_features"][0], dtype=np.float32)
        if "feature_scale" in columns:
            values = values * np.asarray(columns["feature_scale"][0], dtype=np.float32)
        means.append(values.reshape(-1, values.shape[-1]).mean(axis=0))
    return torch.from_numpy(np.stack(means))


def caption_pairs(dataset: "DatasetDict", threshold: float) -> list[dict]:
    """Pairs of captions of two splits whose words have at least the cosine `threshold`, most alike first.

    Words count as often as they occur times log(captions / captions with the word); their order does not count.
    """
    texts = {split: [text for texts in rows["captions"] for text in texts] for split, rows in dataset.items()}
    owners = {
        split: [row for row, texts in enumerate(rows["captions"]) for _ in texts] for split, rows in dataset.items()
    }
    matrices = caption_rows(texts)
    ids = {split: rows["image_id"] for split, rows in dataset.items()}
    pairs = []
    for first, second in combinations(dataset, 2):
        for i, j, cosine in pairs_above(matrices[first], matrices[second], threshold):
            rows = [owners[first][i], owners[second][j]]
            pairs.append(
                {
                    "splits": [first, second],
                    "rows": rows,
                    "image_ids": [ids[first][rows[0]], ids[second][rows[1]]],
                    "captions": [texts[first][i], texts[second][j]],
                    "cosine": cosine,
                }
            )
    return sorted(pairs, key=lambda pair: -pair["cosine"])


def caption_rows(texts: dict[str, list[str]]) -> dict[str, "torch.Tensor"]:
    """Sparse rows of length one, (captions, words), of each split's captions; see `weighted_words`."""
    import numpy as np
    import torch

    from metrics.caption_scores.ngrams import WordIndex
    from metrics.caption_scores.tokenizers import choose_tokenizer, get_split

    every = [text for of_split in texts.values() for text in of_split]
    words = WordIndex(get_split(choose_tokenizer(every)))
    encoded = words.encode(every, learn=True)
    matrix = weighted_words(encoded.words, encoded.lengths, len(words.words))
    ends = np.cumsum([len(of_split) for of_split in texts.values()]).tolist()
    return {
        split: matrix.index_select(0, torch.arange(end - len(texts[split]), end))
        for split, end in zip(texts, ends, strict=True)
    }


def weighted_words(words: "np.ndarray", lengths: "np.ndarray", num_words: int) -> "torch.Tensor":
    """Sparse rows of length one, (captions, words), of captions' words; a caption without words is all zeros."""
    import numpy as np
    import torch

    caption = np.repeat(np.arange(len(lengths)), lengths)
    key, count = np.unique(caption * num_words + words, return_counts=True)
    caption, word = np.divmod(key, max(num_words, 1))
    weight = count * np.log1p(len(lengths) / np.bincount(word, minlength=num_words)[word])
    norm = np.sqrt(np.bincount(caption, weight**2, minlength=len(lengths)))
    values = torch.from_numpy((weight / norm[caption]).astype(np.float32))
    place = np.stack([caption, word])
    return torch.sparse_coo_tensor(place, values, (len(lengths), num_words), check_invariants=False).coalesce()


def pairs_above(first: "torch.Tensor", second: "torch.Tensor", threshold: float) -> list[tuple[int, int, float]]:
    """Rows of `first` and of `second`, both dense or both sparse, whose product is at least the threshold, and the product."""
    import torch

    found = []
    for start in range(0, len(first), ROWS_AT_ONCE):
        block = first.index_select(0, torch.arange(start, min(start + ROWS_AT_ONCE, len(first))))
        product = torch.sparse.mm(second, block.to_dense().T).T if block.is_sparse else block @ second.T
        rows, others = torch.nonzero(product >= threshold - 1e-6, as_tuple=True)
        cosines = product[rows, others].clamp(max=1).tolist()
        found += zip((rows + start).tolist(), others.tolist(), cosines, strict=True)
    return found


def print_pairs(kind: str, pairs: list[dict]) -> None:
    """Print how many images of each split have a near-duplicate in another one, and the pairs most alike."""
    print(f"near-duplicate {kind}: {len(pairs):,} pairs")
    for splits in sorted({tuple(pair["splits"]) for pair in pairs}):
        of_splits = [pair for pair in pairs if tuple(pair["splits"]) == splits]
        numbers = [len({pair["rows"][side] for pair in of_splits}) for side in (0, 1)]
        print(f"  {numbers[0]:,} images of {splits[0]} and {numbers[1]:,} of {splits[1]}")
    for pair in pairs[:NUM_PRINTED]:
        sides = [
            f"{split}/{image_id}" + (f" {caption!r}" if caption else "")
            for split, image_id, caption in zip(
                pair["splits"], pair["image_ids"], pair.get("captions", ("", "")), strict=True
            )
        ]
        print(f"  {pair['cosine']:.3f}  {sides[0]} = {sides[1]}")
    if len(pairs) > NUM_PRINTED:
        print(f"  ... and {len(pairs) - NUM_PRINTED:,} more")


def write_pairs(output_dir: str, dataset: "DatasetDict", found: dict[str, list[dict]]) -> None:
    """Write all pairs to near_duplicates.json, and the images most alike, side by side, to near_duplicates.html."""
    from jinja2 import Environment, FileSystemLoader

    from reporting.page import TEMPLATES, image_data_uri
    from system.files import write_file

    folder = Path(output_dir)
    content = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    print(write_file(folder / "near_duplicates.json", content.encode("utf-8", "backslashreplace")))
    if "images" not in found:
        return
    shown = [
        [
            {"split": split, "row": dataset[split][row], "source": image_data_uri(dataset[split][row]["image"])}
            for split, row in zip(pair["splits"], pair["rows"], strict=True)
        ]
        for pair in found["images"][:NUM_SHOWN]
    ]
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("near_duplicates.html.jinja").render(
        pairs=list(zip(found["images"], shown, strict=False)), num_pairs=len(found["images"])
    )
    print(write_file(folder / "near_duplicates.html", page.encode("utf-8", "replace")))


if __name__ == "__main__":
    main()
