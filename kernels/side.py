"""k adapters side by side, laid out for the columns that a base's product has for them (fold.py).

    spread      (N, room): b_p of the p-th adapter in its R columns, from a layer's place on; the bias behind all
    diagonal    (M, room): rows of the p-th adapter's run hold its T or U in its R columns, and 0 in those of the others

One launch each, where the operations of torch take three: a step of 16 layers has 350 of them, and a launch of a small
one costs 3 us whatever it copies.  Bytes that must move: what is written, and the factors once.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora.kernels._triton import tl, triton
from lora.kernels.dispatch import use_triton
from lora.kernels.op import op


class Rounded(NamedTuple):
    """Factors of adapters side by side in the dtype of the states: as they are, and times the scale."""

    a: Tensor  # (k, r, K)
    b: Tensor  # (k, N, r)
    sa: Tensor
    sb: Tensor


def rounded(low: Any, dtype: torch.dtype, name: str) -> Tensor:
    """The rounded factor `name` of an update (a, b, s), or (a, b, s, Rounded), which has it."""
    if len(low) > 3 and low[3].a.dtype == dtype:
        return getattr(low[3], name)
    factor = low[name.endswith("b")].detach()
    return (factor if len(name) == 1 else factor * low[2][:, None, None]).to(dtype)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """(k, Σ n_i, m) of the (k, n_i, m): a view where they lie one behind the other, as those of a stack do."""
    first, n = parts[0], 0
    for t in parts:
        if t.stride() != first.stride() or t.data_ptr() != first.data_ptr() + n * t.stride(1) * t.element_size():
            return torch.cat(list(parts), dim=1)
        n += t.shape[1]
    return first.as_strided((first.shape[0], n, first.shape[2]), first.stride())


# ---- reference ----
def _spread_ref(out: Tensor, b: Tensor | None, at: int, R: int, k: int, bias: Tensor | None) -> None:
    out.zero_()
    if b is not None:
        out[:, : k * R].unflatten(1, (k, R))[:, :, at : at + b.shape[2]].copy_(b.transpose(0, 1))
    if bias is not None:
        out[:, k * R].copy_(bias)


def _diagonal_ref(out: Tensor, t: Tensor, ones: bool) -> None:
    out.zero_()
    k, _, R = t.shape
    blocks = out[:, : k * R].unflatten(0, (k, -1)).unflatten(2, (k, R))  # (k, M / k, k, R)
    blocks.diagonal(dim1=0, dim2=2).copy_(t.permute(1, 2, 0))  # (M / k, R, k)
    if ones:
        out[:, k * R] = 1.0


# ---- kernel ----
@triton.jit
def _spread_kernel(
    out_ptr,  # (N, room)
    b_ptr,  # (k, N, r)
    bias_ptr,  # (N,), read only with BIAS
    N,
    room,
    at,  # of the layer's columns among an adapter's
    R,  # columns of an adapter
    r,  # 0 without b
    k,
    out_stride_n,
    b_stride_k,
    BIAS: tl.constexpr,  # behind all adapters' columns
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    col = tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    part, inside = col // R, col % R - at
    there = (row < N) & (part < k) & (inside >= 0) & (inside < r)
    value = tl.load(b_ptr + part.to(tl.int64) * b_stride_k + row * r + inside, mask=there, other=0.0)
    if BIAS:
        bias = tl.load(bias_ptr + row, mask=row < N, other=0.0).to(value.dtype)
        value = tl.where(col == k * R, bias, value)
    tl.store(out_ptr + row * out_stride_n + col, value, mask=(row < N) & (col < room))


@triton.jit
def _diagonal_kernel(
    out_ptr,  # (M, room)
    t_ptr,  # (M, R)
    M,
    run,  # rows of an adapter
    room,
    R,
    last,
    out_stride_m,
    ONES: tl.constexpr,  # in column `last`
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    col = tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    inside = col - row // run * R
    there = (row < M) & (inside >= 0) & (inside < R)
    value = tl.load(t_ptr + row * R + inside, mask=there, other=0.0)
    if ONES:
        value = tl.where(col == last, 1.0, value)
    tl.store(out_ptr + row * out_stride_m + col, value.to(out_ptr.dtype.element_ty), mask=(row < M) & (col < room))


# ---- launch ----
def blocks(room: int) -> tuple[int, int]:
    """Columns and rows of a program that writes rows of `room` columns."""
    BLOCK = triton.next_power_of_2(room)
    return BLOCK, max(1, 2048 // BLOCK)


@op("lora::spread", mutates=("out",))
def _spread_op(out: Tensor, b: Tensor | None, at: int, R: int, k: int, bias: Tensor | None) -> None:
    N, room = out.shape
    BLOCK, ROWS = blocks(room)
    r, stride = (0, 0) if b is None else (b.shape[2], b.stride(0))
    with torch.cuda.device_of(out):
        _spread_kernel[(-(-N // ROWS),)](
            out, out if b is None else b, out if bias is None else bias, N, room, at, max(1, R), r, k, out.stride(0),
            stride, BIAS=bias is not None, ROWS=ROWS, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


def spread(out: Tensor, b: Tensor | None, at: int, R: int, k: int, bias: Tensor | None = None) -> None:
    """Writes all of `out` (N, room): b (k, N, r), its p-th part from column p R + at on, the bias (N,) in k R, else 0.

    `out` may be columns of a wider buffer.
    """
    if b is not None and (b.stride(2) != 1 or b.stride(1) != b.shape[2]):
        b = b.contiguous()
    if use_triton(out, *(t for t in (b, bias) if t is not None)):
        _spread_op(out, b, at, R, k, bias)
    else:
        _spread_ref(out, b, at, R, k, bias)


@op("lora::diagonal", mutates=("out",))
def _diagonal_op(out: Tensor, t: Tensor, k: int, ones: bool) -> None:
    M, room = out.shape
    BLOCK, ROWS = blocks(room)
    R = t.shape[1]
    with torch.cuda.device_of(out):
        _diagonal_kernel[(-(-M // ROWS),)](
            out, t, M, M // k, room, R, k * R, out.stride(0), ONES=ones, ROWS=ROWS, BLOCK=BLOCK,
            num_warps=4,
        )  # fmt: skip


def diagonal(out: Tensor, t: Tensor, ones: bool = False) -> None:
    """Writes all of `out` (M, room): t (k, M / k, R) block-diagonal, ones in the column behind it if `ones`, else 0.

    `out` may be columns of a wider buffer.
    """
    if use_triton(out, t):
        _diagonal_op(out, t.contiguous().flatten(0, 1), t.shape[0], ones)
    else:
        _diagonal_ref(out, t, ones)
