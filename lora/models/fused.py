"""A decoder block of Llama's kind as one step forward and one back, with hand-chosen memory.

    n = rms_norm(x)     q,k,v = W_qkv n     s = x + W_o attention(rope(q), rope(k), v)
    h = rms_norm(s)     g,u = W_gu h        y = s + W_d (silu(g) u)

Families add to it (spec.py): norms over the heads of q and k before they turn, norms behind W_o and W_d, another gate.
Autograd would keep every value on the way.  Here a block keeps what its `keep` says and makes the rest again:
    "all"       x, q, k, v, the attention's output, s, g, u: nothing is made again but norms and the gate
    "no_gate"   all but g and u, the widest: one product is made again
    "input"     x: all is made again but W_o's and W_d's outputs where the backward can do without
    "host"      as "no_gate", in pinned memory of the host, copied beside the computation
    "input_host"  as "input", there
Every layer's update rides in its base's product (kernels/fold.py; in 8 bits: fold8.py).  Same loss as the plain path,
within rounding.
Source: the order of operations is ours; the formulas are those of llama.py and of the kernels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora.kernels import fold, fold8
from lora.kernels.fold import Group, wide
from lora.kernels.gate import MAX_RANK, gate_backward
from lora.kernels.norm import rms_norm_backward, rms_norm_backward_into, rms_norm_forward
from lora.kernels.rope import turn_into
from lora.kernels.scratch import borrowed, mine
from lora.models import spec as specs
from lora.models.base import Mask
from lora.models.budget import Keeping
from lora.models.spec import Spec

KEEPS = ("all", "no_gate", "input", "host", "input_host")
QKV, O, GATE, DOWN = range(4)  # the groups of a Spec


def factors(groups: Sequence[Group]) -> list[Tensor]:
    """a and b of every layer of the groups that has an update, in turn."""
    return [t for g in groups for low in g.lows if low for t in low[:2]]


# ---- the products, in 16 or in 8 bits ----
def _normed(
    spec: Spec, which: int, x: Tensor, residual: Tensor | None, twice: Tensor | None = None
) -> tuple[Any, Tensor, Tensor]:
    """The input of a group behind a norm; what was normalised, in `twice` too where given; and r."""
    group, w, eps = spec.groups[which], spec.norms.before[which == GATE], spec.norms.eps
    if spec.eights:
        return fold8.normed(group, x, residual, w, eps)
    return fold.normed(group, x, residual, w, eps, twice)


def _taken(spec: Spec, which: int, x: Tensor) -> Any:
    return (fold8 if spec.eights else fold).taken(spec.groups[which], x)


def _gated(spec: Spec, gu: Tensor) -> Any:
    g, u = _halves(spec, gu)
    return (fold8 if spec.eights else fold).gated(spec.groups[DOWN], g, u, spec.gelu)


def _room(spec: Spec, which: int) -> int:
    """Columns that a group's product wants behind the rows of its output's gradient."""
    return 0 if spec.eights else spec.groups[which].room


def _product(spec: Spec, which: int, given: Any, t: Tensor | None, like: Tensor, add: Tensor | None = None):
    """Y, with room behind each row where it is the gate's, and T."""
    group = spec.groups[which]
    if spec.eights:
        return fold8.forward(group, spec.eights[which], given, t, like, add)
    if which != GATE:
        return fold.forward(group, given, t, add)
    N = sum(group.sizes)
    y = torch.empty(like.shape[0], N + group.room, dtype=like.dtype, device=like.device)
    _, t = fold.forward(group, given, t, out=y[:, :N])
    return y, t


def _back(
    spec: Spec, which: int, dyw: Tensor, t: Tensor | None, out: Tensor | None = None, dbs: Any = None, through=True
):
    """dX, into `out` where that can be, s U and db_i of dY with room behind each row; no dX if not `through`."""
    group = spec.groups[which]
    if spec.eights:
        return fold8.backward(group, spec.eights[which], dyw, t, dbs, which in (QKV, GATE), through)
    return fold.backward(group, dyw, t, out, dbs, through)


def _halves(spec: Spec, gu: Tensor) -> tuple[Tensor, Tensor]:
    F = spec.groups[DOWN].K
    return gu[:, :F], gu[:, F : 2 * F]


# ---- forward ----
@dataclass(slots=True)
class _State:
    """What one pass over a block made; fields that are not kept, or that a family does not have, are None."""

    r1: Tensor
    qkv: Tensor  # (M, ..), turned in place where q and k have no norms
    turned: Tensor | None  # (B, T, heads of q and k, D) where they have
    r_heads: tuple[Tensor, Tensor] | None
    leaves: tuple[Tensor, ...]
    att: Tensor  # with its graph to `leaves`
    o: Tensor | None = None  # before its norm
    r_o: Tensor | None = None
    s: Any = None  # x + o, a tensor once it is made
    r2: Any = None
    gu: Tensor | None = None  # (M, 2F + room)
    d: Tensor | None = None  # before its norm
    r_d: Tensor | None = None

    def own(self) -> list[Tensor]:
        """Memory that can wait on the host."""
        return [t for t in (self.qkv, self.turned, _memory(self.att), self.o, self.s) if t is not None]


def _heads(buffer: Tensor, spec: Spec, B: int, T: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, T, H, D) as views of the first columns of (M, ...)."""
    H, KV, D = spec.heads
    rows = buffer[:, : (H + 2 * KV) * D].unflatten(1, (H + 2 * KV, D)).unflatten(0, (B, T))
    return rows[:, :, :H], rows[:, :, H : H + KV], rows[:, :, H + KV :]


def _attention(spec: Spec, x: Tensor, cos: Tensor, sin: Tensor, B: int, T: int, t: Tensor | None):
    given, _, r1 = _normed(spec, QKV, x, None)
    qkv, t = _product(spec, QKV, given, t, x)
    q, k, v = _heads(qkv, spec, B, T)
    turned = r_heads = None
    if spec.norms.heads is None:
        turn_into((q, k), (q, k), cos, sin)
    else:
        H, KV, D = spec.heads
        (nq, rq), (nk, rk) = (_head_norm(part, w, spec) for part, w in zip((q, k), spec.norms.heads, strict=True))
        turned, r_heads = torch.empty(B, T, H + KV, D, dtype=x.dtype, device=x.device), (rq, rk)
        q, k = turned[:, :, :H], turned[:, :, H:]
        turn_into((nq, nk), (q, k), cos, sin)
    leaves = tuple(part.detach().transpose(1, 2).requires_grad_() for part in (q, k, v))
    with torch.enable_grad():
        att = spec.attend(*leaves)
    return _State(r1, qkv, turned, r_heads, leaves, att), t


def _head_norm(x: Tensor, w: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    y, _, r = rms_norm_forward(x, None, w, spec.norms.eps)
    return y.to(x.dtype), r


def _flat(att: Tensor) -> Tensor:
    """(B, H, T, D) as (B T, H D), the order in which o_proj reads it."""
    return att.detach().transpose(1, 2).flatten(2).flatten(0, 1)


def _behind(spec: Spec, which: int, y: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What joins the residual of W_o's or W_d's output y; y and r where a norm stands between."""
    w = spec.norms.behind[which == DOWN]
    if w is None:
        return y, None, None
    made, _, r = rms_norm_forward(y, None, w, spec.norms.eps, out=torch.empty_like(y))
    return made, y, r


def _until_gate(
    spec: Spec, x: Tensor, cos: Tensor, sin: Tensor, B: int, T: int, ts: Sequence[Tensor | None], twice: bool = False
):
    """All but W_d's part, T of the first three groups, `ts` where known; and, if `twice`, s in memory of its own."""
    st, t1 = _attention(spec, x, cos, sin, B, T, ts[QKV])
    o, t2 = _product(spec, O, _taken(spec, O, _flat(st.att)), ts[O], x)
    joins, st.o, st.r_o = _behind(spec, O, o)
    again = joins if twice else None
    st.gu, st.s, st.r2, t3 = _gate(spec, x, ts[GATE], joins, again)
    return st, (t1, t2, t3), again


def _gate(spec: Spec, s: Tensor, t: Tensor | None, residual: Tensor | None = None, twice: Tensor | None = None):
    """g and u (M, 2F + room) of s, or of s + residual, which is returned too, and in `twice`; with r and T."""
    given, s, r2 = _normed(spec, GATE, s, residual, twice)
    gu, t = _product(spec, GATE, given, t, s)
    return gu, s, r2, t


def _forward(spec: Spec, x: Tensor, cos: Tensor, sin: Tensor, B: int, T: int):
    """y (M, D), the state, and T of the four groups."""
    adds = spec.norms.behind[1] is None
    st, ts, s = _until_gate(spec, x, cos, sin, B, T, (None,) * 4, twice=adds and not spec.eights)
    assert st.gu is not None
    given = _gated(spec, st.gu)
    if adds:
        y, t4 = _product(spec, DOWN, given, None, x, add=st.s if s is None else s)
    else:
        y, t4 = _product(spec, DOWN, given, None, x)
        y, st.d, st.r_d = _behind(spec, DOWN, y)
        y = y.add_(st.s)
    return y, st, (*ts, t4)


def _again(spec: Spec, st: _State | None, x: Tensor, cos: Tensor, sin: Tensor, B: int, T: int, ts: Any) -> _State:
    """What `_forward` made and was not kept, without W_d's product where no norm asks for it."""
    if st is None:
        st, *_ = _until_gate(spec, x, cos, sin, B, T, ts)
    elif st.gu is None:
        st.gu, *_ = _gate(spec, st.s, ts[GATE])
    if spec.norms.behind[1] is not None and st.d is None:
        assert st.gu is not None
        y, _ = _product(spec, DOWN, _gated(spec, st.gu), ts[DOWN], x)
        _, st.d, st.r_d = _behind(spec, DOWN, y)
    return st


def _memory(t: Tensor) -> Tensor:
    """A tensor without gaps, its axes in some order, as the contiguous tensor of its memory."""
    order = sorted(range(t.dim()), key=t.stride, reverse=True)
    whole = t.detach().permute(order)
    assert whole.is_contiguous(), "attention's output is one piece of memory"
    return whole


# ---- backward ----
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


def _through_norm(spec: Spec, which: int, dy: Tensor, made: Tensor | None, r: Tensor | None) -> Tensor:
    """The gradient of W_o's or W_d's output, with room, from that of what joins the residual."""
    w, (M, D) = spec.norms.behind[which == DOWN], dy.shape
    assert w is not None and made is not None and r is not None
    buffer = wide(M, D, _room(spec, which), dy, "behind")
    rms_norm_backward_into(dy, None, made, w, r, buffer[:, :D])
    return buffer


def _sums_fit(spec: Spec) -> bool:
    """Whether the pass through the gate makes da of the layers behind it and db of those before it."""
    before, behind = spec.groups[GATE], spec.groups[DOWN]
    return max(before.ranks + behind.ranks) <= MAX_RANK and not any(behind.drop)


def _gate_back(spec: Spec, dh: Tensor, gu: Tensor, u4: Tensor | None, ts: Any) -> tuple[Any, Any]:
    """dg and du over g and u; da of the layers behind the gate and db of those before it, None where products must
    make it."""
    before, behind = spec.groups[GATE], spec.groups[DOWN]
    g, u = _halves(spec, gu)
    if not _sums_fit(spec):
        gate_backward(dh, g, u, gelu=spec.gelu, keep_h=True)
        return fold.grad_a(behind, u4, dh), None
    t = fold.columns(before, ts[GATE])
    da, *dbs = gate_backward(dh, g, u, u4, t[0], t[-1], gelu=spec.gelu)
    if len(t) == 1 and dbs[0] is not None and dbs[1] is not None:  # one layer makes both
        dbs = [torch.cat((dbs[0], dbs[1]), dim=-2)]
    return [da], dbs[: len(t)]


def _heads_back(spec: Spec, grads: Sequence[Tensor], st: _State, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Gradients of q, k, v (B, H, T, D) as the attention gives them, back to W_qkv's output, into `out` (M, ..)."""
    dq, dk, dv = (g.transpose(1, 2) for g in grads)
    B, T = dq.shape[:2]
    q, k, v = _heads(out, spec, B, T)
    if spec.norms.heads is None:
        turn_into((dq, dk), (q, k), cos, sin, back=True, beside=(dv, v))
        return
    assert st.r_heads is not None
    back = tuple(torch.empty(g.shape, dtype=g.dtype, device=g.device) for g in (dq, dk))
    turn_into((dq, dk), (back[0], back[1]), cos, sin, back=True, beside=(dv, v))
    for g, x, w, r, place in zip(back, _heads(st.qkv, spec, B, T), spec.norms.heads, st.r_heads, (q, k), strict=False):
        dx, _ = rms_norm_backward(g, None, x.contiguous(), w, r)
        assert dx is not None
        place.copy_(dx)


def _backward(
    spec: Spec, dy: Tensor, x: Tensor, st: _State, cos: Tensor, sin: Tensor, B: int, T: int, ts: Any, through: bool
):
    """dx (M, D), with room behind each row, None if not `through`; and the gradients of `factors`."""
    qkv_g, o_g, gu_g, d_g = spec.groups
    M, D = x.shape
    assert st.gu is not None
    if spec.norms.behind[1] is None:
        dyw = _Passed.take(dy, _room(spec, DOWN))
        dy = dyw[:, :D]
    else:
        dyw, st.d = _through_norm(spec, DOWN, dy, st.d, st.r_d), None
    dh, u4, db4 = _back(spec, DOWN, dyw, ts[DOWN], None if spec.eights else wide(M, d_g.K, 0, x, "input"))
    if spec.eights and _sums_fit(spec):
        dn, u3, da4, db3 = fold8.gate_backward(
            gu_g, spec.eights[GATE], dh, *_halves(spec, st.gu), u4, ts[GATE], spec.gelu
        )
        del dh
    else:
        da4, dbs = _gate_back(spec, dh, st.gu, u4, ts)
        del dh
        dn, u3, db3 = _back(spec, GATE, st.gu, ts[GATE], dbs=dbs)
    st.gu = None  # half a GiB on an 8B model, and the attention's backward is still to come
    dsw = wide(M, D, _room(spec, O), x, "ds")
    ds = dsw[:, :D]
    rms_norm_backward_into(dn, dy, st.s, spec.norms.before[1], st.r2, ds)
    da3 = fold.grad_a(gu_g, u3, st.s, st.r2, spec.norms.before[1])
    del dn
    if spec.norms.behind[0] is not None:
        dsw = _through_norm(spec, O, ds, st.o, st.r_o)
    datt, u2, db2 = _back(spec, O, dsw, ts[O])
    H, _, hd = spec.heads
    da2 = fold.grad_a(o_g, u2, _flat(st.att))
    grads = torch.autograd.grad(st.att, st.leaves, datt.view(B, T, H, hd).transpose(1, 2))
    del datt
    dw = wide(M, sum(qkv_g.sizes), _room(spec, QKV), x, "dqkv")
    _heads_back(spec, grads, st, cos, sin, dw)
    del grads
    dn, u1, db1 = _back(spec, QKV, dw, ts[QKV], through=through)
    dxw = None
    if through:
        dxw = torch.empty(M, D + _room(spec, DOWN), dtype=x.dtype, device=x.device)
        rms_norm_backward_into(dn, ds, x, spec.norms.before[0], st.r1, dxw[:, :D])
    da1 = fold.grad_a(qkv_g, u1, x, st.r1, spec.norms.before[0])
    made = []
    for das, dbs in ((da1, db1), (da2, db2), (da3, db3), (da4, db4)):
        made += [t for pair in zip(das, dbs, strict=True) if pair[0] is not None for t in pair]
    return dxw, made


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
            st.gu = st.d = None
        ctx.state = st if keeps_state else None
        if away:
            spec.host.send(layer, flat, st.own() if keeps_state else ())
        else:
            spec.host.settle()
        ctx.save_for_backward(None if away else x, cos, sin, *ts)
        return y.view(B, T, D)

    @staticmethod
    def backward(ctx, *grads):
        x, cos, sin, *ts = ctx.saved_tensors
        spec, (B, T, D) = ctx.spec, ctx.shape
        st, ctx.state = ctx.state, None
        flat = spec.host.fetch(ctx.layer, grads[0], torch.Size((B * T, D))) if x is None else x.reshape(B * T, D)
        with borrowed(ctx.buffers):
            st = _again(spec, st, flat, cos, sin, B, T, ts)
            through = ctx.needs_input_grad[0]  # the first block's input is the embedding, which is frozen
            dxw, dfactors = _backward(spec, grads[0].reshape(B * T, D), flat, st, cos, sin, B, T, ts, through)
        _Passed.wide = dxw if ctx.layer else None
        dx = None if dxw is None else dxw[:, :D].unflatten(0, (B, T))
        return (dx, None, None, None, None, *dfactors)


def block(x: Tensor, cos: Tensor, sin: Tensor, spec: Spec, layer: int) -> Tensor:
    """The block's output (B, T, d) for x (B, T, d); cos and sin (B or 1, T, 1, D/2) as llama.py makes them."""
    return _Block.apply(x, cos, sin, spec, layer, *factors(spec.groups))


def fusable(model: Any, x: Tensor) -> list[tuple[tuple[Tensor, Tensor], Any]] | None:
    """Weights of the norms before attention and the MLP, and groups, of every block; for lean.py, which knows no other
    norms and no dropout.  None where a block needs more than that.
    """
    try:
        found = specs.parts_of(model, x)
    except specs.Plain:
        return None
    if any(norms.heads is not None or norms.behind[0] is not None for norms, _ in found):
        return None
    return [(norms.before, groups) for norms, groups in found]


def specs_of(
    model: Any, x: Tensor, turns: list[tuple[Tensor, Tensor]], masks: Mapping[int | None, Mask], keeping: Keeping
) -> list[Spec] | None:
    """What `block` needs of every block of a model; None where one of them needs the plain path.

    `keeping.said` tells which it is, and why.  Raises RuntimeError where products in 8 bits were asked for and cannot
    be had.
    """
    keeping.recordable = False
    try:
        found = specs.read(model, x, turns, masks, keeping)
    except specs.Plain as why:
        if keeping.compute != "bf16":
            raise RuntimeError(f"compute={keeping.compute!r} runs in the fused blocks only, and {why}") from None
        keeping.said = f"blocks run by the plain path: {why}"
        return None
    keeping.recordable = True
    whole, n = sum(spec.keep == "all" for spec in found), len(found)
    kept = "all kept" if whole == n else f"{whole} kept whole, the rest as {found[0].keep!r}"
    if keeping.decoded.blocks:
        kept += f"; {keeping.decoded.blocks} blocks' weights stay decoded"
    base = "its products in 8 bits" if found[0].eights else f"its products in {str(x.dtype).removeprefix('torch.')}"
    keeping.said = f"{n} blocks run fused, {kept}; the frozen base: {base}"
    return found
