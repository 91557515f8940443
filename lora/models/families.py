"""The families that `load` knows: model_type of config.json -> the class that reads it and builds the model.

A new family is one file beside this one (llama.py is the pattern, base.py says what a model must offer) and one
line here.
"""

from typing import Any

from lora.models.bert_config import BertConfig, RobertaConfig
from lora.models.falcon import FalconConfig
from lora.models.gemma import Gemma2Config, Gemma3Config
from lora.models.gpt2 import GPT2Config
from lora.models.llama import LlamaConfig
from lora.models.mistral import MistralConfig
from lora.models.phi3 import Phi3Config
from lora.models.qwen import Qwen2Config, Qwen3Config

FAMILIES: dict[str, Any] = {
    "RefinedWeb": FalconConfig,
    "RefinedWebModel": FalconConfig,
    "bert": BertConfig,
    "falcon": FalconConfig,
    "gemma2": Gemma2Config,
    "gemma3_text": Gemma3Config,
    "gpt2": GPT2Config,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "phi3": Phi3Config,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "roberta": RobertaConfig,
}
