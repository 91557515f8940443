"""The backward of a gated unit (gate.py) in front of a product in 8 bits: dg and du are never written in 16.

    du = dh act(g)     dg = dh u act'(g)     [dg | du] ≈ e4m3 * scale, one scale a row (fp8.py)
    U = dg b_g, du b_u                       what the products before g and u give for their factors a
    da = vᵀ h          db = dgᵀ t_g, duᵀ t_u   as gate.py has them

A row's scale is its largest value over TOP, known when the whole row has been read; the sums da and db go over the
columns' whole length.  So there are two passes, each of which makes dg and du from dh, g and u: one by rows, for the
scale and U, and one by columns, which rounds and sums.  Neither U nor the sums are made from rounded numbers.  (They
would be if one pass by rows held dg and du in registers: as many bytes, and each of the numbers off by some 3 %.)

Bytes that must move, in tensors of M x F in 16 bits: 3 and 3 + 1.  Gate.py's 5, U's 2 and rounding's 3 were 10.
For 8192 x 14336 at 3.0 TB/s: 0.235 and 0.313 ms.
"""

import torch
from torch import Tensor

from lora.kernels._triton import tl, triton
from lora.kernels.dispatch import INTERPRETED, use_triton
from lora.kernels.fp8 import TINY, TOP, to_f8
from lora.kernels.gate import _backward_ref, _grads, _store_sums, _sum
from lora.kernels.op import op

BY_ROWS, BY_COLS = (64, 64, 4, 3), (32, 64, 2, 3)  # rows, columns, warps and stages of the passes
PROGRAMS = 256  # by rows, at least: where the rows alone are fewer, several share a row
PARTS = 8  # programs that share a column

Factors = tuple[Tensor | None, Tensor | None, Tensor | None]  # v, t_g and t_u (M, r)


# ---- reference ----
def _grads_ref(dh: Tensor, g: Tensor, u: Tensor, gelu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """h, dg and du in float32."""
    dg, du = g.float().clone(), u.float().clone()
    h = _backward_ref(dh.float(), dg, du, gelu)
    return h, dg, du


def _scales_ref(dh: Tensor, g: Tensor, u: Tensor, bg: Tensor | None, bu: Tensor | None, one: bool, gelu: bool):
    _, dg, du = _grads_ref(dh, g, u, gelu)
    top = torch.maximum(dg.abs().amax(dim=1, keepdim=True), du.abs().amax(dim=1, keepdim=True))
    lows = [x.to(g.dtype).float() @ b.to(g.dtype).float() for x, b in ((dg, bg), (du, bu)) if b is not None]
    if one:
        lows = [lows[0] + lows[1]]
    return top.clamp(min=TINY) / TOP, torch.cat(lows, dim=1) if lows else g.new_empty(g.shape[0], 0).float()


def _round_ref(
    dh: Tensor, g: Tensor, u: Tensor, scale: Tensor, out: Tensor, factors: Factors, sums: Tensor, gelu: bool
) -> None:
    h, dg, du = _grads_ref(dh, g, u, gelu)
    out.copy_(to_f8(torch.cat((dg, du), dim=1) / scale))
    h, dg, du = (x.to(g.dtype).float() for x in (h, dg, du))
    v, tg, tu = (None if t is None else t.to(g.dtype).float() for t in factors)
    pairs = ((v, h), (dg, tg), (du, tu))
    sums.zero_()
    sums[0] = torch.cat([sums[0, :0], *((x.mT @ y).flatten() for x, y in pairs if x is not None and y is not None)])


# ---- kernel ----
@triton.jit
def _rows_kernel(
    dh_ptr,  # (M, F), as g and u
    g_ptr,
    u_ptr,
    bg_ptr,  # (F, r_g), read only with G, as the next with U
    bu_ptr,  # (F, r_u)
    scale_ptr,  # (shares, M) f32
    low_ptr,  # (shares, M, r) f32
    M,
    F,
    share,  # columns of a program
    dh_stride_m,
    g_stride_m,
    u_stride_m,
    bg_stride_f,
    bu_stride_f,
    r_g,
    r_u,
    r,
    GELU: tl.constexpr,
    INTERPRETED: tl.constexpr,
    G: tl.constexpr,
    U: tl.constexpr,
    ONE: tl.constexpr,  # b_g and b_u are halves of one factor: both make the same columns of U
    R: tl.constexpr,
    TOP: tl.constexpr,
    TINY: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    part = tl.program_id(1).to(tl.int64)
    dtype: tl.constexpr = g_ptr.dtype.element_ty
    rank = tl.arange(0, R)[None, :]
    top = tl.zeros((ROWS, COLS), dtype=tl.float32)
    low_g = tl.zeros((ROWS, R), dtype=tl.float32)
    low_u = tl.zeros((ROWS, R), dtype=tl.float32)
    for start in tl.range(0, share, COLS, num_stages=STAGES):
        first = part * share + start
        col = first + tl.arange(0, COLS)[None, :]
        mask = (row < M) & (col < F)
        _, dg, du = _grads(
            dh_ptr + row * dh_stride_m + col, g_ptr + row * g_stride_m + col, u_ptr + row * u_stride_m + col, mask,
            GELU, INTERPRETED,
        )  # fmt: skip
        top = tl.maximum(top, tl.maximum(tl.abs(dg), tl.abs(du)))
        line = first + tl.arange(0, COLS)[:, None]
        if G:
            b = tl.load(bg_ptr + line * bg_stride_f + rank, mask=(line < F) & (rank < r_g), other=0.0)
            low_g = tl.dot(dg.to(dtype), b, low_g, input_precision=PRECISION)
        if U:
            b = tl.load(bu_ptr + line * bu_stride_f + rank, mask=(line < F) & (rank < r_u), other=0.0)
            if ONE:
                low_g = tl.dot(du.to(dtype), b, low_g, input_precision=PRECISION)
            else:
                low_u = tl.dot(du.to(dtype), b, low_u, input_precision=PRECISION)
    most = tl.maximum(tl.max(top, axis=1), TINY)[:, None]
    tl.store(scale_ptr + part * M + row, most / TOP, mask=row < M)
    low_at = low_ptr + (part * M + row) * r + rank
    if G:
        tl.store(low_at, low_g, mask=(row < M) & (rank < r_g))
    if U and not ONE:
        tl.store(low_at + r_g, low_u, mask=(row < M) & (rank < r_u))


@triton.jit
def _cols_kernel(
    dh_ptr,  # (M, F), as g and u
    g_ptr,
    u_ptr,
    scale_ptr,  # (M,) f32
    out_ptr,  # (M, 2F) e4m3
    v_ptr,  # (M, r_v), read only with V, as the next two with T
    tg_ptr,  # (M, r_g)
    tu_ptr,  # (M, r_u)
    sums_ptr,  # (parts, size) f32, each part as gate.py's `_store_sums` has it
    M,
    F,
    steps,  # blocks of ROWS rows a program
    size,
    dh_stride_m,
    g_stride_m,
    u_stride_m,
    out_stride_m,
    v_stride_m,
    tg_stride_m,
    tu_stride_m,
    r_v,
    r_g,
    r_u,
    GELU: tl.constexpr,
    INTERPRETED: tl.constexpr,
    V: tl.constexpr,
    TG: tl.constexpr,
    TU: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part = tl.program_id(1).to(tl.int64)
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    dtype: tl.constexpr = g_ptr.dtype.element_ty
    da = tl.zeros((COLS, R), dtype=tl.float32)
    dbg = tl.zeros((COLS, R), dtype=tl.float32)
    dbu = tl.zeros((COLS, R), dtype=tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        row = (part * steps + step) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1) int64
        at = col[None, :]
        mask = (row < M) & (at < F)
        h, dg, du = _grads(
            dh_ptr + row * dh_stride_m + at, g_ptr + row * g_stride_m + at, u_ptr + row * u_stride_m + at, mask,
            GELU, INTERPRETED,
        )  # fmt: skip
        inverse = 1.0 / tl.load(scale_ptr + row, mask=row < M, other=1.0)  # (ROWS, 1)
        out_at = out_ptr + row * out_stride_m + at
        tl.store(out_at, (dg * inverse).to(tl.float8e4nv), mask=mask)  # the scale is such that all fit
        tl.store(out_at + F, (du * inverse).to(tl.float8e4nv), mask=mask)
        if V:
            da = _sum(da, h.to(dtype), v_ptr, row, M, v_stride_m, r_v, R, PRECISION)
        if TG:
            dbg = _sum(dbg, dg.to(dtype), tg_ptr, row, M, tg_stride_m, r_g, R, PRECISION)
        if TU:
            dbu = _sum(dbu, du.to(dtype), tu_ptr, row, M, tu_stride_m, r_u, R, PRECISION)
    _store_sums(sums_ptr + part * size, F, col, da, dbg, dbu, r_v, r_g, r_u, V, TG, TU, R)


# ---- launch ----
def _stages(x: Tensor, stages: int) -> int:
    """Steps whose tiles are on their way or at work at once: shared memory has room for so many in 16 bits."""
    return stages if x.element_size() == 2 else 1


@op("lora::gate_scales8")
def _rows_op(
    dh: Tensor, g: Tensor, u: Tensor, bg: Tensor | None, bu: Tensor | None, one: bool, gelu: bool
) -> tuple[Tensor, Tensor]:
    M, F = g.shape
    ROWS, COLS, num_warps, STAGES = BY_ROWS
    blocks, r_g, r_u = -(-M // ROWS), 0 if bg is None else bg.shape[1], 0 if bu is None else bu.shape[1]
    r = r_g if one else r_g + r_u
    steps = -(-F // COLS)
    each = -(-steps // min(steps, -(-PROGRAMS // blocks)))
    shares = -(-steps // each)
    scale = torch.empty(shares, M, 1, dtype=torch.float32, device=g.device)
    low = torch.empty(shares, M, r, dtype=torch.float32, device=g.device)
    with torch.cuda.device_of(g):  # Triton launches on the current device, not on the tensors'
        _rows_kernel[(blocks, shares)](
            dh, g, u, g if bg is None else bg, g if bu is None else bu, scale, low, M, F, each * COLS,
            dh.stride(0), g.stride(0), u.stride(0), *(0 if b is None else b.stride(0) for b in (bg, bu)), r_g, r_u, r,
            GELU=gelu, INTERPRETED=INTERPRETED, G=bg is not None, U=bu is not None, ONE=one,
            R=max(16, triton.next_power_of_2(max(r_g, r_u))), TOP=TOP, TINY=TINY, ROWS=ROWS, COLS=COLS,
            STAGES=_stages(g, STAGES), PRECISION="ieee" if g.dtype == torch.float32 else "tf32", num_warps=num_warps,
        )  # fmt: skip
    return (scale[0], low[0]) if shares == 1 else (scale.amax(0), low.sum(0))


@_rows_op.register_fake
def _(dh, g, u, bg, bu, one, gelu):
    r = sum(b.shape[1] for b in (bg, bu) if b is not None) // (2 if one else 1)
    return g.new_empty((g.shape[0], 1), dtype=torch.float32), g.new_empty((g.shape[0], r), dtype=torch.float32)


def gate_scales(
    dh: Tensor, g: Tensor, u: Tensor, bg: Tensor | None, bu: Tensor | None, gelu: bool, one: bool = False
) -> tuple[Tensor, Tensor]:
    """The scale (M, 1) of each row of [dg | du], and U = [dg b_g | du b_u] (M, r_g + r_u), float32.

    dh, g and u are (M, F) of any row stride; b_g and b_u (F, r), or None: then U lacks its columns.  With `one` they
    are halves of one layer's factor, and U = dg b_g + du b_u.
    """
    bg, bu = (None if b is None else b.detach().to(g.dtype) for b in (bg, bu))
    if use_triton(dh, g, u, *(b for b in (bg, bu) if b is not None)):
        return _rows_op(
            dh, g, u, *(b if b is None or b.stride(1) == 1 else b.contiguous() for b in (bg, bu)), one, gelu
        )
    return _scales_ref(dh, g, u, bg, bu, one, gelu)


@op("lora::gate_round8", mutates=("out", "sums"))
def _cols_op(
    dh: Tensor, g: Tensor, u: Tensor, scale: Tensor, out: Tensor, v: Tensor | None, tg: Tensor | None,
    tu: Tensor | None, sums: Tensor, gelu: bool,
) -> None:  # fmt: skip
    M, F = g.shape
    ROWS, COLS, num_warps, STAGES = BY_COLS
    parts, size = sums.shape
    ranks = [0 if t is None else t.shape[1] for t in (v, tg, tu)]
    R = max(16, triton.next_power_of_2(max(ranks)))
    with torch.cuda.device_of(g):
        _cols_kernel[(-(-F // COLS), parts)](
            dh, g, u, scale, out, *(g if t is None else t for t in (v, tg, tu)), sums, M, F, -(-M // (parts * ROWS)),
            size, dh.stride(0), g.stride(0), u.stride(0), out.stride(0),
            *(0 if t is None else t.stride(0) for t in (v, tg, tu)), *ranks,
            GELU=gelu, INTERPRETED=INTERPRETED, V=v is not None, TG=tg is not None, TU=tu is not None,
            R=R, ROWS=ROWS, COLS=COLS, STAGES=_stages(g, STAGES),
            PRECISION="ieee" if g.dtype == torch.float32 else "tf32", num_warps=num_warps * (1 if R == 16 else 2),
        )  # fmt: skip


def new_sums(pieces: int, F: int, factors: Factors, device: torch.device) -> Tensor:
    """Room for the sums of `pieces` calls of `gate_round`, each over some of the rows: (pieces, programs, size)."""
    size = F * sum(t.shape[1] for t in factors if t is not None)
    return torch.empty(pieces, max(1, PARTS // pieces), size, dtype=torch.float32, device=device)


def gate_round(
    dh: Tensor, g: Tensor, u: Tensor, scale: Tensor, out: Tensor, factors: Factors, sums: Tensor, gelu: bool
) -> None:
    """[dg | du] over the scale (M, 1) into `out` (M, 2F) e4m3, and the sums of these rows into `sums`, a new_sums()[i].

    dh, g and u are (M, F), each of any row stride; the factors of the sums are rounded to the dtype of g.
    """
    there = [t for t in factors if t is not None]
    if use_triton(dh, g, u, scale, sums, *there):
        v, tg, tu = (t if t is None or t.stride(1) == 1 else t.contiguous() for t in factors)
        _cols_op(dh, g, u, scale, out, v, tg, tu, sums, gelu)
    else:
        _round_ref(dh, g, u, scale, out, factors, sums, gelu)


def totals(sums: Tensor, F: int, factors: Factors) -> list[Tensor | None]:
    """vᵀ h (r, F), dgᵀ t_g and duᵀ t_u (F, r) of all calls, float32; None where a factor is None."""
    flat, ranks = sums.sum(dim=(0, 1)), [0 if t is None else t.shape[1] for t in factors]
    da, *dbs = flat.split([r * F for r in ranks])
    made = (da.view(ranks[0], F), *(db.view(F, r) for db, r in zip(dbs, ranks[1:], strict=True)))
    return [None if t is None else m for t, m in zip(factors, made, strict=True)]
