"""Frozen linear layers in 16 bits on a GPU, their updates beside them where that costs least.

    forward    Y_i = X W_iᵀ + bias_i + T_i b_iᵀ       T_i = s_i d_i(X) a_iᵀ
    backward   dX = Σ dY_i W_i + d_i(U_i a_i)         U_i = s_i dY_i b_i
               da_i = U_iᵀ d_i(X)                     db_i = dY_iᵀ T_i

Where Y (or dX) is larger than the cache takes, the update's product is made first and the base's added to it: that
reads it while it multiplies, where the update behind the base would read and write it on its own time.  In columns of
the base's product, as decoder blocks have it (fold.py), X and dY must be copied to have room, into buffers that all
layers keep, and so must a dense W.  r = 16, 8192 rows, what the update adds to forward and backward of its base, here
and there, on an H100 and an H200, in percent (benchmarks/bench_linear.py; LOG.md, 2026-11-27):
    NF4     4096 x 4096  25, 31 and 20, 38     14336 x 4096  16, 21 and 12, 22     4096 x 14336  17, 19 and 13, 24
    dense   4096 x 4096  27, 42 and 22, 48     14336 x 4096  19, 37 and 14, 34     4096 x 14336  17, 26 and 15, 31
The forward alone of an NF4 base with N > K is 5 % faster there on an H100, and 2 to 4 % slower on an H200.

d_i is the dropout of an update, a function of a seed (dropout.py): made again in the backward, kept nowhere.  Kept are
X, where an a learns (layers around it keep it too), T (M, Σ r), the factors in 16 bits, and the seed.

W_i (N_i, K) in 4 bits are decoded one under the other into a reused buffer, and Y_i are columns of one product; dense
ones are read where they lie, by a product each.
Source: LoRA, arXiv:2106.09685, section 4.1; QLoRA, arXiv:2305.14314, section 3.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora.kernels.code4 import Low, Weight4
from lora.kernels.dispatch import on_gpu
from lora.kernels.dropout import Drop, dropped, dropped_copy
from lora.kernels.fold import product32
from lora.kernels.op import PLAIN
from lora.kernels.scratch import borrowed, mine, scratch
from lora.kernels.unpack import joined, unpack

HALVES = (torch.bfloat16, torch.float16)
# Bytes of Y from which the update comes first.  What it adds to the base's product on an H200, behind it and first, for
# 4096 x 4096 and r = 16: 10.5 and 11.0 % at 16 MiB, 11.6 and 11.3 at 24, 12.0 and 10.1 at 32, 12.4 and 7.9 at 64
LARGE = 24 * 2**20


def can_linear16(x: Tensor, *weights: Tensor) -> bool:
    """Whether `linears16` takes x (..., K) to weights, given the memory of each: 16 bits on a GPU, and no compiler to
    see through it.
    """
    if torch.compiler.is_compiling() or not on_gpu(x) or x.dtype not in HALVES:
        return False
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype:
        return False
    # a dry run's tensors are none of the plain ones
    return all(w.device == x.device for w in weights) and (
        not x.is_cuda or all(type(t) in PLAIN for t in (x, *weights))
    )


def _parts(t: Tensor, ranks: Sequence[int], dim: int = 1) -> list[Any]:
    """The r_i columns (or rows) of each layer, None for one without an update."""
    if len(ranks) == 1:
        return [t]
    return [part if r else None for part, r in zip(t.split(ranks, dim=dim), ranks, strict=True)]


def _product(x: Tensor, a: Tensor, s: float, out: Tensor) -> None:
    """out = s x a; the scale rides in the product, and what stood in `out` is not read."""
    torch.addmm(out, x, a, beta=0, alpha=s, out=out)


def _down(x: Tensor, a: Tensor, ranks: Sequence[int], scales: Sequence[float], drops: Sequence[Drop | None]) -> Tensor:
    """T (M, Σ r) of x (M, K) and all a_i (Σ r, K)."""
    t = x.new_empty(x.shape[0], a.shape[0])
    if len(scales) > 1 and not any(drops):
        have = {s for s, r in zip(scales, ranks, strict=True) if r}
        if len(have) == 1:  # as it mostly is
            _product(x, a.T, have.pop(), t)
            return t
    for part, rows, s, drop in zip(_parts(t, ranks), _parts(a, ranks, 0), scales, drops, strict=True):
        if part is not None:
            _product(x if drop is None else dropped_copy(x, drop), rows.T, s, part)
    return t


def _is_large(M: int, N: int, like: Tensor) -> bool:
    return M * N * like.element_size() >= LARGE


def _one(x: Tensor, w: Tensor, bias: Tensor | None, t: Tensor | None, b: Any) -> Tensor:
    """Y (M, N) of x (M, K), w (N, K), T (M, r) and b (N, r)."""
    if t is not None and _is_large(x.shape[0], w.shape[0], x):
        y = torch.mm(t, b.T) if bias is None else torch.addmm(bias, t, b.T)
        return y.addmm_(x, w.T)
    y = torch.mm(x, w.T) if bias is None else torch.addmm(bias, x, w.T)
    return y if t is None else y.addmm_(t, b.T)


def _side_by_side(
    x: Tensor, w: Tensor, sizes: Sequence[int], layers: Sequence[tuple[Tensor | None, Any, Any]]
) -> tuple[Tensor, ...]:
    """Y_i (M, N_i), columns of one buffer, of x (M, K), w (Σ N, K), and bias, T_i and b_i of each layer."""
    whole = x.new_empty(x.shape[0], w.shape[0])
    ys, large = whole.split(sizes, dim=1), _is_large(whole.shape[0], whole.shape[1], x)
    if not large:
        torch.mm(x, w.T, out=whole)
    for y, (bias, t, b) in zip(ys, layers, strict=True):
        if not large:
            if bias is not None:
                y += bias
            if t is not None:
                y.addmm_(t, b.T)
        elif t is None:
            y.zero_() if bias is None else y.copy_(bias)
        elif bias is None:
            torch.mm(t, b.T, out=y)
        else:
            torch.addmm(bias, t, b.T, out=y)
    if large:
        whole.addmm_(x, w.T)
    return ys


def _back(
    dys: Sequence[Tensor], weights: Sequence[Any], u: Tensor, a: Tensor, ranks: Sequence[int], drops: Sequence[Any]
) -> Tensor:
    """dX (M, K) of dY_i (M, N_i), all U_i (M, Σ r) and a_i (Σ r, K)."""
    if isinstance(weights[0], Weight4):
        weights, dys = [unpack(weights, u)], [dys[0] if len(dys) == 1 else joined(dys)]
    dx: Tensor | None = None
    if any(drops):
        dx = _dropped_updates(u, a, ranks, drops)
    elif _is_large(u.shape[0], a.shape[1], u):
        dx = u @ a  # (M, Σ r) (Σ r, K)
    first = dx is not None
    for dy, w in zip(dys, weights, strict=True):
        dx = dy @ w if dx is None else dx.addmm_(dy, w)  # (M, N) (N, K)
    assert dx is not None
    return dx if first else dx.addmm_(u, a)


def _dropped_updates(u: Tensor, a: Tensor, ranks: Sequence[int], drops: Sequence[Any]) -> Tensor:
    """Σ d_i(U_i a_i) (M, K)."""
    dx: Tensor | None = None
    for part, rows, drop in zip(_parts(u, ranks), _parts(a, ranks, 0), drops, strict=True):
        if part is None:
            continue
        if dx is None:
            dx = part @ rows
            if drop is not None:
                dropped(dx, drop, dx)
        elif drop is None:
            dx.addmm_(part, rows)
        else:
            more = scratch(dx.numel(), dx.dtype, dx.device, "dropped").view(dx.shape)
            dropped(torch.mm(part, rows, out=more), drop, dx, add=True)
    assert dx is not None
    return dx


def _grad_a(x: Tensor, u: Tensor, ranks: Sequence[int], drops: Sequence[Any]) -> list[Tensor | None]:
    """da_i of x (M, K) and all U_i (M, Σ r)."""
    if not any(drops):
        return _parts(product32(u.T, x), ranks, 0)  # (Σ r, M) (M, K)
    pairs = zip(_parts(u, ranks), drops, strict=True)
    return [None if p is None else product32(p.T, x if d is None else dropped_copy(x, d)) for p, d in pairs]


class _Linear16(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, scales, drops, *tensors):
        """`tensors`: bias, a and b of each layer in turn (None where there is none); `scales`: s of each."""
        K = weights[0].shape[1]
        flat = x.reshape(-1, K)  # (..., K) -> (M, K)
        biases, a_s = tensors[::3], tensors[1::3]
        b_s = [None if b is None else b.to(x.dtype) for b in tensors[2::3]]
        have = [a.to(x.dtype) for a in a_s if a is not None]
        a = have[0] if len(have) == 1 else torch.cat(have)
        ranks = [0 if a is None else a.shape[0] for a in a_s]
        t = _down(flat, a, ranks, scales, drops)
        layers = list(zip(biases, _parts(t, ranks), b_s, strict=True))
        if not isinstance(weights[0], Weight4):
            ys = tuple(_one(flat, w, *layer) for w, layer in zip(weights, layers, strict=True))
        elif len(weights) == 1:
            ys = (_one(flat, unpack(weights, x), *layers[0]),)
        else:
            ys = _side_by_side(flat, unpack(weights, x), [w.shape[0] for w in weights], layers)
        needs_x = any(ctx.needs_input_grad[5::3])  # only the gradient of an a reads it
        # the seeds too: a block that runs again in the backward gets all that its second run made, or nothing of it
        seeds = [drop.seed for drop in drops if drop]
        ctx.save_for_backward(x if needs_x else None, t, a, *b_s, *seeds)
        ctx.weights, ctx.scales, ctx.drops, ctx.ranks, ctx.buffers = weights, scales, drops, ranks, mine()
        if x.ndim == 2:
            return ys
        if ys[0]._is_view():
            return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)
        # no view: what is one cannot have a further update added to it in place
        return tuple(torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[1]]) for y in ys)

    @staticmethod
    def backward(ctx, *grads):
        weights, ranks, n = ctx.weights, ctx.ranks, len(ctx.weights)
        x, t, a, *saved = ctx.saved_tensors
        b_s, seeds = saved[:n], iter(saved[n:])
        drops = [drop and drop._replace(seed=next(seeds)) for drop in ctx.drops]
        dys = [dy.reshape(-1, w.shape[0]) for dy, w in zip(grads, weights, strict=True)]  # (M, N)
        u = torch.empty_like(t)
        us, ts = _parts(u, ranks), _parts(t, ranks)
        made: list[Tensor | None] = []
        with borrowed(ctx.buffers):
            for dy, b, s, part in zip(dys, b_s, ctx.scales, us, strict=True):
                if b is not None:
                    _product(dy, b, s, part)  # (M, N) (N, r)
            das = [None] * n if x is None else _grad_a(x.reshape(-1, x.shape[-1]), u, ranks, drops)
            for i, (dy, da, part) in enumerate(zip(dys, das, ts, strict=True)):
                dbias = dy.sum(dim=0) if ctx.needs_input_grad[4 + 3 * i] else None
                made += [dbias, da, None if part is None else product32(dy.T, part)]  # (N, M) (M, r)
            dx = None
            if ctx.needs_input_grad[0]:
                dx = _back(dys, weights, u, a, ranks, drops).view(*grads[0].shape[:-1], a.shape[1])
        return (dx, None, None, None, *made)


def linears16(
    x: Tensor,
    weights: Sequence[Weight4 | Tensor],
    biases: Sequence[Tensor | None],
    lows: Sequence[Low | None],
    drops: Sequence[Drop | None] = (),
) -> tuple[Tensor, ...]:
    """x (..., K) through frozen weights (N_i, K), all in 4 bits or all dense, with their updates (a, b, s).

    One has an update at least, each may have a dropout; gradients reach x, the biases and the factors.  Only where
    `can_linear16` says so.  Results of 4-bit weights are columns of one buffer, so their rows do not lie end to end.
    """
    tensors: list[Tensor | None] = []
    for bias, low in zip(biases, lows, strict=True):
        tensors += [bias, *(low[:2] if low else (None, None))]
    scales = [low[2] if low else 1.0 for low in lows]
    return _Linear16.apply(x, weights, scales, drops or [None] * len(scales), *tensors)
