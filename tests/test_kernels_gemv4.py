"""A few rows through 4-bit weights: the kernel's own body, on a GPU and in Triton's interpreter.

The interpreter knows no PTX, so there the instructions that the kernel is built on are replaced by their
definitions in Triton; everything else, addresses, masks, scales and sums, is the body that runs on a GPU.
"""

import pytest
import torch
from torch import Tensor

from lora.kernels import gemv4 as launch
from lora.kernels import gemv4_kernel as kernel
from lora.kernels._triton import tl, triton
from lora.kernels.code4 import Weight4, byte_table
from lora.kernels.dispatch import INTERPRETED
from lora.kernels.gemv4 import MEMORY, can_gemv4, down, gemv4, gemv4_group, permute_table
from lora.kernels.linear4 import linears4
from lora.kernels.warp import PAIRS, stretch
from lora.quant.weight import Packed, quantize_tensor

pytestmark = pytest.mark.usefixtures("triton_device")


# Programs run one behind the other in the interpreter, and all threads at once, so one memory will do for all
SHARED = torch.zeros(PAIRS + MEMORY, dtype=torch.uint8)
PAIRS_AT, MEMORY_AT = tl.constexpr(SHARED.data_ptr()), tl.constexpr(SHARED.data_ptr() + PAIRS)


@triton.jit
def shared(like):
    zero = tl.zeros_like(like).to(tl.int64)
    return zero + PAIRS_AT, zero, zero + MEMORY_AT


@triton.jit
def copy16(to, p, have):
    from_, to_, ok = p.to(tl.pointer_type(tl.int64)), to.to(tl.pointer_type(tl.int64)), have != 0
    tl.store(to_, tl.load(from_, mask=ok, other=-1), mask=ok)
    tl.store(to_ + 1, tl.load(from_ + 1, mask=ok, other=-1), mask=ok)


@triton.jit
def sent(like):
    pass


@triton.jit
def arrived(like, later: tl.constexpr):
    pass


@triton.jit
def start_flags(at, warps):
    pass


@triton.jit
def raise_flag(at):
    pass


@triton.jit
def wait_flag(at, phase):
    pass


@triton.jit
def put_same(at, word):
    for i in tl.static_range(4):
        tl.store(at.to(tl.pointer_type(tl.int32)) + i, word)


@triton.jit
def look8(word, at):
    a = tl.load((at + (word & 255) * 64).to(tl.pointer_type(tl.int32)))
    b = tl.load((at + ((word >> 8) & 255) * 64).to(tl.pointer_type(tl.int32)))
    c = tl.load((at + ((word >> 16) & 255) * 64).to(tl.pointer_type(tl.int32)))
    return a, b, c, tl.load((at + ((word >> 24) & 255) * 64).to(tl.pointer_type(tl.int32)))


@triton.jit
def put4(at, a, b, c, d):
    p = at.to(tl.pointer_type(tl.float32))
    tl.store(p, a)
    tl.store(p + 1, b)
    tl.store(p + 2, c)
    tl.store(p + 3, d)
    return at


@triton.jit
def get(at):
    return tl.load(at.to(tl.pointer_type(tl.float32)))


@triton.jit
def sum_parts(value, PARTS: tl.constexpr):
    W: tl.constexpr = value.shape[0] // 32
    total = tl.sum(tl.reshape(value, (W, PARTS, 32 // PARTS)), axis=1)
    return tl.reshape(tl.broadcast_to(total[:, None, :], (W, PARTS, 32 // PARTS)), (32 * W,))


@triton.jit
def get8(at):
    words = at.to(tl.pointer_type(tl.int32))
    return tl.load(words), tl.load(words + 1)


@triton.jit
def from_lane(value, lane):
    """Lane is 4 g + b, of the warp: the b-th of each row of four."""
    W: tl.constexpr = value.shape[0] // 32
    mine = (tl.arange(0, 4)[None, None, :] == (tl.reshape(lane, (W, 8, 4)) % 4)).to(tl.float32)
    four = tl.sum(tl.reshape(value, (W, 8, 4)) * mine, axis=2)
    return tl.reshape(tl.broadcast_to(four[:, :, None], (W, 8, 4)), (32 * W,))


@triton.jit
def load32(p, have):
    w, ok = p.to(tl.pointer_type(tl.int32)), have != 0
    a, b = tl.load(w, mask=ok, other=0), tl.load(w + 1, mask=ok, other=0)
    c, d = tl.load(w + 2, mask=ok, other=0), tl.load(w + 3, mask=ok, other=0)
    e, f = tl.load(w + 4, mask=ok, other=0), tl.load(w + 5, mask=ok, other=0)
    return a, b, c, d, e, f, tl.load(w + 6, mask=ok, other=0), tl.load(w + 7, mask=ok, other=0)


@triton.jit
def entry(nibble, t0, t1, t2, t3):
    """Byte `nibble` of the 16-byte table."""
    word = tl.where(nibble < 8, tl.where(nibble < 4, t0, t1), tl.where(nibble < 12, t2, t3))
    return (word >> (nibble % 4 * 8)) & 255


@triton.jit
def pair(word, i: tl.constexpr, l0, l1, l2, l3, h0, h1, h2, h3):
    """Elements i and i + 1 of a word, the first in the low half."""
    first, second = (word >> (4 * i + 4)) & 15, (word >> (4 * i)) & 15
    low = entry(first, l0, l1, l2, l3) | (entry(first, h0, h1, h2, h3) << 8)
    return low | (entry(second, l0, l1, l2, l3) << 16) | (entry(second, h0, h1, h2, h3) << 24)


@triton.jit
def decode8(word, low, high):
    l0, l1, l2, l3 = low
    h0, h1, h2, h3 = high
    return (
        pair(word, 0, l0, l1, l2, l3, h0, h1, h2, h3),
        pair(word, 2, l0, l1, l2, l3, h0, h1, h2, h3),
        pair(word, 4, l0, l1, l2, l3, h0, h1, h2, h3),
        pair(word, 6, l0, l1, l2, l3, h0, h1, h2, h3),
    )


@triton.jit
def halves(word, HALF: tl.constexpr):
    dtype: tl.constexpr = tl.float16 if HALF else tl.bfloat16
    low, high = (word & 0xFFFF).to(tl.int16), ((word >> 16) & 0xFFFF).to(tl.int16)
    return low.to(dtype, bitcast=True).to(tl.float32), high.to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def part(a, b, HALF: tl.constexpr):
    """(W, 8 rows, 8 tokens): the products of one operand word of each, summed over the four threads of a row."""
    W: tl.constexpr = a.shape[0] // 32
    al, ah = halves(tl.reshape(a, (W, 8, 1, 4)), HALF)
    bl, bh = halves(tl.reshape(b, (W, 1, 8, 4)), HALF)
    return tl.sum(al * bl + ah * bh, axis=3)


@triton.jit
def mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, HALF: tl.constexpr):
    W: tl.constexpr = a0.shape[0] // 32
    top = part(a0, b0, HALF) + part(a2, b1, HALF)
    low = part(a1, b0, HALF) + part(a3, b1, HALF)
    d0, d1 = tl.split(tl.reshape(top, (W, 8, 4, 2)))
    d2, d3 = tl.split(tl.reshape(low, (W, 8, 4, 2)))
    T: tl.constexpr = W * 32
    return (
        c0 + tl.reshape(d0, (T,)),
        c1 + tl.reshape(d1, (T,)),
        c2 + tl.reshape(d2, (T,)),
        c3 + tl.reshape(d3, (T,)),
    )


@pytest.fixture(autouse=True)
def definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        stands = (
            shared, copy16, sent, arrived, start_flags, raise_flag, wait_flag, put_same, put4, get, get8, sum_parts,
            look8, decode8, load32, from_lane, mma,
        )  # fmt: skip
        for function in stands:
            monkeypatch.setattr(kernel, function.fn.__name__, function)


def packed(N: int, K: int, double: bool, device: torch.device, kind: str = "nf4", block: int = 64) -> Packed:
    return quantize_tensor((torch.randn(N, K) * 0.02).to(device), kind, block, double)


def weight(p: Packed) -> Weight4:
    return Weight4(p.q.view(-1), p.scales, byte_table(p.code), permute_table(p.code), p.block, (p.shape[0], p.shape[1]))


def call(x: Tensor, p: Packed, bias: Tensor | None = None, low: tuple[Tensor, Tensor, float] | None = None) -> Tensor:
    return gemv4(x, weight(p), bias, low)


def exact(x: Tensor, p: Packed) -> tuple[Tensor, float]:
    """x Wᵀ in float64, and how far a weight rounded to the dtype of x is from it."""
    want = x.double() @ p.dequantize().double().T
    rounded = x.double() @ p.dequantize(x.dtype).double().T
    return want, float((rounded - want).norm())


def test_permute_table_holds_the_codes_as_bytes(triton_device: torch.device) -> None:
    p = packed(1, 64, False, triton_device)
    table = permute_table(p.code)
    assert table.shape == (2, 9, 32) and (table == table[:, :, :1]).all()
    for row, dtype in enumerate((torch.bfloat16, torch.float16)):
        low, high = (half[:, 0].contiguous().view(torch.uint8) for half in table[row, :8].split(4))
        bits = torch.stack((low.flatten(), high.flatten()), dim=1).flatten().view(dtype)
        by = stretch(p.code.double().cpu(), dtype).to(p.code.device)
        assert 1.0 <= float(by) < 2.0
        assert torch.equal(bits, (p.code.double() * by).to(dtype))
        assert torch.equal(table[row, 8, :1].contiguous().view(torch.float32), (1.0 / by).float())


@pytest.mark.parametrize("weights", ["normal", "heavy tails", "flat"])
@pytest.mark.parametrize(("kind", "dtype", "most"), [("nf4", torch.bfloat16, 5e-6), ("nf4", torch.float16, 3e-6),
                                                    ("fp4", torch.bfloat16, 5e-6)], ids=str)  # fmt: skip
def test_errors_of_stretched_codes_cancel_whatever_the_weights(
    triton_device: torch.device, kind: str, dtype: torch.dtype, most: float, weights: str
) -> None:
    draw = torch.randn(256, 1024) if weights == "normal" else torch.rand(256, 1024) - 0.5
    if weights == "heavy tails":
        draw = torch.distributions.Laplace(0.0, 1.0).sample((256, 1024))
    p = quantize_tensor(draw.to(triton_device), kind, 64, False)
    q, scale = p.q.view(-1).cpu().int(), p.scales[0].cpu().double()
    codes = torch.stack((q >> 4, q & 15), dim=1).view(len(scale), 64)
    exact = p.code.cpu().double()
    by = stretch(exact, dtype)
    error = (exact * by).to(dtype).double() / by - exact
    mean = float((error[codes].sum(dim=1) * scale).sum() / (64 * scale.sum()))
    assert abs(mean) < most  # NF4 as it is: 1.2e-4 to 2.4e-4 in bfloat16, 1e-5 in float16
    nearest = exact.to(dtype).double() - exact
    spread, least = (float((e[codes] ** 2).mean()) for e in (error, nearest))
    assert spread < (2.5 if weights == "flat" else 2.0) * least


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("N", "K", "M"), [(16, 64, 1), (40, 192, 3), (17, 320, 8), (100, 128, 13), (16, 2112, 30)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gemv4_errs_less_than_a_rounded_weight(
    triton_device: torch.device, dtype: torch.dtype, N: int, K: int, M: int, double: bool
) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter does not round bfloat16 stores to nearest; float16 runs the same body")
    p = packed(N, K, double, triton_device, "fp4" if M == 3 else "nf4")
    x = torch.randn(M, K, device=triton_device).to(dtype)
    got = call(x, p)
    want, rounded = exact(x, p)
    store = float((want.to(dtype).double() - want).norm())  # the result is rounded to 16 bits in any case
    assert got.shape == (M, N) and got.dtype == dtype
    assert float((got.double() - want).norm()) <= 1.1 * rounded + 1.1 * store
    assert torch.equal(got, call(x, p))


def test_inputs_of_one_sign_err_no_more_than_with_a_rounded_weight(gpu: torch.device) -> None:
    for dtype, kind in ((torch.bfloat16, "nf4"), (torch.float16, "nf4"), (torch.bfloat16, "fp4")):
        p = packed(1024, 4096, True, gpu, kind)
        for M in (1, 8, 16):
            x = torch.randn(M, 4096, device=gpu).abs().to(dtype)
            want, _ = exact(x, p)
            plain = (x @ p.dequantize(dtype).T).double()
            assert float((call(x, p).double() - want).norm()) <= 1.1 * float((plain - want).norm()), (dtype, kind, M)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("N", "K", "double"), [(512, 1024, True), (72, 4096, False)])
def test_any_number_of_rows_errs_no_more_than_a_product_with_the_rounded_weight(
    gpu: torch.device, dtype: torch.dtype, N: int, K: int, double: bool
) -> None:
    p = packed(N, K, double, gpu)
    rounded = p.dequantize(dtype)
    for M in [*range(1, 68), 96, 256]:  # beyond MOST_ROWS the weight is decoded
        x = torch.randn(M, K, device=gpu).to(dtype)
        (got,) = linears4(x, [weight(p)], [None], [None])
        want, _ = exact(x, p)
        error, plain = ((y.double() - want).norm() for y in (got, x @ rounded.T))
        assert error <= 1.1 * plain, M
        assert torch.equal(got, linears4(x, [weight(p)], [None], [None])[0])


@pytest.mark.parametrize("plan", [(1, 4, 2, 2, 4), (2, 2, 3, 0, 4), (2, 1, 4, 4, 8), (1, 1, 5, 1, 16)], ids=str)
@pytest.mark.parametrize(("N", "K", "M"), [(72, 1088, 3), (130, 512, 11)])
def test_gemv4_is_right_by_any_plan(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch, plan: tuple[int, ...], N: int, K: int, M: int
) -> None:
    """Programs with several turns, turns with several steps, units that end behind the row."""
    p = packed(N, K, True, triton_device)
    x, bias = torch.randn(M, K, device=triton_device).half(), torch.randn(N, device=triton_device).half()
    a, b = torch.randn(3, K, device=triton_device), torch.randn(N, 3, device=triton_device)
    want = exact(x, p)[0] + bias.double() + (x.double() @ a.double().T) @ b.double().T
    monkeypatch.setattr(launch, "plan", lambda K, tiles: launch.Plan(*plan))
    got = call(x, p, bias, (a, b, 1.0)).double()
    assert float((got - want).norm() / want.norm()) < 1e-3


@pytest.mark.parametrize("block", [128, 512, 4096])
def test_gemv4_takes_every_block_of_64_and_more(triton_device: torch.device, block: int) -> None:
    p = packed(20, 448, False, triton_device, block=block)  # blocks straddle rows
    x = torch.randn(2, 448, device=triton_device).half()
    want, rounded = exact(x, p)
    assert float((call(x, p).double() - want).norm()) <= 1.1 * rounded + 1e-3 * float(want.norm())


def test_gemv4_of_unit_vectors_reads_the_codes_out(triton_device: torch.device) -> None:
    p = packed(24, 64, False, triton_device)
    codes = torch.stack((p.q.view(-1) >> 4, p.q.view(-1) & 15), dim=1).flatten().long()
    by = stretch(p.code.double().cpu(), torch.float16).to(p.code.device)
    stretched = (p.code.double() * by).half().float()[codes].view(-1, 64) * p.absmax()[:, None]
    want = (stretched * (1.0 / by).float()).view(24, 64).half()
    x = torch.eye(64, device=triton_device).half()
    assert torch.equal(torch.cat([call(x[i : i + 16], p) for i in range(0, 64, 16)]).T, want)


@pytest.mark.parametrize("r", [1, 6, 16, 40])
def test_gemv4_adds_bias_and_low_rank_update(triton_device: torch.device, r: int) -> None:
    N, K, M = 23, 128, 5
    p = packed(N, K, True, triton_device)
    x, bias = torch.randn(M, K, device=triton_device).half(), torch.randn(N, device=triton_device).half()
    a, b = torch.randn(r, K, device=triton_device), torch.randn(N, r, device=triton_device)
    want = exact(x, p)[0] + bias.double() + 0.5 * (x.double() @ a.double().T) @ b.double().T
    got = call(x, p, bias, (a, b, 0.5)).double()
    assert float((got - want).norm() / want.norm()) < 2e-3


def test_gemv4_does_not_depend_on_the_rows_beside(triton_device: torch.device) -> None:
    p = packed(32, 256, True, triton_device)
    x = torch.randn(8, 256, device=triton_device).half()
    assert torch.equal(call(x, p)[3:4], call(x[3:4].contiguous(), p))


@pytest.mark.parametrize("M", [1, 11])
def test_gemv4_group_equals_its_weights_alone(triton_device: torch.device, M: int) -> None:
    K, Ns, ranks = 320, (40, 16, 23), (4, 0, 16)
    packs = [packed(N, K, True, triton_device, kind) for N, kind in zip(Ns, ("nf4", "fp4", "nf4"), strict=True)]
    x = torch.randn(M, K, device=triton_device).half()
    biases = [None, torch.randn(16, device=triton_device).half(), torch.randn(23, device=triton_device).half()]
    lows: list[tuple[Tensor, Tensor, float] | None] = [
        (torch.randn(r, K, device=triton_device), torch.randn(N, r, device=triton_device), 0.5) if r else None
        for N, r in zip(Ns, ranks, strict=True)
    ]
    have = [low for low in lows if low]
    xa = down([a for a, _, _ in have], [s for _, _, s in have], x)
    assert xa.shape == (M, 20)
    ys = gemv4_group(x, [weight(p) for p in packs], biases, [low[1] if low else None for low in lows], xa)
    for y, p, bias, low in zip(ys, packs, biases, lows, strict=True):
        assert y.shape == (M, p.shape[0]) and torch.equal(y, call(x, p, bias, low))


def test_gemv4_group_refuses_weights_that_do_not_go_together(triton_device: torch.device) -> None:
    nested, plain = packed(16, 64, True, triton_device), packed(16, 64, False, triton_device)
    other = packed(16, 128, True, triton_device)
    x = torch.zeros(1, 64, dtype=torch.float16, device=triton_device)
    with pytest.raises(ValueError, match="weights of one kind"):
        gemv4_group(x, [weight(nested), weight(plain)], [None, None], [None, None], None)
    with pytest.raises(ValueError, match=r"\(16, 128\)"):
        gemv4_group(x, [weight(nested), weight(other)], [None, None], [None, None], None)
    with pytest.raises(ValueError, match="updates of 4 columns"):
        gemv4_group(x, [weight(nested)], [None], [torch.zeros(16, 4, device=triton_device)], None)


def test_gemv4_takes_or_refuses_what_begins_anywhere(triton_device: torch.device) -> None:
    p = packed(16, 64, False, triton_device)
    x = torch.randn(3 * 64 + 1, device=triton_device).half()
    whole = x[1:].clone().view(3, 64)
    assert torch.equal(call(x[1:].view(3, 64), p), call(whole, p))
    q = torch.cat((torch.zeros(1, dtype=torch.uint8, device=triton_device), p.q.view(-1)))[1:]
    assert not can_gemv4(whole, q, 64, 64)
    with pytest.raises(ValueError, match="16 bytes"):
        gemv4(whole, weight(p)._replace(q=q))


def test_rows_that_lie_apart_or_across_are_right_or_refused(triton_device: torch.device) -> None:
    p = packed(16, 64, False, triton_device)
    wide = torch.randn(64, 6, device=triton_device).half()
    for x in (wide.T, torch.randn(3, 80, device=triton_device).half()[:, 7:71]):
        assert torch.equal(linears4(x, [weight(p)], [None], [None])[0], call(x.contiguous(), p))
        with pytest.raises(ValueError, match="wanted contiguous rows"):
            call(x, p)


@pytest.mark.parametrize("double", [False, True])
def test_bytes_and_scales_that_do_not_fit_are_refused(triton_device: torch.device, double: bool) -> None:
    w = weight(packed(16, 128, double, triton_device))
    x = torch.randn(3, 128, device=triton_device).half()

    def refuses(match: str, **changes) -> None:
        for call in (
            lambda: gemv4(x, w._replace(**changes)),
            lambda: linears4(x, [w._replace(**changes)], [None], [None]),
        ):
            with pytest.raises(ValueError, match=match):
                call()

    refuses(r"scales\[0\] holds 31", scales=(w.scales[0][:31], *w.scales[1:]))
    refuses(r"scales\[0\] holds 32 of torch.float16", scales=(w.scales[0].half(), *w.scales[1:]))
    refuses("2 tensors of scales", scales=(w.scales[0], w.scales[0]))
    refuses("q is torch.int8", q=w.q.view(torch.int8))
    refuses("block=96", block=96)


def test_gemv4_writes_its_own_rows_only(triton_device: torch.device) -> None:
    p = packed(21, 64, True, triton_device)  # the last program has rows to spare, and x tokens
    x = torch.randn(3, 64, device=triton_device).half()
    want = call(x, p)
    whole = torch.full((5, 21), 7.0, device=triton_device).half()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *shape, **_: whole[1:4] if shape == (3, 21) else None)
        launch._gemv4.launch(
            x, [p.q.view(-1)], list(p.scales), [permute_table(p.code)], 64, [21], [None], None, [None], False
        )
    assert torch.equal(whole[1:4], want) and (whole[0] == 7).all() and (whole[4] == 7).all()


def test_linears4_use_gemv4_where_nothing_learns(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    packs = [packed(16, 128, True, triton_device), packed(32, 128, True, triton_device)]
    weights = [weight(p) for p in packs]
    x = torch.randn(2, 1, 128, device=triton_device).half()
    ys = linears4(x, weights, [None, None], [None, None])
    assert [y.shape for y in ys] == [(2, 1, 16), (2, 1, 32)]
    assert torch.equal(ys[1].view(2, 32), call(x.view(2, 128), packs[1]))
    monkeypatch.setenv("LORA_KERNELS", "torch")
    for y, plain in zip(ys, linears4(x, weights, [None, None], [None, None]), strict=True):
        torch.testing.assert_close(y, plain, rtol=2e-2, atol=2e-3)


def test_can_gemv4_says_no_where_the_kernel_would_be_wrong(triton_device: torch.device) -> None:
    q = torch.zeros(64 * 96, dtype=torch.uint8, device=triton_device)
    x = torch.zeros(4, 128, dtype=torch.float16, device=triton_device)
    assert can_gemv4(x, q, 64, 128)
    assert not can_gemv4(x, q, 32, 128)  # two scales in a run of 64
    assert not can_gemv4(x[:, :96], q, 64, 96)  # a row ends inside a run
    assert not can_gemv4(torch.zeros(65, 128, dtype=torch.float16, device=triton_device), q, 64, 128)
    assert not can_gemv4(x.float(), q, 64, 128)


@pytest.mark.parametrize(("capability", "fits"), [((8, 9), False), ((9, 0), True), ((10, 0), True), ((12, 0), False)])
def test_can_gemv4_asks_for_a_gpu_with_the_shared_memory(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], fits: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert launch.fits.__wrapped__(torch.device("cuda")) is fits
    assert launch.fits.__wrapped__(torch.device("cpu"))


def test_gemv4_refuses_rows_of_another_width(triton_device: torch.device) -> None:
    p = packed(16, 128, False, triton_device)
    with pytest.raises(ValueError, match=r"x of shape \(1, 192\) through weights \[\(16, 128\)\]"):
        call(torch.zeros(1, 192, dtype=torch.float16, device=triton_device), p)
