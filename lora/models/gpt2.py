"""GPT-2: learned positions, LayerNorm with biases before each part, one matrix for q, k and v, a tied head.

    x = wte(ids) + wpe(positions)
    each layer   x = x + c_proj(attention(q, k, v)),  q, k, v = c_attn(n),  n = ln_1(x)
                 x = x + c_proj(gelu(c_fc(n))),                             n = ln_2(x)
    logits = lm_head(ln_f(x))

Checkpoints hold the four matrices of a layer as (in, out); here they are nn.Linear, and `read` and `write` turn them.
Weights stored in 4 or 8 bits are (out, in) in the file already.

The model's own dropout (resid_pdrop, embd_pdrop, attn_pdrop) is never applied, not even in training: this is for
fine-tuning with adapters, which have a dropout of their own.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; numbers equal transformers'
GPT2LMHeadModel.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from lora.models.base import Cache, CausalLM, Mask, attention, counts, is_count, new_embedding, seen
from lora.models.documents import Documents

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": partial(nn.functional.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(nn.functional.gelu, approximate="tanh"),
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
}
# Names of today beside GPT-2's own
_ALSO = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
}
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
_TURNED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_MASK = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")  # causal masks that old files hold


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """Shapes and constants. `dropouts` and `upcast` are carried from file to file and change nothing here."""

    model_type: ClassVar[str] = "gpt2"
    architecture: ClassVar[str] = "GPT2LMHeadModel"

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_length: int
    eps: float = 1e-5
    activation: str = "gelu_new"
    scale_weights: bool = True  # scores times head_dim ** -0.5
    scale_by_layer: bool = False  # scores of layer i, from 0, divided by i + 1
    tied: bool = True
    dropouts: tuple[float, float, float] = (0.1, 0.1, 0.1)  # of the branches, the embedding, attention
    upcast: bool = False  # scores in float32; attention here sums in float32 anyway

    @classmethod
    def from_json(cls, c: dict[str, Any]) -> "GPT2Config":
        """From config.json, with GPT-2's names (n_embd, ...) or today's (hidden_size, ...).

        Raises ValueError naming a key that is missing or wrong, or a setting that is not implemented.
        """
        for own, other in _ALSO.items():
            if c.get(own) is None and c.get(other) is not None:
                c = c | {own: c[other]}
            elif c.get(other) is not None and c[other] != c[own]:
                raise ValueError(f"config.json says {own}={c[own]!r} and {other}={c[other]!r}, which are one number")
        counts(c, ("vocab_size", *_ALSO))
        d, heads, inner = c["n_embd"], c["n_head"], c.get("n_inner")
        inner = 4 * d if inner is None else inner
        if not is_count(inner):
            raise ValueError(f"config.json says n_inner={inner!r}, which must be a whole number above 0")
        if d % heads:
            raise ValueError(f"config.json says n_embd={d}, which n_head={heads} does not divide")
        eps = c.get("layer_norm_epsilon", 1e-5)
        if not isinstance(eps, int | float) or not 0 <= eps < math.inf:
            raise ValueError(f"config.json says layer_norm_epsilon={eps!r}, which must be a number from 0 on")
        activation = c.get("activation_function", "gelu_new")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"config.json asks for activation_function={activation!r}; gpt2 has {', '.join(ACTIVATIONS)}"
            )
        if c.get("add_cross_attention"):
            raise ValueError("config.json asks for add_cross_attention; gpt2 is read as a decoder on its own only")
        resid, embd, attn = (c.get(key, 0.1) for key in _DROPOUTS)
        return cls(
            vocab_size=c["vocab_size"],
            hidden_size=d,
            intermediate_size=inner,
            num_layers=c["n_layer"],
            num_heads=heads,
            max_length=c["n_positions"],
            eps=eps,
            activation=activation,
            scale_weights=bool(c.get("scale_attn_weights", True)),
            scale_by_layer=bool(c.get("scale_attn_by_inverse_layer_idx", False)),
            tied=bool(c.get("tie_word_embeddings", True)),
            dropouts=(resid, embd, attn),
            upcast=bool(c.get("reorder_and_upcast_attn", False)),
        )

    def to_json(self) -> dict[str, Any]:
        """config.json that transformers 4 and 5 both read."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "n_embd": self.hidden_size,
            "n_inner": self.intermediate_size,
            "n_layer": self.num_layers,
            "n_head": self.num_heads,
            "n_positions": self.max_length,
            "layer_norm_epsilon": self.eps,
            "activation_function": self.activation,
            "scale_attn_weights": self.scale_weights,
            "scale_attn_by_inverse_layer_idx": self.scale_by_layer,
            "reorder_and_upcast_attn": self.upcast,
            "tie_word_embeddings": self.tied,
            "bos_token_id": None,  # else the class's 50256, whatever the vocabulary
            "eos_token_id": None,
        } | dict(zip(_DROPOUTS, self.dropouts, strict=True))

    def build(self) -> "GPT2":
        """The model, its parameters not filled."""
        return GPT2(self)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    def scale(self, layer: int) -> float:
        """What the scores of a layer are multiplied by."""
        scale = self.head_dim**-0.5 if self.scale_weights else 1.0
        return scale / (layer + 1) if self.scale_by_layer else scale


class Attention(nn.Module):
    def __init__(self, c: GPT2Config, layer: int) -> None:
        super().__init__()
        self.head_dim, self.scale = c.head_dim, c.scale(layer)
        self.c_attn = nn.Linear(c.hidden_size, 3 * c.hidden_size)
        self.c_proj = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x: Tensor, mask: Mask, cache: Cache | None, layer: int) -> Tensor:
        B, T, d = x.shape
        q, k, v = (t.view(B, T, -1, self.head_dim).transpose(1, 2) for t in self.c_attn(x).split(d, dim=-1))
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        y = attention(q, k, v, mask, scale=self.scale)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, d))


class MLP(nn.Module):
    def __init__(self, c: GPT2Config) -> None:
        super().__init__()
        self.c_fc = nn.Linear(c.hidden_size, c.intermediate_size)
        self.c_proj = nn.Linear(c.intermediate_size, c.hidden_size)
        self.act = ACTIVATIONS[c.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.act(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, c: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(c.hidden_size, c.eps)
        self.attn = Attention(c, layer)
        self.ln_2 = nn.LayerNorm(c.hidden_size, c.eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, mask: Mask, cache: Cache | None, layer: int) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache, layer)
        return x + self.mlp(self.ln_2(x))


class Layers(nn.Module):
    """What checkpoints call `transformer`: the two embeddings, the blocks and the last norm."""

    def __init__(self, c: GPT2Config) -> None:
        super().__init__()
        self.wte = new_embedding(c.vocab_size, c.hidden_size)
        self.wpe = new_embedding(c.max_length, c.hidden_size)
        self.h = nn.ModuleList(Block(c, i) for i in range(c.num_layers))
        self.ln_f = nn.LayerNorm(c.hidden_size, c.eps)


class GPT2(CausalLM):
    """A GPT-2 language model, its own dropout left out. Call it with token ids (B, T) for logits (B, T, V)."""

    config: GPT2Config

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = Layers(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def read(self, name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        if _MASK.fullmatch(name):
            return None
        if name.startswith(("wte.", "wpe.", "h.", "ln_f.")):  # written by the model without its head
            name = "transformer." + name
        return name, turned(name, tensor)

    def write(self, name: str, tensor: Tensor) -> tuple[str, Tensor]:
        return name, turned(name, tensor)

    def embedding(self) -> nn.Module:
        return self.transformer.wte

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
        used, positions = self.where(ids, positions, cache, documents)
        x = self.transformer.wte(ids) + self.transformer.wpe(positions)
        mask = seen(ids.shape[1], used, padding, documents, ids.device)
        for i, block in enumerate(self.transformer.h):
            x = block(x, mask, cache, i)
        if cache is not None:
            cache.used += ids.shape[1]
        return self.transformer.ln_f(x)


def turned(name: str, tensor: Tensor) -> Tensor:
    """A layer's matrix in the other of its two layouts, (in, out) and (out, in); any other tensor as it is."""
    return tensor.T.contiguous() if tensor.dim() == 2 and name.endswith(_TURNED) else tensor
