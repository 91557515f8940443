"""T made while a product's input is written: against float64, and as fold.py's forward takes it."""

import math

import pytest
import torch
from torch import Tensor

from lora.kernels import fold, thin
from lora.kernels.fold import Group

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter does not round bfloat16 as a GPU does


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def poisoned(M: int, K: int, more: int) -> Tensor:
    return torch.full((M, K + more), math.nan, dtype=HALF, device=DEVICE)


def act(g: Tensor, gelu: bool) -> Tensor:
    return torch.nn.functional.gelu(g, approximate="tanh") if gelu else torch.nn.functional.silu(g)


@pytest.mark.parametrize("gate", [None, "silu", "gelu"])
@pytest.mark.parametrize(("ones", "warps"), [(False, 1), (True, 1), (True, 1056)])
@pytest.mark.parametrize(
    ("M", "K", "r"),
    [(1, 16, 1), (67, 389, 16), (40, 128, thin.MAX_RANK), (32, 301, 33)],
)
def test_it_equals_float64(
    M: int, K: int, r: int, ones: bool, warps: int, gate: str | None, wish: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thin, "WARPS", warps)  # rows in one program, or shared
    gu, a = poisoned(M, 2 * K, 3), torch.randn(r, K, device=DEVICE).to(HALF)
    gu[:, : 2 * K] = torch.randn(M, 2 * K)
    g, u = gu[:, :K], gu[:, K : 2 * K] if gate else None
    outs = []
    for _ in range(2):
        xw = poisoned(M, K, 80)
        t = thin.thin(g, u, a, xw[:, :K], xw[:, K:], ones, gate == "gelu")
        outs.append((t, xw))
    (t, xw), again = outs
    assert torch.equal(t, again[0]) and torch.equal(xw, again[1])
    h = g.double() if u is None else act(g.double(), gate == "gelu") * u.double()
    rounding = 1.1 if wish == "triton" else 1.6  # the twin rounds act(g) too
    assert error(xw[:, :K], h) <= rounding * error(h.to(HALF), h) if u is not None else torch.equal(xw[:, :K], g)
    want = xw[:, :K].double() @ a.double().T
    assert error(t, want) <= 1.1 * error(want.to(HALF), want) + 1e-6 and t.is_contiguous()
    assert torch.equal(xw[:, K : K + r], t)
    assert bool((xw[:, K + r] == float(ones)).all()) and not xw[:, K + r + 1 :].any()


def test_columns_split_over_programs_add_up(wish: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thin, "WARPS", 3 * thin.COPY_TILE[2])
    M, K = 5, 4 * thin.COPY_TILE[1] + 1  # two steps each of three programs, the last of them empty
    x, a, xw = torch.randn(M, K, device=DEVICE).to(HALF), torch.randn(4, K, device=DEVICE).to(HALF), poisoned(M, K, 16)
    t = thin.thin(x, None, a, xw[:, :K], xw[:, K:])
    want = x.double() @ a.double().T
    assert error(t, want) <= 1.1 * error(want.to(HALF), want) + 1e-6


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("ranks", [(5, 0, 11), (thin.MAX_RANK, 1, 0)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_forward_of_a_group_is_that_of_its_products(
    ranks: tuple[int, ...], gate: bool, bias: bool, wish: str
) -> None:
    """Y and T against float64, with a rank that is too high for one pass among them."""
    M, K, sizes = 50, 96, (64, 32, 40)
    weights = [torch.randn(n, K, device=DEVICE).to(HALF) for n in sizes]
    biases = [torch.randn(n, device=DEVICE).to(HALF) if bias and n != 32 else None for n in sizes]
    lows = [
        (torch.randn(r, K, device=DEVICE) / 8, torch.randn(n, r, device=DEVICE), 0.5) if r else None
        for n, r in zip(sizes, ranks, strict=True)
    ]
    group = Group(tuple(weights), tuple(biases), tuple(lows))
    g, u = (torch.randn(M, K, device=DEVICE).to(HALF) for _ in range(2))
    fold.wide(M, K, group.room, g, "input").fill_(math.nan)
    given = fold.gated(group, g, u, gelu=False) if gate else fold.taken(group, g)
    assert isinstance(given, fold.Fed) == (wish == "triton" and sum(ranks) <= thin.MAX_RANK)
    h = (given.xw if isinstance(given, fold.Fed) else given)[:, :K].double()
    y, t = fold.forward(group, given)
    assert t is not None and t.shape == (M, sum(ranks))
    row = at = 0
    for w, b, low, n in zip(weights, biases, lows, sizes, strict=True):
        want = h @ w.double().T + (0 if b is None else b.double())
        if low:
            r = low[0].shape[0]
            t64 = h @ (low[0] * 0.5).to(HALF).double().T
            assert error(t[:, at : at + r], t64) < (5e-3 if DEVICE == "cuda" else 1e-3)
            want += t64 @ low[1].to(HALF).double().T
            at += r
        assert error(y[:, row : row + n], want) < (1e-2 if DEVICE == "cuda" else 2e-3)
        row += n


def test_what_does_not_fit_is_refused() -> None:
    g, a, xw = torch.zeros(4, 8), torch.zeros(3, 8), torch.zeros(4, 12)
    with pytest.raises(ValueError, match=r"u is torch.float32 \(4, 7\)"):
        thin.thin(g, g[:, :7], a, xw[:, :8], xw[:, 8:])
    with pytest.raises(ValueError, match="a is torch.float16"):
        thin.thin(g, None, a.half(), xw[:, :8], xw[:, 8:])
    with pytest.raises(ValueError, match="a rank of 3, and 1 more, beside 3 columns"):
        thin.thin(g, None, a, xw[:, :8], xw[:, 9:], ones=True)
    with pytest.raises(ValueError, match="a rank of 65, .* at most 64"):
        thin.thin(g, None, torch.zeros(65, 8), xw[:, :8], torch.zeros(4, 80))
