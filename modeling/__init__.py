"""What travels to the Hub: models, processors, generation.

Importing it registers the LSTM captioner with transformers' Auto classes and `pipeline("image-captioning")` with transformers.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText
from transformers.pipelines import PIPELINE_REGISTRY

from .captioning_pipeline import ImageToTextPipeline
from .image_processing_timm import TimmImageProcessor
from .modeling_inception_lstm import InceptionLSTMConfig, InceptionLSTMForConditionalGeneration, LSTMState

AutoImageProcessor.register(InceptionLSTMConfig, image_processor_classes={"torchvision": TimmImageProcessor})
AutoConfig.register(InceptionLSTMConfig.model_type, InceptionLSTMConfig)
AutoModel.register(InceptionLSTMConfig, InceptionLSTMForConditionalGeneration)
AutoModelForImageTextToText.register(InceptionLSTMConfig, InceptionLSTMForConditionalGeneration)
PIPELINE_REGISTRY.register_pipeline(
    "image-captioning", pipeline_class=ImageToTextPipeline, pt_model=AutoModelForImageTextToText, type="multimodal"
)

__all__ = [
    "ImageToTextPipeline",
    "InceptionLSTMConfig",
    "InceptionLSTMForConditionalGeneration",
    "LSTMState",
    "TimmImageProcessor",
]
