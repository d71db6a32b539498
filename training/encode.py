"""Encode the images of shards by a frozen encoder: one shard of features for each, on any number of processes and machines.

    accelerate launch -m training.encode "cc12m/{00000..01242}.tar" --encoder inception_resnet_v2.tf_in1k --output_dir cc12m_features
    accelerate launch train_lstm.py --dataset_name "cc12m_features/*.parquet" --max_steps 100000

A shard is written whole or not at all, and not again where it is there already: after a kill, start the same command again. It keeps
the images and captions beside the features, in `encoder_features`.
"""

import logging
import os
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from system.errors import UserError, one_line_errors
from training.arguments import option, parse_recipe

if TYPE_CHECKING:
    from data_scripts.shards import Sample
    from modeling.captioner import Captioner

# What takes seconds to import is imported where it is used, so that `--help` and a wrong option answer at once.

logger = logging.getLogger(__name__)

ROWS_PER_GROUP = 256


@dataclass
class EncodeArguments:
    """Shards, encoder and where the features go."""

    shards: str = option(
        help="Folder, glob or address of the shards, or a dataset of shards on the Hub.", positional=None
    )
    output_dir: str = option("features", "Folder or address for the shards of features.")
    split: str = option("train", "Split to encode, where the shards have several.")
    model_name_or_path: str | None = option(
        None, "Folder or Hub id of a captioner whose encoder encodes; no encoder is needed then."
    )
    captioner: Literal["lstm", "vit_gpt2"] = option("lstm", "Kind of captioner that the features are for.")
    encoder: str = option("inception_resnet_v2.tf_in1k", "timm name, Hub id or local folder of the encoder.")
    image_size: int | None = option(None, "Side of the encoder's input in pixels; its own if not given.", min=1)
    center_crop: bool = option(
        True, "Center-crop, of lstm; otherwise resize the whole image, ignoring its aspect ratio."
    )
    output_stride: int | None = option(
        None, "Stride of the encoder's feature grid in pixels, of lstm; its own if not given.", min=1
    )
    attention: bool = option(False, "Keep the feature grid for attention, of lstm, not the pooled features.")
    feature_dtype: Literal["float16", "int8"] = option(
        "float16", "Type in which features are written; int8 takes half the disk, lossy."
    )
    batch_size: int = option(32, "Images encoded together.", min=1)
    num_workers: int | None = option(
        None, "Number of threads that decode images; if not given up to 8 on a GPU, and 1 on a CPU.", min=1
    )
    strict: bool = option(False, "End at a shard or sample that cannot be used, in place of skipping it.")


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_recipe((EncodeArguments,), argv, __doc__)
    with one_line_errors():
        encode_shards(args)


def encode_shards(args: EncodeArguments) -> None:
    """Encode those of this process's shards that are not there yet."""
    from accelerate import PartialState
    from accelerate.utils import set_seed

    from data_scripts.shards import Skipped, find_shards, shown
    from training.launch import on_cpu, refuse_missing_gpus

    logging.basicConfig(level="INFO", format="%(message)s")
    refuse_missing_gpus()
    # By itself it does not read ACCELERATE_USE_CPU, and each process would encode all shards.
    state = PartialState(cpu=on_cpu())
    splits = find_shards(args.shards)
    if args.split not in splits:
        raise UserError(f"{shown(args.shards)} has no split {args.split}, only {', '.join(splits)}: see --split")
    targets = target_names(splits[args.split])
    own = list(targets.items())[state.process_index :: state.num_processes]
    missing = [(name, address) for name, address in own if not _exists(args.output_dir, name)]
    logger.info(
        f"process {state.process_index}: {len(missing):,} shards to encode, {len(own) - len(missing):,} are there"
    )
    if not missing:
        return
    set_seed(0)
    captioner = captioner_with_encoder(args)
    captioner.encoder.to(state.device).eval()
    skipped = Skipped()
    for name, address in missing:
        number = encode_shard(address, name, captioner, args, state.device, skipped)
        logger.info(f"{shown(address)}: {number:,} images")
    for line in skipped.lines():
        logger.warning(line)


def target_names(addresses: list[str]) -> dict[str, str]:
    """The name of each shard's features, and its address.

    Raises:
        UserError: Two shards have the same name.
    """
    from data_scripts.shards import shown

    names: dict[str, str] = {}
    for address in addresses:
        name = shown(address).rpartition("/")[2].split(".")[0] + ".parquet"
        if name in names:
            raise UserError(
                f"{shown(names[name])} and {shown(address)} have the same name: encode them into two folders"
            )
        names[name] = address
    return names


def captioner_with_encoder(args: EncodeArguments) -> "Captioner":
    """A captioner with the encoder; all else of it is small and unused."""
    from data_scripts.train_tokenizer import train_tokenizer
    from training.self_critical import load_start

    if args.model_name_or_path:
        return load_start(args.model_name_or_path)
    tokenizer = train_tokenizer(["a"], 16)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    if args.captioner == "lstm":
        from modeling.inception_lstm import build_inception_lstm

        return build_inception_lstm(
            args.encoder,
            tokenizer,
            image_size=args.image_size,
            center_crop=args.center_crop,
            output_stride=args.output_stride,
            image_embed_dim=8,
            attention=args.attention,
            **sizes,
        )
    from modeling.captioner import Captioner
    from modeling.processing import build_processor
    from modeling.vit_gpt2 import build_vit_gpt2, decoder_config, load_encoder

    encoder, image_processor = load_encoder(args.encoder, args.image_size)
    model = build_vit_gpt2(encoder, decoder_config(len(tokenizer), **sizes), tokenizer)
    return Captioner(model, build_processor(image_processor, tokenizer))


def encode_shard(address: str, name: str, captioner: "Captioner", args: EncodeArguments, device, skipped) -> int:
    """Encode a shard into `output_dir`/`name`, whole or not at all; give the number of images."""
    import fsspec
    import pyarrow.parquet as pq

    remote = "://" in args.output_dir
    folder = Path(tempfile.gettempdir() if remote else args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    partial, number, writer = folder / f".{name}.{os.getpid()}", 0, None
    try:
        for table in _encoded(address, captioner, args, device, skipped):
            writer = writer or pq.ParquetWriter(partial, table.schema, compression="none")
            writer.write_table(table)
            number += table.num_rows
        if writer is None:
            return 0
        writer.close()
        if remote:
            system, path = fsspec.core.url_to_fs(f"{args.output_dir.rstrip('/')}/{name}")
            system.put_file(str(partial), path)  # object stores show a file once it is whole
        else:
            os.replace(partial, folder / name)
    finally:
        partial.unlink(missing_ok=True)
    return number


def _encoded(address: str, captioner: "Captioner", args: EncodeArguments, device, skipped) -> Iterator:
    """Arrow tables of the shard's rows, 256 each or a few more."""
    import torch

    from training.features import encoder_fingerprint, quantize_features

    fingerprint = encoder_fingerprint(captioner.encoder, captioner.image_processor)
    rows, batches = [], []
    for samples, pixels in _prepared(address, captioner, args, device, skipped):
        with torch.inference_mode():
            states = captioner.encoder(pixels).last_hidden_state
        rows += samples
        batches.append(quantize_features(states, args.feature_dtype == "int8"))
        if len(rows) >= ROWS_PER_GROUP:
            yield _table(rows, batches, fingerprint)
            rows, batches = [], []
    if rows:
        yield _table(rows, batches, fingerprint)


def _prepared(address: str, captioner: "Captioner", args: EncodeArguments, device, skipped) -> Iterator[tuple]:
    """Samples that can be decoded, and their pixels on the device, batch by batch in the shard's order; decoded by threads."""
    from data_scripts.images import BadImage, decode_image
    from data_scripts.shards import read_shard, shown
    from training.features import PixelCollator

    collator = PixelCollator(captioner.image_processor, device)
    num_threads = args.num_workers or (1 if device.type == "cpu" else min(8, os.cpu_count() or 1))

    def prepare(samples: list["Sample"]) -> tuple:
        """Those of a batch that can be decoded, their pixels, and (name, error) of the others."""
        good, images, errors = [], [], []
        for sample in samples:
            try:
                images.append(decode_image(sample.image))
                good.append(sample)
            except BadImage as error:
                errors.append((sample.name, error))
        return good, collator(images) if images else None, errors

    samples = (sample for _, sample in read_shard(address, 0, args.strict, skipped))
    batches = iter(lambda: list(islice(samples, args.batch_size)), [])
    with ThreadPoolExecutor(num_threads) as pool:
        waiting = deque(pool.submit(prepare, batch) for batch in islice(batches, 2 * num_threads))
        while waiting:
            good, pixels, errors = waiting.popleft().result()
            waiting += [pool.submit(prepare, batch) for batch in islice(batches, 1)]
            for name, error in errors:
                if args.strict:
                    raise UserError(f"{shown(address)}, {name}: {error} (--strict)") from error
                skipped.samples[str(error)] += 1
            if good:
                yield good, collator.finish(pixels)


def _table(samples: list["Sample"], batches: list[dict], fingerprint: str):
    """An Arrow table of samples and their features."""
    import json

    import numpy as np
    import pyarrow as pa

    from data_scripts.shards import FEATURES_KEY

    features = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    columns = {name: (values.shape[1:], values.dtype.str) for name, values in features.items()}
    rows = {
        "image": [{"bytes": sample.image, "path": None} for sample in samples],
        "image_id": [sample.image_id for sample in samples],
        "captions": [sample.captions for sample in samples],
    }
    rows |= {name: [value.tobytes() for value in values] for name, values in features.items()}
    about = json.dumps({"fingerprint": fingerprint, "columns": columns})
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    kinds = {"image": image, "image_id": pa.string(), "captions": pa.list_(pa.string())}
    schema = pa.schema([(name, kinds.get(name, pa.binary())) for name in rows], metadata={FEATURES_KEY: about})
    return pa.table(rows, schema=schema)


def _exists(output_dir: str, name: str) -> bool:
    import fsspec

    system, path = fsspec.core.url_to_fs(f"{output_dir.rstrip('/')}/{name}")
    return system.exists(path)


if __name__ == "__main__":
    main()
