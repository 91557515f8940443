"""4-bit products of one token a row, with what lies between them inside: a decoder's block in five launches.

    token4        y_i = n (x W_iᵀ + xa_i b_iᵀ) + bias_i      n = 1 / sqrt(mean(s²) + eps), or 1      q, k, v
    token4_add    s = old + y,     x' = w s,                  shares of Σ s² and of x' aᵀ             o_proj, down_proj
    token4_gate   x' = silu(y_0) y_1,                         shares of x' aᵀ                         gate_proj, up_proj

x (M, K) of 16 bits, M up to 8; W_i (N_i, K) in the bytes of code4.py; a (R, N) the factors of the layers that read x'.
A product knows only some rows of its result in one place, so what is a sum over all of them is left as shares, one of
each program, and the next launch adds them up: a launch less for every norm, gate and x aᵀ.  For the same reason a
norm is undone at its two ends: s is multiplied by w before it is rounded to 16 bits, and by n behind the product.
Sums are added up in one order, so two runs give the same bits.

Bytes that move are those of gemv4.py; shares are some 100 KB, in the second cache.  How: token4_kernel.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora.kernels._triton import triton
from lora.kernels.code4 import Weight4
from lora.kernels.dispatch import launch_early
from lora.kernels.gemv4 import can_gemv4, operands, processors, share, unit_of
from lora.kernels.op import op
from lora.kernels.token4_kernel import ADD, GATE, MOST_LOW, MOST_ROWS, NOTHING, token4_kernel

MOST_TOKENS = 8  # of x: what the tensor cores take at once
WARPS = 16
CACHED = 0  # bytes of codes that a program has brought to the second cache before x is there


class Shares(NamedTuple):
    """What must be added up of x, over the programs P that made it."""

    xa: Tensor | None = None  # (P, M, Σ R) f32: x aᵀ
    squares: Tensor | None = None  # (P, M) f32: Σ s², x being w s; None: x is as the product wants it
    eps: float = 0.0


def can_token4(x: Tensor, weights: Sequence[Weight4], bs: Sequence[Tensor | None], gate: bool = False) -> bool:
    """Whether as many rows as x has, of its dtype, go through the weights here: few, of 16 bits, with small updates."""
    M, K = len(x), weights[0].shape[1]
    if not 0 < M <= MOST_TOKENS or not all(can_gemv4(x[:, :1].expand(M, K), w.q, w.block, K) for w in weights):
        return False
    if len({(len(w.scales), w.block) for w in weights}) > 1 or gate and weights[0].shape != weights[1].shape:
        return False
    turns, _ = _turns([w.shape[0] for w in weights], gate, x.device)
    ranks = [triton.next_power_of_2(b.shape[1]) for b in bs if b is not None]
    low = triton.next_power_of_2(M) * max(ranks, default=0) * (2 if gate else 1)
    return 16 * turns <= MOST_ROWS and low <= MOST_LOW


def token4(
    x: Tensor,
    weights: Sequence[Weight4],
    biases: Sequence[Tensor | None],
    bs: Sequence[Tensor | None],
    shares: Shares,
    early: bool = False,
) -> tuple[Tensor, ...]:
    """y_i (M, N_i), columns of one buffer, of x (M, K) contiguous; bs[i] (N_i, R_i) as in `gemv4_group`.

    Only where `can_token4` says so.  `early` as in `gemv4_group`.
    """
    y = _launch(x, weights, biases, bs, shares, NOTHING.value, None, None, None, early)[0]
    return y.split([w.shape[0] for w in weights], dim=1)


def token4_add(
    x: Tensor,
    weight: Weight4,
    bias: Tensor | None,
    b: Tensor | None,
    shares: Shares,
    old: Tensor,
    w: Tensor,
    eps: float,
    a: Tensor | None,
    early: bool = False,
) -> tuple[Tensor, Tensor, Shares]:
    """x' = w s (M, N), s = old + y (M, N), and the shares of what follows; old (M, N) and w (N,) contiguous."""
    y, s, ya, squares = _launch(x, [weight], [bias], [b], shares, ADD.value, old, w, a, early)
    return y, s, Shares(None if a is None else ya, squares, eps)


def token4_gate(
    x: Tensor,
    weights: Sequence[Weight4],
    biases: Sequence[Tensor | None],
    bs: Sequence[Tensor | None],
    shares: Shares,
    a: Tensor | None,
    early: bool = False,
) -> tuple[Tensor, Shares]:
    """x' = silu(y_0) y_1 (M, N) and its shares; both weights have the same codes."""
    y, _, ya, _ = _launch(x, weights, biases, bs, shares, GATE.value, None, None, a, early)
    return y, Shares(None if a is None else ya)


def plan(K: int) -> tuple[int, int]:
    """Blocks that a warp takes at once, and how many such units are under way, for rows of K weights."""
    blocks = K // 64
    unit = unit_of(blocks, WARPS)
    return unit, 2 if unit == 4 and blocks > 64 else 1


def _turns(N: Sequence[int], gate: bool, device: torch.device) -> tuple[int, list[int]]:
    """Groups of 16 rows a program takes, and each weight's programs; of a gate those of both together."""
    return share([-(-n // 16) for n in (N[:1] if gate else N)], processors(device))


def _launch(
    x: Tensor,
    weights: Sequence[Weight4],
    biases: Sequence[Tensor | None],
    bs: Sequence[Tensor | None],
    shares: Shares,
    after: int,
    old: Tensor | None,
    w: Tensor | None,
    a: Tensor | None,
    early: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    M, K = x.shape
    R, N = sum(b.shape[1] for b in bs if b is not None), weights[0].shape[0]
    if not x.is_contiguous() or any(t.shape[1] != K for t in weights):
        raise ValueError(f"x {tuple(x.shape)} through weights {[t.shape for t in weights]}: wanted contiguous (M, K)")
    xa, squares = shares.xa, shares.squares
    if (R > 0) != (xa is not None) or xa is not None and (xa.shape[1:] != (M, R) or not xa.is_contiguous()):
        raise ValueError(f"shares of {R} columns for {M} rows were wanted, got {None if xa is None else xa.shape}")
    if squares is not None and (squares.shape[1] != M or xa is not None and len(xa) != len(squares)):
        raise ValueError(f"shares of squares {tuple(squares.shape)} do not fit {M} rows, or those of x aᵀ")
    if old is not None and (old.shape != (M, N) or not old.is_contiguous() or w is None or w.shape != (N,)):
        raise ValueError(f"what is added has shape {tuple(old.shape)}, the norm {w.shape if w is not None else None}")
    if a is not None and (a.shape[1] != N or not a.is_contiguous() or a.dtype != x.dtype):
        raise ValueError(f"factors a {tuple(a.shape)} {a.dtype}: wanted contiguous (R, {N}) {x.dtype}")
    return _token4(
        x,
        [t.q for t in weights],
        [s for t in weights for s in t.scales],
        [t.permute for t in weights],
        weights[0].block,
        [t.shape[0] for t in weights],
        list(biases),
        [b if b is None else b.contiguous() for b in bs],
        xa,
        squares,
        shares.eps,
        after,
        old,
        w,
        a,
        early,
    )


@op("lora::token4")
def _token4(
    x: Tensor,
    q: list[Tensor],
    scales: list[Tensor],
    table: list[Tensor],
    block: int,
    N: list[int],
    bias: list[Tensor | None],
    b: list[Tensor | None],
    xa: Tensor | None,
    squares: Tensor | None,
    eps: float,
    after: int,
    old: Tensor | None,
    w: Tensor | None,
    a: Tensor | None,
    early: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    M, K = x.shape
    if any(t.data_ptr() % 8 for t in q):
        raise ValueError("the codes of a weight do not begin at a multiple of 8 bytes; copy the weight first")
    if x.data_ptr() % 16:  # x is read 16 bytes at a time
        x = x.clone()
    gate, adds = after == GATE.value, after == ADD.value
    unit, ahead = plan(K)
    turns, programs = _turns(N, gate, x.device)
    P, R, width = sum(programs), 0 if a is None else a.shape[0], N[0] if gate else sum(N)
    y = torch.empty(M, width, dtype=x.dtype, device=x.device)
    s = torch.empty((M, width) if adds else 0, dtype=x.dtype, device=x.device)
    ya = torch.empty((P, M, R), dtype=torch.float32, device=x.device)
    new_squares = torch.empty((P, M) if adds else 0, dtype=torch.float32, device=x.device)
    parts = operands(x, q, scales, table, bias, b)
    ranks = tuple(0 if t is None else t.shape[1] for t in b)
    came = xa if squares is None else squares
    with torch.cuda.device_of(x):
        token4_kernel[(P,)](
            x, parts, y if xa is None else xa, y if squares is None else squares, y,
            y if old is None else old, y if w is None else w, s, y if a is None else a, ya, new_squares, M, eps,
            NS=tuple(N), RS=ranks, PROGRAMS=tuple(programs), TURNS=turns, M2=triton.next_power_of_2(M),
            R2=0 if xa is None else triton.next_power_of_2(max(ranks)), SHARES=1 if came is None else len(came),
            NORM=squares is not None, BIAS=tuple(int(t is not None) for t in bias),
            HAS_BIAS=any(t is not None for t in bias), N=width, RSUM=sum(ranks), K=K, BLOCK=block,
            NESTED=len(scales) > len(q), HALF=int(x.dtype == torch.float16), UNIT=unit, AHEAD=ahead, LOOK=2,
            WARPS=WARPS, EVEN=all(n % 16 == 0 for n in N), AFTER=after, RA=R, CACHED=CACHED, num_warps=WARPS,
            **launch_early(early, x.device),
        )  # fmt: skip
    return y, s, ya, new_squares


@_token4.register_fake
def _(x, q, scales, table, block, N, bias, b, xa, squares, eps, after, old, w, a, early):
    M, P = len(x), sum(_turns(N, after == GATE.value, x.device)[1])
    adds = after == ADD.value
    width = N[0] if after == GATE.value else sum(N)
    return (
        x.new_empty(M, width),
        x.new_empty((M, width) if adds else 0),
        x.new_empty((P, M, 0 if a is None else a.shape[0]), dtype=torch.float32),
        x.new_empty((P, M) if adds else 0, dtype=torch.float32),
    )
