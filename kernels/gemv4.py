# mypy: disable-error-code="assignment"
# (a tuple that grows in a Triton loop)
"""A few rows of x through a 4-bit weight, read once and never unpacked to memory: what decoding a token needs.

    y = x Wᵀ + bias + s (x aᵀ) bᵀ          x (M, K) of 16 bits, M small          W (N, K) in the bytes of code4.py

Only the bytes move: N K / 2 of codes and 4 N K / block of scales (1 N K / block where nested).  Three ideas:
- A look-up by table stalls at 1.2e12 weights a second, half of what memory delivers.  Here the sixteen codes lie in
  eight registers as bytes, low and high, and a byte permute (PRMT) picks four at a time: 21 instructions for 8 weights.
- Tensor cores do the products: a warp holds 16 rows of W as the 16 x 16 operand of `mma` and 8 tokens as the other.
  The order of k within a block is free as long as both operands keep it, so a thread loads 8 bytes in a row and
  uses them where they are: nothing is exchanged between threads until the last sum.
- The float32 scale of a block multiplies the block's float32 sum.  Only the codes are rounded to 16 bits, so the
  error stays below that of a weight rounded to 16 bits.

The program is written a thread at a time: tensors have one element a thread, in thread order, because `mma` wants its
operands in given lanes.  Source: PTX ISA, mma.m16n8k16; scale after the sum as in Marlin, arXiv:2408.11743.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lora.kernels._triton import tl, triton
from lora.kernels.dispatch import INTERPRETED, use_triton


def plan(N: int, K: int, tiles: int) -> tuple[int, int, int]:
    """ROWS, AHEAD and WARPS of the kernel; WARPS * AHEAD divides the K / 64 blocks of a row."""
    blocks = K // 64
    few, wide = N <= 4096, K > 8192  # few programs, each with much to read: more warps share their rows
    warps = math.gcd((16 if tiles == 1 else 8) if few and wide else 4, blocks)
    wish = 1 if few and wide and tiles == 1 else 4
    ahead = next(n for n in (wish, 4, 2, 3, 1) if blocks % (warps * n) == 0)
    return 1, ahead, warps


MOST_ROWS = 64  # of x; beyond, decoding into a buffer and a plain product is faster (LOG.md)


def permute_table(code: Tensor) -> Tensor:
    """(2, 8, 32) int32 from a 16-entry code: for bfloat16 and float16, four words of low bytes and four of high bytes.

    Each word is there once a lane: were it one for all, the compiler would keep it in a uniform register, which prmt
    cannot read, and copy it at every use.
    """
    shift = torch.tensor([0, 8, 16, 24], dtype=torch.int64, device=code.device)
    rows = []
    for dtype in (torch.bfloat16, torch.float16):
        bits = code.to(dtype).view(torch.int16).to(torch.int64).view(4, 4)
        words = [((bits >> byte & 255) << shift).sum(dim=1) for byte in (0, 8)]
        rows.append(torch.cat(words))
    table = torch.stack(rows)
    table = torch.where(table >= 2**31, table - 2**32, table).to(torch.int32)
    return table[:, :, None].expand(2, 8, 32).contiguous()


# ---- kernel ----
@triton.jit
def _load8(p):
    """8 bytes of codes at address p; they are read once, so the first cache is left to x."""
    return tl.inline_asm_elementwise(
        "ld.global.nc.L1::no_allocate.v2.b32 {$0, $1}, [$2];",
        "=r,=r,l",
        [p],
        dtype=(tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def _load32(p, have):
    """32 bytes of x at address p as eight words, zeros where `have` is 0."""
    return tl.inline_asm_elementwise(
        """{ .reg .pred p; setp.ne.b32 p, $9, 0;
        mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
        mov.b32 $4, 0; mov.b32 $5, 0; mov.b32 $6, 0; mov.b32 $7, 0;
        @p ld.global.v4.b32 {$0, $1, $2, $3}, [$8]; @p ld.global.v4.b32 {$4, $5, $6, $7}, [$8+16]; }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,l,r",
        [p, have],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def _decode8(word, low, high):
    """The eight codes of a word as four pairs of 16 bits, in order: element 2i is the high half of byte i.

    prmt takes three bits a nibble, so each table is asked twice, lower and upper eight entries, and bit 3, spread
    over a byte by prmt's sign mode, selects.
    """
    return tl.inline_asm_elementwise(
        """{ .reg .b32 y, s, t, m, a, b, l, h;
        shl.b32 y, $4, 4; and.b32 s, $4, 0x77777777; shr.u32 t, s, 16;
        prmt.b32 m, y, $4, 0xD9C8;
        prmt.b32 a, $5, $6, s; prmt.b32 b, $7, $8, s; lop3.b32 l, m, b, a, 0xCA;
        prmt.b32 a, $9, $10, s; prmt.b32 b, $11, $12, s; lop3.b32 h, m, b, a, 0xCA;
        prmt.b32 $0, l, h, 0x4051; prmt.b32 $1, l, h, 0x6273;
        prmt.b32 m, y, $4, 0xFBEA;
        prmt.b32 a, $5, $6, t; prmt.b32 b, $7, $8, t; lop3.b32 l, m, b, a, 0xCA;
        prmt.b32 a, $9, $10, t; prmt.b32 b, $11, $12, t; lop3.b32 h, m, b, a, 0xCA;
        prmt.b32 $2, l, h, 0x4051; prmt.b32 $3, l, h, 0x6273; }""",
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
        [word, low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, HALF: tl.constexpr):
    """c + a b of one warp: a 16 rows x 16 k, b 16 k x 8 tokens, c float32."""
    if HALF:
        return tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )
    else:
        return tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )


@triton.jit
def _fetch(
    qs,
    ss,
    absmax_ptr,
    absmax2_ptr,
    base,
    AHEAD: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
):
    """What a thread needs of AHEAD blocks: for each and each row, two words of codes and the scale (nested: its byte
    and its own scale)."""
    held = ()
    for i in tl.static_range(AHEAD):
        for j in tl.static_range(len(qs)):
            w0, w1 = _load8((qs[j] + base * 32 + i * WARPS * 32).to(tl.int64))
            at = (ss[j] + base + i * WARPS) // (BLOCK // 64)
            s = tl.load(absmax_ptr + at)
            s2 = s
            if NESTED:
                s2 = tl.load(absmax2_ptr + at // 256)
            held = held + (w0, w1, s, s2)
    return held


@triton.jit
def _scale(s, s2, map_ptr, offset, NESTED: tl.constexpr):
    """The float32 scale of a block; nested: a product, then a sum."""
    if NESTED:
        return tl.load(map_ptr + s.to(tl.int32)) * s2 + offset
    else:
        return s


@triton.jit
def _work(
    acc, held, xs, have, base, warp, low, high, map_ptr, offset, zero,
    BLOCKS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, AHEAD: tl.constexpr, WARPS: tl.constexpr,
    NESTED: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """acc with the products of AHEAD blocks added: for each 16 rows and each 8 tokens, the four sums of a thread."""
    for i in tl.static_range(AHEAD):
        x = ()
        for n in tl.static_range(TILES):
            x = x + _load32((xs[n] + base * 64 + i * WARPS * 64).to(tl.int64), have[n])
        new = ()
        for r in tl.static_range(ROWS):
            a00, a02, a10, a12 = _decode8(held[8 * (i * ROWS + r)], low, high)
            a20, a22, a30, a32 = _decode8(held[8 * (i * ROWS + r) + 1], low, high)
            a01, a03, a11, a13 = _decode8(held[8 * (i * ROWS + r) + 4], low, high)
            a21, a23, a31, a33 = _decode8(held[8 * (i * ROWS + r) + 5], low, high)
            s0 = _scale(held[8 * (i * ROWS + r) + 2], held[8 * (i * ROWS + r) + 3], map_ptr, offset, NESTED)
            s1 = _scale(held[8 * (i * ROWS + r) + 6], held[8 * (i * ROWS + r) + 7], map_ptr, offset, NESTED)
            for n in tl.static_range(TILES):
                c0, c1, c2, c3 = _mma(a00, a01, a02, a03, x[8 * n], x[8 * n + 1], zero, zero, zero, zero, HALF)
                c0, c1, c2, c3 = _mma(a10, a11, a12, a13, x[8 * n + 2], x[8 * n + 3], c0, c1, c2, c3, HALF)
                c0, c1, c2, c3 = _mma(a20, a21, a22, a23, x[8 * n + 4], x[8 * n + 5], c0, c1, c2, c3, HALF)
                c0, c1, c2, c3 = _mma(a30, a31, a32, a33, x[8 * n + 6], x[8 * n + 7], c0, c1, c2, c3, HALF)
                new = new + (
                    acc[4 * (r * TILES + n)] + c0 * s0,
                    acc[4 * (r * TILES + n) + 1] + c1 * s0,
                    acc[4 * (r * TILES + n) + 2] + c2 * s1,
                    acc[4 * (r * TILES + n) + 3] + c3 * s1,
                )
        acc = new
    return acc


@triton.jit
def _mma_kernel(
    x_ptr,  # (M, K) bf16 or f16
    q_ptr,  # (N K / 2,) u8
    absmax_ptr,  # (N K / block,) f32, or u8 where nested
    map_ptr, absmax2_ptr, offset_ptr,  # (256,) f32, (N K / block / 256,) f32, (1,) f32
    table_ptr,  # (8, 32) i32 of permute_table
    bias_ptr,  # (N,)
    xa_ptr, b_ptr,  # (M, R) f32, (N, R): the low-rank update, s already in xa
    y_ptr,  # (M, N)
    M, N,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    BIAS: tl.constexpr,
    R: tl.constexpr,  # 0: no update
    R2: tl.constexpr,  # R up to a power of two
    HALF: tl.constexpr,
    TILES: tl.constexpr,  # of 8 tokens each
    ROWS: tl.constexpr,  # groups of 16 rows that a program takes
    AHEAD: tl.constexpr,  # blocks of 64 that a warp has under way while it works on as many
    WARPS: tl.constexpr,
    EARLY: tl.constexpr,  # start before the launch before this one ends, and wait for it only where x is read
):  # fmt: skip
    thread = tl.arange(0, 32 * WARPS)
    warp = thread // 32
    g, t = thread % 32 // 4, thread % 4
    BLOCKS: tl.constexpr = K // 64
    STEP: tl.constexpr = WARPS * AHEAD
    LAST: tl.constexpr = BLOCKS - STEP
    qs, ss = (), ()
    for i in tl.static_range(2 * ROWS):  # rows beyond the last read the last, and are not stored
        row = tl.program_id(0) * (16 * ROWS) + 8 * i + g
        first = tl.minimum(row, N - 1).to(tl.int64) * K + warp * 64
        qs = qs + (q_ptr + first // 2 + t * 8,)
        ss = ss + (first // 64,)
    held = _fetch(qs, ss, absmax_ptr, absmax2_ptr, 0, AHEAD, WARPS, BLOCK, NESTED)
    entry = table_ptr + thread % 32
    low = (tl.load(entry), tl.load(entry + 32), tl.load(entry + 64), tl.load(entry + 96))
    high = (tl.load(entry + 128), tl.load(entry + 160), tl.load(entry + 192), tl.load(entry + 224))
    offset = 0.0
    if NESTED:
        offset = tl.load(offset_ptr)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(1) * (8 * TILES) + g
    xs, have = (), ()
    for n in tl.static_range(TILES):
        xs = xs + (x_ptr + (token + 8 * n).to(tl.int64) * K + warp * 64 + t * 16,)
        have = have + ((token + 8 * n < M).to(tl.int32),)
    zero = tl.zeros((32 * WARPS,), tl.float32)
    acc = (zero, zero, zero, zero) * (TILES * ROWS)
    for base in range(0, LAST, STEP):
        now = held
        held = _fetch(qs, ss, absmax_ptr, absmax2_ptr, base + STEP, AHEAD, WARPS, BLOCK, NESTED)
        acc = _work(
            acc,
            now,
            xs,
            have,
            base,
            warp,
            low,
            high,
            map_ptr,
            offset,
            zero,
            BLOCKS,
            ROWS,
            TILES,
            AHEAD,
            WARPS,
            NESTED,
            HALF,
        )
    acc = _work(
        acc,
        held,
        xs,
        have,
        LAST,
        warp,
        low,
        high,
        map_ptr,
        offset,
        zero,
        BLOCKS,
        ROWS,
        TILES,
        AHEAD,
        WARPS,
        NESTED,
        HALF,
    )
    lane = tl.arange(0, 128) // 4
    high, odd = tl.arange(0, 128) % 4 // 2, tl.arange(0, 128) % 2
    for r in tl.static_range(ROWS):
        for n in tl.static_range(TILES):
            four = tl.join(
                tl.join(acc[4 * (r * TILES + n)], acc[4 * (r * TILES + n) + 2]),
                tl.join(acc[4 * (r * TILES + n) + 1], acc[4 * (r * TILES + n) + 3]),
            )  # (T, j // 2, j % 2)
            y = tl.sum(tl.reshape(four, (WARPS, 128)), axis=0)
            row = (tl.program_id(0) * ROWS + r) * 16 + lane // 4 + high * 8
            m = (tl.program_id(1) * TILES + n) * 8 + lane % 4 * 2 + odd
            inside = (row < N) & (m < M)
            if BIAS:
                y += tl.load(bias_ptr + row, mask=inside, other=0.0).to(tl.float32)
            if R:
                k = tl.arange(0, R2)[None, :]
                keep = inside[:, None] & (k < R)
                b = tl.load(b_ptr + row.to(tl.int64)[:, None] * R + k, mask=keep, other=0.0).to(tl.float32)
                xa = tl.load(xa_ptr + m[:, None] * R + k, mask=keep, other=0.0)
                y += tl.sum(b * xa, axis=1)
            tl.store(y_ptr + m.to(tl.int64) * N + row, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _down_kernel(
    x_ptr, a_ptr, y_ptr,  # (M, K), (R, K), (M, R) f32
    s, M, R, K,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """s x aᵀ: one program a row of a and ROWS rows of x."""
    r = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for base in range(0, K, BLOCK):
        k = base + tl.arange(0, BLOCK)
        a = tl.load(a_ptr + r * K + k, mask=k < K, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + m.to(tl.int64)[:, None] * K + k, mask=(m[:, None] < M) & (k < K), other=0.0)
        acc += x.to(tl.float32) * a
    tl.store(y_ptr + m * R + r, tl.sum(acc, axis=1) * s, mask=m < M)


# ---- launch ----
def can_gemv4(x: Tensor, q: Tensor, block: int, K: int) -> bool:
    """Whether `gemv4` takes rows x (M, K): on a GPU, few rows of 16 bits, K and blocks in runs of 64."""
    few = 0 < x.numel() <= MOST_ROWS * K
    return few and K % 64 == 0 and block >= 64 and x.dtype in (torch.bfloat16, torch.float16) and use_triton(x, q)


def gemv4(
    x: Tensor,
    q: Tensor,
    scales: Sequence[Tensor],
    table: Tensor,
    block: int,
    N: int,
    bias: Tensor | None = None,
    low: tuple[Tensor, Tensor, float] | None = None,
    early: bool = False,
) -> Tensor:
    """y (M, N) in the dtype of x (M, K), contiguous; `table` of permute_table; scales and low as `linear4` takes them.

    Only where `can_gemv4` says so.  `early` lets the weight be fetched while the launch before this one still runs
    (programmatic dependent launch): only for weights that were complete before that launch.
    """
    if x.ndim != 2 or not x.is_contiguous() or x.shape[1] * N > 2 * q.numel():
        raise ValueError(
            f"x of shape {tuple(x.shape)} and {q.numel()} bytes of codes: wanted (M, K), and N K / 2 bytes"
        )
    a, b, s = low or (None, None, 0.0)
    xa = None if a is None else _down(x, a, s)
    return _gemv4(x, q, list(scales), table, block, N, bias, xa, b, early)


@torch.library.custom_op("lora::down", mutates_args=())
def _down(x: Tensor, a: Tensor, s: float) -> Tensor:
    """s x aᵀ (M, R) float32."""
    (M, K), R = x.shape, a.shape[0]
    y = torch.empty(M, R, dtype=torch.float32, device=x.device)
    rows = min(16, triton.next_power_of_2(M))
    with torch.cuda.device_of(x):
        _down_kernel[(R, triton.cdiv(M, rows))](x, a, y, s, M, R, K, ROWS=rows, BLOCK=max(256, 4096 // rows))
    return y


@_down.register_fake
def _(x, a, s):
    return x.new_empty(x.shape[0], a.shape[0], dtype=torch.float32)


@torch.library.custom_op("lora::gemv4", mutates_args=())
def _gemv4(
    x: Tensor,
    q: Tensor,
    scales: list[Tensor],
    table: Tensor,
    block: int,
    N: int,
    bias: Tensor | None,
    xa: Tensor | None,
    b: Tensor | None,
    early: bool,
) -> Tensor:
    M, K = x.shape
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    half = x.dtype == torch.float16
    tiles = 1 if M <= 8 else 2 if M <= 16 else 4
    rows, ahead, warps = plan(N, K, tiles)
    nested = len(scales) > 1
    absmax, code, absmax2, offset = scales if nested else (scales[0], scales[0], scales[0], scales[0])
    R = 0 if xa is None else xa.shape[1]
    early = early and not INTERPRETED
    launch = {"launch_pdl": True} if early else {}
    with torch.cuda.device_of(x):
        _mma_kernel[(triton.cdiv(N, 16 * rows), triton.cdiv(M, 8 * tiles))](
            x, q, absmax, code, absmax2, offset, table[int(half)], x if bias is None else bias,
            x if xa is None else xa, x if b is None else b, y, M, N,
            K=K, BLOCK=block, NESTED=nested, BIAS=bias is not None, R=R, R2=triton.next_power_of_2(max(R, 1)),
            HALF=half, TILES=tiles, ROWS=rows, AHEAD=ahead, WARPS=warps, EARLY=early, num_warps=warps, **launch,
        )  # fmt: skip
    return y


@_gemv4.register_fake
def _(x, q, scales, table, block, N, bias, xa, b, early):
    return x.new_empty(x.shape[0], N)
