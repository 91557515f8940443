"""Qwen2, Qwen2.5 (biases on q, k and v) and Qwen3 (no biases, RMSNorm over each head of q and k): Llama's blocks.

Source: arXiv:2407.10671, arXiv:2505.09388; numbers equal transformers' Qwen2ForCausalLM and Qwen3ForCausalLM.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from lora.models.llama import LlamaConfig, activation


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(LlamaConfig):
    """As `LlamaConfig`; where `use_sliding_window` is set, layers from `max_window_layers` on have a window."""

    model_type: ClassVar[str] = "qwen2"
    architecture: ClassVar[str] = "Qwen2ForCausalLM"

    @classmethod
    def details(cls, c: dict[str, Any]) -> dict[str, Any]:
        activation(c, "silu")
        return {
            "attention_bias": True,
            "tied": bool(c.get("tie_word_embeddings", False)),
            "windows": cls.read_windows(c),
        }

    @classmethod
    def read_windows(cls, c: dict[str, Any]) -> tuple[int | None, ...]:
        """The window of each layer, by `layer_types` or, in older files, by `max_window_layers`."""
        window, layers = c.get("sliding_window", 4096), c["num_hidden_layers"]
        if not c.get("use_sliding_window", False) or window is None:
            return ()
        first = c.get("max_window_layers", 28)
        kinds = c.get("layer_types") or ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)

    def to_json(self) -> dict[str, Any]:
        window = next((w for w in self.windows if w is not None), None)
        return super().to_json() | {
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": sum(self.window(i) is None for i in range(self.num_layers)),
            "layer_types": [
                "full_attention" if self.window(i) is None else "sliding_attention" for i in range(self.num_layers)
            ],
        }


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(Qwen2Config):
    """As `Qwen2Config`, with norms on q and k; heads need not add up to the width."""

    model_type: ClassVar[str] = "qwen3"
    architecture: ClassVar[str] = "Qwen3ForCausalLM"

    @classmethod
    def details(cls, c: dict[str, Any]) -> dict[str, Any]:
        bias = bool(c.get("attention_bias", False))
        return super().details(c) | {"attention_bias": bias, "output_bias": bias, "qk_norm": True}
