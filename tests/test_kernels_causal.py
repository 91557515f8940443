"""Causal attention in blocks of queries: PyTorch's own attention is the measure, in float64 too."""

import pytest
import torch
from torch import Tensor

from lora.kernels import causal
from lora.kernels.causal import causal_attention


def plain(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """The formula, with a mask of all pairs."""
    groups, T = q.shape[1] // k.shape[1], q.shape[2]
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    i = torch.arange(T)
    mask = i <= i[:, None]
    if window is not None:
        mask = mask & (i > i[:, None] - window)
    return (q @ k.mT * scale).masked_fill(~mask, -torch.inf).softmax(dim=-1) @ v


@pytest.mark.parametrize("T", [1, 2, 33, 65, 128, 129, 300])
@pytest.mark.parametrize(("heads", "kv", "D"), [(4, 4, 16), (9, 3, 64), (6, 1, 20)])
@pytest.mark.parametrize("window", [None, 1, 7, 128, 150])
def test_outputs_and_gradients_equal_the_formula(T: int, heads: int, kv: int, D: int, window: int | None) -> None:
    q, k, v = (torch.randn(2, h, T, D, dtype=torch.float64, requires_grad=True) for h in (heads, kv, kv))
    dy = torch.randn(2, heads, T, D, dtype=torch.float64)
    y = causal_attention(q, k, v, window=window, scale=0.3)
    want_y = plain(q, k, v, window, 0.3)
    torch.testing.assert_close(y, want_y, rtol=1e-10, atol=1e-12)
    got, want = (torch.autograd.grad(t, (q, k, v), dy) for t in (y, want_y))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_gradients_pass_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "ROWS", 4)
    for short in (0, 8):  # P made again, and P kept
        monkeypatch.setattr(causal, "SHORT", short)
        q, k, v = (torch.randn(1, h, 9, 3, dtype=torch.float64).requires_grad_() for h in (4, 2, 2))
        assert torch.autograd.gradcheck(lambda *t: causal_attention(*t), (q, k, v))
        assert torch.autograd.gradcheck(lambda *t: causal_attention(*t, window=3), (q, k, v))


@pytest.mark.parametrize("T", [40, 260])
def test_float32_is_as_good_as_torch(T: int) -> None:
    q, k, v = (torch.randn(2, h, T, 64, requires_grad=True) for h in (6, 2, 2))
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    dy = torch.randn(2, 6, T, 64)
    want = torch.autograd.grad(plain(*exact, None, 0.125), exact, dy.double())
    got = torch.autograd.grad(causal_attention(q, k, v), (q, k, v), dy)
    sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    theirs = torch.autograd.grad(sdpa, (q, k, v), dy)
    for a, b, c in zip(got, theirs, want, strict=True):
        error = lambda t: float((t.double() - c).norm() / c.norm())  # noqa: B023, E731
        assert error(a) <= 1.5 * error(b) + 1e-7


@pytest.mark.parametrize("short", [0, 8])
def test_blocks_of_fewer_queries_where_scores_would_be_large(short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "SHORT", short)
    q, k, v = (torch.randn(2, h, 70, 16, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    y = causal_attention(q, k, v, window=50)
    want = torch.autograd.grad(y.square().sum(), (q, k, v))
    monkeypatch.setattr(causal, "BUDGET", 30 * 2 * 4 * 70 * 8)
    assert causal._rows(q.new_empty(2, 2, 2, 70, 16)) == 30
    z = causal_attention(q, k, v, window=50)
    torch.testing.assert_close(z, y, rtol=1e-12, atol=1e-13)
    for a, b in zip(torch.autograd.grad(z.square().sum(), (q, k, v)), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    monkeypatch.setattr(causal, "BUDGET", 1)
    assert causal._rows(q.new_empty(2, 2, 2, 70, 16)) == 16


def test_two_runs_give_the_same_bits_and_strides_do_not_matter() -> None:
    base = torch.randn(2, 200, 5, 16)
    q, k, v = base[:, :, :3].transpose(1, 2), base[:, :, 3:4].transpose(1, 2), base[:, :, 4:].transpose(1, 2)
    y = causal_attention(q, k, v)
    assert torch.equal(y, causal_attention(q.contiguous(), k.contiguous(), v.contiguous()))
    assert torch.equal(y, causal_attention(q, k, v))


def test_a_later_key_changes_no_bit() -> None:
    q, k, v = (torch.randn(1, 2, 140, 16) for _ in range(3))
    before = causal_attention(q, k, v)
    k[:, :, 100] = 1e4
    v[:, :, 100:] = -1e4
    after = causal_attention(q, k, v)
    assert torch.equal(before[:, :, :100], after[:, :, :100])


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="H a multiple of H_kv"):
        causal_attention(torch.ones(1, 3, 4, 8), torch.ones(1, 2, 4, 8), torch.ones(1, 2, 4, 8))
