"""SwiGLU's gate: h = silu(g) * u, silu(g) = g / (1 + exp(-g)).

    du = dh silu(g)       dg = dh u σ (1 + g (1 - σ)),  σ = 1 / (1 + exp(-g))
Only g and u are kept; silu(g) is made again.  g and u may be the two halves of one (M, 2I) buffer, and so may dg and
du.  The kernel computes in float32 and rounds once.

Bytes that must move, in tensors of M x I: forward 3, backward 5.  For 8192 x 14336 in bfloat16 (235 MB a tensor) at
3.0 TB/s: 0.235 and 0.392 ms.  Source: arXiv:2002.05202.
"""

import torch
from torch import Tensor

from lora.kernels._triton import tl, triton
from lora.kernels.dispatch import use_triton
from lora.kernels.op import op


# ---- reference ----
def _forward_ref(g: Tensor, u: Tensor) -> Tensor:
    return torch.nn.functional.silu(g).mul_(u)


def _backward_ref(dh: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    du = torch.nn.functional.silu(g).mul_(dh)
    return torch.ops.aten.silu_backward(dh * u, g), du


# ---- kernel ----
@triton.jit
def _forward_kernel(
    g_ptr,  # (M, I), as all the others
    u_ptr,
    h_ptr,
    I,
    g_stride_m,
    u_stride_m,
    h_stride_m,
    blocks,  # of a row
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    col = (pid % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # int64: all rows may be one of 2**31 values
    mask = col < I
    g = tl.load(g_ptr + row * g_stride_m + col, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + row * u_stride_m + col, mask=mask, other=0.0).to(tl.float32)
    h = g / (1.0 + tl.exp(-g)) * u
    tl.store(h_ptr + row * h_stride_m + col, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dh_ptr,  # (M, I), as all the others
    g_ptr,
    u_ptr,
    dg_ptr,
    du_ptr,
    I,
    dh_stride_m,
    g_stride_m,
    u_stride_m,
    dg_stride_m,
    du_stride_m,
    blocks,  # of a row
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    col = (pid % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = col < I
    dh = tl.load(dh_ptr + row * dh_stride_m + col, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + row * g_stride_m + col, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + row * u_stride_m + col, mask=mask, other=0.0).to(tl.float32)
    sigma = 1.0 / (1.0 + tl.exp(-g))
    silu = g * sigma
    dg = dh * u * (sigma * (1.0 + g * (1.0 - sigma)))
    tl.store(dg_ptr + row * dg_stride_m + col, dg.to(dg_ptr.dtype.element_ty), mask=mask)
    tl.store(du_ptr + row * du_stride_m + col, (dh * silu).to(du_ptr.dtype.element_ty), mask=mask)


# ---- launch ----
def tile(n: int) -> tuple[int, int]:
    """Values and warps of a program for rows of n values: 8 values (16 bytes of bfloat16) a thread."""
    block = max(32, min(1024, 1 << (n - 1).bit_length()))
    return block, max(1, block // 256)


def _rows(x: Tensor) -> Tensor:
    """x as (M, I) with neighbours of a row side by side: a view wherever there is one."""
    x = x.reshape(x.numel() // max(x.shape[-1], 1), x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _as_rows(inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """All as (M, I), or as one long row where none has gaps; outputs stay views of themselves."""
    if all(t.is_contiguous() for t in (*inputs, *outputs)):
        return [t.view(1, -1) for t in (*inputs, *outputs)]
    return [*(_rows(t) for t in inputs), *(t.view(-1, t.shape[-1]) for t in outputs)]


@op("lora::swiglu", mutates=("h",))
def _forward_op(g: Tensor, u: Tensor, h: Tensor) -> None:
    if not g.numel():
        return
    g, u, out = _as_rows((g, u), (h,))
    M, I = g.shape
    BLOCK, num_warps = tile(I)
    blocks = -(-I // BLOCK)
    with torch.cuda.device_of(g):  # Triton launches on the current device, not on the tensors'
        _forward_kernel[(M * blocks,)](
            g, u, out, I, g.stride(0), u.stride(0), out.stride(0), blocks, BLOCK=BLOCK, num_warps=num_warps
        )


@op("lora::swiglu_backward", mutates=("dg", "du"))
def _backward_op(dh: Tensor, g: Tensor, u: Tensor, dg: Tensor, du: Tensor) -> None:
    if not g.numel():
        return
    ts = _as_rows((dh, g, u), (dg, du))
    M, I = ts[0].shape
    BLOCK, num_warps = tile(I)
    blocks = -(-I // BLOCK)
    with torch.cuda.device_of(g):
        _backward_kernel[(M * blocks,)](*ts, I, *(t.stride(0) for t in ts), blocks, BLOCK=BLOCK, num_warps=num_warps)


def swiglu_forward(g: Tensor, u: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(g) * u, into `out` where given (any row stride, neighbours of a row side by side)."""
    _check(g, u=u, out=out)
    if not use_triton(g, u):
        return _forward_ref(g, u) if out is None else out.copy_(_forward_ref(g, u))
    out = torch.empty(g.shape, dtype=g.dtype, device=g.device) if out is None else out
    _forward_op(g, u, out)
    return out


def swiglu_backward(
    dh: Tensor, g: Tensor, u: Tensor, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """dg and du, into `out` where given, such as a buffer's two halves; g and u themselves will do."""
    dg, du = (None, None) if out is None else out
    _check(g, dh=dh, u=u, dg=dg, du=du)
    if not use_triton(dh, g, u):
        made = _backward_ref(dh, g, u)
        return made if dg is None or du is None else (dg.copy_(made[0]), du.copy_(made[1]))
    if dg is None or du is None:
        dg, du = (torch.empty(g.shape, dtype=g.dtype, device=g.device) for _ in range(2))
    _backward_op(dh, g, u, dg, du)
    return dg, du


def _check(g: Tensor, **others: Tensor | None) -> None:
    for name, t in others.items():
        if t is not None and (t.shape != g.shape or t.dtype != g.dtype):
            raise ValueError(
                f"g is {tuple(g.shape)} {g.dtype}, {name} {tuple(t.shape)} {t.dtype}; "
                "SwiGLU needs one shape and one dtype"
            )
        if t is not None and name in ("out", "dg", "du") and t.numel() and t.stride(-1) != 1:
            raise ValueError(f"{name} has strides {t.stride()}; it is written in rows, so its last stride must be 1")


# ---- autograd ----
class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, u):
        ctx.save_for_backward(g, u)
        return swiglu_forward(g, u)

    @staticmethod
    def backward(ctx, *grads):
        return swiglu_backward(grads[0], *ctx.saved_tensors)


def swiglu(g: Tensor, u: Tensor) -> Tensor:
    """silu(g) * u, same shape and dtype."""
    return _SwiGLU.apply(g, u)
