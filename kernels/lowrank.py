"""The low-rank update added to a base layer's output, in place.

    y + s (x aᵀ) bᵀ          x (..., K)   a (r, K)   b (N, r)   y (..., N)
    dx = s (dy b) a          da = s (dy b)ᵀ x         db = s dyᵀ (x aᵀ)         dy passes through

Kept for the backward: x, where a is trained (layers around it keep it too), and the (M, r) product: no full-size copy.
Source: LoRA, arXiv:2106.09685, section 4.1.
"""

import torch
from torch import Tensor

from lora.kernels import gemm


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, a, b, s):
        M, r = x.numel() // x.shape[-1], a.shape[0]
        xa = gemm.linear(x.reshape(M, -1), a)  # (M, K) (K, r) -> (M, r)
        y.view(M, -1).addmm_(xa, b.T, alpha=s)  # (M, r) (r, N)
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, a, b, xa)  # only da reads x
        ctx.s, ctx.M, ctx.r, ctx.shape = s, M, r, x.shape
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx, *grads):
        (dy,) = grads
        x, a, b, xa = ctx.saved_tensors
        flat = dy.reshape(ctx.M, -1)
        dx = da = db = None
        dxa = gemm.matmul(flat, b).mul_(ctx.s)  # (M, N) (N, r) -> (M, r)
        if ctx.needs_input_grad[1]:
            dx = gemm.matmul(dxa, a).view(ctx.shape)
        if ctx.needs_input_grad[2]:
            da = gemm.matmul(dxa.T, x.reshape(ctx.M, -1))  # (r, M) (M, K)
        if ctx.needs_input_grad[3]:
            db = (flat.T @ xa).mul_(ctx.s)  # (N, M) (M, r)
        return dy, dx, da, db, None


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
    """y + s (x aᵀ) bᵀ, written over y, which must be a fresh result; all of one dtype."""
    if torch.compiler.is_compiling():  # a compiler fuses the plain formula by itself, and cannot look into ours
        return y + (x @ a.T @ b.T) * s
    if y._is_view() or not y.is_contiguous():  # some layers end in a view, whose in-place change autograd forbids
        y = y.clone(memory_format=torch.contiguous_format)
    return _AddLowRank.apply(y, x, a, b, s)
