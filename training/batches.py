"""From rows of images to batches: (image, caption) pairs by index, their order, and the collator."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler, Subset
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from data_scripts.augmentations import augment_image, augmentation_in_epoch
from training.features import Features
from training.token_store import token_store

logger = logging.getLogger(__name__)

ITEMS_AT_ONCE = 8192  # of an epoch's order that are Python objects


class ImageDataset(torch.utils.data.Dataset):
    """The images of a split, or their features; one item an image.

    Args:
        rows: Rows with an `image`.
        features: As many rows of features from `encode_splits`; images are then not decoded at all.
        augmentation: See `augment_image`; features are of that augmentation already.
    """

    def __init__(self, rows: Dataset, features: Features | None = None, augmentation: int = 0):
        self.source = rows.select_columns(["image"]) if features is None else features
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        columns = self.source[list(indices)]
        if "image" in columns and self.augmentation:
            columns["image"] = [augment_image(image, self.augmentation) for image in columns["image"]]
        return [
            {"index": index, **{name: values[place] for name, values in columns.items()}}
            for place, index in enumerate(indices)
        ]


class AugmentedImages(torch.utils.data.Dataset):
    """Several augmentations of the images of a split; an item is named by (image, augmentation).

    Args:
        rows: Rows with an `image`.
        features: Of each augmentation, see `ImageDataset`.
    """

    def __init__(self, rows: Dataset, features: Sequence[Features | None] = (None,)):
        self.augmentations = [ImageDataset(rows, of_one, number) for number, of_one in enumerate(features)]

    def __len__(self) -> int:
        return len(self.augmentations[0])

    def __getitem__(self, index: int | tuple[int, int]) -> dict:
        return self.__getitems__([index if isinstance(index, tuple) else (index, 0)])[0]

    def __getitems__(self, indices: Sequence[tuple[int, int]]) -> list[dict]:
        images, augmentations = np.array(indices).T
        items = {}
        for augmentation in np.unique(augmentations):
            places = np.flatnonzero(augmentations == augmentation)
            images_here = images[places].tolist()
            items.update(zip(places, self.augmentations[augmentation].__getitems__(images_here), strict=True))
        return [items[place] for place in range(len(indices))]


def subsample_evenly(num_rows: int | None, *tables) -> tuple:
    """The same rows of each table: `num_rows` of them, evenly spread and always the same; all where None.

    Args:
        tables: With `len()` and `select(indices)`; None stays None.
    """
    length = len(tables[0])
    if not num_rows or num_rows >= length:
        return tables
    chosen = np.linspace(0, length - 1, num_rows).round().astype(int)
    return tuple(None if table is None else table.select(chosen) for table in tables)


class CaptionPairs(torch.utils.data.Dataset):
    """(image, caption) pairs; an image with five captions is five pairs and is stored once.

    An item is named by (pair, augmentation), or by the pair alone, which is then not augmented.

    Args:
        rows: Rows with `image` and `captions`.
        tokenizer: Turns captions into token ids. A caption is text: what looks like a special token in it is none.
        max_length: Max caption length in tokens, EOS included, a prompt not; longer ones are truncated. None keeps all.
        features: See `AugmentedImages`.
        start_ids: Tokens every caption starts with: the start token, then a prompt's where there is one; BOS where None.
        loss_on_prompt: Whether the prompt has a loss as well.

    `lengths` holds the tokens of each caption, EOS included, a prompt not; `num_truncated` counts the captions cut to `max_length`.
    """

    def __init__(
        self,
        rows: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        features: Sequence[Features | None] = (None,),
        start_ids: Sequence[int] | None = None,
        loss_on_prompt: bool = False,
    ):
        self.images = AugmentedImages(rows, features)
        self.start_ids = list(start_ids or [tokenizer.bos_token_id])
        prompt_ids = self.start_ids[1:]
        self.prompt_labels = prompt_ids if loss_on_prompt else [-100] * len(prompt_ids)
        # Prompt and caption are tokenized apart, so that a caption's tokens do not depend on the prompt's end.
        blank = " " if prompt_ids else ""
        self.token_ids = token_store(rows, tokenizer, max_length, blank)
        self.mirrored_ids = (
            token_store(rows, tokenizer, max_length, blank, augmentation=1) if len(features) > 1 else None
        )
        self.num_truncated = self.token_ids.num_truncated
        if self.num_truncated:
            logger.warning(
                f"{self.num_truncated:,} of {len(self):,} captions have more than {max_length} tokens, EOS included: truncated."
            )

    @property
    def lengths(self) -> np.ndarray:
        return self.token_ids.lengths

    @property
    def row_of_pair(self) -> np.ndarray:
        return self.token_ids.rows

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, index: int | tuple[int, int]) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int | tuple[int, int]]) -> list[dict]:
        pairs = [index if isinstance(index, tuple) else (index, 0) for index in indices]
        images = self.images.__getitems__([(self.row_of_pair[pair], augmentation) for pair, augmentation in pairs])
        return [image | self.tokens(*pair) for image, pair in zip(images, pairs, strict=True)]

    def by_length(self) -> Subset:
        """The pairs, the captions of an image together, those with few tokens first: hardly any padding, for a sum over all."""
        tokens_of_image = np.bincount(self.row_of_pair, weights=self.lengths)
        return Subset(self, np.argsort(tokens_of_image[self.row_of_pair], kind="stable"))

    def tokens(self, pair: int, augmentation: int = 0) -> dict:
        """What the decoder reads and, at the same positions, the token that comes next."""
        token_ids = (self.mirrored_ids if augmentation % 2 else self.token_ids)[pair]
        return {"decoder_input_ids": self.start_ids + token_ids[:-1], "labels": self.prompt_labels + token_ids}


class CaptionSampler(Sampler[tuple[int, int]]):
    """Every pair once an epoch, as (pair, augmentation), in an order that depends on the seed and the epoch alone.

    Args:
        lengths: Number of tokens of each pair.
        batch_size: Pairs in one optimizer step, over all processes and accumulated batches.
        group_by_length: Whether pairs of similar length share a batch: shuffled, sorted within chunks of 50 batches, and the batches
            shuffled. Saves padding, and keeps the order random between batches.
        images: Image of each pair.
        group_by_image: Whether the captions of an image stand together, so that a batch has few images; it is then images with
            similar numbers of tokens in all their captions that share a batch.
        num_augmentations: Of each image, cycled by epoch; see `CaptionPairs`.
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

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = self.order()
        for start in range(0, len(order), ITEMS_AT_ONCE):
            pairs = order[start : start + ITEMS_AT_ONCE]
            augmentations = np.zeros(len(pairs), dtype=int)
            if self.num_augmentations > 1:
                augmentations = augmentation_in_epoch(self.images[pairs], self.epoch, self.num_augmentations)
            yield from zip(pairs.tolist(), augmentations.tolist(), strict=True)

    def order(self) -> np.ndarray:
        """The pairs of the epoch, int32, or int64 where there are too many for it."""
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.lengths))
        if len(order) < 2**31:
            order = order.astype(np.int32)
        if self.group_by_image:
            image_order = rng.permutation(int(np.max(self.images)) + 1)
            order = order[np.argsort(image_order[self.images[order]], kind="stable")]
        if not self.group_by_length:
            return order
        size = 50 * self.batch_size
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            chunk[:] = chunk[np.argsort(self.lengths[chunk], kind="stable")]
        num_full = len(order) // self.batch_size * self.batch_size  # the short batch stays last
        batches = order[:num_full].reshape(-1, self.batch_size)
        batches[:] = batches[rng.permutation(len(batches))]
        return order


class CaptionCollator:
    """Collate items of `ImageDataset` or `CaptionPairs` into one batch, for either captioner.

    Args:
        processor: Image processor and tokenizer in one.
        share_images: How an image goes into the batch once, however many of its captions do: "index" gives each caption a row and
            the model `image_index`; "pack" concatenates the captions of an image into one row, and adds
            `decoder_position_ids`, by which transformers keeps them apart; None repeats the image.

    Returns, called with items {"index", "image" or the columns of `Features`, and "decoder_input_ids" and "labels" where there are
    captions}:
        index: int64 (batch,), the rows of the images, where there are no captions
        pixel_values: float32 (batch, 3, height, width), normalized
        or encoder_outputs: last_hidden_state float32 (batch, positions, size)
        image_index: int64 (batch,), the image of each caption among those of the batch, where images are shared by index
        decoder_input_ids: int64 (rows, longest row in the batch), start tokens first, padded on the right
        decoder_position_ids: int64, same shape, 0 at each start token, where a row has several captions
        labels: int64, same shape, -100 where a caption has ended and where its prompt has no loss
    """

    def __init__(self, processor, share_images: Literal["index", "pack"] | None = None):
        self.processor = processor
        self.share_images = share_images

    def __call__(self, items: list[dict]) -> dict:
        with_captions = "labels" in items[0]
        batch, images = {} if with_captions else {"index": torch.tensor([item["index"] for item in items])}, items
        if self.share_images and with_captions:
            images = list({item["index"]: item for item in items}.values())
            position = {item["index"]: position for position, item in enumerate(images)}
            image_index = [position[item["index"]] for item in items]
            if self.share_images == "index":
                batch["image_index"] = torch.tensor(image_index)
        batch |= self.images(images)
        if with_captions:
            rows = [{name: list(item[name]) for name in ("decoder_input_ids", "labels")} for item in items]
            if self.share_images == "pack" and len(images) < len(items):
                rows = self.pack(rows, image_index)
            # Padding on the right has no label, so any token will do; BOS, since transformers warns of pad tokens without a mask.
            padding = {"decoder_input_ids": self.processor.tokenizer.bos_token_id, "labels": -100}
            for name in rows[0]:
                values = [torch.tensor(row[name]) for row in rows]
                batch[name] = pad_sequence(values, batch_first=True, padding_value=padding.get(name, 0))
        return batch

    def images(self, items: list[dict]) -> dict:
        """Pixels of the images, or their features."""
        if "encoder_features" not in items[0]:
            images = [item["image"].convert("RGB") for item in items]
            return {"pixel_values": self.processor(images=images, return_tensors="pt")["pixel_values"]}
        features = torch.from_numpy(np.stack([item["encoder_features"] for item in items])).float()
        if "feature_scale" in items[0]:
            features *= torch.from_numpy(np.stack([item["feature_scale"] for item in items])).unsqueeze(-1)
        return {"encoder_outputs": BaseModelOutput(last_hidden_state=features)}

    @staticmethod
    def pack(captions: list[dict], image_index: list[int]) -> list[dict]:
        """One row an image: its captions concatenated, and their positions."""
        rows = [defaultdict(list) for _ in range(max(image_index) + 1)]
        for caption, image in zip(captions, image_index, strict=True):
            for name, values in caption.items():
                rows[image][name] += values
            rows[image]["decoder_position_ids"] += range(len(caption["labels"]))
        return rows
