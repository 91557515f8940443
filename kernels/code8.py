"""Block scales in 8 bits: what double quantization does to the float32 scales of code4.py.

    offset = mean(absmax)   z = absmax - offset   absmax2 = max |z| of each 256   q = midpoints below z * (1 / absmax2)
The mean is summed in float64 and rounded once: exact, whatever the order, for the scales of any 16-bit weight but a
freak, and so the same bytes come from every device.  The 256 levels come from lora.quant; `dequantize_scales` of
code4.py is the way back.

Bytes that must move: 4 read and 1 written a scale, and a scale stands for a block of weights: 1.3 MB for 4096 x 4096
in blocks of 64, 0.4 us at 3.0 TB/s, which is less than a launch takes.  So there is one launch, it begins while the
encoder of encode4.py ends, and each program adds up that encoder's sums for itself.

Source: QLoRA, arXiv:2305.14314, section 3.
"""

import torch
from torch import Tensor

from lora.kernels._triton import tl, triton
from lora.kernels.code4 import NESTED, TINY
from lora.kernels.dispatch import launch_early, use_triton
from lora.kernels.op import op

ROWS, WARPS = 8, 8  # blocks of 256 scales and warps of a program: 8 scales a thread


# ---- reference ----
def quantize8_ref(absmax: Tensor, sums: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize8` in torch."""
    b = absmax.numel()
    offset = (sums.sum() / b).float()
    blocks = torch.nn.functional.pad(absmax - offset, (0, -b % NESTED)).view(-1, NESTED)
    absmax2 = blocks.abs().amax(dim=1)  # (blocks,)
    absmax2 = torch.where(absmax2 < TINY, 0.0, absmax2)
    inverse = torch.where(absmax2 > 0, 1.0 / absmax2, 0.0)
    q = torch.bucketize((blocks * inverse[:, None]).reshape(-1)[:b], thresholds, out_int32=True).to(torch.uint8)
    return q, absmax2, offset


# ---- kernel ----
@triton.jit
def _quantize8_kernel(
    absmax_ptr,  # (b,) f32
    sums_ptr,  # (S,) f64
    thresholds_ptr,  # (255,) f32, ascending
    q_ptr,  # (b,) u8
    absmax2_ptr,  # (ceil(b/BLOCK),) f32
    offset_ptr,  # () f32
    b,
    S,
    SUMS: tl.constexpr,  # S up to a power of two
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,  # blocks a program
    EARLY: tl.constexpr,  # launched before its inputs were written
):
    TILE: tl.constexpr = ROWS * BLOCK
    row = tl.program_id(0).to(tl.int64) * ROWS
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # the first three steps of the search, of one to four thresholds, need no look-up a value
    t128 = tl.load(thresholds_ptr + 127)
    t64, t192 = tl.load(thresholds_ptr + 63), tl.load(thresholds_ptr + 191)
    t32, t96 = tl.load(thresholds_ptr + 31), tl.load(thresholds_ptr + 95)
    t160, t224 = tl.load(thresholds_ptr + 159), tl.load(thresholds_ptr + 223)
    i = row * BLOCK + tl.arange(0, TILE)
    absmax = tl.load(absmax_ptr + i, mask=i < b, other=0.0)
    j = tl.arange(0, SUMS)
    total = tl.sum(tl.load(sums_ptr + j, mask=j < S, other=0.0), axis=0)
    offset = (total / b).to(tl.float32)
    if row == 0:
        tl.store(offset_ptr, offset)
    z = tl.where(i < b, absmax - offset, 0.0)
    bits = tl.max(tl.reshape(z.to(tl.int32, bitcast=True) & 0x7FFFFFFF, (ROWS, BLOCK)), axis=1)  # NaN stays
    absmax2 = tl.where(bits < 0x00800000, 0, bits).to(tl.float32, bitcast=True)  # (ROWS,)
    r = row + tl.arange(0, ROWS)
    tl.store(absmax2_ptr + r, absmax2, mask=r * BLOCK < b)
    inverse = tl.where(absmax2 > 0, tl.div_rn(1.0, tl.where(absmax2 > 0, absmax2, 1.0)), 0.0)
    s = z * tl.reshape(tl.broadcast_to(inverse[:, None], (ROWS, BLOCK)), (TILE,))
    # Binary search in 8 steps: the thresholds that s exceeds, of 255
    index = tl.where(s > t128, 128, 0)
    index += tl.where(s > tl.where(index == 0, t64, t192), 64, 0)
    low, high = tl.where(index == 0, t32, t96), tl.where(index == 128, t160, t224)
    index += tl.where(s > tl.where(index < 128, low, high), 32, 0)
    for log in tl.static_range(4, -1, -1):
        index += tl.where(s > tl.load(thresholds_ptr + index + ((1 << log) - 1)), 1 << log, 0)
    tl.store(q_ptr + i, index.to(tl.uint8), mask=i < b)


# ---- launch ----
@op("lora::quantize8")
def _quantize8(absmax: Tensor, sums: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b = absmax.numel()
    q = torch.empty(b, dtype=torch.uint8, device=absmax.device)
    absmax2 = torch.empty(-(-b // NESTED), dtype=torch.float32, device=absmax.device)
    offset = torch.empty((), dtype=torch.float32, device=absmax.device)
    with torch.cuda.device_of(absmax):
        _quantize8_kernel[(-(-absmax2.numel() // ROWS),)](
            absmax,
            sums,
            thresholds,
            q,
            absmax2,
            offset,
            b,
            sums.numel(),
            SUMS=triton.next_power_of_2(sums.numel()),
            BLOCK=NESTED,
            ROWS=ROWS,
            num_warps=WARPS,
            enable_fp_fusion=False,
            **launch_early(True, absmax.device),
        )
    return q, absmax2, offset


@_quantize8.register_fake
def _(absmax: Tensor, sums: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b = absmax.numel()
    return absmax.new_empty(b, dtype=torch.uint8), absmax.new_empty(-(-b // NESTED)), absmax.new_empty(())


def quantize8(absmax: Tensor, sums: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes (b,) uint8, second-level scales (ceil(b/256),) float32 and offset () float32 of absmax (b,).

    `sums` (s,) float64 add up to that of absmax, whose mean is the offset.  z is scaled by the IEEE reciprocal of its
    block's absmax2; the byte is the number of `thresholds` (255,) that it exceeds strictly, so a tie goes down.  A
    block whose absmax2 is 0 (or subnormal) stores 0.
    """
    if absmax.dtype != torch.float32 or absmax.dim() != 1 or thresholds.shape != (255,):
        raise ValueError(
            f"absmax is {absmax.dtype} of shape {tuple(absmax.shape)} with {thresholds.numel()} thresholds; "
            "give a row of float32 scales and 255 thresholds"
        )
    if sums.dtype != torch.float64 or sums.dim() != 1 or not 0 < sums.numel() <= 2**14:
        raise ValueError(f"sums are {sums.dtype} of shape {tuple(sums.shape)}; give a row of 1 to 16384 in float64")
    if not use_triton(absmax, thresholds, sums.view(torch.int64)):  # the one kernel that does take float64
        return quantize8_ref(absmax, sums, thresholds)
    return _quantize8(absmax.contiguous(), sums.contiguous(), thresholds)
