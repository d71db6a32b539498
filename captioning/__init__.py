"""Captioning many images: where they come from, what becomes of the captions, and the job between them."""
