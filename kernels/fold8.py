"""The products of fold.py in 8-bit floats: the frozen base at twice the speed, the updates beside it in full.

    forward     [Y_1 | Y_2 | ..] = [X8 | T | T | T'] [W8 | B | B' | B]ᵀ       T = X8 (s a)ᵀ
    backward    dX = [dY8 | U | U | U'] [W8 ; s a ; (s a)' ; s a]              U = dY b
Here v' is what v loses to 8 bits, itself in 8 bits: three sets of columns carry an update as exactly as bfloat16 would,
in the one product.  They share the row's scale with X8, and the weight's with W8, so they are brought to a like size by
the largest b (or a) of the model.  From 16 times the largest product of the base on they take room from X8 (fp8.py);
4096 times beyond it they become NaN.
W8 is the 4-bit weight decoded to e4m3 (for the backward: turned, since these products want both operands along K).
dY is rounded row by row; U, da and db are made from it before that, and where it comes from a gate, without it
(gate8.py).  X is rounded once: the adapter reads what the base reads.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lora.kernels import fold
from lora.kernels.fold import Group, lay_factors
from lora.kernels.fp8 import (
    F8,
    TOP_FACTOR,
    Part,
    gate8,
    norm8,
    product8,
    ride8,
    rows8,
    split8,
)
from lora.kernels.gate8 import gate_round, gate_scales, new_sums, totals
from lora.kernels.pair import takes
from lora.kernels.scratch import scratch
from lora.kernels.weight8 import decode8

WHOLE = 16  # sizes of these products are multiples of it
SMALL = 2**25  # bytes of a rounded gradient that are not worth two products


class Eight(NamedTuple):
    """What the products of one group need beside it."""

    scale: float  # of its weights
    scales: Tensor  # (1, Σ N or K, the larger), that scale in each place
    a: Tensor  # () the largest magnitude of s a of the model's factors, float32
    b: Tensor  # () that of b
    scales_a: Tensor  # (1, two_parts or more), the scale of a's two parts in each place
    # (Σ N, K + room) and (K, Σ N + room) that begin with the weights, and those turned, where they stay decoded
    decoded: tuple[Tensor, Tensor] | None = None


class Rounded(NamedTuple):
    """A group's input: (M, K + room) e4m3, its last columns not written yet, and the scales (M, 1)."""

    x8: Tensor
    scale: Tensor


def scales_of(group: Group, scale: float, device: torch.device) -> Tensor:
    """`Eight.scales`, which stay as they are."""
    return torch.full((1, max(sum(group.sizes), group.K)), scale, dtype=torch.float32, device=device)


def scales_of_a(groups: Iterable[Group], a: Tensor) -> Tensor:
    """`Eight.scales_a` for all of the groups, from `Eight.a`."""
    return (a / TOP_FACTOR).expand(1, max(map(two_parts, groups))).contiguous()


def two_parts(group: Group) -> int:
    """Rows that the a of the group take as two parts."""
    return -(-2 * sum(group.ranks) // WHOLE) * WHOLE


def room8(ranks: int) -> int:
    """Columns that updates of so many ranks in all add."""
    return -(-3 * ranks // WHOLE) * WHOLE


def room(group: Group) -> int:
    """Columns that the updates add."""
    return room8(sum(group.ranks))


def fits(group: Group) -> bool:
    """Whether the sizes of the group are ones that the products take."""
    return all(size % WHOLE == 0 for size in (group.K, *group.sizes))


def _wide8(M: int, K: int, more: int, like: Tensor, use: str) -> Tensor:
    return scratch(M * (K + more), F8, like.device, use).view(M, K + more)


def normed(group: Group, x: Tensor, residual: Tensor | None, w: Tensor, eps: float) -> tuple[Rounded, Tensor, Tensor]:
    """The group's input from a norm of x (+ residual), what was normalised, and r."""
    x8 = _wide8(x.shape[0], group.K, room(group), x, "input8")
    scale, s, r = norm8(x, residual, w, eps, x8[:, : group.K])
    return Rounded(x8, scale), s, r


def taken(group: Group, x: Tensor) -> Rounded:
    """The group's input from x (M, K)."""
    x8 = _wide8(x.shape[0], group.K, room(group), x, "input8")
    return Rounded(x8, rows8(x, x8[:, : group.K]))


def gated(group: Group, g: Tensor, u: Tensor, gelu: bool) -> Rounded:
    """The group's input act(g) u."""
    x8 = _wide8(g.shape[0], group.K, room(group), g, "input8")
    return Rounded(x8, gate8(g, u, gelu, x8[:, : group.K]))


def decode(group: Group, scale: float, out: Tensor, turn: bool = False) -> None:
    """The weights one under the other into the first columns of `out` (Σ N, ..), or turned into those of (K, ..)."""
    row = 0
    for w in group.weights:
        n = w.shape[0]
        decode8(w, scale, out[:, row : row + n] if turn else out[row : row + n, : group.K], turn)
        row += n


def _split_a(group: Group, eight: Eight, out: Tensor, sets: str) -> None:
    """(s a)ᵀ of all layers beside each other, (K, Σ r), into `out` (K, ..)."""
    parts, at = [], 0
    for low, r in zip(group.lows, group.ranks, strict=True):
        if low:
            parts.append(Part(low[0].detach().T, at=at, times=float(low[2])))
            at += r
    split8(out, parts, sets, eight.a)


def _split_b(group: Group, eight: Eight, out: Tensor) -> None:
    """B, block-diagonal, (Σ N, Σ r), into `out` (Σ N, ..)."""
    parts, row, at = [], 0, 0
    for low, n, r in zip(group.lows, group.sizes, group.ranks, strict=True):
        if low:
            parts.append(Part(low[1].detach(), row, at))
        row, at = row + n, at + r
    split8(out, parts, "hlh", eight.b)


def _low(group: Group, eight: Eight, x: Rounded, like: Tensor) -> list[Tensor]:
    """The two parts of T (M, Σ r) of the rounded input, by the same kind of product."""
    R, K, two = sum(group.ranks), group.K, two_parts(group)
    a8 = torch.empty(two, K, dtype=F8, device=like.device)
    _split_a(group, eight, a8.T, "hl")
    M = x.scale.shape[0]
    rows = x.x8.shape[1]
    x8 = x.x8 if rows == K else x.x8.as_strided((M, K), (rows, 1))
    t = product8(x8, x.scale, a8, eight.scales_a[:, :two], like.dtype)
    return [t[:, :R], t[:, two // 2 : two // 2 + R]]


def forward(
    group: Group, eight: Eight, x: Rounded, t: Tensor | None, like: Tensor, add: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Y (M, Σ N) in the dtype of `like` and T (M, Σ r) of a group's input, whose last columns are written here.

    `t` is T where it is known already.  `add` (M, Σ N) is added to Y.
    """
    K, N, R, more = group.K, sum(group.sizes), sum(group.ranks), room(group)
    if eight.decoded is None:
        w8 = _wide8(N, K, more, like, "weight8")
        decode(group, eight.scale, w8)
    else:
        w8 = eight.decoded[0]
    if R:
        made = None
        if t is None:
            srcs = _low(group, eight, x, like)
            t = made = torch.empty(x.scale.shape[0], R, dtype=like.dtype, device=like.device)
        else:
            srcs = [t]
        ride8(x.x8, K, x.scale, srcs, eight.b, 1.0 / (TOP_FACTOR * eight.scale), made)
        _split_b(group, eight, w8[:, K:])
    bias = None
    if group.biased:
        parts = zip(group.biases, group.sizes, strict=True)
        bias = torch.cat([like.new_zeros(n) if b is None else b.detach().to(like.dtype) for b, n in parts])
    y = product8(x.x8, x.scale, w8, eight.scales[:, :N], like.dtype, bias)
    return (y if add is None else y.add_(add)), t


def _turned(group: Group, eight: Eight, more: int, like: Tensor) -> Tensor:
    """[W ; s a ; (s a)' ; s a]ᵀ, (K, Σ N + room)."""
    K, N, R = group.K, sum(group.sizes), sum(group.ranks)
    if eight.decoded is None:
        w8 = _wide8(K, N, more, like, "weight8")
        decode(group, eight.scale, w8, turn=True)
    else:
        w8 = eight.decoded[1]
    if R:
        _split_a(group, eight, w8[:, N:], "hlh")
    return w8


def backward(
    group: Group,
    eight: Eight,
    dy: Tensor,
    t: Tensor | None,
    dbs: list[Tensor | None] | None = None,
    spend: bool = False,
    through: bool = True,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """dX (M, K), s U (M, Σ r) and db_i in turn, of dY (M, Σ N); db_i are `dbs` where given.

    dX is None where nobody wants it (not `through`).  With `spend`, dY is written over: its rows hold their own
    rounding.
    """
    K, N, R, more = group.K, sum(group.sizes), sum(group.ranks), room(group)
    u = None
    if R and dbs is None and takes(dy, group.ranks):
        u = dy.new_empty(dy.shape[0], R)
        dbs = fold.both(group, dy, t, u, scaled=False)
    elif R:
        b = scratch(N * group.room, dy.dtype, dy.device, "b").view(N, group.room)
        lay_factors(group, None, b, scale_in_a=True)
        u = dy @ b[:, :R]
    dbs = fold.grad_b(group, dy, t) if dbs is None else dbs
    if not through:
        return None, None if u is None else fold.scaled(group, u), dbs
    w8 = _turned(group, eight, more, dy)
    if spend and dy.is_contiguous() and N * dy.element_size() >= N + more:
        y8 = dy.view(F8)[:, : N + more]
    else:
        y8 = _wide8(dy.shape[0], N, more, dy, "input8")
    scale = rows8(dy, y8[:, :N])
    if u is not None:
        ride8(y8, N, scale, [u], eight.a, 1.0 / (TOP_FACTOR * eight.scale))
        u = fold.scaled(group, u)
    dx = product8(y8, scale, w8, eight.scales[:, :K], dy.dtype)
    return dx, u, dbs


def gate_backward(
    group: Group, eight: Eight, dh: Tensor, g: Tensor, u: Tensor, v: Tensor | None, t: Tensor | None, gelu: bool
) -> tuple[Tensor, Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """`backward` of the group before a gate from the gradient dh (M, F) of what the gate gives: dX, s U, da and db_i.

    da [(r, F)] is that of the layer behind the gate, v (M, r) its s U.  Ranks are at most gate.MAX_RANK.  The gradients
    of g and u exist rounded only, and half of them at a time: as much as the input of the layer behind the gate.
    dX may be written over dh.
    """
    K, N, R, more = group.K, sum(group.sizes), sum(group.ranks), room(group)
    M, F = g.shape
    ts = fold.columns(group, t)
    factors = (v, ts[0], ts[-1])
    bs = [low[1].detach() if low else None for low in group.lows]
    one = len(bs) == 1  # a layer that makes both g and u
    if one and bs[0] is not None:
        bs = list(bs[0].split(F))
    scale, low = gate_scales(dh, g, u, bs[0], bs[-1], gelu, one and R > 0)
    w8 = _turned(group, eight, more, dh)
    half = M if M * (N + more) <= SMALL else -(-M // 256) * 128  # scales begin on 16 bytes, tiles are whole
    pieces = [slice(0, half), slice(half, M)] if half < M else [slice(0, M)]
    dead = len(pieces) == 2 and dh.is_contiguous() and half * F >= M * K  # rows of dh that no one reads any more
    dx = dh.view(-1)[: M * K].view(M, K) if dead else torch.empty(M, K, dtype=dh.dtype, device=dh.device)
    sums = new_sums(len(pieces), F, factors, dh.device)
    for piece, part in zip(pieces, sums, strict=True):
        y8 = _wide8(piece.stop - piece.start, N, more, dh, "input8")
        some = [None if f is None else f[piece] for f in factors]
        gate_round(dh[piece], g[piece], u[piece], scale[piece], y8[:, :N], (some[0], some[1], some[2]), part, gelu)
        if R:
            ride8(y8, N, scale[piece], [low[piece]], eight.a, 1.0 / (TOP_FACTOR * eight.scale))
        product8(y8, scale[piece], w8, eight.scales[:, :K], dx.dtype, out=dx[piece])
    da, *dbs = totals(sums, F, factors)
    if one and dbs[0] is not None and dbs[1] is not None:
        dbs = [torch.cat((dbs[0], dbs[1]))]
    return dx, fold.scaled(group, low) if R else None, [da], dbs[: len(bs)]
