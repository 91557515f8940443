"""Sums that programs made over their strips of a matrix, added up where they are wanted.

    columns     (M, room): the sums (strips, M, R) over strips of columns, layer beside layer; ones behind them; else 0
    values      (n,): the sums (parts, n) over runs of rows

One launch for both, each sum in a fixed order.  A pass over a wide matrix that feeds thin products (pair.py, gate.py)
leaves them: a tenth of the bytes of the matrix.  Whoever makes that pass has the twin.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora.kernels._triton import tl, triton
from lora.kernels.side import blocks

LAYERS = 3  # that one launch knows
BLOCK = 1024  # values a program


# ---- kernel ----
@triton.jit
def _strips_kernel(
    part_ptr,  # (strips, M, R) f32
    out_ptr,  # (M, room)
    copy_ptr,  # (M, sum of r) contiguous, written only with COPY
    values_ptr,  # (parts, n) f32
    sum_ptr,  # (n,) f32
    M,
    room,
    programs,  # of the columns
    n,
    parts,
    out_stride_m,
    r0,  # columns of each layer
    r1,
    r2,
    s0,  # strips of each layer
    s1,
    s2,
    most,  # of them
    R: tl.constexpr,
    ONES: tl.constexpr,
    COPY: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid < programs:
        row = pid.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
        col = tl.arange(0, COLS)[None, :]  # (1, COLS)
        second = col >= r0
        third = col >= r0 + r1
        rank = col - tl.where(third, r0 + r1, tl.where(second, r0, 0))
        first = tl.where(third, s0 + s1, tl.where(second, s0, 0))
        count = tl.where(third, s2, tl.where(second, s1, s0))
        there = (row < M) & (col < r0 + r1 + r2)
        acc = tl.zeros((ROWS, COLS), dtype=tl.float32)
        for strip in range(most):
            at = ((first + strip).to(tl.int64) * M + row) * R + rank
            acc += tl.load(part_ptr + at, mask=there & (strip < count), other=0.0)
        if COPY:
            place = copy_ptr + row * (r0 + r1 + r2) + col
            tl.store(place, acc.to(copy_ptr.dtype.element_ty), mask=there)
        if ONES:
            acc = tl.where(col == r0 + r1 + r2, 1.0, acc)
        tl.store(out_ptr + row * out_stride_m + col, acc.to(out_ptr.dtype.element_ty), mask=(row < M) & (col < room))
    else:
        i = (pid - programs) * BLOCK + tl.arange(0, BLOCK)
        at = i.to(tl.int64)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for _ in range(parts):
            total += tl.load(values_ptr + at, mask=i < n, other=0.0)
            at += n
        tl.store(sum_ptr + i, total, mask=i < n)


# ---- launch ----
def add_strips(
    part: Tensor,
    ranks: Sequence[int],
    strips: Sequence[int],
    out: Tensor,
    ones: bool = False,
    copy: Tensor | None = None,
    values: Tensor | None = None,
) -> Tensor:
    """Writes `out` (M, room) whole from the sums `part` (strips, M, R), of each layer in turn so many strips and r.

    The same goes into `copy` (M, Σ r) where given.  Returns the sums of `values` (parts, n).
    """
    M, room = out.shape
    COLS, ROWS = blocks(room)
    programs = -(-M // ROWS)
    parts, n = (0, 0) if values is None else values.shape
    total = torch.empty(n, dtype=torch.float32, device=out.device)
    r, s = ([*some, *[0] * (LAYERS - len(some))] for some in (ranks, strips))
    with torch.cuda.device_of(out):
        _strips_kernel[(programs + -(-n // BLOCK),)](
            part, out, out if copy is None else copy, part if values is None else values, total, M, room, programs, n,
            parts, out.stride(0), *r, *s, max(s), R=part.shape[2], ONES=ones, COPY=copy is not None, ROWS=ROWS,
            COLS=COLS, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return total
