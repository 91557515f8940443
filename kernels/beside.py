"""A linear layer with its low-rank update as products of their own: what fold.py does in one, as a CPU does it fastest.

    forward     [Y_1 | Y_2 | .. | T] = X [W ; A]ᵀ,  then  Y_i += s_i T_i b_iᵀ + bias_i
    backward    dX = [dY | U] [W ; A]        U_i = s_i dY_i b_i        db_i = s_i dY_iᵀ T_i        da_i = U_iᵀ X

A is the a_i one under the other.  Where W is decoded from 4 bits, into a buffer that the next layer uses again, A
stands under it, and T and U behind the rows of Y and dY: a thin product by itself runs at a third of the speed of a
wide one.  Where W is dense, and stays where it is, T = X Aᵀ and dX = dY W + U A are products of their own.

The products with W go to the library that is fastest for them (gemm.py), those with the thin factors alone to MKL,
which is two times as fast there (LOG.md, 2026-11-27).  X in the last formula is the layers' input; `grad_a` takes it
as r x w, the parts of a norm's output.
None of it is seen by autograd: call it inside a function of its.
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

# What is known of a group's weights, by the block scales of its first, until these are gone or change: see _Known
_known = WeakTensorKeyDictionary()


class _Known:
    """Block scales of a group in floats, 1/16 byte a weight; and its weights in floats, where they are kept."""

    def __init__(self, weights: Sequence[Weight4]) -> None:
        self.seen, self.rest = _seen(weights), [w.scales[0] for w in weights[1:]]
        parts = [_decoded_scales(w) for w in weights]
        self.scales = (parts[0] if len(parts) == 1 else torch.cat(parts))[:, None]
        self.whole: Tensor | None = None

    def still(self, weights: Sequence[Weight4]) -> bool:
        """Whether these are the weights, and nobody has written to them."""
        rest = weights[1:]
        same = len(rest) == len(self.rest) and all(w.scales[0] is t for w, t in zip(rest, self.rest, strict=True))
        return same and self.seen == _seen(weights)


def _decoded_scales(w: Weight4) -> Tensor:
    if len(w.scales) == 1:
        return w.scales[0]
    q, code, absmax, offset = w.scales
    return dequantize_scales(q, code, absmax, offset)


def _seen(weights: Sequence[Weight4]) -> list[int]:
    return [i for w in weights for i in (w.q.untyped_storage()._cdata, w.q._version, w.scales[0]._version)]


def _know(weights: Sequence[Weight4]) -> _Known:
    key = weights[0].scales[0]
    found = _known.get(key)
    if found is None or not found.still(weights):
        found = _known[key] = _Known(weights)
    return found


def forget() -> None:
    """Lets go of all weights that are kept in floats, and of what else is known of weights."""
    if _known:
        _known.clear()


def _lanes() -> int:
    """Rows in which `gather` is asked to look up: it splits its work over rows only."""
    return 1 << (torch.get_num_threads() - 1).bit_length()


def _is_quick(weights: Sequence[Weight4 | Tensor], like: Tensor) -> bool:
    """Whether `_decode` takes them: 4-bit, of one block size and whole blocks, together no more than a cache holds."""
    if like.dtype != torch.float32 or like.device.type != "cpu":
        return False
    whole, lanes, block = 0, 2 * _lanes(), 0
    for w in weights:
        if isinstance(w, Tensor):
            return False
        n = w.shape[0] * w.shape[1]
        if n % w.block or n % lanes or w.block != (block or w.block):
            return False
        whole, block = whole + n, w.block
    return whole <= 2 * PIECE


def _decode(weights: Sequence[Weight4], out: Tensor) -> None:
    """`dequantize4` of small weights one behind the other into `out`, in few operations."""
    lanes, at = _lanes(), 0
    index = scratch(out.numel() // 2, torch.int64, out.device, "index")
    pairs = out.view(torch.int64)
    for q, _, table, *_ in weights:
        part = slice(at, at + q.numel())
        codes = index[part].copy_(q).view(lanes, -1)
        row = table.view(torch.int64).view(1, 256).expand(lanes, 256)
        torch.gather(row, 1, codes, out=pairs[part].view(lanes, -1))
        at += q.numel()
    out.view(-1, weights[0].block).mul_(_know(weights).scales)


def is_joined(group: Group) -> bool:
    """Whether A stands under W, and U has its place behind the rows of dY."""
    return any(isinstance(w, Weight4) for w in group.weights)


def room(group: Group) -> int:
    """Columns that the buffers of Y and dY have behind their rows."""
    return sum(group.ranks) if is_joined(group) else 0


def weight(group: Group, like: Tensor, keep: bool = False) -> Tensor:
    """The weights one under the other, (Σ N, K) in the dtype of `like`, and under them A where they are joined.

    With `keep` they are decoded when first asked for, and kept until `forget` or a change; not so a group with a weight
    that is not in 4 bits.  Else they lie in a reused buffer: use it before the next call.
    """
    first, N = group.weights[0], sum(group.sizes)
    if len(group.weights) == 1 and isinstance(first, Tensor) and first.dtype == like.dtype:
        return first.detach()
    n = (N + room(group)) * group.K + 1  # + 1: an odd count ends on half a byte
    known = _know(group.weights) if keep and all(isinstance(w, Weight4) for w in group.weights) else None  # type: ignore
    if known is None:
        return _fill(group, scratch(n, like.dtype, like.device, "weight"))
    if known.whole is None or known.whole.numel() != n or known.whole.dtype != like.dtype:
        known.whole = like.new_empty(n)
        return _fill(group, known.whole)
    return renew(group, known.whole[: n - 1].view(-1, group.K))


def _fill(group: Group, buffer: Tensor) -> Tensor:
    """`weight` in `buffer`."""
    K, N, at = group.K, sum(group.sizes), 0
    if _is_quick(group.weights, buffer):
        _decode(group.weights, buffer[: N * K])  # type: ignore[arg-type]  # _is_quick has seen them
        return renew(group, buffer[:-1].view(-1, K))
    for w in group.weights:
        n = w.shape[0] * K
        if isinstance(w, Tensor):
            buffer[at : at + n].view(w.shape).copy_(w)
        elif at % 2:  # values are written in pairs
            buffer[at : at + n] = dequantize4(w.q, w.scales, w.table, w.block, n, buffer.dtype)
        else:
            dequantize4(w.q, w.scales, w.table, w.block, n, buffer.dtype, out=buffer[at : at + n + n % 2])
        at += n
    return renew(group, buffer[:-1].view(-1, K))


def renew(group: Group, whole: Tensor) -> Tensor:
    """`weight` with A as it is now: others may have put theirs there."""
    N = sum(group.sizes)
    if whole.shape[0] > N:
        torch.cat([low[0] for low in group.lows if low], out=whole[N:])
    return whole


def _stacked(group: Group) -> Tensor:
    """A (Σ r, K)."""
    have = [low[0] for low in group.lows if low]
    return have[0] if len(have) == 1 else torch.cat(have)


def forward(group: Group, x: Tensor, w: Tensor | None = None, anyhow: bool = False) -> tuple[Tensor, Tensor | None]:
    """Y (M, Σ N + room) and T (M, Σ r), of x (M, K); where there is room, T is what stands in it.

    `w` is `weight` of the group where it is there.  With `anyhow`, Y may lie in memory by columns.
    """
    w = weight(group, x) if w is None else w
    y, t = gemm.linear_anyhow(x, w) if anyhow else gemm.linear(x, w), None
    N = sum(group.sizes)
    if sum(group.ranks):
        t = y[:, N:] if is_joined(group) else x @ _stacked(group).T
    col = at = 0
    for n, r, low, bias in zip(group.sizes, group.ranks, group.lows, group.biases, strict=True):
        part = y[:, col : col + n]
        if bias is not None:
            part.add_(bias)
        if low:
            assert t is not None
            part.addmm_(t[:, at : at + r], low[1].T, alpha=low[2])
        col, at = col + n, at + r
    return y, t


def backward(group: Group, dy: Tensor, t: Tensor | None, w: Tensor | None = None, want_dx: bool = True):
    """dX (M, K), or None where unwanted, U (M, Σ r) and db_i in turn, of dY (M, Σ N + room); w as in `forward`.

    U is written into the room, where T may stand.
    """
    N = sum(group.sizes)
    u: Tensor | None = None
    dbs: list[Tensor | None] = []
    parts, col, at = [], 0, 0
    for n, r, low in zip(group.sizes, group.ranks, group.lows, strict=True):
        if low:
            assert t is not None
            part = dy[:, col : col + n]
            dbs.append(torch.addmm(low[1], part.T, t[:, at : at + r], beta=0, alpha=low[2]))  # of b only its shape
            parts.append((part, low, at))
        else:
            dbs.append(None)
        col, at = col + n, at + r
    if t is not None:
        u = dy[:, N:] if is_joined(group) else torch.empty_like(t)
        for part, (_, b, s), at in parts:
            u[:, at : at + b.shape[1]].addmm_(part, b, beta=0, alpha=s)
    dx = None
    if want_dx:
        dx = gemm.matmul(dy, weight(group, dy) if w is None else renew(group, w))
        if u is not None and not is_joined(group):
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
