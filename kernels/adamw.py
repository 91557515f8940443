"""AdamW over flat float32 buffers in one pass, with the moments in 32 or in 8 bits.

    g = s g                                                    s: what clipping makes of the gradient, 1 without it
    m = β1 m + (1 - β1) g        v = β2 v + (1 - β2) g²
    w = w (1 - lr λ) - lr (m / (1 - β1^t)) / (sqrt(v / (1 - β2^t)) + eps)

What changes from step to step lies in a tensor `hyper` (3,) float32 on the device, filled from `rates`, so that one
captured CUDA graph serves every step:  lr / (1 - β1^t),  sqrt(1 - β2^t),  1 - lr λ.

Moments in 8 bits, n values in blocks of 256 over the flat buffer, the last of which may be short:
    q (n,) uint8    absmax (ceil(n/256),) float32    value i = levels[q[i]] * absmax[i // 256], one float32 product.
Encoding: s = |x| * (1 / absmax), an IEEE reciprocal and a product; then the nearest level, in exact arithmetic, a tie
to the one nearer to zero.  Two departures from the nearest, so that nothing goes wrong in silence:
    - a positive second moment never becomes 0: a later m / (sqrt(0) + eps) would be a step of thousands of lr;
    - a block that meets NaN or inf stores it as absmax and decodes to NaN, so all its parameters are NaN a step later.
A block whose absmax is 0 (or subnormal) stores absmax 0 and the code of 0.0.

Source: arXiv:1711.05101, algorithm 2, with the numbers of torch.optim.AdamW; 8-bit Optimizers, arXiv:2110.02861,
section 2.  Levels come from lora.quant; this file knows only how they are spaced.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lora.kernels._triton import tl, triton
from lora.kernels.dispatch import use_triton
from lora.kernels.op import op

BLOCK8 = 256  # values that share an absmax
TINY = torch.finfo(torch.float32).tiny  # below it 1/absmax may overflow
_CHUNK = 2**18  # values at a time on a CPU: five buffers of 1 MB stay in cache, where whole ones would not


class Moment8(NamedTuple):
    """One moment in 8 bits."""

    q: Tensor  # (n,) uint8
    absmax: Tensor  # (ceil(n/256),) float32
    table: Tensor  # (2, 256) float32: the levels; above which s each level from 0 up is left, then inf
    zero: int  # the code of 0.0: 127 among signed levels, 0 among those without sign


def rates(
    lr: float, t: int, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.0
) -> tuple[float, float, float]:
    """The three values of `hyper` at step t, from 1: step size, root of the second correction, decay."""
    return lr / (1 - betas[0] ** t), math.sqrt(1 - betas[1] ** t), 1 - lr * weight_decay


def moment8(n: int, code: Tensor) -> Moment8:
    """An all-zero moment of n values in the 256 ascending levels of `code`, signed or not, on the device of `code`.

    Raises ValueError where the levels are not spaced as the dynamic map: the kernel computes a code from its decade.
    """
    levels = code.double().cpu()
    zero = int((levels < 0).sum())
    positive = [
        10.0 ** (i - 7) * (1 + 9 * (torch.arange(count, dtype=torch.float64) + 0.5) / count)
        for i, count in ((i, 2 ** (i if zero else i + 1)) for i in range(7))
    ]
    half = torch.cat((*positive, torch.ones(1, dtype=torch.float64)))
    want = torch.cat((-half[:zero].flip(0), torch.zeros(1, dtype=torch.float64), half))
    if levels.shape != (256,) or levels.shape != want.shape or not torch.allclose(levels, want, rtol=1e-4, atol=0):
        raise ValueError(f"code of shape {tuple(code.shape)} is not the 256 levels of the 8-bit dynamic map, ascending")
    middle = (levels[zero:-1] + levels[zero + 1 :]) / 2  # exact in float64
    thresholds = middle.float()
    # rounded down, so that a float32 exceeds the threshold exactly when it exceeds the true midpoint
    thresholds = torch.where(thresholds > middle, torch.nextafter(thresholds, torch.tensor(0.0)), thresholds)
    if zero == 0:
        thresholds[0] = 0.0  # nothing positive becomes 0
    table = torch.full((2, 256), math.inf)
    table[0], table[1, : thresholds.numel()] = levels.float(), thresholds
    q = torch.full((n,), zero, dtype=torch.uint8, device=code.device)
    return Moment8(q, torch.zeros(-(-n // BLOCK8), device=code.device), table.to(code.device), zero)


# ---- reference ----
def _adamw(w, g, m, v, hyper, betas, eps, scale, out16, zero):
    size, root, decay = hyper.tolist()
    beta1, beta2 = betas
    chunk = _CHUNK if w.device.type == "cpu" else max(1, w.numel())
    buffers = (w, g, m, v, w if out16 is None else out16)
    for w_, g_, m_, v_, out_ in zip(*(buffer.split(chunk) for buffer in buffers), strict=True):
        part = g_ if scale is None else g_ * scale
        m_.lerp_(part, 1 - beta1)
        v_.mul_(beta2).addcmul_(part, part, value=1 - beta2)
        if decay != 1:
            w_.mul_(decay)
        w_.addcdiv_(m_, v_.sqrt().div_(root).add_(eps), value=-size)
        if out16 is not None:
            out_.copy_(w_)
        if zero:
            g_.zero_()


def encode8(x: Tensor, table: Tensor, zero: int) -> tuple[Tensor, Tensor]:
    """Codes (blocks, 256) uint8 and absmax (blocks,) of x (blocks, 256) float32; `zero` is the code of 0.0."""
    absmax = x.abs().amax(dim=1)
    absmax = torch.where(absmax < TINY, 0.0, absmax)
    inverse = torch.where(absmax > 0, 1.0 / absmax, 0.0)[:, None]  # 0 as well where absmax is NaN or inf
    s = torch.where(inverse > 0, x.abs() * inverse, 0.0)
    k = torch.bucketize(s, table[1], out_int32=True)  # levels above zero's: the thresholds that s exceeds strictly
    q = torch.where(x < 0, zero - k.clamp(max=zero), zero + k)
    return q.to(torch.uint8), absmax


def decode8(moment: Moment8) -> Tensor:
    """The values of a moment, (n,) float32."""
    scale = moment.absmax.repeat_interleave(BLOCK8)[: moment.q.numel()]
    return moment.table[0][moment.q.int()].mul_(scale)


def _adamw8(w, g, m, v, hyper, betas, eps, scale, out16, zero):
    """In the order of the kernel's own operations, none of them fused: equal to it bit for bit."""
    size, root, decay = hyper.unbind()
    beta1, beta2 = betas
    n = w.numel()
    for start in range(0, n, _CHUNK):
        stop = min(start + _CHUNK, n)
        part, blocks = slice(start, stop), slice(start // BLOCK8, -(-stop // BLOCK8))
        x = g[part] if scale is None else g[part] * scale
        m_ = decode8(m._replace(q=m.q[part], absmax=m.absmax[blocks]))
        v_ = decode8(v._replace(q=v.q[part], absmax=v.absmax[blocks]))
        step = x - m_
        m_ = m_ + step * (1 - beta1) if 1 - beta1 < 0.5 else x - step * beta1
        v_ = v_ * beta2 + x * x * (1 - beta2)
        deviation = v_.double().sqrt().float()  # MKL's float32 root is off by one unit one time in five
        w[part] = w[part] * decay - (m_ * (size * root)) / (deviation + root * eps)
        for moment, value in ((m, m_), (v, v_)):
            padded = torch.nn.functional.pad(value, (0, -(stop - start) % BLOCK8)).view(-1, BLOCK8)
            q, moment.absmax[blocks] = encode8(padded, moment.table, moment.zero)
            moment.q[part] = q.view(-1)[: stop - start]
        if out16 is not None:
            out16[part] = w[part].to(out16.dtype)
        if zero:
            g[part] = 0.0


# ---- kernel ----
# Bytes a parameter, in 32 bits: g, w, m, v read, w, m, v written, 28; 80 M parameters, 2.24 GB, 0.75 ms at 3.0 TB/s.
# In 8 bits: g 4, w 8, m 2, v 2, and 4 * 2 * 2 / 256 of scales, 16.06; 1.29 GB, 0.43 ms.
# `out16` writes 2 more, `zero` 4.


@triton.jit
def _update(w, g, m, v, hyper_ptr, beta1, rest1, beta2, rest2, eps, NEAR: tl.constexpr, EXACT: tl.constexpr):
    """One step; both corrections of the bias go into two scalars, which spares a division a parameter."""
    size, root, decay = tl.load(hyper_ptr), tl.load(hyper_ptr + 1), tl.load(hyper_ptr + 2)
    step = g - m
    if NEAR:  # from the nearer end, as torch.lerp
        m = m + step * rest1
    else:
        m = g - step * beta1
    v = v * beta2 + g * g * rest2
    if EXACT:
        w = w * decay - tl.div_rn(m * (size * root), tl.sqrt_rn(v) + root * eps)
    else:  # the step, not w, is off by some 3e-7 of itself
        w = w * decay - m * (size * root) / (tl.sqrt(v) + root * eps)
    return w, m, v


@triton.jit
def _adamw_kernel(
    w_ptr,  # (n,) f32, as are g, m, v
    g_ptr,
    m_ptr,
    v_ptr,
    hyper_ptr,  # (3,) f32
    scale_ptr,  # () f32, or None
    out16_ptr,  # (n,) of 16 bits, or None
    n,
    beta1,
    rest1,  # 1 - beta1, rounded once from float64
    beta2,
    rest2,
    eps,
    NEAR: tl.constexpr,  # beta1 > 0.5
    ZERO: tl.constexpr,  # whether to leave g at zero
    BLOCK: tl.constexpr,  # values a program
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    g = tl.load(g_ptr + i, mask=mask, other=0.0)
    if scale_ptr is not None:
        g = g * tl.load(scale_ptr)
    w = tl.load(w_ptr + i, mask=mask, other=0.0)
    m = tl.load(m_ptr + i, mask=mask, other=0.0)
    v = tl.load(v_ptr + i, mask=mask, other=0.0)
    w, m, v = _update(w, g, m, v, hyper_ptr, beta1, rest1, beta2, rest2, eps, NEAR, True)
    tl.store(w_ptr + i, w, mask=mask)
    tl.store(m_ptr + i, m, mask=mask)
    tl.store(v_ptr + i, v, mask=mask)
    if out16_ptr is not None:
        tl.store(out16_ptr + i, w.to(out16_ptr.dtype.element_ty), mask=mask)
    if ZERO:
        tl.store(g_ptr + i, tl.zeros_like(w), mask=mask)


@triton.jit
def _encode(x, table_ptr, ZERO_CODE: tl.constexpr):
    """Codes and absmax of x (256,): a guess by arithmetic, then one look at the threshold above it.

    Levels lie at the middle of 64, 32, .. 1 equal cells of the decades below 1, the top one first (twice as many
    without sign).  So within a decade the place of s, in cells from zero's, is a line, and a decade higher the line
    is five times flatter and goes on where the lower one ended: the place is the least of the seven lines.
    Half a cell below it is the cell of the nearest level or the one under that, since half a cell is far more than
    rounding shifts the place, or than the 0.2 cells by which the threshold between two decades lies inside the upper
    one.  With an exact threshold the code is exact.
    """
    SIGNED: tl.constexpr = ZERO_CODE > 0
    CELLS: tl.constexpr = 64.0 if SIGNED else 128.0  # of the top decade; also how far its first level is from zero's
    SHIFT: tl.constexpr = 0.5 if SIGNED else 1.5  # half a cell; without sign there is one level less below a decade
    # as integers, floats without sign keep their order, and NaN stands above inf: it is not lost as in a maximum
    top = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
    absmax = top.to(tl.float32, bitcast=True)
    absmax = tl.where(absmax < 1.1754943508222875e-38, 0.0, absmax)  # TINY
    inverse = tl.where(absmax > 0.0, tl.div_rn(1.0, tl.where(absmax > 0.0, absmax, 1.0)), 0.0)
    s = tl.where(inverse > 0.0, tl.abs(x) * inverse, 0.0)
    # (10^d s - 0.1) / 0.9 * cells + cells - SHIFT; from 0.28 at s = 0 to 254.5 - ZERO_CODE at s = 1
    place = tl.fma(s, CELLS * 10 / 9, CELLS * 8 / 9 - SHIFT)
    for d in tl.static_range(1, 7):
        cells = CELLS / 2**d
        place = tl.minimum(place, tl.fma(s, 10**d * cells * 10 / 9, cells * 8 / 9 - SHIFT))
    k = place.to(tl.int32)
    k += (s > tl.load(table_ptr + 256 + k)).to(tl.int32)
    q = ZERO_CODE + k
    if SIGNED:
        q = tl.where(x < 0.0, ZERO_CODE - tl.minimum(k, ZERO_CODE), q)  # 1 is a level, -1 is none
    return q.to(tl.uint8), absmax


@triton.jit
def _adamw8_kernel(
    w_ptr,  # (n,) f32, as is g
    g_ptr,
    m_ptr,  # (n,) u8, (ceil(n/256),) f32, (2, 256) f32
    m_absmax_ptr,
    m_table_ptr,
    v_ptr,  # the same three
    v_absmax_ptr,
    v_table_ptr,
    hyper_ptr,  # (3,) f32
    scale_ptr,  # () f32, or None
    out16_ptr,  # (n,) of 16 bits, or None
    n,
    beta1,
    rest1,  # 1 - beta1, rounded once from float64
    beta2,
    rest2,
    eps,
    NEAR: tl.constexpr,  # beta1 > 0.5
    ZERO: tl.constexpr,  # whether to leave g at zero
    EXACT: tl.constexpr,  # root and quotient rounded as IEEE says, or the card's quick ones
    ROWS: tl.constexpr,  # blocks of 256 a program, one after the other
):
    # tensors of one axis only: gathers from a table on two made Triton 3.6 move every buffer through shared memory
    for r in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + r
        i = row * 256 + tl.arange(0, 256)
        mask = i < n
        is_row = row * 256 < n
        g = tl.load(g_ptr + i, mask=mask, other=0.0)
        if scale_ptr is not None:
            g = g * tl.load(scale_ptr)
        w = tl.load(w_ptr + i, mask=mask, other=0.0)
        m_q = tl.load(m_ptr + i, mask=mask, other=127).to(tl.int32)
        v_q = tl.load(v_ptr + i, mask=mask, other=0).to(tl.int32)
        m = tl.load(m_table_ptr + m_q) * tl.load(m_absmax_ptr + row, mask=is_row, other=0.0)
        v = tl.load(v_table_ptr + v_q) * tl.load(v_absmax_ptr + row, mask=is_row, other=0.0)
        w, m, v = _update(w, g, m, v, hyper_ptr, beta1, rest1, beta2, rest2, eps, NEAR, EXACT)
        tl.store(w_ptr + i, w, mask=mask)
        if out16_ptr is not None:
            tl.store(out16_ptr + i, w.to(out16_ptr.dtype.element_ty), mask=mask)
        if ZERO:
            tl.store(g_ptr + i, tl.zeros_like(w), mask=mask)
        # in a short block the values past the end are all 0: decoded from the code of 0.0, with a gradient of 0
        m_q8, m_absmax = _encode(m, m_table_ptr, 127)
        tl.store(m_ptr + i, m_q8, mask=mask)
        tl.store(m_absmax_ptr + row, m_absmax, mask=is_row)
        v_q8, v_absmax = _encode(v, v_table_ptr, 0)
        tl.store(v_ptr + i, v_q8, mask=mask)
        tl.store(v_absmax_ptr + row, v_absmax, mask=is_row)


# ---- launch ----
BLOCK, WARPS = 1024, 4  # 8 values a thread: two 16-byte accesses to each buffer in flight
ROWS8, WARPS8 = 1, 1  # 8 values a thread, a block a warp: absmax is found without leaving the warp
EXACT8 = True  # False saves 20 of 129 instructions a parameter, 20 of 79 registers; w is then not the twin's bits
FUSE = False  # multiplications and additions stay apart, so that a code is the twin's, and not one beside it


@op("lora::adamw", mutates=("w", "g", "m", "v", "out16"))
def _adamw_op(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    hyper: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    scale: Tensor | None,
    out16: Tensor | None,
    zero: bool,
) -> None:
    n = w.numel()
    rest = (beta1, 1 - beta1, beta2, 1 - beta2, eps)
    options = {"NEAR": 1 - beta1 < 0.5, "ZERO": zero, "BLOCK": BLOCK, "num_warps": WARPS, "enable_fp_fusion": FUSE}
    with torch.cuda.device_of(w):
        _adamw_kernel[(-(-n // BLOCK),)](w, g, m, v, hyper, scale, out16, n, *rest, **options)


@op("lora::adamw8", mutates=("w", "g", "m_q", "m_absmax", "v_q", "v_absmax", "out16"))
def _adamw8_op(
    w: Tensor,
    g: Tensor,
    m_q: Tensor,
    m_absmax: Tensor,
    m_table: Tensor,
    v_q: Tensor,
    v_absmax: Tensor,
    v_table: Tensor,
    hyper: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    scale: Tensor | None,
    out16: Tensor | None,
    zero: bool,
) -> None:
    n = w.numel()
    moments = (m_q, m_absmax, m_table, v_q, v_absmax, v_table)
    rest = (beta1, 1 - beta1, beta2, 1 - beta2, eps)
    options = {"NEAR": 1 - beta1 < 0.5, "ZERO": zero, "EXACT": EXACT8, "ROWS": ROWS8}
    options |= {"num_warps": WARPS8, "enable_fp_fusion": FUSE}
    with torch.cuda.device_of(w):
        _adamw8_kernel[(-(-n // (BLOCK8 * ROWS8)),)](w, g, *moments, hyper, scale, out16, n, *rest, **options)


def adamw(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    hyper: Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    scale: Tensor | None = None,
    out16: Tensor | None = None,
    zero: bool = False,
) -> None:
    """One step in place on w, m and v (n,) float32, with gradient g and the three values `hyper` of `rates`.

    `scale` () float32 multiplies g; `out16` (n,) bfloat16 or float16 receives the new w, rounded; `zero` leaves g
    at zero for the next step.  A NaN in g gives NaN in w, m and v there and nowhere else.
    """
    n = w.numel()
    for name, t in (("w", w), ("g", g), ("m", m), ("v", v)):
        _check(name, t, (n,), torch.float32)
    others = _check_rest(n, hyper, scale, out16)
    if not use_triton(w, g, m, v, *others):
        _adamw(w, g, m, v, hyper, betas, eps, scale, out16, zero)
    elif n:
        _adamw_op(w, g, m, v, hyper, *betas, eps, scale, out16, zero)


def adamw8(
    w: Tensor,
    g: Tensor,
    m: Moment8,
    v: Moment8,
    hyper: Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    scale: Tensor | None = None,
    out16: Tensor | None = None,
    zero: bool = False,
) -> None:
    """`adamw` with the moments in 8 bits: m of `moment8` in signed levels, v in levels without sign.

    A NaN in g gives NaN in w there, and in the whole block of 256 from the next step on.
    """
    n = w.numel()
    _check("w", w, (n,), torch.float32)
    _check("g", g, (n,), torch.float32)
    if (m.zero, v.zero) != (127, 0):
        raise ValueError("m needs the signed levels and v those without sign: moment8 of dynamic_map(True), (False)")
    for name, moment in (("m", m), ("v", v)):
        _check(f"{name}.q", moment.q, (n,), torch.uint8)
        _check(f"{name}.absmax", moment.absmax, (-(-n // BLOCK8),), torch.float32)
        _check(f"{name}.table", moment.table, (2, 256), torch.float32)
    others = _check_rest(n, hyper, scale, out16)
    if not use_triton(w, g, *m[:3], *v[:3], *others):
        _adamw8(w, g, m, v, hyper, betas, eps, scale, out16, zero)
    elif n:
        _adamw8_op(w, g, *m[:3], *v[:3], hyper, *betas, eps, scale, out16, zero)


def _check_rest(n: int, hyper: Tensor, scale: Tensor | None, out16: Tensor | None) -> list[Tensor]:
    _check("hyper", hyper, (3,), torch.float32)
    if scale is not None:
        _check("scale", scale, (), torch.float32)
    if out16 is not None:
        _check("out16", out16, (n,), torch.float16 if out16.dtype == torch.float16 else torch.bfloat16)
    return [t for t in (hyper, scale, out16) if t is not None]


def _check(name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if t.shape != shape or t.dtype != dtype or not t.is_contiguous():
        layout = "" if t.is_contiguous() else ", not contiguous"
        raise ValueError(f"{name} is {tuple(t.shape)} {t.dtype}{layout}; it must be {shape} {dtype}, contiguous")
