"""Push captioned images to the Hub: Parquet shards with the images in them, streamable, and a dataset card.

    python -m data_scripts.push data/mine me/my-images --private --license cc-by-4.0

Whatever `load_captions` loads can be pushed; what is pushed, `load_captions` and `datasets.load_dataset` load again.
"""

import argparse
from typing import TYPE_CHECKING

from system.errors import UserError, one_line_errors
from system.retries import error_summary, retried

if TYPE_CHECKING:
    from datasets import DatasetDict

# The Hub's own steps of size.
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
CARD = """
# {name}

Images with one or more captions each, for image captioning; prepared with showtell.

| Split | Images | Captions | Words per caption |
|---|---:|---:|---:|
{splits}

Each row has `image` (the image), `image_id` (its name, unique in the dataset) and `captions` (a list of texts).

## Usage

```python
from datasets import load_dataset

for row in load_dataset("{repo_id}", split="{split}", streaming=True):
    print(row["image"].size, row["captions"][0])
    break
```

With showtell's scripts: `accelerate launch train_lstm.py recipes/lstm_flickr8k.yaml --dataset_name {repo_id}`.

## License

{license}
"""


def push_captions(
    dataset: "DatasetDict",
    repo_id: str,
    private: bool | None = None,
    license: str | None = None,
    revision: str | None = None,
    tag: str | None = None,
) -> str:
    """Push a caption table. Shards that are on the Hub already are not uploaded again.

    Args:
        repo_id: OWNER/NAME, created if it does not exist.
        private: Whether a new repository is private; None for the account's default.
        license: License of images and captions, in the Hub's names.
        revision: Branch, created if it does not exist; None for main.
        tag: Tag of the commit.

    Returns:
        The full name of the repository.
    """
    from huggingface_hub import HfApi  # here, so that --help need not import it

    api = HfApi()
    repo_id = retried(api.create_repo)(repo_id, private=private, exist_ok=True, repo_type="dataset").repo_id
    # Branch and card first: pushing the shards keeps the card and adds their paths and features to its metadata.
    if revision:
        retried(api.create_branch)(repo_id, branch=revision, exist_ok=True, repo_type="dataset")
    retried(api.upload_file)(
        path_or_fileobj=dataset_card(dataset, repo_id, license).encode(),
        path_in_repo="README.md",
        repo_id=repo_id,
        repo_type="dataset",
        revision=revision,
        commit_message="Card",
    )
    commit = retried(dataset.push_to_hub)(repo_id, revision=revision, commit_message="Images and captions")
    if tag:
        retried(api.create_tag)(repo_id, tag=tag, revision=commit.oid, repo_type="dataset")
    return repo_id


def dataset_card(dataset: "DatasetDict", repo_id: str, license: str | None) -> str:
    """The dataset card (README.md): contents, usage, license; the Hub's metadata on top."""
    from huggingface_hub import DatasetCard

    rows, num_images = [], 0
    for split, part in dataset.items():
        texts = [text for captions in part["captions"] for text in captions]
        num_words = sum(len(text.split()) for text in texts) / len(texts)
        rows.append(f"| {split} | {len(part):,} | {len(texts):,} | {num_words:.1f} |")
        num_images += len(part)
    metadata = {
        "license": license,
        "task_categories": ["image-to-text"],
        "tags": ["image-captioning", "showtell"],
        "size_categories": [next((name for limit, name in SIZES if num_images < limit), "n>10M")],
    }
    body = CARD.format(
        name=repo_id.split("/")[-1],
        splits="\n".join(rows),
        repo_id=repo_id,
        split=next(iter(dataset)),
        license=f"{license}, as stated by the uploader."
        if license
        else "Not stated. Ask the uploader before you use it.",
    )
    card = DatasetCard(f"---\n---\n{body}")
    for name, value in metadata.items():
        if value:
            card.data[name] = value
    return str(card)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="caption table saved by a command of data_scripts, any other dataset, or scenes")
    parser.add_argument("repo_id", help="repository on the Hub, OWNER/NAME or a NAME of your own")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--license", help="license of images and captions, in the Hub's names, such as cc-by-4.0")
    parser.add_argument("--revision", help="branch to push to, created if it does not exist (default: main)")
    parser.add_argument("--tag", help="tag of the commit, such as v1")
    arguments = parser.parse_args(argv)
    with one_line_errors():
        from huggingface_hub import constants

        from data_scripts.load import load_captions

        dataset = load_captions(arguments.source)
        try:
            repo_id = push_captions(
                dataset,
                arguments.repo_id,
                arguments.private or None,
                arguments.license,
                arguments.revision,
                arguments.tag,
            )
        except Exception as error:  # the client has many of its own
            sentence = error_summary(error, arguments.repo_id)
            raise UserError(f"{arguments.source} was not pushed to {arguments.repo_id}: {sentence}") from error
    print(f"{constants.ENDPOINT}/datasets/{repo_id}")


if __name__ == "__main__":
    main()
