"""What travels to the Hub: models, processors, generation.

Importing it makes the LSTM captioner known to transformers' Auto classes, and `pipeline("image-captioning")` to transformers, which no
longer reports the pooler that a saved ViT-GPT2 lacks.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, VisionEncoderDecoderModel
from transformers.pipelines import PIPELINE_REGISTRY

from .captioning_pipeline import ImageToTextPipeline
from .modeling_inception_lstm import InceptionLSTMConfig, InceptionLSTMForConditionalGeneration, LSTMState

AutoConfig.register(InceptionLSTMConfig.model_type, InceptionLSTMConfig)
AutoModel.register(InceptionLSTMConfig, InceptionLSTMForConditionalGeneration)
AutoModelForImageTextToText.register(InceptionLSTMConfig, InceptionLSTMForConditionalGeneration)
# ViT-GPT2 is saved without the pooler that transformers gives its encoder anew whenever it is loaded.
VisionEncoderDecoderModel._keys_to_ignore_on_load_missing = [r"^encoder\.pooler\."]
PIPELINE_REGISTRY.register_pipeline(
    "image-captioning", pipeline_class=ImageToTextPipeline, pt_model=AutoModelForImageTextToText, type="multimodal"
)

__all__ = ["ImageToTextPipeline", "InceptionLSTMConfig", "InceptionLSTMForConditionalGeneration", "LSTMState"]
