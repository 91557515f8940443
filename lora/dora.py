"""DoRA: the weight's direction learned by low rank, the length of each of its rows learned on its own.

    W' = m * (W + s B A) / |W + s B A|      | | and m by rows, (out,); m starts at |W|, so that a fresh W' is W
    y  = y0 + (g - 1) (y0 - bias) + g s (x Aᵀ) Bᵀ,   y0 = base(x),  g = m / |W + s B A|

The lengths enter the gradient as constants, as the paper proposes.  They are found without a dense B A, and without a
copy of W beside the base:
    |W + s B A|² = |W|² + 2 s Σ B ∘ (W Aᵀ) + s² Σ (B (A Aᵀ)) ∘ B      sums over each row; W Aᵀ is r columns
Source: arXiv:2402.09353, sections 4.1 and 4.3; numbers equal peft's use_dora.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lora.kernels.lowrank import add_low_rank
from lora.quant.linear import Linear4bit, is_conv1d
from lora.quant.linear8 import Linear8bit


def dense(base: Any) -> Tensor:
    """The weight (out, in) of a base, float32: a fresh tensor for a quantized or 16-bit one."""
    if isinstance(base, Linear4bit | Linear8bit):
        return base.weight_as(torch.float32)
    return (base.weight.T if is_conv1d(base) else base.weight).float()


def squared_lengths(base: Any) -> Tensor:
    """|W|² of each row (out,), float32."""
    return dense(base).square().sum(dim=1)


@torch.no_grad()
def length(adapter: Any, base: Any) -> Tensor:
    """|W + s B A| (out,), float32; the adapter holds a, b, scale and length2 = |W|²."""
    a, b, s = adapter.a.float(), adapter.b.float(), adapter.scale
    if isinstance(base, Linear4bit | Linear8bit):
        wa = base(a)  # (r, out): rows of A through the layer
        wa = wa if base.bias is None else wa - base.bias.float()
    else:
        wa = a @ dense(base).T
    cross = (b * wa.T).sum(dim=1)
    square = ((b @ (a @ a.T)) * b).sum(dim=1)
    length2 = adapter.length2 + 2 * s * cross + s * s * square
    return length2.clamp(min=1e-30).sqrt()


def contribution(adapter: Any, base: Any, x: Tensor, y0: Tensor, training: bool) -> Tensor:
    """What a DoRA adapter adds to y0 = base(x)."""
    g = (adapter.magnitude.float() / length(adapter, base)).to(y0.dtype)
    h, plain = x, y0
    if adapter.dropout and training:
        h = nn.functional.dropout(x, adapter.dropout, True)
        plain = base(h)
    bias = getattr(base, "bias", None)
    if bias is not None:
        plain = plain - bias.to(plain.dtype)
    scaled = (g - 1) * plain
    low = add_low_rank(
        torch.zeros_like(y0), h.to(y0.dtype), adapter.a.to(y0.dtype), adapter.b.to(y0.dtype), adapter.scale
    )
    return scaled + g * low


def weight_change(adapter: Any, base: Any) -> Tensor:
    """W' - W (out, in), float32."""
    g = (adapter.magnitude.detach().float() / length(adapter, base))[:, None]
    low = (adapter.b.detach().float() @ adapter.a.detach().float()) * adapter.scale
    return (g - 1) * dense(base) + g * low
