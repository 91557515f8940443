"""A linear layer with its low-rank update as products of their own: what fold.py does in one, as a CPU does it fastest.

    forward     [Y_1 | Y_2 | ..] = X Wᵀ + bias,  then  Y_i += T_i b_iᵀ        T_i = s_i X a_iᵀ
    backward    dX = dY W + U A        U_i = s_i dY_i b_i        db_i = dY_iᵀ T_i        da_i = U_iᵀ X

A is the a_i one under the other, and makes all T_i in one product.

W is 4-bit, decoded into a buffer that the next layer uses again, or dense.  The products with W go to the library that
is fastest for them (gemm.py), those with the thin factors to MKL, which is two times as fast there (LOG.md,
2026-11-27).  X in the last formula is the layers' input; `grad_a` takes it as r x w, the parts of a norm's output.
Source: LoRA, arXiv:2106.09685, section 4.1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lora.kernels import gemm
from lora.kernels.code4 import dequantize4, dequantize_scales
from lora.kernels.fold import Group
from lora.kernels.linear4 import Weight4
from lora.kernels.scratch import scratch

PIECE = 2**20  # bytes of a weight that are decoded at a time (LOG.md, 2026-11-23)

_absmax = WeakTensorKeyDictionary()  # bytes of scales -> (their version, absmax float32), 1/16 byte a weight


def _scales(w: Weight4) -> Tensor:
    """The block scales (blocks,) float32; those that are bytes are decoded once, not twice a step."""
    if len(w.scales) == 1:
        return w.scales[0]
    key = w.scales[0]
    found = _absmax.get(key)
    if found is None or found[0] != key._version:
        q, code, absmax, offset = w.scales
        found = _absmax[key] = key._version, dequantize_scales(q, code, absmax, offset)
    return found[1]


def _lanes() -> int:
    """Rows in which `gather` is asked to look up: it splits its work over rows only."""
    return 1 << (torch.get_num_threads() - 1).bit_length()


def _is_quick(w: Weight4 | Tensor, like: Tensor) -> bool:
    """Whether `_decode` takes it: its bytes in one piece, whole blocks, no more than a cache holds."""
    if isinstance(w, Tensor) or like.dtype != torch.float32 or like.device.type != "cpu":
        return False
    N, K = w.shape
    return N * K % w.block == 0 and N * K % (2 * _lanes()) == 0 and N * K <= 2 * PIECE


def _decode(w: Weight4, out: Tensor) -> None:
    """`dequantize4` of a whole small weight into `out` (N K,), in three operations: small steps are made of these."""
    lanes = _lanes()
    index = scratch(w.q.numel(), torch.int64, out.device, "index").view(lanes, -1)
    index.copy_(w.q.view(lanes, -1))
    pairs = w.table.view(torch.int64).view(1, 256).expand(lanes, 256)
    torch.gather(pairs, 1, index, out=out.view(torch.int64).view(lanes, -1))
    out.view(-1, w.block).mul_(_scales(w)[:, None])


def weight(weights: Sequence[Weight4 | Tensor], like: Tensor, fresh: bool = False) -> Tensor:
    """The weights one under the other, (Σ N, K) in the dtype of `like`.

    Without `fresh` it lies in a reused buffer: use it before the next call.
    """
    first = weights[0]
    if len(weights) == 1 and isinstance(first, Tensor) and first.dtype == like.dtype:
        return first.detach()
    K = first.shape[1]
    N = sum(w.shape[0] for w in weights)
    n, at = N * K + 1, 0  # + 1: an odd count ends on half a byte
    buffer = like.new_empty(n) if fresh else scratch(n, like.dtype, like.device, "weight")
    for w in weights:
        n = w.shape[0] * K
        if isinstance(w, Tensor):
            buffer[at : at + n].view(w.shape).copy_(w.detach())
        elif at % 2:  # values are written in pairs
            buffer[at : at + n] = dequantize4(w.q, w.scales, w.table, w.block, n, like.dtype)
        elif _is_quick(w, like):
            _decode(w, buffer[at : at + n])
        else:
            dequantize4(w.q, w.scales, w.table, w.block, n, like.dtype, out=buffer[at : at + n + n % 2])
        at += n
    return buffer[: N * K].view(N, K)


def _stacked(group: Group) -> Tensor:
    """A (Σ r, K)."""
    have = [low[0].detach() for low in group.lows if low]
    return have[0] if len(have) == 1 else torch.cat(have)


def _scale(group: Group, t: Tensor) -> None:
    """Multiplies the columns of t (M, Σ r) by the s_i of their layers."""
    scales = [low[2] for low in group.lows if low]
    if len(set(scales)) == 1:
        t.mul_(scales[0])
        return
    at = 0
    for r, low in zip(group.ranks, group.lows, strict=True):
        if low:
            t[:, at : at + r].mul_(low[2])
        at += r


def forward(group: Group, x: Tensor, w: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Y (M, Σ N) and T (M, Σ r), its columns times s_i, of x (M, K); w is `weight` of the group where it is there."""
    y, t = gemm.linear(x, weight(group.weights, x) if w is None else w), None
    if sum(group.ranks):
        t = x @ _stacked(group).T
        _scale(group, t)
    col = at = 0
    for n, r, low, bias in zip(group.sizes, group.ranks, group.lows, group.biases, strict=True):
        part = y[:, col : col + n]
        if bias is not None:
            part.add_(bias.detach())
        if low:
            assert t is not None
            part.addmm_(t[:, at : at + r], low[1].detach().T)
        col, at = col + n, at + r
    return y, t


def backward(group: Group, dy: Tensor, t: Tensor | None, w: Tensor | None = None, want_dx: bool = True):
    """dX (M, K), or None where unwanted, U (M, Σ r) and db_i in turn, of dY (M, Σ N); w as in `forward`."""
    u: Tensor | None = None
    dbs: list[Tensor | None] = []
    if t is not None:
        u = torch.empty_like(t)
        col = at = 0
        for n, r, low in zip(group.sizes, group.ranks, group.lows, strict=True):
            if low:
                part, b = dy[:, col : col + n], low[1].detach()
                torch.mm(part, b, out=u[:, at : at + r])
                dbs.append(part.T @ t[:, at : at + r])
            else:
                dbs.append(None)
            col, at = col + n, at + r
        _scale(group, u)
    else:
        dbs = [None] * len(group.weights)
    dx = None
    if want_dx:
        dx = gemm.matmul(dy, weight(group.weights, dy) if w is None else w)
        if u is not None:
            dx.addmm_(u, _stacked(group))
    return dx, u, dbs


def grad_a(
    group: Group, u: Tensor | None, x: Tensor, r: Tensor | None = None, w: Tensor | None = None
) -> list[Tensor | None]:
    """da_i of the layers, None without an update; their input is x (M, K), or r x w with r (M, 1) and w (K,)."""
    if u is None:
        return [None] * len(group.weights)
    da = (u if r is None else u * r).T @ x  # (Σ r, M) (M, K)
    if w is not None:
        da.mul_(w)
    parts, at = [], 0
    for rank, low in zip(group.ranks, group.lows, strict=True):
        parts.append(da[at : at + rank] if low else None)
        at += rank
    return parts
