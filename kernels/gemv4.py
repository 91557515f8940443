"""A few rows of x through 4-bit weights, read once and never unpacked to memory: what decoding a token needs.

    y_i = x W_iᵀ + bias_i + s_i (x a_iᵀ) b_iᵀ     x (M, K) of 16 bits, M small     W_i (N_i, K) in the bytes of code4.py

One launch serves several weights of one x (q, k and v; gate and up), one more all their x aᵀ.  Only the bytes move:
N K / 2 of codes and 4 N K / block of scales (1 N K / block where nested).  Four ideas:
- A look-up by table stalls at 1.2e12 weights a second, half of what memory delivers.  Here the sixteen codes lie in
  eight registers as bytes, low and high, and a byte permute (PRMT) picks four at a time: 21 instructions for 8 weights.
- Tensor cores do the products: a warp holds 16 rows of W as the 16 x 16 operand of `mma` and 8 tokens as the other.
  The order of k within a block is free as long as both operands keep it, so a thread uses 8 bytes in a row as they lie.
- The float32 scale of a block multiplies the block's float32 sum.  Only the codes are rounded to 16 bits, so the
  error stays below that of a weight rounded to 16 bits.
- A warp takes units of four blocks, 16 rows x 128 bytes, whole lines of memory, DEPTH units ahead of its work.  The
  threads of a row each decode the scale of one of the four blocks and hand it round.

Source: PTX ISA, mma.m16n8k16; scale after the sum as in Marlin, arXiv:2408.11743.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora.kernels._triton import tl, triton
from lora.kernels.code4 import Low, Weight4
from lora.kernels.dispatch import INTERPRETED, use_triton
from lora.kernels.warp import (
    decode8, from_lane, get, load8, load32, look8, mma, permute_table, put4, put_same, raise_flag, shared, start_flags,
    sum_parts, wait_flag,
)  # fmt: skip

__all__ = ["MOST_ROWS", "can_gemv4", "down", "gemv4", "gemv4_group", "permute_table"]

MOST_ROWS = 64  # of x; beyond, decoding into a buffer and a plain product is faster (LOG.md)


class Plan(NamedTuple):
    """How the kernel goes about a shape: see its arguments of these names."""

    rows: int = 1
    unit: int = 4
    ahead: int = 1
    look: int = 2
    warps: int = 16


def plan(N: int, K: int, tiles: int) -> Plan:
    """The plan for N rows in all and a K; measured, see LOG.md."""
    blocks = K // 64

    def read(unit: int) -> int:  # blocks that 16 warps read, some behind the row
        return -(-blocks // (16 * unit)) * 16 * unit

    unit = min((4, 2, 1), key=lambda unit: (read(unit) > 1.05 * blocks, read(unit), -unit))
    if tiles > 1:
        return Plan(2 if tiles == 2 else 1, min(unit, 2), 1, 2)
    return Plan(1, unit, 2 if unit == 4 and K > 4096 else 1, 2)


def share(groups: Sequence[int], most: int) -> tuple[int, list[int]]:
    """How many groups a program takes at most, and each weight's programs, so that there are at most `most` in all."""
    turns = max(1, -(-sum(groups) // most))
    while sum(-(-n // turns) for n in groups) > most and turns < max(groups):
        turns += 1
    return turns, [-(-n // turns) for n in groups]


# ---- kernel ----
@triton.jit
def _fetch(q_ptr, rows, unit, t, more, K: tl.constexpr, UNIT: tl.constexpr, RAGGED: tl.constexpr):
    """The codes of a unit: for each block and each of a thread's rows, two words."""
    starts, words = (), ()
    for j in tl.static_range(len(rows)):
        starts = starts + ((q_ptr + rows[j].to(tl.int64) * (K // 2) + (unit * (UNIT * 32) + t * 8)).to(tl.int64),)
    for b in tl.static_range(UNIT):
        back = 0
        if RAGGED:  # what lies behind the row meets zeros of x
            back = tl.maximum(unit * (UNIT * 32) + b * 32 - (K // 2 - 32), 0)
        for j in tl.static_range(len(rows)):
            w0, w1 = load8(starts[j] + b * 32 - back, more)
            words = words + (w0, w1)
    return words


@triton.jit
def _fetch_scales(
    absmax_ptr, absmax2_ptr, rows, unit, t, more,
    K: tl.constexpr, UNIT: tl.constexpr, RAGGED: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """For each of a thread's rows the scale of block t of the unit; nested: its byte and its own scale."""
    block = unit * UNIT + t % UNIT
    if RAGGED:
        block = tl.minimum(block, K // 64 - 1)
    held = ()
    for j in tl.static_range(len(rows)):
        at = (rows[j] * (K // 64) + block).to(tl.uint32) // (BLOCK // 64)
        s = tl.load(absmax_ptr + at, mask=more != 0)
        s2 = s
        if NESTED:
            s2 = tl.load(absmax2_ptr + at // 256, mask=more != 0)
        held = held + (s, s2)
    return held


@triton.jit
def _fetch_x(
    xs, have, unit,
    K: tl.constexpr, UNIT: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """x of a unit: for each block and each 8 tokens, eight words; zeros where there is no token, or no block."""
    x = ()
    for b in tl.static_range(UNIT):
        for i in tl.static_range(len(xs)):
            here = have[i]
            if RAGGED:
                here = here * (unit * UNIT + b < K // 64).to(tl.int32)
            x = x + load32((xs[i] + unit * (UNIT * 128)).to(tl.int64) + b * 128, here)
    return x


@triton.jit
def _rows(row0, n, g, ROWS: tl.constexpr, EVEN: tl.constexpr):
    """A thread's rows; those beyond the last are the last, and are not stored."""
    rows = ()
    for j in tl.static_range(2 * ROWS):
        row = row0 + 8 * j + g
        if not EVEN:
            row = tl.minimum(row, n - 1)
        rows = rows + (row,)
    return rows


@triton.jit
def _decode(word, i: tl.constexpr, pairs_at, low, high, LOOK: tl.constexpr):
    """Eight codes, by shared memory or by the permute: the two share the work, as each has its own pipe."""
    if i < LOOK:
        return look8(word, pairs_at)
    else:
        return decode8(word, low, high)


@triton.jit
def _finish(
    turn, begin_row, tile, bias_and_b,
    sums_at, flags_at, xa_ptr, y_ptr, M, n, column, R, r0, value, part,
    N: tl.constexpr, RSUM: tl.constexpr, EACH: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr,
    PARTS: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Adds up what all warps have put down in their turn `turn`, and what belongs to it, and stores it."""
    wait_flag(flags_at + turn % 2 * 8, turn // 2 % 2)
    at = sums_at + turn % 2 * (WARPS * STRIDE) + part * STRIDE + value * 4
    y = get(at) + get(at + PARTS * STRIDE) + get(at + 2 * PARTS * STRIDE) + get(at + 3 * PARTS * STRIDE)
    row = begin_row + value // 16 + value % 4 // 2 * 8
    m = (tl.program_id(1) * TILES + tile) * 8 + value // 4 % 4 * 2 + value % 2
    y += bias_and_b[0]
    for k in tl.static_range(1, EACH):
        at_k = (k - 1) * PARTS + part
        xa = tl.load(xa_ptr + m * RSUM + r0 + at_k, mask=(m < M) & (at_k < R), other=0.0)
        y += bias_and_b[k].to(tl.float32) * xa
    y = sum_parts(y, PARTS)
    inside = (row < n) & (m < M) & (part == 0)
    tl.store(y_ptr + m.to(tl.int64) * N + column + row, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _gemv4_kernel(
    x_ptr,  # (M, K) bf16 or f16
    parts,  # for each weight: codes (N K / 2,) u8; absmax (N K / block,) f32 or, nested, u8; map (256,) f32,
    # absmax2 (N K / block / 256,) f32, offset (1,) f32; table (2, 8, 32) i32; bias (N,); b (N, R)
    xa_ptr,  # (M, Σ R) f32, s already in it
    y_ptr,  # (M, Σ N)
    M,
    NS: tl.constexpr,  # rows of each weight
    RS: tl.constexpr,  # rank of each low-rank update, 0: none
    PROGRAMS: tl.constexpr,  # of each weight
    TURNS: tl.constexpr,  # groups of 16 ROWS rows that a program takes one behind the other, at most
    R2: tl.constexpr,  # the largest rank up to a power of two, 0: no update
    BIAS: tl.constexpr,  # 1 for each weight that has one
    HAS_BIAS: tl.constexpr,  # any
    N: tl.constexpr,  # Σ NS
    RSUM: tl.constexpr,  # Σ RS
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    HALF: tl.constexpr,
    TILES: tl.constexpr,  # of 8 tokens each
    ROWS: tl.constexpr,  # times 16 rows that a warp takes at once
    UNIT: tl.constexpr,  # blocks of 64 that a warp takes at once: 1, 2 or 4
    AHEAD: tl.constexpr,  # units whose codes are under way
    LOOK: tl.constexpr,  # of the four words of a block that a thread decodes, those looked up in shared memory
    WARPS: tl.constexpr,  # 4, 8 or 16, side by side along K
    EVEN: tl.constexpr,  # whole groups in every weight
    EARLY: tl.constexpr,  # start before the launch before this one ends, and wait for it only where x is read
):  # fmt: skip
    BLOCKS: tl.constexpr = K // 64
    STEPS: tl.constexpr = (BLOCKS + UNIT * WARPS - 1) // (UNIT * WARPS)
    RAGGED: tl.constexpr = BLOCKS % (UNIT * WARPS) != 0  # some units end behind the row
    PARTS: tl.constexpr = WARPS // 4
    EACH: tl.constexpr = 1 + (R2 + PARTS - 1) // PARTS  # what a thread adds to a sum: bias, and its columns of b
    STRIDE: tl.constexpr = 512 + 128 // PARTS % 128  # so that parts read from different banks
    KEEP: tl.constexpr = STEPS == 1 and TILES * UNIT <= 4  # a thread's x is the same in every turn
    HOLD: tl.constexpr = not KEEP and TILES * UNIT <= 2  # x of the next unit is under way too
    LATE: tl.constexpr = ROWS * TILES == 1  # sums are added up a turn later, so that no warp waits for another
    thread = tl.arange(0, 32 * WARPS)
    warp, lane = thread // 32, thread % 32
    g, t = lane // 4, lane % 4

    # Which weight?
    pid = tl.program_id(0)
    q_ptr, absmax_ptr, map_ptr, absmax2_ptr, offset_ptr, table_ptr, bias_ptr, b_ptr = parts[0]
    n, R, has_bias = NS[0], RS[0], BIAS[0]
    begin, column, r0 = 0, 0, 0  # its first program, its first column of y, its first column of xa
    first, done, done_r = 0, 0, 0
    for i in tl.static_range(1, len(NS)):
        first += PROGRAMS[i - 1]
        done += NS[i - 1]
        done_r += RS[i - 1]
        if pid >= first:
            q_ptr, absmax_ptr, map_ptr, absmax2_ptr, offset_ptr, table_ptr, bias_ptr, b_ptr = parts[i]
        n, R = tl.where(pid >= first, NS[i], n), tl.where(pid >= first, RS[i], R)
        has_bias = tl.where(pid >= first, BIAS[i], has_bias)
        begin, column = tl.where(pid >= first, first, begin), tl.where(pid >= first, done, column)
        r0 = tl.where(pid >= first, done_r, r0)
    row0 = (pid - begin) * (TURNS * 16 * ROWS)
    last = tl.minimum(row0 + TURNS * 16 * ROWS, n)

    # The first codes and scales, and all else that does not wait for x
    held, scales = (), ()
    yes = thread * 0 + 1
    for i in tl.static_range(AHEAD):
        start = row0 + i // STEPS * (16 * ROWS)
        more = yes * (start < last).to(tl.int32)
        rows = _rows(start, n, g, ROWS, EVEN)
        unit = i % STEPS * WARPS + warp
        held = held + _fetch(q_ptr, rows, unit, t, more, K, UNIT, RAGGED)
        scales = scales + _fetch_scales(absmax_ptr, absmax2_ptr, rows, unit, t, more, K, UNIT, RAGGED, BLOCK, NESTED)
    entry = table_ptr + HALF * 256 + lane
    low = (tl.load(entry), tl.load(entry + 32), tl.load(entry + 64), tl.load(entry + 96))
    high = (tl.load(entry + 128), tl.load(entry + 160), tl.load(entry + 192), tl.load(entry + 224))
    offset = 0.0
    if NESTED:
        offset = tl.load(offset_ptr)
    pairs_at, sums_at, flags_at = shared(thread)
    start_flags(flags_at, yes * WARPS)
    if LOOK:
        for i in tl.static_range((255 + 32 * WARPS) // (32 * WARPS)):
            byte = (thread + i * 32 * WARPS) % 256
            pair, _1, _2, _3 = decode8(byte * 0x01010101, low, high)
            for j in tl.static_range(4):
                put_same(pairs_at + byte * 64 + (j + thread) % 4 * 16, pair)
    pairs_at += lane % 16 * 4
    tl.debug_barrier()
    # A thread adds up value `value` of 128 (16 rows x 8 tokens) over every PARTS-th warp from `part` on
    value, part = warp * (128 // WARPS) + lane % (128 // WARPS), lane // (128 // WARPS)
    my_row = value // 16 + value % 4 // 2 * 8
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    token = tl.program_id(1) * (8 * TILES) + g
    xs, have = (), ()
    for i in tl.static_range(TILES):
        xs = xs + (x_ptr.to(tl.pointer_type(tl.uint8)) + (token + 8 * i).to(tl.int64) * (2 * K) + t * 32,)
        have = have + ((token + 8 * i < M).to(tl.int32),)
    x = ()
    if KEEP or HOLD:
        x = _fetch_x(xs, have, warp, K, UNIT, RAGGED)
    zero = tl.zeros((32 * WARPS,), tl.float32)
    none = (zero,) * EACH
    before, turn = none, 0
    for begin_row in range(row0, last, 16 * ROWS):
        bias_and_b = ()
        for r in tl.static_range(ROWS):
            row = begin_row + 16 * r + my_row
            added = zero
            if HAS_BIAS:
                mask = (row < n) & (has_bias != 0) & (part == 0)
                added += tl.load(bias_ptr + row, mask=mask, other=0.0).to(tl.float32)
            bias_and_b = bias_and_b + (added,)
            for i in tl.static_range(EACH - 1):
                k = i * PARTS + part
                factor = tl.load(b_ptr + row.to(tl.int64) * R + k, mask=(row < n) & (k < R), other=0.0)
                bias_and_b = bias_and_b + (factor.to(tl.float32),)
        acc = (zero, zero, zero, zero) * (TILES * ROWS)
        for step in range(STEPS):
            unit = step * WARPS + warp
            next_row0 = begin_row + (step + AHEAD) // STEPS * (16 * ROWS)
            next_unit = (step + AHEAD) % STEPS * WARPS + warp
            more = yes * (next_row0 < last).to(tl.int32)
            rows = _rows(next_row0, n, g, ROWS, EVEN)
            now = ()
            for j in tl.static_range(2 * ROWS):
                if NESTED:  # a product, then a sum
                    now = now + (tl.load(map_ptr + scales[2 * j].to(tl.int32)) * scales[2 * j + 1] + offset,)
                else:
                    now = now + (scales[2 * j],)
            words = held[: 4 * ROWS * UNIT]
            held = held[4 * ROWS * UNIT :] + _fetch(q_ptr, rows, next_unit, t, more, K, UNIT, RAGGED)
            scales = scales[4 * ROWS :] + _fetch_scales(
                absmax_ptr, absmax2_ptr, rows, next_unit, t, more, K, UNIT, RAGGED, BLOCK, NESTED
            )
            if KEEP:
                x_now = x
            elif HOLD:
                x_now = x
                x = _fetch_x(xs, have, (step + 1) % STEPS * WARPS + warp, K, UNIT, RAGGED)
            else:
                x_now = _fetch_x(xs, have, unit, K, UNIT, RAGGED)
            for b in tl.static_range(UNIT):
                new = ()
                for r in tl.static_range(ROWS):
                    a00, a02, a10, a12 = _decode(words[(b * ROWS + r) * 4], 0, pairs_at, low, high, LOOK)
                    a20, a22, a30, a32 = _decode(words[(b * ROWS + r) * 4 + 1], 2, pairs_at, low, high, LOOK)
                    a01, a03, a11, a13 = _decode(words[(b * ROWS + r) * 4 + 2], 1, pairs_at, low, high, LOOK)
                    a21, a23, a31, a33 = _decode(words[(b * ROWS + r) * 4 + 3], 3, pairs_at, low, high, LOOK)
                    s0 = from_lane(now[2 * r], g * 4 + b)
                    s1 = from_lane(now[2 * r + 1], g * 4 + b)
                    for i in tl.static_range(TILES):
                        xb = x_now[8 * (b * TILES + i) : 8 * (b * TILES + i) + 8]
                        c0, c1, c2, c3 = mma(a00, a01, a02, a03, xb[0], xb[1], zero, zero, zero, zero, HALF)
                        c0, c1, c2, c3 = mma(a10, a11, a12, a13, xb[2], xb[3], c0, c1, c2, c3, HALF)
                        c0, c1, c2, c3 = mma(a20, a21, a22, a23, xb[4], xb[5], c0, c1, c2, c3, HALF)
                        c0, c1, c2, c3 = mma(a30, a31, a32, a33, xb[6], xb[7], c0, c1, c2, c3, HALF)
                        new = new + (
                            acc[4 * (r * TILES + i)] + c0 * s0,
                            acc[4 * (r * TILES + i) + 1] + c1 * s0,
                            acc[4 * (r * TILES + i) + 2] + c2 * s1,
                            acc[4 * (r * TILES + i) + 3] + c3 * s1,
                        )
                acc = new

        # A warp puts its sums down and raises a flag; those of all warps are added up when all flags of a turn are up
        if LATE:
            if turn > 0:
                _finish(
                    turn - 1, begin_row - 16, 0, before,
                    sums_at, flags_at, xa_ptr, y_ptr, M, n, column, R, r0, value, part,
                    N, RSUM, EACH, TILES, WARPS, PARTS, STRIDE,
                )  # fmt: skip
            before = bias_and_b
        for r in tl.static_range(ROWS):
            for i in tl.static_range(TILES):
                four = acc[4 * (r * TILES + i) : 4 * (r * TILES + i) + 4]
                at = sums_at + turn % 2 * (WARPS * STRIDE) + warp * STRIDE + lane * 16
                put4(at, four[0], four[1], four[2], four[3])
                raise_flag(flags_at + turn % 2 * 8)
                if not LATE:
                    _finish(
                        turn, begin_row + 16 * r, i, bias_and_b[r * EACH : (r + 1) * EACH],
                        sums_at, flags_at, xa_ptr, y_ptr, M, n, column, R, r0, value, part,
                        N, RSUM, EACH, TILES, WARPS, PARTS, STRIDE,
                    )  # fmt: skip
                turn += 1
    if LATE:
        _finish(
            turn - 1, row0 + (turn - 1) * 16, 0, before,
            sums_at, flags_at, xa_ptr, y_ptr, M, n, column, R, r0, value, part,
            N, RSUM, EACH, TILES, WARPS, PARTS, STRIDE,
        )  # fmt: skip


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
@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU: a program fills one; in the interpreter any number will do."""
    return 3 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def can_gemv4(x: Tensor, q: Tensor, block: int, K: int) -> bool:
    """Whether `gemv4_group` takes rows x (M, K): on a GPU, few rows of 16 bits, K and blocks in runs of 64."""
    few = 0 < x.numel() <= MOST_ROWS * K
    whole = K % 64 == 0 and block >= 64 and q.storage_offset() % 16 == 0  # codes are copied 16 bytes at a time
    return few and whole and x.dtype in (torch.bfloat16, torch.float16) and use_triton(x, q)


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

    The low-rank updates are bs[i] (N_i, R_i), contiguous, and xa (M, Σ R_i) float32 of `down` (or the caller's own),
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
    kinds = {(len(w.scales), w.block) for w in weights}
    if len(kinds) > 1:
        raise ValueError(f"one launch takes weights of one kind, and these have (scales, block) {sorted(kinds)}")
    R = sum(b.shape[1] for b in bs if b is not None)
    if (0 if xa is None else xa.shape[1]) != R:
        raise ValueError(f"xa of shape {None if xa is None else tuple(xa.shape)} for updates of {R} columns in all")
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
        list(bs),
        early,
    )
    return y.split(shapes, dim=1)


def down(a: Sequence[Tensor], s: Sequence[float], x: Tensor, early: bool = False) -> Tensor:
    """s_i x a_iᵀ side by side, (M, Σ R_i) float32, of x (M, K) and a_i (R_i, K), in one launch."""
    return _down(x, list(a), list(s), early)


@torch.library.custom_op("lora::down", mutates_args=())
def _down(x: Tensor, a: list[Tensor], s: list[float], early: bool) -> Tensor:
    """s x aᵀ of several a, side by side: (M, Σ R) float32."""
    (M, K), ranks = x.shape, tuple(t.shape[0] for t in a)
    y = torch.empty(M, sum(ranks), dtype=torch.float32, device=x.device)
    early = early and not INTERPRETED
    launch = {"launch_pdl": True} if early else {}
    block = min(8192, triton.next_power_of_2(K))
    with torch.cuda.device_of(x):
        _down_kernel[(sum(ranks), M)](
            x, tuple(a), y, K, SS=tuple(s), RS=ranks, RSUM=sum(ranks), BLOCK=block, EARLY=early,
            num_warps=min(8, max(1, block // 512)), **launch,
        )  # fmt: skip
    return y


@_down.register_fake
def _(x, a, s, early):
    return x.new_empty(x.shape[0], sum(t.shape[0] for t in a), dtype=torch.float32)


@torch.library.custom_op("lora::gemv4", mutates_args=())
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
        raise ValueError("codes that begin within 16 bytes cannot be copied 16 bytes at a time; copy the weight first")
    if x.data_ptr() % 16:
        x = x.clone()
    tiles = 1 if M <= 8 else 2 if M <= 16 else 4
    rows, unit, ahead, look, warps = plan(sum(N), K, tiles)
    turns, programs = share([triton.cdiv(n, 16 * rows) for n in N], processors(x.device))
    each = len(scales) // len(q)
    other = next((t for t in b if t is not None), x)  # stands for a factor that is not there, and is not read
    parts = []
    for i, codes in enumerate(q):
        absmax, code, absmax2, offset = (scales[each * i : each * i + each] * 4)[:4]
        bias_i, b_i = bias[i], b[i]
        has = x if bias_i is None else bias_i.to(x.dtype)
        parts.append(
            (codes, absmax, code, absmax2, offset, table[i], has, other if b_i is None else b_i.to(other.dtype))
        )
    ranks = tuple(0 if t is None else t.shape[1] for t in b)
    early = early and not INTERPRETED
    launch = {"launch_pdl": True} if early else {}
    with torch.cuda.device_of(x):
        _gemv4_kernel[(sum(programs), triton.cdiv(M, 8 * tiles))](
            x, tuple(parts), x if xa is None else xa, y, M, NS=tuple(N), PROGRAMS=tuple(programs), TURNS=turns, RS=ranks,
            R2=0 if xa is None else triton.next_power_of_2(max(ranks)), BIAS=tuple(int(t is not None) for t in bias),
            HAS_BIAS=any(t is not None for t in bias), N=sum(N), RSUM=sum(ranks), K=K, BLOCK=block, NESTED=each > 1,
            HALF=int(x.dtype == torch.float16), TILES=tiles, ROWS=rows, UNIT=unit, AHEAD=ahead, LOOK=look, EVEN=all(n % (16 * rows) == 0 for n in N), WARPS=warps, EARLY=early,
            num_warps=warps, **launch,
        )  # fmt: skip
    return y


@_gemv4.register_fake
def _(x, q, scales, table, block, N, bias, xa, b, early):
    return x.new_empty(x.shape[0], sum(N))
