"""A linear layer with its low-rank update inside one matrix product, for several layers that read the same input.

    forward     [Y_1 | Y_2 | ..] = [X | T | 1] [W | B | bias]ᵀ      T_i = X (s_i a_i)ᵀ, B block-diagonal of the b_i
    backward    dX = [dY | U] [W ; A]                               U_i = dY_i (s_i b_i), A the a_i one under the other
                da_i = U_iᵀ X           db_i = dY_iᵀ T_i

Adapters side by side (`parts` k > 1): each of k equal runs of rows has factors of its own, a_i (k, r, K) and b_i
(k, N, r).  The products with the factors are then batched, k at a time, and T and U stand block-diagonal in the added
columns, zero where a column is another adapter's: the base's product stays one.  Their factors come rounded, with and
without the scale (`side.Rounded`), once a step for all layers and not for each: a launch costs more than it copies.

W (N, K) is decoded (or copied) into a reused buffer whose rows have room for B, or whose end has room for A, so the
update costs R more columns of one product and not two products of its own with Y read and written again: 8-18 % of a
layer's time becomes 1 (LOG.md).  The scale s is put into a factor when that is rounded to the dtype of X: exact where
s is a power of two.  In 16 bits on a GPU T is made while the input is written (thin.py), U and db in one pass over dY
(pair.py), and both land in the added columns; what they do not take is products of its own.
Source: LoRA, arXiv:2106.09685, section 4.1.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora.kernels import thin
from lora.kernels.code4 import Weight4
from lora.kernels.dropout import Drop, dropped, dropped_copy
from lora.kernels.gate import gate_forward
from lora.kernels.lay import fringe, lay
from lora.kernels.norm import rms_norm_forward
from lora.kernels.pair import pair, takes
from lora.kernels.scratch import scratch
from lora.kernels.side import diagonal, joined, rounded
from lora.kernels.side import spread as spread_part
from lora.kernels.unpack import decode

ROOM = 64  # the added columns are a multiple of it, so that rows begin on 128 bytes and products get whole tiles


class Group(NamedTuple):
    """Layers that read one input: their weights (N_i, K), biases and updates, None where a layer has none.

    With `parts` k > 1 every update is (a (k, r, K), b (k, N, r), s (k,)), each for its own k-th of the rows, and a
    `side.Rounded` may stand behind them.
    """

    weights: tuple[Weight4 | Tensor, ...]
    biases: tuple[Tensor | None, ...]
    lows: tuple[Any, ...]  # Low, or None
    parts: int = 1
    drops: tuple[Drop | None, ...] = ()  # of each layer's update, or none at all
    decoded: Tensor | None = None  # (Σ N + room, K + room) that begins with the weights, where they stay decoded

    @property
    def drop(self) -> tuple[Drop | None, ...]:
        return self.drops or (None,) * len(self.weights)

    @property
    def K(self) -> int:
        return self.weights[0].shape[1]

    @property
    def sizes(self) -> list[int]:
        """N_i of each layer."""
        return [w.shape[0] for w in self.weights]

    @property
    def ranks(self) -> list[int]:
        """r_i of each layer, 0 without an update."""
        return [low[0].shape[-2] if low else 0 for low in self.lows]

    @property
    def biased(self) -> bool:
        """Whether a column of ones stands behind T, for the biases."""
        return any(b is not None for b in self.biases)

    @property
    def room(self) -> int:
        """Columns that the updates and the biases add, rounded up."""
        used = self.parts * sum(self.ranks) + self.biased
        return -(-used // ROOM) * ROOM


class Fed(NamedTuple):
    """A group's input with its T already there, and its factors in the room of `_weights`."""

    xw: Tensor  # (M, K + room), all of its columns written
    t: Tensor  # (M, Σ r)


def wide(M: int, K: int, room: int, like: Tensor, use: str) -> Tensor:
    """A reused buffer (M, K + room) in the dtype of `like`: use it before the next call with this `use`."""
    return scratch(M * (K + room), like.dtype, like.device, use).view(M, K + room)


# ---- the parts of the products ----
def lay_factors(group: Group, stacked: Tensor | None, spread: Tensor | None, scale_in_a: bool) -> None:
    """A into the first rows of `stacked`, 0 below; B and behind it the biases into `spread` (Σ N, room), else 0.

    The scales stand in A, as T wants them, or in B, as U does: there A is what dX comes through, and 0 for a layer that
    drops some of that first.
    """
    if group.parts > 1:
        if stacked is not None:
            used = group.parts * sum(group.ranks)
            stacked[:used].unflatten(0, (group.parts, -1)).copy_(_stack_parts(group, stacked.dtype, scale_in_a))
            stacked[used:].zero_()
        if spread is not None:
            _spread_parts(group, spread)
        return
    like = stacked if stacked is not None else spread
    assert like is not None
    a, b, sa, sb = [], [], [], []
    for n, low, drop in zip(group.sizes, group.lows, group.drop, strict=True):
        a.append(low[0].detach() if low else like.new_empty(0, group.K))
        b.append(low[1].detach() if low else like.new_empty(n, 0))
        s = low[2] if low else 1.0
        sa.append(s if scale_in_a else 1.0 if drop is None else 0.0)
        sb.append(1.0 if scale_in_a else s)
    biases = [None if bias is None else bias.detach() for bias in group.biases]
    lay(a, b, biases, sa, sb, stacked, spread)


# ---- adapters side by side ----
def _stack_parts(group: Group, dtype: torch.dtype, scaled: bool) -> Tensor:
    """Every a (k, Σ r, K), times the scales if `scaled`."""
    return joined([rounded(low, dtype, "sa" if scaled else "a") for low in group.lows if low])


def _spread_parts(group: Group, out: Tensor) -> None:
    """Every b of every part, the biases behind them, into `out` (Σ N, room): adapter by adapter, zeros elsewhere."""
    R, row, at = sum(group.ranks), 0, 0
    for n, r, low, bias in zip(group.sizes, group.ranks, group.lows, group.biases, strict=True):
        b = rounded(low, out.dtype, "b") if low else None
        spread_part(out[row : row + n], b, at, R, group.parts, None if bias is None else bias.detach())
        row, at = row + n, at + r


def _runs(group: Group, x: Tensor) -> Tensor:
    """Rows (M, ...) as the parts' (k, M / k, ...)."""
    return x.unflatten(0, (group.parts, -1))


def _weights(group: Group, like: Tensor) -> Tensor:
    """Where a forward has the group's weights, with room for B: (Σ N, K + room)."""
    N = sum(group.sizes)
    return wide(N, group.K, group.room, like, "weight") if group.decoded is None else group.decoded[:N]


def _low(group: Group, x: Tensor, a: Tensor | None) -> Tensor:
    """T (M, Σ r), by parts (k, M / k, Σ r), of the group's input (M, K) and, without parts, its s a (Σ r, K)."""
    if a is None:
        return _runs(group, x) @ _stack_parts(group, x.dtype, scaled=True).mT
    if not any(group.drop):
        return x @ a.T
    t = torch.empty(x.shape[0], a.shape[0], dtype=x.dtype, device=x.device)
    for part, rows, drop in zip(t.split(group.ranks, dim=1), a.split(group.ranks), group.drop, strict=True):
        if part.shape[1]:
            part.copy_((x if drop is None else dropped_copy(x, drop)) @ rows.T)
    return t


def normed(
    group: Group, x: Tensor, residual: Tensor | None, w: Tensor, eps: float, twice: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A group's input, with room, from a norm of x (+ residual), (M, K); what was normalised; and r (M, 1).

    The sum goes into `twice` (M, K) too, where given, which may be the residual.
    """
    xw = wide(x.shape[0], group.K, group.room, x, "input")
    _, s, r = rms_norm_forward(x, residual, w, eps, out=xw[:, : group.K], twice=twice)
    return xw, s, r


def taken(group: Group, x: Tensor) -> Tensor | Fed:
    """A group's input, with room, from x (M, K)."""
    xw = wide(x.shape[0], group.K, group.room, x, "input")
    if _feeds(group, x):
        return _fed(group, x, None, False, xw)
    xw[:, : group.K].copy_(x)
    return xw


def gated(group: Group, g: Tensor, u: Tensor, gelu: bool) -> Tensor | Fed:
    """A group's input act(g) u, with room."""
    xw = wide(g.shape[0], group.K, group.room, g, "input")
    if _feeds(group, g):
        return _fed(group, g, u, gelu, xw)
    gate_forward(g, u, gelu, xw[:, : group.K])
    return xw


def _feeds(group: Group, x: Tensor) -> bool:
    """Whether T is made while the input is written."""
    return group.parts == 1 and not any(group.drop) and thin.takes(x, sum(group.ranks))


def _fed(group: Group, g: Tensor, u: Tensor | None, gelu: bool, xw: Tensor) -> Fed:
    a = g.new_empty(sum(group.ranks), group.K)
    lay_factors(group, a, _weights(group, xw)[:, group.K :], scale_in_a=True)
    return Fed(xw, thin.thin(g, u, a, xw[:, : group.K], xw[:, group.K :], group.biased, gelu))


def forward(
    group: Group, xw: Tensor | Fed, t: Tensor | None = None, add: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Y (M, Σ N) and T (M, Σ r), by parts (k, M / k, Σ r), of X in the first K columns of xw (M, K + room).

    The other columns of xw are written here, where they are not yet.  `t` is T where it is known already.  Y is added
    to `add` (M, Σ N), or goes into `out`, where one is given.
    """
    K, room, R, fed = group.K, group.room, sum(group.ranks), isinstance(xw, Fed)
    if isinstance(xw, Fed):
        xw, t = xw
    M, N, buffer = xw.shape[0], sum(group.sizes), _weights(group, xw)
    if group.decoded is None:
        decode(group.weights, buffer[:, :K])
    if room and not fed:
        a = xw.new_empty(R, K) if R and t is None and group.parts == 1 else None
        lay_factors(group, a, buffer[:, K:], scale_in_a=True)
        if R and t is None:
            t = _low(group, xw[:, :K], a)
        if group.parts > 1 and t is not None:
            diagonal(xw[:, K:], t, group.biased)
        else:
            fringe(xw[:, K:], t, group.biased)
    if add is not None:
        y = add.addmm_(xw, buffer.T)
    else:
        out = torch.empty(M, N, dtype=xw.dtype, device=xw.device) if out is None else out
        y = torch.mm(xw, buffer.T, out=out)
    return y, t


def backward(
    group: Group,
    dyw: Tensor,
    t: Tensor | None,
    out: Tensor | None = None,
    dbs: list[Tensor | None] | None = None,
    through: bool = True,
):
    """dX (M, K), U (M, Σ r), by parts (k, M / k, Σ r), and db_i in turn, of dY in the first Σ N columns of dyw.

    dyw is (M, Σ N + room), and its other columns are written here: U may be a view of them.  dX goes into `out` where
    given, is None where nobody wants it (not `through`), and db_i are `dbs` where given.
    """
    K, R, N = group.K, sum(group.ranks), sum(group.sizes)
    dy, room, u = dyw[:, :N], dyw.shape[1] - N, None
    once = R > 0 and dbs is None and group.parts == 1 and takes(dy, group.ranks)
    b = wide(N, 0, room, dyw, "b") if R and group.parts == 1 and not once else None
    buffer = None
    if through:
        buffer = wide(N + room, K, 0, dyw, "weight") if group.decoded is None else group.decoded[:, :K]
    a = buffer[N:] if buffer is not None and room else None
    if a is not None or b is not None:
        lay_factors(group, a, b, scale_in_a=False)
    if once:
        dbs, u = both(group, dy, t, dyw[:, N:]), dyw[:, N : N + R]
    elif b is not None:
        u = dy @ b[:, :R]
    elif R:
        assert t is not None
        u = _backward_parts(group, dy, t)
    dbs = grad_b(group, dy, t) if dbs is None else dbs
    if buffer is None:
        return None, u, dbs
    if group.decoded is None:
        decode(group.weights, buffer[:N])
    if group.parts > 1 and u is not None:
        diagonal(dyw[:, N:], u)
    elif room and not once:
        fringe(dyw[:, N:], u)
    if out is None:
        out = torch.empty(dyw.shape[0], K, dtype=dyw.dtype, device=dyw.device)
    torch.mm(dyw, buffer, out=out)
    for low, part, drop in zip(group.lows, columns(group, u), group.drop, strict=True):
        if low and part is not None and drop is not None:
            dx = torch.mm(part, low[0].detach().to(out.dtype), out=wide(out.shape[0], K, 0, out, "dropped"))
            dropped(dx, drop, out, add=True)
    return out, u, dbs


def _backward_parts(group: Group, dy: Tensor, t: Tensor) -> Tensor:
    """U (k, M / k, Σ r) of dY (M, Σ N)."""
    u = torch.empty_like(t)
    parts = zip(dy.split(group.sizes, dim=1), u.split(group.ranks, dim=2), group.lows, strict=True)
    for part, out, low in parts:
        if low:
            torch.bmm(_runs(group, part), rounded(low, dy.dtype, "sb"), out=out)
    return u


def product32(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, in which factors and their gradients are kept, where the device makes it without rounding."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return (torch.bmm if a.dim() == 3 else torch.mm)(a, b, out_dtype=torch.float32)
    return a @ b


def both(group: Group, dy: Tensor, t: Tensor | None, out: Tensor, scaled: bool = True) -> list[Tensor | None]:
    """db_i of each layer, None without an update; U, times the scales if `scaled`, into the first columns of `out`.

    One pass over dY, where `pair.takes` says so.  The other columns of `out` become 0.
    """
    assert t is not None
    starts = [sum(group.sizes[:i]) for i in range(len(group.sizes))]
    there = [
        (low[1].detach(), low[2] if scaled else 1.0, start)
        for low, start in zip(group.lows, starts, strict=True)
        if low
    ]
    b, scales, starts = (list(some) for some in zip(*there, strict=True))
    dbs = iter(pair(dy, t, b, scales, starts, out))
    return [next(dbs) if low else None for low in group.lows]


def grad_b(group: Group, dy: Tensor, t: Tensor | None) -> list[Tensor | None]:
    """db_i = dY_iᵀ T_i of each layer, of each of its parts, None without an update."""
    parts = zip(dy.split(group.sizes, dim=1), columns(group, t), strict=True)
    runs = [(y if group.parts == 1 else _runs(group, y), part) for y, part in parts]
    return [None if part is None else product32(y.mT, part) for y, part in runs]


def scaled(group: Group, u: Tensor) -> Tensor:
    """Columns U_i times s_i, in place."""
    scales = [low[2] for low in group.lows if low]
    if scales == scales[:1] * len(scales):  # one launch where all are alike
        return u if scales[:1] in ([], [1.0]) else u.mul_(scales[0])
    for part, low in zip(u.split(group.ranks, dim=1), group.lows, strict=True):
        if low and low[2] != 1.0:
            part.mul_(low[2])
    return u


def columns(group: Group, t: Tensor | None) -> list[Tensor | None]:
    """T_i of each layer as columns of T (.., Σ r), None without an update."""
    if t is None:
        return [None] * len(group.weights)
    return [part if part.shape[-1] else None for part in t.split(group.ranks, dim=-1)]


def grad_a(
    group: Group, u: Tensor | None, x: Tensor, r: Tensor | None = None, w: Tensor | None = None
) -> list[Tensor | None]:
    """da_i = U_iᵀ X of each layer, of each of its parts, None without an update; X (M, K) is the group's input.

    Where that is a norm's output w * (r * x), with r (M, 1) float32, it need not exist: da = (r U)ᵀ x times w.
    """
    if u is None:
        return [None] * len(group.weights)
    if group.parts > 1:
        x, r = _runs(group, x), None if r is None else _runs(group, r)
    u = u.to(x.dtype) if r is None else torch.mul(u, r, out=torch.empty_like(u, dtype=x.dtype))
    if not any(group.drop):
        da = product32(u.mT, x)
        if w is not None:
            da.mul_(w)
        return [part if part.shape[-2] else None for part in da.split(group.ranks, dim=-2)]
    pairs = zip(columns(group, u), group.drop, strict=True)
    das = [None if p is None else product32(p.T, x if drop is None else dropped_copy(x, drop)) for p, drop in pairs]
    return [da if da is None or w is None else da.mul_(w) for da in das]
