"""The thin product T = h aᵀ of a product's input h with the factors a of its updates, made while h is written.

    h = act(g) u, or a copy of x   (M, K)          T (M, r)

By itself the product reads h again, 235 MB behind a gate.  Here a program takes some rows through a strip of columns,
hands each tile to the tensor cores as it stores it, and lays T into the columns behind h, where the base's product
reads it; where rows are few, several programs share them, and strips.py adds up their parts.

Bytes that must move, in tensors of M x K: 3 with a gate, 2 without.  For 8192 x 14336 in bfloat16 at 3.0 TB/s: 0.235
ms.  Source: arXiv:2002.05202; LoRA, arXiv:2106.09685, section 4.1.
"""

import torch
from torch import Tensor

from lora.kernels._triton import tl, triton
from lora.kernels.dispatch import INTERPRETED, stages, use_triton
from lora.kernels.gate import _unit, gate_forward
from lora.kernels.op import op
from lora.kernels.strips import add_strips

MAX_RANK = 64
GATE_TILE = 32, 128, 4  # rows, columns and warps of a program behind a gate
COPY_TILE = 64, 256, 8
WARPS = 1056  # of all programs: eight a multiprocessor of an H100, on every card: it decides what is added to what


# ---- reference ----
def _thin_ref(g: Tensor, u: Tensor | None, gelu: bool, a: Tensor, out: Tensor, behind: Tensor, ones: bool) -> Tensor:
    h = out.copy_(g) if u is None else gate_forward(g, u, gelu, out)
    wide = torch.promote_types(h.dtype, torch.float32)
    t = (h.to(wide) @ a.to(wide).T).to(h.dtype)
    behind.zero_()
    behind[:, : a.shape[0]] = t
    if ones:
        behind[:, a.shape[0]] = 1.0
    return t


# ---- kernel ----
@triton.jit
def _thin_kernel(
    g_ptr,  # (M, K), as u and h
    u_ptr,  # read only with a gate
    h_ptr,
    a_ptr,  # (r, K) contiguous
    t_ptr,  # (M, r) contiguous, written only with WHOLE as the next
    behind_ptr,  # (M, room)
    part_ptr,  # (parts, M, R) f32, written only without
    M,
    K,
    r,
    room,
    steps,  # tiles of COLS columns a program
    g_stride_m,
    u_stride_m,
    h_stride_m,
    behind_stride_m,
    WHOLE: tl.constexpr,  # rows in one program
    ONES: tl.constexpr,
    GATE: tl.constexpr,
    GELU: tl.constexpr,
    INTERPRETED: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ROOM: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    part = tl.program_id(1)
    rank = tl.arange(0, R)[None, :]
    t = tl.zeros((ROWS, R), dtype=tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        col = (part * steps + step) * COLS + tl.arange(0, COLS)
        mask = (row < M) & (col[None, :] < K)
        h = tl.load(g_ptr + row * g_stride_m + col[None, :], mask=mask, other=0.0)
        if GATE:
            u = tl.load(u_ptr + row * u_stride_m + col[None, :], mask=mask, other=0.0).to(tl.float32)
            act, _ = _unit(h.to(tl.float32), GELU, INTERPRETED)
            h = (act * u).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + row * h_stride_m + col[None, :], h, mask=mask)
        a = tl.load(a_ptr + rank * K + col[:, None], mask=(rank < r) & (col[:, None] < K), other=0.0)  # (COLS, R)
        t = tl.dot(h, a, t)
    if WHOLE:
        here = (row < M) & (rank < r)
        rounded = t.to(h_ptr.dtype.element_ty)
        tl.store(t_ptr + row * r + rank, rounded, mask=here)
        tl.store(behind_ptr + row * behind_stride_m + rank, rounded, mask=here)
        rest = tl.arange(0, ROOM)[None, :]
        value = tl.where(rest == r, 1.0 if ONES else 0.0, tl.zeros((ROWS, ROOM), dtype=tl.float32))
        value = value.to(h_ptr.dtype.element_ty)
        tl.store(behind_ptr + row * behind_stride_m + rest, value, mask=(row < M) & (rest >= r) & (rest < room))
    else:
        tl.store(part_ptr + (part.to(tl.int64) * M + row) * R + rank, t, mask=row < M)


# ---- launch ----
@op("lora::thin", mutates=("out", "behind"))
def _thin_op(g: Tensor, u: Tensor | None, gelu: bool, a: Tensor, out: Tensor, behind: Tensor, ones: bool) -> Tensor:
    M, K = g.shape
    r = a.shape[0]
    R = max(16, triton.next_power_of_2(r))
    ROWS, COLS, num_warps = COPY_TILE if u is None else GATE_TILE
    blocks, steps = -(-M // ROWS), -(-K // COLS)
    steps = -(-steps // max(1, min(steps, WARPS // num_warps // blocks)))
    parts = -(-K // (COLS * steps))
    part = torch.empty(0 if parts == 1 else parts, M, R, dtype=torch.float32, device=g.device)
    t = torch.empty(M, r, dtype=g.dtype, device=g.device)
    tile = g.element_size() * (ROWS * COLS * (1 if u is None else 2) + COLS * R)
    with torch.cuda.device_of(g):  # Triton launches on the current device, not on the tensors'
        _thin_kernel[(blocks, parts)](
            g, g if u is None else u, out, a, t, behind, part, M, K, r, behind.shape[1], steps, g.stride(0),
            0 if u is None else u.stride(0), out.stride(0), behind.stride(0),
            WHOLE=parts == 1, ONES=ones, GATE=u is not None, GELU=gelu, INTERPRETED=INTERPRETED, R=R, ROWS=ROWS,
            COLS=COLS, ROOM=triton.next_power_of_2(behind.shape[1]), STAGES=stages(tile, g.device),
            num_warps=num_warps,
        )  # fmt: skip
    if parts > 1:
        add_strips(part, [r], [parts], behind, ones=ones, copy=t)
    return t


@_thin_op.register_fake
def _(g, u, gelu, a, out, behind, ones):
    return g.new_empty(g.shape[0], a.shape[0])


def takes(x: Tensor, r: int) -> bool:
    """Whether T is made on the way: 16 bits on a GPU, and factors that are thin enough."""
    return x.dtype in (torch.bfloat16, torch.float16) and 1 <= r <= MAX_RANK and use_triton(x)


def thin(
    g: Tensor, u: Tensor | None, a: Tensor, out: Tensor, behind: Tensor, ones: bool = False, gelu: bool = False
) -> Tensor:
    """T = h aᵀ (M, r); h = act(g) u, or g where u is None, into `out` (M, K), and T into `behind` (M, > r).

    Behind T stands a column of ones if asked for, else 0.  a is (r, K), r at most MAX_RANK; all of one dtype, each row
    without gaps.
    """
    M, K = g.shape
    r = a.shape[0]
    for name, t, shape in (("u", u, (M, K)), ("a", a, (r, K)), ("out", out, (M, K)), ("behind", behind, (M, None))):
        if t is not None and (t.dtype != g.dtype or t.shape[0] != shape[0] or shape[1] not in (None, t.shape[1])):
            raise ValueError(
                f"{name} is {t.dtype} {tuple(t.shape)}, g {g.dtype} {tuple(g.shape)}, a {tuple(a.shape)}; they must be "
                "(M, K), (M, K) and (r, K) of one dtype"
            )
    if not 1 <= r <= MAX_RANK or behind.shape[1] < r + ones:
        raise ValueError(
            f"a rank of {r}, and {int(ones)} more, beside {behind.shape[1]} columns for T; at most {MAX_RANK}"
        )
    if use_triton(g, a, out, behind, *(() if u is None else (u,))) and g.numel():
        g = g if g.stride(1) == 1 else g.contiguous()
        u = u if u is None or u.stride(1) == 1 else u.contiguous()
        return _thin_op(g, u, gelu, a.contiguous(), out, behind, ones)
    return _thin_ref(g, u, gelu, a, out, behind, ones)
