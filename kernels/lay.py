"""What updates add to the product of their base (fold.py), laid out for it; of adapters side by side: side.py.

    stacked   (rows, K): s_i a_i one under the other, 0 below
    spread    (Σ N, room): s_i b_i block-diagonal, the biases in the column behind it, else 0
    fringe    (M, room): T or U, ones in the column behind it where there are biases, else 0

The factors of up to three layers go in one launch.  Each value is rounded to the dtype of what it is written into,
after the scale.  A launch costs 2 us whatever it copies,
and a step has four such groups in each of its blocks, forward and backward: with one for each factor it took 1,300.

Bytes that must move: what is written, and the factors, T or U once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora.kernels._triton import tl, triton
from lora.kernels.dispatch import use_triton
from lora.kernels.op import op
from lora.kernels.side import blocks

LAYERS = 3  # that one launch knows
BLOCK = 1024  # columns of a row of `stacked` a program


# ---- reference ----
def _lay_ref(
    a: list[Tensor],
    b: list[Tensor],
    biases: list[Tensor | None],
    sa: list[float],
    sb: list[float],
    stacked: Tensor | None,
    spread: Tensor | None,
) -> None:
    row = at = 0
    if spread is not None:
        spread.zero_()
        for one, bias, s in zip(b, biases, sb, strict=True):
            n, r = one.shape
            spread[row : row + n, at : at + r] = one * s
            if bias is not None:
                spread[row : row + n, sum(t.shape[1] for t in b)] = bias
            row, at = row + n, at + r
    if stacked is not None:
        stacked.zero_()
        row = 0
        for one, s in zip(a, sa, strict=True):
            stacked[row : row + one.shape[0]] = one * s
            row += one.shape[0]


def _fringe_ref(out: Tensor, src: Tensor | None, ones: bool) -> None:
    out.zero_()
    r = 0 if src is None else src.shape[1]
    if src is not None:
        out[:, :r] = src
    if ones:
        out[:, r] = 1.0


# ---- kernel ----
@triton.jit
def _lay_kernel(
    stacked_ptr,  # (rows, K)
    spread_ptr,  # (N, room)
    a0_ptr,  # (r0, K), any float, as all the next
    a1_ptr,
    a2_ptr,
    b0_ptr,  # (n0, r0)
    b1_ptr,
    b2_ptr,
    bias0_ptr,  # (n0,)
    bias1_ptr,
    bias2_ptr,
    K,
    room,
    N,
    pieces,  # of a row of `stacked`
    programs,  # of `stacked`
    stacked_stride,
    spread_stride,
    n0,
    n1,
    r0,
    r1,
    r2,
    sa0,
    sa1,
    sa2,
    sb0,
    sb1,
    sb2,
    BIAS: tl.constexpr,  # a bit for each layer that has one
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid < programs:
        row = pid // pieces
        col = (pid % pieces) * BLOCK + tl.arange(0, BLOCK)
        from0 = row.to(tl.int64) * K + col
        here = (row < r0) & (col < K)
        a = tl.load(a0_ptr + from0, mask=here, other=0.0).to(tl.float32) * sa0
        here = (row >= r0) & (row < r0 + r1) & (col < K)
        a += tl.load(a1_ptr + (from0 - r0 * K), mask=here, other=0.0).to(tl.float32) * sa1
        here = (row >= r0 + r1) & (row < r0 + r1 + r2) & (col < K)
        a += tl.load(a2_ptr + (from0 - (r0 + r1) * K), mask=here, other=0.0).to(tl.float32) * sa2
        place = stacked_ptr + row.to(tl.int64) * stacked_stride + col
        tl.store(place, a.to(stacked_ptr.dtype.element_ty), mask=col < K)
    else:
        n = ((pid - programs) * ROWS).to(tl.int64) + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
        rank = tl.arange(0, COLS)[None, :]  # (1, COLS)
        last = rank == r0 + r1 + r2
        first = n < n0
        second = (n >= n0) & (n < n0 + n1)
        third = (n >= n0 + n1) & (n < N)
        there = first & (rank < r0)
        b = tl.load(b0_ptr + n * r0 + rank, mask=there, other=0.0).to(tl.float32) * sb0
        there = second & (rank >= r0) & (rank < r0 + r1)
        b += tl.load(b1_ptr + (n - n0) * r1 + (rank - r0), mask=there, other=0.0).to(tl.float32) * sb1
        there = third & (rank >= r0 + r1) & (rank < r0 + r1 + r2)
        b += tl.load(b2_ptr + (n - n0 - n1) * r2 + (rank - r0 - r1), mask=there, other=0.0).to(tl.float32) * sb2
        if BIAS & 1:
            b += tl.load(bias0_ptr + n + 0 * rank, mask=first & last, other=0.0).to(tl.float32)
        if BIAS & 2:
            b += tl.load(bias1_ptr + (n - n0) + 0 * rank, mask=second & last, other=0.0).to(tl.float32)
        if BIAS & 4:
            b += tl.load(bias2_ptr + (n - n0 - n1) + 0 * rank, mask=third & last, other=0.0).to(tl.float32)
        out = spread_ptr + n * spread_stride + rank
        tl.store(out, b.to(spread_ptr.dtype.element_ty), mask=(n < N) & (rank < room))


@triton.jit
def _fringe_kernel(
    out_ptr,  # (M, room)
    src_ptr,  # (M, r), any float
    M,
    room,
    r,
    out_stride_m,
    src_stride_m,
    ONES: tl.constexpr,  # in the column behind src
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    col = tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    value = tl.load(src_ptr + row * src_stride_m + col, mask=(row < M) & (col < r), other=0.0).to(tl.float32)
    if ONES:
        value = tl.where(col == r, 1.0, value)
    tl.store(out_ptr + row * out_stride_m + col, value.to(out_ptr.dtype.element_ty), mask=(row < M) & (col < room))


# ---- launch ----
@op("lora::lay", mutates=("stacked", "spread"))
def _lay_op(
    a: list[Tensor],
    b: list[Tensor],
    biases: list[Tensor | None],
    sa: list[float],
    sb: list[float],
    stacked: Tensor | None,
    spread: Tensor | None,
) -> None:
    out = stacked if stacked is not None else spread
    assert out is not None
    more = LAYERS - len(a)
    ranks, sizes = ([*(t.shape[0] for t in some), *[0] * more] for some in (a, b))
    rows, K = (0, 1) if stacked is None else stacked.shape
    N, room = (0, 1) if spread is None else spread.shape
    COLS, ROWS = blocks(room)
    pieces = -(-K // BLOCK)
    biased = sum(1 << i for i, bias in enumerate(biases) if bias is not None)
    with torch.cuda.device_of(out):  # Triton launches on the current device, not on the tensors'
        _lay_kernel[(rows * pieces + -(-N // ROWS),)](
            out if stacked is None else stacked, out if spread is None else spread, *a, *[out] * more, *b,
            *[out] * more, *(out if bias is None else bias for bias in biases), *[out] * more, K, room, N, pieces,
            rows * pieces, 0 if stacked is None else stacked.stride(0), 0 if spread is None else spread.stride(0),
            *sizes[:2], *ranks, *sa, *[0.0] * more, *sb, *[0.0] * more,
            BIAS=biased, ROWS=ROWS, COLS=COLS, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


def lay(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    sa: Sequence[float],
    sb: Sequence[float],
    stacked: Tensor | None = None,
    spread: Tensor | None = None,
) -> None:
    """Writes `stacked` (rows >= Σ r, K) and `spread` (Σ N, room), where given, whole.

    Of each layer: a (r, K) and b (N, r), r = 0 without an update, its bias (N,) or None, and the scales sa of a and
    sb of b.  Both may be rows or columns of wider buffers.
    """
    R = sum(t.shape[0] for t in a)
    if len(a) > LAYERS:
        raise ValueError(f"{len(a)} layers; one launch lays out the factors of at most {LAYERS}")
    if stacked is not None and (stacked.shape[0] < R or any(t.shape[1] != stacked.shape[1] for t in a)):
        raise ValueError(f"a are {[tuple(t.shape) for t in a]}; they do not fit into {tuple(stacked.shape)}")
    used = R + any(bias is not None for bias in biases)
    if spread is not None and (used > spread.shape[1] or sum(t.shape[0] for t in b) != spread.shape[0]):
        raise ValueError(
            f"b are {[tuple(t.shape) for t in b]}, with biases {used} columns; they do not fit into "
            f"{tuple(spread.shape)}"
        )
    outs = [t for t in (stacked, spread) if t is not None]
    args = [t.contiguous() for t in a], [t.contiguous() for t in b], list(biases), list(sa), list(sb), stacked, spread
    if use_triton(*outs, *a, *b, *(t for t in biases if t is not None)):
        _lay_op(*args)
    else:
        _lay_ref(*args)


@op("lora::fringe", mutates=("out",))
def _fringe_op(out: Tensor, src: Tensor | None, ones: bool) -> None:
    M, room = out.shape
    BLOCK, ROWS = blocks(room)
    r, stride = (0, 0) if src is None else (src.shape[1], src.stride(0))
    with torch.cuda.device_of(out):  # Triton launches on the current device, not on the tensors'
        _fringe_kernel[(-(-M // ROWS),)](
            out, out if src is None else src, M, room, r, out.stride(0), stride, ONES=ones, ROWS=ROWS, BLOCK=BLOCK,
            num_warps=4,
        )  # fmt: skip


def fringe(out: Tensor, src: Tensor | None, ones: bool = False) -> None:
    """Writes all of `out` (M, room): src (M, r), behind it a column of ones if asked for, else 0.

    `out` may be columns of a wider buffer.
    """
    if src is not None and (src.shape[0] != out.shape[0] or src.shape[1] + ones > out.shape[1]):
        raise ValueError(f"{tuple(src.shape)}, and {int(ones)} more, does not fit into {tuple(out.shape)}")
    if src is not None and src.stride(1) != 1:
        src = src.contiguous()
    if use_triton(out, *(() if src is None else (src,))):
        _fringe_op(out, src, ones)
    else:
        _fringe_ref(out, src, ones)
