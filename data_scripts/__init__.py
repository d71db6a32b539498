"""Any source of captioned images -> one `DatasetDict`; tokenizer training; feature cache; collator.

Commands:
    python -m data_scripts.paragraphs       a zip or folder of csvs and split folders, as the source report has it
    python -m data_scripts.flickr8k         Flickr8k as it is distributed
    python -m data_scripts.karpathy         Karpathy's json for COCO, Flickr8k and Flickr30k, with an image folder
    python -m data_scripts.image_folder     images beside a metadata.csv or metadata.jsonl
    python -m data_scripts.hub              a data set on the Hub or saved on disk
    python -m data_scripts.scenes           colored shapes drawn here
    python -m data_scripts.push             any of them to the Hub
    python -m data_scripts.train_tokenizer  a tokenizer for the captions of any of them
"""

from typing import Any

__all__ = ["load_captions", "load_for_training"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: `python -m data_scripts.scenes` would otherwise find its module imported before it runs.
    if name in __all__:
        from data_scripts import load

        return getattr(load, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
