"""Block scales in 8 bits: double quantization.

A 4-bit weight keeps one float32 scale a block, 0.5 bit a weight at block 64.  The scales themselves are
quantized: their mean is subtracted, the rest coded in blocks of 256 by the dynamic 8-bit map.  What
remains is 8/64 + 32/(64*256) = 0.127 bit a weight.

    offset = mean(absmax)      z = absmax - offset      absmax2 = max |z| of each 256      q = nearest(z / absmax2)

The mean is the true one, rounded to float32.  bitsandbytes adds up in float32, in an order that depends on the device,
so its offset may be the float next to ours; files say theirs, and either is read as written.

Source: QLoRA, arXiv:2305.14314, section 3.
"""

import functools

import torch
from torch import Tensor

from lora.kernels.code4 import NESTED as BLOCK  # scales of one second-level block
from lora.kernels.code8 import quantize8
from lora.quant.codebook import dynamic_map

__all__ = ["BLOCK", "nested_map", "quantize_scales"]


def quantize_scales(absmax: Tensor, sums: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes (b,) uint8, second-level scales (ceil(b/256),) float32 and offset () float32 of absmax (b,).

    Nearest level by float32 midpoints, a tie goes down; z is scaled by the IEEE reciprocal of absmax2.  `sums` in
    float64 add up to the sum of absmax, as `quantize4` gives them.
    Decode with `lora.kernels.code4.dequantize_scales`.
    """
    sums = absmax.sum(dtype=torch.float64)[None] if sums is None else sums
    return quantize8(absmax, sums, _thresholds(absmax.device))


@functools.cache
def nested_map(device: torch.device) -> Tensor:
    """`dynamic_map()` on a device, one copy for all weights."""
    with torch.inference_mode(False):  # or, first asked for there, no backward could save it ever after
        return dynamic_map().to(device)


@functools.cache
def _thresholds(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        levels = nested_map(device)
        return (levels[:-1] + levels[1:]) / 2  # (255,)
