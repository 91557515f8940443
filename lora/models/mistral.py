"""Mistral: Llama's blocks without biases; in its first version each query sees the last 4,096 keys only.

Source: arXiv:2310.06825; numbers equal transformers' MistralForCausalLM.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from lora.models.llama import LlamaConfig, activation


@dataclass(frozen=True, kw_only=True)
class MistralConfig(LlamaConfig):
    """As `LlamaConfig`; one window for all layers."""

    model_type: ClassVar[str] = "mistral"
    architecture: ClassVar[str] = "MistralForCausalLM"

    @classmethod
    def details(cls, c: dict[str, Any]) -> dict[str, Any]:
        activation(c, "silu")
        window = c.get("sliding_window", 4096)  # a missing key means 4096 in this family, null means none
        return {
            "tied": bool(c.get("tie_word_embeddings", False)),
            "windows": () if window is None else (window,) * c["num_hidden_layers"],
        }

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"sliding_window": self.windows[0] if self.windows else None}
