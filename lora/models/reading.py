"""Llama's blocks for reading and writing text only: no gradient, few launches, adapters in buffers of their own.

    each block     h, x = norm(x + more)      q, k, v = W h + b (a h)       more = o_proj(attend(q, k, v))
                   h, x = norm(x + more)      g, u = W h + b (a h)          more = down_proj(silu(g) u)

The linear layers of one input are a `Group`.  Where all are 4-bit, the factors of their active adapters are copied
into buffers: joined over adapters and layers, padded to a rank of 16, 32, 64 or 128, in the dtype of the states, their
scales multiplied in.  A recording of the blocks reads the buffers, so that adapters are trained further, switched or
combined without another recording, as long as each layer's padded rank stays.  Other layers are called as they are.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora.adapter import Adapter, ByRow
from lora.kernels.code4 import Weight4
from lora.kernels.feed import MOST_ROWS, feed_gate, feed_low, feed_norm
from lora.kernels.gemv4 import can_gemv4, gemv4_group
from lora.kernels.linear4 import linears4
from lora.layer import Adapted, LoRALinear, adapted, is_hooked, together
from lora.models.base import CausalLM
from lora.models.llama import MLP, Attention, Block, Layers, Llama, RMSNorm
from lora.models.watch import every
from lora.quant.linear import Linear4bit

BUFFERED = {"cuda"}  # devices on which factors are copied into buffers; on a CPU nothing is recorded
AT_ONCE = 64  # adapters of layers copied at once: their products with the scales take memory until then
MOST_RANK = 128  # of a layer's adapters together, up to which they ride in the product of its base

Key = tuple[object, object]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q, k, v (M, H D) -> (M, H D)


def plain(model: CausalLM) -> bool:
    """Whether what is read here is the model's own: Llama's blocks as they are.

    Attention, MLP or all blocks may have been replaced by a trained copy, which this would look past.  Adapters by row
    count the rows of a batch, which are laid end to end here.
    """
    if type(model) is not Llama or type(model.model) is not Layers:
        return False
    if any(isinstance(m, Adapted) and m.by_row is not None for m in every(model)):
        return False
    return all((type(b), type(b.self_attn), type(b.mlp)) == (Block, Attention, MLP) for b in model.model.layers)  # type: ignore[union-attr]


class Part(NamedTuple):
    """A 4-bit linear layer and its active adapters."""

    base: Linear4bit
    adapters: tuple[Adapter, ...]
    ranks: tuple[int, ...]  # of each

    def rank(self) -> int:
        """The padded rank of its updates together; 0 for none."""
        r = sum(self.ranks)
        return max(16, 1 << (r - 1).bit_length()) if r else 0


def part_of(layer: nn.Module) -> Part | None:
    """The layer taken apart, or None for one that must be called.

    Such are those that are not 4-bit or hooked, and adapters by row, of a large rank, with DoRA's lengths or a bias.
    """
    wrapped = layer if isinstance(layer, LoRALinear) and (layer.merged is None or layer.off) else None
    base: Any = wrapped._modules["base"] if wrapped else layer
    if type(base) is not Linear4bit or base.weight.device.type not in BUFFERED or is_hooked(layer) or is_hooked(base):
        return None
    on = wrapped.on() if wrapped else []
    if any(isinstance(a, ByRow) or a.magnitude is not None or a.bias is not None for a in on):
        return None
    ranks = tuple(a.rank for a in on)
    return None if sum(ranks) > MOST_RANK else Part(base, tuple(on), ranks)


def places(module: nn.Module) -> tuple[object, ...]:
    """What a recording of the module depends on: where its values lie, and which adapters take part."""
    if not module._modules:
        return own_places(module)
    layers = tuple((x.active, x.off, x.merged is not None, x.by_row) for _, x in adapted(module))
    return (*layers, *(p for m in module.modules() for p in own_places(m)))


def own_places(module: nn.Module) -> tuple[int, ...]:
    """Where the parameters and buffers of the module itself lie."""
    own = (*module._parameters.values(), *module._buffers.values())
    return tuple(t.data_ptr() for t in own if t is not None)


class Group:
    """Linear layers of one input."""

    def __init__(self, *layers: nn.Module) -> None:
        self.layers = layers
        parts = [part_of(layer) for layer in layers]
        self.parts: list[Part] | None = None if None in parts else parts  # type: ignore[assignment]

    def weights(self) -> tuple[object, ...]:
        """Where the 4-bit weights lie that a recording holds on to."""
        return tuple(own_places(part.base) for part in self.parts or ())

    def forms(self) -> tuple[object, ...]:
        """What else a recording depends on: ranks, or all of a layer that is called."""
        if self.parts is None:
            return tuple(places(layer) for layer in self.layers)
        return tuple(part.rank() for part in self.parts)


class Factors:
    """A group as it is recorded: its weights, and the buffers of its factors."""

    weights: list[Weight4]  # none where the layers are called
    a: Tensor | None  # (Σ R, K)
    bs: list[Tensor | None]  # (N, R) each

    def __init__(self, group: Group, dtype: torch.dtype, device: torch.device) -> None:
        self.layers = group.layers
        self.weights, self.a, self.bs = [], None, []
        if group.parts is None:
            return
        self.weights = [p.base.weight4() for p in group.parts]
        self.one_kind = len({(len(w.scales), w.block) for w in self.weights}) == 1
        self.biases = [p.base.bias_as(dtype) for p in group.parts]
        ranks = [p.rank() for p in group.parts]
        K = self.weights[0].shape[1]
        self.a = torch.zeros(sum(ranks), K, dtype=dtype, device=device) if any(ranks) else None
        self.bs = [
            torch.zeros(w.shape[0], r, dtype=dtype, device=device) if r else None
            for w, r in zip(self.weights, ranks, strict=True)
        ]

    def slots(self, group: Group) -> list[Tensor]:
        """Where the factors a and b of each of the group's adapters go, in turn; all else is zeroed."""
        made: list[Tensor] = []
        row = 0
        for part, b in zip(group.parts or (), self.bs, strict=True):
            if b is None or self.a is None:
                continue
            r = 0
            for rank in part.ranks:
                end = r + rank
                made += [self.a[row + r : row + end], b[:, r:end]]
                r = end
            self.a[row + r : row + b.shape[1]] = 0.0
            b[:, r:] = 0.0
            row += b.shape[1]
        return made

    def run(self, x: Tensor, xa: Tensor | None = None, early: bool = False) -> Sequence[Tensor]:
        """The layers on x (M, K); xa (M, Σ R) float32 where the caller has x aᵀ already."""
        if not self.weights:
            return together(x, *self.layers)
        if self.one_kind and all(can_gemv4(x, w.q, w.block, w.shape[1]) for w in self.weights):
            if xa is None and self.a is not None:
                xa = feed_low(x, self.a, early)
            return gemv4_group(x, self.weights, self.biases, self.bs, xa, early)
        return linears4(x, self.weights, self.biases, self._lows())

    def _lows(self) -> list[tuple[Tensor, Tensor, float] | None]:
        lows: list[tuple[Tensor, Tensor, float] | None] = []
        row = 0
        for b in self.bs:
            lows.append(None if b is None or self.a is None else (self.a[row : row + b.shape[1]], b, 1.0))
            row += 0 if b is None else b.shape[1]
        return lows


class Reading:
    """The blocks of a model of Llama's class, for as long as its weights lie where they do and ranks stay."""

    def __init__(self, model: Any, groups: Sequence[Group]) -> None:
        self.device, self.dtype = model.place()
        self.model = model
        self.blocks = list(model.model.layers)
        self.factors = [Factors(group, self.dtype, self.device) for group in groups]
        self.fill(groups)

    def fill(self, groups: Sequence[Group]) -> None:
        """Copies the factors of the adapters that are active now: 0.3 ms for 42 M values on an H100.

        Nothing is skipped: a recorded training step changes factors without a trace that could be looked for.
        """
        slots = [t for f, group in zip(self.factors, groups, strict=True) for t in f.slots(group)]
        lows = [a.low() for group in groups for part in group.parts or () for a in part.adapters]
        for i in range(0, len(lows), AT_ONCE):
            a, b, scales = zip(*lows[i : i + AT_ONCE], strict=True)
            to = slots[2 * i : 2 * (i + AT_ONCE)]
            torch._foreach_copy_(to[::2], torch._foreach_mul(a, scales))  # a product in float32, rounded once
            torch._foreach_copy_(to[1::2], b)

    def forward(self, x: Tensor, attend: Attend, early: bool = False) -> Tensor:
        """The states (M, d) that the head reads, of embedded tokens x (M, d).

        `early`: launches may begin before the one before them ends; what attend launches must wait for it too.
        """
        more: Tensor | None = None  # what the half block before adds to x, added inside the next norm
        few = x.is_cuda and len(x) <= MOST_ROWS and x.dtype != torch.float32  # else products take x aᵀ themselves
        for i, block in enumerate(self.blocks):
            qkv, o, gu, down = self.factors[4 * i : 4 * i + 4]
            a = block.self_attn
            h, x, xa = _norm(block.input_layernorm, x, more, qkv.a if few else None, early)
            q, k, v = qkv.run(h, xa, early)
            q, k = _heads(a, q, k)
            (more,) = o.run(attend(i, q, k, v), None, early)
            h, x, xa = _norm(block.post_attention_layernorm, x, more, gu.a if few else None, early)
            g, u = gu.run(h, xa, early)
            h, xa = feed_gate(g, u, down.a if few else None, early)
            (more,) = down.run(h, xa, early)
        return _norm(self.model.model.norm, x, more, None, early)[0]


def groups_of(model: Any) -> list[Group]:
    """The groups of every block in turn: q k v, o, gate up, down."""
    made = []
    for block in model.model.layers:
        a, mlp = block.self_attn, block.mlp
        made += [
            Group(a.q_proj, a.k_proj, a.v_proj),
            Group(a.o_proj),
            Group(mlp.gate_proj, mlp.up_proj),
            Group(mlp.down_proj),
        ]
    return made


def key_of(model: Any, groups: Sequence[Group]) -> Key:
    """What a recording of the model depends on besides its shapes: where its 4-bit weights lie, and all else."""
    others = [model.model.embed_tokens, model.model.norm, model.lm_head]
    for block in model.model.layers:
        others += [block.input_layernorm, block.post_attention_layernorm]
        others += [n for n in (block.self_attn.q_norm, block.self_attn.k_norm) if n is not None]
    forms = (*(group.forms() for group in groups), *(places(module) for module in others))
    return tuple(group.weights() for group in groups), forms


def _heads(attention: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q and k (M, H D) by the norms of heads, where there are any."""
    if attention.q_norm is None:
        return q, k
    D = attention.head_dim
    return tuple(n(t.reshape(len(t), -1, D)).flatten(1) for n, t in ((attention.q_norm, q), (attention.k_norm, k)))  # type: ignore[return-value]


def _norm(
    norm: nn.Module, x: Tensor, more: Tensor | None, a: Tensor | None, early: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """norm(x + more), x + more and the norm's product with a; in one launch where the norm is the model's own."""
    if type(norm) is RMSNorm:
        return feed_norm(x, more, norm.weight, norm.eps, a, early)
    x = x if more is None else x + more
    return norm(x), x, None
