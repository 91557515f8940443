"""Causal attention in torch products, a block of queries at a time: what a CPU does fastest, forward and backward.

    S = scale Q Kᵀ, -inf where the key lies behind the query or outside its window     P = softmax(S)     Y = P V
    dV = Pᵀ dY      dP = dY Vᵀ      dS = P (dP - Σ dP P)      dQ = scale dS K      dK = scale dSᵀ Q

Queries come in blocks of 128, and keys that a whole block cannot see are never multiplied.  The G query heads that
read one key head stand under each other, so that a product has 128 G rows and keys are never repeated.  P is kept for
the backward where texts are short, and made a second time where it would take much more memory than all else.

2 x 512 tokens, 9 heads of 64 on 3 of keys, float32, forward and backward on two cores: LOG.md, 2026-11-27.
Source: the blocks are those of FlashAttention-2, arXiv:2307.08691, without its running softmax: a CPU's cache
holds all keys of a row of scores.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lora.kernels.dispatch import on_gpu
from lora.kernels.scratch import borrowed, mine, scratch

ROWS = 128  # queries a block, fewer where
BUDGET = 2**26  # bytes of its scores would be more, but no fewer than 16
SHORT = 8  # P is kept where a text has at most so many times D tokens


def _merged(t: Tensor) -> Tensor:
    """(B, H, ...) as (B H, ...), the same memory."""
    return t.view(t.shape[0] * t.shape[1], *t.shape[2:])


def _rows(q: Tensor) -> int:
    """Queries a block, of q (N, T, G, D)."""
    N, T, G, _ = q.shape
    return min(ROWS, max(16, BUDGET // (N * G * T * q.element_size())))


def _blocks(T: int, window: int | None, rows: int) -> Iterator[tuple[int, int, int]]:
    """First query, the one behind the last, and the first key that one of them sees, of each block."""
    for start in range(0, T, rows):
        first = 0 if window is None else max(0, start - window + 1)
        yield start, min(T, start + rows), first


def _probabilities(q: Tensor, k: Tensor, start: int, stop: int, first: int, window: int | None, out: Tensor) -> Tensor:
    """P (N, (stop - start) G, stop - first) of a block of queries, in the memory of `out`."""
    N, _, G, D = q.shape
    p = out.view(N, (stop - start) * G, stop - first)
    torch.bmm(q[:, start:stop].reshape(N, -1, D), k[:, first:stop].mT, out=p)
    if stop - start > 1 or window is not None:
        p.view(N, stop - start, G, stop - first)[..., -(stop - start) :].add_(_hidden(stop - start, q.dtype, q.device))
    if window is not None and stop - first > window:
        rows, keys = torch.arange(start, stop)[:, None], torch.arange(first, stop)
        old = (keys <= rows - window)[:, None].to(q.device)
        p.view(N, stop - start, G, stop - first).masked_fill_(old, -torch.inf)
    return torch.ops.aten._softmax.out(p, -1, False, out=p)


_triangles: dict[Any, Tensor] = {}


def _hidden(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """-inf where a key (n) stands behind a query (n), else 0: (n, 1, n), made once."""
    key = (n, dtype, device)
    if key not in _triangles:
        with torch.inference_mode(False):
            full = torch.full((n, n), -torch.inf, dtype=dtype, device=device)
            _triangles[key] = full.triu_(1)[:, None]
        if len(_triangles) > 64:  # lengths that came once
            del _triangles[next(iter(_triangles))]
    return _triangles[key]


def causal_forward(
    q: Tensor, k: Tensor, v: Tensor, y: Tensor, window: int | None = None, keep: bool = True
) -> list[Tensor] | None:
    """Writes Y into y (B, H_kv, T, G, D), of any strides; returns P, block by block, where it is worth keeping.

    q (B, H_kv, T, G, D), already times the scale; k, v (B, H_kv, T, D).  A query sees itself, what stands before it,
    and of that the last `window` keys, itself counted.  q, k and v are contiguous, or of one row (B = 1) and so
    within each head.
    """
    B, H, T, G, D = q.shape
    q, k, v = (_merged(t) for t in (q, k, v))
    N, keep = B * H, keep and T <= SHORT * D
    kept = []
    for start, stop, first in _blocks(T, window, _rows(q)):
        n = N * (stop - start) * G * (stop - first)
        room = torch.empty(n, dtype=q.dtype, device=q.device) if keep else scratch(n, q.dtype, q.device, "scores")
        p = _probabilities(q, k, start, stop, first, window, room)
        y[:, :, start:stop] = torch.bmm(p, v[:, first:stop]).view(B, H, stop - start, G, D)
        if keep:
            kept.append(p)
    return kept if keep else None


def causal_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: list[Tensor] | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    window: int | None = None,
) -> None:
    """Writes dq, dk, dv, shaped and laid out as q, k, v, from dy (as q); p is what `causal_forward` returned.

    dq is the gradient of the scaled q that was given.
    """
    T, G, D = q.shape[2:]
    dy, q, k, v, dq, dk, dv = (_merged(t) for t in (dy, q, k, v, dq, dk, dv))
    N, rows_of = q.shape[0], _rows(q)
    whole = rows_of >= T
    if not whole:
        dk.zero_()
        dv.zero_()
    for i, (start, stop, first) in enumerate(_blocks(T, window, rows_of)):
        rows = slice(start, stop)
        n = N * (stop - start) * G * (stop - first)
        if p is None:
            part = _probabilities(q, k, start, stop, first, window, scratch(n, q.dtype, q.device, "scores"))
        else:
            part = p[i]
        q_, dy_ = (t[:, rows].reshape(N, -1, D) for t in (q, dy))
        ds = torch.bmm(dy_, v[:, first:stop].mT, out=scratch(n, q.dtype, q.device, "dscores").view(part.shape))
        if whole:
            torch.bmm(part.mT, dy_, out=dv)
        else:
            dv[:, first:stop].baddbmm_(part.mT, dy_)
        torch.ops.aten._softmax_backward_data.out(ds, part, -1, ds.dtype, grad_input=ds)
        dq[:, rows] = torch.bmm(ds, k[:, first:stop]).view(N, stop - start, G, D)
        if whole:
            torch.bmm(ds.mT, q_, out=dk)
        else:
            dk[:, first:stop].baddbmm_(ds.mT, q_)


def grouped(q: Tensor, heads: int, scale: float) -> Tensor:
    """(B, H, T, D) times the scale as (B, H_kv, T, G, D), contiguous: the heads that read one key head together."""
    B, H, T, D = q.shape
    out = torch.empty(B, heads, T, H // heads, D, dtype=q.dtype, device=q.device)
    return torch.mul(q.view(B, heads, H // heads, T, D).transpose(2, 3), scale, out=out)


def can_causal(q: Tensor, k: Tensor) -> bool:
    """Whether this is the way for queries and keys of the same tokens: on a CPU, where sums keep all their bits."""
    return (
        not on_gpu(q)
        and q.device.type == "cpu"
        and q.dtype in (torch.float32, torch.float64)
        and q.shape[2] == k.shape[2]
    )


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, window, scale):
        B, H, T, D = q.shape
        learns = any(ctx.needs_input_grad)
        q, k, v = grouped(q, k.shape[1], scale), k.contiguous(), v.contiguous()
        y = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device)  # the order in which the output layer reads it
        p = causal_forward(q, k, v, y.view(B, T, *q.shape[1:2], *q.shape[3:]).transpose(1, 2), window, learns)
        ctx.save_for_backward(q, k, v, *(p or ()))
        ctx.window, ctx.scale, ctx.buffers = window, scale, mine()
        return y.transpose(1, 2)

    @staticmethod
    def backward(ctx, *grads):
        q, k, v, *p = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        with borrowed(ctx.buffers):
            causal_backward(grouped(grads[0], k.shape[1], 1.0), q, k, v, p or None, dq, dk, dv, ctx.window)
        B, _, T, _, D = q.shape
        return dq.mul_(ctx.scale).transpose(2, 3).reshape(B, -1, T, D), dk, dv, None, None


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, scale: float | None = None
) -> Tensor:
    """softmax(scale q kᵀ) v, (B, H, T, D), a query seeing the last `window` keys up to itself; None: all of them.

    q (B, H, T, D); k, v (B, H_kv, T, D), H a multiple of H_kv.  `scale` defaults to D ** -0.5.
    """
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[2:] != q.shape[2:] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"queries {tuple(q.shape)}, keys {tuple(k.shape)} and values {tuple(v.shape)}; they must be (B, H, T, D) "
            "and twice (B, H_kv, T, D) with H a multiple of H_kv"
        )
    return _Causal.apply(q, k, v, window, q.shape[-1] ** -0.5 if scale is None else scale)
