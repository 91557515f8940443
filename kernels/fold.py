"""A linear layer with its low-rank update inside one matrix product, for several layers that read the same input.

    forward     [Y_1 | Y_2 | ..] = [X | T | 1] [W | B | bias]ᵀ      T = X Aᵀ, A the layers' s_i a_i one under the other
    backward    dX = [dY | U] [W ; A]                               U = dY B, B block-diagonal of the layers' b_i
                da_i = s_i U_iᵀ X       db_i = dY_iᵀ T_i

W (N, K) is decoded (or copied) into a reused buffer whose rows have room for B, or whose end has room for A, so the
update costs R more columns of one product and not two products of its own with Y read and written again: 8-18 % of a
layer's time becomes 1 (LOG.md).  The scale s sits in A: exact where s is a power of two, one rounding elsewhere.
Source: LoRA, arXiv:2106.09685, section 4.1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora.kernels.code4 import dequantize4
from lora.kernels.linear4 import Low, Weight4
from lora.kernels.scratch import scratch

ROOM = 64  # the added columns are a multiple of it, so that rows begin on 128 bytes and products get whole tiles


class Group(NamedTuple):
    """Layers that read one input: their weights (N_i, K), biases and updates, None where a layer has none."""

    weights: tuple[Weight4 | Tensor, ...]
    biases: tuple[Tensor | None, ...]
    lows: tuple[Low | None, ...]

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
        return [low[0].shape[0] if low else 0 for low in self.lows]

    @property
    def room(self) -> int:
        """Columns that the updates and the biases add, rounded up."""
        used = sum(self.ranks) + any(b is not None for b in self.biases)
        return -(-used // ROOM) * ROOM


def wide(M: int, K: int, room: int, like: Tensor, use: str) -> Tensor:
    """A reused buffer (M, K + room) in the dtype of `like`: use it before the next call with this `use`."""
    return scratch(M * (K + room), like.dtype, like.device, use).view(M, K + room)


def stack_a(group: Group, like: Tensor) -> Tensor | None:
    """A (Σ r, K) in the dtype of `like`, the scales in it."""
    R = sum(group.ranks)
    if not R:
        return None
    a = torch.empty(R, group.K, dtype=like.dtype, device=like.device)
    at = 0
    for low in group.lows:
        if low:
            part = a[at : at + low[0].shape[0]]
            torch.mul(low[0].detach(), low[2], out=part) if part.dtype == low[0].dtype else part.copy_(low[0] * low[2])
            at += part.shape[0]
    return a


def spread_b(group: Group, out: Tensor) -> None:
    """B, block-diagonal, and the biases into `out` (Σ N, room), zeros elsewhere."""
    out.zero_()
    row = at = 0
    for n, r, low, bias in zip(group.sizes, group.ranks, group.lows, group.biases, strict=True):
        if low:
            out[row : row + n, at : at + r].copy_(low[1].detach())
        if bias is not None:
            out[row : row + n, sum(group.ranks)].copy_(bias.detach())
        row, at = row + n, at + r


def _decode(weights: Sequence[Weight4 | Tensor], out: Tensor) -> None:
    """The weights one under the other into `out` (Σ N, K), whose rows may lie apart."""
    row = 0
    for w in weights:
        n, K = w.shape
        part = out[row : row + n]
        if isinstance(w, Weight4):
            if K % 2:
                part.copy_(dequantize4(w.q, w.scales, w.table, w.block, n * K, out.dtype).view(n, K))
            else:
                dequantize4(w.q, w.scales, w.table, w.block, n * K, out.dtype, out=part)
        else:
            part.copy_(w.detach())
        row += n


def forward(group: Group, xw: Tensor, t: Tensor | None = None, add: Tensor | None = None, out: Tensor | None = None):
    """Y (M, Σ N) and T (M, Σ r) of X in the first K columns of xw (M, K + room), whose other columns are written here.

    `t` is T where it is known already.  `add` (M, Σ N) is added to Y, which goes into `out` where given.
    """
    K, room, R = group.K, group.room, sum(group.ranks)
    M, N = xw.shape[0], sum(group.sizes)
    buffer = wide(N, K, room, xw, "weight")
    _decode(group.weights, buffer[:, :K])
    if room:
        spread_b(group, buffer[:, K:])
        if R:
            if t is None:
                a = stack_a(group, xw)
                assert a is not None
                t = xw[:, :K] @ a.T
            xw[:, K : K + R].copy_(t)
        xw[:, K + R :].fill_(1.0 if any(b is not None for b in group.biases) else 0.0)  # B is zero past the bias
    if add is not None:
        return torch.addmm(add, xw, buffer.T), t
    if out is None:
        out = torch.empty(M, N, dtype=xw.dtype, device=xw.device)
    return torch.mm(xw, buffer.T, out=out), t


def backward(group: Group, dyw: Tensor, t: Tensor | None, out: Tensor | None = None):
    """dX (M, K), U (M, Σ r) and db_i in turn, of dY in the first Σ N columns of dyw (M, Σ N + room).

    The other columns of dyw are written here.  dX goes into `out` where given.
    """
    K, R, N = group.K, sum(group.ranks), sum(group.sizes)
    dy, u, a, dbs = dyw[:, :N], None, None, []
    room = dyw.shape[1] - N
    buffer = scratch((N + room) * K + 1, dyw.dtype, dyw.device, "weight")[: (N + room) * K].view(N + room, K)
    if R:
        assert t is not None
        b = wide(N, 0, group.room, dyw, "b")
        spread_b(group, b)
        u = dy @ b[:, :R]
        dyw[:, N : N + R].copy_(u)
        row = at = 0
        for n, r in zip(group.sizes, group.ranks, strict=True):
            dbs.append(dy[:, row : row + n].T @ t[:, at : at + r] if r else None)
            row, at = row + n, at + r
        a = stack_a(group, dyw)
        assert a is not None
        buffer[N : N + R].copy_(a)
    else:
        dbs = [None] * len(group.weights)
    if room:
        dyw[:, N + R :].zero_()
        buffer[N + R :].zero_()
    _decode(group.weights, buffer[:N])
    if out is None:
        out = torch.empty(dyw.shape[0], K, dtype=dyw.dtype, device=dyw.device)
    return torch.mm(dyw, buffer, out=out), u, dbs


def grad_a(group: Group, u: Tensor | None, x: Tensor) -> list[Tensor | None]:
    """da_i = s_i U_iᵀ X of each layer, None without an update; X (M, K) is the group's input."""
    if u is None:
        return [None] * len(group.weights)
    da = u.T @ x
    parts, at = [], 0
    for r, low in zip(group.ranks, group.lows, strict=True):
        parts.append(da[at : at + r] * low[2] if low else None)
        at += r
    return parts
