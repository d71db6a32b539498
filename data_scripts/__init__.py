"""Any source of captioned images -> one `DatasetDict`; augmentations; tokenizer training.

Commands:
    python -m data_scripts                  recognizes the layout and runs the command that reads it
    python -m data_scripts.paragraphs       train.csv, val.csv, test.csv and an image folder for each
    python -m data_scripts.flickr8k         Flickr8k as distributed
    python -m data_scripts.karpathy         COCO, Flickr8k or Flickr30k with Karpathy's JSON and an image folder
    python -m data_scripts.flickr30k        Flickr30k with a csv
    python -m data_scripts.coco             COCO's own annotation files, nocaps, VizWiz-Captions, TextCaps
    python -m data_scripts.img2dataset      img2dataset's output, webdataset tars
    python -m data_scripts.image_folder     images beside a metadata file, or beside text files of their names
    python -m data_scripts.hub              a dataset on the Hub or saved on disk
    python -m data_scripts.scenes           generated images of colored shapes
    python -m data_scripts.push             pushes any of them to the Hub
    python -m data_scripts.recaption        replaces training captions by generated ones
    python -m data_scripts.train_tokenizer  trains a tokenizer on the captions of any of them
"""

from typing import Any

__all__ = ["load_captions", "load_for_training"]


def __getattr__(name: str) -> Any:
    # Lazy: `python -m data_scripts.scenes` would otherwise find its module imported before it runs.
    if name in __all__:
        from data_scripts import load

        return getattr(load, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
