"""The gate of an MLP with the sums of its neighbours' factors: twin against float64, kernel against twin."""

import pytest
import torch
from torch import Tensor

from lora.kernels import dispatch, gate
from lora.kernels.gate import gate_backward, gate_forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL = torch.cuda.is_available() or dispatch.INTERPRETED


def act(g: Tensor, gelu: bool) -> Tensor:
    return torch.nn.functional.gelu(g, approximate="tanh") if gelu else torch.nn.functional.silu(g)


def inputs(M: int, F: int, ranks: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """dh, g and u as columns of wider buffers, whose other columns are poisoned; and the three factors."""
    torch.manual_seed(M + F)
    wide = [torch.full((M, F + 8), torch.nan, dtype=dtype, device=DEVICE) for _ in range(3)]
    for w in wide:
        w[:, :F] = torch.randn(M, F)
    factors = (torch.randn(M, r).to(DEVICE, dtype) for r in ranks)
    return (*(w[:, :F] for w in wide), *factors)


def wanted(dh: Tensor, g: Tensor, u: Tensor, v: Tensor, tg: Tensor, tu: Tensor, gelu: bool) -> tuple[Tensor, ...]:
    """h, dg, du and the three sums by autograd in float64."""
    g64, u64 = g.double().requires_grad_(), u.double().requires_grad_()
    h = act(g64, gelu) * u64
    dg, du = torch.autograd.grad(h, (g64, u64), dh.double())
    return h.detach(), dg, du, v.double().T @ h.detach(), dg.T @ tg.double(), du.T @ tu.double()


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


SHAPES = [(1, 32, (1, 1, 1)), (70, 130, (5, 3, 8)), (300, 257, (16, 16, 16)), (129, 64, (64, 33, 1))]


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("M", "F", "ranks"), SHAPES)
def test_it_equals_autograd_in_float64(M: int, F: int, ranks: tuple[int, int, int], gelu: bool) -> None:
    dh, g, u, *factors = inputs(M, F, ranks, torch.float32)
    h, dg, du, *sums = wanted(dh, g, u, *factors, gelu=gelu)
    out = torch.empty_like(g)
    assert error(gate_forward(g, u, gelu, out), h) < 1e-6
    got = gate_backward(dh, g, u, *factors, gelu=gelu, keep_h=True)
    assert max(error(dh, h), error(g, dg), error(u, du)) < 2e-6
    for one, want in zip(got, sums, strict=True):
        assert one is not None and one.dtype == torch.float32 and error(one, want) < 3e-6


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_sum_that_is_not_wanted_is_none(missing: int) -> None:
    dh, g, u, *factors = inputs(40, 64, (4, 4, 4), torch.float32)
    *_, a, bg, bu = wanted(dh, g, u, *factors, gelu=False)
    before = dh.clone()
    got = gate_backward(dh, g, u, *(None if i == missing else f for i, f in enumerate(factors)))
    assert got[missing] is None and torch.equal(dh, before)
    assert all(one is None or error(one, want) < 3e-6 for one, want in zip(got, (a, bg, bu), strict=True))


@pytest.mark.skipif(not KERNEL, reason="needs a GPU, or TRITON_INTERPRET=1")
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("M", "F", "ranks"), SHAPES)
def test_the_kernel_equals_its_twin(
    M: int, F: int, ranks: tuple[int, int, int], gelu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32 within rounding; bfloat16, on a GPU, at most 1.1 x the twin's error; twice the same bits."""
    for dtype in (torch.float32, torch.bfloat16) if torch.cuda.is_available() else (torch.float32,):
        results = []
        for wish in ("torch", "triton", "triton"):
            monkeypatch.setenv("LORA_KERNELS", wish)
            dh, g, u, *factors = inputs(M, F, ranks, dtype)
            want = wanted(dh, g, u, *factors, gelu=gelu)
            h = gate_forward(g, u, gelu, torch.full_like(g, torch.nan))
            sums = gate_backward(dh, g, u, *factors, gelu=gelu, keep_h=True)
            results.append((h, dh, g, u, *sums))
        twin, once, again = results
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
        for a, b, exact in zip(twin, once, (want[0], *want), strict=True):
            assert error(b, exact) <= 1.1 * error(a, exact) + (3e-6 if dtype == torch.float32 else 1e-4)


@pytest.mark.parametrize(
    "wish", ["torch", pytest.param("triton", marks=pytest.mark.skipif(not KERNEL, reason="no GPU"))]
)
@pytest.mark.parametrize(("runs", "rows"), [(1, 40), (3, 37), (2, gate.ROWS * gate.PARTS + 5), (gate.PARTS + 1, 2)])
def test_runs_of_rows_have_sums_of_their_own(runs: int, rows: int, wish: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS", wish)
    dh, g, u, *factors = inputs(runs * rows, 70, (5, 3, 8), torch.float32)
    parts = [t.split(rows) for t in (dh, g, u, *factors)]
    want = [wanted(*(p[i] for p in parts), gelu=False) for i in range(runs)]
    got = gate_backward(dh, g, u, *(t.unflatten(0, (runs, rows)) for t in factors))
    for i, one in enumerate(got, start=3):
        assert one is not None and error(one, torch.stack([w[i] for w in want])) < 3e-6
    assert error(g, torch.cat([w[1] for w in want])) < 2e-6 and error(u, torch.cat([w[2] for w in want])) < 2e-6


@pytest.mark.skipif(not KERNEL, reason="needs a GPU, or TRITON_INTERPRET=1")
def test_rows_split_over_programs_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS", "triton")
    M = gate.ROWS * gate.PARTS * 2 + 5  # several steps a program, the last ones empty
    dh, g, u, *factors = inputs(M, 32, (2, 2, 2), torch.float32)
    *_, a, bg, bu = wanted(dh, g, u, *factors, gelu=False)
    got = gate_backward(dh, g, u, *factors)
    assert all(one is not None and error(one, want) < 3e-6 for one, want in zip(got, (a, bg, bu), strict=True))


def test_what_does_not_fit_is_refused() -> None:
    g = torch.zeros(4, 8)
    with pytest.raises(ValueError, match="r at most 64"):
        gate_backward(g, g.clone(), g.clone(), torch.zeros(4, 65))
    with pytest.raises(ValueError, match=r"tg is \(3, 2, 1\); beside 4 rows"):
        gate_backward(g, g.clone(), g.clone(), None, torch.zeros(3, 2, 1))
    with pytest.raises(ValueError, match="v is .* as all are"):
        gate_backward(g, g.clone(), g.clone(), torch.zeros(4, 1), torch.zeros(2, 2, 1))
    with pytest.raises(ValueError, match="one dtype"):
        gate_backward(g, g.clone(), torch.zeros(4, 9))
