"""Third-party captioners, as a measure of one's own: every `AutoModelForImageTextToText` with its processor, by the model's prompt.

BLIP, GIT and BLIP-2 caption without a prompt, or continue one; PaliGemma and Florence-2 are trained on the names of tasks; the chat
models (Idefics3, SmolVLM, Qwen-VL, LLaVA and the like) answer a request, in their chat template.
"""

import copy
import os
from collections.abc import Iterator

import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from system.errors import UserError

from .captioner import Captioner
from .loading import check_weights, is_trained_here, kind_of, loading

CHAT_PROMPT = "Describe this image in one sentence."
DEFAULT_PROMPTS = {"blip": None, "git": None, "blip-2": None, "paligemma": "caption en", "florence2": "<CAPTION>"}
# Processors that put the image's tokens before the text by themselves, or whose models have none.
PLACE_IMAGE = ("blip", "git", "blip-2", "instructblip", "florence2", "kosmos-2")
MAX_NEW_TOKENS = 64  # where the model's own generation config has no max length; transformers would stop at 20 tokens


def load_captioner(name_or_path: str | os.PathLike, prompt: str | None = None) -> Captioner:
    """The captioner of a folder or Hub repository, in eval, trained here or third-party. No code that came with the weights is run.

    Args:
        prompt: See `ImageTextToTextCaptioner.load`.

    Raises:
        UserError: It cannot be loaded, or takes no prompt.
    """
    if not is_trained_here(name_or_path):
        return ImageTextToTextCaptioner.load(name_or_path, prompt)
    if prompt is not None:
        raise UserError(f"--prompt: {name_or_path} takes none but the one it was trained with")
    return Captioner.load(name_or_path)


class PromptedImages:
    """RGB images as inputs of a third-party model, each image with the same prompt; the images may be of any sizes.

    Args:
        processor: The model's.
        kind: Model type.
        prompt: Request of a chat model, or text that the caption continues; None for pixels alone.
    """

    def __init__(self, processor, kind: str, prompt: str | None):
        self.processor, self.kind, self.prompt = processor, kind, prompt
        self.is_chat = bool(getattr(processor, "chat_template", None)) and kind not in DEFAULT_PROMPTS

    def __call__(self, images: list[Image.Image]) -> dict:
        """Inputs of the model's `generate()`; token ids are padded on the side that the tokenizer says.

        Raises:
            UserError: The processor does not take an image, as Qwen-VL's one that is 200 times as wide as high, or the prompt.
        """
        try:
            return self._inputs(images)
        except Exception as error:  # the processors of others each have their own
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"the processor of the model ({self.kind}) does not take it: {reason}") from error

    def _inputs(self, images: list[Image.Image]) -> dict:
        if self.prompt is None:
            return dict(self.processor(images=images, return_tensors="pt"))
        if self.is_chat:
            parts = [[{"type": "image", "image": image}, {"type": "text", "text": self.prompt}] for image in images]
            inputs = self.processor.apply_chat_template(
                [[{"role": "user", "content": content}] for content in parts],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
            return dict(inputs)
        if self.kind == "git":  # which continues the text, so that SEP must not end it
            tokenizer = self.processor.tokenizer
            ids = [tokenizer.cls_token_id, *tokenizer(self.prompt, add_special_tokens=False).input_ids]
            pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
            return {"pixel_values": pixels, "input_ids": torch.tensor([ids] * len(images))}
        texts = [self.text] * len(images)
        inputs = dict(self.processor(images=images, text=texts, padding=True, return_tensors="pt"))
        inputs.pop("labels", None)  # PaliGemma's, of a text without an answer
        return inputs

    @property
    def text(self) -> str:
        """The prompt, behind the token that stands for the image where there is to be one."""
        token = getattr(self.processor, "image_token", None)
        if self.kind in PLACE_IMAGE or not isinstance(token, str) or token in self.prompt:
            return self.prompt
        return token + ("" if self.kind == "paligemma" else "\n") + self.prompt


class StartLength(LogitsProcessor):
    """Notes how many tokens stand before the first one generated; changes no score.

    Models differ in it: decoder-only ones return the prompt, encoder-decoder ones a start token, and those that overwrite
    `generate()` whatever they start from.
    """

    def __init__(self):
        self.length: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.length is None:
            self.length = input_ids.shape[1]
        return scores


class ImageTextToTextCaptioner(Captioner):
    """A third-party model with its processor and prompt. It captions; it is not inspected, trained, saved or exported.

    Args:
        model: In eval.
        processor: The model's own.
        prompt: See `PromptedImages`.
    """

    is_third_party = captions_only = True
    min_image_side = None  # these models cut images by the size that they are stored in

    def __init__(self, model: PreTrainedModel, processor, prompt: str | None = None):
        super().__init__(model, processor)
        # Where a decoder's prompts are of unlike length, what is generated must follow each at once.
        processor.tokenizer.padding_side = "right" if model.config.is_encoder_decoder else "left"
        self.prompted_images = PromptedImages(processor, model.config.model_type, prompt)
        decoding = self.generation_config
        if decoding.max_length is None and decoding.max_new_tokens is None:
            decoding.max_new_tokens = MAX_NEW_TOKENS

    @classmethod
    def load(cls, name_or_path: str | os.PathLike, prompt: str | None = None) -> "ImageTextToTextCaptioner":
        """The model of a folder or Hub repository, in eval. No code that came with the weights is run.

        Args:
            prompt: See `PromptedImages`; the kind's own, see `DEFAULT_PROMPTS` and `CHAT_PROMPT`, where None.

        Raises:
            UserError: It cannot be loaded, lacks weights, or cannot caption by this prompt.
        """
        kind = kind_of(name_or_path)
        prompt = DEFAULT_PROMPTS.get(kind, CHAT_PROMPT) if prompt is None else prompt
        with loading(name_or_path):
            processor = AutoProcessor.from_pretrained(name_or_path, trust_remote_code=False)
        check_prompt(processor, kind, prompt)
        try:  # before weights are loaded
            PromptedImages(processor, kind, prompt)([Image.new("RGB", (64, 64))])
        except UserError as error:
            raise UserError(f"model {name_or_path}, prompt {prompt!r}: {error}") from error
        with loading(name_or_path):
            model, report = AutoModelForImageTextToText.from_pretrained(
                name_or_path, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False
            )
        check_weights(name_or_path, report, allow_unknown=True)
        return cls(model.eval(), processor, prompt)

    @property
    def generation_config(self) -> GenerationConfig:
        """The config that counts: a model with a `generate()` of its own (BLIP, BLIP-2) calls that of a part, which has another."""
        model = self.model
        if type(model).generate is not GenerationMixin.generate:
            model = next((part for part in model.children() if isinstance(part, GenerationMixin)), model)
        return model.generation_config

    @property
    def decoding(self) -> GenerationConfig:
        decoding = copy.deepcopy(self.generation_config)
        decoding.prompt = self.prompted_images.prompt
        return decoding

    @property
    def preprocess(self) -> PromptedImages:
        return self.prompted_images

    def prepare(self, image: Image.Image) -> Image.Image:
        return image

    def collate(self, prepared: list[Image.Image]) -> dict:
        return self.preprocess(prepared)

    def set_decoding(
        self, max_length: int | None = None, min_length: int | None = None, top_p: float | None = None, **settings
    ) -> None:
        """As of `Captioner`; lengths are those of the caption alone, and where beams are given nothing is sampled."""
        decoding = self.generation_config
        if settings.get("num_beams") and top_p is None:
            decoding.update(do_sample=False, temperature=None, top_p=None, top_k=None)
        super().set_decoding(top_p=top_p, **settings)
        if max_length is not None:
            decoding.update(max_new_tokens=max_length, max_length=None)
        if min_length is not None:
            decoding.update(min_new_tokens=min_length, min_length=None)
        longest = decoding.max_new_tokens
        if longest is not None and (decoding.min_new_tokens or 0) > longest:
            raise UserError(
                f"min_length {decoding.min_new_tokens} exceeds max_length {longest}: give a lower --min_length or a higher --max_length"
            )

    @torch.inference_mode()
    def generate(
        self,
        inputs: dict,
        inspect: bool = False,
        confidence: bool = False,
        max_new_tokens: int | None = None,
        **generation,
    ) -> list[dict]:
        """Caption one batch of images: what `preprocess` returns; see `Captioner.generate`.

        Raises:
            UserError: Probabilities are asked for.
        """
        if inspect or confidence:
            raise UserError(f"the probabilities of a model of the kind {self.model.config.model_type} are not computed")
        start = StartLength()
        generation |= self.lower_max_length(max_new_tokens, num_start=0)
        sequences = self.model.generate(
            **self._cast(inputs), **generation, logits_processor=LogitsProcessorList([start])
        )  # (batch x returned, start tokens and caption)
        token_ids = sequences[:, start.length :]
        return self._captions(token_ids, self._ended(token_ids, generation), self._num_returned(generation))

    def _ended(self, token_ids: torch.Tensor, generation: dict) -> list[bool]:
        """Whether EOS ended a caption; one that is forced at the max length, as Florence-2's, did not."""
        longest = generation.get("max_new_tokens") or self.generation_config.max_new_tokens
        if self.generation_config.forced_eos_token_id is not None and longest:
            token_ids = token_ids[:, : longest - 1]
        return torch.isin(token_ids, torch.tensor(self.eos_token_ids, device=token_ids.device)).any(dim=1).tolist()

    @property
    def eos_token_ids(self) -> list[int]:
        """The tokens that end a caption."""
        if self.model.config.model_type == "blip":  # which does not ask its generation config
            return [self.model.config.text_config.sep_token_id]
        ids = self.generation_config.eos_token_id
        return ids if isinstance(ids, list) else [] if ids is None else [ids]

    def stream(self, inputs: dict, **generation) -> Iterator[str]:
        return super().stream(self._cast(inputs), **generation)

    def _cast(self, inputs: dict) -> dict:
        """Inputs whose pixels are of the model's data type."""
        return {
            name: values.to(self.model.dtype)
            if isinstance(values, torch.Tensor) and values.is_floating_point()
            else values
            for name, values in inputs.items()
        }

    def save(self, folder: str | os.PathLike) -> None:
        raise UserError(f"a model of the kind {self.model.config.model_type} is not saved")


def check_prompt(processor, kind: str, prompt: str | None) -> None:
    """Refuse a prompt to which a model answers no caption.

    Raises:
        UserError: The prompt is one of Florence-2's tasks that give regions.
    """
    answers = getattr(processor, "tasks_answer_post_processing_type", {}) if kind == "florence2" else {}
    tasks = [task for task in answers if prompt and task in prompt]
    if tasks and answers[tasks[0]] != "pure_text":
        raise UserError(
            f"--prompt {prompt}: the task {tasks[0]} gives regions, not a caption: give <CAPTION>, <DETAILED_CAPTION> or "
            "<MORE_DETAILED_CAPTION>"
        )
