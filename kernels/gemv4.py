"""A few rows of x through 4-bit weights, read once and never unpacked to memory: what decoding a token needs.

    y_i = x W_iᵀ + bias_i + s_i (x a_iᵀ) b_iᵀ     x (M, K) of 16 bits, M small     W_i (N_i, K) in the bytes of code4.py

One launch serves several weights of one x (q, k and v; gate and up), one more all their x aᵀ.  Only the bytes move:
N K / 2 of codes and 4 N K / block of scales (1 N K / block where nested).  How: gemv4_kernel.py.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora.kernels._triton import tl, triton
from lora.kernels.code4 import Low, Weight4, check4
from lora.kernels.dispatch import INTERPRETED, launch_early, use_triton
from lora.kernels.gemv4_kernel import gemv4_kernel
from lora.kernels.op import op
from lora.kernels.warp import permute_table

__all__ = ["MOST_ROWS", "can_gemv4", "down", "gemv4", "gemv4_group", "permute_table"]

# Of x; with more, decoding into a buffer and a plain product are taken.  On an H100 (LOG.md) ours takes .025 ms of 64
# rows by 4096 x 4096 and the other way .025, of 96 .038 and .026; with larger weights ours wins up to 64 to 96.
MOST_ROWS = 64
# Bytes of shared memory of a program, beside those of warp.py: more than half of what there is, so that each fills a
# multiprocessor.  With two of them on one, those of the launch behind meet on few: 25.8 us for 17 at 4096 x 14336.
MEMORY = 131072


class Plan(NamedTuple):
    """How the kernel goes about a shape: its arguments ROWS, UNIT, SLOTS, LOOK and WARPS."""

    rows: int
    unit: int
    slots: int
    look: int
    warps: int = 16

    def steps(self, K: int, tiles: int) -> tuple[int, int]:
        """Units of a warp in a row of K weights, and how many of them are written out: all if x is kept, or a few.

        A loop moves registers about, but long code is slow too: 7 units of it cost 4 % at 4096 x 14336 on an H100.
        """
        steps = -(-K // (64 * self.unit * self.warps))
        if steps * self.unit * self.warps * tiles <= 128:
            return steps, steps
        return steps, 2 if steps % 2 == 0 and self.rows * self.unit * tiles <= 8 else 1

    def memory(self, tiles: int, turns: int) -> int:
        """Bytes of shared memory for the slots and the sums of two turns."""
        sums = min(turns, 2) * self.rows * tiles * self.warps * (512 + 512 // self.warps % 128)
        return 128 + sums + self.slots * self.rows * self.unit * self.warps * 512


def unit_of(blocks: int, warps: int) -> int:
    """Blocks that a warp takes at once: most with which the warps read few behind the row, or else fewest read."""

    def read(unit: int) -> int:
        return -(-blocks // (warps * unit)) * warps * unit

    return min((4, 2, 1), key=lambda unit: (read(unit) > 1.05 * blocks, read(unit), -unit))


def plan(K: int, tiles: int) -> Plan:
    """The plan for rows of K weights; `benchmarks/bench_gemv4.py --sweep` times others, LOG.md has what was seen."""
    blocks = K // 64

    if tiles == 1:
        return Plan(1, unit_of(blocks, 16), 2, 2)
    if blocks <= 64:  # x is kept in registers: 128 of each of 256 threads
        return Plan(1, unit_of(blocks, 8), 3, 3, 8)
    return Plan(2, min(unit_of(blocks, 8), 2), 3, 3, 8)  # x is read for twice the rows at once


def share(groups: Sequence[int], most: int) -> tuple[int, list[int]]:
    """How many groups a program takes at most, and each weight's programs, so that there are at most `most` in all."""
    turns = max(1, -(-sum(groups) // most))
    while sum(-(-n // turns) for n in groups) > most and turns < max(groups):
        turns += 1
    return turns, [-(-n // turns) for n in groups]


# ---- kernel ----
@triton.jit
def _down_kernel(
    x_ptr, parts, y_ptr,  # (M, K), a (R, K) of each weight, (M, Σ R) f32
    K,
    SS: tl.constexpr,  # s of each weight
    RS: tl.constexpr,
    RSUM: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """s x aᵀ: one program a row of an a and a row of x."""
    r = tl.program_id(0)
    a_ptr, s, begin = parts[0], SS[0], 0
    first = 0
    for i in tl.static_range(1, len(RS)):
        first += RS[i - 1]
        if r >= first:
            a_ptr = parts[i]
        s, begin = tl.where(r >= first, SS[i], s), tl.where(r >= first, first, begin)
    k = tl.arange(0, BLOCK)
    a_ptr += (r - begin).to(tl.int64) * K
    a = tl.load(a_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x_ptr += tl.program_id(1).to(tl.int64) * K
    acc = a * tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    for base in range(BLOCK, K, BLOCK):
        a = tl.load(a_ptr + base + k, mask=base + k < K, other=0.0).to(tl.float32)
        acc += a * tl.load(x_ptr + base + k, mask=base + k < K, other=0.0).to(tl.float32)
    tl.store(y_ptr + tl.program_id(1) * RSUM + r, tl.sum(acc, axis=0) * s)


# ---- launch ----
def operands(
    x: Tensor, q: list[Tensor], scales: list[Tensor], table: list[Tensor], bias: list[Tensor | None],
    b: list[Tensor | None],
) -> tuple[tuple[Tensor, ...], ...]:  # fmt: skip
    """Of each weight, what a kernel reads: codes, four tensors of scales, table, bias and b, or a stand-in for each."""
    each = len(scales) // len(q)
    other = next((t for t in b if t is not None), x)  # stands for a factor that is not there, and is not read
    parts = []
    for i, codes in enumerate(q):
        absmax, code, absmax2, offset = (scales[each * i : each * i + each] * 4)[:4]
        bias_i, b_i = bias[i], b[i]
        added = x if bias_i is None else bias_i.to(x.dtype)
        factor = other if b_i is None else b_i.to(other.dtype)
        parts.append((codes, absmax, code, absmax2, offset, table[i], added, factor))
    return tuple(parts)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU: a program fills one; in the interpreter any number will do."""
    return 3 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def fits(device: torch.device) -> bool:
    """Whether a multiprocessor has the shared memory, and the instructions: an H100 and those after it, not RTX cards.

    What is no GPU passes: the interpreter, and dry runs.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return True
    return (9, 0) <= torch.cuda.get_device_capability(device) < (12, 0)


def can_gemv4(x: Tensor, q: Tensor, block: int, K: int) -> bool:
    """Whether `gemv4_group` takes rows x (M, K): on a GPU, few rows of 16 bits, K and blocks in runs of 64."""
    few = 0 < x.numel() <= MOST_ROWS * K
    whole = K % 64 == 0 and block >= 64 and q.storage_offset() % 16 == 0  # codes are copied 16 bytes at a time
    return few and whole and x.dtype in (torch.bfloat16, torch.float16) and use_triton(x, q) and fits(x.device)


def gemv4(
    x: Tensor, weight: Weight4, bias: Tensor | None = None, low: Low | None = None, early: bool = False
) -> Tensor:
    """y (M, N) in the dtype of x (M, K), contiguous: `gemv4_group` of one weight; low is (a (R, K), b (N, R), s)."""
    xa = down([low[0]], [low[2]], x, early) if low else None
    return gemv4_group(x, [weight], [bias], [low[1] if low else None], xa, early)[0]


def gemv4_group(
    x: Tensor,
    weights: Sequence[Weight4],
    biases: Sequence[Tensor | None],
    bs: Sequence[Tensor | None],
    xa: Tensor | None,
    early: bool = False,
) -> tuple[Tensor, ...]:
    """x (M, K), contiguous, through several weights in one launch: y_i (M, N_i), columns of one buffer.

    The low-rank updates are bs[i] (N_i, R_i) and xa (M, Σ R_i) float32 of `down` (or the caller's own),
    over the weights that have one.  Only where `can_gemv4` says so of each weight; blocks are of one size, and scales
    are nested in all or in none.
    `early` lets weights and bs be fetched while the launch before this one still runs (programmatic dependent launch):
    only where they were complete before that launch began.  x and xa are waited for.
    """
    K = x.shape[-1]
    if x.ndim != 2 or not x.is_contiguous() or any(w.shape[1] != K for w in weights):
        raise ValueError(
            f"x of shape {tuple(x.shape)} through weights {[w.shape for w in weights]}: wanted contiguous rows (M, K)"
        )
    for w in weights:
        if w.shape[0] * K > 2 * w.q.numel():
            raise ValueError(f"a weight of shape {w.shape} in {w.q.numel()} bytes of codes: wanted N K / 2 bytes")
        check4(w.q, w.scales, w.block, w.shape[0] * K)
    kinds = {(len(w.scales), w.block) for w in weights}
    if len(kinds) > 1:
        raise ValueError(f"one launch takes weights of one kind, and these have (scales, block) {sorted(kinds)}")
    R = sum(b.shape[1] for b in bs if b is not None)
    if (xa is None) != (R == 0) or xa is not None and (xa.shape != (x.shape[0], R) or not xa.is_contiguous()):
        have = None if xa is None else tuple(xa.shape)
        raise ValueError(f"xa of shape {have} for updates of {R} columns in all: wanted contiguous (M, Σ R)")
    shapes = [w.shape[0] for w in weights]
    y = _gemv4(
        x,
        [w.q for w in weights],
        [s for w in weights for s in w.scales],
        [w.permute for w in weights],
        weights[0].block,
        shapes,
        list(biases),
        xa,
        [b if b is None else b.contiguous() for b in bs],
        early,
    )
    return y.split(shapes, dim=1)


def down(a: Sequence[Tensor], s: Sequence[float], x: Tensor, early: bool = False) -> Tensor:
    """s_i x a_iᵀ side by side, (M, Σ R_i) float32, of x (M, K) and a_i (R_i, K), in one launch."""
    return _down(x, [t.contiguous() for t in a], list(s), early)


@op("lora::down")
def _down(x: Tensor, a: list[Tensor], s: list[float], early: bool) -> Tensor:
    """s x aᵀ of several a, side by side: (M, Σ R) float32."""
    (M, K), ranks = x.shape, tuple(t.shape[0] for t in a)
    y = torch.empty(M, sum(ranks), dtype=torch.float32, device=x.device)
    block = min(8192, triton.next_power_of_2(K))
    with torch.cuda.device_of(x):
        _down_kernel[(sum(ranks), M)](
            x, tuple(a), y, K, SS=tuple(s), RS=ranks, RSUM=sum(ranks), BLOCK=block,
            num_warps=min(8, max(1, block // 512)), **launch_early(early, x.device),
        )  # fmt: skip
    return y


@_down.register_fake
def _(x, a, s, early):
    return x.new_empty(x.shape[0], sum(t.shape[0] for t in a), dtype=torch.float32)


@op("lora::gemv4")
def _gemv4(
    x: Tensor,
    q: list[Tensor],
    scales: list[Tensor],
    table: list[Tensor],
    block: int,
    N: list[int],
    bias: list[Tensor | None],
    xa: Tensor | None,
    b: list[Tensor | None],
    early: bool,
) -> Tensor:
    M, K = x.shape
    y = torch.empty(M, sum(N), dtype=x.dtype, device=x.device)
    if any(t.data_ptr() % 16 for t in q):
        raise ValueError("the codes of a weight do not begin at a multiple of 16 bytes; copy the weight first")
    if x.data_ptr() % 16:  # x is read 16 bytes at a time
        x = x.clone()
    tiles = 1 if M <= 8 else 2  # more than 16 rows are taken 16 at a time
    chosen = plan(K, tiles)
    rows, unit, slots, look, warps = chosen
    steps, inner = chosen.steps(K, tiles)
    turns, programs = share([triton.cdiv(n, 16 * rows) for n in N], processors(x.device))
    if chosen.memory(tiles, turns) > MEMORY:
        raise ValueError(f"{chosen} asks for more than {MEMORY} bytes of shared memory")
    parts = operands(x, q, scales, table, bias, b)
    ranks = tuple(0 if t is None else t.shape[1] for t in b)
    with torch.cuda.device_of(x):
        gemv4_kernel[(sum(programs), triton.cdiv(M, 8 * tiles))](
            x, parts, x if xa is None else xa, y, M,
            NS=tuple(N), RS=ranks, PROGRAMS=tuple(programs), TURNS=turns,
            R2=0 if xa is None else triton.next_power_of_2(max(ranks)),
            BIAS=tuple(int(t is not None) for t in bias), HAS_BIAS=any(t is not None for t in bias),
            N=sum(N), RSUM=sum(ranks), K=K, BLOCK=block, NESTED=len(scales) > len(q),
            HALF=int(x.dtype == torch.float16), TILES=tiles, ROWS=rows, UNIT=unit, SLOTS=slots, LOOK=look,
            WARPS=warps, STEPS=steps, INNER=inner,
            MEMORY=MEMORY, EVEN=all(n % (16 * rows) == 0 for n in N), num_warps=warps, **launch_early(early, x.device),
        )  # fmt: skip
    return y


@_gemv4.register_fake
def _(x, q, scales, table, block, N, bias, xa, b, early):
    return x.new_empty(x.shape[0], sum(N))
