"""SwiGLU: the twin against plain autograd of its formula, the kernel against the twin."""

import pytest
import torch
from bounds import assert_as_good, dtypes, leaf
from torch import Tensor

from lora.kernels import swiglu as swiglu_file
from lora.kernels.swiglu import swiglu, swiglu_backward, swiglu_forward

F64 = torch.float64


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


def test_swiglu_refuses_two_shapes_two_dtypes_and_an_output_in_columns() -> None:
    g = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"g is \(3, 4\) torch.float32, u \(1, 4\)"):
        swiglu(g, torch.zeros(1, 4))
    with pytest.raises(ValueError, match="one shape and one dtype"):
        swiglu(g, g.half())
    with pytest.raises(ValueError, match="its last stride must be 1"):
        swiglu_forward(g, g, out=torch.zeros(4, 3).T)


# ---- kernel ----
def exact_gradients(dh: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    g64, u64 = g.double().requires_grad_(), u.double().requires_grad_()
    h = g64 * torch.sigmoid(g64) * u64
    return (*torch.autograd.grad(h, [g64, u64], dh.double()), h.detach())


@pytest.mark.parametrize("shape", [(1,), (5, 33), (2, 3, 64), (3, 1100)], ids=str)
def test_the_kernel_is_as_good_as_the_twin(triton_device: torch.device, shape: tuple[int, ...]) -> None:
    for dtype in dtypes():
        dh, g, u = ((torch.randn(shape) * s).to(dtype) for s in (1.0, 4.0, 1.0))
        on = [t.to(triton_device) for t in (dh, g, u)]
        dg64, du64, h64 = exact_gradients(dh, g, u)
        assert_as_good(swiglu_forward(*on[1:]), swiglu_file._forward_ref(g, u), h64)
        dg, du = swiglu_backward(*on)
        dg_ref, du_ref = swiglu_file._backward_ref(dh, g, u)
        assert_as_good(dg, dg_ref, dg64)
        assert_as_good(du, du_ref, du64)
        over = swiglu_backward(*on, out=(on[1], on[2]))  # g and u themselves
        assert over[0] is on[1] and torch.equal(over[0], dg) and torch.equal(over[1], du)


def test_the_kernels_autograd_equals_float64(triton_device: torch.device) -> None:
    g, u, dh = torch.randn(4, 37), torch.randn(4, 37), torch.randn(4, 37)
    on = [t.to(triton_device).requires_grad_() for t in (g, u)]
    dg, du = torch.autograd.grad(swiglu(*on), on, dh.to(triton_device))
    dg64, du64, _ = exact_gradients(dh, g, u)
    torch.testing.assert_close(dg.cpu().double(), dg64, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(du.cpu().double(), du64, rtol=1e-5, atol=1e-6)


def test_the_kernel_is_finite_at_the_ends_of_the_gate(triton_device: torch.device) -> None:
    g = torch.tensor([-1e4, -200.0, -88.0, 0.0, 88.0, 200.0, 1e4], device=triton_device)
    one = torch.ones_like(g)
    h = swiglu(g, one)
    dg, du = swiglu_backward(one, g, one)
    assert torch.equal(h[3:], g[3:]) and (h[:3].abs() < 1e-30).all()
    assert torch.isfinite(dg).all() and torch.isfinite(du).all() and (dg[4:] == 1).all() and dg[3] == 0.5


def test_the_kernel_works_on_the_halves_of_one_buffer_and_writes_nothing_else(triton_device: torch.device) -> None:
    M, I, gap = 5, 37, 6
    for g_u in (torch.randn(M, 2 * I, device=triton_device), torch.randn(M, 2 * I + gap, device=triton_device)):
        g, u, dh = g_u[:, :I], g_u[:, I : 2 * I], torch.randn(M, I, device=triton_device)
        before = g_u.clone()
        apart = g.contiguous(), u.contiguous()
        dg_du = torch.full((M, 2 * I + gap), 7.0, device=triton_device)
        dg, du = swiglu_backward(dh, g, u, out=(dg_du[:, :I], dg_du[:, I : 2 * I]))
        want = swiglu_backward(dh, *apart)
        assert torch.equal(dg, want[0]) and torch.equal(du, want[1])
        assert dg.data_ptr() == dg_du.data_ptr() and torch.equal(dg_du[:, I : 2 * I], want[1])
        assert (dg_du[:, 2 * I :] == 7.0).all() and torch.equal(g_u, before)
        room = torch.full((M, I + gap), 7.0, device=triton_device)
        swiglu_forward(g, u, out=room[:, :I])
        assert torch.equal(room[:, :I], swiglu_forward(*apart)) and (room[:, I:] == 7.0).all()


def test_the_twin_writes_into_given_buffers_too() -> None:
    g, u, dh = torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 8)
    room = torch.full((3, 20), 7.0)
    h, (dg, du) = swiglu_forward(g, u), swiglu_backward(dh, g, u, out=(room[:, :8], room[:, 8:16]))
    assert torch.equal(room[:, :8], dg) and torch.equal(room[:, 8:16], du) and (room[:, 16:] == 7.0).all()
    assert torch.equal(h, swiglu(g, u)) and torch.equal(dg, swiglu_backward(dh, g, u)[0])
    assert torch.equal(swiglu_forward(g, u, out=room[:, 4:12]), h) and torch.equal(room[:, 4:12], h)


def test_the_kernel_takes_columns_and_no_rows(triton_device: torch.device) -> None:
    g, u = torch.randn(6, 4, device=triton_device).T, torch.randn(4, 12, device=triton_device)[:, ::2]
    assert torch.equal(swiglu(g, u), swiglu(g.contiguous(), u.contiguous()))
    assert swiglu(g[:0], u[:0]).shape == (0, 6)


def test_two_runs_of_the_kernel_give_the_same_bits(triton_device: torch.device) -> None:
    dh, g, u = (torch.randn(9, 130, device=triton_device) for _ in range(3))
    runs = [(swiglu_forward(g, u), *swiglu_backward(dh, g, u)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_ops_are_declared_as_they_behave(triton_device: torch.device) -> None:
    g, u, dh, *out = (torch.randn(3, 8, device=triton_device) for _ in range(5))
    for op, args in (
        (torch.ops.lora.swiglu, (g, u, out[0])),
        (torch.ops.lora.swiglu_backward, (dh, g, u, *out)),
    ):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
