"""RMSNorm: y = w * (x / sqrt(mean(x²) + eps)), the mean over the last axis, in float32 whatever x is.

The normalised value is rounded to the dtype of x before it meets w, as in Llama's published code.
    dx = r (g - x r² mean(g x)),  g = dy w,  r = 1 / sqrt(mean(x²) + eps)         dw = Σ dy x r
With a residual the sum s = x + residual is normalised and given back too; its own gradient ds joins dx in the
same pass, and x and residual get the same gradient.  Kept for the backward: s (or x) and r, one float32 a row.

Bytes that must move, in tensors of M x d: forward 2, with a residual 4; backward 3, with a residual 4.  For
8192 x 4096 in bfloat16 (67 MB a tensor) at 3.0 TB/s: 0.045 and 0.089 ms; 0.067 and 0.089 ms.
Source: arXiv:1910.07467, and transformers' LlamaRMSNorm, whose numbers it matches.
"""

import torch
from torch import Tensor

from lora.kernels._triton import tl, triton
from lora.kernels.dispatch import stages, use_triton
from lora.kernels.op import op

WIDEST = 65536  # values of a row: one program holds a whole row


# ---- reference ----
def _forward_ref(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x32 = x.float()
    r = torch.rsqrt(x32.square().mean(dim=-1, keepdim=True).add_(eps))  # (..., 1)
    return (x32 * r).to(x.dtype).mul_(w) if w.dtype == x.dtype else (x32 * r).to(x.dtype) * w, r


def _backward_ref(
    dy: Tensor | None, ds: Tensor | None, x: Tensor, w: Tensor, r: Tensor, want_dx: bool, want_dw: bool
) -> tuple[Tensor | None, Tensor | None]:
    if dy is None:  # only the sum was used
        return ds, torch.zeros_like(w) if want_dw else None
    x32 = x.float()
    g = dy.float() * w.float()
    dx = dw = None
    if want_dx:
        c = (g * x32).mean(dim=-1, keepdim=True).mul_(r.square()).neg_()  # (..., 1)
        dx = torch.addcmul(g, x32, c).mul_(r)
        dx = (dx if ds is None else dx.add_(ds)).to(x.dtype)
    if want_dw:
        dw = (dy.float() * (x32 * r)).flatten(0, -2).sum(dim=0).to(w.dtype)
    return dx, dw


# ---- kernel ----
@triton.jit
def _forward_kernel(
    x_ptr,  # (M, D)
    residual_ptr,  # (M, D), read only with ADD
    w_ptr,  # (D,)
    y_ptr,  # (M, D)
    sum_ptr,  # (M, D) contiguous, written only with ADD
    twice_ptr,  # (M, D) contiguous, the same once more with TWICE
    r_ptr,  # (M,) f32
    M,
    x_stride_m,
    residual_stride_m,
    y_stride_m,
    eps,
    D: tl.constexpr,
    ADD: tl.constexpr,
    TWICE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1) int64
    col = tl.arange(0, BLOCK_D)[None, :]  # (1, BLOCK_D)
    mask = (row < M) & (col < D)
    x = tl.load(x_ptr + row * x_stride_m + col, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        residual = tl.load(residual_ptr + row * residual_stride_m + col, mask=mask, other=0.0).to(tl.float32)
        rounded = (x + residual).to(sum_ptr.dtype.element_ty)  # what is normalised is what is given back
        tl.store(sum_ptr + row * D + col, rounded, mask=mask)
        if TWICE:
            tl.store(twice_ptr + row * D + col, rounded, mask=mask)
        x = rounded.to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / D + eps)  # (ROWS, 1)
    tl.store(r_ptr + row, r, mask=row < M)
    w = tl.load(w_ptr + col, mask=col < D, other=0.0).to(tl.float32)
    y = (x * r).to(x_ptr.dtype.element_ty).to(tl.float32) * w
    tl.store(y_ptr + row * y_stride_m + col, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr,  # (M, D)
    ds_ptr,  # (M, D), read only with ADD
    x_ptr,  # (M, D) what was normalised
    w_ptr,  # (D,)
    r_ptr,  # (M,) f32
    dx_ptr,  # (M, D)
    dw_ptr,  # (programs, D) f32 partial sums, written only with DW
    M,
    steps,  # blocks of ROWS rows a program
    dy_stride_m,
    ds_stride_m,
    x_stride_m,
    dx_stride_m,
    D: tl.constexpr,
    ADD: tl.constexpr,
    DW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,  # steps whose rows are on their way or at work at once
):
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    col = tl.arange(0, BLOCK_D)[None, :]  # (1, BLOCK_D)
    w = tl.load(w_ptr + col, mask=col < D, other=0.0).to(tl.float32)
    dw = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        block = (step * programs + pid).to(tl.int64)
        row = block * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1) int64
        mask = (row < M) & (col < D)
        x = tl.load(x_ptr + row * x_stride_m + col, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride_m + col, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + row, mask=row < M, other=0.0)  # (ROWS, 1)
        g = dy * w
        c = tl.sum(g * x, axis=1, keep_dims=True) / D * (r * r)
        dx = (g - x * c) * r
        if ADD:
            dx += tl.load(ds_ptr + row * ds_stride_m + col, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * dx_stride_m + col, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if DW:
            dw += dy * (x * r)
    if DW:
        out = tl.arange(0, BLOCK_D)
        tl.store(dw_ptr + pid.to(tl.int64) * D + out, tl.sum(dw, axis=0), mask=out < D)


@triton.jit
def _sum_kernel(
    part_ptr,  # (P, D) f32
    dw_ptr,  # (D,)
    P,
    D,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    col = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    for start in range(0, P, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        acc += tl.load(part_ptr + row * D + col[None, :], mask=(row < P) & (col[None, :] < D), other=0.0)
    tl.store(dw_ptr + col, tl.sum(acc, axis=0).to(dw_ptr.dtype.element_ty), mask=col < D)


# ---- launch ----
def forward_tile(block_d: int) -> tuple[int, int]:
    """Rows and warps of a program whose rows are padded to `block_d`: about 4096 values, 32 a thread."""
    rows = max(1, min(32, 4096 // block_d))
    return rows, max(1, min(32, rows * block_d // 1024))


def backward_tile(block_d: int, want_dw: bool) -> tuple[int, int]:
    """The same of a backward; where dw is summed about 8192 values, while the next rows are on their way."""
    if not want_dw:
        return forward_tile(block_d)
    rows = max(1, min(32, 8192 // block_d))
    return rows, max(1, min(32, rows * block_d // 1024))


def programs_of(blocks: int, want_dw: bool) -> int:
    """Programs of a backward over `blocks` blocks of rows: one each, or one a multiprocessor where each sums dw.

    The count of an H100, on every card: it decides what is added to what.
    """
    return min(blocks, 132) if want_dw else blocks


def _rows(x: Tensor) -> Tensor:
    """x as (M, d) with neighbours of a row side by side: a view wherever there is one."""
    x = x.reshape(x.numel() // max(x.shape[-1], 1), x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _launch_forward(
    x: Tensor,
    residual: Tensor | None,
    w: Tensor,
    eps: float,
    out: Tensor | None = None,
    twice: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    # results are born in their shape: a view out of an autograd function may not be changed in place
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, w.dtype), device=x.device) if out is None else out
    s = torch.empty(x.shape if residual is not None else (0,), dtype=x.dtype, device=x.device)
    r = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if x.numel():
        x, w = _rows(x), w.contiguous()
        added = x if residual is None else _rows(residual)
        M, d = x.shape
        BLOCK_D = triton.next_power_of_2(d)
        ROWS, num_warps = forward_tile(BLOCK_D)
        with torch.cuda.device_of(x):  # Triton launches on the current device, not on the tensors'
            _forward_kernel[(-(-M // ROWS),)](
                x, added, w, y, s, s if twice is None else twice, r, M, x.stride(0), added.stride(0),
                y.stride(-2) if y.dim() > 1 else d, eps,
                D=d, ADD=residual is not None, TWICE=twice is not None, ROWS=ROWS, BLOCK_D=BLOCK_D,
                num_warps=num_warps,
            )  # fmt: skip
    return y, s, r


@op("lora::rms_norm")
def _forward_op(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, _, r = _launch_forward(x, None, w, eps)
    return y, r


@_forward_op.register_fake
def _(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, w.dtype))
    return y, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@op("lora::rms_norm_add")
def _forward_add_op(x: Tensor, residual: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _launch_forward(x, residual, w, eps)


@_forward_add_op.register_fake
def _(x: Tensor, residual: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, w.dtype))
    return y, x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@op("lora::rms_norm_into", mutates=("out", "twice"))
def _forward_into_op(
    x: Tensor, residual: Tensor | None, w: Tensor, eps: float, out: Tensor, twice: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _launch_forward(x, residual, w, eps, out, twice)[1:]


@_forward_into_op.register_fake
def _(
    x: Tensor, residual: Tensor | None, w: Tensor, eps: float, out: Tensor, twice: Tensor | None
) -> tuple[Tensor, Tensor]:
    s = x.new_empty(x.shape if residual is not None else (0,))
    return s, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _launch_backward(
    dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor, r: Tensor, want_dw: bool, dx: Tensor
) -> Tensor:
    """Writes dx, returns dw in the dtype of w (nothing in it unless wanted)."""
    d = x.shape[-1]
    if not x.numel():
        return torch.zeros(d if want_dw else 0, dtype=w.dtype, device=x.device)
    dy, x, w = _rows(dy), _rows(x), w.contiguous()
    added = dy if ds is None else _rows(ds)
    BLOCK_D = triton.next_power_of_2(d)
    ROWS, num_warps = backward_tile(BLOCK_D, want_dw)
    blocks = -(-x.shape[0] // ROWS)
    steps = -(-blocks // programs_of(blocks, want_dw))
    programs = -(-blocks // steps)
    part = torch.empty((programs if want_dw else 0, d), dtype=torch.float32, device=x.device)
    dw = torch.empty(d if want_dw else 0, dtype=w.dtype, device=x.device)
    nbytes = ROWS * BLOCK_D * (dy.element_size() + x.element_size() + (0 if ds is None else added.element_size()))
    with torch.cuda.device_of(x):
        _backward_kernel[(programs,)](
            dy, added, x, w, r.contiguous(), dx, part, x.shape[0], steps,
            dy.stride(0), added.stride(0), x.stride(0), dx.stride(-2) if dx.dim() > 1 else d,
            D=d, ADD=ds is not None, DW=want_dw, ROWS=ROWS, BLOCK_D=BLOCK_D,
            STAGES=stages(nbytes, x.device) if want_dw else 1, num_warps=num_warps,
        )  # fmt: skip
        if want_dw:
            _sum_kernel[(-(-d // 16),)](part, dw, programs, d, ROWS=64, BLOCK_D=16, num_warps=4)
    return dw


@op("lora::rms_norm_backward")
def _backward_op(
    dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor, r: Tensor, want_dw: bool
) -> tuple[Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, _launch_backward(dy, ds, x, w, r, want_dw, dx)


@op("lora::rms_norm_backward_into", mutates=("dx",))
def _backward_into_op(dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor, r: Tensor, dx: Tensor) -> None:
    _launch_backward(dy, ds, x, w, r, False, dx)


@_backward_op.register_fake
def _(dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor, r: Tensor, want_dw: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), w.new_empty(x.shape[-1] if want_dw else 0)


def rms_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    w: Tensor,
    eps: float,
    out: Tensor | None = None,
    twice: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, what was normalised (x itself, or x + residual) and r (..., 1) float32, for `rms_norm_backward`.

    y goes into `out` where given: (M, d) for x (M, d), of any row stride.  With `out` and a residual the sum goes into
    `twice` (M, d) too, where given, which may be the residual: for a product that adds to it in place.
    """
    d = x.shape[-1]
    if w.shape != (d,):
        raise ValueError(f"RMSNorm over rows of {d} values got a weight {tuple(w.shape)}; it must be ({d},)")
    if twice is not None and (
        out is None or residual is None or (twice.shape, twice.dtype) != (x.shape, x.dtype) or not twice.is_contiguous()
    ):
        raise ValueError(
            f"a second sum {tuple(twice.shape)} {twice.dtype} was asked for; it needs a residual, `out`, and the shape "
            f"and dtype of x, {tuple(x.shape)} {x.dtype}, without gaps"
        )
    if not use_triton(x, w, *(t for t in (residual, out, twice) if t is not None)):
        s = x if residual is None else x + residual
        if twice is not None:
            twice.copy_(s)
        y, r = _forward_ref(s, w, eps)
        return (y if out is None else out.copy_(y)), s, r
    if d > WIDEST:
        raise ValueError(f"RMSNorm over rows of {d} values: its kernel holds a row in one program, at most {WIDEST}")
    if out is not None:
        if x.dim() != 2 or out.shape != x.shape or out.stride(1) != 1:
            raise ValueError(f"x is {tuple(x.shape)}, out {tuple(out.shape)}; both must be (M, d), out in whole rows")
        s, r = _forward_into_op(x, residual, w, eps, out, twice)
        return out, x if residual is None else s, r
    if residual is not None:
        return _forward_add_op(x, residual, w, eps)
    y, r = _forward_op(x, w, eps)
    return y, x, r


def rms_norm_backward(
    dy: Tensor | None,
    ds: Tensor | None,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    want_dx: bool = True,
    want_dw: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """dx and dw from the gradient dy of y and, with a residual, the gradient ds of the sum; x and r of the forward."""
    if dy is None or not use_triton(dy, x, w, r, *(() if ds is None else (ds,))):
        return _backward_ref(dy, ds, x, w, r, want_dx, want_dw)
    dx, dw = _backward_op(dy, ds, x, w, r, want_dw)
    return dx if want_dx else None, dw if want_dw else None


def rms_norm_backward_into(dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor, r: Tensor, dx: Tensor) -> None:
    """`rms_norm_backward` of rows (M, d) into `dx`, of any row stride."""
    if dx.shape != x.shape or dx.dim() != 2 or dx.stride(1) != 1 or dx.dtype != x.dtype:
        raise ValueError(f"dx is {dx.dtype} {tuple(dx.shape)}; it must be {x.dtype} {tuple(x.shape)}, (M, d)")
    if use_triton(dy, x, w, r, dx, *(() if ds is None else (ds,))):
        _backward_into_op(dy, ds, x, w, r, dx)
        return
    made, _ = _backward_ref(dy, ds, x, w, r, True, False)
    assert made is not None
    dx.copy_(made)


# ---- autograd ----
class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, eps):
        y, _, r = rms_norm_forward(x, None, w, eps)
        ctx.save_for_backward(x, w, r)
        return y

    @staticmethod
    def backward(ctx, *grads):
        (dy,) = grads
        x, w, r = ctx.saved_tensors
        want_dx, want_dw, _ = ctx.needs_input_grad
        dx, dw = rms_norm_backward(dy, None, x, w, r, want_dx, want_dw)
        return dx, dw, None


class _RMSNormAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, w, eps):
        y, s, r = rms_norm_forward(x, residual, w, eps)
        ctx.save_for_backward(s, w, r)
        ctx.set_materialize_grads(False)  # the last layer's sum is used nowhere else
        return y, s

    @staticmethod
    def backward(ctx, *grads):
        dy, ds = grads
        s, w, r = ctx.saved_tensors
        want_x, want_residual, want_dw, _ = ctx.needs_input_grad
        dx, dw = rms_norm_backward(dy, ds, s, w, r, want_x or want_residual, want_dw)
        return dx if want_x else None, dx if want_residual else None, dw, None


def rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """RMSNorm of x (..., d) with weight w (d,)."""
    return _RMSNorm.apply(x, w, eps)


def rms_norm_add(x: Tensor, residual: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of x + residual, both (..., d) and of one dtype, with weight w (d,); and x + residual."""
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(
            f"x is {tuple(x.shape)} {x.dtype}, residual {tuple(residual.shape)} {residual.dtype}; "
            "their sum needs one shape and one dtype"
        )
    return _RMSNormAdd.apply(x, residual, w, eps)
