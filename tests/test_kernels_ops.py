"""The hand-written forwards and backwards against plain autograd of their formulas."""

import pytest
import torch
from torch import Tensor

from lora.kernels import cross_entropy, gemm
from lora.kernels.cross_entropy import linear_cross_entropy
from lora.kernels.lowrank import add_low_rank
from lora.kernels.norm import rms_norm
from lora.kernels.rope import rope
from lora.kernels.swiglu import swiglu

F64 = torch.float64


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def grads_of(y: Tensor, dy: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(y, leaves, dy))


# ---- gemm ----
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


# ---- rms_norm ----
def norm_formula(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return w * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


@pytest.mark.parametrize("shape", [(7,), (5, 8), (2, 3, 33)])
def test_rms_norm_equals_its_formula_and_gradient(shape: tuple[int, ...]) -> None:
    x, w, dy = leaf(*shape), leaf(shape[-1]), torch.randn(*shape)
    ours = rms_norm(x, w, 1e-6)
    x64, w64 = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    want = norm_formula(x64, w64, 1e-6)
    torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=1e-6)
    if len(shape) > 1:
        for got, right in zip(grads_of(ours, dy, [x, w]), grads_of(want, dy.double(), [x64, w64]), strict=True):
            torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-5)


def test_rms_norm_in_bfloat16_rounds_before_the_weight_as_llama_does() -> None:
    x, w = torch.randn(4, 64).bfloat16(), torch.randn(64).bfloat16()
    x32 = x.float()
    want = w * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-5)).to(torch.bfloat16)
    assert torch.equal(rms_norm(x, w, 1e-5), want)


def test_rms_norm_does_not_depend_on_the_scale_of_its_input() -> None:
    x, w = torch.randn(6, 50), torch.randn(50)
    torch.testing.assert_close(rms_norm(x * 1000, w, 0.0), rms_norm(x, w, 0.0), rtol=1e-5, atol=1e-6)


def test_rms_norm_of_zeros_is_zero_with_a_finite_gradient() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    y = rms_norm(x, torch.ones(8), 1e-6)
    y.sum().backward()
    assert (y == 0).all() and x.grad is not None and torch.isfinite(x.grad).all()


# ---- rope ----
def angles(B: int, T: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = torch.randn(B, T, 1, D // 2, dtype=dtype)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("batch", [1, 3])
def test_rope_equals_a_complex_turn(batch: int) -> None:
    x = torch.randn(3, 5, 4, 10, dtype=F64)
    cos, sin = angles(batch, 5, 10, F64)
    turned = torch.complex(x[..., :5], x[..., 5:]) * torch.complex(cos, sin)
    torch.testing.assert_close(rope(x, cos, sin), torch.cat((turned.real, turned.imag), dim=-1))


def test_rope_passes_gradcheck() -> None:
    cos, sin = angles(1, 3, 6, F64)
    assert torch.autograd.gradcheck(lambda x: rope(x, cos, sin), [leaf(2, 3, 2, 6, dtype=F64)])


def test_rope_keeps_lengths_and_its_opposite_undoes_it() -> None:
    x = torch.randn(2, 7, 3, 16)
    cos, sin = angles(2, 7, 16, torch.float32)
    y = rope(x, cos, sin)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rope(y, cos, -sin), x, rtol=1e-5, atol=1e-6)


def test_rope_takes_a_transposed_input() -> None:
    x = torch.randn(2, 3, 7, 16).transpose(1, 2)
    cos, sin = angles(1, 7, 16, torch.float32)
    assert torch.equal(rope(x, cos, sin), rope(x.contiguous(), cos, sin))


# ---- swiglu ----
def test_swiglu_equals_its_formula() -> None:
    g, u = torch.randn(5, 9, dtype=F64) * 4, torch.randn(5, 9, dtype=F64)
    torch.testing.assert_close(swiglu(g, u), g / (1 + torch.exp(-g)) * u)


def test_swiglu_passes_gradcheck() -> None:
    assert torch.autograd.gradcheck(swiglu, [leaf(3, 7, dtype=F64), leaf(3, 7, dtype=F64)])


def test_swiglu_changes_neither_of_its_inputs() -> None:
    g, u = leaf(4, 4), leaf(4, 4)
    before = g.detach().clone(), u.detach().clone()
    swiglu(g, u).sum().backward()
    assert torch.equal(g, before[0]) and torch.equal(u, before[1])


# ---- low rank ----
@pytest.mark.parametrize("rows", [(4,), (2, 3), (1, 17)])
def test_add_low_rank_equals_its_formula(rows: tuple[int, ...]) -> None:
    y, x, a, b = torch.randn(*rows, 6), torch.randn(*rows, 9), torch.randn(2, 9), torch.randn(6, 2)
    want = y + 0.5 * (x @ a.T) @ b.T
    torch.testing.assert_close(add_low_rank(y.clone(), x, a, b, 0.5), want, rtol=1e-5, atol=1e-5)


def test_add_low_rank_passes_gradcheck() -> None:
    leaves = [leaf(*shape, dtype=F64) for shape in ((2, 3, 5), (2, 3, 7), (2, 7), (5, 2))]
    # * 1: the sum is written over y, which must be no leaf
    assert torch.autograd.gradcheck(lambda y, x, a, b: add_low_rank(y * 1, x, a, b, 1.5), leaves)


def test_add_low_rank_writes_over_a_fresh_result_and_copies_a_view() -> None:
    x, a, b = torch.randn(4, 9), torch.randn(2, 9), torch.randn(6, 2)
    fresh = torch.randn(4, 6)
    assert add_low_rank(fresh, x, a, b, 1.0).data_ptr() == fresh.data_ptr()
    whole = torch.randn(4, 12)
    before = whole.clone()
    add_low_rank(whole[:, :6], x, a, b, 1.0)
    assert torch.equal(whole, before)


# ---- linear cross entropy ----
def ce_formula(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(h @ w.T, t, reduction="none")


def test_cross_entropy_equals_the_formula_and_its_gradient() -> None:
    h, w, t, g = leaf(13, 8), torch.randn(29, 8), torch.randint(29, (13,)), torch.rand(13)
    nll, hit = linear_cross_entropy(h, w, t)
    h64 = h.detach().double().requires_grad_()
    want = ce_formula(h64, w.double(), t)
    torch.testing.assert_close(nll.double(), want, rtol=1e-5, atol=1e-6)
    (got,) = grads_of(nll, g, [h])
    torch.testing.assert_close(got.double(), grads_of(want, g.double(), [h64])[0], rtol=1e-4, atol=1e-6)
    assert torch.equal(hit, (h @ w.T).argmax(dim=1) == t)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 12, 13, 100])
def test_cross_entropy_is_the_same_in_any_number_of_chunks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    h, w, t = leaf(13, 8), torch.randn(29, 8), torch.randint(29, (13,))
    whole, whole_hit = linear_cross_entropy(h, w, t)
    (dh,) = grads_of(whole, torch.ones(13), [h])
    monkeypatch.setitem(cross_entropy.BUDGET, "cpu", 4 * 29 * rows)
    nll, hit = linear_cross_entropy(h, w, t)
    torch.testing.assert_close(nll, whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grads_of(nll, torch.ones(13), [h])[0], dh, rtol=1e-5, atol=1e-6)
    assert torch.equal(hit, whole_hit)


def test_cross_entropy_keeps_a_row_with_no_weight_out_of_the_gradient() -> None:
    h, w, t = leaf(6, 8), torch.randn(29, 8), torch.randint(29, (6,))
    nll, _ = linear_cross_entropy(h, w, t)
    (dh,) = grads_of(nll, torch.tensor([1.0, 0, 1, 0, 0, 1]), [h])
    assert (dh[[1, 3, 4]] == 0).all() and (dh[[0, 2, 5]] != 0).any(dim=1).all()


def test_cross_entropy_of_huge_logits_is_finite() -> None:
    h = (torch.randn(5, 8) * 1e4).requires_grad_()
    nll, _ = linear_cross_entropy(h, torch.randn(29, 8), torch.randint(29, (5,)))
    (dh,) = grads_of(nll, torch.ones(5), [h])
    assert torch.isfinite(nll).all() and torch.isfinite(dh).all() and nll.max() > 1e3


def test_cross_entropy_without_gradient_keeps_nothing() -> None:
    nll, hit = linear_cross_entropy(torch.randn(5, 8), torch.randn(29, 8), torch.randint(29, (5,)))
    assert not nll.requires_grad and nll.dtype == torch.float32 and hit.dtype == torch.bool


def test_cross_entropy_in_bfloat16_is_as_good_as_torch() -> None:
    h, w, t = torch.randn(20, 32).bfloat16(), torch.randn(50, 32).bfloat16(), torch.randint(50, (20,))
    exact = ce_formula(h.double(), w.double(), t)
    ours, _ = linear_cross_entropy(h, w, t)
    plain = ce_formula(h, w, t).double()
    assert (ours.double() - exact).abs().max() <= (plain - exact).abs().max() + 1e-2
