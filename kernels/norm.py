"""RMSNorm: y = w * (x / sqrt(mean(x²) + eps)), the mean over the last axis, in float32 whatever x is.

The normalised value is rounded to the dtype of x before it meets w, as in Llama's published code.
    dx = r (g - x r² mean(g x)),  g = dy w,  r = 1 / sqrt(mean(x²) + eps)         dw = Σ dy x r
Source: arXiv:1910.07467, and transformers' LlamaRMSNorm, whose numbers it matches.
"""

import torch
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, eps):
        x32 = x.float()
        r = torch.rsqrt(x32.square().mean(dim=-1, keepdim=True).add_(eps))  # (..., 1)
        ctx.save_for_backward(x, w, r)
        return (x32 * r).to(x.dtype).mul_(w) if w.dtype == x.dtype else (x32 * r).to(x.dtype) * w

    @staticmethod
    def backward(ctx, *grads):
        (dy,) = grads
        x, w, r = ctx.saved_tensors
        x32 = x.float()
        g = dy.float() * w.float()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            c = (g * x32).mean(dim=-1, keepdim=True).mul_(r.square()).neg_()  # (..., 1)
            dx = torch.addcmul(g, x32, c).mul_(r).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dw = (dy.float() * (x32 * r)).flatten(0, -2).sum(dim=0).to(w.dtype)
        return dx, dw, None


def rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """RMSNorm of x (..., d) with weight w (d,)."""
    return _RMSNorm.apply(x, w, eps)
