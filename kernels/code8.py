"""Block scales in 8 bits: what double quantization does to the float32 scales of code4.py.

    z = absmax - offset      absmax2 = max |z| of each 256      q = number of midpoints below z * (1 / absmax2)
The 256 levels and the offset come from lora.quant; `dequantize_scales` of code4.py is the way back.

Bytes that must move: 4 read and 1 written a scale, and a scale stands for a block of weights: 1.3 MB for 4096 x 4096
in blocks of 64, 0.4 us at 3.0 TB/s, which is less than a launch takes.

Source: QLoRA, arXiv:2305.14314, section 3.
"""

import torch
from torch import Tensor

from lora.kernels._triton import tl, triton
from lora.kernels.code4 import NESTED, TINY
from lora.kernels.dispatch import use_triton


# ---- reference ----
def quantize8_ref(absmax: Tensor, offset: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize8` in torch."""
    z = absmax - offset
    b = z.numel()
    blocks = torch.nn.functional.pad(z, (0, -b % NESTED)).view(-1, NESTED)
    absmax2 = blocks.abs().amax(dim=1)  # (blocks,)
    absmax2 = torch.where(absmax2 < TINY, 0.0, absmax2)
    inverse = torch.where(absmax2 > 0, 1.0 / absmax2, 0.0)
    q = torch.bucketize((blocks * inverse[:, None]).reshape(-1)[:b], thresholds, out_int32=True).to(torch.uint8)
    return q, absmax2


# ---- kernel ----
@triton.jit
def _quantize8_kernel(
    absmax_ptr,  # (b,) f32
    offset_ptr,  # () f32
    thresholds_ptr,  # (255,) f32, ascending
    q_ptr,  # (b,) u8
    absmax2_ptr,  # (ceil(b/BLOCK),) f32
    b,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    i = pid * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(absmax_ptr + i, mask=i < b, other=0.0) - tl.load(offset_ptr)
    z = tl.where(i < b, z, 0.0)
    bits = tl.max(z.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)  # as in code4.py: NaN stays
    absmax2 = tl.where(bits < 0x00800000, 0, bits).to(tl.float32, bitcast=True)
    tl.store(absmax2_ptr + pid, absmax2)
    s = z * tl.where(absmax2 > 0, tl.div_rn(1.0, tl.where(absmax2 > 0, absmax2, 1.0)), 0.0)
    # Binary search in 8 steps: the thresholds that s exceeds, of 255
    index = tl.where(s > tl.load(thresholds_ptr + 127), 128, 0)
    for log in tl.static_range(6, -1, -1):
        index += tl.where(s > tl.load(thresholds_ptr + index + ((1 << log) - 1)), 1 << log, 0)
    tl.store(q_ptr + i, index.to(tl.uint8), mask=i < b)


# ---- launch ----
@torch.library.custom_op("lora::quantize8", mutates_args=())
def _quantize8(absmax: Tensor, offset: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    b = absmax.numel()
    q = torch.empty(b, dtype=torch.uint8, device=absmax.device)
    absmax2 = torch.empty(-(-b // NESTED), dtype=torch.float32, device=absmax.device)
    with torch.cuda.device_of(absmax):
        _quantize8_kernel[(absmax2.numel(),)](
            absmax, offset, thresholds, q, absmax2, b, BLOCK=NESTED, num_warps=2, enable_fp_fusion=False
        )
    return q, absmax2


@_quantize8.register_fake
def _(absmax: Tensor, offset: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    b = absmax.numel()
    return absmax.new_empty(b, dtype=torch.uint8), absmax.new_empty(-(-b // NESTED))


def quantize8(absmax: Tensor, offset: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes (b,) uint8 and second-level scales (ceil(b/256),) float32 of absmax (b,), less `offset` ().

    z is scaled by the IEEE reciprocal of its block's absmax2; the byte is the number of `thresholds` (255,) that it
    exceeds strictly, so a tie goes down.  A block whose absmax2 is 0 (or subnormal) stores 0.
    """
    if absmax.dtype != torch.float32 or absmax.dim() != 1 or thresholds.shape != (255,):
        raise ValueError(
            f"absmax is {absmax.dtype} of shape {tuple(absmax.shape)} with {thresholds.numel()} thresholds; "
            "give a row of float32 scales and 255 thresholds"
        )
    if not use_triton(absmax, offset, thresholds):
        return quantize8_ref(absmax, offset, thresholds)
    return _quantize8(absmax.contiguous(), offset, thresholds)
