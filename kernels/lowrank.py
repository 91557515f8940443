"""The low-rank update added to a base layer's output, in place.

    y + s (d(x) aᵀ) bᵀ       x (..., K)   a (r, K)   b (N, r)   y (..., N)
    dx = d(s (dy b) a)       da = s (dy b)ᵀ d(x)     db = s dyᵀ (d(x) aᵀ)     dy passes through

d is a dropout by a counter (dropout.py), if any.  Kept for the backward: x, where a is trained (layers around it keep
it too), the (M, r) product and the dropout's seed: no full-size copy, and no mask.
Source: LoRA, arXiv:2106.09685, section 4.1.
"""

import torch
from torch import Tensor

from lora.kernels import gemm
from lora.kernels.dropout import Drop, dropped, dropped_copy
from lora.kernels.scratch import borrowed, mine


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, a, b, s, drop):
        M, r = x.numel() // x.shape[-1], a.shape[0]
        flat = x.reshape(M, -1)
        xa = gemm.linear(flat if drop is None else dropped_copy(flat, drop), a)  # (M, K) (K, r) -> (M, r)
        y.view(M, -1).addmm_(xa, b.T, alpha=s)  # (M, r) (r, N)
        seed = None if drop is None else drop.seed
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, a, b, xa, seed)  # only da reads x
        ctx.s, ctx.M, ctx.r, ctx.shape, ctx.drop, ctx.buffers = s, M, r, x.shape, drop, mine()
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx, *grads):
        (dy,) = grads
        x, a, b, xa, seed = ctx.saved_tensors
        drop = None if seed is None else ctx.drop._replace(seed=seed)
        flat = dy.reshape(ctx.M, -1)
        dx = da = db = None
        dxa = gemm.matmul(flat, b).mul_(ctx.s)  # (M, N) (N, r) -> (M, r)
        if ctx.needs_input_grad[1]:
            dx = gemm.matmul(dxa, a)
            dx = (dx if drop is None else dropped(dx, drop, dx)).view(ctx.shape)
        if ctx.needs_input_grad[2]:
            with borrowed(ctx.buffers):
                x = x.reshape(ctx.M, -1)
                da = gemm.matmul(dxa.T, x if drop is None else dropped_copy(x, drop))  # (r, M) (M, K)
        if ctx.needs_input_grad[3]:
            db = (flat.T @ xa).mul_(ctx.s)  # (N, M) (M, r)
        return dy, dx, da, db, None, None


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, s: float, drop: Drop | None = None) -> Tensor:
    """y + s (d(x) aᵀ) bᵀ, written over y, which must be a fresh result; all of one dtype."""
    if torch.compiler.is_compiling():  # a compiler fuses the plain formula by itself, and cannot look into ours
        return y + (x @ a.T @ b.T) * s
    if y._is_view() or not y.is_contiguous():  # some layers end in a view, whose in-place change autograd forbids
        y = y.clone(memory_format=torch.contiguous_format)
    return _AddLowRank.apply(y, x, a, b, s, drop)
