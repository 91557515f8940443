"""SwiGLU's gate: h = silu(g) * u, silu(g) = g / (1 + exp(-g)).

    du = dh silu(g)       dg = dh u σ (1 + g (1 - σ)),  σ = 1 / (1 + exp(-g))
Only g and u are kept; silu(g) is made again.  Source: arXiv:2002.05202.
"""

import torch
from torch import Tensor


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, u):
        ctx.save_for_backward(g, u)
        return torch.nn.functional.silu(g).mul_(u)

    @staticmethod
    def backward(ctx, *grads):
        (dh,) = grads
        g, u = ctx.saved_tensors
        du = torch.nn.functional.silu(g).mul_(dh)
        dg = torch.ops.aten.silu_backward(dh * u, g)
        return dg, du


def swiglu(g: Tensor, u: Tensor) -> Tensor:
    """silu(g) * u, same shape and dtype."""
    return _SwiGLU.apply(g, u)
