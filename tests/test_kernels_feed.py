"""What enters a linear layer and its low-rank product, in one launch: the kernel against float64 and its twin."""

import pytest
import torch
from torch import Tensor

from lora.kernels.feed import feed_gate, feed_low, feed_norm, plan

SHAPES = [(1, 64, 16), (3, 96, 5), (2, 200, 0), (5, 64, 130)]  # M, K, R


def dtypes(device: torch.device) -> list[torch.dtype]:
    return [torch.float32, torch.float16] + ([torch.bfloat16] if device.type == "cuda" else [])


def close(got: Tensor, exact: Tensor, twin: Tensor, dtype: torch.dtype) -> None:
    tol = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert (got.double() - exact).norm() <= 1.1 * (twin.double() - exact).norm() + tol * exact.norm() / 4


def twin_of(monkeypatch: pytest.MonkeyPatch):
    """Runs a call without Triton."""

    def run(call, *args):
        with monkeypatch.context() as m:
            m.setenv("LORA_KERNELS", "torch")
            return call(*args)

    return run


@pytest.mark.parametrize(("M", "K", "R"), SHAPES)
@pytest.mark.parametrize("adds", [True, False])
def test_norm(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch, M: int, K: int, R: int, adds: bool) -> None:
    plainly = twin_of(monkeypatch)
    for dtype in dtypes(triton_device):
        wide = torch.randn(M, 2 * K, device=triton_device).to(dtype)
        x, more = wide[:, :K], torch.randn(M, K, device=triton_device).to(dtype) if adds else None
        w = torch.rand(K, device=triton_device).to(dtype) + 0.5
        a = torch.randn(R, K, device=triton_device).to(dtype) if R else None
        y, s, xa = feed_norm(x, more, w, 1e-5, a)
        y_twin, s_twin, xa_twin = plainly(feed_norm, x, more, w, 1e-5, a)
        assert torch.equal(s, s_twin)
        s64 = s.double()
        exact = s64 / (s64.square().mean(dim=1, keepdim=True) + 1e-5).sqrt() * w.double()
        close(y, exact, y_twin, dtype)
        if a is None:
            assert xa is None and xa_twin is None
        else:
            assert xa is not None and xa.dtype == torch.float32 and xa.is_contiguous()
            torch.testing.assert_close(xa, (y.double() @ a.double().T).float(), rtol=1e-4, atol=1e-4)
        again = feed_norm(x, more, w, 1e-5, a)
        assert torch.equal(y, again[0]) and (a is None or torch.equal(xa, again[2]))


@pytest.mark.parametrize(("M", "K", "R"), SHAPES)
def test_gate_and_a_row_as_it_is(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch, M: int, K: int, R: int
) -> None:
    plainly = twin_of(monkeypatch)
    for dtype in dtypes(triton_device):
        both = torch.randn(M, 2 * K, device=triton_device).to(dtype)
        g, u = both.split(K, dim=1)
        a = torch.randn(R, K, device=triton_device).to(dtype) if R else None
        y, xa = feed_gate(g, u, a)
        exact = torch.nn.functional.silu(g.double()) * u.double()
        close(y, exact, plainly(feed_gate, g, u, a)[0], dtype)
        assert torch.equal(y, feed_gate(g, u, a)[0])
        if a is not None and xa is not None:
            torch.testing.assert_close(xa, (y.double() @ a.double().T).float(), rtol=1e-4, atol=1e-4)
            low = feed_low(g, a)
            torch.testing.assert_close(low, (g.double() @ a.double().T).float(), rtol=1e-4, atol=1e-4)
            assert torch.equal(low, feed_low(g, a))


def test_many_rows_take_separate_launches_and_give_the_same(triton_device: torch.device) -> None:
    x, more = torch.randn(2, 70, 64, device=triton_device)
    w, a = torch.rand(64, device=triton_device), torch.randn(16, 64, device=triton_device)
    y, s, xa = feed_norm(x, more, w, 1e-5, a)
    few = feed_norm(x[:9], more[:9], w, 1e-5, a)
    for got, want in zip((y, s, xa), few, strict=True):
        torch.testing.assert_close(got[:9], want, rtol=1e-5, atol=1e-5)


def test_a_program_takes_more_of_a_when_rows_are_many() -> None:
    assert [plan(M, 48, 4096)[0] for M in (1, 8, 64)] == [1, 2, 4]
    assert plan(8, 0, 4096)[0] == 0


def test_widths_that_differ_are_refused(triton_device: torch.device) -> None:
    x = torch.randn(2, 64, device=triton_device)
    with pytest.raises(ValueError, match="rows of 64 values"):
        feed_low(x, torch.randn(16, 32, device=triton_device))
