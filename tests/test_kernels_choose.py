"""The end of a token: the kernel against its twin, ties, ends and NaN."""

import pytest
import torch
from torch import Tensor

from lora.kernels.choose import choose, choose_ref


def state(B: int, V: int, device: torch.device) -> tuple[Tensor, ...]:
    """taken, at, out, ends, stopped, bad"""
    ends = torch.zeros(V, dtype=torch.bool, device=device)
    ends[1::2] = True
    at = torch.arange(B, device=device) + 1
    out = torch.full((B, B + 4), -7, device=device)
    stopped = torch.arange(B, device=device) == 0
    return torch.zeros_like(at), at, out, ends, stopped, torch.zeros_like(stopped)


@pytest.mark.parametrize(("B", "V"), [(1, 7), (3, 257), (2, 20_000)])
def test_the_kernel_equals_the_twin(triton_device: torch.device, B: int, V: int) -> None:
    for dtype in (torch.float32, torch.float16):
        logits = torch.randn(B, V + 3, device=triton_device).to(dtype)[:, :V]
        got, want = state(B, V, triton_device), state(B, V, triton_device)
        for _ in range(2):
            choose(logits, *got)
            choose_ref(logits, *want)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
        assert got[0].tolist() == logits.argmax(dim=1).tolist() and got[1].tolist() == [b + 3 for b in range(B)]


def test_the_first_of_equal_logits_wins(triton_device: torch.device) -> None:
    logits = torch.zeros(2, 9000, device=triton_device)
    logits[1, [8500, 300, 8999]] = 2.0
    taken, *rest = state(2, 9000, triton_device)
    choose(logits, taken, *rest)
    assert taken.tolist() == [0, 300]
    logits.fill_(-torch.inf)
    choose(logits, taken, *rest)
    assert taken.tolist() == [0, 0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_ended_stays_ended_and_nan_is_marked(triton_device: torch.device, value: float) -> None:
    logits = torch.zeros(3, 50, device=triton_device)
    logits[1, 3] = 1.0
    logits[2, 49] = value
    taken, at, out, ends, stopped, bad = state(3, 50, triton_device)
    choose(logits, taken, at, out, ends, stopped, bad)
    assert stopped[:2].tolist() == [True, True] and bad.tolist() == [False, False, True]
    assert 0 <= int(taken[2]) < 50
    choose(torch.zeros_like(logits), taken, at, out, ends, stopped, bad)
    assert stopped[:2].tolist() == [True, True] and bad.tolist() == [False, False, True]
    assert out[0, 2:4].tolist() == [0, 0] and out[1, 3] == 3 and (out[:, :2] == -7).all()


def test_shapes_that_do_not_fit_are_refused(triton_device: torch.device) -> None:
    t = state(2, 10, triton_device)
    with pytest.raises(ValueError, match="do not fit taken"):
        choose(torch.zeros(2, 11, device=triton_device), *t)
