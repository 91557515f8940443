"""4-bit code-book weights: bytes to floats; encode4.py is the way there.

A weight of n values, flattened in row order, becomes
    q       (ceil(n/2),) uint8     two codes a byte, value 2i in the HIGH half, 2i+1 in the LOW half
    absmax  (ceil(n/block),) f32   the largest magnitude of each run of `block` values; the last run may be short
    value = code[index] * absmax, one float32 product, rounded once to the wanted dtype.
Blocks run over the flattened weight, so one may straddle two rows.  Code books come from lora.quant.
The block scales may themselves be bytes (code8.py): then absmax = map[byte] * absmax2 + offset, two roundings.

Bytes that must move a weight, block 64, bfloat16: 0.5 + 1/16 read (nested 0.5 + 1/64), 2 written.  4096 x 4096 is 43
MB: 14 us at the 3.0 TB/s that an H100 copies.

Source: QLoRA, arXiv:2305.14314, section 3; numbers equal bitsandbytes' bit for bit where its backends agree.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora.kernels._triton import tl, triton
from lora.kernels.dispatch import launch_early, use_triton
from lora.kernels.op import op
from lora.kernels.scratch import scratch

TINY = torch.finfo(torch.float32).tiny  # below it 1/absmax may overflow, and GPUs flush it to zero
NESTED = 256  # block scales that share one scale of their own, where they are bytes

# What a program and a thread of the kernel take.  A thread takes 16 bytes, 32 values: whole 16-byte loads and stores
# of 16-bit values, and then no value changes its thread on the way (seen in the code made by Triton 3.6 for sm_90).
DECODE_BYTES, DECODE_BYTES_THREAD = 2048, 16


Low = tuple[Tensor, Tensor, float]  # a low-rank update beside a weight: a (r, K), b (N, r), s


class Weight4(NamedTuple):
    """A 4-bit matrix (N, K): what a product needs to know of it."""

    q: Tensor  # bytes, flat
    scales: tuple[Tensor, ...]  # (absmax,), or nested: (q, code, absmax, offset) of `dequantize_scales`
    table: Tensor  # byte_table of the code
    permute: Tensor  # permute_table of the code
    block: int
    shape: tuple[int, int]


# ---- reference ----
def dequantize4_ref(
    q: Tensor, scales: Sequence[Tensor], table: Tensor, block: int, n: int, out: Tensor, start: int = 0
) -> Tensor:
    """`dequantize4` in torch, into `out`, which holds n rounded up to even.

    A byte is looked up whole, as a pair of float32 in one 8-byte gather, over a chunk that stays in cache: on two
    cores 5 ms for 4096x4096, where shift, mask and stack take 100 or more.
    """
    absmax = scales[0] if len(scales) == 1 else dequantize_scales(scales[0], scales[1], scales[2], scales[3])
    pairs = table.view(torch.int64).view(1, 256)
    on_cpu = q.device.type == "cpu"
    lanes = 1 << (torch.get_num_threads() - 1).bit_length() if on_cpu else 1  # gather splits its work over rows only
    chunk = 2**20 if on_cpu else 2**24  # bytes; a multiple of every block size
    first, last = start // 2, (start + n + 1) // 2  # bytes
    direct = out.dtype == torch.float32 and out.storage_offset() % 2 == 0  # a pair is written as one int64
    part = out if direct else scratch(min(chunk, last - first) * 2, torch.float32, q.device, "chunk")
    for a in range(first, last, chunk):
        byte = q[a : min(a + chunk, last)]
        p = byte.numel()
        value = part[2 * (a - first) : 2 * (a - first + p)] if direct else part[: 2 * p]
        rows = lanes if p % lanes == 0 else 1
        torch.gather(
            pairs.expand(rows, 256), 1, byte.to(torch.int64).view(rows, -1), out=value.view(torch.int64).view(rows, -1)
        )
        scale = absmax[2 * a // block : -(-2 * (a + p) // block)]
        head = min(-2 * a % block, 2 * p)  # values of a block whose beginning lies before the range
        if head:
            value[:head].mul_(scale[0])
            value, scale = value[head:], scale[1:]
        whole = value.numel() // block
        value[: whole * block].view(-1, block).mul_(scale[:whole, None])
        if whole * block < value.numel():
            value[whole * block :].mul_(scale[whole])
        if not direct:
            out[2 * (a - first) : 2 * (a - first + p)].copy_(part[: 2 * p])
    return out[:n]


def dequantize_scales(q: Tensor, code: Tensor, absmax: Tensor, offset: Tensor, block: int = NESTED) -> Tensor:
    """Block scales of a doubly quantized weight: code[q] * absmax, then a separate + offset, all float32.

    Two roundings, not one fused multiply-add: the published files were written so.
    """
    value = torch.index_select(code, 0, q.int())  # (b,)
    whole = q.numel() // block
    value[: whole * block].view(-1, block).mul_(absmax[:whole, None])
    if whole < absmax.numel():
        value[whole * block :].mul_(absmax[-1])
    return value.add_(offset)


# ---- tables made from a code ----
def byte_table(code: Tensor) -> Tensor:
    """The two values of each byte, (256, 2) float32, high half first, from a 16-entry code."""
    return torch.stack((code.repeat_interleave(16), code.repeat(16)), dim=1)


# ---- kernel ----
@triton.jit
def _dequantize_kernel(
    q_ptr,  # (ceil(n/2),) u8, all of the weight
    absmax_ptr,  # (b,) f32, or u8 where nested
    map_ptr,  # (256,) f32, and the next two, only where nested
    absmax2_ptr,  # (ceil(b/256),) f32
    offset_ptr,  # () f32
    table_ptr,  # (256, 2) f32 of byte_table
    out_ptr,  # (stop - start,) f32, bf16 or f16; with WIDTH in rows of WIDTH values, out_stride apart
    start,  # values
    stop,
    first,  # bytes
    last,
    out_stride,
    WIDTH: tl.constexpr,  # 0: values lie end to end
    SEGMENT: tl.constexpr,  # bytes that share a scale, at most a program's
    SPLIT: tl.constexpr,  # segments a block
    ROWS: tl.constexpr,  # segments a program
    NESTED_BLOCK: tl.constexpr,  # 0: plain
    EARLY: tl.constexpr,  # launched before the launch in front of it ended, and lets the next one in
):
    TILE: tl.constexpr = ROWS * SEGMENT
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = first // SEGMENT + tl.program_id(0).to(tl.int64) * ROWS
    segment = row + tl.arange(0, ROWS)
    b = segment // SPLIT
    live = segment * SEGMENT < last
    if NESTED_BLOCK:
        level = tl.load(map_ptr + tl.load(absmax_ptr + b, mask=live, other=0).to(tl.int32))
        scale = level * tl.load(absmax2_ptr + b // NESTED_BLOCK, mask=live, other=0.0) + tl.load(offset_ptr)
    else:
        scale = tl.load(absmax_ptr + b, mask=live, other=0.0)  # (ROWS,)
    scale = tl.reshape(tl.broadcast_to(scale[:, None], (ROWS, SEGMENT)), (TILE,))
    p = row * SEGMENT + tl.arange(0, TILE)
    byte = tl.load(q_ptr + p, mask=(p >= first) & (p < last), other=0).to(tl.int32)
    # The first 16 rows of the table hold the code in their second column: one cache line
    high = tl.load(table_ptr + 2 * (byte >> 4) + 1) * scale
    low = tl.load(table_ptr + 2 * (byte & 15) + 1) * scale
    i = 2 * SEGMENT * row + tl.arange(0, 2 * TILE)
    value = tl.interleave(high.to(out_ptr.dtype.element_ty), low.to(out_ptr.dtype.element_ty))
    if WIDTH:
        place = (i // WIDTH) * out_stride + i % WIDTH
    else:
        place = i - start
    tl.store(out_ptr + place, value, mask=(i >= start) & (i < stop))


# ---- launch ----
@op("lora::dequantize4", mutates=("out",))
def _dequantize4(
    q: Tensor, scales: Sequence[Tensor], table: Tensor, out: Tensor, block: int, n: int, start: int
) -> None:
    nested = len(scales) > 1
    level, absmax2, offset = scales[1:] if nested else (scales[0],) * 3
    segment = min(block // 2, DECODE_BYTES)
    rows = DECODE_BYTES // segment
    first, last = start // 2, (start + n + 1) // 2
    with torch.cuda.device_of(q):
        _dequantize_kernel[(-(-(-(-last // segment) - first // segment) // rows),)](
            q,
            scales[0],
            level,
            absmax2,
            offset,
            table,
            out,
            start,
            start + n,
            first,
            last,
            out.stride(0),
            WIDTH=out.shape[1] if out.dim() == 2 else 0,
            SEGMENT=segment,
            SPLIT=block // 2 // segment,
            ROWS=rows,
            NESTED_BLOCK=NESTED if nested else 0,
            num_warps=DECODE_BYTES // (32 * DECODE_BYTES_THREAD),
            enable_fp_fusion=False,  # nested scales are a product, then a sum: two roundings
            # of the 16 us of 4096 x 4096, waiting for the end of the launch before costs 1
            **launch_early(True, q.device),
        )


def dequantize4(
    q: Tensor,
    scales: Sequence[Tensor],
    table: Tensor,
    block: int,
    n: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
    start: int = 0,
) -> Tensor:
    """The values start .. start + n of bytes q (all of the weight), (n,) in `dtype`; `table` of byte_table.

    float32(code) * float32(absmax), rounded once.  `scales` is (absmax,), or (bytes, map, absmax2, offset) as
    `dequantize_scales` takes them.  `start` is even.  Into `out` (n values rounded up to even, contiguous) where given;
    an `out` (n / K, K) of two dimensions may have any distance between its rows, for an even K and start 0.
    """
    check4(q, scales, block, start + n)
    if n < 1 or start < 0 or start % 2:
        raise ValueError(
            f"values {start} .. {start + n}: ask for at least one, from an even place on, where a byte begins"
        )
    if table.shape != (256, 2) or table.dtype != torch.float32 or not table.is_contiguous():
        raise ValueError(f"the table is {table.dtype} of shape {tuple(table.shape)}; give byte_table(code)")
    if out is None:
        out = torch.empty(n + n % 2, dtype=dtype, device=q.device)
    elif out.dim() == 2 and out.dtype == dtype:
        if out.numel() != n or out.shape[1] % 2 or out.stride(1) != 1 or start:
            raise ValueError(
                f"out is {tuple(out.shape)} with strides {out.stride()}; {n} values from 0 on need rows of an even "
                "count that hold just them, each without gaps"
            )
    elif out.dtype != dtype or out.numel() < n + n % 2 or not out.is_contiguous():
        raise ValueError(
            f"out holds {out.numel()} values of {out.dtype}{'' if out.is_contiguous() else ', not contiguous'}; "
            f"{n} values need room for {n + n % 2} of {dtype} in a row"
        )
    if not use_triton(q, *scales, table, out):
        if out.dim() == 2 and not out.is_contiguous():
            return out.copy_(dequantize4(q, scales, table, block, n, dtype).view(out.shape))
        if out.dim() == 2:
            return dequantize4_ref(q, scales, table, block, n, out.view(-1)).view(out.shape)
        return dequantize4_ref(q, scales, table, block, n, out, start)
    _dequantize4(q, scales, table, out, block, n, start)
    return out if out.dim() == 2 else out[:n]


def check4(q: Tensor, scales: Sequence[Tensor], block: int, n: int) -> None:
    """Refuses bytes and scales that cannot hold n values: a kernel would read past their end."""
    check_block4(block)
    if q.dtype != torch.uint8 or not q.is_contiguous() or 2 * q.numel() < n:
        raise ValueError(
            f"q is {q.dtype} of shape {tuple(q.shape)}{'' if q.is_contiguous() else ', not contiguous'}; "
            f"{n} values need {(n + 1) // 2} bytes of uint8 in a row"
        )
    b = -(-n // block)
    if len(scales) == 1:
        want = [(b, torch.float32)]
    elif len(scales) == 4:
        want = [(b, torch.uint8), (256, torch.float32), (-(-b // NESTED), torch.float32), (1, torch.float32)]
    else:
        raise ValueError(f"{len(scales)} tensors of scales; give (absmax,) or (bytes, map, absmax2, offset)")
    for i, (scale, (count, dtype)) in enumerate(zip(scales, want, strict=True)):
        if scale.dtype != dtype or scale.numel() < count or not scale.is_contiguous():
            raise ValueError(
                f"scales[{i}] holds {scale.numel()} of {scale.dtype}; "
                f"{n} values in blocks of {block} need {count} of {dtype}, contiguous"
            )


def check_block4(block: int) -> None:
    """Refuses a block size that no kernel takes."""
    if block < 32 or block & (block - 1) or block > 4096:
        raise ValueError(f"block={block}: a block holds a power of two of values, 32 to 4096")
