# mypy: disable-error-code="assignment, misc"
# (a tuple that grows in a Triton loop)
"""The kernel of token4.py: gemv4_kernel.py for up to 8 tokens, with what lies before and after a product inside it.

The walk over W is that of gemv4_kernel.py, a program a multiprocessor.  Around it:
- x aᵀ and Σ s² come as shares, one of each program that made a part of x; all are added up, in order, by every program.
- The root mean square of a row scales its sums, not x: it is needed at the end of the first turn only.
- A program knows a few rows of y whole, so it can do to them what works on each value alone: add, multiply by the
  norm's weight, gate.  To what follows it gives its share of Σ s² and of y aᵀ, over its own rows.
"""

from lora.kernels._triton import tl, triton
from lora.kernels.gemv4_kernel import _decode, _fetch_x, _rows
from lora.kernels.warp import (
    decode8,
    from_lane,
    get,
    get_half,
    load8,
    mma,
    prefetch,
    put1,
    put4,
    put_half,
    put_same,
    raise_flag,
    room,
    rooms,
    start_flags,
    sum_parts,
    wait_flag,
)

NOTHING, ADD, GATE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # what is done to y
MOST_ROWS = 256  # of y that a program takes
MOST_LOW = 512  # sums of x aᵀ that a program reads, over its tokens
AT_ONCE = tl.constexpr(64)  # of these
TILE = tl.constexpr(2048)  # values of a at once, whose way to the tensor cores is through shared memory
# In `room`: y of a program's rows (MOST_ROWS, 8) in 16 bits, Σ x aᵀ (sides, M2, R2), 1 / rms (8,)
LOW_AT, NORM_AT = tl.constexpr(MOST_ROWS * 8 * 2), tl.constexpr(MOST_ROWS * 8 * 2 + MOST_LOW * 4)


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
def _add_shares(
    shares_ptr, M, R, r0,
    at: tl.constexpr, SHARES: tl.constexpr, RSUM: tl.constexpr, M2: tl.constexpr, R2: tl.constexpr,
):  # fmt: skip
    """Σ over the shares (SHARES, M, RSUM) of R columns from r0 on, to shared memory as (M2, R2); zeros behind."""
    SHARES2: tl.constexpr = triton.next_power_of_2(SHARES)
    FEW: tl.constexpr = min(M2 * R2, AT_ONCE)
    for first in tl.static_range(0, M2 * R2, FEW):
        p = tl.arange(0, SHARES2)[:, None]
        c = first + tl.arange(0, FEW)
        m, k = c[None, :] // R2, c[None, :] % R2
        share = tl.load(shares_ptr + (p * M + m) * RSUM + r0 + k, mask=(p < SHARES) & (m < M) & (k < R), other=0.0)
        put1(room(c) + (at + c * 4), tl.sum(share, axis=0))


@triton.jit
def _of(one, other, side, WHAT: tl.constexpr, SIDES: tl.constexpr):
    """A pointer of the weight whose turn it is."""
    p = one[WHAT]
    if SIDES == 2:  # noqa: SIM102  (the one is decided when compiled, the other when run)
        if side == 1:
            p = other[WHAT]
    return p


@triton.jit
def _finish(
    turn, added, gate, sums_at, flags_at, room_at, b_ptr, y_ptr, s_ptr,
    row0, m, token, M, n, column, R, value, part,
    N: tl.constexpr, M2: tl.constexpr, R2: tl.constexpr, HELD: tl.constexpr, NORM: tl.constexpr,
    WARPS: tl.constexpr, PARTS: tl.constexpr, STRIDE: tl.constexpr, AFTER: tl.constexpr, SIDES: tl.constexpr,
):  # fmt: skip
    """Adds up what all warps have put down in their turn `turn`, and what belongs to it, and stores it.

    With a gate: returns the sum in the turns of the first weight, and uses it in those of the second.
    """
    wait_flag(flags_at + turn % 2 * 8, turn // 2 % 2)
    at = sums_at + turn % 2 * (WARPS * STRIDE) + part * STRIDE + value * 4
    y = get(at) + get(at + PARTS * STRIDE) + get(at + 2 * PARTS * STRIDE) + get(at + 3 * PARTS * STRIDE)
    in_program = turn // SIDES * 16 + value // 16 + value % 4 // 2 * 8
    row = row0 + in_program
    low_at = room_at + LOW_AT + m * (R2 * 4)
    if SIDES == 2:
        low_at += turn % 2 * (M2 * R2 * 4)
    for i in tl.static_range(HELD):
        y += added[0][i] * get(low_at + (i * PARTS + part) * 4)
    for first in range(HELD * PARTS, R2, PARTS):
        k = first + part
        factor = tl.load(b_ptr + row.to(tl.int64) * R + k, mask=(row < n) & (k < R), other=0.0)
        y += factor.to(tl.float32) * get(low_at + k * 4)
    if NORM:
        y *= get(room_at + NORM_AT + m * 4)
    y = sum_parts(y + added[1], PARTS)
    inside = (row < n) & (token < M) & (part == 0)
    place = token.to(tl.int64) * N + column + row
    dtype = y_ptr.dtype.element_ty
    if AFTER == NOTHING:
        tl.store(y_ptr + place, y.to(dtype), mask=inside)
    if AFTER == ADD:
        s = (y.to(dtype).to(tl.float32) + added[2]).to(dtype)
        tl.store(s_ptr + place, s, mask=inside)
        tl.store(y_ptr + place, (s.to(tl.float32) * added[3]).to(dtype), mask=inside)
        put_half(room_at + (in_program * 8 + token) * 2, s.to(tl.int16, bitcast=True).to(tl.int32))
    if AFTER == GATE:
        y = y.to(dtype).to(tl.float32)
        if turn % 2 == 1:
            h = (gate / (1.0 + tl.exp(-gate)) * y).to(dtype)
            tl.store(y_ptr + place, h, mask=inside)
            put_half(room_at + (in_program * 8 + token) * 2, h.to(tl.int16, bitcast=True).to(tl.int32))
        gate = y
    return gate


@triton.jit
def _kept(first, row0, last, M, dtype: tl.constexpr, FEW: tl.constexpr):
    """y of the program's rows from its `first` on, (16 tokens, FEW) float32, zeros where there is none."""
    i, token = first + tl.arange(0, FEW)[None, :], tl.arange(0, 16)[:, None]
    at = (i * 8 + token % 8) * 2
    y = get_half(room(at) + at).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return tl.where((row0 + i < last) & (token < M), y, 0.0)


@triton.jit
def _tile_of_a(a_ptr, first_r, row, last, N: tl.constexpr, RA: tl.constexpr, R: tl.constexpr):
    """(rows, R) of aᵀ, zeros where there is none."""
    r = first_r + tl.arange(0, R)[None, :]
    return tl.load(a_ptr + r.to(tl.int64) * N + row[:, None], mask=(row < last)[:, None] & (r < RA), other=0.0)


@triton.jit
def _give_shares(
    first_a, w_ptr, a_ptr, ya_ptr, squares_ptr, row0, last, M, pid,
    N: tl.constexpr, ROWS: tl.constexpr, RA: tl.constexpr, R: tl.constexpr, FEW: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """The program's shares of Σ s² and of y aᵀ, from its rows of s, or of y itself, in shared memory."""
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    token = tl.arange(0, 16)
    tl.debug_barrier()  # all rows are there
    if AFTER == ADD:
        square = tl.zeros((16,), tl.float32)
        for first in tl.static_range(0, ROWS, FEW):
            s = _kept(first, row0, last, M, dtype, FEW)
            square += tl.sum(s * s, axis=1)
        tl.store(squares_ptr + pid * M + token, square, mask=token < M)
    for first_r in tl.static_range(0, RA, R):
        r = first_r + tl.arange(0, R)[None, :]
        ya = tl.zeros((16, R), tl.float32)
        for first in tl.static_range(0, ROWS, FEW):
            row = row0 + first + tl.arange(0, FEW)
            a = first_a
            if first_r + first > 0:
                a = _tile_of_a(a_ptr, first_r, row, last, N, RA, R)
            y = _kept(first, row0, last, M, dtype, FEW)
            if AFTER == ADD:
                y *= tl.load(w_ptr + row, mask=row < last, other=0.0).to(tl.float32)[None, :]
            ya = tl.dot(y.to(dtype), a, ya, input_precision="ieee")
        tl.store(ya_ptr + (pid * M + token[:, None]) * RA + r, ya, mask=(token < M)[:, None] & (r < RA))


@triton.jit(do_not_specialize=["M"])
def token4_kernel(
    x_ptr,  # (M, K) bf16 or f16
    parts,  # for each weight, as in gemv4_kernel.py
    xa_ptr,  # (SHARES, M, Σ R) f32
    squares_ptr,  # (SHARES, M) f32: of Σ s², x being w s
    y_ptr,  # (M, Σ N); with a gate (M, N); where something is added, w s
    old_ptr, w_ptr,  # (M, N) what is added, (N,) of the norm
    s_ptr,  # (M, N) the sum
    a_ptr,  # (RA, N)
    ya_ptr, next_squares_ptr,  # (programs, M, RA), (programs, M): f32, shares for what follows
    M, eps,
    NS: tl.constexpr,  # rows of each weight
    RS: tl.constexpr,  # rank of each low-rank update, 0: none
    PROGRAMS: tl.constexpr,  # of each weight; of a gate: of both together
    TURNS: tl.constexpr,  # groups of 16 rows that a program takes one behind the other, at most
    M2: tl.constexpr,  # M up to a power of two
    R2: tl.constexpr,  # the largest rank up to a power of two, 0: no update
    SHARES: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,  # 1 for each weight that has one
    HAS_BIAS: tl.constexpr,  # any
    N: tl.constexpr,  # Σ NS
    RSUM: tl.constexpr,  # Σ RS
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    HALF: tl.constexpr,
    UNIT: tl.constexpr,  # these as in gemv4_kernel.py
    AHEAD: tl.constexpr,
    LOOK: tl.constexpr,
    WARPS: tl.constexpr,
    EVEN: tl.constexpr,
    AFTER: tl.constexpr,  # NOTHING, ADD, GATE
    RA: tl.constexpr,  # rows of a
    CACHED: tl.constexpr,  # bytes of a program's codes that are brought to the second cache before x is waited for
    EARLY: tl.constexpr,
):  # fmt: skip
    SIDES: tl.constexpr = 2 if AFTER == GATE else 1  # weights that a program takes in turn, the same rows of each
    BLOCKS: tl.constexpr = K // 64
    STEPS: tl.constexpr = (BLOCKS + UNIT * WARPS - 1) // (UNIT * WARPS)
    RAGGED: tl.constexpr = BLOCKS % (UNIT * WARPS) != 0
    PARTS: tl.constexpr = WARPS // 4
    HELD: tl.constexpr = min((R2 + PARTS - 1) // PARTS, 4)
    STRIDE: tl.constexpr = 512 + 128 // PARTS % 128
    KEEP: tl.constexpr = STEPS == 1
    HOLD: tl.constexpr = not KEEP and UNIT <= 2
    thread = tl.arange(0, 32 * WARPS)
    warp, lane = thread // 32, thread % 32
    g, t = lane // 4, lane % 4

    # Which weight?
    pid = tl.program_id(0)
    one, other = parts[0], parts[len(parts) - 1]
    n, R, has_bias = NS[0], RS[0], BIAS[0]
    begin, column, r0 = 0, 0, 0  # its first program, its first column of y, its first column of xa
    if SIDES == 1:
        first, done, done_r = 0, 0, 0
        for i in tl.static_range(1, len(NS)):
            first += PROGRAMS[i - 1]
            done += NS[i - 1]
            done_r += RS[i - 1]
            if pid >= first:
                one = parts[i]
            n, R = tl.where(pid >= first, NS[i], n), tl.where(pid >= first, RS[i], R)
            has_bias = tl.where(pid >= first, BIAS[i], has_bias)
            begin, column = tl.where(pid >= first, first, begin), tl.where(pid >= first, done, column)
            r0 = tl.where(pid >= first, done_r, r0)
    row0 = (pid - begin) * (TURNS * 16)
    last = tl.minimum(row0 + TURNS * 16, n)
    turns = (last - row0 + 15) // 16 * SIDES

    # The first codes and scales, and all else that does not wait for x
    held, scales = (), ()
    yes = thread * 0 + 1
    for i in tl.static_range(AHEAD):
        rows = _rows(row0 + i // STEPS // SIDES * 16, n, g, 1, EVEN)
        more = yes * (i // STEPS < turns).to(tl.int32)
        unit = i % STEPS * WARPS + warp
        side = i // STEPS % SIDES
        q_ptr, absmax_ptr = _of(one, other, side, 0, SIDES), _of(one, other, side, 1, SIDES)
        absmax2_ptr = _of(one, other, side, 3, SIDES)
        held = held + _fetch(q_ptr, rows, unit, t, more, K, UNIT, RAGGED)
        scales = scales + _fetch_scales(absmax_ptr, absmax2_ptr, rows, unit, t, more, K, UNIT, RAGGED, BLOCK, NESTED)
    entry = one[5] + HALF * 256 + lane
    low = (tl.load(entry), tl.load(entry + 32), tl.load(entry + 64), tl.load(entry + 96))
    high = (tl.load(entry + 128), tl.load(entry + 160), tl.load(entry + 192), tl.load(entry + 224))
    offsets = (0.0, 0.0)
    if NESTED:
        offsets = (tl.load(one[4]), tl.load(other[4]))
    pairs_at, sums_at, flags_at, room_at = rooms(thread)
    start_flags(flags_at, yes * WARPS)
    if LOOK:
        for i in tl.static_range((255 + 32 * WARPS) // (32 * WARPS)):
            byte = (thread + i * 32 * WARPS) % 256
            pair, _1, _2, _3 = decode8(byte * 0x01010101, low, high)
            for j in tl.static_range(4):
                put_same(pairs_at + byte * 64 + (j + thread) % 4 * 16, pair)
    pairs_at += lane % 16 * 4
    # A thread adds up value `value` of 128 (16 rows x 8 tokens) over every PARTS-th warp from `part` on
    value, part = warp * (128 // WARPS) + lane % (128 // WARPS), lane // (128 // WARPS)
    my_row = value // 16 + value % 4 // 2 * 8
    token = value // 4 % 4 * 2 + value % 2
    m = tl.minimum(token, M2 - 1)  # where x aᵀ and the norm lie; tokens behind M are not stored
    FEW_R: tl.constexpr = min(max(16, triton.next_power_of_2(RA)), 64)  # of a at once
    FEW_ROWS: tl.constexpr = min(triton.next_power_of_2(TURNS * 16), TILE // FEW_R)
    first_a = 0.0
    if RA:
        first_a = _tile_of_a(a_ptr, 0, row0 + tl.arange(0, FEW_ROWS), last, N, RA, FEW_R)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        if CACHED:
            for i in tl.static_range(SIDES):
                size = tl.minimum((last - row0) * (K // 2), CACHED // SIDES)
                piece = ((size + WARPS - 1) // WARPS + 127) // 128 * 128
                mine = tl.minimum(tl.maximum(size - warp * piece, 0), piece) * (lane == 0).to(tl.int32)
                start = _of(one, other, i, 0, SIDES) + row0.to(tl.int64) * (K // 2)
                prefetch((start + warp * piece).to(tl.int64), mine)
        tl.extra.cuda.gdc_wait()

    xs = (x_ptr.to(tl.pointer_type(tl.uint8)) + g.to(tl.int64) * (2 * K) + t * 32,)
    have = ((g < M).to(tl.int32),)
    x = ()
    if KEEP or HOLD:
        x = _fetch_x(xs, have, warp, K, UNIT, RAGGED)
    if R2:
        if SIDES == 2:
            for i in tl.static_range(2):
                _add_shares(xa_ptr, M, RS[i], RS[0] * i, LOW_AT + i * M2 * R2 * 4, SHARES, RSUM, M2, R2)
        else:
            _add_shares(xa_ptr, M, R, r0, LOW_AT, SHARES, RSUM, M2, R2)
    if NORM:
        p, mm = tl.arange(0, triton.next_power_of_2(SHARES))[:, None], tl.arange(0, M2)
        square = tl.load(squares_ptr + p * M + mm[None, :], mask=(p < SHARES) & (mm[None, :] < M), other=0.0)
        put1(room(mm) + (NORM_AT + mm * 4), tl.rsqrt(tl.sum(square, axis=0) / K + eps))
    tl.debug_barrier()

    zero = tl.zeros((32 * WARPS,), tl.float32)
    before, gate = ((zero,) * HELD, zero, zero, zero), zero
    b_before = one[7]
    R_before = R
    for turn in range(turns):
        # What belongs to this turn's rows is fetched now and used a turn later
        side = turn % SIDES
        map_ptr, bias_ptr, b_ptr = (
            _of(one, other, side, 2, SIDES),
            _of(one, other, side, 6, SIDES),
            _of(one, other, side, 7, SIDES),
        )
        R_now, biased, offset = R, has_bias, offsets[0]
        if SIDES == 2:
            R_now, biased = tl.where(side == 0, RS[0], RS[1]), tl.where(side == 0, BIAS[0], BIAS[1])
            offset = tl.where(side == 0, offsets[0], offsets[1])
        row = row0 + turn // SIDES * 16 + my_row
        factors, bias, old, weight = (), zero, zero, zero
        for i in tl.static_range(HELD):
            k = i * PARTS + part
            factor = tl.load(b_ptr + row.to(tl.int64) * R_now + k, mask=(row < n) & (k < R_now), other=0.0)
            factors = factors + (factor.to(tl.float32),)
        if HAS_BIAS:
            mask = (row < n) & (biased != 0) & (part == 0)
            bias = tl.load(bias_ptr + row, mask=mask, other=0.0).to(tl.float32)
        if AFTER == ADD:
            mask = (row < n) & (token < M)
            old = tl.load(old_ptr + token.to(tl.int64) * N + row, mask=mask, other=0.0).to(tl.float32)
            weight = tl.load(w_ptr + row, mask=mask, other=0.0).to(tl.float32)

        acc = (zero, zero, zero, zero)
        for step in range(STEPS):
            unit = step * WARPS + warp
            next_turn = turn + (step + AHEAD) // STEPS
            next_unit = (step + AHEAD) % STEPS * WARPS + warp
            more = yes * (next_turn < turns).to(tl.int32)
            rows = _rows(row0 + next_turn // SIDES * 16, n, g, 1, EVEN)
            now = ()
            for j in tl.static_range(2):
                if NESTED:  # a product, then a sum
                    now = now + (tl.load(map_ptr + scales[2 * j].to(tl.int32)) * scales[2 * j + 1] + offset,)
                else:
                    now = now + (scales[2 * j],)
            words = held[: 4 * UNIT]
            next_side = next_turn % SIDES
            q_ptr, absmax_ptr = _of(one, other, next_side, 0, SIDES), _of(one, other, next_side, 1, SIDES)
            absmax2_ptr = _of(one, other, next_side, 3, SIDES)
            held = held[4 * UNIT :] + _fetch(q_ptr, rows, next_unit, t, more, K, UNIT, RAGGED)
            scales = scales[4:] + _fetch_scales(
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
                a00, a02, a10, a12 = _decode(words[4 * b], 0, pairs_at, low, high, LOOK)
                a20, a22, a30, a32 = _decode(words[4 * b + 1], 2, pairs_at, low, high, LOOK)
                a01, a03, a11, a13 = _decode(words[4 * b + 2], 1, pairs_at, low, high, LOOK)
                a21, a23, a31, a33 = _decode(words[4 * b + 3], 3, pairs_at, low, high, LOOK)
                s0 = from_lane(now[0], g * 4 + b)
                s1 = from_lane(now[1], g * 4 + b)
                xb = x_now[8 * b : 8 * b + 8]
                c0, c1, c2, c3 = mma(a00, a01, a02, a03, xb[0], xb[1], zero, zero, zero, zero, HALF)
                c0, c1, c2, c3 = mma(a10, a11, a12, a13, xb[2], xb[3], c0, c1, c2, c3, HALF)
                c0, c1, c2, c3 = mma(a20, a21, a22, a23, xb[4], xb[5], c0, c1, c2, c3, HALF)
                c0, c1, c2, c3 = mma(a30, a31, a32, a33, xb[6], xb[7], c0, c1, c2, c3, HALF)
                acc = (acc[0] + c0 * s0, acc[1] + c1 * s0, acc[2] + c2 * s1, acc[3] + c3 * s1)

        if turn > 0:
            gate = _finish(
                turn - 1, before, gate, sums_at, flags_at, room_at, b_before, y_ptr, s_ptr,
                row0, m, token, M, n, column, R_before, value, part,
                N, M2, R2, HELD, NORM, WARPS, PARTS, STRIDE, AFTER, SIDES,
            )  # fmt: skip
        before, b_before, R_before = (factors, bias, old, weight), b_ptr, R_now
        at = sums_at + turn % 2 * (WARPS * STRIDE) + warp * STRIDE + lane * 16
        put4(at, acc[0], acc[1], acc[2], acc[3])
        raise_flag(flags_at + turn % 2 * 8)
    _finish(
        turns - 1, before, gate, sums_at, flags_at, room_at, b_before, y_ptr, s_ptr,
        row0, m, token, M, n, column, R_before, value, part,
        N, M2, R2, HELD, NORM, WARPS, PARTS, STRIDE, AFTER, SIDES,
    )  # fmt: skip
    if AFTER == ADD or RA > 0:
        _give_shares(
            first_a, w_ptr, a_ptr, ya_ptr, next_squares_ptr, row0, last, M, pid,
            N, triton.next_power_of_2(TURNS * 16), RA, FEW_R, FEW_ROWS, AFTER,
        )  # fmt: skip
