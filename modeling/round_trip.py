"""A captioner is saved and loaded once before it is trained, so that no training ends in a model that cannot come back."""

import os
import tempfile
import textwrap

import torch
from PIL import Image

from system.errors import UserError

from .captioner import Captioner

MAX_REASON = 250  # characters


@torch.no_grad()
def check_round_trip(captioner: Captioner, folder: str | os.PathLike) -> None:
    """Save a captioner, load it, and compare its predictions for one image.

    Args:
        captioner: As it will be saved, that is without adapters.
        folder: Where to save it for the moment.

    Raises:
        UserError: It cannot be saved or loaded, or is another one then.
    """
    model = captioner.model
    image = Image.linear_gradient("L").convert("RGB")
    inputs = {
        **captioner.image_processor(images=image, return_tensors="pt").to(model.device),
        "decoder_input_ids": torch.tensor([captioner.start_token_ids], device=model.device),
    }
    was_training = model.training
    logits = model.eval()(**inputs).logits  # first: some models grow buffers in forward
    model.train(was_training)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".round-trip-") as saved:
        try:
            captioner.save(saved)
            loaded = Captioner.load(saved).model.to(model.device)
        except (RuntimeError, ValueError) as error:  # UserError among them
            reason = str(error).strip().splitlines()[0].replace(f"model {saved}", "it")
            reason = textwrap.shorten(reason, MAX_REASON, placeholder=" ...")  # torch names every tensor that is shared
            raise UserError(
                f"a captioner of these parts cannot be saved and loaded again ({reason}): give another encoder or decoder"
            ) from error
        if not torch.allclose(loaded(**inputs).logits, logits, rtol=1e-3, atol=1e-3):
            raise UserError(
                "a captioner of these parts predicts something else after it is saved and loaded: give another encoder or decoder"
            )
