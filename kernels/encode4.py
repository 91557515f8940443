"""Floats to the 4-bit codes and block scales of code4.py, by the nearest of 16 levels.

Per value: s = float32(w) * (1 / absmax), an IEEE reciprocal and a product; the code is the number of thresholds that s
exceeds strictly, so a tie goes to the lower level.  Thresholds are the float32 midpoints of the sorted levels.  A block
whose absmax is 0 (or subnormal) stores absmax 0 and the code of 0.0.

The kernel is as fast as its look-up: 16 steps of comparison would be too many instructions, so [-1, 1] is cut into
cells of which none holds two thresholds, and a value costs one look-up of its cell and one comparison.  A cell of 32
bits, in shared memory, encodes 1.4e12 values a second on an H200; one of 64 bits 1.2e12 (LOG.md, 2026-11-27).

Bytes that must move a value, block 64, bfloat16: 2 read, 0.5 + 1/16 written.  4096 x 4096 is 43 MB: 14 us at 3.0 TB/s.
Source: QLoRA, arXiv:2305.14314, section 3; numbers equal bitsandbytes' bit for bit where its backends agree.
"""

import torch
from torch import Tensor

from lora.kernels._triton import tl, triton
from lora.kernels.code4 import TINY, check_block4
from lora.kernels.dispatch import launch_early, use_triton
from lora.kernels.op import op

# What a program takes at a time (or one block), and a thread of it: 32 values of 16 bits are four loads of 16 bytes
VALUES, VALUES_THREAD = 2048, 32
# Programs, at most, each of which leaves one sum of its block scales.  One number for every GPU: what is added to what
# does not depend on the card.
PROGRAMS = 4096
FIXED = 28  # bits behind the point of the fixed-point numbers that cells of 32 bits compare


# ---- reference ----
def quantize4_ref(w: Tensor, code: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """`quantize4` in torch, for any floating dtype."""
    flat, n = w.detach().reshape(-1), w.numel()
    thresholds, order = decisions(code)
    to_code = order.to(torch.uint8)
    q = torch.empty((n + 1) // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-n // block), dtype=torch.float32, device=w.device)
    chunk = block * max(1, 2**20 // block)  # values at a time: bounds the float32 and index copies to some 15 MB
    for start in range(0, n, chunk):
        part = flat[start : start + chunk].float()
        short = -part.numel() % block
        if short:
            part = torch.nn.functional.pad(part, (0, short))
        part = part.view(-1, block)
        scale = part.abs().amax(dim=1)  # (blocks,)
        scale = torch.where(scale < TINY, 0.0, scale)
        inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
        s = (part * inverse[:, None]).reshape(-1)
        index = to_code[torch.bucketize(s, thresholds, out_int32=True)]
        q[start // 2 : (start + chunk) // 2] = ((index[::2] << 4) | index[1::2])[: q.numel() - start // 2]
        absmax[start // block : (start + chunk) // block] = scale
    return q, absmax


# ---- tables made from a code ----
def decisions(code: Tensor) -> tuple[Tensor, Tensor]:
    """The float32 midpoints (15,) of the sorted levels of `code` (16,), and the code (16,) of each sorted level."""
    levels, order = torch.sort(code, stable=True)
    return (levels[:-1] + levels[1:]) / 2, order


def decision_cells(code: Tensor) -> Tensor:
    """What the kernel looks a scaled value s up in, on the device of `code`: an int32 a cell, or an int64.

    int32 (NF4), cells 1/16 wide: s is compared as the integer f = s * 2**28, cut off, of which the bits above the
    lowest 24 name the cell.  A cell holds, from the low end: the code below its threshold (4 bits), the code above (4
    bits), the low 24 bits of the threshold.  Exact where every threshold is at least 2**-5: then near a threshold s is
    a multiple of 2**-28 as the threshold is, and away from it cutting off changes no order.

    int64 (FP4, whose thresholds lie nearer to zero), cells down to 1/4096 wide: the threshold as float32 (inf where
    there is none), the code below it, the code above it.  The cell of s is the low bits of the float32 sum s + 1.5 *
    2**23 * width, which rounds s to a multiple of the width, by the same sum here and in the kernel.
    """
    thresholds, order = decisions(code.cpu())
    if thresholds.abs().min() >= 2.0**-5 and thresholds.abs().max() < 1:
        fixed = (thresholds.double() * 2**FIXED).long()
        place = fixed >> FIXED - 4
        if place.unique().numel() == place.numel():
            j = torch.arange(-32, 32)  # more than [-1, 1]: a power of two of cells
            return _cells(j, place, fixed & 0xFFFFFF, 0xFFFFFF, order, 0).to(code.device)
    for log in range(4, 13):
        magic = torch.tensor(1.5 * 2.0 ** (23 - log))
        place = (thresholds + magic).view(torch.int32) - magic.view(torch.int32)  # (15,) multiples of the width
        if place.unique().numel() == place.numel():
            break
    else:
        raise ValueError(f"two thresholds of the code {code.tolist()} are less than 1/4096 apart")
    j = torch.arange(-(2 << log), 2 << log)
    bits = thresholds.view(torch.int32).long() & 0xFFFFFFFF
    return _cells(j, place, bits, 0x7F800000, order, 32).to(code.device)


def _cells(j: Tensor, place: Tensor, threshold: Tensor, none: int, order: Tensor, shift: int) -> Tensor:
    """The words of cells j, of which `place` (15,) hold a threshold; the codes stand `shift` bits up, or below it."""
    below = torch.searchsorted(place, j)  # thresholds in the cells before j
    has = torch.isin(j, place)
    level = torch.where(has, threshold[below.clamp(max=14)], none)
    codes = order[below] | order[(below + has.long()).clamp(max=15)] << 4
    words = codes << shift | level if shift else level << 8 | codes
    cells = torch.empty_like(words)
    cells[j & (j.numel() - 1)] = words
    return cells if shift else torch.where(cells < 2**31, cells, cells - 2**32).to(torch.int32)


# ---- kernel ----
@triton.jit
def _code_of(
    s,  # f32, -1 to 1, or NaN
    table,  # (CELLS,) i32, or nothing
    cells_ptr,
    CELLS: tl.constexpr,
    MAGIC: tl.constexpr,
    SCALE: tl.constexpr,
):
    """The codes of scaled values, in the lowest 4 bits of an int32; any s has a cell."""
    if cells_ptr.dtype.element_ty == tl.int32:
        f = (s * SCALE).to(tl.int32)
        cell = tl.gather(table, (f >> 24) & (CELLS - 1), 0)
        # the lowest 8 bits of f << 8 are zero: codes below the threshold do not disturb the comparison
        above = (f << 8).to(tl.uint32, bitcast=True) > cell.to(tl.uint32, bitcast=True)
        codes = cell
    else:
        cell = tl.load(cells_ptr + ((s + MAGIC).to(tl.int32, bitcast=True) & (CELLS - 1)))
        above = s > cell.to(tl.int32).to(tl.float32, bitcast=True)
        codes = (cell >> 32).to(tl.int32)
    return tl.where(above, codes >> 4, codes)


@triton.jit
def _quantize_kernel(
    w_ptr,  # (n,) f32, bf16 or f16; with WORDS (P,) i32 of two bf16 each
    cells_ptr,  # (CELLS,) of decision_cells
    q_ptr,  # (P,) u8
    absmax_ptr,  # (B,) f32
    sums_ptr,  # (programs,) f64
    n,
    P,
    B,
    steps,  # tiles of ROWS blocks a program
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CELLS: tl.constexpr,
    MAGIC: tl.constexpr,
    SCALE: tl.constexpr,
    WORDS: tl.constexpr,
    EARLY: tl.constexpr,  # launched before the launch in front of it ended, and lets the next one in
):
    # Flat tiles: in two dimensions Triton lays a look-up out another way than the loads, and moves every value
    HALF: tl.constexpr = ROWS * BLOCK // 2
    EACH: tl.constexpr = BLOCK // 2 if WORDS else BLOCK  # loads a block
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    table = 0
    if cells_ptr.dtype.element_ty == tl.int32:
        table = tl.load(cells_ptr + tl.arange(0, CELLS))  # no launch that may still run writes it
    if EARLY:
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros((ROWS,), tl.float64)
    row = tl.program_id(0).to(tl.int64) * ROWS
    hop = tl.num_programs(0).to(tl.int64) * ROWS
    limit = P if WORDS else n
    lane = tl.arange(0, ROWS * EACH)
    coming = tl.load(w_ptr + row * EACH + lane, mask=row * EACH + lane < limit, other=0)
    for _ in range(steps):
        x = coming
        ahead = (row + hop) * EACH + lane  # on its way while x is at work
        coming = tl.load(w_ptr + ahead, mask=ahead < limit, other=0)
        if WORDS:  # a pair of bfloat16 becomes float32 by a shift and a mask, and stays in its thread
            first = (x << 16).to(tl.float32, bitcast=True)
            second = (x & -65536).to(tl.float32, bitcast=True)
        else:
            first, second = tl.split(tl.reshape(x.to(tl.float32), (HALF, 2)))
        # Magnitudes order as integers do, and there NaN stands above inf: a maximum of floats would drop it
        a, b = first.to(tl.int32, bitcast=True) & 0x7FFFFFFF, second.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        bits = tl.max(tl.reshape(tl.maximum(a, b), (ROWS, BLOCK // 2)), axis=1)  # (ROWS,)
        absmax = tl.where(bits < 0x00800000, 0, bits).to(tl.float32, bitcast=True)  # subnormal: 0
        inverse = tl.where(absmax > 0, tl.div_rn(1.0, tl.where(absmax > 0, absmax, 1.0)), 0.0)
        r = row + tl.arange(0, ROWS)
        tl.store(absmax_ptr + r, absmax, mask=r < B)
        sums += absmax.to(tl.float64)
        scale = tl.reshape(tl.broadcast_to(inverse[:, None], (ROWS, BLOCK // 2)), (HALF,))
        high = _code_of(first * scale, table, cells_ptr, CELLS, MAGIC, SCALE)
        low = _code_of(second * scale, table, cells_ptr, CELLS, MAGIC, SCALE)
        p = row * (BLOCK // 2) + tl.arange(0, HALF)
        tl.store(q_ptr + p, ((high << 4) | (low & 15)).to(tl.uint8), mask=p < P)
        row += hop
    tl.store(sums_ptr + tl.program_id(0), tl.sum(sums, axis=0))


# ---- launch ----
def tiling(n: int, block: int) -> tuple[int, int]:
    """Blocks that a program takes at a time, and programs, for n values."""
    rows = max(1, VALUES // block)
    return rows, min(PROGRAMS, -(-n // (block * rows)))


@op("lora::quantize4")
def _quantize4(w: Tensor, cells: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    n = w.numel()
    rows, programs = tiling(n, block)
    q = torch.empty((n + 1) // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-n // block), dtype=torch.float32, device=w.device)
    sums = torch.empty(programs, dtype=torch.float64, device=w.device)
    words = w.dtype == torch.bfloat16 and n % 2 == 0 and w.data_ptr() % 4 == 0
    if n:
        with torch.cuda.device_of(w):  # Triton launches on the current device, not on the tensors'
            _quantize_kernel[(programs,)](
                w.view(-1).view(torch.int32) if words else w,
                cells,
                q,
                absmax,
                sums,
                n,
                q.numel(),
                absmax.numel(),
                -(-absmax.numel() // (rows * programs)),
                BLOCK=block,
                ROWS=rows,
                CELLS=cells.numel(),
                MAGIC=1.5 * 2**25 / cells.numel(),
                SCALE=2.0**FIXED,
                WORDS=words,
                num_warps=rows * block // (32 * VALUES_THREAD),
                enable_fp_fusion=False,
                **launch_early(True, w.device),
            )
    return q, absmax, sums


@_quantize4.register_fake
def _(w: Tensor, cells: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    n = w.numel()
    sums = w.new_empty(tiling(n, block)[1], dtype=torch.float64)
    return w.new_empty((n + 1) // 2, dtype=torch.uint8), w.new_empty(-(-n // block), dtype=torch.float32), sums


def quantize4(w: Tensor, code: Tensor, block: int, cells: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes (ceil(n/2),) uint8 and block scales (ceil(n/block),) float32 of `w`, any shape and floating dtype, and sums
    of the scales.

    An odd count is padded with the code of 0.0.  A block that holds NaN has absmax NaN.  The sums, at most PROGRAMS
    of them in float64, add up to that of all scales: their mean is what `quantize8` takes off, and they are finite
    exactly where every value of `w` is.

    `cells` is `decision_cells(code)`; making it anew waits for the GPU.
    """
    check_block4(block)
    if not w.is_floating_point():
        raise TypeError(f"a weight of {w.dtype} cannot be quantized; give float32, bfloat16 or float16")
    if not use_triton(w, code, *(() if cells is None else (cells,))):
        q, absmax = quantize4_ref(w, code, block)
        return q, absmax, absmax.sum(dtype=torch.float64)[None]
    if cells is None:
        cells = decision_cells(code)
    return _quantize4(w.detach().contiguous(), cells, block)
