"""The low-rank update against plain autograd of its formula."""

import pytest
import torch
from torch import Tensor

from lora.kernels.dropout import Drop, keep_mask
from lora.kernels.lowrank import add_low_rank

F64 = torch.float64


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("rows", [(4,), (2, 3), (1, 17)])
def test_add_low_rank_equals_its_formula(rows: tuple[int, ...]) -> None:
    y, x, a, b = torch.randn(*rows, 6), torch.randn(*rows, 9), torch.randn(2, 9), torch.randn(6, 2)
    want = y + 0.5 * (x @ a.T) @ b.T
    torch.testing.assert_close(add_low_rank(y.clone(), x, a, b, 0.5), want, rtol=1e-5, atol=1e-5)


def test_add_low_rank_passes_gradcheck() -> None:
    leaves = [leaf(*shape, dtype=F64) for shape in ((2, 3, 5), (2, 3, 7), (2, 7), (5, 2))]
    # * 1: the sum is written over y, which must be no leaf
    assert torch.autograd.gradcheck(lambda y, x, a, b: add_low_rank(y * 1, x, a, b, 1.5), leaves)


def test_add_low_rank_drops_by_the_counter_and_keeps_no_mask() -> None:
    y, x, a, b = (leaf(*shape, dtype=F64) for shape in ((2, 3, 5), (2, 3, 7), (2, 7), (5, 2)))
    drop = Drop(0.5, torch.tensor([77]), 3)
    mask = keep_mask(6, 7, drop).view(2, 3, 7).double() * drop.scale
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        got = add_low_rank(y * 1, x, a, b, 1.5, drop)
    assert sorted(t.numel() for t in kept) == sorted(t.numel() for t in (x, a, b, drop.seed, x[..., :2]))
    want = y + 1.5 * ((x * mask) @ a.T) @ b.T
    dy = torch.randn(2, 3, 5, dtype=F64)
    for one, other in zip(
        (got, *torch.autograd.grad(got, (y, x, a, b), dy)), (want, *torch.autograd.grad(want, (y, x, a, b), dy)),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_add_low_rank_writes_over_a_fresh_result_and_copies_a_view() -> None:
    x, a, b = torch.randn(4, 9), torch.randn(2, 9), torch.randn(6, 2)
    fresh = torch.randn(4, 6)
    assert add_low_rank(fresh, x, a, b, 1.0).data_ptr() == fresh.data_ptr()
    whole = torch.randn(4, 12)
    before = whole.clone()
    add_low_rank(whole[:, :6], x, a, b, 1.0)
    assert torch.equal(whole, before)
