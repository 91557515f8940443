"""A frozen weight, decoded from 4 bits or dense, as 8-bit floats for the products of fp8.py.

    W ≈ w8 * scale     one scale a weight, its largest magnitude over TOP_WEIGHT

Turned, w8 is (K, N): the backward's product wants both operands along what it sums over.  The 4-bit codes go from bytes
to e4m3 in one pass.  Bytes that must move: 0.5 and the scales read, 1 written a value.  Source: code4.py; fp8.py.
"""

import torch
from torch import Tensor

from lora.kernels._triton import tl, triton
from lora.kernels.code4 import NESTED, Weight4, dequantize4, dequantize_scales
from lora.kernels.dispatch import use_triton
from lora.kernels.fp8 import TINY, to_f8
from lora.kernels.op import op
from lora.kernels.scratch import scratch

TOP_WEIGHT = 28.0
TILE, TILE_TURNED = (64, 256, 8), (128, 128, 4)  # rows, columns and warps of a program


# ---- kernel ----
@triton.jit
def _decode_kernel(
    q_ptr,  # (N, K / 2) u8
    absmax_ptr,  # (N, K / BLOCK) f32, or u8 where nested
    map_ptr,  # (256,) f32, and the next two, only where nested
    absmax2_ptr,
    offset_ptr,
    table_ptr,  # (256, 2) f32 of byte_table
    out_ptr,  # (N, K) e4m3, or (K, N) with TURN
    inverse,  # 1 / scale
    N,
    K,
    out_stride,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    TURN: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)[:, None]
    k0 = tl.program_id(1) * BK
    BLOCKS: tl.constexpr = BK // BLOCK
    b = n * (K // BLOCK) + k0 // BLOCK + tl.arange(0, BLOCKS)[None, :]  # (BN, BLOCKS)
    live = (n < N) & (k0 + tl.arange(0, BLOCKS)[None, :] * BLOCK < K)
    if NESTED:
        level = tl.load(map_ptr + tl.load(absmax_ptr + b, mask=live, other=0).to(tl.int32))
        scale = level * tl.load(absmax2_ptr + b // NESTED, mask=live, other=0.0) + tl.load(offset_ptr)
    else:
        scale = tl.load(absmax_ptr + b, mask=live, other=0.0)
    scale = scale * inverse
    scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (BN, BLOCKS, BLOCK // 2)), (BN, BK // 2))
    byte_col = k0 // 2 + tl.arange(0, BK // 2)[None, :]
    byte = tl.load(q_ptr + n * (K // 2) + byte_col, mask=(n < N) & (byte_col < K // 2), other=0).to(tl.int32)
    if TURN:
        high = tl.load(table_ptr + 2 * (byte >> 4) + 1) * scale
        low = tl.load(table_ptr + 2 * (byte & 15) + 1) * scale
    else:  # from shared memory: 9 instructions a weight where the above takes 12, but many registers where it is turned
        code = tl.load(table_ptr + 2 * tl.arange(0, 16) + 1)
        byte = tl.reshape(byte, (BN * BK // 2,))
        high = tl.reshape(tl.gather(code, byte >> 4, 0), (BN, BK // 2)) * scale
        low = tl.reshape(tl.gather(code, byte & 15, 0), (BN, BK // 2)) * scale
    w8 = tl.interleave(high, low).to(tl.float8e4nv)  # (BN, BK); the scale is such that all fit
    if TURN:
        k = (k0 + tl.arange(0, BK)[:, None]).to(tl.int64)
        m = tl.program_id(0) * BN + tl.arange(0, BN)[None, :]
        tl.store(out_ptr + k * out_stride + m, tl.trans(w8), mask=(k < K) & (m < N))
    else:
        k = k0 + tl.arange(0, BK)[None, :]
        tl.store(out_ptr + n * out_stride + k, w8, mask=(n < N) & (k < K))


# ---- launch ----
@op("lora::decode8", mutates=("out",))
def _decode_op(
    q: Tensor, scales: list[Tensor], table: Tensor, out: Tensor, block: int, N: int, K: int, inverse: float, turn: bool
) -> None:
    nested = len(scales) > 1
    level, absmax2, offset = scales[1:] if nested else (scales[0],) * 3
    BN, BK, num_warps = TILE_TURNED if turn else TILE
    BK = max(BK, block)
    with torch.cuda.device_of(q):
        _decode_kernel[(-(-N // BN), -(-K // BK))](
            q, scales[0], level, absmax2, offset, table, out, inverse, N, K, out.stride(0), BLOCK=block,
            NESTED=NESTED if nested else 0, TURN=turn, BN=BN, BK=BK, num_warps=num_warps,
        )  # fmt: skip


def decode8(weight: Weight4 | Tensor, scale: float, out: Tensor, turn: bool = False) -> None:
    """The weight (N, K) over `scale` into `out` (N, K) e4m3 of any row stride, or turned into (K, N)."""
    N, K = weight.shape
    whole = isinstance(weight, Weight4) and K % weight.block == 0 and weight.block <= 512
    if isinstance(weight, Weight4) and whole and use_triton(weight.q, *weight.scales, weight.table):
        _decode_op(weight.q, list(weight.scales), weight.table, out, weight.block, N, K, 1.0 / scale, turn)
        return
    if isinstance(weight, Weight4):
        q, scales, table, _, block, _ = weight
        buffer = scratch(N * K + 1, torch.float32, q.device, "decode8")
        dense = dequantize4(q, scales, table, block, N * K, torch.float32, out=buffer).view(N, K)
    else:
        dense = weight.detach().float()
    value = to_f8(dense * (1.0 / scale))
    out.copy_(value.T if turn else value)


def weight_scale(weight: Weight4 | Tensor) -> float:
    """The scale of a weight: its largest magnitude over TOP_WEIGHT.  Waits for the device."""
    if isinstance(weight, Weight4):
        scales = weight.scales
        absmax = scales[0] if len(scales) == 1 else dequantize_scales(scales[0], scales[1], scales[2], scales[3])
        largest = absmax.abs().max() * weight.table.abs().max()
    else:
        largest = weight.detach().abs().max()
    return max(float(largest), TINY) / TOP_WEIGHT
