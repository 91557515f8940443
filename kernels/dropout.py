"""Dropout whose mask is never kept: it is a function of a seed, the layer, the row and the column.

    dropped(x) = x keep / (1 - p)       keep(row, col) = bits >= p 2**16
`bits` are 16 of the 128 that Philox-4x32-10 makes of the counter (col // 8, row, key, 0) under `seed`: eight columns
share a call.  The same on every device, in the forward, when a block is made again, and in the backward.  p is
rounded to a multiple of 2**-16, and so is the scale.

Bytes that must move, in tensors of M x K: 2, added 3.
Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011); dropout, arXiv:1207.0580.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lora.kernels._triton import tl, triton
from lora.kernels.dispatch import on_gpu, use_triton
from lora.kernels.op import PLAIN, op
from lora.kernels.scratch import scratch

BLOCK = 1024  # columns of a program


class Drop(NamedTuple):
    """Which values a layer's dropout takes: p, the step's seed (1,) int64 on the device, and the layer's number."""

    p: float
    seed: Tensor
    key: int

    @property
    def threshold(self) -> int:
        return round(self.p * 65536)

    @property
    def scale(self) -> float:
        return 65536 / (65536 - self.threshold)


class Seed:
    """The seed of a step's or a layer's dropout, drawn from the generator of the device when it is first needed.

    A layer's number is its place among those that drop; a CUDA graph draws a new seed each time it runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.used = device, 0
        self.value: Tensor | None = None

    def drop(self, p: float) -> Drop:
        if self.value is None:
            self.value = torch.randint(2**62, (1,), device=self.device)
        self.used += 1
        return Drop(p, self.value, self.used - 1)


def counted(x: Tensor, p: float) -> Drop | None:
    """The dropout of x; None where torch's takes its place.

    It does on a CPU, where operations of torch would make the bits, and before a compiler, which cannot look into ours.
    """
    if torch.compiler.is_compiling() or not on_gpu(x) or (x.is_cuda and type(x) not in PLAIN):
        return None
    return Seed(x.device).drop(p)


# ---- reference ----
def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: int) -> tuple[Tensor, ...]:
    """Four words (below 2**32, in int64) of the counters (c0, c1, c2, 0)."""
    low = 0xFFFFFFFF
    c2_, c3 = torch.full_like(c0 + c1, c2), torch.zeros_like(c0 + c1)
    c0, c1 = c0 + torch.zeros_like(c3), c1 + torch.zeros_like(c3)
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2_ * 0xCD9E8D57  # modulo 2**64, of which the shifts and masks take unsigned parts
        c0, c2_ = ((b >> 32) & low) ^ c1 ^ k0, ((a >> 32) & low) ^ c3 ^ k1
        c1, c3 = b & low, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2_, c3


def keep_mask(M: int, K: int, drop: Drop) -> Tensor:
    """keep of every value, bool (M, K)."""
    device = drop.seed.device
    groups = torch.arange(-(-K // 8), device=device)[None, :]
    words = torch.stack(philox(drop.seed, groups, torch.arange(M, device=device)[:, None], drop.key), dim=-1)
    bits = torch.stack((words & 0xFFFF, words >> 16), dim=-1)  # (M, K / 8, 4, 2)
    return bits.flatten(1)[:, :K] >= drop.threshold


# ---- kernel ----
@triton.jit
def _drop_kernel(
    x_ptr,  # (M, K)
    out_ptr,  # (M, K), read too with ADD
    seed_ptr,  # (1,) i64
    K,
    x_stride_m,
    out_stride_m,
    key,
    threshold,
    scale,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    first = tl.program_id(1) * BLOCK
    group = first // 8 + tl.arange(0, BLOCK // 8)
    zero = group * 0
    r0, r1, r2, r3 = tl.philox(tl.load(seed_ptr), group, zero + row, zero + key, zero)
    words = tl.permute(tl.join(tl.join(r0, r1), tl.join(r2, r3)), (0, 2, 1))  # (groups, 2, 2): r0, r1, r2, r3
    words = tl.reshape(words, (BLOCK // 2,)).to(tl.uint32, bitcast=True)
    bits = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK,)).to(tl.int32)
    col = first + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row.to(tl.int64) * x_stride_m + col, mask=col < K, other=0.0).to(tl.float32)
    y = tl.where(bits >= threshold, x * scale, 0.0)
    at = out_ptr + row.to(tl.int64) * out_stride_m + col
    if ADD:
        y += tl.load(at, mask=col < K, other=0.0).to(tl.float32)
    tl.store(at, y.to(out_ptr.dtype.element_ty), mask=col < K)


# ---- launch ----
@op("lora::dropped", mutates=("out",))
def _drop_op(x: Tensor, out: Tensor, seed: Tensor, key: int, threshold: int, scale: float, add: bool) -> None:
    M, K = x.shape
    block = min(BLOCK, max(32, triton.next_power_of_2(K)))
    if not x.numel():
        return
    with torch.cuda.device_of(x):  # Triton launches on the current device, not on the tensors'
        _drop_kernel[(M, -(-K // block))](
            x, out, seed, K, x.stride(0), out.stride(0), key, threshold, scale, ADD=add, BLOCK=block,
            num_warps=max(1, block // 256),
        )  # fmt: skip


def dropped(x: Tensor, drop: Drop, out: Tensor, add: bool = False) -> Tensor:
    """x (M, K) with values dropped and the rest scaled, written into `out` (M, K), which may be x, or added to it.

    Both of any row stride, neighbours of a row side by side.
    """
    for name, t in (("x", x), ("out", out)):
        if t.dim() != 2 or t.shape != x.shape or t.dtype != x.dtype or (t.numel() and t.stride(1) != 1):
            raise ValueError(
                f"{name} is {t.dtype} {tuple(t.shape)} with strides {t.stride()}; dropout needs two (M, K) of "
                f"{x.dtype}, each row without gaps"
            )
    if use_triton(x, out, drop.seed):
        _drop_op(x, out, drop.seed, drop.key, drop.threshold, drop.scale, add)
        return out
    kept = torch.where(
        keep_mask(x.shape[0], x.shape[1], drop), x.float() * drop.scale if x.element_size() < 4 else x * drop.scale, 0
    )
    return out.copy_(out + kept if add else kept)


def dropped_copy(x: Tensor, drop: Drop) -> Tensor:
    """`dropped` x (M, K) in a reused buffer: use it before the next call."""
    x = x if x.stride(1) == 1 else x.contiguous()
    return dropped(x, drop, scratch(x.numel(), x.dtype, x.device, "dropped").view(x.shape))
