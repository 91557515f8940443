"""8-bit floats: rounding, rows with scales, factors in two parts, decoding; and the products made of them (fold8)."""

import pytest
import torch
from torch import Tensor

from lora.kernels import dispatch, fold8, fp8
from lora.kernels.fold import Group
from lora.kernels.fp8 import F8, TOP, Part, gate8, norm8, ride8, rows8, split8, to_f8
from lora.kernels.weight8 import TOP_WEIGHT, decode8, weight_scale
from lora.quant.linear import Linear4bit
from lora.quant.weight import quantize_tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter does not round bfloat16 to nearest, so it is tried in float32 only
DTYPES = [torch.float32, torch.bfloat16] if torch.cuda.is_available() or not dispatch.INTERPRETED else [torch.float32]
CRUDE = (
    dispatch.INTERPRETED and not torch.cuda.is_available()
)  # the interpreter has no NaN in 8 bits, and rounds 7.9 to 4


def skip_crude(wish: str) -> None:
    if CRUDE and wish == "triton":
        pytest.skip("Triton's interpreter rounds 8-bit floats up to a power of two to half of it")


def poisoned(M: int, N: int, more: int = 16) -> Tensor:
    """(M, N) e4m3 as columns of a wider buffer, all of it NaN."""
    return torch.full((M, N + more), 0x7F, dtype=torch.uint8, device=DEVICE).view(F8)[:, :N]


def near(x8: Tensor, scale: Tensor, x: Tensor) -> None:
    """Every value within half a step of e4m3: 1/16 of itself, or 2**-10 of the scale where it is tiny."""
    error = (x8.float() * scale - x.float()).abs()
    there = (error <= x.float().abs() * (1 / 16 + 1e-3) + scale * 2.0**-10).float()
    assert float(there.mean()) >= (0.9 if CRUDE else 1.0)


def test_what_does_not_fit_becomes_nan() -> None:
    got = to_f8(torch.tensor([448.0, -448.0, 449.0, torch.inf, torch.nan, 1.0625])).float()
    assert got[:2].tolist() == [448.0, -448.0] and bool(got[2:5].isnan().all())
    assert got[5] == 1.0  # a tie, to even


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N"), [(1, 16), (7, 100), (33, 4096)])
def test_rows_keep_four_bits(M: int, N: int, dtype: torch.dtype, wish: str) -> None:
    x = (torch.randn(M, N + 3) * torch.logspace(-6, 6, M)[:, None]).to(DEVICE, dtype)[:, :N]
    out = poisoned(M, N)
    scale = rows8(x, out)
    torch.testing.assert_close(scale, x.float().abs().amax(dim=1, keepdim=True) / TOP)
    near(out, scale, x)


def test_a_row_of_zeros_stays_zero(wish: str) -> None:
    out = poisoned(2, 32)
    scale = rows8(torch.zeros(2, 32, device=DEVICE), out)
    assert bool((out.float() == 0).all()) and bool((scale > 0).all())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_is_not_lost(bad: float, wish: str) -> None:
    skip_crude(wish)
    x = torch.ones(2, 32, device=DEVICE)
    x[1, 5] = bad
    out = poisoned(2, 32)
    scale = rows8(x, out)
    row = out[1].float() * scale[1]
    assert bool((~row.isfinite()).any()) and bool(out[0].float().isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [False, True])
def test_a_norm_rounds_its_result(add: bool, dtype: torch.dtype, wish: str) -> None:
    x, y, w = (torch.randn(*shape).to(DEVICE, dtype) for shape in ((9, 100), (9, 100), (100,)))
    out = poisoned(9, 100)
    scale, s, r = norm8(x, y if add else None, w, 1e-5, out)
    want = (x + y) if add else x
    assert torch.equal(s, want)
    r64 = torch.rsqrt(want.double().square().mean(dim=1, keepdim=True) + 1e-5)
    torch.testing.assert_close(r.double(), r64, rtol=1e-5, atol=0)
    near(out, scale, (want.double() * r64 * w.double()).float())


@pytest.mark.parametrize("gelu", [False, True])
def test_a_gate_rounds_its_result(gelu: bool, wish: str) -> None:
    g, u = (torch.randn(9, 130, device=DEVICE) for _ in range(2))
    out = poisoned(9, 130)
    scale = gate8(g, u, gelu, out)
    act = torch.nn.functional.gelu(g, approximate="tanh") if gelu else torch.nn.functional.silu(g)
    near(out, scale, act * u)


def test_two_parts_hold_a_factor_as_exactly_as_bfloat16(wish: str) -> None:
    skip_crude(wish)
    b, amax = torch.randn(40, 5, device=DEVICE), torch.tensor(4.0, device=DEVICE)
    out = poisoned(40, 48)
    split8(out, [Part(b, at=3)], "hlh", amax)
    hi, lo, again = (out[:, i * 16 + 3 : i * 16 + 8].float() for i in range(3))
    assert torch.equal(hi, again)
    want = b * (fp8.TOP_FACTOR / 4.0)
    assert bool(((hi + lo - want).abs() <= want.abs() * 2.0**-8 + 2.0**-10).all())
    rest = out.float().clone()
    for i in range(3):
        rest[:, i * 16 + 3 : i * 16 + 8] = 0
    assert bool((rest == 0).all())


def test_a_row_makes_room_for_what_rides_along(wish: str) -> None:
    skip_crude(wish)
    x, src = torch.randn(40, 100, device=DEVICE), torch.rand(40, 5, device=DEVICE) + 0.5
    src[10:20] *= 50
    src[20:30] *= 2e3
    src[30:] *= 1e8  # too much
    buffer = poisoned(40, 148)
    scale = rows8(x, buffer[:, :100])
    before, alone = buffer[:, :100].float(), scale.clone()
    ride8(buffer, 100, scale, [src], torch.tensor(3.0, device=DEVICE), 0.1)
    less = torch.log2(scale / alone)
    assert torch.equal(less, less.round()) and bool((less[:10] == 0).all())
    assert bool((less[10:20] > 0).all()) and bool((less[20:30] > less[10:20].max()).all()) and float(less.max()) == 8
    after = buffer[:, :100].float()
    assert torch.equal(before[:10], after[:10])
    assert bool((after - before * torch.exp2(-less)).abs().le(2.0**-10).all())
    hi, again, lo = (buffer[:, 100 + 16 * i : 105 + 16 * i].float() for i in range(3))
    assert torch.equal(hi[:30], again[:30]) and bool(hi[30:].isnan().any(dim=1).all())
    want = src * 0.3 / scale
    assert bool((hi + lo - want)[:30].abs().le(want[:30].abs() * 2.0**-8 + 2.0**-10).all())


def test_two_parts_ride_as_their_sum(wish: str) -> None:
    skip_crude(wish)
    torch.manual_seed(0)
    both, amax = torch.randn(40, 26, device=DEVICE).to(DTYPES[-1]), torch.tensor(3.0, device=DEVICE)
    one, two = both[:, :5], both[:, 16:21]
    runs = []
    for parts in ([one, two], [(one.float() + two.float()).to(both.dtype)]):
        buffer = poisoned(40, 148)
        buffer[:, :100] = torch.ones(100, device=DEVICE).to(F8)
        total = torch.full((40, 5), torch.nan, dtype=both.dtype, device=DEVICE) if len(parts) == 2 else None
        scale = torch.full((40, 1), 0.1, device=DEVICE)
        ride8(buffer, 100, scale, parts, amax, 0.1, total)
        runs.append([buffer.contiguous().view(torch.uint8), scale, parts[0] if total is None else total])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    with pytest.raises(ValueError, match="one without, or two with"):
        ride8(buffer, 100, scale, [one, two], amax, 0.1)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize(("N", "K", "block"), [(16, 64, 64), (70, 192, 64), (5, 96, 64), (33, 1024, 256)])
def test_decoding_rounds_the_decoded_weight(N: int, K: int, block: int, turn: bool, double: bool, wish: str) -> None:
    torch.manual_seed(0)
    layer = Linear4bit(quantize_tensor(torch.randn(N, K, device=DEVICE), block=block, double=double))
    scale = weight_scale(layer.weight4())
    want = layer.weight_as(torch.float32)
    assert scale == pytest.approx(float(want.abs().max()) / TOP_WEIGHT, rel=1e-6)
    out = poisoned(*((K, N) if turn else (N, K)))
    decode8(layer.weight4(), scale, out, turn=turn)
    value = to_f8(want * (1.0 / scale)).float()
    value = value.T if turn else value
    # the kernel multiplies by the scales in another order, so a tie may fall the other way
    assert (CRUDE and wish == "triton") or float((out.float() != value).float().mean()) < 1e-3
    near(out, torch.full((1, 1), scale, device=DEVICE), want.T if turn else want)


def group(
    K: int, sizes: tuple[int, ...], ranks: tuple[int, ...], dtype: torch.dtype, times: float = 1.0
) -> tuple[Group, list[Tensor]]:
    torch.manual_seed(K)
    layers = [Linear4bit(quantize_tensor(torch.randn(n, K, device=DEVICE) * 0.05)) for n in sizes]
    lows = tuple(
        (torch.randn(r, K, device=DEVICE) * 0.1, torch.randn(n, r, device=DEVICE) * (0.05 * times), 1.5) if r else None
        for n, r in zip(sizes, ranks, strict=True)
    )
    biases = tuple(torch.randn(n, device=DEVICE).to(dtype) for n in sizes)
    return Group(tuple(layer.weight4() for layer in layers), biases, lows), [x.weight_as(torch.float32) for x in layers]


def eight(g: Group) -> fold8.Eight:
    lows = [low for low in g.lows if low]
    a = torch.stack([low[0].abs().max() * abs(low[2]) for low in lows]).max()
    b = torch.stack([low[1].abs().max() for low in lows]).max()
    return eight_of(g, a, b)


def eight_of(g: Group, a: Tensor, b: Tensor) -> fold8.Eight:
    scale = max(weight_scale(w) for w in g.weights)
    return fold8.Eight(scale, fold8.scales_of(g, scale, a.device), a, b, fold8.scales_of_a([g], a))


TIMES = [1.0, 30.0, 300.0]  # of b: all fits; rows make room


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("ranks", [(16, 16, 16), (5, 0, 3), (64, 64, 64)])
def test_a_products_updates_are_exact_beside_its_base(ranks: tuple[int, int, int], times: float, wish: str) -> None:
    """Against the rounded input times the rounded base plus the update in float64: what two parts lose is all."""
    skip_crude(wish)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    g, dense = group(128, (64, 32, 48), ranks, dtype, times)
    e = eight(g)
    like = torch.randn(50, 128, device=DEVICE).to(dtype)
    x = fold8.taken(g, like)
    x64 = x.x8[:, :128].double() * x.scale.double()
    y, t = fold8.forward(g, e, x, None, like)
    assert t is not None and t.shape == (50, sum(ranks))
    at = row = 0
    for w, low, bias in zip(dense, g.lows, g.biases, strict=True):
        n = w.shape[0]
        base = x64 @ (to_f8(w / e.scale).double() * e.scale).T
        update = torch.zeros_like(base)
        if low:
            t64 = 1.5 * x64 @ low[0].double().T
            r = low[0].shape[0]
            assert float((t[:, at : at + r] - t64).norm() / t64.norm()) < 6e-3
            update = t64 @ low[1].double().T
            at += r
        got = y[:, row : row + n].double() - base - bias.double()
        assert float((got - update).norm()) < 1e-2 * float(update.norm()) + 4e-3 * float(base.norm())
        row += n


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("ranks", [(16, 16, 16), (5, 0, 3)])
def test_the_gradient_is_that_of_the_rounded_base(ranks: tuple[int, int, int], times: float, wish: str) -> None:
    skip_crude(wish)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    g, dense = group(128, (64, 32, 48), ranks, dtype, times)
    e = eight(g)
    like, dy = torch.randn(50, 128, device=DEVICE).to(dtype), torch.randn(50, 144, device=DEVICE).to(dtype)
    _, t = fold8.forward(g, e, fold8.taken(g, like), None, like)
    dx, u, dbs = fold8.backward(g, e, dy, t)
    want, row, at = torch.zeros(50, 128, device=DEVICE, dtype=torch.float64), 0, 0
    for w, low, db in zip(dense, g.lows, dbs, strict=True):
        part = dy[:, row : row + w.shape[0]].double()
        want += part @ w.double()
        assert (db is None) == (low is None)
        if low:
            r = low[0].shape[0]
            u64 = 1.5 * part @ low[1].double()
            want += u64 @ low[0].double()
            assert float((u[:, at : at + r] - u64).norm() / u64.norm()) < 1e-2
            db64 = part.T @ t[:, at : at + r].double()
            assert float((db - db64).norm() / db64.norm()) < 1e-2
            at += r
        row += w.shape[0]
    assert float((dx - want).norm() / want.norm()) < 0.05


def test_a_fresh_adapter_adds_nothing(wish: str) -> None:
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    g, _ = group(128, (64,), (8,), dtype)
    bare = g._replace(lows=(None,))
    a, b, s = g.lows[0] or ()
    fresh = g._replace(lows=((a, torch.zeros_like(b), s),))
    tiny = torch.tensor(fp8.TINY, device=DEVICE)
    like = torch.randn(50, 128, device=DEVICE).to(dtype)
    e = eight_of(g, a.abs().max(), tiny)
    y, _ = fold8.forward(fresh, e, fold8.taken(fresh, like), None, like)
    z, _ = fold8.forward(bare, e, fold8.taken(bare, like), None, like)
    torch.testing.assert_close(y, z)


def test_what_overflows_is_nan_and_not_silent(wish: str) -> None:
    skip_crude(wish)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    g, _ = group(128, (64,), (8,), dtype)
    a, b, s = g.lows[0] or ()
    huge = g._replace(lows=((a * 1e4, b * 1e4, s),))
    like = torch.randn(50, 128, device=DEVICE).to(dtype)
    y, _ = fold8.forward(huge, eight(huge), fold8.taken(huge, like), None, like)
    assert bool(y.isnan().any())
