"""What a kernel is held to: its twin's own error against float64, a tenth more, and a rounding or two."""

import torch
from torch import Tensor

SLACK = 2.0**-22  # of the largest value


def assert_as_good(got: Tensor, twin: Tensor, exact: Tensor) -> None:
    """`got` is at most 1.1 x as far from `exact` (float64) as its twin is, and of the same dtype and shape."""
    assert got.dtype == twin.dtype and got.shape == twin.shape == exact.shape
    exact = exact.to(got.device)
    error, allowed = (got.double() - exact).abs().max(), (twin.to(got.device).double() - exact).abs().max()
    assert error <= 1.1 * allowed + SLACK * exact.abs().max()


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def grads_of(y: Tensor, dy: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(y, leaves, dy))


def dtypes() -> list[torch.dtype]:
    """Those whose rounding is right where the tests run: Triton's interpreter cuts bfloat16 off."""
    gpu = torch.cuda.is_available()
    return [torch.float32, torch.float16, *([torch.bfloat16] if gpu else [])]
