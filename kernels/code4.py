"""4-bit code-book weights: floats to bytes, and bytes to floats.

A weight of n values, flattened in row order, becomes
    q       (ceil(n/2),) uint8     two codes a byte, value 2i in the HIGH half, 2i+1 in the LOW half
    absmax  (ceil(n/block),) f32   the largest magnitude of each run of `block` values; the last run may be short
    value = code[index] * absmax, one float32 product, rounded once to the wanted dtype.
Blocks run over the flattened weight, so one may straddle two rows.  Code books come from lora.quant.

Source: QLoRA, arXiv:2305.14314, section 3; numbers equal bitsandbytes' bit for bit where its backends agree.
"""

import torch
from torch import Tensor

from lora.kernels.scratch import scratch

TINY = torch.finfo(torch.float32).tiny  # below it 1/absmax may overflow, and GPUs flush it to zero


# ---- quantize ----
def quantize4(w: Tensor, code: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Bytes and block scales of `w`, any shape and floating dtype, by the nearest of 16 levels.

    Per value: s = float32(w) * (1 / absmax), an IEEE reciprocal and a product; the code is the number
    of thresholds that s exceeds strictly, so a tie goes to the lower level.  Thresholds are the float32
    midpoints of the sorted levels.  A block whose absmax is 0 (or subnormal) stores absmax 0 and the
    code of 0.0.  An odd count is padded with the code of 0.0.
    """
    flat, n = w.detach().reshape(-1), w.numel()
    levels, order = torch.sort(code, stable=True)
    thresholds = (levels[:-1] + levels[1:]) / 2  # (15,)
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


# ---- dequantize ----
def byte_table(code: Tensor) -> Tensor:
    """The two values of each byte, (256, 2) float32, high half first, from a 16-entry code."""
    return torch.stack((code.repeat_interleave(16), code.repeat(16)), dim=1)


def dequantize4(
    q: Tensor, absmax: Tensor, table: Tensor, block: int, n: int, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """The n values (n,) of bytes q in `dtype`: float32(code) * float32(absmax), rounded once; `table` of byte_table.

    Into `out` (at least 2 * q.numel() values, contiguous) where given.  A byte is looked up whole, as a
    pair of float32 in one 8-byte gather, over a chunk that stays in cache: on two cores 5 ms for
    4096x4096, where shift, mask and stack take 100 or more.
    """
    if out is None:
        out = torch.empty(2 * q.numel(), dtype=dtype, device=q.device)
    pairs = table.view(torch.int64).view(1, 256)
    on_cpu = q.device.type == "cpu"
    lanes = 1 << (torch.get_num_threads() - 1).bit_length() if on_cpu else 1  # gather splits its work over rows only
    chunk = 2**20 if on_cpu else 2**24  # bytes; a multiple of every block size
    part = scratch(min(chunk, q.numel()) * 2, torch.float32, q.device, "chunk") if dtype != torch.float32 else out
    for start in range(0, q.numel(), chunk):
        byte = q[start : start + chunk]
        p = byte.numel()
        value = part[: 2 * p] if dtype != torch.float32 else out[2 * start : 2 * (start + p)]
        rows = lanes if p % lanes == 0 else 1
        torch.gather(
            pairs.expand(rows, 256), 1, byte.to(torch.int64).view(rows, -1), out=value.view(torch.int64).view(rows, -1)
        )
        scale = absmax[2 * start // block : -(-2 * (start + p) // block)]
        whole = 2 * p // block
        value[: whole * block].view(-1, block).mul_(scale[:whole, None])
        if whole < scale.numel():
            value[whole * block :].mul_(scale[-1])
        if dtype != torch.float32:
            out[2 * start : 2 * (start + p)].copy_(value)
    return out[:n]


def dequantize_scales(q: Tensor, code: Tensor, absmax: Tensor, offset: Tensor, block: int = 256) -> Tensor:
    """Block scales of a doubly quantized weight: code[q] * absmax, then a separate + offset, all float32.

    Two roundings, not one fused multiply-add: the published files were written so.
    """
    value = torch.index_select(code, 0, q.int())  # (b,)
    whole = q.numel() // block
    value[: whole * block].view(-1, block).mul_(absmax[:whole, None])
    if whole < absmax.numel():
        value[whole * block :].mul_(absmax[-1])
    return value.add_(offset)
