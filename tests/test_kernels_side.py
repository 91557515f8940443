"""Adapters side by side: where their factors and products stand in the columns that a base's product has for them."""

import pytest
import torch
from torch import Tensor

from lora.kernels import dispatch
from lora.kernels.side import Rounded, diagonal, joined, rounded, spread

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL = torch.cuda.is_available() or dispatch.INTERPRETED
WISHES = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not KERNEL, reason="no GPU"))]
DTYPES = [torch.float32, torch.float16]


def columns(rows: int, room: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A poisoned buffer and its columns 3 to 3 + room."""
    whole = torch.full((rows, room + 8), torch.nan, dtype=dtype, device=DEVICE)
    return whole, whole[:, 3 : 3 + room]


@pytest.mark.parametrize("wish", WISHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("k", "N", "r", "at", "R", "room"), [(1, 5, 2, 0, 2, 3), (3, 70, 5, 4, 12, 64), (6, 130, 16, 32, 48, 320)]
)
def test_b_stands_in_its_adapter_s_columns(
    k: int, N: int, r: int, at: int, R: int, room: int, bias: bool, dtype: torch.dtype, wish: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("LORA_KERNELS", wish)
    big = torch.randn(k, 2 * N * r + 7).to(DEVICE, dtype)  # as in a stack, where other layers' lie between
    b = big[:, N * r : 2 * N * r].unflatten(1, (N, r))
    shift = torch.randn(N).to(DEVICE, dtype) if bias else None
    whole, out = columns(N, room, dtype)
    spread(out, b, at, R, k, shift)
    want = torch.zeros(N, room, dtype=dtype)
    for p in range(k):
        for j in range(r):
            want[:, p * R + at + j] = b[p, :, j].cpu()
    if shift is not None:
        want[:, k * R] = shift.cpu()
    assert torch.equal(out.cpu(), want)
    assert whole[:, :3].isnan().all() and whole[:, 3 + room :].isnan().all()


@pytest.mark.parametrize("wish", WISHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize(("k", "rows", "R", "room"), [(1, 3, 2, 5), (3, 37, 7, 32), (6, 70, 48, 320)])
def test_a_run_s_rows_stand_in_its_adapter_s_columns(
    k: int, rows: int, R: int, room: int, ones: bool, dtype: torch.dtype, wish: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_KERNELS", wish)
    t = torch.randn(k, rows, R).to(DEVICE, dtype)
    whole, out = columns(k * rows, room, dtype)
    diagonal(out, t, ones)
    want = torch.zeros(k * rows, room, dtype=dtype)
    for p in range(k):
        want[p * rows : (p + 1) * rows, p * R : (p + 1) * R] = t[p].cpu()
    if ones:
        want[:, k * R] = 1.0
    assert torch.equal(out.cpu(), want)
    assert whole[:, :3].isnan().all() and whole[:, 3 + room :].isnan().all()


def test_neighbours_in_memory_are_one_tensor_and_others_are_copied() -> None:
    big = torch.randn(2, 5 + 3 * 4 + 2 * 4)
    first, second = big[:, 5:17].unflatten(1, (3, 4)), big[:, 17:].unflatten(1, (2, 4))
    one = joined([first, second])
    assert one.data_ptr() == first.data_ptr() and torch.equal(one, torch.cat((first, second), 1))
    assert torch.equal(joined([second, first]), torch.cat((second, first), 1))
    assert torch.equal(joined([first, first]), torch.cat((first, first), 1))


def test_factors_that_nobody_rounded_are_rounded_here() -> None:
    a, b, s = torch.randn(2, 3, 5), torch.randn(2, 7, 3), torch.tensor([2.0, 0.3])
    low, half = (a, b, s), torch.bfloat16
    assert torch.equal(rounded(low, half, "a"), a.bfloat16()) and torch.equal(rounded(low, half, "b"), b.bfloat16())
    assert torch.equal(rounded(low, half, "sa")[1], (a[1] * 0.3).bfloat16())
    assert torch.equal(rounded(low, half, "sb")[0], (b[0] * 2).bfloat16())
    ready = Rounded(*(t.half() for t in (a + 1, b + 1, a + 2, b + 2)))
    assert all(rounded((*low, ready), torch.float16, name) is getattr(ready, name) for name in Rounded._fields)
    assert torch.equal(rounded((*low, ready), torch.float32, "a"), a)
