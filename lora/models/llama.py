"""The Llama family: Llama 2, 3, 3.x and whatever calls itself model_type "llama" (SmolLM2, TinyLlama, Falcon3).

    x = embed(ids)
    each layer   x = x + o_proj(attention(rope(q_proj(n)), rope(k_proj(n)), v_proj(n))),  n = rms_norm(x)
                 x = x + down_proj(silu(gate_proj(n)) * up_proj(n)),                      n = rms_norm(x)
    logits = lm_head(rms_norm(x))

Mistral and Qwen are the same blocks with a window, biases or norms on q and k (mistral.py, qwen.py).
Source: arXiv:2302.13971, arXiv:2407.21783; numbers equal transformers' LlamaForCausalLM.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lora.kernels import beside
from lora.kernels.dispatch import on_gpu
from lora.kernels.norm import rms_norm
from lora.kernels.rope import rope2
from lora.kernels.swiglu import swiglu
from lora.layer import together
from lora.models import fused, lean
from lora.models.base import Cache, CausalLM, Mask, attention, counts, new_embedding, seen
from lora.models.budget import Keeping
from lora.models.documents import Documents

FUSED = {"cuda"}  # devices on which training takes fused.py's blocks
LEAN = {"cpu"}  # and those on which it takes lean.py's

Rotation = tuple[Tensor, Tensor]  # cos and sin of each position's angles, (B or 1, T, 1, D / 2)


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Shapes and constants, by the names of config.json where they are plain."""

    model_type: ClassVar[str] = "llama"
    architecture: ClassVar[str] = "LlamaForCausalLM"
    ropes: ClassVar[tuple[str, ...]] = ("default", "linear", "llama3")

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
    output_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()  # of each layer; empty: none has one

    @classmethod
    def from_json(cls, c: dict[str, Any]) -> Self:
        """From config.json, as transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters) writes it.

        Raises ValueError naming a key that is missing, or a setting that this family does not implement.
        """
        counts(c, ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"))
        counts(c, [key for key in ("num_key_value_heads", "head_dim") if c.get(key)])  # which may be left out, or null
        heads = c["num_attention_heads"]
        theta, scaling = rope_settings(c, cls.ropes)
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
            rope_theta=theta,
            rope_scaling=scaling,
            **cls.details(c),
        )

    @classmethod
    def details(cls, c: dict[str, Any]) -> dict[str, Any]:
        """The fields that families of these blocks read in their own way."""
        activation(c, "silu")
        bias = bool(c.get("attention_bias", False))
        return {
            "attention_bias": bias,
            "output_bias": bias,
            "mlp_bias": bool(c.get("mlp_bias", False)),
            "tied": bool(c.get("tie_word_embeddings", False)),
        }

    def to_json(self) -> dict[str, Any]:
        """config.json that transformers 4 and 5 both read."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
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

    def build(self) -> "Llama":
        """The model, its parameters not filled."""
        return Llama(self)

    def window(self, layer: int) -> int | None:
        """How many keys, itself counted, a query of this layer sees; None: all before it."""
        return self.windows[layer] if self.windows else None

    def rope_of(self, layer: int) -> int:
        """Which of `rotations` the layer turns by."""
        return 0

    def inv_freq(self) -> Tensor:
        """Radians a position for each of the head_dim / 2 pairs, float32, with the scaling of Llama 3.1 applied.

        llama3 scaling: waves longer than original_max / low_freq_factor are slowed by `factor`, those shorter than
        original_max / high_freq_factor are kept, between them the two are blended linearly in 1 / wavelength.
        Source: transformers' modeling_rope_utils.py, _compute_llama3_parameters.
        """
        return inverse_frequencies(self.head_dim, self.rope_theta, self.rope_scaling)

    def rotations(self, positions: Tensor, dtype: torch.dtype) -> list[Rotation]:
        """cos and sin for `positions` (B or 1, T), computed in float32; one pair for each kind of layer."""
        return [rotation(positions, self.inv_freq(), dtype)]


def inverse_frequencies(dim: int, theta: float, s: dict[str, Any] | None) -> Tensor:
    """Radians a position of the dim / 2 rotary pairs, float32. See `LlamaConfig.inv_freq`."""
    inv = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if s is None:
        return inv
    if s["rope_type"] == "linear":
        return inv / s["factor"]
    original, low, high = s["original_max_position_embeddings"], s["low_freq_factor"], s["high_freq_factor"]
    wave = 2 * math.pi / inv
    blend = (original / wave - low) / (high - low)
    mixed = (1 - blend) * inv / s["factor"] + blend * inv
    return torch.where(wave > original / low, inv / s["factor"], torch.where(wave < original / high, inv, mixed))


@functools.lru_cache(maxsize=32)
def moved(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Float32 values on a device, copied there once: a copy from the host would stop it at every step."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def rotation(positions: Tensor, inv_freq: Tensor, dtype: torch.dtype, factor: float = 1.0) -> Rotation:
    """cos and sin, times `factor`, (B or 1, T, 1, D / 2) each, of positions (B or 1, T) times inv_freq.

    inv_freq is (D / 2,), or (B or 1, 1, D / 2) where rows differ.
    """
    if inv_freq.dim() == 1 and inv_freq.device != positions.device:
        inv_freq = moved(tuple(inv_freq.tolist()), positions.device)
    angle = positions[:, :, None].float() * inv_freq
    cos, sin = angle.cos(), angle.sin()
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    return cos.to(dtype)[:, :, None], sin.to(dtype)[:, :, None]


def rope_settings(c: dict[str, Any], known: tuple[str, ...]) -> tuple[float, dict[str, Any] | None]:
    """The base of the rotary waves and their scaling, None for none, from either dialect of config.json."""
    ropes = dict(c.get("rope_parameters") or {})
    theta = ropes.pop("rope_theta", None) or c.get("rope_theta") or 10000.0
    scaling = ropes or dict(c.get("rope_scaling") or {})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in known:
        raise ValueError(f"config.json asks for rope type {kind!r}; {c.get('model_type')} has {', '.join(known)}")
    return float(theta), None if kind == "default" else scaling | {"rope_type": kind}


def activation(c: dict[str, Any], name: str) -> None:
    """Raises ValueError where config.json asks for another activation than the family's."""
    got = c.get("hidden_activation") or c.get("hidden_act") or name
    if got != name:
        raise ValueError(f"config.json asks for hidden_act={got!r}; the gate of {c.get('model_type')} is {name!r}")


class RMSNorm(nn.Module):
    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; the norms on q and k are Qwen3's."""

    q_norm: nn.Module | None
    k_norm: nn.Module | None

    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_heads, c.num_kv_heads, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_heads * c.head_dim, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=c.attention_bias)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=c.output_bias)
        self.q_norm = RMSNorm(c.head_dim, c.eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.eps) if c.qk_norm else None

    def forward(self, x: Tensor, turn: Rotation, mask: Mask, cache: Cache | None, layer: int) -> Tensor:
        B, T, _ = x.shape
        q, k, v = together(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (t.view(B, T, -1, self.head_dim) for t in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rope2(q, k, *turn)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        y = attention(q, k, v, mask)
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
    def __init__(self, c: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, turn: Rotation, mask: Mask, cache: Cache | None, layer: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turn, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Layers(nn.Module):
    """What checkpoints call `model`: the embedding, the blocks and the last norm."""

    def __init__(self, c: LlamaConfig, block: type[nn.Module], norm: type[nn.Module]) -> None:
        super().__init__()
        self.embed_tokens = new_embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(block(c, i) for i in range(c.num_layers))
        self.norm = norm(c.hidden_size, c.eps)


class Llama(CausalLM):
    """A decoder-only language model of Llama's blocks. Call it with token ids (B, T) for logits (B, T, V)."""

    block: ClassVar[type[nn.Module]] = Block
    last_norm: ClassVar[type[nn.Module]] = RMSNorm

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Layers(config, self.block, self.last_norm)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()
        self.keeping = Keeping(config, self)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self.keeping.forget()  # weights that stay decoded lie where the model was, in its dtype then
        return super()._apply(*args, **kwargs)

    def embedding(self) -> nn.Module:
        return self.model.embed_tokens

    def norm(self) -> nn.Module:
        return self.model.norm

    def embed(self, ids: Tensor) -> Tensor:
        """The states (B, T, d) that enter the first block."""
        return self.model.embed_tokens(ids)

    def hidden(
        self,
        ids: Tensor,
        padding: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        c = self.config
        used, positions = self.where(ids, positions, cache, documents)
        x = self.embed(ids)
        turns = c.rotations(positions, x.dtype)
        windows = {c.window(i) for i in range(c.num_layers)}
        masks = {w: seen(ids.shape[1], used, padding, documents, ids.device, w) for w in windows}
        fast = x.device.type in FUSED or ("cuda" in FUSED and on_gpu(x))
        one_step = cache is None and torch.is_grad_enabled()
        specs = fused.specs_of(self, x, turns, masks, self.keeping) if one_step and fast else None
        by_lean = (
            one_step
            and self.block is Block
            and not fast
            and x.device.type in LEAN
            and not on_gpu(x)
            and padding is None
        )
        if not torch.is_grad_enabled():
            beside.forget()
        leans = lean.specs_of(self, x, documents, self.keeping) if by_lean else None
        tables = [lean.tables_of(cos, sin) for cos, sin in turns] if leans is not None else []
        for i, b in enumerate(self.model.layers):
            if specs is not None:
                cos, sin = turns[c.rope_of(i)]
                x = fused.block(x, cos, sin, specs[i], i)
            elif leans is not None:
                x = lean.block(x, tables[c.rope_of(i)], leans[i])
            else:
                x = b(x, turns[c.rope_of(i)], masks[c.window(i)], cache, i)
        if cache is not None:
            cache.used += ids.shape[1]
        return self.model.norm(x)
