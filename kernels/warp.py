"""Instructions that Triton has no word for, a thread at a time: what gemv4.py is written in.

Tensors have one element a thread, in thread order, because `mma` and shuffles want their operands in given lanes.
Source: PTX ISA 8.4: ld, prmt, shfl, mma.m16n8k16.
"""

from typing import Any

import torch
from torch import Tensor

from lora.kernels._triton import tl, triton

PAIRS = 256 * 16 * 4  # bytes of shared memory: for each byte of codes its two values, once for every two lanes


def permute_table(code: Tensor) -> Tensor:
    """(2, 9, 32) int32 from a 16-entry code, for bfloat16 and float16: four words of low bytes and four of high bytes
    of `stretch` times the code, and the float32 bits of 1 / stretch.

    Each word is there once a lane: were it one for all, the compiler would keep it in a uniform register, which prmt
    cannot read, and copy it at every use.
    """
    exact = code.detach().double().cpu()
    shift = torch.tensor([0, 8, 16, 24], dtype=torch.int64, device=exact.device)
    rows = []
    for dtype in (torch.bfloat16, torch.float16):
        by = stretch(exact, dtype)
        bits = (exact * by).to(dtype).view(torch.int16).to(torch.int64).view(4, 4)
        words = [((bits >> byte & 255) << shift).sum(dim=1) for byte in (0, 8)]
        rows.append(torch.cat((*words, (1.0 / by).float().view(torch.int32).to(torch.int64))))
    table = torch.stack(rows)
    table = torch.where(table >= 2**31, table - 2**32, table).to(torch.int32)
    return table[:, :, None].expand(2, 9, 32).contiguous().to(code.device)


def stretch(code: Tensor, dtype: torch.dtype) -> Tensor:
    """A factor (1,) from 1 to 2 times which a code (16,) float64 loses least by rounding to `dtype`.

    Every weight of one code has the same error.  NF4's, rounded as they are, are too large by 2e-4 of a block's scale
    on the average, and that adds up over inputs whose mean is not 0: six times the error of a rounded weight where the
    mean is as large as the spread.  So the mean counts 64 times, as over 4096 such inputs, and is taken over codes as
    frequent as those of normal weights, and of weights with wider and with narrower tails.
    """
    here: Any = {"dtype": torch.float64, "device": code.device}
    by = 1.0 + torch.arange(1024, **here) / 1024
    error = (code * by[:, None]).to(dtype).double() / by[:, None] - code  # (1024, 16)
    order = code.argsort()
    middle = (code[order][1:] + code[order][:-1]) / 2
    below = torch.special.ndtr(torch.tensor([2.4, 1.5, 4.0], **here)[:, None] * middle)
    often = torch.diff(below, prepend=torch.zeros(3, 1, **here), append=torch.ones(3, 1, **here))
    often = often[:, order.argsort()]  # (3, 16)
    cost = error**2 @ often[0] + (64 * (error @ often.T).abs().amax(dim=1)) ** 2
    return by.index_select(0, cost.argmin(dim=0, keepdim=True))


@triton.jit
def load32(p, have):
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
def from_lane(value, lane):
    """The float32 `value` of another lane of the warp."""
    return tl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;",
        "=f,f,r",
        [value, lane],
        dtype=tl.float32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def sum_parts(value, PARTS: tl.constexpr):
    """The sum of `value` over the lanes that are 32 / PARTS apart; PARTS is 1, 2 or 4."""
    if PARTS == 4:
        return tl.inline_asm_elementwise(
            """{ .reg .f32 a, b; shfl.sync.bfly.b32 a, $1, 8, 31, 0xffffffff; add.f32 a, a, $1;
            shfl.sync.bfly.b32 b, a, 16, 31, 0xffffffff; add.f32 $0, a, b; }""",
            "=f,f", [value], dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip
    elif PARTS == 2:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 a; shfl.sync.bfly.b32 a, $1, 16, 31, 0xffffffff; add.f32 $0, a, $1; }",
            "=f,f", [value], dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return value


@triton.jit
def shared(like):
    """Addresses of shared memory, the same in every thread, once a kernel: PAIRS bytes, two flags, Triton's own."""
    return tl.inline_asm_elementwise(
        ".shared .align 128 .b8 lora_pairs[16384]; .shared .align 8 .b64 lora_flags[2]; "
        "mov.u32 $0, lora_pairs; mov.u32 $1, lora_flags; mov.u32 $2, global_smem; // $3",
        "=r,=r,=r,r",
        [like],
        dtype=(tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def copy16(to, p, have):
    """Sends for 16 bytes at address p, to address `to` of shared memory; not where `have` is 0."""
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p cp.async.cg.shared.global.L2::128B [$1], [$2], 16; mov.b32 $0, 0; }",
        "=r,r,l,r",
        [to, p, have],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def sent(like):
    """Ends a group of copies."""
    return tl.inline_asm_elementwise(
        "cp.async.commit_group; mov.b32 $0, 0; // $1", "=r,r", [like], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def arrived(like, later: tl.constexpr):
    """All groups of copies but the last `later`, 0 to 3, of all lanes of this warp; and all lanes are here."""
    if later == 0:
        return tl.inline_asm_elementwise(
            "cp.async.wait_group 0; bar.warp.sync 0xffffffff; mov.b32 $0, 0; // $1",
            "=r,r", [like], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    elif later == 1:
        return tl.inline_asm_elementwise(
            "cp.async.wait_group 1; bar.warp.sync 0xffffffff; mov.b32 $0, 0; // $1",
            "=r,r", [like], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    elif later == 2:
        return tl.inline_asm_elementwise(
            "cp.async.wait_group 2; bar.warp.sync 0xffffffff; mov.b32 $0, 0; // $1",
            "=r,r", [like], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "cp.async.wait_group 3; bar.warp.sync 0xffffffff; mov.b32 $0, 0; // $1",
            "=r,r", [like], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def start_flags(at, warps):
    """Each of the two flags will be up when `warps` warps have raised it, and then again."""
    return tl.inline_asm_elementwise(
        """{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;
        @p mbarrier.init.shared.b64 [$1], $2; @p mbarrier.init.shared.b64 [$1+8], $2; mov.b32 $0, 0; }""",
        "=r,r,r",
        [at, warps],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def raise_flag(at):
    """This warp is ready: what its lanes have put into shared memory is seen by whoever waits for the flag."""
    return tl.inline_asm_elementwise(
        """{ .reg .pred p; .reg .b32 l; mov.u32 l, %laneid; setp.eq.u32 p, l, 0; bar.warp.sync 0xffffffff;
        @p mbarrier.arrive.shared.b64 _, [$1]; mov.b32 $0, 0; }""",
        "=r,r",
        [at],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def wait_flag(at, phase):
    """Until the flag has been up `phase` + 1 times, counted modulo 2."""
    return tl.inline_asm_elementwise(
        """{ .reg .pred p; WAIT: mbarrier.try_wait.parity.shared.b64 p, [$1], $2; @!p bra WAIT; mov.b32 $0, 0; }""",
        "=r,r,r",
        [at, phase],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def put_same(at, word):
    """One word four times to address `at` of shared memory."""
    return tl.inline_asm_elementwise(
        "st.shared.v4.b32 [$1], {$2, $2, $2, $2}; mov.b32 $0, 0;",
        "=r,r,r",
        [at, word],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def look8(word, at):
    """What `decode8` gives, from the table of pairs that begins, for this lane, at address `at` of shared memory."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 a, b, c, d;
        prmt.b32 a, $4, 0, 0x4440; prmt.b32 b, $4, 0, 0x4441; prmt.b32 c, $4, 0, 0x4442; prmt.b32 d, $4, 0, 0x4443;
        mad.lo.u32 a, a, 64, $5; mad.lo.u32 b, b, 64, $5; mad.lo.u32 c, c, 64, $5; mad.lo.u32 d, d, 64, $5;
        ld.shared.b32 $0, [a]; ld.shared.b32 $1, [b]; ld.shared.b32 $2, [c]; ld.shared.b32 $3, [d]; }""",
        "=&r,=&r,=&r,=&r,r,r",
        [word, at],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def put4(at, a, b, c, d):
    """Four float32 to address `at` of shared memory; returns `at`."""
    return tl.inline_asm_elementwise(
        "st.shared.v4.f32 [$1], {$2, $3, $4, $5}; mov.b32 $0, $1;",
        "=r,r,f,f,f,f",
        [at, a, b, c, d],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def get(at):
    """A float32 from address `at` of shared memory."""
    return tl.inline_asm_elementwise("ld.shared.f32 $0, [$1];", "=f,r", [at], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def get8(at):
    """Two words from address `at` of shared memory."""
    return tl.inline_asm_elementwise(
        "ld.shared.v2.b32 {$0, $1}, [$2];", "=r,=r,r", [at], dtype=(tl.int32, tl.int32), is_pure=False, pack=1
    )


@triton.jit
def decode8(word, low, high):
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
def mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, HALF: tl.constexpr):
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
