"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: Llama's blocks with q, k, v in one matrix and gate, up in another.

Rows of qkv_proj are q, then k, then v; rows of gate_up_proj are gate, then up.  Phi-4-mini turns only the first
three quarters of a head.  Models for long texts have two sets of divisors of the rotary waves, one for rows up to
the length of pre-training and one beyond ("longrope"), and lengthen cos and sin.

Source: arXiv:2404.14219; numbers equal transformers' Phi3ForCausalLM.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora.kernels.rope import rope
from lora.kernels.swiglu import swiglu
from lora.models.base import Cache, Mask, attention
from lora.models.llama import (
    Llama,
    LlamaConfig,
    RMSNorm,
    Rotation,
    activation,
    inverse_frequencies,
    moved,
    rotation,
)


@dataclass(frozen=True, kw_only=True)
class Phi3Config(LlamaConfig):
    """As `LlamaConfig`; `original_length` is that of pre-training, `partial` the share of a head that turns."""

    model_type: ClassVar[str] = "phi3"
    architecture: ClassVar[str] = "Phi3ForCausalLM"
    ropes: ClassVar[tuple[str, ...]] = ("default", "linear", "longrope")

    original_length: int = 4096
    partial: float = 1.0

    @classmethod
    def from_json(cls, c: dict[str, Any]) -> "Phi3Config":
        scaling = c.get("rope_scaling") or {}
        if scaling.get("type", scaling.get("rope_type")) in ("su", "yarn"):  # longrope's names in early files
            c = c | {"rope_scaling": scaling | {"type": "longrope", "rope_type": "longrope"}}
        return super().from_json({"rms_norm_eps": 1e-5, "max_position_embeddings": 4096} | c)

    @classmethod
    def details(cls, c: dict[str, Any]) -> dict[str, Any]:
        activation(c, "silu")
        window, ropes = c.get("sliding_window"), c.get("rope_parameters") or {}
        partial = ropes.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0))
        original = ropes.get("original_max_position_embeddings", c.get("original_max_position_embeddings", 4096))
        return {
            "tied": bool(c.get("tie_word_embeddings", False)),
            "windows": () if window is None else (window,) * c["num_hidden_layers"],
            "original_length": original,
            "partial": float(partial),
        }

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {
            "sliding_window": self.windows[0] if self.windows else None,
            "original_max_position_embeddings": self.original_length,
            "partial_rotary_factor": self.partial,
            "pad_token_id": None,  # else the class's 32000, whatever the vocabulary
        }

    def build(self) -> "Phi3":
        return Phi3(self)

    def rotations(self, positions: Tensor, dtype: torch.dtype) -> list[Rotation]:
        """Source of longrope: arXiv:2402.13753; transformers' _compute_longrope_parameters."""
        dim, s = int(self.head_dim * self.partial), self.rope_scaling
        if s is None or s["rope_type"] != "longrope":
            return [rotation(positions, inverse_frequencies(dim, self.rope_theta, s), dtype)]
        long = positions.amax(dim=1, keepdim=True) >= self.original_length  # (B or 1, 1): by the row's own length
        short, far = (moved(tuple(s[key]), positions.device) for key in ("short_factor", "long_factor"))
        power = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
        inv = 1.0 / (torch.where(long, far, short) * self.rope_theta**power)[:, None]  # (B or 1, 1, dim / 2)
        stretch = self.max_length / self.original_length
        factor = s.get("attention_factor")
        if factor is None:
            factor = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(self.original_length))
        return [rotation(positions, inv, dtype, factor)]


class Phi3Attention(nn.Module):
    def __init__(self, c: Phi3Config) -> None:
        super().__init__()
        self.sizes = [c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.num_kv_heads * c.head_dim]
        self.head_dim = c.head_dim
        self.qkv_proj = nn.Linear(c.hidden_size, sum(self.sizes), bias=False)
        self.o_proj = nn.Linear(self.sizes[0], c.hidden_size, bias=False)

    def forward(self, x: Tensor, turn: Rotation, mask: Mask, cache: Cache | None, layer: int) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (t.view(B, T, -1, self.head_dim) for t in self.qkv_proj(x).split(self.sizes, dim=-1))
        q, k, v = turned(q, turn).transpose(1, 2), turned(k, turn).transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        return self.o_proj(attention(q, k, v, mask).transpose(1, 2).reshape(B, T, -1))


def turned(x: Tensor, turn: Rotation) -> Tensor:
    """x (B, T, H, D) with the first values of each head turned, as many as `turn` is for, the rest passed on."""
    dim = 2 * turn[0].shape[-1]
    if dim == x.shape[-1]:
        return rope(x, *turn)
    return torch.cat((rope(x[..., :dim].contiguous(), *turn), x[..., dim:]), dim=-1)


class Phi3MLP(nn.Module):
    def __init__(self, c: Phi3Config) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(swiglu(gate.contiguous(), up.contiguous()))


class Phi3Block(nn.Module):
    def __init__(self, c: Phi3Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.eps)
        self.self_attn = Phi3Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.eps)
        self.mlp = Phi3MLP(c)

    def forward(self, x: Tensor, turn: Rotation, mask: Mask, cache: Cache | None, layer: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turn, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Phi3(Llama):
    """A Phi-3 or Phi-4 language model. Call it with token ids (B, T) for logits (B, T, V)."""

    config: Phi3Config
    block = Phi3Block

    def restart(self) -> int | None:
        s = self.config.rope_scaling
        return self.config.original_length if s is not None and s["rope_type"] == "longrope" else None
