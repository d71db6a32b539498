"""From rows of images to batches: (image, caption) pairs by index, their order, and the collator."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Sampler, Subset
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from data_scripts.augmentations import augment_caption, augment_image, augmentation_in_epoch


class ImageDataset(torch.utils.data.Dataset):
    """The rows of a split as the collator wants them, one item an image.

    Args:
        rows: Rows with an `image`.
        features: As many rows from `cache_features`; images are then not decoded at all.
        view: See `augment_image`; features are of that view already.
    """

    def __init__(self, rows: Dataset, features: Dataset | None = None, view: int = 0):
        self.source = rows.select_columns(["image"]) if features is None else features.with_format("numpy")
        self.view = view

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        columns = self.source[list(indices)]
        if "image" in columns and self.view:
            columns["image"] = [augment_image(image, self.view) for image in columns["image"]]
        return [
            {"index": index, **{name: values[place] for name, values in columns.items()}}
            for place, index in enumerate(indices)
        ]


class AugmentedImages(torch.utils.data.Dataset):
    """Several views of the rows of a split: image 5 of 100 is item 5, and in view 2 item 205.

    Args:
        rows: Rows with an `image`.
        features: Of each view, see `ImageDataset`.
    """

    def __init__(self, rows: Dataset, features: Sequence[Dataset | None] = (None,)):
        self.views = [ImageDataset(rows, of_view, view) for view, of_view in enumerate(features)]

    def __len__(self) -> int:
        return len(self.views[0])

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        views, images = np.divmod(indices, len(self))
        items = {}
        for view in np.unique(views):
            places = np.flatnonzero(views == view)
            items.update(zip(places, self.views[view].__getitems__(images[places].tolist()), strict=True))
        return [items[place] for place in range(len(indices))]


def subsample_evenly(num_rows: int | None, *tables: Dataset | None) -> tuple:
    """The same rows of each table: so many, evenly spread and always the same; all where None."""
    length = len(tables[0])
    if not num_rows or num_rows >= length:
        return tables
    chosen = np.linspace(0, length - 1, num_rows).round().astype(int)
    return tuple(table and table.select(chosen) for table in tables)


class CaptionPairs(torch.utils.data.Dataset):
    """One item a (image, caption) pair; an image with five captions is five items and is stored once.

    Args:
        rows: Rows with `image` and `captions`.
        tokenizer: Turns captions into token ids; EOS is put behind every caption here, also behind one that is cut.
        max_length: Longest caption kept, in tokens, EOS included, a prompt not; None keeps all.
        features: See `AugmentedImages`, whose way of counting this is: pair 5 of 100 is item 5, and in view 2 item 205.
        start_ids: Tokens every caption starts from: the start token, then a prompt's where there is one; BOS where None.
        loss_on_prompt: Whether the prompt is learned as well.

    `lengths` holds the tokens of each caption, EOS included, a prompt not.
    """

    def __init__(
        self,
        rows: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        features: Sequence[Dataset | None] = (None,),
        start_ids: Sequence[int] | None = None,
        loss_on_prompt: bool = False,
    ):
        self.images = AugmentedImages(rows, features)
        captions = rows["captions"]
        self.row_of_pair = np.repeat(np.arange(len(rows)), [len(texts) for texts in captions])
        self.start_ids = list(start_ids or [tokenizer.bos_token_id])
        prompt_ids = self.start_ids[1:]
        self.prompt_labels = prompt_ids if loss_on_prompt else [-100] * len(prompt_ids)
        # Prompt and caption are tokenized apart, so that a caption's tokens do not hang on the prompt's end.
        blank = " " if prompt_ids else ""
        texts = [blank + text for texts in captions for text in texts]
        cut = None if max_length is None else max_length - 1

        def ids_of_view(view: int) -> list[list[int]]:
            tokens = tokenizer([augment_caption(text, view) for text in texts], add_special_tokens=False).input_ids
            return [[*ids[:cut], tokenizer.eos_token_id] for ids in tokens]

        self.token_ids = ids_of_view(0)
        self.mirrored_ids = ids_of_view(1) if len(features) > 1 else []
        self.lengths = np.array([len(ids) for ids in self.token_ids])

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        views, pairs = np.divmod(indices, len(self))
        images = self.images.__getitems__(views * len(self.images) + self.row_of_pair[pairs])
        return [image | self.tokens(index) for image, index in zip(images, indices, strict=True)]

    def by_length(self) -> Subset:
        """The pairs, the captions of an image together, those with few tokens first: with next to no padding, for a sum over all."""
        tokens_of_image = np.bincount(self.row_of_pair, weights=self.lengths)
        return Subset(self, np.argsort(tokens_of_image[self.row_of_pair], kind="stable").tolist())

    def tokens(self, index: int) -> dict:
        """What the decoder reads and, at the same positions, what it shall say next."""
        view, pair = divmod(index, len(self))
        token_ids = self.mirrored_ids[pair] if view % 2 else self.token_ids[pair]
        return {"decoder_input_ids": self.start_ids + token_ids[:-1], "labels": self.prompt_labels + token_ids}


class CaptionSampler(Sampler[int]):
    """Every pair once an epoch, in an order that only the seed and the epoch decide.

    Args:
        lengths: Tokens of each pair.
        batch_size: Pairs in a whole step, over all processes and accumulated batches.
        group_by_length: Whether pairs of like length share a batch: shuffled, sorted within runs of 50 batches, and the
            batches shuffled. Saves the padding, keeps the order random between batches.
        images: Image of each pair.
        group_by_image: Whether the captions of an image stand together, so that a batch has few images; it is then
            images with like numbers of tokens in all their captions that share a batch.
        num_augmentations: Views of each image, which take turns from epoch to epoch; see `CaptionPairs`.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        group_by_length: bool = True,
        seed: int = 0,
        images: Sequence[int] | None = None,
        group_by_image: bool = False,
        num_augmentations: int = 1,
    ):
        self.lengths = np.asarray(lengths)
        if group_by_image:
            self.lengths = np.bincount(images, weights=self.lengths)[images]
        self.batch_size = batch_size
        self.group_by_length = group_by_length
        self.group_by_image = group_by_image
        self.images = images
        self.num_augmentations = num_augmentations
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(len(self.lengths))
        if self.group_by_image:
            turn = random.permutation(max(self.images) + 1)
            order = order[np.argsort(turn[self.images[order]], kind="stable")]
        if self.group_by_length:
            run = 50 * self.batch_size
            runs = [order[start : start + run] for start in range(0, len(order), run)]
            order = np.concatenate([run[np.argsort(self.lengths[run], kind="stable")] for run in runs])
            whole = len(order) // self.batch_size * self.batch_size  # the short batch stays last
            batches = order[:whole].reshape(-1, self.batch_size)
            order = np.concatenate([random.permutation(batches).reshape(-1), order[whole:]])
        if self.num_augmentations > 1:
            order = order + len(self) * augmentation_in_epoch(self.images[order], self.epoch, self.num_augmentations)
        return iter(order.tolist())


class CaptionCollator:
    """Turn items of `ImageDataset` or `CaptionPairs` into one batch, for either captioner.

    Args:
        processor: Image processor and tokenizer in one.
        share_images: How an image goes into the batch once, however many of its captions do: "index" gives each caption
            a row and the model `image_index`; "pack" puts the captions of an image behind each other into one row, and
            `decoder_position_ids`, by which transformers keeps them apart; None repeats the image.

    Called with items {"index", "image" or the columns of `cache_features`, and "decoder_input_ids" and "labels" where there are
    captions}, it gives
        index: int64 (batch,), the rows of the images
        pixel_values: float32 (batch, 3, height, width), normalized
        or encoder_outputs: last_hidden_state float32 (batch, positions, size)
        image_index: int64 (batch,), the image of each caption among those of the batch, where images are shared by index
        decoder_input_ids: int64 (rows, longest row in the batch), start tokens first, padded on the right
        decoder_position_ids: int64, likewise, 0 at each start token, where a row has several captions
        labels: int64, likewise, -100 where a caption has ended and where its prompt is not learned
    """

    def __init__(self, processor, share_images: Literal["index", "pack"] | None = None):
        self.processor = processor
        self.share_images = share_images

    def __call__(self, items: list[dict]) -> dict:
        batch = {"index": torch.tensor([item["index"] for item in items])}
        images = items
        if self.share_images:
            images = list({item["index"]: item for item in items}.values())
            place = {item["index"]: place for place, item in enumerate(images)}
            image_index = [place[item["index"]] for item in items]
            if self.share_images == "index":
                batch["image_index"] = torch.tensor(image_index)
        if "encoder_features" in items[0]:
            features = torch.from_numpy(np.stack([item["encoder_features"] for item in images])).float()
            if "feature_scale" in items[0]:
                features *= torch.from_numpy(np.stack([item["feature_scale"] for item in images])).unsqueeze(-1)
            batch["encoder_outputs"] = BaseModelOutput(last_hidden_state=features)
        else:
            pil_images = [item["image"].convert("RGB") for item in images]
            batch["pixel_values"] = self.processor(images=pil_images, return_tensors="pt")["pixel_values"]
        if "labels" in items[0]:
            rows = [{name: list(item[name]) for name in ("decoder_input_ids", "labels")} for item in items]
            if self.share_images == "pack" and len(images) < len(items):
                rows = self.pack(rows, image_index)
            # What a decoder reads where a caption has ended is right of all its words, and has no label: any token will do.
            padding = {"decoder_input_ids": self.processor.tokenizer.pad_token_id, "labels": -100}
            for name in rows[0]:
                values = [torch.tensor(row[name]) for row in rows]
                batch[name] = torch.nn.utils.rnn.pad_sequence(
                    values, batch_first=True, padding_value=padding.get(name, 0)
                )
        return batch

    @staticmethod
    def pack(captions: list[dict], image_index: list[int]) -> list[dict]:
        """One row an image, its captions behind each other, their positions beside."""
        rows = [defaultdict(list) for _ in range(max(image_index) + 1)]
        for caption, place in zip(captions, image_index, strict=True):
            for name, values in caption.items():
                rows[place][name] += values
            rows[place]["decoder_position_ids"] += range(len(caption["labels"]))
        return rows
