"""Every kernel past 2**31 elements, where an offset of 32 bits would have turned negative.

The last rows of one large call must have the bits of a call on those rows alone.  Weights of 4 bits past 2**31 values:
test_kernels_code4.py and test_quant_weight.py.
"""

import fcntl
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora.kernels import adamw, attend, cross_entropy, gate8, lay, norm, rope, swiglu
from lora.kernels.code4 import byte_table
from lora.kernels.gemv4 import permute_table
from lora.kernels.linear4 import Weight4, linears4
from lora.quant.codebook import codebook, dynamic_map

D = 4096
M = 2**31 // D + 5
TAIL = 4  # rows whose elements all lie past 2**31


@pytest.fixture(autouse=True)
def alone(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One of these tests at a time, on all workers together: each takes up to 40 GB."""
    monkeypatch.setenv("LORA_KERNELS", "triton")
    with Path(tempfile.gettempdir(), "lora-test-large.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if torch.cuda.get_device_properties(gpu).total_memory < 70e9:
            pytest.skip("needs a GPU of 70 GB or more")
        yield
        torch.cuda.empty_cache()


def values(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    t = torch.empty(shape, dtype=dtype, device="cuda")
    for part in t.view(-1).split(2**28):
        part.normal_()
    return t


def tail(t: Tensor) -> Tensor:
    return t[-TAIL:].clone()


def test_gate_in_8_bits() -> None:
    dh, g, u = (values(M, D) for _ in range(3))
    b, v = values(D, 2), values(M, 2)
    scale, low = gate8.gate_scales(dh, g, u, b, b, False)
    scale2, low2 = gate8.gate_scales(tail(dh), tail(g), tail(u), b, b, False)
    assert torch.equal(scale[-TAIL:], scale2)
    torch.testing.assert_close(low[-TAIL:], low2, rtol=1e-4, atol=1e-3)  # over other shares of a row
    outs = []
    for rows in (slice(None), slice(-TAIL, None)):
        x = [t[rows] for t in (dh, g, u, scale)]
        out = torch.empty(x[0].shape[0], 2 * D, dtype=torch.float8_e4m3fn, device="cuda")
        sums = gate8.new_sums(1, D, (v[rows], None, None), dh.device)
        gate8.gate_round(x[0], x[1], x[2], x[3], out, (v[rows], None, None), sums[0], False)
        assert sums.isfinite().all()
        outs.append(out[-TAIL:].view(torch.uint8))
    assert torch.equal(outs[0], outs[1])


def test_rms_norm() -> None:
    x, w, dy = values(M, D), values(D), values(M, D)
    y, _, r = norm.rms_norm_forward(x, None, w, 1e-5)
    again, _, r2 = norm.rms_norm_forward(tail(x), None, w, 1e-5)
    assert torch.equal(y[-TAIL:], again) and torch.equal(r[-TAIL:], r2)
    del y
    for want_dw in (False, True):
        dx, dw = norm.rms_norm_backward(dy, None, x, w, r, want_dw=want_dw)
        want, _ = norm.rms_norm_backward(tail(dy), None, tail(x), w, r2, want_dw=want_dw)
        assert dx is not None and want is not None and torch.equal(dx[-TAIL:], want)
        assert dw is None or dw.isfinite().all()


def test_rope() -> None:
    T, H = 2**31 // (32 * 128) + 3, 32
    q, cos, sin = values(1, T, H, 128), values(1, T, 1, 64), values(1, T, 1, 64)
    y = rope.rope(q, cos, sin)
    want = rope.rope(q[:, -TAIL:].clone(), cos[:, -TAIL:].clone(), sin[:, -TAIL:].clone())
    assert torch.equal(y[:, -TAIL:], want)


def test_swiglu() -> None:
    g, u, dh = values(M, D), values(M, D), values(M, D)
    assert torch.equal(swiglu.swiglu_forward(g, u)[-TAIL:], swiglu.swiglu_forward(tail(g), tail(u)))
    want = swiglu.swiglu_backward(tail(dh), tail(g), tail(u))
    got = swiglu.swiglu_backward(dh, g, u, out=(g, u))
    assert all(torch.equal(a[-TAIL:], b) for a, b in zip(got, want, strict=True))


def test_cross_entropy() -> None:
    V = 128256
    n = 2**31 // V + 6
    z, t = values(n, V), torch.randint(V, (n,), device="cuda")
    g = torch.rand(n, device="cuda")
    nll, hit, stats = cross_entropy.statistics(z, t)
    want = cross_entropy.statistics(tail(z), tail(t))
    assert all(torch.equal(a[-TAIL:], b) for a, b in zip((nll, hit, stats), want, strict=True))
    gradient = cross_entropy.gradient(z, t, stats, g)
    assert torch.equal(gradient[-TAIL:], cross_entropy.gradient(tail(z), tail(t), want[2], tail(g)))
    del gradient
    last = tail(z)
    cross_entropy._overwrite(z, t, True)
    cross_entropy._overwrite(last, tail(t), True)
    assert torch.equal(z[-TAIL:], last)


def test_adamw() -> None:
    n, part = 2**31 + 5000, 4096
    w, g, m = (values(n, dtype=torch.float32) for _ in range(3))
    v = m.abs()
    hyper = torch.tensor(adamw.rates(1e-2, 3), device="cuda")
    last = [t[-part:].clone() for t in (w, g, m, v)]
    adamw.adamw(w, g, m, v, hyper)
    adamw.adamw(*last, hyper)
    assert all(torch.equal(t[-part:], want) for t, want in zip((w, g, m, v), last, strict=True))


def test_adamw8() -> None:
    n, part = 2**31 + 5120, 4096
    codes = [dynamic_map(signed).to("cuda") for signed in (True, False)]
    w, g = (values(n, dtype=torch.float32) for _ in range(2))
    m, v = (adamw.moment8(n, code) for code in codes)
    hyper = torch.tensor(adamw.rates(1e-2, 1), device="cuda")
    few = [adamw.moment8(part, code) for code in codes]
    last = w[-part:].clone()
    adamw.adamw8(w, g, m, v, hyper)
    adamw.adamw8(last, g[-part:].clone(), *few, hyper)
    assert torch.equal(w[-part:], last)
    for moment, want in zip((m, v), few, strict=True):
        assert torch.equal(moment.q[-part:], want.q)
        assert torch.equal(moment.absmax[-part // 256 :], want.absmax)


def test_attention_of_a_token() -> None:
    B, Hkv, S, D = 9, 8, 2**18, 128  # the last row of the cache begins at 2**31 elements
    keys, values_ = torch.zeros(2, B, Hkv, S, D, dtype=torch.bfloat16, device="cuda")
    keys[-1, :, -64:], values_[-1, :, -64:] = values(Hkv, 64, D), values(Hkv, 64, D)
    q, k, v = values(B, 32 * D), values(B, Hkv * D), values(B, Hkv * D)
    angle = torch.rand(64, D // 2, device="cuda")
    at, start = torch.full((B,), S - 1, device="cuda"), torch.full((B,), S - 50, device="cuda")
    alone = [t[-1:].clone() for t in (keys, values_)]
    got = attend.attend(q, k, v, keys, values_, at, start, angle.cos(), angle.sin())
    row = [t[-1:].clone() for t in (q, k, v)]
    want = attend.attend(*row, *alone, at[-1:], start[-1:], angle.cos(), angle.sin())
    assert torch.equal(got[-1:], want) and torch.equal(keys[-1:], alone[0]) and torch.equal(values_[-1:], alone[1])


def test_fringe() -> None:
    wide = torch.zeros(M, D, dtype=torch.bfloat16, device="cuda")
    src = values(M, 16, dtype=torch.float32)
    lay.fringe(wide[:, -64:], src, ones=True)
    want = torch.zeros(TAIL, 64, dtype=torch.bfloat16, device="cuda")
    lay.fringe(want, tail(src), ones=True)
    assert torch.equal(wide[-TAIL:, -64:], want) and not wide[-TAIL:, :-64].any()


def test_few_rows_through_a_weight() -> None:
    N = M + 11
    code = codebook("nf4").to("cuda")
    q = torch.randint(256, (N * D // 2,), dtype=torch.uint8, device="cuda")
    absmax = torch.rand(N * D // 64, device="cuda")
    x = values(3, D)

    def through(first: int) -> Tensor:
        part, scale = q[first * D // 2 :], absmax[first * D // 64 :]
        weight = Weight4(part, (scale,), byte_table(code), permute_table(code), 64, (N - first, D))
        return linears4(x, [weight], [None], [None])[0]

    # rows a program takes begin elsewhere in the part, and the products of a row do not depend on that
    assert torch.equal(through(0)[:, -16:], through(N - 16))
