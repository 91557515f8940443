"""Both thin products of a gradient dY with the factors of its layers' updates, in one pass over it.

    U_i = dY_i (s_i b_i)   (M, r_i)          db_i = dY_iᵀ T_i   (N_i, r_i)

dY_i are columns of one matrix dY, 67 MB and more; as products of their own the two read it twice.  Here a program takes
a strip of columns over a run of rows, hands each tile to the tensor cores twice, and leaves its part of U and of db,
which are added in a fixed order (strips.py).

Bytes that must move: dY once.  The parts, float32, are written and read: a tenth of that with r = 16 beside 4096
columns.  Source: LoRA, arXiv:2106.09685, section 4.1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora.kernels._triton import tl, triton
from lora.kernels.dispatch import stages, use_triton
from lora.kernels.op import op
from lora.kernels.strips import LAYERS, add_strips

MAX_RANK = 32  # beyond it the parts are too many bytes
ROWS, COLS, WARPS = 32, 512, 4  # of a program's tile
PROGRAMS = 264  # two a multiprocessor of an H100, on every card: it decides what is added to what


# ---- reference ----
def _pair_ref(
    dy: Tensor, t: Tensor, b: list[Tensor], scales: list[float], starts: list[int], out: Tensor
) -> list[Tensor]:
    """dY and T in their dtype, products of them in float32 or wider."""
    up = torch.promote_types(dy.dtype, torch.float32)
    out.zero_()
    at, dbs = 0, []
    for one, scale, start in zip(b, scales, starts, strict=True):
        n, r = one.shape
        part = dy[:, start : start + n].to(up)
        out[:, at : at + r] = part @ (one * scale).to(dy.dtype).to(up)
        dbs.append(part.T @ t[:, at : at + r].to(up))
        at += r
    return dbs


# ---- kernel ----
@triton.jit
def _pair_kernel(
    dy_ptr,  # (M, >= N)
    t_ptr,  # (M, >= sum of r)
    b0_ptr,  # (n0, r0), any float, as the next two
    b1_ptr,
    b2_ptr,
    u_ptr,  # (strips, M, R) f32
    db_ptr,  # (parts, values) f32: (n, r) of each layer one behind the other
    M,
    values,
    steps,  # blocks of ROWS rows a program
    dy_stride_m,
    t_stride_m,
    c0,  # where each layer's columns of dY begin
    c1,
    c2,
    n0,
    n1,
    n2,
    r0,
    r1,
    r2,
    scale0,
    scale1,
    scale2,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
):
    strip = tl.program_id(0)
    part = tl.program_id(1)
    s0 = tl.cdiv(n0, COLS)
    s1 = tl.cdiv(n1, COLS)
    second = strip >= s0
    third = strip >= s0 + s1
    n = tl.where(third, n2, tl.where(second, n1, n0))
    r = tl.where(third, r2, tl.where(second, r1, r0))
    at = tl.where(third, r0 + r1, tl.where(second, r0, 0))
    place = tl.where(third, n0 * r0 + n1 * r1, tl.where(second, n0 * r0, 0))
    start = tl.where(third, c2, tl.where(second, c1, c0))
    scale = tl.where(third, scale2, tl.where(second, scale1, scale0))
    b_ptr = tl.where(third, b2_ptr, tl.where(second, b1_ptr, b0_ptr))
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    rank = tl.arange(0, R)[None, :]
    inside = (strip - tl.where(third, s0 + s1, tl.where(second, s0, 0))) * COLS + tl.arange(0, COLS)
    there = (inside[:, None] < n) & (rank < r)
    b = tl.load(b_ptr + inside[:, None] * r + rank, mask=there, other=0.0).to(tl.float32)
    b = (b * scale).to(dtype)  # (COLS, R)
    db = tl.zeros((COLS, R), dtype=tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        row = (part * steps + step).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
        mask = (row < M) & (inside[None, :] < n)
        dy = tl.load(dy_ptr + row * dy_stride_m + start + inside[None, :], mask=mask, other=0.0)
        t = tl.load(t_ptr + row * t_stride_m + at + rank, mask=(row < M) & (rank < r), other=0.0)
        u = tl.dot(dy, b)
        db = tl.dot(tl.trans(dy), t, db)
        tl.store(u_ptr + (strip.to(tl.int64) * M + row) * R + rank, u, mask=row < M)
    tl.store(db_ptr + part.to(tl.int64) * values + place + inside[:, None] * r + rank, db, mask=there)


# ---- launch ----
@op("lora::pair", mutates=("out",))
def _pair_op(dy: Tensor, t: Tensor, b: list[Tensor], scales: list[float], starts: list[int], out: Tensor) -> Tensor:
    M, ranks, sizes = dy.shape[0], [one.shape[1] for one in b], [one.shape[0] for one in b]
    strips = [-(-n // COLS) for n in sizes]
    blocks = -(-M // ROWS)
    steps = -(-blocks // max(1, min(blocks, PROGRAMS // sum(strips))))
    parts, values = -(-blocks // steps), sum(one.numel() for one in b)
    R = max(16, triton.next_power_of_2(max(ranks)))
    u = torch.empty(sum(strips), M, R, dtype=torch.float32, device=dy.device)
    db = torch.empty(parts, values, dtype=torch.float32, device=dy.device)
    more = LAYERS - len(b)
    tile = dy.element_size() * (ROWS * COLS + ROWS * R + COLS * R)
    with torch.cuda.device_of(dy):  # Triton launches on the current device, not on the tensors'
        _pair_kernel[(sum(strips), parts)](
            dy, t, *b, *b[:1] * more, u, db, M, values, steps, dy.stride(0), t.stride(0), *starts, *[0] * more,
            *sizes, *[0] * more, *ranks, *[0] * more, *scales, *[0.0] * more,
            R=R, ROWS=ROWS, COLS=COLS, STAGES=stages(tile, dy.device), num_warps=WARPS,
        )  # fmt: skip
    return add_strips(u, ranks, strips, out, values=db)


@_pair_op.register_fake
def _(dy, t, b, scales, starts, out):
    return dy.new_empty(sum(one.numel() for one in b), dtype=torch.float32)


def takes(dy: Tensor, ranks: Sequence[int]) -> bool:
    """Whether one pass over dY is quicker than two products: 16 bits on a GPU, and factors that are thin enough."""
    return dy.dtype in (torch.bfloat16, torch.float16) and max(ranks) <= MAX_RANK and use_triton(dy)


def pair(
    dy: Tensor, t: Tensor, b: Sequence[Tensor], scales: Sequence[float], starts: Sequence[int], out: Tensor
) -> list[Tensor]:
    """db_i (N_i, r_i) float32 of each layer; s_i U_i one beside the other into the first columns of `out`, else 0.

    dY (M, ..) holds the layers' columns from `starts` on, t (M, Σ r) their T_i side by side, b_i are (N_i, r_i) with
    r_i at most MAX_RANK, and up to three of them.  `out` (M, >= Σ r) may be further columns of what dY is.
    The factors are rounded to the dtype of dY, b_i after it is scaled.
    """
    M, ranks = dy.shape[0], [one.shape[1] for one in b]
    wide = max((start + one.shape[0] for start, one in zip(starts, b, strict=True)), default=0)
    if not 1 <= len(b) <= LAYERS or not 1 <= min(ranks) <= max(ranks) <= MAX_RANK:
        raise ValueError(f"ranks {ranks}: one pass is for one to {LAYERS} layers with ranks from 1 to {MAX_RANK}")
    if dy.shape[1] < wide or t.shape != (M, sum(ranks)) or out.shape[0] != M or out.shape[1] < sum(ranks):
        raise ValueError(
            f"dy is {tuple(dy.shape)}, t {tuple(t.shape)}, out {tuple(out.shape)}; layers that end at column {wide} "
            f"with ranks {ranks} need ({M}, {wide}), ({M}, {sum(ranks)}) and at least that"
        )
    bs, t = [one.contiguous() for one in b], t if t.stride(1) == 1 else t.contiguous()
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    if not use_triton(dy, t, out, *bs) or not dy.numel():
        return _pair_ref(dy, t, bs, list(scales), list(starts), out)
    made = _pair_op(dy, t.to(dy.dtype), bs, list(scales), list(starts), out)
    sums = made.split([one.numel() for one in bs])
    return [part.view(one.shape) for part, one in zip(sums, bs, strict=True)]
