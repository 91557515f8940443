"""The Llama family: Llama 2, 3, 3.x and whatever calls itself model_type "llama" (SmolLM2, TinyLlama, Falcon3).

    x = embed(ids)
    each layer   x = x + o_proj(attention(rope(q_proj(n)), rope(k_proj(n)), v_proj(n))),  n = rms_norm(x)
                 x = x + down_proj(silu(gate_proj(n)) * up_proj(n)),                      n = rms_norm(x)
    logits = lm_head(rms_norm(x))

Module names are those of the checkpoints, so a state dict needs no renaming.
Source: arXiv:2302.13971, arXiv:2407.21783; numbers equal transformers' LlamaForCausalLM.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora.kernels.norm import rms_norm
from lora.kernels.rope import rope
from lora.kernels.swiglu import swiglu
from lora.layer import together


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Shapes and constants, by the names of config.json where they are plain."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int
    eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False

    @classmethod
    def from_json(cls, c: dict[str, Any]) -> "LlamaConfig":
        """From config.json, as transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters) writes it.

        Raises ValueError naming a key that is missing, or a setting that this file does not implement.
        """
        need = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        missing = [key for key in need if not isinstance(c.get(key), int)]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}, or holds no whole number there")
        if c.get("hidden_act", "silu") != "silu":
            raise ValueError(f"config.json asks for hidden_act={c['hidden_act']!r}; Llama's gate is 'silu'")
        ropes = dict(c.get("rope_parameters") or {})
        theta = ropes.pop("rope_theta", None) or c.get("rope_theta") or 10000.0
        scaling = ropes or dict(c.get("rope_scaling") or {})
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in ("default", "linear", "llama3"):
            raise ValueError(f"config.json asks for rope type {kind!r}; there are 'default', 'linear' and 'llama3'")
        heads = c["num_attention_heads"]
        return cls(
            vocab_size=c["vocab_size"],
            hidden_size=c["hidden_size"],
            intermediate_size=c["intermediate_size"],
            num_layers=c["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=c.get("num_key_value_heads") or heads,
            head_dim=c.get("head_dim") or c["hidden_size"] // heads,
            max_length=c.get("max_position_embeddings", 2048),
            eps=c.get("rms_norm_eps", 1e-6),
            rope_theta=float(theta),
            rope_scaling=None if kind == "default" else scaling | {"rope_type": kind},
            attention_bias=bool(c.get("attention_bias", False)),
            mlp_bias=bool(c.get("mlp_bias", False)),
            tied=bool(c.get("tie_word_embeddings", False)),
        )

    def to_json(self) -> dict[str, Any]:
        """config.json that transformers 4 and 5 both read."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_length,
            "rms_norm_eps": self.eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling,
            "hidden_act": "silu",
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "tie_word_embeddings": self.tied,
        }

    def inv_freq(self) -> Tensor:
        """Radians a position for each of the head_dim / 2 pairs, float32, with the scaling of Llama 3.1 applied.

        llama3 scaling: waves longer than original_max / low_freq_factor are slowed by `factor`, those shorter than
        original_max / high_freq_factor are kept, between them the two are blended linearly in 1 / wavelength.
        Source: transformers' modeling_rope_utils.py, _compute_llama3_parameters.
        """
        inv = 1.0 / self.rope_theta ** (torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim)
        s = self.rope_scaling
        if s is None:
            return inv
        if s["rope_type"] == "linear":
            return inv / s["factor"]
        original, low, high = s["original_max_position_embeddings"], s["low_freq_factor"], s["high_freq_factor"]
        wave = 2 * math.pi / inv
        blend = (original / wave - low) / (high - low)
        mixed = (1 - blend) * inv / s["factor"] + blend * inv
        return torch.where(wave > original / low, inv / s["factor"], torch.where(wave < original / high, inv, mixed))


class Cache:
    """Keys and values of the tokens so far: per layer (B, H_kv, length, D) twice, allocated once."""

    def __init__(self, config: LlamaConfig, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.num_layers, 2, batch, config.num_kv_heads, length, config.head_dim)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.used = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v (B, H_kv, T, D) behind what is there and returns all keys and values of the layer."""
        end = self.used + k.shape[2]
        self.kv[layer, 0, :, :, self.used : end] = k
        self.kv[layer, 1, :, :, self.used : end] = v
        return self.kv[layer, 0, :, :, :end], self.kv[layer, 1, :, :, :end]


class RMSNorm(nn.Module):
    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_heads, c.num_kv_heads, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_heads * c.head_dim, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=c.attention_bias)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=c.attention_bias)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: Cache | None, layer: int
    ) -> Tensor:
        B, T, _ = x.shape
        q, k, v = together(x, self.q_proj, self.k_proj, self.v_proj)
        q = rope(q.view(B, T, self.heads, self.head_dim), cos, sin).transpose(1, 2)  # (B, H, T, D)
        k = rope(k.view(B, T, self.kv_heads, self.head_dim), cos, sin).transpose(1, 2)
        v = v.view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        groups = self.heads // self.kv_heads
        if groups > 1:  # query heads g, g+1, ... of a group read the same key head
            k = k.repeat_interleave(groups, dim=1)
            v = v.repeat_interleave(groups, dim=1)
        causal = mask is None and T > 1
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, self.heads * self.head_dim))


class MLP(nn.Module):
    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(*together(x, self.gate_proj, self.up_proj)))


class Block(nn.Module):
    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.eps)
        self.mlp = MLP(c)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: Cache | None, layer: int
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        # nn.Embedding would draw normal numbers, which on the meta device imports 150 MB of torch's compiler
        table = torch.empty(c.vocab_size, c.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table if table.is_meta else table.normal_(), freeze=False)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.norm = RMSNorm(c.hidden_size, c.eps)


class Llama(nn.Module):
    """A decoder-only language model. Call it with token ids (B, T) for logits (B, T, V)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Makes the head use the embedding's weight, where the config says so."""
        if self.config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def new_cache(self, batch: int, length: int) -> Cache:
        norm = self.model.norm.weight
        return Cache(self.config, batch, length, norm.device, norm.dtype)

    def hidden(
        self, ids: Tensor, padding: Tensor | None = None, positions: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """The states (B, T, d) that the head reads.

        ids (B, T) int64.  `padding` (B, S) bool marks real tokens, S counting those in the cache; it is needed only
        when padding stands before real tokens, since attention never looks ahead.  `positions` (B, T) defaults to
        counting from the cache's end.
        """
        B, T = ids.shape
        used = cache.used if cache is not None else 0
        if used + T > self.config.max_length:
            raise ValueError(f"{used + T} tokens in a row, and this model was built for {self.config.max_length}")
        if positions is None:
            positions = torch.arange(used, used + T, device=ids.device)[None]
        x = self.model.embed_tokens(ids)
        angle = positions[:, :, None].float() * self.config.inv_freq().to(ids.device)  # (B or 1, T, D/2)
        cos, sin = angle.cos().to(x.dtype)[:, :, None], angle.sin().to(x.dtype)[:, :, None]
        mask = None
        if padding is not None or (used and T > 1):
            seen = torch.arange(used + T, device=ids.device)
            mask = seen[None, :] <= seen[used:, None]  # (T, S): attention looks back only
            if padding is not None:
                mask = mask[None, None] & padding[:, None, None, :]
                # a padded query sees no key at all, and softmax over nothing is NaN: let it see everything
                mask = mask | ~mask.any(dim=-1, keepdim=True)
        for i, block in enumerate(self.model.layers):
            x = block(x, cos, sin, mask, cache, i)
        if cache is not None:
            cache.used += T
        return self.model.norm(x)

    def forward(
        self, ids: Tensor, padding: Tensor | None = None, positions: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        return self.lm_head(self.hidden(ids, padding, positions, cache))
