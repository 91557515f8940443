"""U and db of one pass over dY: against float64, and as fold.py's backward takes them."""

import math

import pytest
import torch
from torch import Tensor

from lora.kernels import fold, pair
from lora.kernels.dropout import Drop
from lora.kernels.fold import Group

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter does not round bfloat16 as a GPU does


def inputs(M: int, sizes: tuple[int, ...], ranks: tuple[int, ...], gap: int = 0, room: int = 64):
    """dY with `gap` columns before each layer's and room behind, poisoned but for the layers' columns; T; b; where."""
    starts = [sum(sizes[:i]) + gap * (i + 1) for i in range(len(sizes))]
    dyw = torch.full((M, starts[-1] + sizes[-1] + room), math.nan, dtype=HALF, device=DEVICE)
    for n, start in zip(sizes, starts, strict=True):
        dyw[:, start : start + n] = torch.randn(M, n)
    t = torch.randn(M, sum(ranks), device=DEVICE).to(HALF)
    b = [torch.randn(n, r, device=DEVICE) for n, r in zip(sizes, ranks, strict=True)]
    return dyw, t, b, [0.5, 3.0, 1.0][: len(sizes)], starts


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


SHAPES = [
    (1, (16,), (1,)),
    (70, (300,), (16,)),
    (2 * pair.ROWS + 3, (2 * pair.COLS, pair.COLS, 40), (16, 5, 31)),
    (200, (33, pair.COLS + 1), (pair.MAX_RANK, 2)),
]


@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize(("M", "sizes", "ranks"), SHAPES)
def test_it_equals_both_products_in_float64(
    M: int, sizes: tuple[int, ...], ranks: tuple[int, ...], gap: int, wish: str
) -> None:
    dyw, t, b, scales, starts = inputs(M, sizes, ranks, gap, room=128)
    out = dyw[:, -128:]
    dbs = pair.pair(dyw, t, b, scales, starts, out)
    again = torch.full_like(out, math.nan)
    same = pair.pair(dyw, t, b, scales, starts, again)
    assert torch.equal(out, again) and all(torch.equal(x, y) for x, y in zip(dbs, same, strict=True))
    at = 0
    for db, one, s, start in zip(dbs, b, scales, starts, strict=True):
        n, r = one.shape
        dy = dyw[:, start : start + n].double()
        u = dy @ (one * s).to(HALF).double()
        assert error(out[:, at : at + r], u) <= 1.1 * error(u.to(HALF), u) + 1e-6
        assert db.dtype == torch.float32 and db.is_contiguous()
        assert error(db, dy.T @ t[:, at : at + r].double()) < 2e-6
        at += r
    assert not out[:, at:].any()


@pytest.mark.parametrize("rows", [0, 1, 5 * pair.ROWS])
def test_rows_split_over_programs_add_up(rows: int, wish: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "PROGRAMS", 3)  # the last one's last step is empty
    dyw, t, b, scales, starts = inputs(rows, (40,), (4,))
    (db,) = pair.pair(dyw[:, :40], t, b, scales, starts, dyw[:, 40:])
    want = dyw[:, :40].double().T @ t.double()
    assert db.shape == (40, 4) and (error(db, want) < 2e-6 if rows else not db.any())


def group(sizes: tuple[int, ...], ranks: tuple[int, ...], K: int, drops: tuple[Drop | None, ...] = ()) -> Group:
    weights = tuple(torch.randn(n, K, device=DEVICE).to(HALF) for n in sizes)
    lows = tuple(
        (torch.randn(r, K, device=DEVICE), torch.randn(n, r, device=DEVICE), 0.5) if r else None
        for n, r in zip(sizes, ranks, strict=True)
    )
    return Group(weights, (None,) * len(sizes), lows, drops=drops)


@pytest.mark.parametrize("through", [True, False])
@pytest.mark.parametrize("ranks", [(16, 3, 5), (0, 6, 0), (pair.MAX_RANK + 1, 2, 0)])
def test_the_backward_of_a_group_is_that_of_its_products(ranks: tuple[int, ...], through: bool, wish: str) -> None:
    """dX, U, db against float64, layers without an update and too high ranks among them."""
    M, K, sizes = 130, 48, (64, 32, 40)
    g, N, R = group(sizes, ranks, K), sum(sizes), sum(ranks)
    dyw = torch.full((M, N + g.room), math.nan, dtype=HALF, device=DEVICE)
    dyw[:, :N] = torch.randn(M, N)
    t = torch.randn(M, R, device=DEVICE).to(HALF)
    dx, u, dbs = fold.backward(g, dyw, t, through=through)
    assert u is not None and u.shape == (M, R) and (dx is None) == (not through)
    want, row, at = torch.zeros(M, K, dtype=torch.float64, device=DEVICE), 0, 0
    for w, low, db, n, r in zip(g.weights, g.lows, dbs, sizes, ranks, strict=True):
        dy = dyw[:, row : row + n].double()
        want += dy @ w.double()
        assert (db is None) == (low is None)
        if low:
            u64 = dy @ (low[1] * low[2]).to(HALF).double()
            assert error(u[:, at : at + r], u64) < (5e-3 if DEVICE == "cuda" else 1e-3)
            assert error(db, dy.T @ t[:, at : at + r].double()) < 1e-3
            want += u64 @ low[0].to(HALF).double()
        row, at = row + n, at + r
    if dx is not None:
        assert not dyw[:, N + R :].any()
        assert error(dx, want) < (1e-2 if DEVICE == "cuda" else 2e-3)


def test_what_does_not_fit_is_refused() -> None:
    dyw, t, b, scales, starts = inputs(4, (8, 8), (2, 3))
    dy, out = dyw[:, :16], dyw[:, 16:]
    with pytest.raises(ValueError, match="ranks from 1 to 32"):
        pair.pair(dy, t, [torch.zeros(8, 33), b[1]], scales, starts, out)
    with pytest.raises(ValueError, match="one to 3 layers"):
        pair.pair(dy, t, b * 2, scales * 2, starts * 2, out)
    for wrong in ((dy[:, :15], t, out), (dy, t[:, :4], out), (dy, t, out[:, :4])):
        with pytest.raises(ValueError, match=r"layers that end at column 16 with ranks \[2, 3\] need"):
            pair.pair(wrong[0], wrong[1], b, scales, starts, wrong[2])
