"""Rotary embedding: the twin against a complex turn, the kernel against the twin."""

import pytest
import torch
from bounds import assert_as_good, dtypes, leaf
from torch import Tensor

from lora.kernels import rope as rope_file
from lora.kernels.rope import rope, rope2

F64 = torch.float64


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


def test_rope_refuses_tables_that_do_not_fit() -> None:
    x, (cos, sin) = torch.zeros(3, 5, 2, 10), angles(1, 5, 10, torch.float32)
    for bad in (
        (cos[:, :1], sin[:, :1]),
        (cos[..., :4], sin[..., :4]),
        (cos.expand(2, -1, -1, -1),) * 2,
        (cos, sin[0]),
    ):
        with pytest.raises(ValueError, match=r"two tables \(1 or 3, 5, 1, 5\) are needed"):
            rope(x, *bad)
    with pytest.raises(ValueError, match="an even last axis"):
        rope(torch.zeros(3, 5, 2, 9), cos, sin)


def test_rope2_equals_rope_of_each() -> None:
    q, k = leaf(2, 3, 4, 6), leaf(2, 3, 2, 6)
    cos, sin = angles(2, 3, 6, torch.float32)
    one, two = rope2(q, k, cos, sin), (rope(q, cos, sin), rope(k, cos, sin))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    got = torch.autograd.grad(one, [q, k], [torch.ones_like(q), torch.ones_like(k)])
    want = torch.autograd.grad(two, [q, k], [torch.ones_like(q), torch.ones_like(k)])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ---- kernel ----
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 2), (2, 5, 9, 3, 10), (3, 4, 5, 5, 64), (1, 3, 12, 2, 128)], ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["one table", "a table each"])
def test_the_kernel_is_as_good_as_the_twin(triton_device: torch.device, shape: tuple[int, ...], shared: bool) -> None:
    B, T, H_q, H_k, D = shape
    for dtype in dtypes():
        q, k = torch.randn(B, T, H_q, D).to(dtype), torch.randn(B, T, H_k, D).to(dtype)
        cos, sin = (t.to(dtype) for t in angles(1 if shared else B, T, D, torch.float32))
        on = [t.to(triton_device) for t in (q, k, cos, sin)]
        for back in (False, True):
            s = -sin if back else sin
            together = rope_file._turn((on[0], on[1]), on[2], on[3], back)
            apart = [rope_file._turn((x,), on[2], on[3], back)[0] for x in on[:2]]
            for x, got, again in zip((q, k), together, apart, strict=True):
                exact = rope_file.turn_ref(x.double(), cos.double(), s.double())
                assert_as_good(got, rope_file.turn_ref(x, cos, s), exact)
                assert torch.equal(got, again)


def test_the_kernels_gradient_is_the_opposite_turn(triton_device: torch.device) -> None:
    q, k = leaf(2, 3, 5, 12), leaf(2, 3, 2, 12)
    cos, sin = angles(2, 3, 12, torch.float32)
    dq, dk = torch.randn(2, 5, 3, 12).transpose(1, 2), torch.randn(2, 3, 2, 12)  # dq as attention gives it
    q64, k64 = q.detach().double().requires_grad_(), k.detach().double().requires_grad_()
    want = torch.autograd.grad(
        [torch.cat((x[..., :6] * cos - x[..., 6:] * sin, x[..., 6:] * cos + x[..., :6] * sin), -1) for x in (q64, k64)],
        [q64, k64],
        [dq.double(), dk.double()],
    )
    on = [t.detach().to(triton_device).requires_grad_() for t in (q, k)]
    out = rope2(*on, cos.to(triton_device), sin.to(triton_device))
    got = torch.autograd.grad(out, on, [dq.to(triton_device), dk.to(triton_device)])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-5, atol=1e-6)


def test_the_kernel_takes_any_strides(triton_device: torch.device) -> None:
    cos, sin = (t.to(triton_device) for t in angles(1, 7, 16, torch.float32))
    qkv = torch.randn(2, 7, 9, 16, device=triton_device)  # heads of q, k, v in one buffer
    before = qkv.clone()
    for x in (
        qkv[:, :, :5],
        qkv[:, :, 5:7],
        torch.randn(2, 3, 7, 16, device=triton_device).transpose(1, 2),
        torch.randn(2, 7, 16, 3, device=triton_device).transpose(2, 3),
        torch.randn(2, 7, 3, 32, device=triton_device)[..., ::2],
        torch.randn(1, 7, 3, 16, device=triton_device).expand(2, -1, -1, -1),
    ):
        assert torch.equal(rope(x, cos, sin), rope(x.contiguous(), cos, sin))
    assert torch.equal(qkv, before)
    both = torch.stack((cos, sin), dim=-1)
    assert torch.equal(rope(qkv, both[..., 0], both[..., 1]), rope(qkv, cos, sin))
    assert torch.equal(rope(qkv, cos, both[..., 1]), rope(qkv, cos, sin))


def test_the_kernel_gives_the_same_with_any_number_of_heads_a_program(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k = torch.randn(1, 3, 7, 8, device=triton_device), torch.randn(1, 3, 3, 8, device=triton_device)
    cos, sin = (t.to(triton_device) for t in angles(1, 3, 8, torch.float32))
    want = rope2(q, k, cos, sin)
    for heads in (1, 2, 4, 8, 16):
        monkeypatch.setattr(rope_file, "tile", lambda H, block_d, heads=heads: (heads, 1))
        got = rope2(q, k, cos, sin)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_kernel_writes_its_heads_and_no_further(triton_device: torch.device) -> None:
    B, T, H, D = 1, 3, 3, 10
    x = torch.randn(B, T, H, D, device=triton_device)
    cos, sin = (t.to(triton_device) for t in angles(1, T, D, torch.float32))
    room = torch.full((x.numel() + 64,), 7.0, device=triton_device)
    rope_file._turn_kernel[(T,)](
        *[x] * 3, *[room] * 3, cos, sin, T, H, H, *x.stride()[:3] * 3, *[H * D] * 3, 0, cos.stride(1), 1, 1, 1,
        D=D, BACK=False, HEADS=4, BLOCK_D=8, num_warps=1,
    )  # fmt: skip
    assert torch.equal(room[: x.numel()].view_as(x), rope(x, cos, sin)) and (room[x.numel() :] == 7.0).all()


@pytest.mark.parametrize("wish", ["torch", "triton"])
@pytest.mark.parametrize("D", [6, 16])
def test_values_are_copied_beside_them(
    wish: str, D: int, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_KERNELS", wish)
    B, T, H, K = 2, 5, 7, 3
    q, k, v = (torch.randn(B, n, T, D, device=triton_device).transpose(1, 2) for n in (H, K, K))
    cos, sin = (t.to(triton_device) for t in angles(B, T, D, torch.float32))
    room = torch.full((B, T, (H + 2 * K) * D + 3), torch.nan, device=triton_device)
    heads = room[:, :, : (H + 2 * K) * D].unflatten(2, (-1, D)).split((H, K, K), dim=2)
    rope_file.turn_into((q, k), (heads[0], heads[1]), cos, sin, back=True, beside=(v, heads[2]))
    want = (torch.empty(q.shape, device=triton_device), torch.empty(k.shape, device=triton_device))
    rope_file.turn_into((q, k), want, cos, sin, back=True)
    assert torch.equal(heads[0], want[0]) and torch.equal(heads[1], want[1]) and torch.equal(heads[2], v)
    assert room[:, :, (H + 2 * K) * D :].isnan().all()
    with pytest.raises(ValueError, match="as many"):
        rope_file.turn_into((q, k), want, cos, sin, beside=(v[:, :, :2], heads[2]))


def test_the_op_is_declared_as_it_behaves(triton_device: torch.device) -> None:
    q, k = torch.randn(2, 3, 4, 8, device=triton_device), torch.randn(2, 3, 1, 8, device=triton_device)
    cos, sin = (t.to(triton_device) for t in angles(1, 3, 8, torch.float32))
    for xs in ([q], [q, k]):
        torch.library.opcheck(torch.ops.lora.rope, (xs, cos, sin, True), test_utils=("test_schema", "test_faketensor"))
