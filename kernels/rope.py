"""Rotary position embedding: each pair (x_i, x_{i+D/2}) is turned by the angle position * inv_freq_i.

    y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin          (halves, not neighbours: the layout of
                                                               Hugging Face checkpoints)
The backward is the same turn by the opposite angle, so only cos and sin are kept.  Queries and keys turn in one
launch.  The kernel computes in float32 and rounds once; the twin rounds after the product and after the sum.

Bytes that must move: each head once in, once out.  For 8192 tokens of 32 + 8 heads of 128 in bfloat16, 168 MB
either way: 0.056 ms at 3.0 TB/s.
Source: arXiv:2104.09864; transformers' apply_rotary_pos_emb, whose numbers it matches.
"""

import torch
from torch import Tensor

from lora.kernels._triton import tl, triton
from lora.kernels.dispatch import use_triton
from lora.kernels.op import op


# ---- reference ----
def turn_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half:]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(x1, cos, out=y[..., :half]).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=y[..., half:]).addcmul_(x1, sin)
    return y


# ---- kernel ----
@triton.jit
def _turn_heads(
    x_ptr,  # the row's first head, H heads x_stride_h apart
    y_ptr,  # likewise, D apart
    cos,  # (HEADS, BLOCK_D) f32
    sin,
    first,  # head
    H,
    x_stride_h,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = first + tl.arange(0, HEADS)[:, None]  # (HEADS, 1)
    col = tl.arange(0, BLOCK_D)[None, :]  # (1, BLOCK_D)
    mask = (head < H) & (col < D // 2)
    x_offs = head.to(tl.int64) * x_stride_h + col
    x1 = tl.load(x_ptr + x_offs, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + x_offs + D // 2, mask=mask, other=0.0).to(tl.float32)
    y_offs = head * D + col
    tl.store(y_ptr + y_offs, (x1 * cos - x2 * sin).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + y_offs + D // 2, (x2 * cos + x1 * sin).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _copy_heads(
    x_ptr,  # the row's first head, H heads x_stride_h apart
    y_ptr,  # likewise, D apart
    first,  # head
    H,
    x_stride_h,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = first + tl.arange(0, HEADS)[:, None]  # (HEADS, 1)
    col = tl.arange(0, 2 * BLOCK_D)[None, :]  # (1, 2 BLOCK_D)
    mask = (head < H) & (col < D)
    x = tl.load(x_ptr + head.to(tl.int64) * x_stride_h + col, mask=mask, other=0.0)
    tl.store(y_ptr + head * D + col, x.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _turn_kernel(
    q_ptr,  # (B, T, H_q, D)
    k_ptr,  # (B, T, H_k, D)
    v_ptr,  # (B, T, H_k, D), copied
    q_out_ptr,  # heads D apart
    k_out_ptr,
    v_out_ptr,
    cos_ptr,  # (B or 1, T, D/2)
    sin_ptr,
    T,
    H_q,
    H_k,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    q_out_stride,  # of a token
    k_out_stride,
    v_out_stride,
    cos_stride_b,  # 0 where all of a batch share one table
    cos_stride_t,
    q_blocks,  # blocks of HEADS query heads a row
    k_blocks,  # and of query and key heads
    blocks,  # and of all
    D: tl.constexpr,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    row = pid // blocks  # the blocks of one row are neighbours in time, so they share cos and sin in the cache
    block = pid % blocks
    b = (row // T).to(tl.int64)
    t = (row % T).to(tl.int64)
    col = tl.arange(0, BLOCK_D)[None, :]
    # one row for each head, all the same: loaded so, it lies in the threads as the heads do, 16 bytes at a time,
    # and needs no exchange through shared memory
    table = tl.broadcast_to(b * cos_stride_b + t * cos_stride_t + col, (HEADS, BLOCK_D))
    in_half = tl.broadcast_to(col < D // 2, (HEADS, BLOCK_D))
    cos = tl.load(cos_ptr + table, mask=in_half, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + table, mask=in_half, other=0.0).to(tl.float32)
    if BACK:
        sin = -sin
    if block < q_blocks:
        _turn_heads(
            q_ptr + b * q_stride_b + t * q_stride_t, q_out_ptr + row.to(tl.int64) * q_out_stride,
            cos, sin, block * HEADS, H_q, q_stride_h, D, HEADS, BLOCK_D,
        )  # fmt: skip
    elif block < k_blocks:
        _turn_heads(
            k_ptr + b * k_stride_b + t * k_stride_t, k_out_ptr + row.to(tl.int64) * k_out_stride,
            cos, sin, (block - q_blocks) * HEADS, H_k, k_stride_h, D, HEADS, BLOCK_D,
        )  # fmt: skip
    else:
        _copy_heads(
            v_ptr + b * v_stride_b + t * v_stride_t, v_out_ptr + row.to(tl.int64) * v_out_stride,
            (block - k_blocks) * HEADS, H_k, v_stride_h, D, HEADS, BLOCK_D,
        )  # fmt: skip


# ---- launch ----
def tile(heads: int, block_d: int) -> tuple[int, int]:
    """Heads and warps of a program for rows of `heads` heads whose halves are padded to `block_d`: 8 heads of 128."""
    wanted = max(1, 512 // block_d)
    HEADS = min(wanted, 1 << (heads - 1).bit_length())
    return HEADS, max(1, min(8, HEADS * block_d // 256))


def _launch(xs: list[Tensor], ys: list[Tensor], cos: Tensor, sin: Tensor, back: bool) -> None:
    B, T, _, D = xs[0].shape
    BLOCK_D = triton.next_power_of_2(D // 2)
    (q, k, v), (q_out, k_out, v_out) = ([*ts, *ts[-1:] * (3 - len(ts))] for ts in (xs, ys))
    H_q, H_k = q.shape[2], k.shape[2]
    HEADS, num_warps = tile(max(H_q, H_k), BLOCK_D)
    q_blocks, more = -(-H_q // HEADS), -(-H_k // HEADS)
    k_blocks = q_blocks + (more if len(xs) > 1 else 0)
    blocks = k_blocks + (more if len(xs) > 2 else 0)
    if B * T * blocks:
        with torch.cuda.device_of(q):  # Triton launches on the current device, not on the tensors'
            _turn_kernel[(B * T * blocks,)](
                q, k, v, q_out, k_out, v_out, cos, sin, T, H_q, H_k, *q.stride()[:3], *k.stride()[:3],
                *v.stride()[:3], q_out.stride(1), k_out.stride(1), v_out.stride(1),
                cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1), q_blocks, k_blocks, blocks,
                D=D, BACK=back, HEADS=HEADS, BLOCK_D=BLOCK_D, num_warps=num_warps,
            )  # fmt: skip


@op("lora::rope")
def _turn_op(xs: list[Tensor], cos: Tensor, sin: Tensor, back: bool) -> list[Tensor]:
    ys = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs]
    _launch(xs, ys, cos, sin, back)
    return ys


@op("lora::rope_into", mutates=("ys",))
def _turn_into_op(xs: list[Tensor], ys: list[Tensor], cos: Tensor, sin: Tensor, back: bool) -> None:
    _launch(xs, ys, cos, sin, back)


@_turn_op.register_fake
def _(xs: list[Tensor], cos: Tensor, sin: Tensor, back: bool) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in xs]


def _turn(xs: tuple[Tensor, ...], cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, ...]:
    if not use_triton(*xs, cos, sin):
        return tuple(turn_ref(x, cos, -sin if back else sin) for x in xs)
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:  # one set of strides serves both tables
        cos, sin = cos.contiguous(), sin.contiguous()
    return tuple(_turn_op([x if x.stride(-1) == 1 else x.contiguous() for x in xs], cos, sin, back))


def _check(xs: tuple[Tensor, ...], cos: Tensor, sin: Tensor) -> None:
    for x in xs:
        B, T, _, D = x.shape
        tables = ((1, T, 1, D // 2), (B, T, 1, D // 2))
        if D % 2 or cos.shape != sin.shape or tuple(cos.shape) not in tables:
            raise ValueError(
                f"heads {tuple(x.shape)} got cos {tuple(cos.shape)} and sin {tuple(sin.shape)}; "
                f"an even last axis and two tables (1 or {B}, {T}, 1, {D // 2}) are needed"
            )


def turn_into(
    xs: tuple[Tensor, Tensor],
    ys: tuple[Tensor, Tensor],
    cos: Tensor,
    sin: Tensor,
    back: bool = False,
    beside: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Queries and keys turned, or turned back, into `ys`, which may be `xs` themselves.  No gradient.

    A token's heads lie end to end in `ys`, and tokens one distance apart: columns of one buffer will do.
    `beside` is a source and a place of values, as many heads as the keys', copied in the same launch.
    """
    _check(xs, cos, sin)
    if beside is not None and beside[0].shape != xs[1].shape:
        raise ValueError(f"values are {tuple(beside[0].shape)}; beside keys {tuple(xs[1].shape)} they are as many")
    copied = () if beside is None else (beside,)
    for x, y in (*zip(xs, ys, strict=True), *copied):
        B, T, _, D = y.shape
        if y.shape != x.shape or y.stride()[2:] != (D, 1) or (B > 1 and y.stride(0) != T * y.stride(1)):
            raise ValueError(f"heads {tuple(x.shape)} cannot go into {tuple(y.shape)} with strides {y.stride()}")
    if not use_triton(*xs, *ys, cos, sin, *(t for pair in copied for t in pair)):
        for x, y in zip(xs, ys, strict=True):
            y.copy_(turn_ref(x, cos, -sin if back else sin))
        for x, y in copied:
            y.copy_(x)
        return
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    sources, places = [*xs, *(x for x, _ in copied)], [*ys, *(y for _, y in copied)]
    _turn_into_op([x if x.stride(-1) == 1 else x.contiguous() for x in sources], places, cos, sin, back)


# ---- autograd ----
class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cos, sin, *xs):
        ctx.save_for_backward(cos, sin)
        return _turn(xs, cos, sin, back=False)

    @staticmethod
    def backward(ctx, *grads):
        cos, sin = ctx.saved_tensors
        return None, None, *_turn(grads, cos, sin, back=True)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, D) turned by cos and sin (B or 1, T, 1, D/2), all of one dtype."""
    _check((x,), cos, sin)
    return _Rope.apply(cos, sin, x)[0]


def rope2(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (B, T, H_q, D) and keys (B, T, H_k, D) turned as by `rope`, in one launch."""
    _check((q, k), cos, sin)
    return _Rope.apply(cos, sin, q, k)
