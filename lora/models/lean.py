"""A decoder block of Llama's kind as one step forward and one back, on a CPU: what fused.py is to a GPU.

    n = rms_norm(x)     q,k,v = W_qkv n     s = x + W_o attention(rope(q), rope(k), v)
    h = rms_norm(s)     g,u = W_gu h        y = s + W_d (silu(g) u)

One node in autograd's graph instead of a dozen, and operations that write where the next one reads: on a CPU every
operation costs some microseconds however small, and every pass over memory costs time.  Kept for the backward: x, q,
k, v, the attention's output, s, g, u, silu(g) and the thin T of the updates; with keep "input", as recompute=True
asks, x alone.  Norms' outputs are not: da takes them apart (kernels/beside.py).  The last blocks' weights are decoded
once and stay, 384 MiB in all, until a forward without a gradient: at 64 tokens decoding is a sixth of a small model's
step, and a step's peak is what it is whether they stay from its forward to its backward or from step to step.
Source: the order of operations is ours; the formulas are those of llama.py and of the kernels.
"""

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora.kernels import beside
from lora.kernels.causal import causal_backward, causal_forward
from lora.kernels.fold import Group
from lora.kernels.linear4 import Weight4
from lora.kernels.scratch import borrowed, mine, scratch
from lora.models.budget import Keeping
from lora.models.documents import Documents
from lora.models.fused import factors, fusable

KEPT_WEIGHTS = 384 * 2**20  # bytes of decoded weights that stay; with 405 MiB, all of SmolLM2, a step outgrew its peer
Tables = tuple[Tensor, Tensor]  # cos and sin, (B or 1, 1, T, D / 2)
Parts = tuple[tuple[slice, slice], ...]  # rows and tokens that attend to each other, together all


class Spec(NamedTuple):
    """What a block's step needs beside its input and its factors."""

    norms: tuple[Tensor, Tensor]
    eps: Tensor  # ()
    groups: tuple[Group, Group, Group, Group]  # q k v, o, gate up, down
    heads: tuple[int, int, int]  # of queries, of keys, and values of each
    window: int | None
    parts: Parts
    keep: str
    keep_weights: bool


@dataclass(slots=True)
class _State:
    """What one pass over a block made."""

    r1: Tensor  # 1 / root of the mean square of x, (M, 1)
    q: Tensor  # turned, (B, KV, G, T, D)
    k: Tensor  # turned, (B, KV, T, D)
    v: Tensor
    p: list[list[Tensor] | None]  # of each part, where kept
    att: Tensor  # (M, H D)
    s: Tensor
    r2: Tensor
    gu: Tensor  # (M, 2 F + room)
    silu: Tensor  # (M, F)
    ts: list[Tensor | None]  # of the first three groups
    ws: list[Tensor | None]  # decoded, where kept


def _norm(x: Tensor, w: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """rms_norm(x) in a reused buffer, and r."""
    r = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    r = torch.addcmul(eps, r, r, value=1 / x.shape[1]).rsqrt_()
    n = scratch(x.numel(), x.dtype, x.device, "normed").view(x.shape)
    return torch.mul(x, r, out=n).mul_(w), r


def _norm_backward(dn: Tensor, ds: Tensor, x: Tensor, w: Tensor, r: Tensor, out: Tensor | None = None) -> Tensor:
    """ds + the gradient of x through rms_norm, a fresh tensor or `out`; dn is overwritten."""
    g = dn.mul_(w)
    made = torch.mul(g, x, out=scratch(x.numel(), x.dtype, x.device, "normed").view(x.shape))
    c = made.sum(dim=1, keepdim=True).mul_(r.square()).mul_(-1 / x.shape[1])
    return torch.addcmul(ds, g.addcmul_(x, c), r, out=out)


def _turn(x: Tensor, out: Tensor, tables: Tables, sign: int) -> None:
    """The rotary turn of x (B, .., T, D) into `out` of the same shape, both of any strides; sign -1 turns back."""
    x1, x2 = x.chunk(2, dim=-1)
    y1, y2 = out.chunk(2, dim=-1)
    cos, sin = tables
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin, value=sign)


def _split(qkv: Tensor, heads: tuple[int, int, int], B: int, T: int) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, KV, G, T, D), k and v (B, KV, T, D) as views of (M, (H + 2 KV) D + room)."""
    H, KV, D = heads
    rows = qkv[:, : (H + 2 * KV) * D].view(B, T, H + 2 * KV, D).transpose(1, 2)
    q, k, v = rows.split((H, KV, KV), dim=1)
    return q.unflatten(1, (KV, H // KV)), k, v


def _heads(rows: Tensor, heads: tuple[int, int, int], B: int, T: int) -> Tensor:
    """Rows (M, H D) as (B, KV, G, T, D), a view."""
    H, KV, D = heads
    return rows.view(B, T, KV, H // KV, D).permute(0, 2, 3, 1, 4)


def _thin(group: Group, t: Tensor | None) -> Tensor | None:
    """T by itself, where it stands in the room of a buffer that nobody keeps."""
    return t if t is None or not beside.is_joined(group) else t.clone()


def _forward(spec: Spec, x: Tensor, tables: Tables, B: int, T: int) -> _State:
    """What a block makes of x (M, d) up to its gate."""
    H, KV, D = spec.heads
    M, d = x.shape
    scale = D**-0.5
    ws = [beside.weight(g, x, keep=True) if spec.keep_weights else None for g in spec.groups]
    n, r1 = _norm(x, spec.norms[0], spec.eps)
    qkv, t1 = beside.forward(spec.groups[0], n, ws[0])
    q_, k_, v_ = _split(qkv, spec.heads, B, T)
    q = torch.empty(B, KV, H // KV, T, D, dtype=x.dtype, device=x.device)
    k, v = torch.empty(2, B, KV, T, D, dtype=x.dtype, device=x.device)
    cos, sin = tables
    _turn(q_, q, (cos[:, None], sin[:, None]), 1)
    _turn(k_, k, tables, 1)
    v.copy_(v_)
    att = torch.empty(M, H * D, dtype=x.dtype, device=x.device)
    y = _heads(att, spec.heads, B, T)
    p = []
    for b, t in spec.parts:
        p.append(causal_forward(q[b, :, :, t], k[b, :, t], v[b, :, t], y[b, :, :, t], scale, spec.window))
    o, t2 = beside.forward(spec.groups[1], att, ws[1], anyhow=True)
    s = torch.add(x, o[:, :d])
    n, r2 = _norm(s, spec.norms[1], spec.eps)
    gu, t3 = beside.forward(spec.groups[2], n, ws[2])
    silu = torch.nn.functional.silu(gu[:, : sum(spec.groups[2].sizes) // 2])
    return _State(r1, q, k, v, p, att, s, r2, gu, silu, [_thin(spec.groups[0], t1), _thin(spec.groups[1], t2), t3], ws)


def _act(st: _State) -> Tensor:
    """silu(g) u (M, F), in a reused buffer."""
    F = st.silu.shape[1]
    out = scratch(st.silu.numel(), st.silu.dtype, st.silu.device, "act").view(st.silu.shape)
    return torch.mul(st.silu, st.gu[:, F : 2 * F], out=out)


def _behind(group: Group, rows: int, like: Tensor, use: str) -> Tensor:
    """A reused buffer (rows, Σ N + room): of the gradient of a group's output, with what `backward` puts behind it."""
    n = sum(group.sizes) + beside.room(group)
    return scratch(rows * n, like.dtype, like.device, use).view(rows, n)


def _backward(
    spec: Spec, dy: Tensor, x: Tensor, st: _State, t4: Tensor | None, tables: Tables, B: int, T: int, want_dx: bool
):
    """dx (M, d), None where unwanted, and the gradients of the factors.  What `st` holds is overwritten."""
    qkv_g, o_g, gu_g, d_g = spec.groups
    w1, w2 = spec.norms
    t1, t2, t3 = st.ts
    e1, e2, e3, e4 = st.ws
    M, d = x.shape
    F = st.silu.shape[1]
    g, u = st.gu[:, :F], st.gu[:, F : 2 * F]
    dyu = _behind(d_g, M, x, "dy")
    dyu[:, :d] = dy
    dact, u4, db4 = beside.backward(d_g, dyu, t4, e4)  # dL/d(silu(g) u)
    act = _act(st)
    da4 = beside.grad_a(d_g, u4, act)
    torch.mul(dact, u, out=act)
    torch.mul(dact, st.silu, out=u)
    torch.ops.aten.silu_backward.grad_input(act, g, grad_input=g)  # each over the value it was made from
    dh, u3, db3 = beside.backward(gu_g, st.gu, t3, e3)
    da3 = beside.grad_a(gu_g, u3, st.s, st.r2, w2)
    dsu = _behind(o_g, M, x, "ds")
    ds = _norm_backward(dh, dy, st.s, w2, st.r2, out=dsu[:, :d])
    datt, u2, db2 = beside.backward(o_g, dsu, t2, e2)
    da2 = beside.grad_a(o_g, u2, st.att)
    dq, dk, dv = torch.empty_like(st.q), torch.empty_like(st.k), torch.empty_like(st.v)
    dout = torch.empty_like(st.q).copy_(_heads(datt, spec.heads, B, T))
    for (b, t), p in zip(spec.parts, st.p, strict=True):
        given = (dout[b, :, :, t], st.q[b, :, :, t], st.k[b, :, t], st.v[b, :, t], p)
        causal_backward(*given, dq[b, :, :, t], dk[b, :, t], dv[b, :, t], spec.heads[2] ** -0.5, spec.window)
    dqkv = _behind(qkv_g, M, x, "dqkv")
    q_, k_, v_ = _split(dqkv, spec.heads, B, T)
    cos, sin = tables
    _turn(dq, q_, (cos[:, None], sin[:, None]), -1)
    _turn(dk, k_, tables, -1)
    v_.copy_(dv)
    dn, u1, db1 = beside.backward(qkv_g, dqkv, t1, e1, want_dx)
    da1 = beside.grad_a(qkv_g, u1, x, st.r1, w1)
    dx = _norm_backward(dn, ds, x, w1, st.r1) if want_dx else None
    grads = []
    for das, dbs in ((da1, db1), (da2, db2), (da3, db3), (da4, db4)):
        grads += [t for pair in zip(das, dbs, strict=True) if pair[0] is not None for t in pair]
    return dx, grads


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tables, spec, *tensors):
        del tensors  # they are in spec.groups; here so that autograd gives them gradients
        B, T, d = x.shape
        st = _forward(spec, x.reshape(B * T, d), tables, B, T)
        out, t4 = beside.forward(spec.groups[3], _act(st), st.ws[3], anyhow=True)
        ctx.spec, ctx.tables, ctx.buffers, ctx.t4 = spec, tables, mine(), _thin(spec.groups[3], t4)
        ctx.state = st if spec.keep == "all" else None
        ctx.save_for_backward(x)
        return torch.add(st.s, out[:, :d]).view(B, T, d)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        (x,) = ctx.saved_tensors
        B, T, d = x.shape
        x = x.reshape(B * T, d)
        st, ctx.state = ctx.state, None  # a second backward over the same graph makes it again
        with borrowed(ctx.buffers):
            if st is None:
                st = _forward(ctx.spec, x, ctx.tables, B, T)
            dy, want_dx = grads[0].reshape(B * T, d), ctx.needs_input_grad[0]
            dx, made = _backward(ctx.spec, dy, x, st, ctx.t4, ctx.tables, B, T, want_dx)
        return None if dx is None else dx.view(B, T, d), None, None, *made


def block(x: Tensor, tables: Tables, spec: Spec) -> Tensor:
    """The block's output (B, T, d) for x (B, T, d)."""
    return _Block.apply(x, tables, spec, *factors(spec.groups))


def parts_of(documents: Documents | None) -> Parts:
    """All rows at once, or each document by itself."""
    if documents is None:
        return ((slice(None), slice(None)),)
    parts = []
    for b, lengths in enumerate(documents.lengths):
        ends = list(itertools.accumulate(lengths))
        parts += [(slice(b, b + 1), slice(end - n, end)) for n, end in zip(lengths, ends, strict=True)]
    return tuple(parts)


def specs_of(model: Any, x: Tensor, documents: Documents | None, keeping: Keeping) -> list[Spec] | None:
    """What `block` needs of every block of a Llama; None where one of them needs the plain path, as for fused.py."""
    c, parts = model.config, parts_of(documents)
    keep = ["input" if word.startswith("input") else "all" for word in keeping.choose(x)]
    keeping.recordable = False
    found = fusable(model, x)
    if found is None or x.dtype not in (torch.float32, torch.float64):
        return None
    if any(g.parts > 1 or any(t.dtype != x.dtype for t in factors([g])) for _, groups in found for g in groups):
        return None
    eps = x.new_full((), c.eps)
    heads, room, specs = (c.num_heads, c.num_kv_heads, c.head_dim), KEPT_WEIGHTS, []
    for i, (norms, groups) in reversed(list(enumerate(found))):
        four = [w for g in groups for w in g.weights if isinstance(w, Weight4)]
        room -= sum(w.shape[0] * w.shape[1] for w in four) * x.element_size()
        kept = bool(four) and room >= 0 and keep[i] == "all"
        specs.append(Spec(norms, eps, groups, heads, c.window(i), parts, keep[i], kept))
    return specs[::-1]


def tables_of(cos: Tensor, sin: Tensor) -> Tables:
    """Tables of `block` from cos and sin (B or 1, T, 1, D / 2)."""
    return cos.transpose(1, 2), sin.transpose(1, 2)
