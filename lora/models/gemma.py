"""Gemma 2 and 3 (text): Llama's layout with four norms a block, a scaled embedding and alternating windows.

    x = embed(ids) * sqrt(d)
    each layer   x = x + norm2(attention(norm1(x))),   x = x + norm4(down(gelu_tanh(gate(n)) * up(n))),  n = norm3(x)
    a norm multiplies by 1 + w, in float32
Gemma 2 squeezes attention scores (50) and logits (30) by tanh, and every other layer has a window.
Gemma 3 has norms on q and k instead; five layers with a window and their own rotary base come before each full one.

Source: arXiv:2408.00118, arXiv:2503.19786; numbers equal transformers' Gemma2ForCausalLM and Gemma3ForCausalLM.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora.kernels.rope import rope2
from lora.layer import together
from lora.models.base import Cache, Mask, attention, counts
from lora.models.llama import (
    Llama,
    LlamaConfig,
    Rotation,
    activation,
    inverse_frequencies,
    rope_settings,
    rotation,
)


@dataclass(frozen=True, kw_only=True)
class Gemma2Config(LlamaConfig):
    """As `LlamaConfig`, with the scale of attention, the two caps and a window on layers 0, 2, 4, ..."""

    model_type: ClassVar[str] = "gemma2"
    architecture: ClassVar[str] = "Gemma2ForCausalLM"
    ropes: ClassVar[tuple[str, ...]] = ("default", "linear")

    query_scalar: int | float = 256
    attention_cap: float | None = None
    logit_cap: float | None = None

    @classmethod
    def from_json(cls, c: dict[str, Any]) -> "Gemma2Config":
        return super().from_json({"head_dim": 256, "max_position_embeddings": 8192} | c)

    @classmethod
    def details(cls, c: dict[str, Any]) -> dict[str, Any]:
        activation(c, "gelu_pytorch_tanh")
        layers = c["num_hidden_layers"]
        kinds = c.get("layer_types") or cls.kinds(c)
        if len(kinds) != layers:
            raise ValueError(f"config.json names {len(kinds)} layer_types for {layers} layers")
        window, bias = c.get("sliding_window", 4096), bool(c.get("attention_bias", False))
        return {
            "attention_bias": bias,
            "output_bias": bias,
            "tied": bool(c.get("tie_word_embeddings", True)),
            "windows": tuple(window if kind == "sliding_attention" else None for kind in kinds),
            "query_scalar": c.get("query_pre_attn_scalar", 256),
            "attention_cap": c.get("attn_logit_softcapping", cls.caps[0]),
            "logit_cap": c.get("final_logit_softcapping", cls.caps[1]),
        }

    caps: ClassVar[tuple[float | None, float | None]] = (50.0, 30.0)  # where config.json does not say

    @classmethod
    def kinds(cls, c: dict[str, Any]) -> list[str]:
        """What each layer attends to, in files older than `layer_types`."""
        return [("sliding_attention", "full_attention")[i % 2] for i in range(c["num_hidden_layers"])]

    def to_json(self) -> dict[str, Any]:
        kinds = ["full_attention" if self.window(i) is None else "sliding_attention" for i in range(self.num_layers)]
        return super().to_json() | {
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": next((w for w in self.windows if w is not None), None),
            "layer_types": kinds,
            "query_pre_attn_scalar": self.query_scalar,
            "attn_logit_softcapping": self.attention_cap,
            "final_logit_softcapping": self.logit_cap,
        }

    def build(self) -> "Gemma":
        return Gemma(self)


@dataclass(frozen=True, kw_only=True)
class Gemma3Config(Gemma2Config):
    """As `Gemma2Config`, with norms on q and k, and a rotary base of their own for layers with a window."""

    model_type: ClassVar[str] = "gemma3_text"
    architecture: ClassVar[str] = "Gemma3ForCausalLM"
    caps: ClassVar[tuple[float | None, float | None]] = (None, None)

    local_theta: float = 10000.0

    @classmethod
    def from_json(cls, c: dict[str, Any]) -> "Gemma3Config":
        counts(c, ("num_hidden_layers",))
        both = c.get("rope_parameters") or {}
        if "full_attention" in both:  # transformers 5: one set for each kind of layer
            c = c | {"rope_parameters": both["full_attention"]}
            c["rope_local_base_freq"] = rope_settings({"rope_parameters": both["sliding_attention"]}, cls.ropes)[0]
        elif "rope_theta" not in c and "rope_theta" not in both:
            c = c | {"rope_theta": 1e6}
        return super().from_json({"max_position_embeddings": 131072} | c)  # type: ignore[return-value]

    @classmethod
    def details(cls, c: dict[str, Any]) -> dict[str, Any]:
        local = float(c.get("rope_local_base_freq", 10000.0))
        return super().details(c) | {"qk_norm": True, "local_theta": local}

    @classmethod
    def kinds(cls, c: dict[str, Any]) -> list[str]:
        every = c.get("sliding_window_pattern", 6)
        return ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(c["num_hidden_layers"])]

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"rope_local_base_freq": self.local_theta}

    def rope_of(self, layer: int) -> int:
        return 0 if self.window(layer) is None else 1

    def rotations(self, positions: Tensor, dtype: torch.dtype) -> list[Rotation]:
        local = inverse_frequencies(self.head_dim, self.local_theta, None)
        return [rotation(positions, inv, dtype) for inv in (self.inv_freq(), local)]


class GemmaNorm(nn.Module):
    """RMSNorm whose weight is stored around 0 and multiplied in float32."""

    around = 1.0  # what is added to the weight

    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(d)), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).to(x.dtype)


class GemmaAttention(nn.Module):
    def __init__(self, c: Gemma2Config) -> None:
        super().__init__()
        self.head_dim, self.scale, self.cap = c.head_dim, c.query_scalar**-0.5, c.attention_cap
        self.q_proj = nn.Linear(c.hidden_size, c.num_heads * c.head_dim, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=c.attention_bias)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=c.output_bias)
        self.q_norm = GemmaNorm(c.head_dim, c.eps) if c.qk_norm else nn.Identity()
        self.k_norm = GemmaNorm(c.head_dim, c.eps) if c.qk_norm else nn.Identity()

    def forward(self, x: Tensor, turn: Rotation, mask: Mask, cache: Cache | None, layer: int) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (t.view(B, T, -1, self.head_dim) for t in together(x, self.q_proj, self.k_proj, self.v_proj))
        q, k = rope2(self.q_norm(q), self.k_norm(k), *turn)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        y = attention(q, k, v, mask, scale=self.scale, softcap=self.cap)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class GemmaMLP(nn.Module):
    def __init__(self, c: Gemma2Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = together(x, self.gate_proj, self.up_proj)
        return self.down_proj(nn.functional.gelu(gate, approximate="tanh") * up)


class GemmaBlock(nn.Module):
    def __init__(self, c: Gemma2Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = GemmaNorm(c.hidden_size, c.eps)
        self.self_attn = GemmaAttention(c)
        self.post_attention_layernorm = GemmaNorm(c.hidden_size, c.eps)
        self.pre_feedforward_layernorm = GemmaNorm(c.hidden_size, c.eps)
        self.mlp = GemmaMLP(c)
        self.post_feedforward_layernorm = GemmaNorm(c.hidden_size, c.eps)

    def forward(self, x: Tensor, turn: Rotation, mask: Mask, cache: Cache | None, layer: int) -> Tensor:
        more = self.self_attn(self.input_layernorm(x), turn, mask, cache, layer)
        x = x + self.post_attention_layernorm(more)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Gemma(Llama):
    """A Gemma 2 or 3 language model. Call it with token ids (B, T) for logits (B, T, V)."""

    config: Gemma2Config
    block = GemmaBlock
    last_norm = GemmaNorm

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__(config)
        self.softcap = config.logit_cap

    def embed(self, ids: Tensor) -> Tensor:
        x = self.model.embed_tokens(ids)
        return x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype)  # rounded to the weights' dtype first
