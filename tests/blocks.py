"""Small models of the families whose blocks can run as one step, for whoever tests that."""

import torch

from lora.models import llama
from lora.models.gemma import Gemma2Config, Gemma3Config
from lora.models.mistral import MistralConfig
from lora.models.phi3 import Phi3Config
from lora.models.qwen import Qwen2Config, Qwen3Config

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 16, "max_length": 128,
}  # fmt: skip
FAR = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}


def family(name: str) -> llama.Llama:
    """A small model of another family than Llama, its norms' weights far from where they start."""
    configs = {
        "qwen2": lambda: Qwen2Config(**SIZES, attention_bias=True),
        "qwen3": lambda: Qwen3Config(**SIZES, qk_norm=True),
        "mistral": lambda: MistralConfig(**SIZES, windows=(7,) * 3),
        "phi3": lambda: Phi3Config(**SIZES),
        "phi3-long": lambda: Phi3Config(**SIZES, original_length=32, rope_scaling=FAR),
        "phi4-mini": lambda: Phi3Config(**SIZES, partial=0.5),
        "gemma2": lambda: Gemma2Config(**SIZES, attention_cap=50.0, logit_cap=30.0, tied=True, windows=(5, None, 5)),
        "gemma3": lambda: Gemma3Config(**SIZES, qk_norm=True, tied=True, windows=(5, None, 5)),
    }
    torch.manual_seed(0)
    model = configs[name]().build().requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
        if p.ndim == 1 and not name.startswith("gemma"):
            p.data += 1.0
    return model
