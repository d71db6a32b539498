"""A captioner is a model and its processor: load them, save them, write captions with them.

Either system goes through here, in scripts, app and evaluation alike.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, PreTrainedModel

from . import captioning_pipeline
from .processing import load_processor

# What config.json says of the pipeline beside it; transformers then runs that for `pipeline("image-to-text")`.
CUSTOM_PIPELINES = {
    "image-to-text": {"impl": "captioning_pipeline.ImageToTextPipeline", "pt": ["AutoModelForImageTextToText"]}
}


def load_captioner(name_or_path: str) -> tuple:
    """Model (in eval) and processor from a folder or the Hub.

    System A's class is known once `modeling` is imported: neither system runs code that came with the weights.

    Raises:
        ValueError: There is no captioner, or it is damaged.
    """
    try:
        model = AutoModelForImageTextToText.from_pretrained(name_or_path)
        return model.eval(), load_processor(name_or_path)
    except Exception as error:  # transformers, safetensors, tokenizers and the Hub's client each have their own
        raise ValueError(f"model {name_or_path} cannot be loaded: {str(error).strip().splitlines()[0]}") from error


def save_captioner(model: PreTrainedModel, processor, folder: str | os.PathLike) -> None:
    """Save both into a folder, and the pipeline's code with them.

    File by file beside and renamed, so that a kill leaves the old model or the new one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as beside:
        model.save_pretrained(beside)
        config = Path(beside) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"custom_pipelines": CUSTOM_PIPELINES}, indent=2))
        shutil.copy(captioning_pipeline.__file__, beside)
        processor.save_pretrained(beside)
        for path in Path(beside).iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # else a power cut can leave the new name on an empty file
            os.replace(path, folder / path.name)


def start_token_ids(model: PreTrainedModel) -> list[int]:
    """What every caption of a model starts from: the start token, and its prompt's tokens where it has a prompt.

    A prompt lives in the generation config alone, as `decoder_start_token_id = [[start, prompt, ...]]`: it is saved and read
    back with it, and plain `generate()` starts from it.
    """
    start = model.generation_config.decoder_start_token_id
    return list(start[0]) if isinstance(start, list) else [start]


@torch.inference_mode()
def generate_captions(model: PreTrainedModel, processor, inputs: dict, **generation) -> list[dict]:
    """Caption one batch of pictures.

    Args:
        model: A captioner in eval; its generation config holds the decoding settings.
        processor: Its processor.
        inputs: `pixel_values` (batch, 3, height, width), or `encoder_outputs` with states (batch, positions, size).
        generation: What `generate()` takes, over the generation config.

    Returns:
        For each picture {"caption": text, "ended": whether EOS ended it before the longest length did}.
    """
    sequences = model.generate(**inputs, **generation)  # (batch, start tokens and caption)
    words = sequences[:, len(start_token_ids(model)) :]
    ended = (words == processor.tokenizer.eos_token_id).any(dim=1).tolist()
    texts = processor.batch_decode(words, skip_special_tokens=True)
    return [{"caption": text.strip(), "ended": end} for text, end in zip(texts, ended, strict=True)]


def caption_pictures(model: PreTrainedModel, processor, loader: DataLoader, accelerator: Accelerator) -> list[dict]:
    """Caption every picture of a prepared loader, under any number of processes.

    Args:
        model: A captioner in eval, not wrapped.
        loader: Batches with `index` and what `generate_captions` takes.
        accelerator: The run's; gathers what each process has written.

    Returns:
        On every process the same list, in the order of `index`, each picture once.
    """
    captions = {}
    for batch in tqdm(loader, desc="captioning", leave=False, disable=not accelerator.is_local_main_process):
        inputs = {name: batch[name] for name in ("pixel_values", "encoder_outputs") if name in batch}
        made = generate_captions(model, processor, inputs)
        captions.update(zip(batch["index"].tolist(), made, strict=True))
    captions = dict(gather_object(list(captions.items())))  # a picture dealt to two processes counts once
    return [captions[index] for index in sorted(captions)]
