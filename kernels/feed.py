# mypy: disable-error-code="assignment, misc"
# (a tuple that grows in a Triton loop)
"""What enters linear layers of a few rows and its product with their factors a, in one launch.

    norm      s = x + more      y = w (s / sqrt(mean(s²) + eps))      xa = y aᵀ
    gate                        y = silu(g) u                         xa = y aᵀ
    as it is                    y = x                                 xa = x aᵀ

x (M, K), M small; a (R, K) holds the factors of all layers that read y, one under the other, each times its scale.
A program makes a row whole and takes it times PART rows of a, so every row is made several times: its 8 to 60 KB come
from the second cache, and a launch less is worth more.  The rows of a do not depend on the launch before, so they are
fetched while it still runs (programmatic dependent launch).

Source: the formulas are those of norm.py and swiglu.py; LoRA, arXiv:2106.09685, section 4.1.
"""

import torch
from torch import Tensor

from lora.kernels._triton import tl, triton
from lora.kernels.dispatch import launch_early, use_triton
from lora.kernels.norm import rms_norm_forward
from lora.kernels.op import op
from lora.kernels.swiglu import swiglu_forward

MOST_ROWS = 64  # of x; beyond, separate launches cost less than rows made again
WIDEST = 32768  # values of a row: one program holds a whole row
PROGRAMS = 264  # two for each of an H100's multiprocessors


# ---- reference ----
def _low_ref(y: Tensor, a: Tensor | None) -> Tensor | None:
    return None if a is None else y.float() @ a.float().T  # (M, K) (K, R)


# ---- kernel ----
@triton.jit
def _feed_kernel(
    x_ptr, more_ptr,  # (M, K), rows apart by their strides: x and what is added, or g and u
    w_ptr,  # (K,) of the norm
    a_ptr,  # (R, K)
    y_ptr, sum_ptr,  # (M, K) contiguous
    xa_ptr,  # (M, R) f32
    R, K, x_stride, more_stride, eps,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
    GATE: tl.constexpr,
    PART: tl.constexpr,  # rows of a that a program takes: 0, 1, 2 or 4
    BLOCK: tl.constexpr,  # K up to a power of two
    EARLY: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1).to(tl.int64)
    r0 = tl.program_id(0) * PART
    k = tl.arange(0, BLOCK)
    inside = k < K
    a = ()
    for j in tl.static_range(PART):
        a = a + (tl.load(a_ptr + (r0 + j).to(tl.int64) * K + k, mask=inside & (r0 + j < R), other=0.0),)
    if NORM:
        w = tl.load(w_ptr + k, mask=inside, other=0.0).to(tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    dtype = x_ptr.dtype.element_ty
    writes = inside & (tl.program_id(0) == 0)
    y = tl.load(x_ptr + m * x_stride + k, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        if ADD:
            more = tl.load(more_ptr + m * more_stride + k, mask=inside, other=0.0).to(tl.float32)
            rounded = (y + more).to(dtype)  # what is normalised is what is given back
            tl.store(sum_ptr + m * K + k, rounded, mask=writes)
            y = rounded.to(tl.float32)
        r = tl.rsqrt(tl.sum(y * y) / K + eps)
        y = (y * r).to(dtype).to(tl.float32) * w
    if GATE:
        u = tl.load(more_ptr + m * more_stride + k, mask=inside, other=0.0).to(tl.float32)
        y = y / (1.0 + tl.exp(-y)) * u
    if NORM or GATE:
        rounded = y.to(dtype)
        tl.store(y_ptr + m * K + k, rounded, mask=writes)
        y = rounded.to(tl.float32)  # the layers read it rounded, so their factors do
    if PART == 1:
        tl.store(xa_ptr + m * R + r0, tl.sum(y * a[0].to(tl.float32)))
    if PART == 2:
        two = tl.sum(tl.join(y * a[0].to(tl.float32), y * a[1].to(tl.float32)), axis=0)
        i = tl.arange(0, 2)
        tl.store(xa_ptr + m * R + r0 + i, two, mask=r0 + i < R)
    if PART == 4:
        even = tl.join(y * a[0].to(tl.float32), y * a[2].to(tl.float32))
        odd = tl.join(y * a[1].to(tl.float32), y * a[3].to(tl.float32))
        four = tl.sum(tl.join(even, odd), axis=0)  # (2, 2)
        i = 2 * tl.arange(0, 2)[:, None] + tl.arange(0, 2)[None, :]
        tl.store(xa_ptr + m * R + r0 + i, four, mask=r0 + i < R)


# ---- launch ----
def plan(M: int, R: int, K: int) -> tuple[int, int]:
    """Rows of a that a program takes, and its warps: 16 values a thread of rows up to 8192, 32 beyond."""
    part = next((p for p in (1, 2) if M * -(-R // p) <= PROGRAMS), 4 if K <= 8192 else 2) if R else 0
    block = triton.next_power_of_2(K)
    return part, max(1, min(32, block // (512 if block <= 8192 else 1024)))


def _launch(
    x: Tensor, more: Tensor | None, w: Tensor | None, a: Tensor | None, eps: float, gate: bool, early: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the sum and xa; empty where there is none."""
    M, K = x.shape
    R = 0 if a is None else a.shape[0]
    adds = w is not None and more is not None
    y = torch.empty((M, K) if w is not None or gate else 0, dtype=x.dtype, device=x.device)
    s = torch.empty((M, K) if adds else 0, dtype=x.dtype, device=x.device)
    xa = torch.empty((M, R), dtype=torch.float32, device=x.device)
    part, num_warps = plan(M, R, K)
    with torch.cuda.device_of(x):  # Triton launches on the current device, not on the tensors'
        _feed_kernel[(max(1, -(-R // max(1, part))), M)](
            x, x if more is None else more, x if w is None else w, x if a is None else a, y, s, xa,
            R, K, x.stride(0), 0 if more is None else more.stride(0), eps,
            NORM=w is not None, ADD=adds, GATE=gate, PART=part, BLOCK=triton.next_power_of_2(K),
            num_warps=num_warps, **launch_early(early, x.device),
        )  # fmt: skip
    return y, s, xa


@op("lora::feed_norm")
def _norm_op(
    x: Tensor, more: Tensor | None, w: Tensor, a: Tensor | None, eps: float, early: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _launch(x, more, w, a, eps, False, early)


@_norm_op.register_fake
def _(x, more, w, a, eps, early):
    xa = x.new_empty((x.shape[0], 0 if a is None else a.shape[0]), dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(0 if more is None else x.shape), xa


@op("lora::feed_gate")
def _gate_op(g: Tensor, u: Tensor, a: Tensor | None, early: bool) -> tuple[Tensor, Tensor]:
    y, _, xa = _launch(g, u, None, a, 0.0, True, early)
    return y, xa


@_gate_op.register_fake
def _(g, u, a, early):
    xa = g.new_empty((g.shape[0], 0 if a is None else a.shape[0]), dtype=torch.float32)
    return g.new_empty(g.shape), xa


@op("lora::feed_low")
def _low_op(x: Tensor, a: Tensor, early: bool) -> Tensor:
    return _launch(x, None, None, a, 0.0, False, early)[2]


@_low_op.register_fake
def _(x, a, early):
    return x.new_empty((x.shape[0], a.shape[0]), dtype=torch.float32)


def _fits(*tensors: Tensor | None) -> bool:
    """Whether the kernel takes these: few rows, not too wide, neighbours of a row side by side."""
    there = [t for t in tensors if t is not None]
    x = there[0]
    if a_wrong := [tuple(t.shape) for t in there if t.shape[-1] != x.shape[-1]]:
        raise ValueError(f"rows of {x.shape[-1]} values were given with tensors of shape {a_wrong[0]}")
    few = x.dim() == 2 and 0 < x.shape[0] <= MOST_ROWS and 0 < x.shape[1] <= WIDEST
    return few and all(t.stride(-1) == 1 for t in there) and use_triton(*there)


def feed_norm(
    x: Tensor, more: Tensor | None, w: Tensor, eps: float, a: Tensor | None, early: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y = rms_norm(x + more) w, the sum, and y aᵀ (M, R) float32; more None: x itself; a None: no product.

    x and more (M, K), w (K,), of one dtype; a (R, K) contiguous.  `early`: w and a were complete before the launch
    before this one.  No gradient.
    """
    if w.dtype != x.dtype or not _fits(x, more, w, a):
        y, s, _ = rms_norm_forward(x, more, w, eps)
        return y, s, _low_ref(y, a)
    y, s, xa = _norm_op(x, more, w, a, eps, early)
    return y, x if more is None else s, None if a is None else xa


def feed_gate(g: Tensor, u: Tensor, a: Tensor | None, early: bool = False) -> tuple[Tensor, Tensor | None]:
    """y = silu(g) u (M, K) and y aᵀ (M, R) float32, as `feed_norm`."""
    if not _fits(g, u, a):
        y = swiglu_forward(g, u)
        return y, _low_ref(y, a)
    y, xa = _gate_op(g, u, a, early)
    return y, None if a is None else xa


def feed_low(x: Tensor, a: Tensor, early: bool = False) -> Tensor:
    """x aᵀ (M, R) float32, as `feed_norm`."""
    if not _fits(x, a):
        return x.float() @ a.float().T
    return _low_op(x, a, early)
