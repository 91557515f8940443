"""A gated unit between two adapted products: h = act(g) * u, with the sums that its neighbours' factors need.

    forward    h = act(g) u
    backward   du = dh act(g)     dg = dh u act'(g)
               da = vᵀ h          v (M, r): what the product behind h gives for its factor a
               db = dgᵀ t_g, duᵀ t_u     t (M, r): what the products before g and u gave for their factors b
silu(g) = g σ(g), σ(g) = 1 / (1 + exp(-g)); gelu is the tanh form, which is g σ(2 z), z = √(2/π) (g + 0.044715 g³).

Adapters side by side, each with an equal run of the rows, have sums of their own: factors (k, M / k, r) say so.

dg and du are written over g and u.  As products of their own the sums would read h, dg and du once more, and h would
have to be written for them: 3 + 4 tensors of M x F beside the 5 that must move.  Here a tile of them goes to the tensor
cores while it is at hand; each program sums over some of the rows, and the parts are added in a fixed order.

Bytes that must move, in tensors of M x F: backward 5.  For 8192 x 14336 in bfloat16 at 3.0 TB/s: 0.392 ms.
Source: arXiv:2002.05202; LoRA, arXiv:2106.09685, section 4.1.
"""

import torch
from torch import Tensor

from lora.kernels._triton import tl, triton
from lora.kernels.dispatch import INTERPRETED, use_triton
from lora.kernels.op import op
from lora.kernels.swiglu import swiglu_backward, swiglu_forward, tile

MAX_RANK = 64  # of a factor whose sum is made in the pass: each takes a tile of registers
ROWS, COLS, WARPS, STAGES = 16, 64, 4, 3  # of a program's tile, and how many are on their way or at work at once
PARTS = 8  # programs that share a column: some 1,800 of them for F = 14336


# ---- reference ----
def _gelu_parts(g: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(g) and its derivative, in float32 or wider."""
    g = g.float() if g.element_size() < 4 else g
    z = 0.7978845608028654 * (g + 0.044715 * g**3)
    s = torch.sigmoid(2 * z)
    return g * s, s + 2 * g * s * (1 - s) * 0.7978845608028654 * (1 + 3 * 0.044715 * g**2)


def _forward_ref(g: Tensor, u: Tensor, gelu: bool, out: Tensor) -> Tensor:
    if not gelu:
        return swiglu_forward(g, u, out=out)
    return out.copy_(_gelu_parts(g)[0] * u)


def _backward_ref(dh: Tensor, g: Tensor, u: Tensor, gelu: bool) -> Tensor:
    """h; dg and du over g and u."""
    if not gelu:
        h = swiglu_forward(g, u)
        swiglu_backward(dh, g, u, out=(g, u))
        return h
    a, slope = _gelu_parts(g)
    h = (a * u).to(g.dtype)
    g.copy_(dh * u * slope)
    u.copy_(dh * a)
    return h


def _sum_ref(x: Tensor, y: Tensor) -> Tensor:
    """xᵀ y in float32 or wider, of each run."""
    return (x.float() if x.element_size() < 4 else x).mT @ (y.float() if y.element_size() < 4 else y)


# ---- kernel ----
@triton.jit
def _sigmoid(x, INTERPRETED: tl.constexpr):
    """1 / (1 + exp(-x)).

    Triton's own exp and quotient mind denormal numbers, which change nothing beside 1.  Not pure, or the compiler would
    compute a tile twice: once to store it, once in the layout that tl.dot wants.  62 instructions a value became 30.
    """
    if INTERPRETED:
        s = 1.0 / (1.0 + tl.exp(-x))
    else:
        s = tl.inline_asm_elementwise(
            """{ .reg .f32 t; mul.ftz.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t;
            add.ftz.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }""",  # -log2(e); 1
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=False,
            pack=1,
        )
    return s


@triton.jit
def _unit(g, GELU: tl.constexpr, INTERPRETED: tl.constexpr):
    """act(g) and its derivative."""
    if GELU:
        g2 = g * g
        s = _sigmoid(1.5957691216057308 * g * (1.0 + 0.044715 * g2), INTERPRETED)
        act = g * s
        slope = s + act * (1.0 - s) * (1.5957691216057308 + 0.21406966749177 * g2)
    else:
        s = _sigmoid(g, INTERPRETED)
        act = g * s
        slope = s + act * (1.0 - s)
    return act, slope


@triton.jit
def _forward_kernel(
    g_ptr,  # (M, F), as u and h
    u_ptr,
    h_ptr,
    F,
    g_stride_m,
    u_stride_m,
    h_stride_m,
    blocks,  # of a row
    GELU: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    col = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = col < F
    g = tl.load(g_ptr + row * g_stride_m + col, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + row * u_stride_m + col, mask=mask, other=0.0).to(tl.float32)
    act, _ = _unit(g, GELU, INTERPRETED)
    tl.store(h_ptr + row * h_stride_m + col, (act * u).to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _grads(dh_at, g_at, u_at, mask, GELU: tl.constexpr, INTERPRETED: tl.constexpr):
    """h, dg and du of a tile, float32."""
    dh = tl.load(dh_at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_at, mask=mask, other=0.0).to(tl.float32)
    act, slope = _unit(g, GELU, INTERPRETED)
    return act * u, dh * u * slope, dh * act


@triton.jit
def _sum(total, x, ptr, row, end, stride_m, r, R: tl.constexpr, PRECISION: tl.constexpr):
    """total (COLS, R) + xᵀ times these rows of a factor (M, r), zeros from row `end` on; x (ROWS, COLS)."""
    rank = tl.arange(0, R)[None, :]
    factor = tl.load(ptr + row * stride_m + rank, mask=(row < end) & (rank < r), other=0.0)
    return tl.dot(tl.trans(x), factor.to(x.dtype), total, input_precision=PRECISION)


@triton.jit
def _store_sums(
    ptr,  # (r_v, F) of da, (F, r_g) of db of g, (F, r_u) of db of u, one behind the other
    F,
    col,  # (COLS,)
    da,  # (COLS, R), as the next two
    dbg,
    dbu,
    r_v,
    r_g,
    r_u,
    V: tl.constexpr,
    TG: tl.constexpr,
    TU: tl.constexpr,
    R: tl.constexpr,
):
    """What is summed over the rows of a part; stored where V, TG, TU say that it is."""
    rank = tl.arange(0, R)[None, :]
    col = col[:, None]
    if V:
        tl.store(ptr + rank * F + col, da, mask=(col < F) & (rank < r_v))
    if TG:
        tl.store(ptr + F * r_v + col * r_g + rank, dbg, mask=(col < F) & (rank < r_g))
    if TU:
        tl.store(ptr + F * (r_v + r_g) + col * r_u + rank, dbu, mask=(col < F) & (rank < r_u))


@triton.jit
def _backward_kernel(
    dh_ptr,  # (M, F), becomes h with H
    g_ptr,  # (M, F), becomes dg
    u_ptr,  # (M, F), becomes du
    v_ptr,  # (M, r_v), read only with V, as the next two with T
    tg_ptr,  # (M, r_g)
    tu_ptr,  # (M, r_u)
    sums_ptr,  # (parts, F (r_v + r_g + r_u)) f32, each part as `_store_sums` has it
    run,  # rows that are summed together
    share,  # programs that share a run and a column
    F,
    steps,  # blocks of ROWS rows a program
    dh_stride_m,
    g_stride_m,
    u_stride_m,
    v_stride_m,
    tg_stride_m,
    tu_stride_m,
    r_v,
    r_g,
    r_u,
    GELU: tl.constexpr,
    INTERPRETED: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    TG: tl.constexpr,
    TU: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part = tl.program_id(1).to(tl.int64)
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    dtype: tl.constexpr = g_ptr.dtype.element_ty
    da = tl.zeros((COLS, R), dtype=tl.float32)
    dbg = tl.zeros((COLS, R), dtype=tl.float32)
    dbu = tl.zeros((COLS, R), dtype=tl.float32)
    first = part // share * run
    end = first + run
    for step in tl.range(0, steps, num_stages=STAGES):
        row = first + (part % share * steps + step) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1) int64
        mask = (row < end) & (col[None, :] < F)
        g_at = g_ptr + row * g_stride_m + col[None, :]
        u_at = u_ptr + row * u_stride_m + col[None, :]
        dh_at = dh_ptr + row * dh_stride_m + col[None, :]
        h, dg, du = _grads(dh_at, g_at, u_at, mask, GELU, INTERPRETED)
        h, dg, du = h.to(dtype), dg.to(dtype), du.to(dtype)
        tl.store(g_at, dg, mask=mask)
        tl.store(u_at, du, mask=mask)
        if H:
            tl.store(dh_at, h, mask=mask)
        if V:
            da = _sum(da, h, v_ptr, row, end, v_stride_m, r_v, R, PRECISION)
        if TG:
            dbg = _sum(dbg, dg, tg_ptr, row, end, tg_stride_m, r_g, R, PRECISION)
        if TU:
            dbu = _sum(dbu, du, tu_ptr, row, end, tu_stride_m, r_u, R, PRECISION)
    _store_sums(sums_ptr + part * F * (r_v + r_g + r_u), F, col, da, dbg, dbu, r_v, r_g, r_u, V, TG, TU, R)


# ---- launch ----
@op("lora::gelu_gate", mutates=("h",))
def _forward_op(g: Tensor, u: Tensor, h: Tensor) -> None:
    M, F = g.shape
    BLOCK, num_warps = tile(F)
    blocks = -(-F // BLOCK)
    with torch.cuda.device_of(g):  # Triton launches on the current device, not on the tensors'
        _forward_kernel[(M * blocks,)](
            g, u, h, F, g.stride(0), u.stride(0), h.stride(0), blocks, GELU=True, INTERPRETED=INTERPRETED, BLOCK=BLOCK,
            num_warps=num_warps,
        )  # fmt: skip


@op("lora::gate_backward", mutates=("dh", "g", "u"))
def _backward_op(
    dh: Tensor,
    g: Tensor,
    u: Tensor,
    v: Tensor | None,
    tg: Tensor | None,
    tu: Tensor | None,
    gelu: bool,
    keep_h: bool,
    runs: int,
) -> Tensor:
    M, F = g.shape
    run = M // runs
    share = min(-(-PARTS // runs), max(1, -(-run // ROWS)))
    parts, steps = runs * share, -(-run // (share * ROWS))
    ranks = [0 if t is None else t.shape[1] for t in (v, tg, tu)]
    sums = torch.empty(parts, F * sum(ranks), dtype=torch.float32, device=g.device)
    strides = [0 if t is None else t.stride(0) for t in (v, tg, tu)]
    with torch.cuda.device_of(g):
        _backward_kernel[(-(-F // COLS), parts)](
            dh, g, u, *(g if t is None else t for t in (v, tg, tu)), sums, run, share, F, steps,
            dh.stride(0), g.stride(0), u.stride(0), *strides, *ranks,
            GELU=gelu, INTERPRETED=INTERPRETED, H=keep_h, V=v is not None, TG=tg is not None, TU=tu is not None,
            R=max(16, triton.next_power_of_2(max(ranks))), ROWS=ROWS, COLS=COLS, STAGES=STAGES,
            PRECISION="ieee" if g.dtype == torch.float32 else "tf32", num_warps=WARPS,
        )  # fmt: skip
    return sums.unflatten(0, (runs, share)).sum(1)


@_backward_op.register_fake
def _(dh, g, u, v, tg, tu, gelu, keep_h, runs):
    ranks = [0 if t is None else t.shape[1] for t in (v, tg, tu)]
    return g.new_empty(runs, g.shape[1] * sum(ranks), dtype=torch.float32)


def gate_forward(g: Tensor, u: Tensor, gelu: bool, out: Tensor) -> Tensor:
    """act(g) * u of (M, F) into `out`; all of any row stride, neighbours of a row side by side."""
    _check(g, u=u, out=out)
    if not gelu:
        return swiglu_forward(g, u, out=out)
    if use_triton(g, u, out):
        _forward_op(g, u, out)
        return out
    return _forward_ref(g, u, gelu, out)


def gate_backward(
    dh: Tensor,
    g: Tensor,
    u: Tensor,
    v: Tensor | None = None,
    tg: Tensor | None = None,
    tu: Tensor | None = None,
    gelu: bool = False,
    keep_h: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Writes dg over g, du over u and, with keep_h, h over dh; returns vᵀ h (r, F), dgᵀ tg and duᵀ tu (F, r), float32.

    dh, g and u are (M, F) of any row stride, v, tg and tu (M, r) with r at most MAX_RANK, or None: then so is the sum.
    Where they are (k, M / k, r), so are the sums of each run of rows: (k, r, F) and (k, F, r).
    The factors of the sums are rounded to the dtype of g.
    """
    _check(g, dh=dh, u=u)
    factors = [v, tg, tu]
    there = [t for t in factors if t is not None]
    heads = {t.shape[:-2] for t in there} or {torch.Size()}
    runs = next(iter(heads)).numel() if len(heads) == 1 else 0
    for name, t in zip(("v", "tg", "tu"), factors, strict=True):
        rows = g.shape[0] // runs if runs and g.shape[0] % runs == 0 else 0
        if t is not None and (t.dim() > 3 or t.shape[-2] != rows or not 1 <= t.shape[-1] <= MAX_RANK):
            raise ValueError(
                f"{name} is {tuple(t.shape)}; beside {g.shape[0]} rows it is ({g.shape[0]}, r), or k runs of them "
                f"(k, {g.shape[0]} / k, r) as all are, r at most {MAX_RANK}"
            )
    made: tuple[Tensor, ...]
    if use_triton(dh, g, u, *there) and g.numel():
        flat = (t if t is None else _rows(t) for t in factors)
        sums = _backward_op(dh, g, u, *flat, gelu, keep_h, runs).view(*next(iter(heads)), -1)
        F, ranks = g.shape[1], [0 if t is None else t.shape[-1] for t in factors]
        a, bg, bu = sums.split([F * r for r in ranks], dim=-1)
        made = a.unflatten(-1, (ranks[0], F)), bg.unflatten(-1, (F, ranks[1])), bu.unflatten(-1, (F, ranks[2]))
    else:
        h = _backward_ref(dh, g, u, gelu)
        if keep_h:
            dh.copy_(h)
        h, dg, du = (t.unflatten(0, (*next(iter(heads)), -1)) for t in (h, g, u))
        pairs = ((v, h), (dg, tg), (du, tu))
        made = tuple(g if x is None or y is None else _sum_ref(x.to(g.dtype), y.to(g.dtype)) for x, y in pairs)
    a, bg, bu = (None if t is None else m for t, m in zip(factors, made, strict=True))
    return a, bg, bu


def _rows(t: Tensor) -> Tensor:
    """A factor (M, r) or (k, M / k, r) as (M, r), each row without gaps."""
    t = t.flatten(0, -2)
    return t if t.stride(1) == 1 else t.contiguous()


def _check(g: Tensor, **others: Tensor) -> None:
    for name, t in {"g": g, **others}.items():
        if t.dim() != 2 or t.shape != g.shape or t.dtype != g.dtype or (t.numel() and t.stride(1) != 1):
            raise ValueError(
                f"{name} is {t.dtype} {tuple(t.shape)} with strides {t.stride()}, g {g.dtype} {tuple(g.shape)}; "
                "a gate needs (M, F) of one dtype, each row without gaps"
            )
