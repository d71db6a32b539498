"""Captions of a whole split, under any number of processes."""

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from modeling.captioner import Captioner


def caption_images(
    captioner: Captioner, loader: DataLoader, accelerator: Accelerator, num_inspected: int = 0
) -> list[dict]:
    """Caption every image of a prepared loader.

    Args:
        captioner: Its model in eval, not wrapped.
        loader: Batches with `index` and what `Captioner.generate` takes.
        accelerator: The run's; gathers the captions of all processes.
        num_inspected: Number of first images, rounded up to whole batches, whose captions are inspected.

    Returns:
        On every process the same list, in the order of `index`, each image once.
    """
    captions = {}
    for batch in tqdm(loader, desc="captioning", leave=False, disable=not accelerator.is_local_main_process):
        inputs = {name: batch[name] for name in ("pixel_values", "encoder_outputs") if name in batch}
        made = captioner.generate(inputs, inspect=min(batch["index"]) < num_inspected)
        captions.update(zip(batch["index"].tolist(), made, strict=True))
    captions = dict(gather_object(list(captions.items())))  # an image dealt to two processes counts once
    return [captions[index] for index in sorted(captions)]
