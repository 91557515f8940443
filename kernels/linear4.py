"""The linear layer on a 4-bit weight, which never keeps the weight in floats.

    y = x Wᵀ + bias + s (x aᵀ) bᵀ          W (N, K) decoded from the bytes of code4.py when used
    dx = dy W + s (dy b) a      da = s (dy b)ᵀ x      db = s dyᵀ (x aᵀ)      nothing reaches W

Source: QLoRA, arXiv:2305.14314, section 3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora.kernels import gemm
from lora.kernels.code4 import dequantize4, dequantize_scales
from lora.kernels.scratch import scratch


def _unpack(
    q: Tensor, table: Tensor, scales: Sequence[Tensor], block: int, shape: Sequence[int], like: Tensor
) -> Tensor:
    """The weight (N, K) in the dtype of `like`, in the reused buffer: use it before the next call."""
    absmax = scales[0] if len(scales) == 1 else dequantize_scales(scales[0], scales[1], scales[2], scales[3])
    buffer = scratch(2 * q.numel(), like.dtype, q.device, "weight")
    N, K = shape
    return dequantize4(q, absmax, table, block, N * K, like.dtype, out=buffer).view(N, K)


class _Linear4(torch.autograd.Function):
    """y = x Wᵀ + bias + s (x aᵀ) bᵀ.  W is unpacked twice and kept never: that is QLoRA's memory.

    The low-rank part is here, and not a layer of its own, so that its share of dx is added where dx lies.
    """

    @staticmethod
    def forward(ctx, x, bias, a, b, s, block, shape, q, table, *scales):
        ctx.block, ctx.shape, ctx.s = block, shape, s
        flat = x.reshape(-1, shape[1])  # (..., K) -> (M, K)
        y = gemm.linear(flat, _unpack(q, table, scales, block, shape, x))
        if bias is not None:
            y += bias
        xa = None
        if a is not None:
            xa = gemm.linear(flat, a)  # (M, K) (K, r) -> (M, r)
            y.addmm_(xa, b.T, alpha=s)  # (M, r) (r, N)
        ctx.save_for_backward(None if a is None else x, a, b, xa, q, table, *scales)
        # not .view: the result must be no view, so that a further update can be added to it in place
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], shape[0]])

    @staticmethod
    def backward(ctx, *grads):
        (dy,) = grads
        x, a, b, xa, q, table, *scales = ctx.saved_tensors
        flat = dy.reshape(-1, ctx.shape[0])  # (M, N)
        dx = dbias = da = db = dxa = None
        if a is not None:
            dxa = gemm.matmul(flat, b).mul_(ctx.s)  # (M, N) (N, r) -> (M, r)
            da = gemm.matmul(dxa.T, x.reshape(-1, ctx.shape[1]))  # (r, M) (M, K)
            db = (flat.T @ xa).mul_(ctx.s)  # (N, M) (M, r)
        if ctx.needs_input_grad[0]:
            dx = gemm.matmul(flat, _unpack(q, table, scales, ctx.block, ctx.shape, dy))
            if dxa is not None:
                dx.addmm_(dxa, a)
            dx = dx.view(*dy.shape[:-1], ctx.shape[1])
        if ctx.needs_input_grad[1]:
            dbias = flat.sum(dim=0)
        return dx, dbias, da, db, *(None for _ in range(5 + len(scales)))


def linear4(
    x: Tensor,
    q: Tensor,
    table: Tensor,
    scales: Sequence[Tensor],
    block: int,
    shape: Sequence[int],
    bias: Tensor | None = None,
    low: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """x (..., K) through a frozen 4-bit weight (N, K), in the dtype of x; no gradient reaches the weight.

    `scales` is (absmax,), or for double quantization (q, code, absmax, offset) of `dequantize_scales`.
    `low` is (a (r, K), b (N, r), s) of a low-rank update, which does get gradients.
    """
    a, b, s = low or (None, None, 0.0)
    return _Linear4.apply(x, bias, a, b, s, block, tuple(shape), q, table, *scales)
