"""A decoder block of Llama's kind as one step forward and one back, with hand-chosen memory.

    n = rms_norm(x)     q,k,v = W_qkv n     s = x + W_o attention(rope(q), rope(k), v)
    h = rms_norm(s)     g,u = W_gu h        y = s + W_d (silu(g) u)

Autograd would keep every value on the way.  Here a block keeps what its `keep` says and makes the rest again:
    "all"       x, q, k, v, the attention's output, s, g, u: nothing is made again but norms and the gate
    "no_gate"   all but g and u, the widest: one product is made again
    "input"     x: all is made again but W_o's and W_d's outputs where the backward can do without
    "host"      as "no_gate", in pinned memory of the host, copied beside the computation
    "input_host"  as "input", there
Every layer's update rides in its base's product (kernels/fold.py).  Same loss as the plain path, within rounding.
Source: the order of operations is ours; the formulas are those of llama.py and of the kernels.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lora.kernels import fold
from lora.kernels.fold import Group, wide
from lora.kernels.linear4 import Weight4
from lora.kernels.norm import rms_norm_backward_into, rms_norm_forward
from lora.kernels.rope import turn_into
from lora.kernels.scratch import borrowed, mine
from lora.kernels.swiglu import swiglu_backward, swiglu_forward
from lora.layer import LoRALinear, is_hooked
from lora.models.base import Mask, attention
from lora.models.budget import Keeping
from lora.models.host import Host
from lora.quant.linear import Linear4bit

KEEPS = ("all", "no_gate", "input", "host", "input_host")
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v (B, H, T, D) -> (B, H, T, D)


class Spec(NamedTuple):
    """What a block's step needs beside its input and its factors."""

    norms: tuple[Tensor, Tensor]
    eps: float
    groups: tuple[Group, Group, Group, Group]  # q k v, o, gate up, down
    heads: tuple[int, int, int]  # of queries, of keys, and values of each
    attend: Attend
    keep: str
    host: Host


def group_of(*layers: nn.Module) -> Group | None:
    """The layers as a group of `fold`, or None where one needs the plain path."""
    weights: list[Weight4 | Tensor] = []
    biases: list[Tensor | None] = []
    lows: list[Any] = []
    parts = 1
    for layer in layers:
        wrapped = layer if isinstance(layer, LoRALinear) and (layer.merged is None or layer.off) else None
        base: Any = wrapped.base if wrapped else layer
        low = None
        if wrapped:
            on = wrapped.on()
            if len(on) > 1 or any(not a.is_plain() or (wrapped.training and a.dropout) for a in on):
                return None
            low = on[0].low() if on else None
            if on and low is None:  # adapters side by side that are not in one stack
                return None
            parts = on[0].parts if on else parts
        if is_hooked(layer) or is_hooked(base):
            return None
        if type(base) is Linear4bit:
            weights.append(base.weight4())
        elif type(base) is nn.Linear and not base.weight.requires_grad:
            weights.append(base.weight)
        else:
            return None
        if base.bias is not None and base.bias.requires_grad:
            return None
        biases.append(base.bias)
        lows.append(low)
    return Group(tuple(weights), tuple(biases), tuple(lows), parts)


def factors(groups: Sequence[Group]) -> list[Tensor]:
    """a and b of every layer of the groups that has an update, in turn."""
    return [t for g in groups for low in g.lows if low for t in low[:2]]


@dataclass(slots=True)
class _State:
    """What one pass over a block made; fields that are not kept are None."""

    r1: Tensor
    qkv: Tensor
    leaves: tuple[Tensor, Tensor, Tensor]
    att: Tensor  # with its graph to `leaves`
    s: Tensor
    r2: Tensor
    gu: Tensor | None  # (M, 2F + room)


def _heads(buffer: Tensor, spec: Spec, B: int, T: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, T, H, D) as views of the first columns of (M, ...)."""
    H, KV, D = spec.heads
    rows = buffer[:, : (H + 2 * KV) * D].unflatten(1, (H + 2 * KV, D)).unflatten(0, (B, T))
    return rows[:, :, :H], rows[:, :, H : H + KV], rows[:, :, H + KV :]


def _gate(spec: Spec, s: Tensor, t: Tensor | None, residual: Tensor | None = None):
    """g and u (M, 2F + room) of s, or of s + residual, which is returned too, with r and T."""
    group = spec.groups[2]
    M, D, N = s.shape[0], group.K, sum(group.sizes)
    hw = wide(M, D, group.room, s, "input")
    _, s, r2 = rms_norm_forward(s, residual, spec.norms[1], spec.eps, out=hw[:, :D])
    gu = torch.empty(M, N + group.room, dtype=s.dtype, device=s.device)
    _, t = fold.forward(group, hw, t, out=gu[:, :N])
    return gu, s, r2, t


def _attention(spec: Spec, x: Tensor, cos: Tensor, sin: Tensor, B: int, T: int, t: Tensor | None):
    group = spec.groups[0]
    M, D = x.shape
    xw = wide(M, D, group.room, x, "input")
    _, _, r1 = rms_norm_forward(x, None, spec.norms[0], spec.eps, out=xw[:, :D])
    qkv, t = fold.forward(group, xw, t)
    q, k, v = _heads(qkv, spec, B, T)
    turn_into((q, k), (q, k), cos, sin)
    leaves = tuple(part.detach().transpose(1, 2).requires_grad_() for part in (q, k, v))
    with torch.enable_grad():
        att = spec.attend(*leaves)
    return r1, qkv, leaves, att, t


def _flat(att: Tensor) -> Tensor:
    """(B, H, T, D) as (B, T, H, D), the order in which o_proj reads it."""
    return att.detach().transpose(1, 2)


def _forward(spec: Spec, x: Tensor, cos: Tensor, sin: Tensor, B: int, T: int):
    """y (M, D), the state, and T of the four groups."""
    M, D = x.shape
    F = spec.groups[3].K
    r1, qkv, leaves, att, t1 = _attention(spec, x, cos, sin, B, T, None)
    HD = spec.groups[1].K
    ow = wide(M, HD, spec.groups[1].room, x, "input")
    ow[:, :HD].view(B, T, *att.shape[1:2], att.shape[3]).copy_(_flat(att))
    o, t2 = fold.forward(spec.groups[1], ow)
    gu, s, r2, t3 = _gate(spec, x, None, o)
    fw = wide(M, F, spec.groups[3].room, x, "input")
    swiglu_forward(gu[:, :F], gu[:, F : 2 * F], out=fw[:, :F])
    y, t4 = fold.forward(spec.groups[3], fw, add=s)
    return y, _State(r1, qkv, leaves, att, s, r2, gu), (t1, t2, t3, t4)


def _again(spec: Spec, x: Tensor, cos: Tensor, sin: Tensor, B: int, T: int, ts: Sequence[Tensor | None]) -> _State:
    """The state of `_forward` made a second time, without W_d's product."""
    M = x.shape[0]
    r1, qkv, leaves, att, _ = _attention(spec, x, cos, sin, B, T, ts[0])
    HD = spec.groups[1].K
    ow = wide(M, HD, spec.groups[1].room, x, "input")
    ow[:, :HD].view(B, T, *att.shape[1:2], att.shape[3]).copy_(_flat(att))
    o, _ = fold.forward(spec.groups[1], ow, ts[1])
    gu, s, r2, _ = _gate(spec, x, ts[2], o)
    return _State(r1, qkv, leaves, att, s, r2, gu)


def _memory(t: Tensor) -> Tensor:
    """A tensor without gaps, its axes in some order, as the contiguous tensor of its memory."""
    order = sorted(range(t.dim()), key=t.stride, reverse=True)
    whole = t.detach().permute(order)
    assert whole.is_contiguous(), "attention's output is one piece of memory"
    return whole


class _Passed:
    """The gradient that the block above has left in a buffer with room at the rows' ends, so that it need not move."""

    wide: Tensor | None = None

    @classmethod
    def take(cls, dy: Tensor, room: int) -> Tensor:
        """dy (M, D) in a buffer (M, D + room): that of the block above, or a copy."""
        M, D = dy.shape
        passed, cls.wide = cls.wide, None
        if passed is not None and passed.shape == (M, D + room) and passed.data_ptr() == dy.data_ptr():
            return passed
        passed = torch.empty(M, D + room, dtype=dy.dtype, device=dy.device)
        passed[:, :D].copy_(dy)
        return passed


def _backward(spec: Spec, dy: Tensor, x: Tensor, st: _State, cos: Tensor, sin: Tensor, B: int, T: int, ts: Any):
    """dx (M, D), with room behind each row, and the gradients of `factors`."""
    qkv_g, o_g, gu_g, d_g = spec.groups
    M, D = x.shape
    F = d_g.K
    assert st.gu is not None
    dyw = _Passed.take(dy, d_g.room)
    dy = dyw[:, :D]
    act = wide(M, F, 0, x, "input")
    _, u4, db4 = fold.backward(d_g, dyw, ts[3], out=act)  # dL/d(silu(g) u)
    g, u = st.gu[:, :F], st.gu[:, F : 2 * F]
    swiglu_backward(act, g, u, out=(g, u), h=act)  # each value over the one it was made from
    da4 = fold.grad_a(d_g, u4, act)
    dh, u3, db3 = fold.backward(gu_g, st.gu, ts[2])
    del act
    del g, u
    st.gu = None  # half a GiB on an 8B model, and the attention's backward is still to come
    h = wide(M, D, 0, x, "input")
    dsw = wide(M, D, o_g.room, x, "ds")
    ds = dsw[:, :D]
    rms_norm_backward_into(dh, dy, st.s, spec.norms[1], st.r2, ds, h)
    da3 = fold.grad_a(gu_g, u3, h)
    del dh
    datt, u2, db2 = fold.backward(o_g, dsw, ts[1])
    H, KV, hd = spec.heads
    da2 = fold.grad_a(o_g, u2, _flat(st.att).reshape(M, H * hd))
    dq, dk, dv = torch.autograd.grad(st.att, st.leaves, datt.view(B, T, H, hd).transpose(1, 2))
    del datt
    dw = wide(M, sum(qkv_g.sizes), qkv_g.room, x, "dqkv")
    q, k, v = _heads(dw, spec, B, T)
    turn_into((dq.transpose(1, 2), dk.transpose(1, 2)), (q, k), cos, sin, back=True)
    v.copy_(dv.transpose(1, 2))
    del dq, dk, dv
    dn, u1, db1 = fold.backward(qkv_g, dw, ts[0])
    dxw = torch.empty(M, D + d_g.room, dtype=x.dtype, device=x.device)
    rms_norm_backward_into(dn, ds, x, spec.norms[0], st.r1, dxw[:, :D], h)
    da1 = fold.grad_a(qkv_g, u1, h)
    grads = []
    for das, dbs in ((da1, db1), (da2, db2), (da3, db3), (da4, db4)):
        grads += [t for pair in zip(das, dbs, strict=True) if pair[0] is not None for t in pair]
    return dxw, grads


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, spec, layer, *tensors):
        del tensors  # they are in spec.groups; here so that autograd gives them gradients
        B, T, D = x.shape
        flat = x.reshape(B * T, D)
        y, st, ts = _forward(spec, flat, cos, sin, B, T)
        ctx.spec, ctx.layer, ctx.shape, ctx.buffers = spec, layer, (B, T, D), mine()
        away = spec.keep.endswith("host")
        keeps_state = spec.keep in ("all", "no_gate", "host")
        if spec.keep != "all":
            st.gu = None
        ctx.state = st if keeps_state else None
        if away:
            own = (st.qkv, _memory(st.att), st.s) if keeps_state else ()
            spec.host.send(layer, flat, own)
        ctx.save_for_backward(None if away else x, cos, sin, *ts)
        return y.view(B, T, D)

    @staticmethod
    def backward(ctx, *grads):
        x, cos, sin, *ts = ctx.saved_tensors
        spec, (B, T, D) = ctx.spec, ctx.shape
        st, ctx.state = ctx.state, None
        flat = spec.host.fetch(ctx.layer, grads[0], torch.Size((B * T, D))) if x is None else x.reshape(B * T, D)
        with borrowed(ctx.buffers):
            if st is None:
                st = _again(spec, flat, cos, sin, B, T, ts)
            elif st.gu is None:
                st.gu, *_ = _gate(spec, st.s, ts[2])
            dxw, dfactors = _backward(spec, grads[0].reshape(B * T, D), flat, st, cos, sin, B, T, ts)
        _Passed.wide = dxw if ctx.layer else None
        return (dxw[:, :D].unflatten(0, (B, T)), None, None, None, None, *dfactors)


def block(x: Tensor, cos: Tensor, sin: Tensor, spec: Spec, layer: int) -> Tensor:
    """The block's output (B, T, d) for x (B, T, d); cos and sin (B or 1, T, 1, D/2) as llama.py makes them."""
    return _Block.apply(x, cos, sin, spec, layer, *factors(spec.groups))


Parts = tuple[tuple[Tensor, Tensor], tuple[Group, Group, Group, Group]]


def fusable(model: Any, x: Tensor) -> list[Parts] | None:
    """Norms and groups of every block of a Llama; None where one of them needs the plain path.

    That is: norms on q and k, trained norms or biases, hooks, dropout, DoRA, and several adapters on the same rows.
    """
    found = []
    for b in model.model.layers:
        at, mlp, n1, n2 = b.self_attn, b.mlp, b.input_layernorm, b.post_attention_layernorm
        layers = ((at.q_proj, at.k_proj, at.v_proj), (at.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,))
        groups = tuple(group_of(*layer) for layer in layers)
        if None in groups or model.config.qk_norm or any(is_hooked(m) for m in (b, at, mlp, n1, n2)):
            return None
        if any(n.weight.requires_grad or n.weight.dtype != x.dtype for n in (n1, n2)):
            return None
        found.append(((n1.weight, n2.weight), cast(Any, groups)))
    return found


def specs_of(model: Any, x: Tensor, masks: Mapping[int | None, Mask], keeping: Keeping) -> list[Spec] | None:
    """What `block` needs of every block of a Llama; None where one of them is not `fusable`."""
    c, specs = model.config, []
    keep = keeping.choose(x)
    keeping.recordable = False
    found = fusable(model, x)
    if found is None:
        return None
    heads = (c.num_heads, c.num_kv_heads, c.head_dim)
    for i, (norms, groups) in enumerate(found):
        attend = functools.partial(attention, mask=masks[c.window(i)])
        specs.append(Spec(norms, c.eps, groups, heads, attend, keep[i], keeping.host))
    keeping.recordable = all(spec.keep == "all" for spec in specs)
    return specs
