"""Other ways to round a weight to 4 bits than to the nearest level.

A weight that lies on the levels of a code and moves a little snaps back to where it was, when rounded to nearest: the
small update of a fine-tune is lost whole.  Two ways that keep it in the mean, or choose where it is lost:

stochastic  a value between levels a < b becomes b with probability (v - a) / (b - a): unbiased, so what a sum of many
            weights does is kept, at the price of noise on each
search      the block's scale is tried at GRID parts of its largest magnitude, and the one with the least squared
            error is taken; the levels move, and with them what snaps where
"""

import torch
from torch import Tensor

from lora.kernels.code4 import dequantize_scales
from lora.quant.codebook import codebook
from lora.quant.weight import Packed, check_block, nested_map, pack_shape, quantize_scales, quantize_tensor

ROUNDINGS = ("nearest", "stochastic", "search")
GRID = torch.linspace(0.80, 1.10, 31)
CHUNK = 2**20  # values at a time: bounds the copies in float32


def round_tensor(
    w: Tensor, kind: str, block: int, double: bool, rounding: str, generator: torch.Generator | None = None
) -> Packed:
    """`w` in 4 bits by one of ROUNDINGS; "nearest" is `quantize_tensor`.

    The scales are rounded to 8 bits first, where `double`, and the levels chosen with the scales that will be read.

    Raises ValueError for an unknown rounding, and where `quantize_tensor` does.
    """
    check_block(block)
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding={rounding!r}: choose one of {', '.join(ROUNDINGS)}")
    plain = quantize_tensor(w, kind, block, double)  # refuses what cannot be quantized
    if rounding == "nearest":
        return plain
    flat = w.detach().reshape(-1)
    levels, order = torch.sort(codebook(kind).to(w.device), stable=True)
    rows = max(1, CHUNK // block)
    blocks = [_blocks(flat, start, block * rows, block) for start in range(0, flat.numel(), block * rows)]
    absmax = torch.cat([_scale(part, levels, rounding) for part in blocks])
    scales: tuple[Tensor, ...] = (absmax,)
    read = absmax
    if double:
        q2, absmax2, offset = quantize_scales(absmax)
        scales = (q2, nested_map(w.device), absmax2, offset)
        read = dequantize_scales(*scales)
    codes = []
    for i, part in enumerate(blocks):
        s = read[i * rows : i * rows + part.shape[0], None]
        x = torch.where(s > 0, part / s, 0.0)
        codes.append(order[_level(x, levels, rounding, generator)].to(torch.uint8).view(-1))
    code = torch.cat(codes)
    n = flat.numel()
    code[n:] = order[_level(torch.zeros(1, device=w.device), levels, "nearest", None)].to(torch.uint8)
    q = ((code[::2] << 4) | code[1::2])[: (n + 1) // 2]
    shape = tuple(w.shape)
    return Packed(kind, shape, block, pack_shape(shape, q.contiguous()), plain.code, scales)


def _blocks(flat: Tensor, start: int, count: int, block: int) -> Tensor:
    """float32 (blocks, block) of a stretch, the last one filled up with zeros."""
    part = flat[start : start + count].float()
    return torch.nn.functional.pad(part, (0, -part.numel() % block)).view(-1, block)


def _scale(part: Tensor, levels: Tensor, rounding: str) -> Tensor:
    """The scale of each block (blocks,)."""
    top = part.abs().amax(dim=1)
    if rounding != "search":
        return top
    best, least = top.clone(), torch.full_like(top, torch.inf)
    for share in GRID.tolist():
        s = top * share
        x = torch.where(s[:, None] > 0, part / s[:, None], 0.0)
        error = ((levels[_level(x, levels, "nearest", None)] * s[:, None] - part) ** 2).sum(dim=1)
        best, least = torch.where(error < least, s, best), torch.minimum(error, least)
    return best


def _level(x: Tensor, levels: Tensor, rounding: str, generator: torch.Generator | None) -> Tensor:
    """The index among sorted `levels` that each scaled value takes."""
    high = torch.searchsorted(levels, x.contiguous()).clamp(1, levels.numel() - 1)
    below, above = levels[high - 1], levels[high]
    share = ((x - below) / (above - below).clamp(min=1e-30)).clamp(0, 1)  # FP4 has 0 twice
    if rounding == "stochastic":
        draw = torch.rand(x.shape, generator=generator, device=x.device)
        return torch.where(draw < share, high, high - 1)
    return torch.where(share > 0.5, high, high - 1)
