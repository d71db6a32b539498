"""Small third-party captioners for the tests, one of each kind of interface: random weights, saved as a folder.

All is built from configs: no weights, no tokenizers and no images come from elsewhere.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from small_captioners import WORDS
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForImageTextToText,
    BartConfig,
    Blip2Config,
    Blip2Processor,
    BlipConfig,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Florence2Config,
    Florence2Processor,
    GemmaConfig,
    GitConfig,
    GitProcessor,
    Idefics3Config,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    OPTConfig,
    PaliGemmaConfig,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

IMAGE, VIDEO, VISION_START, VISION_END = "<image>", "<video>", "<vision>", "</vision>"
AROUND = ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
ROWS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
MARKS = ["user", "assistant", ":", "Describe", "this", "image", "in", "one", "sentence", "."]
TOKENS = [*WORDS, *MARKS, IMAGE, VIDEO, VISION_START, VISION_END, *AROUND, *ROWS]
IDS = {token: number for number, token in enumerate(TOKENS)}
PAD, BOS, EOS = 0, 1, 2
SPECIAL = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {**SIZES, **SPECIAL, "vocab_size": len(TOKENS), "max_position_embeddings": 512}
LLAMA = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
SIDE = 32  # pixels of an image, 2 x 2 patches
VISION = {**SIZES, "image_size": SIDE, "patch_size": 16}
SQUARE = {"height": SIDE, "width": SIDE}
# As the Hub's chat models have them: every part of a message in its place, then where the answer begins.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}PLACE{% else %} {{ part['text'] }} {% endif %}{% endfor %}END\n{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def chat_template(image: str = IMAGE, start: str = "", end: str = "") -> str:
    return start + CHAT_TEMPLATE.replace("PLACE", image).replace("END", end)


def tokenizer(template: str = "$A", **more) -> PreTrainedTokenizerFast:
    """Words, marks and special tokens; what the template adds is all that is added to a text."""
    words = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    others = TOKENS[len(WORDS) + len(MARKS) :]
    made = PreTrainedTokenizerFast(tokenizer_object=words, **special, **more)
    made.add_special_tokens({"additional_special_tokens": others})
    return made


def blip():
    text = {**TEXT, "encoder_hidden_size": 32, "sep_token_id": EOS, "eos_token_id": IDS["white"]}  # SEP ends captions
    config = BlipConfig(text_config=text, vision_config=VISION, projection_dim=32, image_text_hidden_size=32)
    marks = {"cls_token": "<s>", "sep_token": "</s>"}
    return config, BlipProcessor(BlipImageProcessor(size=SQUARE), tokenizer("<s> $A </s>", **marks))


def git():
    config = GitConfig(**TEXT, vision_config=VISION, hidden_dropout_prob=0.0)
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE)
    marks = {"cls_token": "<s>", "sep_token": "</s>"}
    return config, GitProcessor(images, tokenizer("<s> $A </s>", **marks))


def blip_2():
    text = OPTConfig(
        **{name: value for name, value in TEXT.items() if name != "intermediate_size"},
        ffn_dim=64,
        word_embed_proj_dim=32,
    )
    qformer = {**SIZES, "vocab_size": len(TOKENS), "encoder_hidden_size": 32, "hidden_dropout_prob": 0.0}
    config = Blip2Config(
        text_config=text.to_dict(),
        vision_config={**VISION, "initializer_range": 0.02},
        qformer_config=qformer,
        num_query_tokens=3,
        image_token_index=IDS[IMAGE],
    )
    return config, Blip2Processor(BlipImageProcessor(size=SQUARE), tokenizer("<s> $A"), num_query_tokens=3)


def florence2():
    vision = {
        "depths": (1, 1),
        "patch_size": (7, 3),
        "patch_stride": (8, 2),
        "patch_padding": (3, 1),
        "patch_prenorm": (False, True),
        "embed_dim": (16, 32),
        "num_heads": (2, 2),
        "num_groups": (2, 2),
        "window_size": 2,
        "projection_dim": 32,
        "drop_path_rate": 0.0,
    }
    layers = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    text = BartConfig(
        vocab_size=len(TOKENS),
        d_model=32,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=128,
        **layers,
        **SPECIAL,
        decoder_start_token_id=EOS,
        forced_eos_token_id=EOS,
        forced_bos_token_id=BOS,
    )
    config = Florence2Config(text_config=text.to_dict(), vision_config=vision, image_token_id=IDS[IMAGE], **SPECIAL)
    images = CLIPImageProcessor(size=SQUARE, do_center_crop=False)
    images.image_seq_length = 5  # a grid of 2 x 2, and their mean
    marks = {"image_token": IMAGE}
    answers = {"pure_text": {}, "description_with_bboxes": {}}
    return config, Florence2Processor(images, tokenizer(extra_special_tokens=marks), post_processor_config=answers)


def paligemma():
    text = GemmaConfig(**LLAMA).to_dict()
    vision = SiglipVisionConfig(**VISION, projection_dim=32, vision_use_head=False).to_dict()
    config = PaliGemmaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=IDS[IMAGE],
        projection_dim=32,
        hidden_size=32,
        **SPECIAL,
    )
    images = SiglipImageProcessor(size=SQUARE)
    images.image_seq_length = 4
    return config, PaliGemmaProcessor(images, tokenizer(extra_special_tokens={"image_token": IMAGE}))


def idefics3():
    config = Idefics3Config(
        text_config=LlamaConfig(**LLAMA).to_dict(),
        vision_config={**SIZES, "image_size": SIDE, "patch_size": 8},
        scale_factor=2,
        image_token_id=IDS[IMAGE],
        **SPECIAL,
    )
    images = Idefics3ImageProcessor(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    template = chat_template(end="<end_of_utterance>")
    return config, Idefics3Processor(images, tokenizer(), image_seq_len=4, chat_template=template)


def smolvlm():
    config = SmolVLMConfig(
        text_config=LlamaConfig(**LLAMA).to_dict(),
        vision_config={**SIZES, "image_size": SIDE, "patch_size": 8},
        scale_factor=2,
        image_token_id=IDS[IMAGE],
        **SPECIAL,
    )
    sizes = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    frames = {"fps": 1, "max_frames": 4, "video_size": {"longest_edge": SIDE}}
    return config, SmolVLMProcessor(
        SmolVLMImageProcessor(**sizes),
        tokenizer(extra_special_tokens={"image_token": IMAGE}),
        SmolVLMVideoProcessor(**sizes, video_sampling=frames),
        image_seq_len=4,
        chat_template=chat_template(end="<end_of_utterance>"),
    )


def qwen2_5_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 8}
    vision |= {"out_hidden_size": 32, "window_size": 32, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "num_key_value_heads": 2, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IDS[IMAGE],
        video_token_id=IDS[VIDEO],
        vision_start_token_id=IDS[VISION_START],
        vision_end_token_id=IDS[VISION_END],
    )
    sizes = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    pixels = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    return config, Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=pixels, **sizes),
        tokenizer(extra_special_tokens={"image_token": IMAGE, "video_token": VIDEO}),
        Qwen2VLVideoProcessor(size=pixels, **sizes),
        chat_template=chat_template(VISION_START + IMAGE + VISION_END),
    )


def qwen3_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 8}
    vision |= {"out_hidden_size": 32, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    config = Qwen3VLConfig(
        text_config={**LLAMA, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IDS[IMAGE],
        video_token_id=IDS[VIDEO],
        vision_start_token_id=IDS[VISION_START],
        vision_end_token_id=IDS[VISION_END],
    )
    sizes = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    pixels = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    marks = {"image_token": IMAGE, "video_token": VIDEO}
    marks |= {"vision_start_token": VISION_START, "vision_end_token": VISION_END}
    return config, Qwen3VLProcessor(
        Qwen2VLImageProcessor(size=pixels, **sizes),
        tokenizer(extra_special_tokens=marks),
        Qwen3VLVideoProcessor(size=pixels, **sizes),
        chat_template=chat_template(VISION_START + IMAGE + VISION_END),
    )


def llava():
    config = LlavaConfig(
        text_config=LlamaConfig(**LLAMA).to_dict(),
        vision_config=CLIPVisionConfig(**VISION, projection_dim=32).to_dict(),
        image_token_index=IDS[IMAGE],
        vision_feature_layer=-1,
    )
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE)
    return config, LlavaProcessor(
        images,
        tokenizer("<s> $A", extra_special_tokens={"image_token": IMAGE}),
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template(),
    )


BUILDERS = [blip, git, blip_2, florence2, paligemma, idefics3, qwen2_5_vl, qwen3_vl, llava]
if find_spec("num2words"):  # without which transformers has no processor of SmolVLM
    BUILDERS.append(smolvlm)
KINDS = {build.__name__: build for build in BUILDERS}


def save(kind: str, folder: Path) -> Path:
    """Save a small captioner of a kind, of weights so wide that images differ in their captions."""
    torch.manual_seed(1)
    config, processor = KINDS[kind]()
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    # A model of random weights would generate what stands for images.
    others = [number for token, number in IDS.items() if token not in WORDS and token not in MARKS]
    model.generation_config.update(suppress_tokens=[PAD, BOS, 3, *others], **SPECIAL)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
