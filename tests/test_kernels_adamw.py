"""AdamW in one pass, with moments in 32 and in 8 bits: kernel, twin, torch's, and the rule in numpy."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lora.kernels._triton import tl, triton
from lora.kernels.adamw import (
    BLOCK8,
    EXACT8,
    Moment8,
    _encode,
    adamw,
    adamw8,
    decode8,
    encode8,
    moment8,
    rates,
)
from lora.quant.codebook import dynamic_map, nf4

SIZES = [1, 255, 256, 257, 1024, 2500]
BETAS = (0.9, 0.98)


def hyper(lr: float, t: int, device: torch.device, betas: tuple[float, float] = BETAS, decay: float = 0.0) -> Tensor:
    return torch.tensor(rates(lr, t, betas, decay), device=device)


def state(n: int, device: torch.device) -> list[Tensor]:
    """w, g, m, v of a run under way, of widely different magnitudes."""
    w, g = torch.randn(n), torch.randn(n) * 10.0 ** torch.randint(-5, 2, (n,))
    return [t.to(device) for t in (w, g, g * torch.rand(n), g.square() * torch.rand(n))]


def moments(n: int, device: torch.device) -> tuple[Moment8, Moment8]:
    m, v = (moment8(n, dynamic_map(signed).to(device)) for signed in (True, False))
    return m, v


def filled(n: int, device: torch.device) -> tuple[Moment8, Moment8]:
    m, v = moments(n, device)
    for moment, low in ((m, 0), (v, 1)):
        moment.q.copy_(torch.randint(low, 256, (n,)))
        moment.absmax.copy_(torch.rand(moment.absmax.shape) * 0.1)
    return m, v


def clone(moment: Moment8) -> Moment8:
    return moment._replace(q=moment.q.clone(), absmax=moment.absmax.clone())


class Padded:
    """Copies of tensors between canaries; `whole` says that no canary changed."""

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, int]] = []

    def __call__(self, t: Tensor) -> Tensor:
        buffer = torch.full((t.numel() + 128,), 77, dtype=t.dtype, device=t.device)
        self.kept.append((buffer, t.numel()))
        return buffer[64 : 64 + t.numel()].copy_(t)

    def whole(self) -> bool:
        return all((b[:64] == 77).all() and (b[64 + n :] == 77).all() for b, n in self.kept)


def on(path: str, monkeypatch: pytest.MonkeyPatch, run: Callable[[], None]) -> None:
    """Runs on one of the two paths, whatever the fixture asked for."""
    with monkeypatch.context() as patch:
        patch.setenv("LORA_KERNELS", path)
        run()


# ---- 32 bits ----
def exact(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, lr: float, t: int, decay: float, betas: tuple[float, float], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula in float64."""
    w, g, m, v = (x.double().cpu() for x in (w, g, m, v))
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    w = w * (1 - lr * decay) - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return w, m, v


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("decay", "betas"), [(0.0, BETAS), (0.1, BETAS), (0.1, (0.3, 0.9)), (0.0, (0.0, 0.0))])
def test_kernel_is_as_near_to_float64_as_the_twin(
    n: int, decay: float, betas: tuple[float, float], triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = state(n, triton_device)
    rest = hyper(1e-2, 3, triton_device, betas, decay)
    truth = exact(*start, 1e-2, 3, decay, betas, 1e-8)
    errors = {}
    for path in ("torch", "triton"):
        pad = Padded()
        w, g, m, v = (pad(t) for t in start)
        on(path, monkeypatch, lambda: adamw(w, g, m, v, rest, betas=betas))  # noqa: B023
        assert pad.whole() and torch.equal(g, start[1])
        errors[path] = [(got.cpu() - want).abs().max().item() for got, want in zip((w, m, v), truth, strict=True)]
    for kernel, twin, want in zip(errors["triton"], errors["torch"], truth, strict=True):
        assert kernel <= 1.1 * twin + 1e-7 * want.abs().max().item()


def test_adamw_equals_torch_over_20_steps(triton_device: torch.device) -> None:
    n = 999
    w = torch.randn(n, device=triton_device)
    g, m, v = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)
    theirs = torch.nn.Parameter(w.clone())
    peer = torch.optim.AdamW([theirs], betas=BETAS, weight_decay=0.1)
    for t in range(1, 21):
        lr = 1e-2 * t / 20
        g.copy_(torch.randn(n) * 0.3)
        theirs.grad = g.clone()
        peer.param_groups[0]["lr"] = lr
        peer.step()
        adamw(w, g, m, v, hyper(lr, t, triton_device, decay=0.1), betas=BETAS)
    torch.testing.assert_close(w, theirs.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("path", ["torch", "triton"])
def test_scale_zero_and_out16_are_what_separate_passes_would_do(
    bits: int, path: str, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = 1300
    low = torch.bfloat16 if triton_device.type == "cuda" else torch.float16  # the interpreter does not round bfloat16
    w, g, m, v = state(n, triton_device)
    if bits == 8:
        m, v = filled(n, triton_device)
        run, other = adamw8, (clone(m), clone(v))
    else:
        run, other = adamw, (m.clone(), v.clone())
    rest, scale = hyper(1e-2, 2, triton_device), torch.tensor(0.37, device=triton_device)
    pad = Padded()
    w2, g2, out = pad(w), pad(g), pad(torch.empty(n, dtype=low, device=triton_device))
    on(path, monkeypatch, lambda: run(w, g * scale, m, v, rest))
    on(path, monkeypatch, lambda: run(w2, g2, *other, rest, scale=scale, out16=out, zero=True))
    assert torch.equal(w, w2) and not g2.any() and pad.whole()
    assert torch.equal(out, w.to(low))
    for a, b in zip((m, v), other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:2], b[:2], strict=True)) if bits == 8 else torch.equal(a, b)


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_nan_stays_where_it_is(path: str, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    w, g, m, v = state(40, triton_device)
    g[7] = math.nan
    on(path, monkeypatch, lambda: adamw(w, g, m, v, hyper(1e-2, 1, triton_device)))
    for t in (w, m, v):
        assert t.isnan().nonzero().flatten().tolist() == [7]


# ---- 8 bits ----
@triton.jit
def _encode_kernel(x_ptr, table_ptr, q_ptr, absmax_ptr, ZERO_CODE: tl.constexpr):
    row = tl.program_id(0)
    i = row * 256 + tl.arange(0, 256)
    q, absmax = _encode(tl.load(x_ptr + i), table_ptr, ZERO_CODE)
    tl.store(q_ptr + i, q)
    tl.store(absmax_ptr + row, absmax)


def encoded(x: Tensor, moment: Moment8) -> tuple[Tensor, Tensor]:
    """Codes and absmax of x (rows, 256) by the kernel's own function, and checked against the twin's."""
    rows = x.shape[0]
    q, absmax = torch.empty_like(x, dtype=torch.uint8), torch.empty(rows, device=x.device)
    options = {"ZERO_CODE": moment.zero, "num_warps": 1, "enable_fp_fusion": False}
    _encode_kernel[(rows,)](x, moment.table, q, absmax, **options)
    twin = encode8(x, moment.table, moment.zero)
    assert torch.equal(q, twin[0]) and torch.equal(absmax.nan_to_num(-1.0), twin[1].nan_to_num(-1.0))
    return q, absmax


def nearest(s: np.ndarray, code: np.ndarray) -> np.ndarray:
    """The documented rule in float64: nearest level of s in [-1, 1], ties towards zero, none to 0 from above in v."""
    zero = int((code < 0).sum())
    half = code[zero:].astype(np.float64)
    k = np.searchsorted((half[:-1] + half[1:]) / 2, np.abs(s.astype(np.float64)), side="left")
    if zero:
        return np.where(s < 0, zero - np.minimum(k, zero), zero + k)
    return np.where(s > 0, np.maximum(k, 1), k)


def neighbours(x: np.ndarray, reach: int) -> np.ndarray:
    """The float32 values up to `reach` units away from each x >= 0."""
    words = x.astype(np.float32).view(np.int32)[:, None] + np.arange(-reach, reach + 1, dtype=np.int32)
    return np.maximum(words, 0).astype(np.int32).view(np.float32).ravel()


@pytest.mark.parametrize("signed", [True, False])
def test_encoding_is_the_nearest_level_at_every_edge(signed: bool, triton_device: torch.device) -> None:
    moment, code = moment8(256, dynamic_map(signed).to(triton_device)), dynamic_map(signed).numpy()
    levels = code[code >= 0]
    decades = 10.0 ** -np.arange(0, 9)
    draw = np.random.default_rng(7)
    s = np.concatenate(
        (
            neighbours((levels[:-1].astype(np.float64) + levels[1:]) / 2, 3),
            neighbours(levels, 2),
            neighbours(decades, 4),
            draw.random(6000, dtype=np.float32),
            10.0 ** draw.uniform(-9, 0, 6000),
            10.0 ** draw.uniform(-45, -30, 200),  # subnormals among them
            [0.0, 1e-45, 2.0**-126],
        )
    ).astype(np.float32)
    s = s[s <= 1]
    if signed:
        s = np.concatenate((s, -s))
    s = np.pad(s, (0, -len(s) % 255)).reshape(-1, 255)
    x = np.concatenate((np.ones((len(s), 1), np.float32), s), axis=1)  # absmax 1, so that s is what is encoded
    q, absmax = encoded(torch.from_numpy(x).to(triton_device), moment)
    assert (absmax == 1).all()
    np.testing.assert_array_equal(q.cpu().numpy(), nearest(x, code))


@pytest.mark.parametrize("signed", [True, False])
def test_blocks_that_are_zero_tiny_huge_or_not_finite(signed: bool, triton_device: torch.device) -> None:
    moment = moment8(256, dynamic_map(signed).to(triton_device))
    x = torch.rand(8, 256)
    x[0] = 0
    x[1] *= 1e-39
    x[2] *= 2.0**-125
    x[3] *= 3e38
    x[4, 100], x[5, 3], x[6, 9] = math.nan, math.inf, -math.inf if signed else math.inf
    q, absmax = (t.cpu() for t in encoded(x.to(triton_device), moment))
    assert absmax[:2].tolist() == [0, 0] and (q[[0, 1, 4, 5, 6]] == moment.zero).all()
    assert absmax[4].isnan() and (absmax[5:7] == math.inf).all()
    kept = torch.tensor([2, 3, 7])
    values = moment.table[0].cpu()[q[kept].int()] * absmax[kept, None]
    assert ((values - x[kept]).abs().amax(dim=1) <= 0.05 * absmax[kept]).all()


def by_numpy(
    w: np.ndarray,
    g: np.ndarray,
    states: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
    rest: np.ndarray,
    eps: float,
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """One step in float32, value by value as documented; `states` are (q, absmax, code) of m and v."""
    f, n = np.float32, len(w)
    block = np.arange(n) // 256
    m, v = (code[q] * absmax[block] for q, absmax, code in states)
    m = m + (g - m) * f(1 - BETAS[0])
    v = v * f(BETAS[1]) + g * g * f(1 - BETAS[1])
    w = w * rest[2] - m * (rest[0] * rest[1]) / (np.sqrt(v) + rest[1] * f(eps))
    after = []
    for x, (_, absmax, code) in zip((m, v), states, strict=True):
        top = np.zeros_like(absmax)
        np.maximum.at(top, block, np.abs(x))
        with np.errstate(divide="ignore"):
            inverse = np.where(top > 0, f(1) / top, f(0)).astype(f)
        after.append((nearest(x * inverse[block], code), top))
    return w, after


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("path", ["torch", "triton"])
def test_adamw8_equals_the_rule_in_numpy(
    n: int, path: str, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pad = Padded()
    w = pad(torch.randn(n).to(triton_device))
    m, v = (x._replace(q=pad(x.q), absmax=pad(x.absmax)) for x in moments(n, triton_device))
    codes = [dynamic_map(True).numpy(), dynamic_map(False).numpy()]
    for t in range(1, 6):
        g = (torch.randn(n) * 10.0 ** torch.randint(-6, 2, (n,))).to(triton_device)
        rest = hyper(1e-2, t, triton_device, decay=0.1)
        states = [
            (x.q.cpu().numpy().copy(), x.absmax.cpu().numpy().copy(), code)
            for x, code in zip((m, v), codes, strict=True)
        ]
        want, after = by_numpy(w.cpu().numpy().copy(), g.cpu().numpy(), states, rest.cpu().numpy(), 1e-8)
        on(path, monkeypatch, lambda: adamw8(w, g, m, v, rest, betas=BETAS))  # noqa: B023
        for x, (q, absmax) in zip((m, v), after, strict=True):
            np.testing.assert_array_equal(x.absmax.cpu().numpy(), absmax)
            np.testing.assert_array_equal(x.q.cpu().numpy(), q)
        np.testing.assert_allclose(w.cpu().numpy(), want, rtol=0 if EXACT8 else 2e-7, atol=0 if EXACT8 else 1e-8)
    assert pad.whole()
    scale = m.absmax.cpu().numpy()[np.arange(n) // BLOCK8]
    np.testing.assert_array_equal(decode8(m).cpu().numpy(), codes[0][m.q.cpu().numpy()] * scale)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.3, 0.9), (0.0, 0.5)])
def test_adamw8_kernel_equals_the_twin(
    betas: tuple[float, float], triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = 1999
    w, g, _, _ = state(n, triton_device)
    m, v = filled(n, triton_device)
    results = []
    for path in ("torch", "triton", "triton"):
        w_, m_, v_ = w.clone(), clone(m), clone(v)
        rest = hyper(1e-2, 3, triton_device, betas, 0.1)
        on(path, monkeypatch, lambda: adamw8(w_, g, m_, v_, rest, betas=betas))  # noqa: B023
        results.append((w_, m_.q, m_.absmax, v_.q, v_.absmax))
    twin, first, second = results
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first[1:], twin[1:], strict=True))
    torch.testing.assert_close(first[0], twin[0], rtol=0 if EXACT8 else 2e-7, atol=0 if EXACT8 else 1e-8)


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_a_parameter_of_small_gradient_does_not_leap_when_its_gradient_stops(
    path: str, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = torch.zeros(256, device=triton_device)
    m, v = moments(256, triton_device)
    g = torch.full((256,), 1e-4, device=triton_device)
    g[0] = 1.0  # v of the others is 1e-8 of it: the nearest level is 0
    for t in range(1, 4):
        rest = hyper(1e-3, t, triton_device)
        on(path, monkeypatch, lambda: adamw8(w, g if t < 3 else g * 0, m, v, rest, betas=BETAS))  # noqa: B023
    assert w.abs().max() < 4e-3


@pytest.mark.parametrize("path", ["torch", "triton"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_block_that_met_nan_or_inf_is_nan_from_the_next_step_on(
    bad: float, path: str, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = torch.zeros(600, device=triton_device)
    m, v = moments(600, triton_device)
    g = torch.ones_like(w)
    g[300] = bad
    on(path, monkeypatch, lambda: adamw8(w, g, m, v, hyper(1e-3, 1, triton_device)))
    assert w.isnan().nonzero().flatten().tolist() == [300]
    on(path, monkeypatch, lambda: adamw8(w, torch.ones_like(g), m, v, hyper(1e-3, 2, triton_device)))
    assert w[256:512].isnan().all() and not w[:256].isnan().any() and not w[512:].isnan().any()


# ---- the door ----
def test_wrong_buffers_are_refused() -> None:
    cpu = torch.device("cpu")
    w, g, m, v = state(300, cpu)
    rest = hyper(1e-3, 1, cpu)
    with pytest.raises(ValueError, match=r"m is \(299,\) torch.float32; it must be \(300,\)"):
        adamw(w, g, m[:299], v, rest)
    with pytest.raises(ValueError, match="g is .*not contiguous"):
        adamw(w, torch.zeros(600)[::2], m, v, rest)
    with pytest.raises(ValueError, match="w is .*torch.bfloat16; it must be .*torch.float32"):
        adamw(w.bfloat16(), g, m, v, rest)
    with pytest.raises(ValueError, match="hyper is"):
        adamw(w, g, m, v, rest[:2])
    with pytest.raises(ValueError, match="scale is"):
        adamw(w, g, m, v, rest, scale=torch.ones(1))
    with pytest.raises(ValueError, match="out16 is"):
        adamw(w, g, m, v, rest, out16=torch.zeros(300))
    m8, v8 = moments(300, cpu)
    with pytest.raises(ValueError, match="signed levels and v those without"):
        adamw8(w, g, v8, m8, rest)
    with pytest.raises(ValueError, match="v.absmax is"):
        adamw8(w, g, m8, v8._replace(absmax=v8.absmax[:1]), rest)


@pytest.mark.parametrize("code", [nf4(), torch.linspace(-1, 1, 256), dynamic_map().flip(0), dynamic_map()[1:]])
def test_other_levels_than_the_dynamic_map_are_refused(code: Tensor) -> None:
    with pytest.raises(ValueError, match="not the 256 levels of the 8-bit dynamic map"):
        moment8(256, code)


def test_nothing_to_do_is_done(triton_device: torch.device) -> None:
    empty = torch.zeros(0, device=triton_device)
    adamw(empty, empty, empty, empty, hyper(1e-3, 1, triton_device))
    adamw8(empty, empty, *moments(0, triton_device), hyper(1e-3, 1, triton_device))


def test_the_operators_say_what_they_write(triton_device: torch.device) -> None:
    w, g, m, v = state(300, triton_device)
    rest, scale = hyper(1e-3, 1, triton_device), torch.ones((), device=triton_device)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.lora.adamw, (w, g, m, v, rest, *BETAS, 1e-8, scale, None, True), test_utils=checks)
    m8, v8 = moments(300, triton_device)
    args = (w, g, *m8[:3], *v8[:3], rest, *BETAS, 1e-8, None, w.half(), False)
    torch.library.opcheck(torch.ops.lora.adamw8, args, test_utils=checks)


def test_one_graph_serves_every_step(gpu: torch.device) -> None:
    w, g, m, v = state(5000, gpu)
    other = [t.clone() for t in (w, g, m, v)]
    rest = hyper(1e-2, 1, gpu)
    adamw(*other, rest)  # compiled before the capture
    other = [t.clone() for t in (w, g, m, v)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adamw(w, g, m, v, rest)
    for t in range(1, 4):
        g.copy_(torch.randn(5000))
        other[1].copy_(g)
        rest.copy_(hyper(1e-2 / t, t, gpu))
        graph.replay()
        adamw(*other, rest)
    assert torch.equal(w, other[0])
