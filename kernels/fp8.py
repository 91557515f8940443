"""Eight-bit floats (e4m3: sign, 4 bits of exponent, 3 of fraction) for the products of a frozen base.

    x ≈ x8 * scale     one scale a row of activations or gradients, its largest magnitude over TOP
    W ≈ w8 * scale     one scale a weight
    y = (x8 w8ᵀ) scale_x scale_w, summed in float32 by the tensor cores at twice the speed of bfloat16
A value keeps 4 significant bits wherever it lies between 2**-6 and 448, so a scale need not be tight: it leaves room
above for columns that ride along (fold8.py).  A factor of LoRA must not lose bits: it goes as two such numbers,
    v ≈ hi + lo,  hi = e4m3(v), lo = e4m3(v - hi)           8 significant bits, as bfloat16 has
and v wᵀ as hi hi + hi lo + lo hi, three sets of columns.  Columns that ride along with a row share its scale.  Where
they do not fit, the row makes room: its values over 2**j, its scale times that (factors of a random 8B model came there
within 24 steps: LOG.md, 2026-11-27).  What does not fit with j = 8 either becomes NaN, and the loss with it.

Source: arXiv:2209.05433 (the format); row scales as in arXiv:2409.12517.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora.kernels._triton import tl, triton
from lora.kernels.dispatch import INTERPRETED, use_triton
from lora.kernels.gate import _forward_ref as gate_ref
from lora.kernels.gate import _unit
from lora.kernels.norm import _forward_ref as norm_ref
from lora.kernels.op import op

F8 = torch.float8_e4m3fn
LARGEST = 448.0
TOP = 112.0  # the largest magnitude of a row becomes this
TOP_FACTOR = 112.0
TINY = 1e-20  # a row of zeros has scale TINY / TOP, not 0: something is divided by it

SETS = {"hhl": (0, 0, 1), "hlh": (0, 1, 0), "hl": (0, 1)}  # 0 hi, 1 lo
LESS = 8  # a row becomes 2**-LESS of itself at most: its largest value keeps its bits


# ---- reference ----
def to_f8(v: Tensor) -> Tensor:
    """float32 values rounded to the nearest e4m3, ties to even; NaN where they do not fit."""
    return torch.where(v.abs() > LARGEST, torch.nan, v).to(F8)


def _rows_ref(x: Tensor, out: Tensor, scale: Tensor) -> None:
    x = x.float()
    amax = x.abs().amax(dim=1, keepdim=True).clamp(min=TINY)
    scale.copy_(amax / TOP)
    out.copy_(to_f8(x * (TOP / amax)))


def _parts_ref(out: Tensor, v: Tensor, sets: str) -> None:
    width = out.shape[1] // len(sets)
    out.copy_(torch.zeros(out.shape, device=out.device).to(F8))
    hi = to_f8(v)
    both = (hi, to_f8(v - hi.float()))
    for i, which in enumerate(SETS[sets]):
        out[:, i * width : i * width + v.shape[1]] = both[which]


def _ride_ref(x: Tensor, K: int, scale: Tensor, src: Tensor, amax: Tensor, k: float) -> None:
    v = src.float() * ((k * amax) / scale)
    top = v.abs().amax(dim=1, keepdim=True)
    less = torch.where(top > LARGEST, torch.frexp(top).exponent - 8, 0).clamp(0, LESS).float()  # to 256 at most
    x[:, :K] = to_f8(x[:, :K].float() * torch.exp2(-less))
    scale.mul_(torch.exp2(less))
    _parts_ref(x[:, K:], v * torch.exp2(-less), "hhl")


# ---- kernel ----
@triton.jit
def _f8(v):
    return tl.where(tl.abs(v) > 448.0, float("nan"), v).to(tl.float8e4nv)


@triton.jit
def _rows_kernel(
    x_ptr,  # (M, N)
    out_ptr,  # (M, N) e4m3
    scale_ptr,  # (M,) f32
    N,
    x_stride_m,
    out_stride_m,
    TOP: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_stride_m + col, mask=col < N, other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(x), axis=0), TINY)
    tl.store(scale_ptr + row, amax / TOP)
    tl.store(out_ptr + row * out_stride_m + col, _f8(x * (TOP / amax)), mask=col < N)


@triton.jit
def _norm_kernel(
    x_ptr,  # (M, D)
    residual_ptr,  # (M, D), read only with ADD
    w_ptr,  # (D,)
    out_ptr,  # (M, D) e4m3
    scale_ptr,  # (M,) f32
    sum_ptr,  # (M, D) contiguous, written only with ADD
    r_ptr,  # (M,) f32
    x_stride_m,
    residual_stride_m,
    out_stride_m,
    eps,
    D: tl.constexpr,
    ADD: tl.constexpr,
    TOP: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_D)
    mask = col < D
    x = tl.load(x_ptr + row * x_stride_m + col, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        residual = tl.load(residual_ptr + row * residual_stride_m + col, mask=mask, other=0.0).to(tl.float32)
        rounded = (x + residual).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * D + col, rounded, mask=mask)
        x = rounded.to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    tl.store(r_ptr + row, r)
    w = tl.load(w_ptr + col, mask=mask, other=0.0).to(tl.float32)
    y = x * r * w
    amax = tl.maximum(tl.max(tl.abs(y), axis=0), TINY)
    tl.store(scale_ptr + row, amax / TOP)
    tl.store(out_ptr + row * out_stride_m + col, _f8(y * (TOP / amax)), mask=mask)


@triton.jit
def _gate_kernel(
    g_ptr,  # (M, F), as u
    u_ptr,
    out_ptr,  # (M, F) e4m3
    scale_ptr,  # (M,) f32
    F,
    g_stride_m,
    u_stride_m,
    out_stride_m,
    GELU: tl.constexpr,
    INTERPRETED: tl.constexpr,
    TOP: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    mask = col < F
    g = tl.load(g_ptr + row * g_stride_m + col, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + row * u_stride_m + col, mask=mask, other=0.0).to(tl.float32)
    act, _ = _unit(g, GELU, INTERPRETED)
    h = act * u
    amax = tl.maximum(tl.max(tl.abs(h), axis=0), TINY)
    tl.store(scale_ptr + row, amax / TOP)
    tl.store(out_ptr + row * out_stride_m + col, _f8(h * (TOP / amax)), mask=mask)


@triton.jit
def _part(ptr, line, j, row, n, at, r, stride_n, stride_r, times):
    """Values of a factor (n, r) at lines from `row` and columns from `at` on, 0 elsewhere."""
    there = (line >= row) & (line < row + n) & (j >= at) & (j < at + r)
    at_it = ptr + (line - row) * stride_n + (j - at) * stride_r
    return tl.load(at_it, mask=there, other=0.0).to(tl.float32) * times


@triton.jit
def _split_kernel(
    out_ptr,  # (n, columns) e4m3
    src_ptr,  # (n_0, r_0), any float, as the next two, which are read only with so many PARTS
    src1_ptr,
    src2_ptr,
    amax_ptr,  # () f32
    x_ptr,  # (n, K) e4m3, the columns before out's; this and the next only with RIDE
    rows_ptr,  # (n,) f32, their scales
    total_ptr,  # (n, r_0), written only with TOTAL: the parts added up and rounded, which is what rides
    n,
    K,
    columns,
    width,
    out_stride_n,
    out_stride_c,
    row0,  # of out, where the source's first one goes
    n0,
    at0,  # of each set of columns, where the source's first one goes
    r0,
    stride0_n,
    stride0_r,
    times0,
    row1,
    n1,
    at1,
    r1,
    stride1_n,
    stride1_r,
    times1,
    row2,
    n2,
    at2,
    r2,
    stride2_n,
    stride2_r,
    times2,
    k,
    PARTS: tl.constexpr,
    TOTAL: tl.constexpr,
    RIDE: tl.constexpr,  # the value is src * k * amax / rows, else src * k / amax
    LESS: tl.constexpr,
    LO: tl.constexpr,  # bit i: set i of the columns is lo
    COUNT: tl.constexpr,  # sets
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    which = col // width
    j = tl.where(which < COUNT, col - which * width, -1)
    v = _part(src_ptr, line, j, row0, n0, at0, r0, stride0_n, stride0_r, times0)
    if PARTS > 1:
        v += _part(src1_ptr, line, j, row1, n1, at1, r1, stride1_n, stride1_r, times1)
    if PARTS > 2:
        v += _part(src2_ptr, line, j, row2, n2, at2, r2, stride2_n, stride2_r, times2)
    if TOTAL:
        v = v.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + line * r0 + j, v, mask=(line < n) & (which == 0) & (j < r0))
        v = v.to(tl.float32)
    amax = tl.load(amax_ptr)
    if RIDE:
        scale = tl.load(rows_ptr + line, mask=line < n, other=1.0)
        v = v * ((k * amax) / scale)
        top = tl.max(tl.abs(v), axis=1)[:, None]  # (LINES, 1)
        # powers of two by their bits: 2**-less brings what does not fit to 256 at most
        less = tl.where(top > 448.0, tl.minimum((top.to(tl.int32, bitcast=True) >> 23) - 134, LESS), 0)
        down = ((127 - less) << 23).to(tl.float32, bitcast=True)
        v = v * down
        if tl.max(tl.max(less, axis=1), axis=0) > 0:
            here = (line < n) & (less > 0)
            tl.store(rows_ptr + line, scale * ((127 + less) << 23).to(tl.float32, bitcast=True), mask=here)
            for start in range(0, K, BLOCK):
                x_at = x_ptr + line * out_stride_n + start + col
                mask = here & (start + col < K)
                x = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
                tl.store(x_at, (x * down).to(tl.float8e4nv), mask=mask)
    else:
        v = v * (k / amax)
    hi = _f8(v)
    lo = _f8(v - hi.to(tl.float32))
    value = tl.where(((LO >> which) & 1) == 1, lo.to(tl.float32), hi.to(tl.float32)).to(tl.float8e4nv)
    tl.store(out_ptr + line * out_stride_n + col * out_stride_c, value, mask=(line < n) & (col < columns))


# ---- launch ----
def _warps(block: int) -> int:
    """Of a program that holds a row: 32 values a thread, 16 bytes at a time."""
    return max(1, min(32, block // 1024))


@op("lora::rows8", mutates=("out", "scale"))
def _rows_op(x: Tensor, out: Tensor, scale: Tensor) -> None:
    M, N = x.shape
    BLOCK = triton.next_power_of_2(N)
    with torch.cuda.device_of(x):  # Triton launches on the current device, not on the tensors'
        _rows_kernel[(M,)](
            x, out, scale, N, x.stride(0), out.stride(0), TOP=TOP, TINY=TINY, BLOCK=BLOCK, num_warps=_warps(BLOCK)
        )


def rows8(x: Tensor, out: Tensor) -> Tensor:
    """x (M, N) of any row stride into `out` (M, N) e4m3; its scales (M, 1) float32."""
    scale = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    x = x if x.stride(1) == 1 else x.contiguous()
    if use_triton(x, scale):
        _rows_op(x, out, scale)
    else:
        _rows_ref(x, out, scale)
    return scale


@op("lora::norm8", mutates=("out", "scale"))
def _norm_op(
    x: Tensor, residual: Tensor | None, w: Tensor, eps: float, out: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    M, D = x.shape
    s = torch.empty(x.shape if residual is not None else (0,), dtype=x.dtype, device=x.device)
    r = torch.empty(M, 1, dtype=torch.float32, device=x.device)
    added = x if residual is None else residual
    BLOCK_D = triton.next_power_of_2(D)
    with torch.cuda.device_of(x):
        _norm_kernel[(M,)](
            x, added, w, out, scale, s, r, x.stride(0), added.stride(0), out.stride(0), eps, D=D,
            ADD=residual is not None, TOP=TOP, TINY=TINY, BLOCK_D=BLOCK_D, num_warps=_warps(BLOCK_D),
        )  # fmt: skip
    return s, r


@_norm_op.register_fake
def _(x: Tensor, residual: Tensor | None, w: Tensor, eps: float, out: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    s = x.new_empty(x.shape if residual is not None else (0,))
    return s, x.new_empty((x.shape[0], 1), dtype=torch.float32)


def norm8(x: Tensor, residual: Tensor | None, w: Tensor, eps: float, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of x (or x + residual), (M, D), into `out` (M, D) e4m3; its scales (M, 1), what was normalised, and r."""
    scale = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    if use_triton(x, w, scale, *(() if residual is None else (residual,))):
        s, r = _norm_op(x, residual, w, eps, out, scale)
        return scale, x if residual is None else s, r
    s = x if residual is None else x + residual
    y, r = norm_ref(s.float(), w.float(), eps)
    _rows_ref(y, out, scale)
    return scale, s, r


@op("lora::gate8", mutates=("out", "scale"))
def _gate_op(g: Tensor, u: Tensor, gelu: bool, out: Tensor, scale: Tensor) -> None:
    M, F = g.shape
    BLOCK = triton.next_power_of_2(F)
    with torch.cuda.device_of(g):
        _gate_kernel[(M,)](
            g, u, out, scale, F, g.stride(0), u.stride(0), out.stride(0), GELU=gelu,
            INTERPRETED=INTERPRETED, TOP=TOP, TINY=TINY, BLOCK=BLOCK, num_warps=_warps(BLOCK),
        )  # fmt: skip


def gate8(g: Tensor, u: Tensor, gelu: bool, out: Tensor) -> Tensor:
    """act(g) * u (gate.py), (M, F), into `out` (M, F) e4m3; its scales (M, 1)."""
    scale = torch.empty(g.shape[0], 1, dtype=torch.float32, device=g.device)
    if use_triton(g, u, scale):
        _gate_op(g, u, gelu, out, scale)
    else:
        _rows_ref(gate_ref(g.float(), u.float(), gelu, torch.empty(g.shape, device=g.device)), out, scale)
    return scale


class Part(NamedTuple):
    """A factor (n, r), any float, and where it goes."""

    src: Tensor
    row: int = 0  # its first line's
    at: int = 0  # its first column's, in each set
    times: float = 1.0


def _split(
    out: Tensor, parts: list[Part], sets: str, amax: Tensor, k: float, x: Tensor | None = None,
    rows: Tensor | None = None, total: Tensor | None = None,
) -> None:  # fmt: skip
    n, columns = out.shape
    K = 0 if x is None else x.shape[1]
    BLOCK = triton.next_power_of_2(columns)
    LINES = max(1, 2048 // BLOCK)
    three = (parts * 3)[:3]
    where = [v for p in three for v in (p.row, p.src.shape[0], p.at, p.src.shape[1], *p.src.stride(), p.times)]
    others = (out if x is None else x, amax if rows is None else rows, out if total is None else total)
    with torch.cuda.device_of(out):
        _split_kernel[(-(-n // LINES),)](
            out, *(p.src for p in three), amax, *others, n, K, columns,
            columns // len(sets), *out.stride(), *where, k, PARTS=len(parts), TOTAL=total is not None,
            RIDE=x is not None, LESS=LESS, LO=sum(lo << i for i, lo in enumerate(SETS[sets])), COUNT=len(sets),
            LINES=LINES, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


@op("lora::split8", mutates=("out",))
def _split_op(
    out: Tensor, srcs: list[Tensor], rows: list[int], ats: list[int], times: list[float], sets: str, amax: Tensor
) -> None:
    parts = [Part(*part) for part in zip(srcs, rows, ats, times, strict=True)]
    _split(out, parts, sets, amax, TOP_FACTOR)


def split8(out: Tensor, parts: Sequence[Part], sets: str, amax: Tensor) -> None:
    """Writes all of `out` (n, columns) e4m3: v of each of one to three parts, in each of the `sets`, 0 elsewhere.

    `sets` is a key of SETS; each is a width of as many columns as the parts have together, or more: columns over sets,
    rounded down.  v = times src TOP_FACTOR / amax, so times src is at most amax, ().
    """
    if not 1 <= len(parts) <= 3:
        raise ValueError(f"{len(parts)} factors: one to three share the columns of a product")
    srcs, rows, ats, times = (list(values) for values in zip(*parts, strict=True))
    if use_triton(amax, *srcs):
        _split_op(out, srcs, rows, ats, times, sets, amax)
    else:
        v = torch.zeros(out.shape[0], out.shape[1] // len(sets), device=out.device)
        for src, row, at, s in parts:
            v[row : row + src.shape[0], at : at + src.shape[1]] = src.float() * s
        _parts_ref(out, v * (TOP_FACTOR / amax), sets)


@op("lora::ride8", mutates=("x", "scale", "total"))
def _ride_op(
    x: Tensor, K: int, scale: Tensor, srcs: list[Tensor], amax: Tensor, k: float, total: Tensor | None
) -> None:
    _split(x[:, K:], [Part(src) for src in srcs], "hhl", amax, k, x[:, :K], scale, total)


def ride8(
    x: Tensor, K: int, scale: Tensor, srcs: list[Tensor], amax: Tensor, k: float, total: Tensor | None = None
) -> None:
    """Writes all columns of x (n, ..) e4m3 from K on: hi, hi and lo of v = src k amax / scale, src (n, r), then 0.

    src is the one in `srcs`, or the sum of two, rounded to `total` (n, r) and written there.
    Rows of x, with the scales (n, 1), whose v does not fit are made smaller and their scales larger, by a power of two.
    """
    if (len(srcs), total is None) not in ((1, True), (2, False)):
        raise ValueError(
            f"{len(srcs)} columns to ride, total {'not ' * (total is None)}given: one without, or two with"
        )
    if use_triton(amax, scale, *srcs, *(() if total is None else (total,))):
        _ride_op(x, K, scale, srcs, amax, k, total)
    else:
        src = srcs[0] if total is None else total.copy_(srcs[0].float() + srcs[1].float())
        _ride_ref(x, K, scale, src, amax, k)


def product8(
    x8: Tensor,
    x_scale: Tensor,
    w8: Tensor,
    w_scale: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x8 (M, K) w8ᵀ (K, N) by their scales (M, 1) and (1, N), plus a bias (N,): (M, N) of `dtype`, `out` if given."""
    if x8.is_cuda:
        fast: dict[str, Any] = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        straight = out if out is not None and out.dtype == torch.bfloat16 else None
        y = torch._scaled_mm(x8, w8.t(), x_scale, w_scale, bias=bias, **fast, out=straight)
    else:
        straight, y = None, (x8.float() @ w8.float().T) * x_scale * w_scale
        y = y if bias is None else y + bias.float()
    if out is None:
        return y.to(dtype)
    return out if straight is not None else out.copy_(y)


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why products in 8 bits cannot run with states of `dtype` on `device`; None where they can."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return f"{torch.cuda.get_device_name(device)} multiplies no 8-bit floats at speed: Hopper and newer do"
    if device.type == "cuda" and dtype != torch.bfloat16:
        return f"the model is in {str(dtype).removeprefix('torch.')}; its states must be in bfloat16"
    return None
