"""The gate's backward in 8 bits: scales, U, rounded gradients and sums against float64; and the way through fold8."""

import pytest
import torch
from torch import Tensor

from lora.kernels import dispatch, fold, fold8, fp8, gate, gate8
from lora.kernels.fold import Group
from lora.kernels.fp8 import F8, TOP
from lora.kernels.gate8 import gate_round, gate_scales, new_sums, totals
from lora.kernels.weight8 import weight_scale
from lora.quant.linear import Linear4bit
from lora.quant.weight import quantize_tensor

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# the interpreter does not round bfloat16 to nearest, so it is tried in float32 only
DTYPES = [torch.float32, torch.bfloat16] if GPU or not dispatch.INTERPRETED else [torch.float32]
CRUDE = dispatch.INTERPRETED and not GPU  # the interpreter has no NaN in 8 bits, and rounds 7.9 to 4
Ranks = tuple[int, int, int]


def inputs(M: int, F: int, ranks: Ranks, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], list[Tensor], list[Tensor]]:
    """dh, g and u as columns of wider buffers, whose other columns are poisoned; v, t_g, t_u; b_g, b_u."""
    torch.manual_seed(M + F)
    wide = [torch.full((M, F + 8), torch.nan, dtype=dtype, device=DEVICE) for _ in range(3)]
    for w in wide:
        w[:, :F] = torch.randn(M, F)
    factors = [torch.randn(M, r).to(DEVICE, dtype) for r in ranks]
    return tuple(w[:, :F] for w in wide), factors, [torch.randn(F, r).to(DEVICE) for r in ranks[1:]]


def exact(dh: Tensor, g: Tensor, u: Tensor, gelu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """h, dg and du by autograd in float64."""
    g64, u64 = g.double().requires_grad_(), u.double().requires_grad_()
    act = torch.nn.functional.gelu(g64, approximate="tanh") if gelu else torch.nn.functional.silu(g64)
    h = act * u64
    return h.detach(), *torch.autograd.grad(h, (g64, u64), dh.double())


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def rounded(
    x: tuple[Tensor, ...], scale: Tensor, factors: list[Tensor | None], gelu: bool, pieces: int = 1
) -> tuple[Tensor, list[Tensor | None]]:
    """[dg | du] (M, 2F) e4m3 as columns of a wider buffer, and the three sums; what is written was NaN before."""
    M, F = x[1].shape
    out = torch.full((M, 2 * F + 16), 0x7F, dtype=torch.uint8, device=DEVICE).view(F8)
    v, tg, tu = factors
    sums = new_sums(pieces, F, (v, tg, tu), scale.device).fill_(torch.nan)
    for rows, part in zip(torch.arange(M).chunk(pieces), sums, strict=True):
        at = slice(int(rows[0]), int(rows[-1]) + 1)
        some = [None if f is None else f[at] for f in factors]
        gate_round(*(t[at] for t in x), scale[at], out[at, : 2 * F], (some[0], some[1], some[2]), part, gelu)
    assert bool((out[:, 2 * F :].view(torch.uint8) == 0x7F).all())
    return out[:, : 2 * F], totals(sums, F, (v, tg, tu))


def near(x8: Tensor, scale: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Every value within half a step of e4m3: 1/16 of itself, or 2**-10 of the scale where it is tiny."""
    x, slack = want.abs(), 1e-3 if dtype == torch.float32 else 5e-3
    there = ((x8.double() * scale.double() - want).abs() <= x * (1 / 16 + slack) + scale.double() * 2.0**-10).float()
    assert float(there.mean()) >= (0.9 if CRUDE else 1.0)


SHAPES: list[tuple[int, int, Ranks]] = [
    (1, 32, (1, 1, 1)), (70, 130, (5, 3, 8)), (300, 257, (16, 16, 16)), (129, 64, (64, 33, 1)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("M", "F", "ranks"), SHAPES)
def test_it_equals_autograd_in_float64(M: int, F: int, ranks: Ranks, gelu: bool, dtype: torch.dtype, wish: str) -> None:
    x, factors, (bg, bu) = inputs(M, F, ranks, dtype)
    h, dg, du = exact(*x, gelu)
    before = [t.clone() for t in x]
    bound = 3e-6 if dtype == torch.float32 else 4e-3
    scale, low = gate_scales(*x, bg, bu, gelu)
    want = torch.cat((dg, du), dim=1)
    assert error(scale, want.abs().amax(dim=1, keepdim=True) / TOP) < 2e-6 and scale.shape == (M, 1)
    assert low.dtype == torch.float32
    assert error(low, torch.cat((dg @ bg.double(), du @ bu.double()), dim=1)) < bound
    out, sums = rounded(x, scale, [*factors], gelu)
    near(out, scale, want, dtype)
    v, tg, tu = (t.double() for t in factors)
    for one, exact_sum in zip(sums, (v.T @ h, dg.T @ tg, du.T @ tu), strict=True):
        assert one is not None and one.dtype == torch.float32 and error(one, exact_sum) < bound
    assert all(torch.equal(a, b) for a, b in zip(x, before, strict=True))


def test_twice_the_same_bits(wish: str) -> None:
    x, factors, (bg, bu) = inputs(200, 272, (16, 5, 16), DTYPES[-1])
    runs = []
    for _ in range(2):
        scale, low = gate_scales(*x, bg, bu, False)
        out, sums = rounded(x, scale, [*factors], False, pieces=2)
        runs.append([scale, low, out.view(torch.uint8), *(s for s in sums if s is not None)])
    assert len(runs[0]) == 6 and all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("programs", [1, 3, 1000])
@pytest.mark.parametrize("pieces", [1, 2])
def test_programs_and_pieces_add_up(pieces: int, programs: int, wish: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate8, "PROGRAMS", programs)  # that share the columns of a row
    M = gate8.BY_COLS[0] * gate8.PARTS + 5  # several steps a program, the last ones empty
    x, factors, (bg, bu) = inputs(M, 330, (4, 4, 4), torch.float32)
    h, dg, du = exact(*x, False)
    scale, low = gate_scales(*x, bg, bu, False)
    assert error(low, torch.cat((dg @ bg.double(), du @ bu.double()), dim=1)) < 3e-6
    assert error(scale, torch.cat((dg, du), dim=1).abs().amax(dim=1, keepdim=True) / TOP) < 2e-6
    _, sums = rounded(x, scale, [*factors], False, pieces)
    v, tg, tu = (t.double() for t in factors)
    for one, want in zip(sums, (v.T @ h, dg.T @ tg, du.T @ tu), strict=True):
        assert one is not None and error(one, want) < 3e-6


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_what_has_no_factor_is_none(missing: int, wish: str) -> None:
    x, factors, bs = inputs(40, 64, (4, 3, 2), torch.float32)
    h, dg, du = exact(*x, False)
    scale, low = gate_scales(*x, *(None if i == missing else b for i, b in enumerate(bs, start=1)), False)
    lows = [d @ b.double() for i, (d, b) in enumerate(zip((dg, du), bs, strict=True), start=1) if i != missing]
    assert error(low, torch.cat(lows, dim=1)) < 3e-6
    _, sums = rounded(x, scale, [None if i == missing else f for i, f in enumerate(factors)], False)
    pairs = [f.double().T @ y for f, y in zip(factors, (h, dg, du), strict=True)]
    assert sums[missing] is None
    for i, (one, want) in enumerate(zip(sums, pairs, strict=True)):
        assert one is None or error(one, want if i == 0 else want.T) < 3e-6


def test_without_any_factor_there_are_scales(wish: str) -> None:
    x, *_ = inputs(40, 64, (1, 1, 1), torch.float32)
    scale, low = gate_scales(*x, None, None, False)
    out, sums = rounded(x, scale, [None, None, None], False)
    assert low.shape == (40, 0) and sums == [None, None, None]
    near(out, scale, torch.cat(exact(*x, False)[1:], dim=1), torch.float32)


def test_halves_of_one_factor_make_the_same_columns(wish: str) -> None:
    x, _, (bg, bu) = inputs(70, 130, (1, 5, 5), torch.float32)
    _, dg, du = exact(*x, False)
    _, low = gate_scales(*x, bg, bu, False, one=True)
    assert error(low, dg @ bg.double() + du @ bu.double()) < 3e-6


def test_rows_of_any_size_keep_four_bits(wish: str) -> None:
    x, _, (bg, bu) = inputs(40, 96, (1, 2, 2), torch.float32)
    x[0].mul_(torch.logspace(-25, 25, 40, device=DEVICE)[:, None])
    x[0][3] = 0
    x[2][5] = 0
    scale, low = gate_scales(*x, bg, bu, False)
    out, _ = rounded(x, scale, [None, None, None], False)
    _, dg, du = exact(*x, False)
    some = (torch.cat((dg, du), dim=1).abs().amax(dim=1) > 1e-18).nonzero()[:, 0]
    near(out[some], scale[some], torch.cat((dg, du), dim=1)[some], torch.float32)
    assert bool((scale > 0).all()) and bool((out[3].float() == 0).all()) and bool((low[3] == 0).all())
    assert bool((out[5, :96].float() == 0).all())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_value_that_is_not_finite_is_not_lost(which: int, bad: float, wish: str) -> None:
    if CRUDE and wish == "triton":
        pytest.skip("Triton's interpreter has no NaN in 8 bits")
    x, *_ = inputs(4, 64, (1, 1, 1), torch.float32)
    x[which][1, 7] = bad
    scale, _ = gate_scales(*x, None, None, False)
    out, _ = rounded(x, scale, [None, None, None], False)
    rows = (out.float() * scale).isfinite().all(dim=1)
    assert rows.tolist() == [True, False, True, True]


# ---- through fold8 ----
def groups(K: int, F: int, ranks: Ranks, one: bool, dtype: torch.dtype) -> tuple[Group, fold8.Eight, list[Tensor]]:
    """Gate and up over K, as `one` layer or two, with what their products in 8 bits need; and the dense weights."""
    torch.manual_seed(K)
    sizes, rs = ((2 * F,), ranks[1:2]) if one else ((F, F), ranks[1:])
    layers = [Linear4bit(quantize_tensor(torch.randn(n, K, device=DEVICE) * 0.05)) for n in sizes]
    lows = tuple(
        (torch.randn(r, K, device=DEVICE) * 0.1, torch.randn(n, r, device=DEVICE) * 0.05, 1.5) if r else None
        for n, r in zip(sizes, rs, strict=True)
    )
    group = Group(tuple(x.weight4() for x in layers), (None,) * len(sizes), lows)
    scale = max(weight_scale(w) for w in group.weights)
    there = [low for low in lows if low]
    a, b = (
        torch.stack([low[i].abs().max() * (1.5 if i == 0 else 1.0) for low in there]).max()
        if there
        else torch.tensor(fp8.TINY, device=DEVICE)
        for i in range(2)
    )
    eight = fold8.Eight(scale, fold8.scales_of(group, scale, a.device), a, b, fold8.scales_of_a([group], a))
    return group, eight, [x.weight_as(torch.float32) for x in layers]


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(
    ("ranks", "one"),
    [((16, 16, 16), False), ((5, 0, 3), False), ((0, 0, 0), False), ((64, 64, 64), False), ((4, 8, 8), True)],
)
@pytest.mark.parametrize("small", [0, 2**25])
def test_gradients_err_no_more_than_by_way_of_16_bits(
    small: int, ranks: Ranks, one: bool, gelu: bool, wish: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dX, s U, da and db of both ways against float64, from the same dh, g and u: at most 1.02 times the error."""
    if CRUDE and wish == "triton":
        pytest.skip("Triton's interpreter rounds 8-bit floats up to a power of two to half of it")
    monkeypatch.setattr(fold8, "SMALL", small)  # 0: in two pieces
    dtype = torch.bfloat16 if GPU else torch.float32
    M, K, F = 304, 64, 272
    group, eight, dense = groups(K, F, ranks, one, dtype)
    (dh, g, u), (v, *_), _ = inputs(M, F, (max(1, ranks[0]), 1, 1), dtype)
    t = torch.randn(M, sum(group.ranks), device=DEVICE).to(dtype) if sum(group.ranks) else None
    h, dg, du = exact(dh, g, u, gelu)
    dy64 = torch.cat((dg, du), dim=1)
    want_dx, row, want = torch.zeros(M, K, dtype=torch.float64, device=DEVICE), 0, []
    for w, low, part in zip(dense, group.lows, fold.columns(group, t), strict=True):
        y = dy64[:, row : row + w.shape[0]]
        want_dx += y @ w.double()
        if low:
            assert part is not None
            want_dx += 1.5 * y @ low[1].double() @ low[0].double()
            want += [1.5 * y @ low[1].double(), y.T @ part.double()]
        row += w.shape[0]
    # by way of 16 bits
    gu = torch.cat((g, u), dim=1)
    ts = fold.columns(group, t)
    old_da, *old_dbs = gate.gate_backward(dh.clone(), gu[:, :F], gu[:, F:], v, ts[0], ts[-1], gelu=gelu)
    if one:
        old_dbs = [torch.cat([db for db in old_dbs if db is not None])]
    old_dx, old_u, _ = fold8.backward(group, eight, gu, t, old_dbs[: len(ts)], spend=True)
    # in 8 bits
    spent = dh.contiguous()
    dx, u8, das, dbs = fold8.gate_backward(group, eight, spent, g, u, v, t, gelu)
    assert dx is not None and old_dx is not None and len(dbs) == len(group.lows) and len(das) == 1
    assert (small == 0 and K <= F // 2) == (dx.data_ptr() == spent.data_ptr())  # over rows that are read
    pairs = [(dx, old_dx, want_dx), (das[0], old_da, v.double().T @ h)]
    if u8 is not None and old_u is not None:
        n = [low[0].shape[0] for low in group.lows if low]
        pairs += zip(u8.split(n, dim=1), old_u.split(n, dim=1), want[::2], strict=True)
        left = zip(dbs, old_dbs, strict=False)
        pairs += [
            (new, old, w) for (new, old), w in zip([p for p in left if p[0] is not None], want[1::2], strict=True)
        ]
    assert (u8 is None) == (sum(group.ranks) == 0) == (t is None)
    for new, old, w in pairs:
        assert new is not None and old is not None and error(new, w) <= 1.02 * error(old, w) + 1e-6


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_it_takes_no_more_memory_than_by_way_of_16_bits() -> None:
    M, K, F, ranks = 8192, 4096, 14336, (16, 16, 16)  # of an 8B model: with few rows the parts of sums count more
    group, eight, _ = groups(K, F, ranks, False, torch.bfloat16)
    peaks = []
    for eights in (False, True):
        fold8.scratch(M * (F + 48), F8, torch.device("cuda", torch.cuda.current_device()), "input8")  # down's input
        dh, gu = (torch.randn(M, n, device=DEVICE).bfloat16() for n in (F, 2 * F))
        v, t = (torch.randn(M, n, device=DEVICE).bfloat16() for n in (16, 32))
        for _ in range(2):  # the second one finds the reused buffers
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            start = torch.cuda.memory_allocated()
            if eights:
                made = fold8.gate_backward(group, eight, dh, gu[:, :F], gu[:, F:], v, t, False)
            else:
                sums = gate.gate_backward(dh, gu[:, :F], gu[:, F:], v, t[:, :16], t[:, 16:])
                made = fold8.backward(group, eight, gu, t, [*sums[1:]], spend=True)
            peak = torch.cuda.max_memory_allocated() - start
            del made
        peaks.append(peak)
    assert peaks[1] <= peaks[0]
