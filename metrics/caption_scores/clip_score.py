"""CLIPScore and RefCLIPScore (Hessel et al. 2021), by any CLIP or SigLIP of the Hub. Needs torch and transformers."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from .baselines import derangement
from .intervals import bootstrap_interval

WEIGHT, PREFIX = 2.5, "A photo depicts "
CACHE = Path("caption_scores") / "clip_features"


class ImageFiles(Sequence):
    """Images of files, opened when they are read, upright by their EXIF orientation.

    Raises:
        ValueError: When read: a file that is no image, or is damaged.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: int):
        from PIL import Image, ImageOps

        try:
            with Image.open(self.files[place]) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{self.files[place]} is no image that can be read ({error}): give another file"
            ) from error

    def hashes(self) -> list[str]:
        """A digest of each file's content."""
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in self.files]


class ClipScorer:
    """Scores captions by features of images and texts; both are encoded once and cached by content on disk.

    Args:
        model_name: Folder or Hub id of a model that gives image and text features, such as openai/clip-vit-base-patch32, the
            paper's.
        batch_size: Images, or texts, encoded together.
        device: Of torch; the first GPU, else the CPU, if None.
        cache_dir: Folder of cached features; `caption_scores/clip_features` in the cache folder of Hugging Face if None.

    Raises:
        ValueError: A library is missing; the model does not load, or gives no features of images and texts.
    """

    def __init__(
        self, model_name: str, batch_size: int = 64, device: str | None = None, cache_dir: Path | None = None
    ) -> None:
        try:
            import torch
            from huggingface_hub.constants import HF_HOME
            from transformers import AutoModel, AutoProcessor
        except ImportError as error:
            raise ValueError(
                f"CLIPScore needs torch and transformers ({error}): pip install 'caption-scores[clip]'"
            ) from None

        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.model = AutoModel.from_pretrained(model_name).eval().to(self.device)
            self.processor = AutoProcessor.from_pretrained(model_name)
        except (OSError, ValueError) as error:
            raise ValueError(f"the CLIP model {model_name} does not load: {str(error).splitlines()[0]}") from error
        if not hasattr(self.model, "get_image_features") or not hasattr(self.model, "get_text_features"):
            raise ValueError(
                f"{model_name} is a {type(self.model).__name__}, which gives no features of images and texts: "
                "give a CLIP or SigLIP"
            )
        self.batch_size = batch_size
        self.cache_dir = cache_dir or Path(HF_HOME) / CACHE
        self.digest = self._digest()

    def score(
        self,
        images: Sequence,
        image_hashes: Sequence[str],
        captions: Sequence[str],
        references: Sequence[Sequence[str]],
        image_order: Sequence[int] | None = None,
    ) -> dict[str, np.ndarray]:
        """Score one caption per image.

        Args:
            images: PIL images; read only where one is not cached.
            image_hashes: A digest of each image's content.
            captions: One per image.
            references: For each image a list of at least one caption.
            image_order: The image of each caption, and whose references; its own if None.

        Returns:
            "clip_score", 2.5 times the cosine of caption and image, not below 0, and "ref_clip_score", the harmonic mean of that and
            the largest cosine of caption and reference, not below 0; float64 (images,) each.
        """
        order = np.arange(len(captions)) if image_order is None else np.asarray(image_order)
        image_features = self.image_features(images, image_hashes)[order]
        texts = list(dict.fromkeys([*captions, *(text for of_image in references for text in of_image)]))
        place = {text: number for number, text in enumerate(texts)}
        text_features = self.text_features(texts)
        features = text_features[[place[caption] for caption in captions]]
        clip = WEIGHT * np.maximum((features * image_features).sum(axis=1), 0)
        nearest = [
            max((text_features[[place[text] for text in references[image]]] @ caption).max(), 0)
            for caption, image in zip(features, order, strict=True)
        ]
        both = clip + nearest
        harmonic = np.divide(2 * clip * nearest, both, out=np.zeros(len(both)), where=both > 0)
        return {"clip_score": clip, "ref_clip_score": harmonic}

    def report(
        self,
        images: Sequence,
        image_hashes: Sequence[str],
        captions: Sequence[str],
        references: Sequence[Sequence[str]],
    ) -> dict[str, dict]:
        """The means of `score`, arguments as there: "metrics", "intervals" (95 %, over images) and "shuffled", by score.

        The shuffled baseline is of the same captions assigned to other images; a single image has none.
        """
        result: dict[str, dict] = {"metrics": {}, "intervals": {}, "shuffled": {}}
        for name, of_images in self.score(images, image_hashes, captions, references).items():
            result["metrics"][name] = float(of_images.mean())
            result["intervals"][name] = bootstrap_interval(of_images)
        if len(captions) > 1:
            others = [captions[source] for source in derangement(len(captions))]
            scores = self.score(images, image_hashes, others, references)
            result["shuffled"] = {name: float(of_images.mean()) for name, of_images in scores.items()}
        return result

    def image_features(self, images: Sequence, hashes: Sequence[str]) -> np.ndarray:
        """Features of length one, float64 (images, size)."""
        return self._cached("images", images, hashes, self._encode_images)

    def text_features(self, texts: Sequence[str]) -> np.ndarray:
        """Features of length one of texts, the paper's prefix before each; float64 (texts, size)."""
        keys = [hashlib.sha256(f"{PREFIX}{text}".encode()).hexdigest() for text in texts]
        return self._cached("texts", [PREFIX + text for text in texts], keys, self._encode_texts)

    def _encode_images(self, images: list):
        inputs = self.processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        return self.model.get_image_features(pixel_values=inputs["pixel_values"].to(self.device))

    def _encode_texts(self, texts: list[str]):
        # SigLIP was trained with all texts padded to one length, and encodes others where they are not
        padding = "max_length" if self.model.config.model_type.startswith("siglip") else "longest"
        length = self.model.config.text_config.max_position_embeddings
        inputs = self.processor(text=texts, padding=padding, truncation=True, max_length=length, return_tensors="pt")
        return self.model.get_text_features(**inputs.to(self.device))

    def _cached(self, kind: str, items: Sequence, keys: Sequence[str], encode: Callable) -> np.ndarray:
        """The features of items by their keys; those that are not cached are encoded, each once, and added to the cache."""
        file = self.cache_dir / f"{self.digest[:32]}-{kind}.npz"
        known: dict[str, np.ndarray] = {}
        if file.exists():
            with np.load(file) as stored:
                known = dict(zip(stored["keys"].tolist(), stored["features"], strict=True))
        missing = {key: place for place, key in enumerate(keys) if key not in known}
        places = list(missing.values())
        if places:
            for start in range(0, len(places), self.batch_size):
                block = places[start : start + self.batch_size]
                features = self._normalized(encode, [items[place] for place in block])
                known |= zip((keys[place] for place in block), features, strict=True)
            _write(file, keys=np.array(list(known)), features=np.stack(list(known.values())))
        return np.array([known[key] for key in keys], dtype=np.float64)

    def _normalized(self, encode: Callable, batch: list) -> np.ndarray:
        import torch

        with torch.inference_mode():
            output = encode(batch)
        features = (
            output if isinstance(output, torch.Tensor) else output.pooler_output
        )  # transformers 5 gives an output
        features = features.double().cpu().numpy()
        return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)

    def _digest(self) -> str:
        """What features depend on: weights, config, and all that the processor does."""
        digest = hashlib.sha256(f"{self.model.config.to_json_string()}{self.processor}".encode())
        for name, value in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().flatten().float().numpy().tobytes())
        return digest.hexdigest()


def _write(file: Path, **arrays: np.ndarray) -> None:
    """Write beside the file, then rename: another process never reads half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, beside = tempfile.mkstemp(dir=file.parent, suffix=".npz")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            np.savez(stream, **arrays)
        os.replace(beside, file)
    finally:
        Path(beside).unlink(missing_ok=True)
