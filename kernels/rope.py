"""Rotary position embedding: each pair (x_i, x_{i+D/2}) is turned by the angle position * inv_freq_i.

    y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin          (halves, not neighbours: the layout of
                                                               Hugging Face checkpoints)
The backward is the same turn by the opposite angle, so only cos and sin are kept.
Source: arXiv:2104.09864; transformers' apply_rotary_pos_emb, whose numbers it matches.
"""

import torch
from torch import Tensor


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half:]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(x1, cos, out=y[..., :half]).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=y[..., half:]).addcmul_(x1, sin)
    return y


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx, *grads):
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, -sin), None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, D) turned by cos and sin (B or 1, T, 1, D/2), all of one dtype."""
    return _Rope.apply(x, cos, sin)
