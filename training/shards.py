"""Training on shards: which process reads what of them, in which order, and how a run resumes inside a shard.

An epoch deals whole shards, in an order drawn from seed and epoch, to the processes. A process reads its shards one after the other in
blocks of some 1,000 captions, and trains on a block in an order drawn from seed, epoch and the number of the block. Nothing of it has to be
remembered to be drawn again: a checkpoint holds where in its shards each process began its block, and how much of the block is done.
"""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from data_scripts.augmentations import augment_caption, augment_image
from data_scripts.images import BadImage, decode_image
from data_scripts.load import Shards
from data_scripts.shards import Sample, Skipped, read_shard, shown
from system.errors import UserError, printable
from training.batches import CaptionSampler
from training.token_store import tokenize

logger = logging.getLogger(__name__)

BLOCK_CAPTIONS = 1000  # that are shuffled together; two blocks of a process are in memory
Piece = tuple[int, int, int]  # number of a shard, and in it the sample and the caption from which on it is to be read


@dataclass
class Stretch:
    """What a process reads in one go, and how far it has come."""

    pieces: list[Piece]
    key: list[int]  # of its random numbers, with seed, epoch and block
    block: int = 0  # number of the first block
    done: int = 0  # captions of that block that are trained on
    size: int = 0  # captions of that block, once it has been read
    rest: list[Piece] = field(default_factory=list)  # what follows that block, once it has been read
    one_block: bool = False  # whether it ends with that block
    step_captions: int = 0  # of the run that dealt it: decides on the order in a block

    @classmethod
    def restored(cls, saved: dict) -> "Stretch":
        return cls(**saved | {name: [tuple(piece) for piece in saved[name]] for name in ("pieces", "rest")})


@dataclass(frozen=True)
class StreamedCaption:
    """A caption with its image as it came from a shard, to be decoded by whoever makes the batch."""

    index: int
    image: bytes
    token_ids: list[int]
    augmentation: int
    place: str
    features: dict[str, bytes] | None


class CaptionStream(torch.utils.data.Dataset):
    """(image, caption) pairs of shards, what `CaptionPairs` is of a table; an item is named by a `StreamedCaption`.

    Args:
        shards: Of the training split.
        tokenizer, max_length, start_ids, loss_on_prompt: As of `CaptionPairs`.
        num_augmentations: Of each image, cycled by epoch.
        features: What `feature_shards` says of the shards' features, where they are to be used; images are then not decoded.

    `lengths` holds the tokens of the first captions.
    """

    def __init__(
        self,
        shards: Shards,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        start_ids: Sequence[int] | None = None,
        loss_on_prompt: bool = False,
        num_augmentations: int = 1,
        features: dict | None = None,
    ):
        self.shards, self.tokenizer, self.max_length, self.features = shards, tokenizer, max_length, features
        self.start_ids = list(start_ids or [tokenizer.bos_token_id])
        prompt_ids = self.start_ids[1:]
        self.prompt_labels = prompt_ids if loss_on_prompt else [-100] * len(prompt_ids)
        self.num_augmentations = num_augmentations
        first, num_truncated = self.tokenize(list(shards.first_captions), 0)
        self.lengths = np.array([len(ids) for ids in first])
        if num_truncated:
            logger.warning(
                f"{num_truncated:,} of the first {len(first):,} captions have more than {max_length} tokens, EOS included: truncated."
            )

    def tokenize(self, captions: Sequence[str], augmentation: int) -> tuple[list[list[int]], int]:
        """Their token ids, and how many were truncated."""
        blank = " " if len(self.start_ids) > 1 else ""
        texts = [blank + augment_caption(caption, augmentation) for caption in captions]
        return tokenize(texts, self.tokenizer, self.max_length)

    def __getitem__(self, item: StreamedCaption) -> dict:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[StreamedCaption]) -> list[dict]:
        decoded: dict[tuple[int, int], dict] = {}
        for item in items:
            if (item.index, item.augmentation) not in decoded:
                decoded[item.index, item.augmentation] = self._decode(item)
        return [decoded[item.index, item.augmentation] | self._tokens(item, decoded) for item in items]

    def _tokens(self, item: StreamedCaption, decoded: dict) -> dict:
        labels = [*self.prompt_labels, *item.token_ids]
        if "unreadable" in decoded[item.index, item.augmentation]:
            labels = [-100] * len(labels)
        return {"decoder_input_ids": self.start_ids + item.token_ids[:-1], "labels": labels}

    def _decode(self, item: StreamedCaption) -> dict:
        if self.features:
            columns = self.features["columns"]
            arrays = {
                name: np.frombuffer(item.features[name], dtype=dtype).reshape(shape)
                for name, (shape, dtype) in columns.items()
            }
            return {"index": item.index, **arrays}
        try:
            image = decode_image(item.image)
        except BadImage as error:
            if self.shards.strict:
                raise UserError(f"{item.place}: {error} (--strict)") from error
            logger.warning(f"skipped, {item.place}: {error}")
            return {"index": item.index, "image": Image.new("RGB", (8, 8)), "unreadable": True}
        return {"index": item.index, "image": augment_image(image, item.augmentation)}


class StreamSampler(Sampler[StreamedCaption]):
    """The captions of an epoch that this process trains on, in their order; see the head of this file.

    Args:
        stream: Says how captions are tokenized.
        step_captions: Captions of this process in one optimizer step; a block holds whole steps.
        group_by_length, group_by_image: As of `CaptionSampler`, within a block.
        process: Number of this process.
        num_processes: How many there are.
    """

    def __init__(
        self,
        stream: CaptionStream,
        step_captions: int,
        group_by_length: bool,
        group_by_image: bool,
        seed: int,
        process: int,
        num_processes: int,
    ):
        self.stream, self.step_captions, self.seed = stream, step_captions, seed
        self.group_by_length, self.group_by_image = group_by_length, group_by_image
        self.process, self.num_processes = process, num_processes
        self.block_captions = -(-BLOCK_CAPTIONS // step_captions) * step_captions
        self.skipped = Skipped()
        self.epoch, self.resumed = 0, None
        # Of each block that has begun: its first caption, its stretch, and those after.
        self.begun: list[tuple[int, Stretch, list[Stretch]]] = []

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[StreamedCaption]:
        stretches = self.resumed if self.resumed is not None else self._dealt()
        self.resumed, self.begun, self.skipped = None, [], Skipped()
        count = 0
        with ThreadPoolExecutor(1) as ahead:  # reads the next block while this one is trained on
            blocks = self._blocks(stretches)
            following = ahead.submit(next, blocks, None)
            while block := following.result():
                following = ahead.submit(next, blocks, None)
                stretch, later, captions = block
                self.begun.append((count, stretch, later))
                count += len(captions) - stretch.done
                yield from captions[stretch.done :]
        self.begun.append((count, Stretch([], []), []))  # the end

    def _dealt(self) -> list[Stretch]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.stream.shards.addresses))
        own = order[self.process :: self.num_processes].tolist()
        return [Stretch([(shard, 0, 0) for shard in own], [self.process, 0], step_captions=self.step_captions)]

    def _blocks(self, stretches: list[Stretch]) -> Iterator[tuple[Stretch, list[Stretch], list[StreamedCaption]]]:
        """Each block: where it began, the stretches after its own, and its captions in their order."""
        num_images = 0
        for number, stretch in enumerate(stretches):
            reading = self._read(stretch.pieces)
            while captions := list(islice(reading, stretch.size or self.block_captions)):
                rest = self._after(stretch.pieces, captions[-1][0])
                stretch = replace(stretch, rest=rest, size=len(captions))
                yield stretch, stretches[number + 1 :], self._ordered(captions, stretch, num_images)
                num_images += len(captions)
                if stretch.one_block:
                    break
                stretch = replace(stretch, pieces=rest, block=stretch.block + 1, done=0, rest=[], size=0)

    @staticmethod
    def _after(pieces: list[Piece], last: tuple[int, int, int, bool]) -> list[Piece]:
        """What is left of the pieces behind a caption."""
        shard, sample, caption, ends = last
        place = next(number for number, piece in enumerate(pieces) if piece[0] == shard)
        here = (shard, sample + 1, 0) if ends else (shard, sample, caption + 1)
        return [here, *pieces[place + 1 :]]

    def _read(self, pieces: list[Piece]) -> Iterator[tuple[tuple[int, int, int, bool], Sample]]:
        """Captions with where they stand: shard, sample, caption, and whether it is the sample's last."""
        shards = self.stream.shards
        for shard, start, first in pieces:
            address = shards.addresses[shard]
            for number, sample in read_shard(address, start, shards.strict, self.skipped):
                for caption in range(first if number == start else 0, len(sample.captions)):
                    yield (shard, number, caption, caption + 1 == len(sample.captions)), sample

    def _ordered(self, captions: list[tuple], stretch: Stretch, first_image: int) -> list[StreamedCaption]:
        """The captions of a block, tokenized, in the order in which they are trained on; images count from the first."""
        images = {image: number for number, image in enumerate(dict.fromkeys(place[:2] for place, _ in captions))}
        numbers = np.array([images[place[:2]] for place, _ in captions])
        flips = [(shard + number + self.epoch) % self.stream.num_augmentations for (shard, number, *_), _ in captions]
        token_ids: list[list[int]] = [[]] * len(captions)
        for side in {flip % 2 for flip in flips}:
            places = [place for place, flip in enumerate(flips) if flip % 2 == side]
            texts = [captions[place][1].captions[captions[place][0][2]] for place in places]
            for place, ids in zip(places, self.stream.tokenize(texts, side)[0], strict=True):
                token_ids[place] = ids
        seed = int(np.random.SeedSequence([self.seed, *stretch.key, stretch.block]).generate_state(1)[0])
        lengths = np.array([len(ids) for ids in token_ids])
        sampler = CaptionSampler(
            lengths, stretch.step_captions, self.group_by_length, seed, numbers, self.group_by_image
        )
        sampler.set_epoch(self.epoch)
        addresses = self.stream.shards.addresses
        return [
            StreamedCaption(
                index=first_image + int(numbers[place]),
                image=captions[place][1].image,
                token_ids=token_ids[place],
                augmentation=flips[place],
                place=f"{shown(addresses[captions[place][0][0]])}, {printable(captions[place][1].name)}",
                features=captions[place][1].features,
            )
            for place in sampler.order().tolist()
        ]

    def first_caption(self) -> StreamedCaption | None:
        """The first caption of all shards, for a process that has none; None where no shard has one."""
        pieces = [(shard, 0, 0) for shard in range(len(self.stream.shards.addresses))]
        captions = list(islice(self._read(pieces), 1))
        return self._ordered(captions, Stretch(pieces, [0, 0], step_captions=1), 0)[0] if captions else None

    def position(self, num_captions: int) -> list[dict]:
        """Where this process stands once it has trained on so many captions since it began or resumed the epoch; for JSON."""
        if not self.begun:
            return [asdict(stretch) for stretch in self.resumed or self._dealt()]
        begun = [block for block in self.begun if block[0] <= num_captions]
        count, stretch, later = begun[-1]
        self.begun = self.begun[len(begun) - 1 :]  # the others are behind
        stretch = replace(stretch, done=stretch.done + num_captions - count)
        if stretch.done < stretch.size:
            return [asdict(one) for one in (stretch, *later)]
        rest = replace(stretch, pieces=stretch.rest, block=stretch.block + 1, done=0, rest=[], size=0)
        return [asdict(one) for one in ([] if stretch.one_block or not rest.pieces else [rest]) + later]

    def resume(self, positions: list[list[dict]], step: int) -> None:
        """Read on where a checkpoint of so many processes was, be they as many as now or not.

        With another number of processes, blocks that have begun are finished first; then the shards that are left, or what is left of them,
        are dealt anew.
        """
        saved = [[Stretch.restored(stretch) for stretch in of_process] for of_process in positions]
        if len(saved) == self.num_processes:
            self.resumed = saved[self.process]
            return
        heads, pieces = [], []
        for stretch in (stretch for of_process in saved for stretch in of_process):
            if stretch.done or stretch.one_block:
                heads.append(replace(stretch, one_block=True))
            if not stretch.one_block:
                pieces += stretch.rest if stretch.done else stretch.pieces
        own = pieces[self.process :: self.num_processes]
        tail = Stretch(own, [self.process, step], step_captions=self.step_captions)
        self.resumed = [*heads[self.process :: self.num_processes], tail]
