"""Image encoders of ViT-GPT2: transformers' own, and timm's without remote code.

A ViT of timm is transformers' `TimmWrapperModel`, whose config is given the `hidden_size` that `VisionEncoderDecoderModel` reads. A
CNN of timm gives a grid (batch, channels, height, width), and cross attention reads (batch, positions, size): it becomes the backbone
of a DPT encoder without Transformer layers, which makes positions of the grid and normalizes them.
"""

import os

import torch
from torch import nn
from transformers import (
    AutoConfig,
    DPTConfig,
    DPTModel,
    PreTrainedConfig,
    PreTrainedModel,
    TimmBackboneConfig,
    TimmWrapperConfig,
    TimmWrapperModel,
    ViTConfig,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTModel,
)
from transformers.image_utils import PILImageResampling

from system.errors import UserError

from .modeling_inception_lstm import timm_model_args, timm_source

LARGE_FEATURES = 10**6  # bytes an image, above which training warns


def is_timm(encoder: str) -> bool:
    """Whether a name, Hub id or folder is a model of timm."""
    import timm

    return timm.is_model(encoder.split(":")[-1]) or isinstance(AutoConfig.from_pretrained(encoder), TimmWrapperConfig)


def hub_name(encoder: str) -> str:
    """The Hub id of a pretrained encoder; one of timm's names is that of a repository under `timm/`."""
    import timm

    return f"timm/{encoder}" if timm.is_model(encoder) and not os.path.isdir(encoder) else encoder


def load_timm_encoder(encoder: str, image_size: int | None = None) -> tuple[PreTrainedModel, ViTImageProcessor]:
    """A pretrained timm model as an encoder of transformers, and its image processor, which resizes the whole image.

    Args:
        encoder: timm name, Hub id or local folder.
        image_size: Side of its input in pixels; its own where None.

    Raises:
        UserError: Its weights cannot be loaded, or it cannot encode such images.
    """
    import timm
    from timm.data import resolve_model_data_config

    if not timm.is_model(encoder.split(":")[-1]):
        saved, _ = PreTrainedConfig.get_config_dict(encoder)
        if "transformers_version" in saved:
            raise UserError(
                f"--encoder {encoder} was saved by transformers: give timm's name {saved['architecture']}, or the folder that timm "
                "has saved"
            )
    source, model_args = timm_source(encoder), timm_model_args(encoder)
    try:
        model = timm.create_model(source, pretrained=True, num_classes=0).eval()
        data = resolve_model_data_config(model)
        side = image_size or data["input_size"][1]
        if image_size and _has_positions(model):
            model_args["img_size"] = side
            model = timm.create_model(source, pretrained=True, num_classes=0, img_size=side).eval()
        with torch.inference_mode():
            shape = model.forward_features(torch.zeros(1, 3, side, side)).shape
    except Exception as error:  # timm, the Hub's client and torch each have their own
        size = f", --image_size {image_size}" if image_size else ""
        raise UserError(f"--encoder {encoder}{size}: {' '.join(str(error).split())[:300]}") from error
    architecture = model.pretrained_cfg["architecture"]
    if len(shape) == 3:
        wrapped = _tokens_encoder(model, architecture, model_args, shape[-1], side)
    else:
        # What timm writes beside each model, and what a feature map does not depend on.
        defaults = {"in_chans": [3], "global_pool": ["", "avg", "fast", "max"]}
        if lost := {name: value for name, value in model_args.items() if value not in defaults.get(name, [])}:
            raise UserError(
                f"--encoder {encoder} has the model_args {lost}, which a CNN of ViT-GPT2 cannot keep: give one without"
            )
        wrapped = _grid_encoder(encoder, architecture, side)
    processor = ViTImageProcessor(
        size={"height": side, "width": side},
        resample=PILImageResampling[data["interpolation"].upper()],
        image_mean=list(data["mean"]),
        image_std=list(data["std"]),
    )
    return wrapped, processor


def feature_bytes(encoder: PreTrainedModel, image_processor) -> int:
    """Bytes that the cached features of one image take, in float16.

    Raises:
        ValueError: They are no sequence of states that every decoder can attend to.
    """
    size = dict(image_processor.size)
    height, width = (size.get(name) or max(size.values()) for name in ("height", "width"))
    with torch.inference_mode():
        states = encoder.eval()(torch.zeros(1, 3, height, width)).last_hidden_state
    if states.ndim != 3 or not states.is_contiguous():  # GPT-2 takes a view of them
        raise ValueError(f"its states have the shape {tuple(states.shape)} and the strides {states.stride()}")
    return 2 * states.numel()


def _has_positions(model: nn.Module) -> bool:
    return hasattr(model, "patch_embed") and hasattr(model.patch_embed, "img_size")


def _tokens_encoder(
    model: nn.Module, architecture: str, model_args: dict, hidden_size: int, side: int
) -> TimmWrapperModel:
    """transformers' wrapper with a timm model's weights; nothing is pooled."""
    config = TimmWrapperConfig(architecture=architecture, model_args=model_args or None, do_pooling=False, num_labels=0)
    config.hidden_size, config.image_size = hidden_size, side
    wrapped = TimmWrapperModel(config)
    wrapped.timm_model.load_state_dict(model.state_dict())
    return wrapped


def _grid_encoder(encoder: str, architecture: str, side: int) -> DPTModel:
    """A DPT encoder of no layers on a timm CNN: its last feature map's positions, normalized, behind a class token of zeros."""
    import timm

    try:
        backbone = timm.create_model(timm_source(encoder), pretrained=True, features_only=True).eval()
        with torch.inference_mode():
            maps = backbone(torch.zeros(1, 3, side, side))
        num_maps, (_, channels, height, width) = len(maps), maps[-1].shape
        if height != width or channels != backbone.feature_info.channels()[-1]:
            raise ValueError("its last feature map is no square grid of channels")
        config = DPTConfig(
            is_hybrid=True,
            backbone_config=TimmBackboneConfig(backbone=architecture, out_indices=[*range(num_maps - 3, num_maps)]),
            backbone_featmap_shape=[1, channels, height, width],
            hidden_size=channels,
            num_hidden_layers=0,
            num_attention_heads=1,
            layer_norm_eps=1e-6,
            image_size=side,
            patch_size=side // height,
        )
        model = DPTModel(config, add_pooling_layer=False)
        weights = {f"embeddings.backbone._backbone.{name}": value for name, value in backbone.state_dict().items()}
        model.load_state_dict(model.state_dict() | weights)
        with torch.no_grad():  # the grid as it is
            projection = model.embeddings.projection
            nn.init.dirac_(projection.weight)
            nn.init.zeros_(projection.bias)
            nn.init.zeros_(model.embeddings.cls_token)
            nn.init.zeros_(model.embeddings.position_embeddings)
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, side, side))
    except Exception as error:  # timm's and torch's
        raise UserError(
            f"--encoder {encoder}: timm's {architecture} gives no grid that can be attended to "
            f"({str(error).strip().splitlines()[0]}); give a ViT or a CNN such as efficientnet_b0 or convnext_tiny"
        ) from error
    return model


def load_vit_mae(encoder: str, config: ViTMAEConfig) -> ViTModel:
    """The encoder of a masked autoencoder as a plain ViT, which masks nothing."""
    names = set(ViTConfig().to_dict()) & set(config.to_dict()) - {"model_type", "architectures", "transformers_version"}
    plain = ViTConfig(**{name: getattr(config, name) for name in names})
    return ViTModel.from_pretrained(encoder, config=plain, add_pooling_layer=False)
