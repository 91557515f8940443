"""Instructions that Triton has no word for, a thread at a time: what gemv4.py is written in.

Tensors have one element a thread, in thread order, because `mma` and shuffles want their operands in given lanes.
A warp keeps a ring of its own in shared memory: bytes are copied into it by cp.async, which holds no register while
they are under way, and no other warp is waited for.  Source: PTX ISA 8.4: cp.async, prmt, shfl, mma.m16n8k16.
"""

import torch
from torch import Tensor

from lora.kernels._triton import tl, triton

RING = 32768  # bytes of shared memory a program: static memory ends at 48 KB, and Triton's own sums need some


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


@triton.jit
def ring(like):
    """The address of RING bytes of shared memory, the same in every thread; once a kernel."""
    return tl.inline_asm_elementwise(
        ".shared .align 128 .b8 lora_ring[32768]; mov.u32 $0, lora_ring; // $1",
        "=r,r",
        [like],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def copy16(to, p):
    """16 bytes from address p of global memory to address `to` of shared memory, later; past the first cache."""
    return tl.inline_asm_elementwise(
        "cp.async.cg.shared.global.L2::128B [$1], [$2], 16; mov.b32 $0, 0;",
        "=r,r,l",
        [to, p],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def commit(like):
    """The copies so far, and since the last commit, are one group."""
    return tl.inline_asm_elementwise(
        "cp.async.commit_group; mov.b32 $0, 0; // $1", "=r,r", [like], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def arrived(like, LATER: tl.constexpr):
    """Waits until at most LATER groups of this warp's copies are under way, and for its other lanes."""
    if LATER == 0:
        return tl.inline_asm_elementwise(
            "cp.async.wait_group 0; bar.warp.sync 0xffffffff; mov.b32 $0, 0; // $1",
            "=r,r", [like], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    elif LATER == 1:
        return tl.inline_asm_elementwise(
            "cp.async.wait_group 1; bar.warp.sync 0xffffffff; mov.b32 $0, 0; // $1",
            "=r,r", [like], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    elif LATER == 2:
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
def read8(at):
    """8 bytes at address `at` of shared memory and 8 more 1024 bytes on, as four words."""
    return tl.inline_asm_elementwise(
        "ld.shared.v2.b32 {$0, $1}, [$4]; ld.shared.v2.b32 {$2, $3}, [$4+1024];",
        "=r,=r,=r,=r,r",
        [at],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


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
