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


def _rows(q: Tensor) -> int:
    """Queries a block, of q (B, H_kv, G, T, D)."""
    B, H, G, T, _ = q.shape
    return min(ROWS, max(16, BUDGET // (B * H * G * T * q.element_size())))


def _blocks(T: int, window: int | None, rows: int) -> Iterator[tuple[int, int, int]]:
    """First query, the one behind the last, and the first key that one of them sees, of each block."""
    for start in range(0, T, rows):
        first = 0 if window is None else max(0, start - window + 1)
        yield start, min(T, start + rows), first


def _queries(q: Tensor, start: int, stop: int) -> Tensor:
    """Of q (B, H_kv, G, T, D) those of a block, (B H_kv, G (stop - start), D): those of one key head together."""
    B, H, G, _, D = q.shape
    return q[:, :, :, start:stop].reshape(B * H, G * (stop - start), D)


def _keys(k: Tensor, first: int, stop: int) -> Tensor:
    """Of k (B, H_kv, T, D) those that a block sees, (B H_kv, stop - first, D)."""
    return k[:, :, first:stop].flatten(0, 1)


def _probabilities(
    q: Tensor, k: Tensor, G: int, scale: float, block: tuple[int, int, int], window: int | None, out: Tensor
) -> Tensor:
    """P (N, G (stop - start), stop - first) of the queries and keys of a block, in the memory of `out`."""
    start, stop, first = block
    n, keys = stop - start, stop - first
    p = out.view(q.shape[0], G * n, keys)
    hidden = _hidden(n, G, q.dtype, q.device)
    if n == keys and n > 1:
        torch.baddbmm(hidden, q, k.mT, alpha=scale, out=p)
    else:
        p.baddbmm_(q, k.mT, beta=0, alpha=scale)
        if n > 1 or window is not None:
            p[..., -n:].add_(hidden)
    if window is not None and keys > window:
        rows, at = torch.arange(start, stop)[:, None], torch.arange(first, stop)
        p.view(-1, n, keys).masked_fill_((at <= rows - window).to(q.device), -torch.inf)
    return torch.ops.aten._softmax.out(p, -1, False, out=p)


_triangles: dict[Any, Tensor] = {}


def _hidden(n: int, G: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """-inf where a key (n) stands behind a query (n), else 0, for each of G heads: (G n, n), made once."""
    key = (n, G, dtype, device)
    if key not in _triangles:
        with torch.inference_mode(False):
            full = torch.full((n, n), -torch.inf, dtype=dtype, device=device)
            _triangles[key] = full.triu_(1).repeat(G, 1)
        if len(_triangles) > 64:  # lengths that came once
            del _triangles[next(iter(_triangles))]
    return _triangles[key]


def causal_forward(
    q: Tensor, k: Tensor, v: Tensor, y: Tensor, scale: float, window: int | None = None, keep: bool = True
) -> list[Tensor] | None:
    """Writes Y into y (B, H_kv, G, T, D), of any strides; returns P, block by block, where it is worth keeping.

    q (B, H_kv, G, T, D); k, v (B, H_kv, T, D).  A query sees itself, what stands before it, and of that the last
    `window` keys, itself counted.
    """
    B, H, G, T, D = q.shape
    N, keep = B * H, keep and T <= SHORT * D
    kept = []
    for start, stop, first in _blocks(T, window, _rows(q)):
        n = N * (stop - start) * G * (stop - first)
        room = torch.empty(n, dtype=q.dtype, device=q.device) if keep else scratch(n, q.dtype, q.device, "scores")
        part, seen = _queries(q, start, stop), _keys(k, first, stop)
        p = _probabilities(part, seen, G, scale, (start, stop, first), window, room)
        y[:, :, :, start:stop] = torch.bmm(p, _keys(v, first, stop)).view(B, H, G, stop - start, D)
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
    scale: float,
    window: int | None = None,
) -> None:
    """Writes dq, dk, dv, of the shapes of q, k, v, from dy (as q); p is what `causal_forward` returned.

    dq, dk and dv are contiguous, or of one row (B = 1) and so within each head.
    """
    B, H, G, T, D = q.shape
    N, rows_of = B * H, _rows(q)
    dk, dv = dk.view(N, T, D), dv.view(N, T, D)
    whole = rows_of >= T
    if not whole:
        dk.zero_()
        dv.zero_()
    for i, (start, stop, first) in enumerate(_blocks(T, window, rows_of)):
        n = N * (stop - start) * G * (stop - first)
        q_, dy_ = _queries(q, start, stop), _queries(dy, start, stop)
        k_ = _keys(k, first, stop)
        if p is None:
            room = scratch(n, q.dtype, q.device, "scores")
            part = _probabilities(q_, k_, G, scale, (start, stop, first), window, room)
        else:
            part = p[i]
        ds = scratch(n, q.dtype, q.device, "dscores").view(part.shape)
        torch.bmm(dy_, _keys(v, first, stop).mT, out=ds)
        if whole:
            torch.bmm(part.mT, dy_, out=dv)
        else:
            dv[:, first:stop].baddbmm_(part.mT, dy_)
        torch.ops.aten._softmax_backward_data.out(ds, part, -1, ds.dtype, grad_input=ds)
        if whole and dq.is_contiguous():
            dq.view(N, G * T, D).baddbmm_(ds, k_, beta=0, alpha=scale)
        else:
            made = torch.bmm(ds, k_).view(B, H, G, stop - start, D)
            torch.mul(made, scale, out=dq[:, :, :, start:stop])
        if whole:
            dk.baddbmm_(ds.mT, q_, beta=0, alpha=scale)
        else:
            dk[:, first:stop].baddbmm_(ds.mT, q_, alpha=scale)


def can_causal(q: Tensor, k: Tensor) -> bool:
    """Whether this is the way for queries and keys of the same tokens: on a CPU, where sums keep all their bits."""
    return (
        not on_gpu(q)
        and q.device.type == "cpu"
        and q.dtype in (torch.float32, torch.float64)
        and q.shape[2] == k.shape[2]
    )


def grouped(q: Tensor, heads: int) -> Tensor:
    """(B, H, T, D) as (B, H_kv, G, T, D), contiguous: the heads that read one key head together."""
    return q.contiguous().unflatten(1, (heads, -1))


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, window, scale):
        B, H, T, D = q.shape
        learns, heads = any(ctx.needs_input_grad), k.shape[1]
        q, k, v = grouped(q, heads), k.contiguous(), v.contiguous()
        y = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device)  # the order in which the output layer reads it
        p = causal_forward(q, k, v, y.transpose(1, 2).unflatten(1, (heads, -1)), scale, window, learns)
        ctx.save_for_backward(q, k, v, *(p or ()))
        ctx.window, ctx.scale, ctx.buffers = window, scale, mine()
        return y.transpose(1, 2)

    @staticmethod
    def backward(ctx, *grads):
        q, k, v, *p = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        with borrowed(ctx.buffers):
            causal_backward(grouped(grads[0], k.shape[1]), q, k, v, p or None, dq, dk, dv, ctx.scale, ctx.window)
        return dq.flatten(1, 2), dk, dv, None, None


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
