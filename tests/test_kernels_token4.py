"""Products of one token a row with what lies between them inside: the kernel's body against float64."""

import pytest
import torch
from test_kernels_gemv4 import definitions, packed, weight
from torch import Tensor

from lora.kernels import gemv4, token4_kernel
from lora.kernels import token4 as launch
from lora.kernels._triton import tl, triton
from lora.kernels.dispatch import INTERPRETED
from lora.kernels.token4 import Shares, can_token4, token4, token4_add, token4_gate
from lora.kernels.warp import PAIRS, ROOM, SUMS
from lora.quant.weight import Packed

pytestmark = pytest.mark.usefixtures("triton_device", "definitions", "memory")
__all__ = ["definitions"]

MEMORY = torch.zeros(PAIRS + SUMS + ROOM, dtype=torch.uint8)
PAIRS_AT, SUMS_AT = tl.constexpr(MEMORY.data_ptr()), tl.constexpr(MEMORY.data_ptr() + PAIRS)
ROOM_AT = tl.constexpr(MEMORY.data_ptr() + PAIRS + SUMS)


@triton.jit
def rooms(like):
    zero = tl.zeros_like(like).to(tl.int64)
    return zero + PAIRS_AT, zero + SUMS_AT, zero, zero + ROOM_AT


@triton.jit
def load8(p, have):
    words = p.to(tl.pointer_type(tl.int32))
    return tl.load(words, mask=have != 0, other=-1), tl.load(words + 1, mask=have != 0, other=-1)


@triton.jit
def room(like):
    return tl.zeros_like(like).to(tl.int64) + ROOM_AT


@triton.jit
def put1(at, value):
    tl.store(at.to(tl.pointer_type(tl.float32)), value)


@triton.jit
def put_half(at, word):
    tl.store(at.to(tl.pointer_type(tl.int16)), word.to(tl.int16))


@triton.jit
def get_half(at):
    return tl.load(at.to(tl.pointer_type(tl.int16))).to(tl.int32) & 0xFFFF


@triton.jit
def prefetch(p, size):
    pass


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch, definitions: None) -> None:
    """The interpreter's stand-ins for shared memory, and those of gemv4's test."""
    if INTERPRETED:
        from lora.kernels import gemv4_kernel

        for name in ("start_flags", "raise_flag", "wait_flag", "put_same", "put4", "get", "sum_parts",
                     "decode8", "from_lane", "mma"):  # fmt: skip
            monkeypatch.setattr(token4_kernel, name, getattr(gemv4_kernel, name))
        for function in (rooms, load8, room, put1, put_half, get_half, prefetch):
            monkeypatch.setattr(token4_kernel, function.fn.__name__, function)


def shares_of(x: Tensor, a: Tensor, P: int) -> Tensor:
    """x aᵀ in P shares."""
    parts = torch.zeros(P, len(x), len(a), device=x.device)
    for p in range(P):
        parts[p] = x[:, p::P].float() @ a[:, p::P].float().T
    return parts


def dense(p: Packed) -> Tensor:
    return p.dequantize().double()


def near(got: Tensor, want: Tensor, bound: float = 2e-3) -> None:
    assert got.shape == want.shape
    assert float((got.double() - want).norm() / want.norm()) < bound


@pytest.mark.parametrize(("Ns", "K", "M"), [((40, 16, 23), 320, 1), ((64,), 1088, 5), ((16, 16), 64, 8)])
@pytest.mark.parametrize("P", [1, 5])
def test_products_of_a_row_that_is_not_normalised_yet(
    triton_device: torch.device, Ns: tuple[int, ...], K: int, M: int, P: int
) -> None:
    """y = n (x W + x a b) + bias, with n and x a in shares."""
    packs = [packed(N, K, True, triton_device) for N in Ns]
    s = torch.randn(M, K, device=triton_device) * 3
    x = s.half()
    ranks = [4, 0, 16][: len(Ns)]
    a = torch.randn(sum(ranks), K, device=triton_device).half()
    bs: list[Tensor | None] = [
        torch.randn(N, r, device=triton_device).half() if r else None for N, r in zip(Ns, ranks, strict=True)
    ]
    biases: list[Tensor | None] = [
        torch.randn(N, device=triton_device).half() if i != 1 else None for i, N in enumerate(Ns)
    ]
    squares = torch.stack([s[:, p::P].square().sum(dim=1) for p in range(P)])
    weights = [weight(p) for p in packs]
    assert can_token4(x, weights, bs)
    ys = token4(x, weights, biases, bs, Shares(shares_of(x, a, P), squares, 1e-5))
    n = (s.double().square().mean(dim=1, keepdim=True) + 1e-5).rsqrt()
    row = 0
    for y, p, b, bias, r in zip(ys, packs, bs, biases, ranks, strict=True):
        want = x.double() @ dense(p).T
        if b is not None:
            want += x.double() @ a[row : row + r].double().T @ b.double().T
        want *= n
        if bias is not None:
            want += bias.double()
        near(y, want)
        row += r
    again = token4(x, weights, biases, bs, Shares(shares_of(x, a, P), squares, 1e-5))
    assert all(torch.equal(y, z) for y, z in zip(ys, again, strict=True))


@pytest.mark.parametrize(("N", "K", "M", "R"), [(200, 128, 1, 48), (64, 1088, 3, 5), (40, 64, 8, 0)])
@pytest.mark.parametrize("low", [True, False])
def test_a_sum_and_the_shares_of_its_norm(
    triton_device: torch.device, N: int, K: int, M: int, R: int, low: bool
) -> None:
    p = packed(N, K, True, triton_device)
    x, old = torch.randn(M, K, device=triton_device).half(), torch.randn(M, N, device=triton_device).half()
    w, bias = (torch.rand(N, device=triton_device) + 0.5).half(), torch.randn(N, device=triton_device).half()
    a = torch.randn(R, N, device=triton_device).half() if R else None
    own, b = torch.randn(6, K, device=triton_device).half(), torch.randn(N, 6, device=triton_device).half()
    shares = Shares(shares_of(x, own, 3) if low else None)
    y, s, given = token4_add(x, weight(p), bias, b if low else None, shares, old, w, 1e-5, a)
    want = x.double() @ dense(p).T + bias.double()
    if low:
        want += x.double() @ own.double().T @ b.double().T
    near(s, want + old.double())
    assert torch.equal(y, (s.float() * w.float()).half())
    assert given.squares is not None and given.squares.shape[1:] == (M,) and given.eps == 1e-5
    near(given.squares.double().sum(dim=0), s.double().square().sum(dim=1), 1e-5)
    if a is None:
        assert given.xa is None
    else:
        assert given.xa is not None and len(given.xa) == len(given.squares)
        near(given.xa.double().sum(dim=0), y.double() @ a.double().T, 1e-5)


@pytest.mark.parametrize(("N", "K", "M", "R"), [(200, 128, 1, 16), (72, 1088, 3, 5), (40, 64, 8, 0)])
@pytest.mark.parametrize("low", [True, False])
def test_a_gate_and_its_shares(triton_device: torch.device, N: int, K: int, M: int, R: int, low: bool) -> None:
    packs = [packed(N, K, True, triton_device) for _ in range(2)]
    s = torch.randn(M, K, device=triton_device)
    x = s.half()
    squares = torch.stack([s[:, p::4].square().sum(dim=1) for p in range(4)])
    a = torch.randn(R, N, device=triton_device).half() if R else None
    own = torch.randn(16 + 3, K, device=triton_device).half()
    bs: list[Tensor | None] = [torch.randn(N, r, device=triton_device).half() if low else None for r in (16, 3)]
    biases = [None, torch.randn(N, device=triton_device).half()]
    shares = Shares(shares_of(x, own, 4) if low else None, squares, 1e-5)
    assert can_token4(x, [weight(p) for p in packs], bs, gate=True)
    h, given = token4_gate(x, [weight(p) for p in packs], biases, bs, shares, a)
    n = (s.double().square().mean(dim=1, keepdim=True) + 1e-5).rsqrt()
    g, u = (x.double() @ dense(p).T * n for p in packs)
    if low:
        g += x.double() @ own[:16].double().T @ bs[0].double().T * n
        u += x.double() @ own[16:].double().T @ bs[1].double().T * n
    near(h, torch.nn.functional.silu(g) * (u + biases[1].double()), 3e-3)
    if a is None:
        assert given.xa is None
    else:
        assert given.xa is not None
        near(given.xa.double().sum(dim=0), h.double() @ a.double().T, 1e-5)


def test_what_does_not_fit_goes_another_way(triton_device: torch.device) -> None:
    p = weight(packed(32, 64, True, triton_device))
    x = torch.zeros(8, 64, dtype=torch.float16, device=triton_device)
    assert can_token4(x, [p], [None]) and not can_token4(x.float(), [p], [None])
    assert not can_token4(torch.cat((x, x)), [p], [None])
    assert not can_token4(x, [p], [torch.zeros(32, 200, device=triton_device)])
    wide = p._replace(shape=(16 * 17 * gemv4.processors(x.device), 64))
    assert not can_token4(x, [wide], [None])
    assert not can_token4(x, [p, wide], [None, None], gate=True)


def test_shares_that_do_not_fit_are_refused(triton_device: torch.device) -> None:
    p = weight(packed(32, 64, True, triton_device))
    x = torch.zeros(2, 64, dtype=torch.float16, device=triton_device)
    b = torch.zeros(32, 4, dtype=torch.float16, device=triton_device)
    with pytest.raises(ValueError, match="shares of 4 columns"):
        token4(x, [p], [None], [b], Shares())
    with pytest.raises(ValueError, match="squares"):
        token4(x, [p], [None], [None], Shares(None, torch.zeros(3, 1, device=triton_device)))
    with pytest.raises(ValueError, match="what is added"):
        token4_add(x, p, None, None, Shares(), x, x[0], 1e-5, None)
    assert launch.MOST_TOKENS == 8
