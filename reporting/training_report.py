"""What a training run writes at its end: results, page and model card, and their push to the Hub."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import GenerationConfig

from data_scripts.load import Shards
from reporting.model_card import Kind, write_model_card
from reporting.push import CheckpointPush, push_to_hub
from reporting.report import command_line, report_captions


def report_training(
    args,
    data_args,
    *,
    dataset: DatasetDict,
    split: str,
    num_training_captions: int,
    captions: list[dict],
    scorer,
    decoding: GenerationConfig,
    train: dict,
    kind: Kind,
    options: dict[str, Any],
    started_from: Sequence[str],
    pushing: CheckpointPush | None,
    self_critical: bool = False,
    truth: list[dict] | None = None,
) -> None:
    """Score the captions of a split, write results, page and card, and push them. For the main process only.

    Args:
        args, data_args: Options of the run and of its data.
        captions: What `caption_images` returns for the split.
        scorer, decoding, train, truth: As in `report_captions`.
        kind, options, started_from, self_critical: As in `write_model_card`.
        pushing: The run's pushes of checkpoints; None if nothing is pushed.
    """
    results = report_captions(
        args.output_dir,
        rows=dataset[split],
        dataset=data_args.dataset_name,
        split=split,
        captions=captions,
        scorer=scorer,
        decoding=decoding,
        train=train,
        publish_images=data_args.publish_images,
        truth=truth,
    )
    write_model_card(
        args.output_dir,
        kind=kind,
        model_name=args.hub_model_id or args.output_dir,
        results=results,
        command=command_line(),
        options=options,
        started_from=started_from,
        training_data=training_size(dataset["train"], num_training_captions),
        self_critical=self_critical,
    )
    if pushing:
        pushing.finish()
        push_to_hub(args.output_dir, args.hub_model_id, args.hub_private_repo, args.hub_revision, token=args.hub_token)


def training_size(rows: Dataset | Shards, num_captions: int) -> dict[str, int]:
    """What the card says of the training split: numbers of images and captions, or of shards, which do not say how many they hold."""
    if isinstance(rows, Shards):
        return {"shards": len(rows.addresses)}
    return {"images": len(rows), "captions": num_captions}
