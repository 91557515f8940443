"""What the fused block (fused.py) needs of a model's blocks, or the reason why they take the plain path.

Llama, Mistral, Qwen2 and 3, Gemma 3 and Phi-3 differ in few places, which are found by the names of their modules:
one product or three for q, k and v; norms over the heads of q and k; norms behind o and down too; weights stored
around 0, 1 + w; the gate's function; a window; the scale of the scores.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora.kernels import fold8, fp8
from lora.kernels.dropout import Drop, Seed
from lora.kernels.fold import Group
from lora.kernels.fold8 import Eight
from lora.kernels.fp8 import TINY
from lora.kernels.linear4 import Weight4
from lora.kernels.weight8 import weight_scale
from lora.layer import LoRALinear, is_hooked
from lora.models.base import Mask, attention
from lora.models.budget import Keeping
from lora.models.documents import Documents
from lora.models.host import Host
from lora.quant.linear import Linear4bit

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v (B, H, T, D) -> (B, H, T, D)


class Norms(NamedTuple):
    """Weights of a block's norms, None where it has no such norm."""

    before: tuple[Tensor, Tensor]  # of attention and of the MLP
    behind: tuple[Tensor | None, Tensor | None]  # o and down
    heads: tuple[Tensor, Tensor] | None  # of q and k
    eps: float


class Spec(NamedTuple):
    """What a block's step needs beside its input and its factors."""

    norms: Norms
    groups: tuple[Group, Group, Group, Group]  # q k v, o, gate up, down
    eights: tuple[Eight, Eight, Eight, Eight] | None  # with products in 8 bits
    heads: tuple[int, int, int]  # of queries, of keys, and values of each
    attend: Attend
    gelu: bool
    keep: str
    host: Host


class Plain(Exception):
    """Why blocks take the plain path."""


def group_of(*layers: nn.Module, seed: Seed | None = None) -> Group:
    """The layers as a group of `fold`, with the dropout of their updates if a `seed` is given.

    Raises Plain where one needs the plain path.
    """
    weights: list[Weight4 | Tensor] = []
    biases: list[Tensor | None] = []
    lows: list[Any] = []
    parts = 1
    drops: list[Drop | None] = []
    for layer in layers:
        wrapped = layer if isinstance(layer, LoRALinear) and (layer.merged is None or layer.off) else None
        base: Any = wrapped.base if wrapped else layer
        low, p, here = _low(wrapped) if wrapped else (None, 0.0, parts)
        parts = parts if low is None else here
        if p and seed is None:
            raise Plain("adapter dropout")
        lows.append(low)
        drops.append(seed.drop(p) if p and seed is not None else None)
        if is_hooked(layer) or is_hooked(base):
            raise Plain("a linear layer has a hook")
        if type(base) is Linear4bit:
            weights.append(base.weight4())
        elif type(base) is nn.Linear and not base.weight.requires_grad:
            weights.append(base.weight)
        else:
            raise Plain(f"a linear layer is a {type(base).__name__}, or trains")
        if base.bias is not None and base.bias.requires_grad:
            raise Plain("a bias trains")
        biases.append(base.bias)
    if parts > 1 and any(drops):
        raise Plain("adapters side by side with dropout")
    return Group(tuple(weights), tuple(biases), tuple(lows), parts, tuple(drops) if any(drops) else ())


def _low(layer: LoRALinear) -> tuple[Any, float, int]:
    """The update of a layer, its dropout, and how many adapters side by side it is of."""
    on = layer.on()
    if not on:
        return None, 0.0, 1
    if len(on) > 1:
        raise Plain("several adapters are active")
    if not on[0].is_plain():
        raise Plain("an adapter is more than two factors (DoRA, PiSSA, a bias)")
    low = on[0].low()
    if low is None:
        raise Plain("adapters side by side are not in one stack")
    return low, on[0].dropout if layer.training else 0.0, on[0].parts


def _norm(module: Any, dtype: torch.dtype) -> Tensor:
    """The weight of a norm as `rms_norm` takes it."""
    w = module.weight
    if w.requires_grad or is_hooked(module):
        raise Plain("a norm trains or has a hook")
    around = getattr(module, "around", 0.0)
    if around:
        return w.detach().float() + around
    if w.dtype != dtype:
        raise Plain(f"a norm is in {w.dtype} and the states are in {dtype}")
    return w


def _linears(block: Any) -> tuple[tuple[nn.Module, ...], ...]:
    at, mlp = block.self_attn, block.mlp
    qkv = (at.qkv_proj,) if hasattr(at, "qkv_proj") else (at.q_proj, at.k_proj, at.v_proj)
    gate_up = (mlp.gate_up_proj,) if hasattr(mlp, "gate_up_proj") else (mlp.gate_proj, mlp.up_proj)
    return qkv, (at.o_proj,), gate_up, (mlp.down_proj,)


def _norms(block: Any, eps: float, dtype: torch.dtype) -> Norms:
    at, around = block.self_attn, hasattr(block, "pre_feedforward_layernorm")
    second = block.pre_feedforward_layernorm if around else block.post_attention_layernorm
    behind: tuple[Tensor | None, Tensor | None] = (None, None)
    if around:
        behind = _norm(block.post_attention_layernorm, dtype), _norm(block.post_feedforward_layernorm, dtype)
    q, k = getattr(at, "q_norm", None), getattr(at, "k_norm", None)
    heads = None if q is None or k is None or isinstance(q, nn.Identity) else (_norm(q, dtype), _norm(k, dtype))
    return Norms((_norm(block.input_layernorm, dtype), _norm(second, dtype)), behind, heads, eps)


def parts_of(model: Any, x: Tensor, seed: Seed | None = None) -> list[tuple[Norms, Any]]:
    """Norms and groups of every block of a model with states x.  Raises Plain where one needs the plain path."""
    found = []
    for b in model.model.layers:
        if any(is_hooked(m) for m in (b, b.self_attn, b.mlp)):
            raise Plain("a block has a hook")
        groups = tuple(group_of(*layers, seed=seed) for layers in _linears(b))
        found.append((_norms(b, model.config.eps, x.dtype), groups))
    return found


def read(
    model: Any, x: Tensor, turns: list[tuple[Tensor, Tensor]], masks: Mapping[int | None, Mask], keeping: Keeping
) -> list[Spec]:
    """What the fused step needs of every block of `model` for states x (B, T, d).

    Raises Plain where one of them needs the plain path.
    """
    c, layers = model.config, model.model.layers
    if getattr(c, "attention_cap", None) is not None:
        raise Plain("scores of attention are capped, which no fast attention does")
    if any(2 * cos.shape[-1] != c.head_dim for cos, _ in turns):
        raise Plain("only part of a head turns")
    found = parts_of(model, x, Seed(x.device) if keeping.compute == "bf16" else None)
    eights = _eights([groups for _, groups in found], x, keeping)
    ragged = [mask.ragged for mask in masks.values() if isinstance(mask, Documents) and mask.ragged]
    keep = keeping.choose(x, max((r.documents for r in ragged), default=0))
    heads = (c.num_heads, c.num_kv_heads, c.head_dim)
    gelu = hasattr(layers[0], "pre_feedforward_layernorm")
    specs = []
    for i, ((norms, groups), eight, word) in enumerate(zip(found, eights, keep, strict=True)):
        scale = getattr(layers[i].self_attn, "scale", None)
        attend = functools.partial(attention, mask=masks[c.window(i)], scale=scale)
        if eight is None:
            groups = tuple(keeping.decoded.of(i, j, group, x.dtype) for j, group in enumerate(groups))
        else:
            pairs = enumerate(zip(groups, eight, strict=True))
            eight = tuple(keeping.decoded.of_8(i, j, group, e) for j, (group, e) in pairs)
        specs.append(Spec(norms, groups, eight, heads, attend, gelu, word, keeping.host))
    return specs


def _eights(blocks: list[tuple[Group, ...]], x: Tensor, keeping: Keeping) -> list[Any]:
    """What products in 8 bits need, of each block; None for all where they are not asked for."""
    if keeping.compute != "fp8":
        return [None] * len(blocks)
    why = fp8.refusal(x.device, x.dtype)
    if why is None and any(group.parts > 1 for groups in blocks for group in groups):
        why = "adapters run side by side"
    if why is None and not all(fold8.fits(group) for groups in blocks for group in groups):
        why = f"sizes of its layers are no multiples of {fold8.WHOLE}"
    if why:
        raise RuntimeError(f"compute='fp8' was asked for, and {why}; take compute='bf16'")
    lows = [low for groups in blocks for group in groups for low in group.lows if low]
    zero = torch.zeros((), device=x.device)
    a = b = zero.clamp(min=TINY)
    if lows:
        norms = torch._foreach_norm([low[0].detach() for low in lows], float("inf"))
        torch._foreach_mul_(norms, [abs(low[2]) for low in lows])
        a = torch.stack(norms).amax().float().clamp(min=TINY)
        b = torch.stack(torch._foreach_norm([low[1].detach() for low in lows], float("inf"))).amax().clamp(min=TINY)
    scales_a = fold8.scales_of_a([group for groups in blocks for group in groups], a)
    made = []
    for groups in blocks:
        made.append(tuple(Eight(*_scale(group, x.device, keeping), a, b, scales_a) for group in groups))
    return made


def _scale(group: Group, device: torch.device, keeping: Keeping) -> tuple[float, Tensor]:
    """The scale of a group's weights, and as often as its products want it; once, since it makes the host wait."""
    memory = [w.q if isinstance(w, Weight4) else w for w in group.weights]
    key = tuple((t.data_ptr(), t._version) for t in memory)
    if key not in keeping.scales8:
        scale = max(weight_scale(w) for w in group.weights)
        keeping.scales8[key] = scale, fold8.scales_of(group, scale, device)
    return keeping.scales8[key]
