# mypy: disable-error-code="assignment"
# (a tuple that grows in a Triton loop)
"""The kernel of gemv4.py: 16 bits of x through the bytes of code4.py.

The program is written a thread at a time, in the instructions of warp.py: tensors have one element a thread.  A program
fills a multiprocessor.  Its warps lie side by side along K, and take groups of 16 rows of W turn by turn; where x fits
into registers a warp's x is the same in every turn.
- Codes are copied to shared memory behind the work's back, each warp its own: while it works on one unit of blocks
  those behind it are under way, and no registers are held for them.
- Tensor cores do the products: 16 rows of W are the 16 x 16 operand of `mma`, 8 tokens the other; codes are decoded
  once for all tokens.  The order of k within a block is free as long as both operands keep it, so a thread uses
  8 bytes of a row as they lie.
- A look-up in one table by every thread stalls at 1.2e12 weights a second, half of what memory delivers.  Here half of
  the codes are found by byte permutes in registers (21 instructions for 8 weights, on a pipe of half rate), half in
  shared memory two at a time, from a table that lies there once for every two lanes.
- The float32 scale of a block multiplies the block's float32 sum.  Only the codes are rounded to 16 bits, stretched by
  a factor with which their errors cancel (warp.stretch), so the error stays below that of a weight rounded to 16 bits.
  The threads of a row decode the scale of one block each.
- The warps' sums of a turn are added up a turn later, so that a warp waits for no other: barriers cost 10 % and more.

Source: PTX ISA, mma.m16n8k16, cp.async, mbarrier; scale after the sum as in Marlin, arXiv:2408.11743.
"""

from lora.kernels._triton import tl, triton
from lora.kernels.warp import (
    arrived,
    copy16,
    decode8,
    from_lane,
    get,
    get8,
    load32,
    look8,
    mma,
    put4,
    put_same,
    raise_flag,
    sent,
    shared,
    start_flags,
    sum_parts,
    wait_flag,
)


@triton.jit
def _fetch(
    q_ptr, row0, step, n, warp, lane, slot_at, more,
    K: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, WARPS: tl.constexpr, RAGGED: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Sends for the codes of a warp's unit, 16 bytes a lane and turn, so that those of a row lie side by side.

    In shared memory rows lie end to end, and the blocks of a row in an order of its own, `_swap`: so the rows that are
    read at once lie in different banks.
    """
    row, piece = lane // (2 * UNIT), lane % (2 * UNIT)
    block = step * (WARPS * UNIT) + warp * UNIT + piece // 2
    have = lane * 0 + more
    if RAGGED:
        have = have * (block < K // 64).to(tl.int32)
    at = slot_at + row * (32 * UNIT) + (piece // 2 ^ _swap(row, UNIT)) * 32 + piece % 2 * 16
    for i in tl.static_range(ROWS * UNIT):
        here = row0 + row + i * (16 // UNIT)
        if not EVEN:
            here = tl.minimum(here, n - 1)
        copy16(at + i * 512, (q_ptr + here.to(tl.int64) * (K // 2) + block * 32 + piece % 2 * 16).to(tl.int64), have)
    sent(lane)


@triton.jit
def _swap(row, UNIT: tl.constexpr):
    """What the numbers of a row's blocks are XORed with: four rows, the 128 bytes of all banks, lie side by side."""
    return row * UNIT // 4 % UNIT


@triton.jit
def _fetch_scales(
    absmax_ptr, absmax2_ptr, rows, unit, t,
    K: tl.constexpr, UNIT: tl.constexpr, RAGGED: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """For each of a thread's rows the scale of block t of the unit; nested: its byte and its own scale."""
    block = unit * UNIT + t % UNIT
    if RAGGED:
        block = tl.minimum(block, K // 64 - 1)
    held = ()
    for j in tl.static_range(len(rows)):
        at = (rows[j] * (K // 64) + block).to(tl.uint32) // (BLOCK // 64)
        s = tl.load(absmax_ptr + at)
        s2 = s
        if NESTED:
            s2 = tl.load(absmax2_ptr + at // 256)
        held = held + (s, s2)
    return held


@triton.jit
def _scales(held, map_ptr, offset, NESTED: tl.constexpr):
    """The float32 scales of what `_fetch_scales` holds."""
    now = ()
    for j in tl.static_range(len(held) // 2):
        if NESTED:  # a product, then a sum
            now = now + (tl.load(map_ptr + held[2 * j].to(tl.int32)) * held[2 * j + 1] + offset,)
        else:
            now = now + (held[2 * j],)
    return now


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
def _multiply(
    acc, x, scales, codes_at, g, pairs_at, low, high, zero,
    ROWS: tl.constexpr, TILES: tl.constexpr, UNIT: tl.constexpr, LOOK: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """acc + the products of a unit: x of `_fetch_x`, the codes at `codes_at` of shared memory, scales of its blocks."""
    for b in tl.static_range(UNIT):
        new = ()
        for r in tl.static_range(ROWS):
            at = (codes_at ^ (b * 32)) + r * (512 * UNIT)
            w0, w1 = get8(at)
            w2, w3 = get8(at + 256 * UNIT)
            a00, a02, a10, a12 = _decode(w0, 0, pairs_at, low, high, LOOK)
            a20, a22, a30, a32 = _decode(w1, 2, pairs_at, low, high, LOOK)
            a01, a03, a11, a13 = _decode(w2, 1, pairs_at, low, high, LOOK)
            a21, a23, a31, a33 = _decode(w3, 3, pairs_at, low, high, LOOK)
            s0 = from_lane(scales[2 * r], g * 4 + b)
            s1 = from_lane(scales[2 * r + 1], g * 4 + b)
            for i in tl.static_range(TILES):
                xb = x[8 * (b * TILES + i) : 8 * (b * TILES + i) + 8]
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
    return acc


@triton.jit
def _finish(
    turn, begin_row, bias_and_b,
    sums_at, flags_at, b_ptr, xa_ptr, y_ptr, M, n, column, R, r0, value, part, shrink,
    N: tl.constexpr, R2: tl.constexpr, RSUM: tl.constexpr, HELD: tl.constexpr, ROWS: tl.constexpr,
    TILES: tl.constexpr, WARPS: tl.constexpr, PARTS: tl.constexpr, STRIDE: tl.constexpr, LOTS: tl.constexpr,
):  # fmt: skip
    """Adds up what all warps have put down in their turn `turn`, and what belongs to it, and stores it."""
    wait_flag(flags_at + turn % 2 * 8, turn // 2 % 2)
    for r in tl.static_range(ROWS):
        row = begin_row + 16 * r + value // 16 + value % 4 // 2 * 8
        for tile in tl.static_range(TILES):
            at = sums_at + ((turn % LOTS * ROWS + r) * TILES + tile) * (WARPS * STRIDE) + part * STRIDE + value * 4
            y = get(at) + get(at + PARTS * STRIDE) + get(at + 2 * PARTS * STRIDE) + get(at + 3 * PARTS * STRIDE)
            y *= shrink
            m = (tl.program_id(1) * TILES + tile) * 8 + value // 4 % 4 * 2 + value % 2
            y += bias_and_b[r * (1 + HELD)]
            for i in tl.static_range(HELD):
                k = i * PARTS + part
                xa = tl.load(xa_ptr + m * RSUM + r0 + k, mask=(m < M) & (k < R), other=0.0)
                y += bias_and_b[r * (1 + HELD) + 1 + i] * xa
            for first in range(HELD * PARTS, R2, PARTS):
                k = first + part
                xa = tl.load(xa_ptr + m * RSUM + r0 + k, mask=(m < M) & (k < R), other=0.0)
                factor = tl.load(b_ptr + row.to(tl.int64) * R + k, mask=(row < n) & (k < R), other=0.0)
                y += factor.to(tl.float32) * xa
            y = sum_parts(y, PARTS)
            inside = (row < n) & (m < M) & (part == 0)
            tl.store(y_ptr + m.to(tl.int64) * N + column + row, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def gemv4_kernel(
    x_ptr,  # (M, K) bf16 or f16
    parts,  # for each weight: codes (N K / 2,) u8; absmax (N K / block,) f32 or, nested, u8; map (256,) f32,
    # absmax2 (N K / block / 256,) f32, offset (1,) f32; table (2, 9, 32) i32; bias (N,); b (N, R)
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
    TILES: tl.constexpr,  # of 8 tokens each; what lies behind them is taken by further programs
    ROWS: tl.constexpr,  # times 16 rows that a warp takes at once
    UNIT: tl.constexpr,  # blocks of 64 that a warp takes at once: 1, 2 or 4
    SLOTS: tl.constexpr,  # steps whose codes are in shared memory or on their way there
    LOOK: tl.constexpr,  # of the four words of a block that a thread decodes, those looked up in shared memory
    WARPS: tl.constexpr,  # 4, 8 or 16, side by side along K
    STEPS: tl.constexpr,  # units of each warp in a row
    INNER: tl.constexpr,  # of them, those written out one behind the other
    MEMORY: tl.constexpr,  # bytes of shared memory for sums and slots
    EVEN: tl.constexpr,  # whole groups in every weight
    EARLY: tl.constexpr,  # start before the launch before this one ends, and wait for it only where x is read
):  # fmt: skip
    BLOCKS: tl.constexpr = K // 64
    RAGGED: tl.constexpr = BLOCKS % (UNIT * WARPS) != 0  # some units end behind the row
    PARTS: tl.constexpr = WARPS // 4
    SLOT: tl.constexpr = ROWS * UNIT * 512  # bytes of a unit of a warp
    # Of the factors b that a thread adds to a sum, those read a turn ahead: four registers of them, or ranks up to 16
    HELD: tl.constexpr = min((R2 + PARTS - 1) // PARTS, 4)
    STRIDE: tl.constexpr = 512 + 128 // PARTS % 128  # so that parts read from different banks
    LOTS: tl.constexpr = 2 if TURNS > 1 else 1  # of sums in shared memory
    KEEP: tl.constexpr = INNER == STEPS and STEPS * UNIT * TILES * WARPS <= 128  # a thread's x is kept for all turns
    HOLD: tl.constexpr = not KEEP and TILES * UNIT * WARPS <= 64  # x of the next unit is under way too
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
    pairs_at, flags_at, memory = shared(thread)
    slots_at = (memory + 127) // 128 * 128 + warp * (SLOTS * SLOT)
    sums_at = (memory + 127) // 128 * 128 + WARPS * SLOTS * SLOT
    start_flags(flags_at, thread * 0 + WARPS)
    fetch_row, fetch_step = row0, 0
    for i in tl.static_range(SLOTS - 1):
        _fetch(
            q_ptr, fetch_row, fetch_step, n, warp, lane, slots_at + i * SLOT, (fetch_row < last).to(tl.int32),
            K, ROWS, UNIT, WARPS, RAGGED, EVEN,
        )  # fmt: skip
        fetch_row, fetch_step = fetch_row + (fetch_step + 1) // STEPS * (16 * ROWS), (fetch_step + 1) % STEPS
    scales = _fetch_scales(
        absmax_ptr, absmax2_ptr, _rows(row0, n, g, ROWS, EVEN), warp, t,
        K, UNIT, RAGGED, BLOCK, NESTED,
    )  # fmt: skip
    entry = table_ptr + HALF * 288 + lane
    low = (tl.load(entry), tl.load(entry + 32), tl.load(entry + 64), tl.load(entry + 96))
    high = (tl.load(entry + 128), tl.load(entry + 160), tl.load(entry + 192), tl.load(entry + 224))
    shrink = tl.load(entry + 256).to(tl.float32, bitcast=True)  # codes are stretched
    offset = 0.0
    if NESTED:
        offset = tl.load(offset_ptr)
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
    if KEEP:
        for i in tl.static_range(STEPS):
            x = x + _fetch_x(xs, have, i * WARPS + warp, K, UNIT, RAGGED)
    elif HOLD:
        x = _fetch_x(xs, have, warp, K, UNIT, RAGGED)
    zero = tl.zeros((32 * WARPS,), tl.float32)
    codes_at = slots_at + g * (32 * UNIT) + _swap(g, UNIT) * 32 + t * 8
    before, turn = (zero,) * (ROWS * (1 + HELD)), 0
    slot = 0
    for begin_row in range(row0, last, 16 * ROWS):
        bias_and_b = ()
        for r in tl.static_range(ROWS):
            row = begin_row + 16 * r + my_row
            added = zero
            if HAS_BIAS:
                mask = (row < n) & (has_bias != 0) & (part == 0)
                added += tl.load(bias_ptr + row, mask=mask, other=0.0).to(tl.float32)
            bias_and_b = bias_and_b + (added,)
            for i in tl.static_range(HELD):
                k = i * PARTS + part
                factor = tl.load(b_ptr + row.to(tl.int64) * R + k, mask=(row < n) & (k < R), other=0.0)
                bias_and_b = bias_and_b + (factor.to(tl.float32),)
        acc = (zero, zero, zero, zero) * (TILES * ROWS)
        for base in range(0, STEPS, INNER):
            for i in tl.static_range(INNER):
                step = base + i
                if KEEP:
                    x_now = x[i * len(x) // INNER : (i + 1) * len(x) // INNER]
                elif HOLD:
                    x_now = x
                    x = _fetch_x(xs, have, (step + 1) % STEPS * WARPS + warp, K, UNIT, RAGGED)
                else:
                    x_now = _fetch_x(xs, have, step * WARPS + warp, K, UNIT, RAGGED)
                now = _scales(scales, map_ptr, offset, NESTED)
                next_row0 = begin_row + (step + 1) // STEPS * (16 * ROWS)
                next_row0 = tl.where(next_row0 < last, next_row0, begin_row)  # behind the last step, any
                scales = _fetch_scales(
                    absmax_ptr, absmax2_ptr, _rows(next_row0, n, g, ROWS, EVEN), (step + 1) % STEPS * WARPS + warp, t,
                    K, UNIT, RAGGED, BLOCK, NESTED,
                )  # fmt: skip
                arrived(thread, SLOTS - 2)
                _fetch(
                    q_ptr, fetch_row, fetch_step, n, warp, lane, slots_at + (slot + SLOTS - 1) % SLOTS * SLOT,
                    (fetch_row < last).to(tl.int32), K, ROWS, UNIT, WARPS, RAGGED, EVEN,
                )  # fmt: skip
                fetch_row, fetch_step = fetch_row + (fetch_step + 1) // STEPS * (16 * ROWS), (fetch_step + 1) % STEPS
                acc = _multiply(
                    acc, x_now, now, codes_at + slot * SLOT, g, pairs_at, low, high, zero,
                    ROWS, TILES, UNIT, LOOK, HALF,
                )  # fmt: skip
                slot = (slot + 1) % SLOTS

        # A warp puts its sums down and raises a flag; those of all warps are added up a turn later
        if turn > 0:
            _finish(
                turn - 1, begin_row - 16 * ROWS, before,
                sums_at, flags_at, b_ptr, xa_ptr, y_ptr, M, n, column, R, r0, value, part, shrink,
                N, R2, RSUM, HELD, ROWS, TILES, WARPS, PARTS, STRIDE, LOTS,
            )  # fmt: skip
        before = bias_and_b
        for i in tl.static_range(ROWS * TILES):
            at = sums_at + ((turn % LOTS * (ROWS * TILES) + i) * WARPS + warp) * STRIDE + lane * 16
            put4(at, acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3])
        raise_flag(flags_at + turn % 2 * 8)
        turn += 1
    _finish(
        turn - 1, row0 + (turn - 1) * (16 * ROWS), before,
        sums_at, flags_at, b_ptr, xa_ptr, y_ptr, M, n, column, R, r0, value, part, shrink,
        N, R2, RSUM, HELD, ROWS, TILES, WARPS, PARTS, STRIDE, LOTS,
    )  # fmt: skip
    if M < 0:  # never: Triton has no word for shared memory, but gives a gather that of its source
        tl.store(y_ptr + thread, tl.gather(tl.zeros((MEMORY // 8,), tl.int64), thread, 0).to(y_ptr.dtype.element_ty))
