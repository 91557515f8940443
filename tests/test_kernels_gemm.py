"""The two products of a linear layer against the plain ones."""

import pytest
import torch

from lora.kernels import gemm

F64 = torch.float64


@pytest.mark.parametrize("M", [1, 15, 16, 17, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64], ids=str)
def test_gemm_equals_the_plain_product(dtype: torch.dtype, M: int) -> None:
    x, w, dy = torch.randn(M, 37).to(dtype), torch.randn(23, 37).to(dtype), torch.randn(M, 23).to(dtype)
    tol = {torch.float32: 2e-5, torch.bfloat16: 0.2, F64: 1e-12}[dtype]
    torch.testing.assert_close(gemm.linear(x, w).double(), x.double() @ w.double().T, rtol=0, atol=tol)
    torch.testing.assert_close(gemm.matmul(dy, w).double(), dy.double() @ w.double(), rtol=0, atol=tol)


def test_gemm_takes_operands_that_are_not_contiguous() -> None:
    x, w = torch.randn(40, 32).T, torch.randn(40, 24).T  # (32, 40), (24, 40)
    torch.testing.assert_close(gemm.linear(x, w), x @ w.T, rtol=0, atol=2e-5)
    torch.testing.assert_close(gemm.matmul(x, w.T), x @ w.T, rtol=0, atol=2e-5)
