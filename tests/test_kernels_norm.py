"""RMSNorm: the twin against plain autograd of its formula, the kernel against the twin."""

import pytest
import torch
from bounds import assert_as_good, dtypes, grads_of, leaf
from torch import Tensor

from lora.kernels import norm
from lora.kernels.norm import rms_norm, rms_norm_add, rms_norm_backward, rms_norm_forward


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


# ---- the sum in the same pass ----
def test_rms_norm_add_is_the_norm_of_the_sum_and_the_sum() -> None:
    x, residual, w = leaf(3, 5, 8), leaf(3, 5, 8), leaf(8)
    y, s = rms_norm_add(x, residual, w, 1e-6)
    assert torch.equal(s, x + residual) and torch.equal(y, rms_norm(x + residual, w, 1e-6))
    dy, ds = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    got = torch.autograd.grad([y, s], [x, residual, w], [dy, ds])
    total = x + residual
    want = torch.autograd.grad([rms_norm(total, w, 1e-6), total], [x, residual, w], [dy, ds])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_rms_norm_add_has_a_gradient_where_only_one_result_is_used() -> None:
    x, residual, w = leaf(4, 8), leaf(4, 8), leaf(8)
    dy = torch.randn(4, 8)
    y, _ = rms_norm_add(x, residual, w, 1e-6)
    want = grads_of(rms_norm(x + residual, w, 1e-6), dy, [x, residual, w])
    for a, b in zip(grads_of(y, dy, [x, residual, w]), want, strict=True):
        torch.testing.assert_close(a, b)
    _, s = rms_norm_add(x, residual, w, 1e-6)
    dx, dresidual, dw = grads_of(s, dy, [x, residual, w])
    assert torch.equal(dx, dy) and torch.equal(dresidual, dy) and (dw == 0).all()


def test_rms_norm_add_gives_each_leaf_a_gradient_of_its_own() -> None:
    x, residual = leaf(4, 8), leaf(4, 8)
    y, s = rms_norm_add(x, residual, torch.ones(8), 1e-6)
    (y + s).sum().backward()
    assert x.grad is not None and residual.grad is not None
    before = residual.grad.clone()
    x.grad.zero_()
    assert torch.equal(residual.grad, before)


def test_rms_norm_refuses_a_weight_or_a_residual_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"weight \(7,\); it must be \(8,\)"):
        rms_norm(torch.zeros(2, 8), torch.ones(7), 1e-6)
    with pytest.raises(ValueError, match="one shape and one dtype"):
        rms_norm_add(torch.zeros(2, 8), torch.zeros(1, 8), torch.ones(8), 1e-6)
    with pytest.raises(ValueError, match="one shape and one dtype"):
        rms_norm_add(torch.zeros(2, 8), torch.zeros(2, 8).half(), torch.ones(8), 1e-6)


# ---- kernel ----
def exact_norm(x: Tensor, w: Tensor) -> Tensor:
    return norm_formula(x.double(), w.double(), 1e-5)


@pytest.mark.parametrize("add", [False, True], ids=["plain", "add"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 2, 33), (70, 64), (2, 1000), (2, 4097), (3, 16400)], ids=str)
def test_the_kernel_is_as_good_as_the_twin(triton_device: torch.device, shape: tuple[int, ...], add: bool) -> None:
    for dtype in dtypes():
        x, residual, dy, ds = (torch.randn(shape).to(dtype) for _ in range(4))
        w = torch.randn(shape[-1]).to(dtype)
        s = x + residual if add else x
        on = [t.to(triton_device) for t in (x, residual, w, dy, ds)]
        y, total, r = rms_norm_forward(on[0], on[1] if add else None, on[2], 1e-5)
        assert torch.equal(total.cpu(), s) and r.shape == (*shape[:-1], 1)
        y_ref, r_ref = norm._forward_ref(s, w, 1e-5)
        s64, w64 = s.double().requires_grad_(), w.double().requires_grad_()
        exact = exact_norm(s64, w64)
        assert_as_good(y, y_ref, exact.detach())
        dx, dw = rms_norm_backward(on[3], on[4] if add else None, total, on[2], r, want_dw=True)
        dx_ref, dw_ref = norm._backward_ref(dy, ds if add else None, s, w, r_ref, True, True)
        dx64, dw64 = torch.autograd.grad(exact, [s64, w64], dy.double())
        assert dx is not None and dw is not None and dx_ref is not None and dw_ref is not None
        assert_as_good(dx, dx_ref, dx64 + ds.double() if add else dx64)
        assert_as_good(dw, dw_ref, dw64)


def test_the_kernel_sums_the_weights_gradient_over_several_blocks_a_program(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w, dy = leaf(11, 24), leaf(24), torch.randn(11, 24)
    x64, w64 = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    want = torch.autograd.grad(exact_norm(x64, w64), [x64, w64], dy.double())
    on = [t.detach().to(triton_device).requires_grad_() for t in (x, w)]
    for rows, programs in ((1, 3), (1, 11), (2, 4), (4, 1), (16, 5)):
        monkeypatch.setattr(norm, "forward_tile", lambda block_d, rows=rows: (rows, 1))
        monkeypatch.setattr(norm, "backward_tile", lambda block_d, want_dw, rows=rows: (rows, 1))
        monkeypatch.setattr(norm, "programs_of", lambda blocks, want_dw, p=programs: min(blocks, p))
        got = grads_of(rms_norm(*on, 1e-5), dy.to(triton_device), on)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double().cpu(), b, rtol=1e-5, atol=1e-5)


def test_the_kernel_takes_a_float32_weight_with_16_bit_rows_as_the_twin_does(triton_device: torch.device) -> None:
    x, w, dy = torch.randn(6, 40).half(), torch.randn(40), torch.randn(6, 40)
    y_ref, r_ref = norm._forward_ref(x, w, 1e-5)
    dx_ref, dw_ref = norm._backward_ref(dy, None, x, w, r_ref, True, True)
    on = [t.to(triton_device).requires_grad_() for t in (x, w)]
    y = rms_norm(*on, 1e-5)
    dx, dw = grads_of(y, dy.to(triton_device), on)
    assert y.dtype == torch.float32 and dx.dtype == torch.float16 and dw.dtype == torch.float32
    for got, want in ((y, y_ref), (dx, dx_ref), (dw, dw_ref)):
        torch.testing.assert_close(got.cpu(), want, rtol=2e-3, atol=2e-3)


def test_the_kernel_takes_rows_that_lie_apart_and_writes_nothing_between(triton_device: torch.device) -> None:
    whole = torch.randn(4, 2, 6, 24, device=triton_device)
    before = whole.clone()
    x, residual, dy, ds = whole[:, :, :5, :19].unbind(0)  # last stride 1, rows 24 apart
    w = torch.randn(38, device=triton_device)[::2]
    args = [t.contiguous() for t in (x, residual, w, dy, ds)]
    y, s, r = rms_norm_forward(x, residual, w, 1e-5)
    y2, s2, r2 = rms_norm_forward(args[0], args[1], args[2], 1e-5)
    assert torch.equal(y, y2) and torch.equal(s, s2) and torch.equal(r, r2)
    got, want = rms_norm_backward(dy, ds, s, w, r, True, True), rms_norm_backward(*args[3:], s, args[2], r, True, True)
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(whole, before)
    turned = x.transpose(0, 1)
    assert torch.equal(rms_norm(turned, w, 1e-5), rms_norm(turned.contiguous(), w, 1e-5))
    flipped = torch.randn(7, 5, device=triton_device).T
    assert torch.equal(rms_norm(flipped, args[2][:7], 1e-5), rms_norm(flipped.contiguous(), args[2][:7], 1e-5))


def test_the_kernel_writes_its_rows_and_no_further(triton_device: torch.device) -> None:
    M, d = 5, 19
    x, residual, w = (torch.randn(*s, device=triton_device) for s in ((M, d), (M, d), (d,)))
    room = [torch.full((M * d + 64,), 7.0, device=triton_device) for _ in range(4)]
    norm._forward_kernel[(2,)](
        x, residual, w, *room, M, d, d, d, 1e-5, D=d, ADD=True, TWICE=True, ROWS=4, BLOCK_D=32, num_warps=1
    )  # fmt: skip
    assert all((r[M * d :] == 7.0).all() for r in room[:3]) and (room[3][M:] == 7.0).all()
    assert (room[0][: M * d] != 7.0).all()
    dx, dw = (torch.full((M * d + 64,), 7.0, device=triton_device) for _ in range(2))
    norm._backward_kernel[(2,)](
        x, x, x, w, room[3], dx, dw, M, 1, d, d, d, d,
        D=d, ADD=True, DW=True, ROWS=4, BLOCK_D=32, STAGES=3, num_warps=1,
    )  # fmt: skip
    assert (dx[M * d :] == 7.0).all() and (dw[2 * d :] == 7.0).all() and (dw[: 2 * d] != 7.0).all()


def test_the_results_may_be_changed_in_place(triton_device: torch.device) -> None:
    x, residual = (torch.randn(2, 3, 8, device=triton_device, requires_grad=True) for _ in range(2))
    w = torch.ones(8, device=triton_device)
    y, s = rms_norm_add(x, residual, w, 1e-5)
    assert not y._is_view() and not s._is_view()
    y += 1
    (rms_norm(x, w, 1e-5).mul_(2) + y).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("wish", ["torch", "triton"])
def test_the_sum_is_given_twice(wish: str, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS", wish)
    x, residual, w = (torch.randn(*s, device=triton_device) for s in ((37, 65), (37, 65), (65,)))
    out, twice = (torch.full((37, 65), torch.nan, device=triton_device) for _ in range(2))
    _, s, _ = rms_norm_forward(x, residual, w, 1e-5, out, twice)
    y = rms_norm_forward(x, residual, w, 1e-5)[0]
    assert torch.equal(twice, x + residual) and torch.equal(twice, s) and s.data_ptr() != twice.data_ptr()
    assert torch.equal(out, y)
    apart = torch.empty(65, 37, device=triton_device).T
    for args in (
        (x, None, w, 1e-5, out, twice),
        (x, residual, w, 1e-5, None, twice),
        (x, residual, w, 1e-5, out, apart),
    ):
        with pytest.raises(ValueError, match="a second sum"):
            rms_norm_forward(*args)
    out.fill_(torch.nan)
    rms_norm_forward(x, residual, w, 1e-5, out, residual)  # over what was added
    assert torch.equal(residual, s) and torch.equal(out, y)


def test_two_runs_of_the_kernel_give_the_same_bits(triton_device: torch.device) -> None:
    x, residual, w, dy = (torch.randn(*s, device=triton_device) for s in ((37, 65), (37, 65), (65,), (37, 65)))
    runs = []
    for _ in range(2):
        y, s, r = rms_norm_forward(x, residual, w, 1e-5)
        runs.append([y, s, r, *rms_norm_backward(dy, dy, s, w, r, True, True)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_kernel_takes_no_rows_and_refuses_rows_that_are_too_wide(triton_device: torch.device) -> None:
    w = torch.ones(8, device=triton_device, requires_grad=True)
    x = torch.zeros(0, 8, device=triton_device, requires_grad=True)
    y = rms_norm(x, w, 1e-5)
    y.sum().backward()
    assert y.shape == (0, 8) and w.grad is not None and (w.grad == 0).all()
    wide = torch.zeros(1, norm.WIDEST + 1, device=triton_device)
    with pytest.raises(ValueError, match="65537 values: its kernel holds a row in one program, at most 65536"):
        rms_norm(wide, wide[0], 1e-5)


def test_the_ops_are_declared_as_they_behave(triton_device: torch.device) -> None:
    x, w = torch.randn(3, 8, device=triton_device), torch.randn(8, device=triton_device)
    y, r = torch.ops.lora.rms_norm(x, w, 1e-5)
    for op, args in (
        (torch.ops.lora.rms_norm, (x, w, 1e-5)),
        (torch.ops.lora.rms_norm_add, (x, x, w, 1e-5)),
        (torch.ops.lora.rms_norm_backward, (y, y, x, w, r, True)),
        (torch.ops.lora.rms_norm_backward, (y, None, x, w, r, False)),
    ):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("shape", [(5, 19), (33, 256)])
@pytest.mark.parametrize("residual", [False, True])
def test_a_backward_into_rows_equals_the_backward(
    triton_device: torch.device, shape: tuple[int, int], residual: bool
) -> None:
    M, d = shape
    x, dy, ds = (torch.randn(M, d, device=triton_device) for _ in range(3))
    w = torch.randn(d, device=triton_device)
    _, _, r = norm.rms_norm_forward(x, None, w, 1e-5)
    dx, _ = norm.rms_norm_backward(dy, ds if residual else None, x, w, r)
    room = torch.full((M, d + 3), 7.0, device=triton_device)
    norm.rms_norm_backward_into(dy, ds if residual else None, x, w, r, room[:, 1 : d + 1])
    assert torch.equal(room[:, 1 : d + 1], dx)
    assert (room[:, d + 1 :] == 7.0).all() and (room[:, 0] == 7.0).all()
