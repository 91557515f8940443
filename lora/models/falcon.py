"""Falcon in its four layouts: 7B, 40B and 180B ("new decoder"), 11B, and the RW models with alibi.

    parallel    x = x + attention(n) + mlp(n'),  n, n' = norms of x (one shared, or ln_attn and ln_mlp)
    sequential  x = x + attention(input_layernorm(x));  x = x + mlp(post_attention_layernorm(x))

One matrix makes q, k and v.  Its rows, in heads:
    multi-query (7B)         all of q, then one k, one v
    new decoder (40B, 11B)   for each key head: the queries that read it, then k, then v
    otherwise (RW)           for each head: q, k, v
Positions are rotary, or alibi: each score gets slope * position of the key, the slope rounded to bfloat16 as in
training, before the scores are scaled.

Source: arXiv:2311.16867; alibi: arXiv:2108.12409; numbers equal transformers' FalconForCausalLM.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora.kernels.rope import rope2
from lora.models.base import Cache, CausalLM, Mask, attention, counts, ints, new_embedding, seen
from lora.models.documents import Documents
from lora.models.llama import Rotation, inverse_frequencies, rope_settings, rotation

_OLD = {
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_head_kv": "num_kv_heads",
    "n_embed": "hidden_size",
}


@dataclass(frozen=True, kw_only=True)
class FalconConfig:
    """Shapes and constants. `norms` is 1 or 2 norms a parallel block; `new` the new decoder's order of rows."""

    model_type: ClassVar[str] = "falcon"
    architecture: ClassVar[str] = "FalconForCausalLM"

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    max_length: int
    new: bool = False
    multi_query: bool = True
    parallel: bool = True
    norms: int = 1
    bias: bool = False
    alibi: bool = False
    eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    tied: bool = True

    @classmethod
    def from_json(cls, c: dict[str, Any]) -> "FalconConfig":
        """From config.json, by today's names or those of RefinedWeb and RefinedWebModel (n_head, n_layer, ...).

        Raises ValueError naming a key that is missing or wrong, or a setting that is not implemented.
        """
        c = c | {now: c[old] for old, now in _OLD.items() if old in c and now not in c}
        counts(c, ("vocab_size", "hidden_size", "num_hidden_layers"))
        ints(c, ("num_attention_heads",))
        heads, d = c["num_attention_heads"], c["hidden_size"]
        new = bool(c.get("new_decoder_architecture", c.get("model_type") == "RefinedWeb"))
        multi_query = bool(c.get("multi_query", True))
        kv = (c.get("num_kv_heads") or heads) if new else 1 if multi_query else heads
        if heads < 1 or d % heads or (d // heads) % 2 or heads % kv:
            raise ValueError(
                f"config.json says hidden_size={d}, {heads} heads and {kv} key heads; heads must divide the width into "
                "even parts, and key heads the heads"
            )
        if c.get("activation", "gelu") != "gelu":
            raise ValueError(f"config.json asks for activation={c['activation']!r}; falcon's is 'gelu'")
        norms = c.get("num_ln_in_parallel_attn") or (2 if new else 1)
        if norms not in (1, 2):
            raise ValueError(f"config.json says num_ln_in_parallel_attn={norms!r}; there are blocks with 1 and with 2")
        theta, scaling = rope_settings(c, ("default", "linear"))
        return cls(
            vocab_size=c["vocab_size"],
            hidden_size=d,
            intermediate_size=c.get("ffn_hidden_size") or 4 * d,
            num_layers=c["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=kv,
            max_length=c.get("max_position_embeddings", 2048),
            new=new,
            multi_query=multi_query,
            parallel=new or bool(c.get("parallel_attn", True)),
            norms=norms if new else 1,
            bias=bool(c.get("bias", False)),
            alibi=bool(c.get("alibi", False)),
            eps=c.get("layer_norm_epsilon", 1e-5),
            rope_theta=theta,
            rope_scaling=scaling,
            tied=bool(c.get("tie_word_embeddings", True)),
        )

    def to_json(self) -> dict[str, Any]:
        """config.json that transformers 4 and 5 both read."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "max_position_embeddings": self.max_length,
            "new_decoder_architecture": self.new,
            "multi_query": self.multi_query,
            "parallel_attn": self.parallel,
            "num_ln_in_parallel_attn": self.norms if self.new else None,
            "bias": self.bias,
            "alibi": self.alibi,
            "activation": "gelu",
            "layer_norm_epsilon": self.eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling,
            "tie_word_embeddings": self.tied,
            "bos_token_id": None,  # else the class's 11, whatever the vocabulary
            "eos_token_id": None,
        }

    def build(self) -> "Falcon":
        """The model, its parameters not filled."""
        return Falcon(self)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


def slopes(heads: int) -> Tensor:
    """Alibi's slope of each head (H,), bfloat16: 2^(-8 i / n), and between them for heads beyond a power of two."""
    n = 2 ** math.floor(math.log2(heads))
    base = 2.0 ** (-8.0 / n)
    powers = [base**i for i in range(1, n + 1)]
    between = 2.0 ** (-4.0 / n)
    powers += [between**i for i in range(1, 2 * (heads - n), 2)]
    return torch.tensor(powers, dtype=torch.float32).bfloat16()


class Attention(nn.Module):
    def __init__(self, c: FalconConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_heads, c.num_kv_heads, c.head_dim
        rows = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        self.query_key_value = nn.Linear(c.hidden_size, rows, bias=c.bias)
        self.dense = nn.Linear(c.hidden_size, c.hidden_size, bias=c.bias)

    def forward(self, x: Tensor, turn: Rotation | None, mask: Mask, cache: Cache | None, layer: int) -> Tensor:
        B, T, d = x.shape
        # all three orders are: for each key head, its queries, k, v
        fused = self.query_key_value(x).view(B, T, self.kv_heads, self.heads // self.kv_heads + 2, self.head_dim)
        q = fused[..., :-2, :].reshape(B, T, self.heads, self.head_dim)
        k, v = fused[..., -2, :], fused[..., -1, :]
        if turn is not None:
            q, k = rope2(q, k.contiguous(), *turn)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        return self.dense(attention(q, k, v, mask).transpose(1, 2).reshape(B, T, d))


class MLP(nn.Module):
    def __init__(self, c: FalconConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.bias)
        self.dense_4h_to_h = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(nn.functional.gelu(self.dense_h_to_4h(x)))


class Block(nn.Module):
    input_layernorm: nn.Module  # which of these four there are depends on the layout
    post_attention_layernorm: nn.Module
    ln_attn: nn.Module
    ln_mlp: nn.Module

    def __init__(self, c: FalconConfig) -> None:
        super().__init__()
        self.parallel, self.norms = c.parallel, c.norms
        names = ["ln_attn", "ln_mlp"] if c.norms == 2 else ["input_layernorm"]
        names += [] if c.parallel else ["post_attention_layernorm"]
        for name in names:
            self.add_module(name, nn.LayerNorm(c.hidden_size, c.eps))
        self.self_attention = Attention(c)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, turn: Rotation | None, mask: Mask, cache: Cache | None, layer: int) -> Tensor:
        n = self.ln_attn(x) if self.norms == 2 else self.input_layernorm(x)
        y = self.self_attention(n, turn, mask, cache, layer)
        if not self.parallel:
            x = x + y
            return x + self.mlp(self.post_attention_layernorm(x))
        return x + y + self.mlp(self.ln_mlp(x) if self.norms == 2 else n)


class Layers(nn.Module):
    """What checkpoints call `transformer`: the embedding, the blocks and the last norm."""

    def __init__(self, c: FalconConfig) -> None:
        super().__init__()
        self.word_embeddings = new_embedding(c.vocab_size, c.hidden_size)
        self.h = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.ln_f = nn.LayerNorm(c.hidden_size, c.eps)


class Falcon(CausalLM):
    """A Falcon language model. Call it with token ids (B, T) for logits (B, T, V)."""

    config: FalconConfig

    def __init__(self, config: FalconConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Layers(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def embedding(self) -> nn.Module:
        return self.transformer.word_embeddings

    def norm(self) -> nn.Module:
        return self.transformer.ln_f

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
        x = self.transformer.word_embeddings(ids)
        T = ids.shape[1]
        mask, turn = seen(T, used, padding, documents, ids.device), None
        if c.alibi:
            mask = self.alibi(T, used, padding, mask, x)
        else:
            turn = rotation(positions, inverse_frequencies(c.head_dim, c.rope_theta, c.rope_scaling), x.dtype)
        for i, block in enumerate(self.transformer.h):
            x = block(x, turn, mask, cache, i)
        if cache is not None:
            cache.used += T
        return self.transformer.ln_f(x)

    def alibi(self, T: int, used: int, padding: Tensor | None, mask: Mask, x: Tensor) -> Tensor:
        """What is added to the scaled scores, (B or 1, H, T, S) in the dtype of x: -inf where a key is hidden."""
        key = torch.arange(used + T, device=x.device)
        position = key[None] if padding is None else (padding.cumsum(dim=1) - 1) * padding  # (B or 1, S)
        if isinstance(mask, Documents):
            position, of = mask.positions(x.device), mask.numbers(x.device)  # (B, T)
            mask = (of[:, None, :, None] == of[:, None, None]) & (key <= key[:, None])  # (B, 1, T, T)
        bias = slopes(self.config.num_heads).to(x.device)[None, :, None] * position[:, None]  # bfloat16, as trained
        bias = bias.to(x.dtype)[:, :, None] * self.config.head_dim**-0.5
        if mask is None:
            mask = key <= key[used:, None]
        return bias.expand(-1, -1, T, -1).masked_fill(~mask, -torch.inf)
