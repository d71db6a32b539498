"""A ViT-GPT2 captioner that is trained already, ours or another `VisionEncoderDecoderModel`, as the start of training."""

from torch import nn
from transformers import AutoConfig, VisionEncoderDecoderModel

from modeling.captioner import Captioner
from modeling.vit_gpt2 import freeze, set_dropout
from system.errors import UserError
from training.arguments import refuse_what_it_brings

OWN = (  # what a captioner brings along
    *("encoder", "decoder", "pretrained_encoder", "pretrained_decoder", "prompt", "trim_vocabulary"),
    *("image_size", "patch_size", "convolutional_stem", "num_encoder_layers"),
)


def load_for_fine_tuning(name: str, model_args, tokenizer_name: str | None) -> Captioner:
    """A whole captioner: encoder, decoder, processor and prompt; freezing and dropout are this run's.

    Args:
        name: Folder or Hub id.
        model_args: Options of train_vit_gpt2.py.
        tokenizer_name: The option, which does not go with a captioner.

    Raises:
        UserError: It is no such captioner, cannot be loaded, or an option does not go with it.
    """
    refuse_what_it_brings(model_args, name, OWN)
    if tokenizer_name:
        raise UserError(f"--tokenizer_name does not go with --model_name_or_path {name}, which has its own")
    try:
        kind = AutoConfig.from_pretrained(name).model_type
    except (OSError, ValueError):
        kind = None  # Captioner.load says why
    if kind not in (None, "vision-encoder-decoder"):
        raise UserError(
            f"--model_name_or_path {name} is of the kind {kind}: give a captioner of the kind vision-encoder-decoder; a language model "
            "goes with --decoder, an LSTM captioner with train_lstm.py"
        )
    captioner = Captioner.load(name)
    model: VisionEncoderDecoderModel = captioner.model
    if captioner.tokenizer.pad_token is None:
        captioner.tokenizer.pad_token = captioner.tokenizer.eos_token  # labels are masked by position
    if model_args.dropout is not None:
        if model.config.decoder.model_type != "gpt2":
            raise UserError(
                f"--dropout does not go with --model_name_or_path {name}, whose decoder is of the kind {model.config.decoder.model_type}"
            )
        for module in model.decoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = model_args.dropout
        set_dropout(model.config.decoder, model_args.dropout)
    if model_args.freeze_encoder:
        freeze(model.encoder)
    return captioner
