"""A captioner that is trained already as the start of training: which kinds go with a script, and a ViT-GPT2 of ours or of others."""

import os

from torch import nn
from transformers import AutoConfig, PreTrainedConfig, VisionEncoderDecoderConfig, VisionEncoderDecoderModel

from modeling import InceptionLSTMConfig
from modeling.captioner import Captioner
from modeling.loading import loading
from modeling.vit_gpt2 import freeze, set_dropout
from system.errors import UserError
from training.arguments import refuse_what_it_brings
from training.checkpoints import check_not_overwriting_start

# Model types of the captioners that training starts from.
LSTM, VIT_GPT2 = InceptionLSTMConfig.model_type, VisionEncoderDecoderConfig.model_type
KINDS = {LSTM: "inception-lstm", VIT_GPT2: "vit-gpt2"}  # as the card has them
OWN = (  # what a ViT-GPT2 brings along
    *("encoder", "decoder", "pretrained_encoder", "pretrained_decoder", "prompt", "trim_vocabulary"),
    *("image_size", "patch_size", "convolutional_stem", "num_encoder_layers"),
)


def check_start(
    name: str, output_dir: str | os.PathLike, kinds: tuple[str, ...], tokenizer_name: str | None = None
) -> PreTrainedConfig:
    """Refuse a captioner that a script does not fine-tune by its config alone, before data or weights are loaded.

    Args:
        name: Folder or Hub id.
        output_dir: Folder that the run writes.
        kinds: Model types that the script fine-tunes: `LSTM`, `VIT_GPT2`.
        tokenizer_name: The option, which does not go with a captioner.

    Returns:
        Its config.

    Raises:
        UserError: There is no such captioner, it is of another kind, in `output_dir`, or `tokenizer_name` is given.
    """
    check_not_overwriting_start(name, output_dir)
    if tokenizer_name:
        raise UserError(
            f"--tokenizer_name {tokenizer_name} does not go with --model_name_or_path {name}, which has its own"
        )
    with loading(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if config.model_type not in kinds:
        scripts = {LSTM: "an LSTM captioner goes with train_lstm.py", VIT_GPT2: "a ViT-GPT2 with train_vit_gpt2.py"}
        hint = scripts.get(config.model_type, "a language model goes with --decoder of train_vit_gpt2.py")
        raise UserError(
            f"--model_name_or_path {name} is of the kind {config.model_type}: give a captioner of the kind {' or '.join(kinds)}; {hint}"
        )
    return config


def check_lstm_start(model_args, output_dir: str | os.PathLike, tokenizer_name: str | None) -> None:
    """Refuse what train_lstm.py does not fine-tune, and options that do not go with it, see `check_start`.

    Raises:
        UserError: As `check_start`, or an option does not go with the captioner.
    """
    name = model_args.model_name_or_path
    config = check_start(name, output_dir, (LSTM,), tokenizer_name)
    if model_args.attention_dropout and not config.attention:
        raise UserError(
            f"--attention_dropout {model_args.attention_dropout}: --model_name_or_path {name} has no attention"
        )


def check_vit_gpt2_start(model_args, output_dir: str | os.PathLike, tokenizer_name: str | None) -> None:
    """Refuse what train_vit_gpt2.py does not fine-tune, and options that do not go with it, see `check_start`.

    Raises:
        UserError: As `check_start`, or an option does not go with the captioner.
    """
    name = model_args.model_name_or_path
    refuse_what_it_brings(model_args, name, OWN)
    decoder = check_start(name, output_dir, (VIT_GPT2,), tokenizer_name).decoder.model_type
    if model_args.dropout is not None and decoder != "gpt2":
        raise UserError(
            f"--dropout does not go with --model_name_or_path {name}, whose decoder is of the kind {decoder}, not gpt2"
        )


def load_for_fine_tuning(name: str, model_args) -> Captioner:
    """A whole captioner: encoder, decoder, processor and prompt; freezing and dropout are this run's.

    Args:
        name: Folder or Hub id.
        model_args: Options of train_vit_gpt2.py.

    Raises:
        UserError: It cannot be loaded.
    """
    captioner = Captioner.load(name)
    model: VisionEncoderDecoderModel = captioner.model
    if captioner.tokenizer.pad_token is None:
        captioner.tokenizer.pad_token = captioner.tokenizer.eos_token  # labels are masked by position
    if model_args.dropout is not None:
        for module in model.decoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = model_args.dropout
        set_dropout(model.config.decoder, model_args.dropout)
    if model_args.freeze_encoder:
        freeze(model.encoder)
    return captioner
