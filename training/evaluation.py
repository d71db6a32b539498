"""How a captioner fares while it learns."""

import time

from datasets import Dataset
from torch.utils.data import DataLoader

from metrics import CaptionScorer
from modeling.captioner import caption_images
from training.scoring import score_and_show


def score_captions(accelerator, model, processor, loader: DataLoader, rows: Dataset, scorer: CaptionScorer) -> dict:
    """Caption the validation images and score them, and the captions dealt to other images beside.

    Returns:
        What `score_and_show` tells, and the seconds it took.
    """
    started = time.perf_counter()
    captions = [made["caption"] for made in caption_images(model.eval(), processor, loader, accelerator)]
    generated = time.perf_counter()
    return {
        **score_and_show(captions, rows, scorer),
        "generation_seconds": round(generated - started, 2),
        "scoring_seconds": round(time.perf_counter() - generated, 2),
    }
