"""What travels to the Hub: models, processors, generation. Importing it makes system A known to transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from .modeling_inception_lstm import InceptionLSTMConfig, InceptionLSTMForConditionalGeneration, LSTMState

AutoConfig.register(InceptionLSTMConfig.model_type, InceptionLSTMConfig)
AutoModel.register(InceptionLSTMConfig, InceptionLSTMForConditionalGeneration)
AutoModelForImageTextToText.register(InceptionLSTMConfig, InceptionLSTMForConditionalGeneration)

__all__ = ["InceptionLSTMConfig", "InceptionLSTMForConditionalGeneration", "LSTMState"]
