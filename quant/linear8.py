"""Linear8bit: a frozen linear layer with a byte a weight, as LLM.int8 checkpoints store it.

    W[n, k] = q[n, k] * SCB[n] / 127        q int8, SCB the largest magnitude of row n, float32
    y = (x qᵀ) * SCB / 127                  a byte is exact in any dtype of x, so the scale comes behind the product
Unlike bitsandbytes' layer, x is not quantized and no column is treated apart: the weight is the stored one.
Source: LLM.int8, arXiv:2208.07339, section 2 (row-wise absmax); numbers equal bitsandbytes' int8_vectorwise_quant.
"""

from typing import Any

import torch
from torch import Tensor, nn


def quantize8(w: Tensor, name: str = "the weight") -> tuple[Tensor, Tensor]:
    """int8 (N, K) and float32 row maxima (N,) of w (N, K). Raises ValueError on NaN or inf."""
    w = w.detach().float()
    if not torch.isfinite(w).all():
        raise ValueError(f"{name} holds NaN or inf, which 8 bits cannot; mend the checkpoint or leave this layer out")
    top = w.abs().amax(dim=1)
    return (w * torch.where(top > 0, 127.0 / top, 0.0)[:, None]).round().to(torch.int8), top


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(q, scale)
        return (x @ q.to(x.dtype).T) * scale.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None]:
        q, scale = ctx.saved_tensors
        return (grad[0] * scale.to(grad[0].dtype)) @ q.to(grad[0].dtype), None, None


class Linear8bit(nn.Module):
    """y = x Wᵀ + bias with W (N, K) in 8 bits; computes in the dtype of x and keeps no decoded weight."""

    weight: Tensor
    SCB: Tensor
    bias: Tensor | None

    def __init__(self, q: Tensor, top: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        if q.dtype != torch.int8 or q.dim() != 2 or top.shape != q.shape[:1]:
            raise ValueError(
                f"wanted an int8 matrix and a scale a row, got {q.dtype} {tuple(q.shape)} and {tuple(top.shape)}"
            )
        self.out_features, self.in_features = q.shape
        self.register_buffer("weight", q)
        self.register_buffer("SCB", top.float())
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    def weight_as(self, dtype: torch.dtype) -> Tensor:
        """The decoded weight (N, K), a fresh tensor, rounded once."""
        return (self.weight.float() * (self.SCB / 127)[:, None]).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = _Product.apply(x, self.weight, self.SCB / 127)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn, recurse=True):
        scale = self.SCB
        super()._apply(fn, recurse)
        if self.SCB.dtype != torch.float32:  # .half() and the like: a scale in 16 bits is another weight
            self.SCB = scale.to(self.SCB.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, int8"
