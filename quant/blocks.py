"""Block scales in 8 bits: double quantization.

A 4-bit weight keeps one float32 scale a block, 0.5 bit a weight at block 64.  The scales themselves are
quantized: their mean is subtracted, the rest coded in blocks of 256 by the dynamic 8-bit map.  What
remains is 8/64 + 32/(64*256) = 0.127 bit a weight.

    offset = mean(absmax)      z = absmax - offset      absmax2 = max |z| of each 256      q = nearest(z / absmax2)

Source: QLoRA, arXiv:2305.14314, section 3.
"""

import torch
from torch import Tensor

from lora.kernels.code4 import TINY
from lora.quant.codebook import dynamic_map

BLOCK = 256  # scales of one second-level block


def quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes (b,) uint8, second-level scales (ceil(b/256),) float32 and offset () float32 of absmax (b,).

    Nearest level by float32 midpoints, a tie goes down; z is scaled by the IEEE reciprocal of absmax2.
    Decode with `lora.kernels.code4.dequantize_scales`.
    """
    offset = absmax.mean()
    z = absmax - offset
    b = z.numel()
    blocks = torch.nn.functional.pad(z, (0, -b % BLOCK)).view(-1, BLOCK)
    absmax2 = blocks.abs().amax(dim=1)  # (blocks,)
    absmax2 = torch.where(absmax2 < TINY, 0.0, absmax2)
    inverse = torch.where(absmax2 > 0, 1.0 / absmax2, 0.0)
    levels = dynamic_map().to(absmax.device)
    thresholds = (levels[:-1] + levels[1:]) / 2
    q = torch.bucketize((blocks * inverse[:, None]).reshape(-1)[:b], thresholds, out_int32=True).to(torch.uint8)
    return q, absmax2, offset
