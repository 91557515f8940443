"""One new token's attention, with its rotary embedding and its place in the key-value cache, in one launch.

    q, k = rope(q), rope(k)         cache[at] = k, v         y = softmax(q Kᵀ / sqrt(D)) V over slots first to at

A program takes one row, one key head with the G query heads that read it, and a share of the older slots, over which
it walks with an online softmax.  The program of the first share also turns and stores the new key; it uses it from
registers, so nothing waits for memory to be visible.  Where rows and heads are too few to fill the card and the cache
is long, a row's slots are shared out; whoever finishes last adds the shares up, always in the same order, so that two
runs give the same bits.  Bytes that move: the cache once, 2 (at - first) D a key head.

Source: arXiv:2104.09864 (rope), arXiv:2205.14135 section 3.1 (online softmax), arXiv:2311.01282 section 3 (shares).
"""

import torch
from torch import Tensor

from lora.kernels._triton import tl, triton
from lora.kernels.dispatch import launch_early, use_triton
from lora.kernels.op import op
from lora.kernels.rope import turn_ref

PROGRAMS = 132  # what fills an H100
MOST_SHARES = 16  # of a row's slots: their sum is one program's work
STAGES = 3
SHORT = 512  # slots that are not shared out


# ---- reference ----
def attend_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    at: Tensor,
    start: Tensor,
    cos: Tensor,
    sin: Tensor,
    window: int = 0,
) -> Tensor:
    B, Hkv, S, D = keys.shape
    cos, sin = (t[at - start][:, None, None].to(q.dtype) for t in (cos, sin))  # (B, 1, 1, D / 2)
    q = turn_ref(q.view(B, 1, -1, D), cos, sin)[:, 0]  # (B, H, D)
    slot = at.view(B, 1, 1, 1).expand(B, Hkv, 1, D)
    keys.scatter_(2, slot, turn_ref(k.view(B, 1, Hkv, D), cos, sin).transpose(1, 2))
    values.scatter_(2, slot, v.view(B, Hkv, 1, D))
    G = q.shape[1] // Hkv
    z = torch.einsum("bhgd,bhsd->bhgs", q.view(B, Hkv, G, D).float(), keys.float()) * D**-0.5
    slots = torch.arange(S, device=q.device)
    seen = (slots >= start[:, None]) & (slots <= at[:, None])  # (B, S)
    if window:
        seen &= slots > (at - window)[:, None]
    p = z.masked_fill(~seen[:, None, None], -torch.inf).softmax(dim=-1)
    return torch.einsum("bhgs,bhsd->bhgd", p, values.float()).reshape(B, -1).to(q.dtype)


# ---- kernel ----
@triton.jit
def _attend_kernel(
    q_ptr, k_ptr, v_ptr,  # (B, Hkv G D), (B, Hkv D), (B, Hkv D), rows apart by their strides
    keys_ptr, values_ptr,  # (B, Hkv, S, D), rows and heads apart by their strides
    at_ptr, start_ptr,  # (B,) i64
    cos_ptr, sin_ptr,  # (positions, D / 2) f32
    y_ptr,  # (B, Hkv G D)
    acc_ptr, top_ptr, total_ptr,  # (B Hkv, SHARES, GP, D), (B Hkv, SHARES, GP) twice: f32
    done_ptr,  # (B Hkv,) i32, zeros before and after
    q_stride, k_stride, v_stride, row_stride, head_stride, Hkv, window, scale,
    G: tl.constexpr,
    D: tl.constexpr,
    GP: tl.constexpr,  # G up to what a matrix product takes
    SLOTS: tl.constexpr,  # at a time
    SHARES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    bh, share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = bh // Hkv, bh % Hkv
    HALF: tl.constexpr = D // 2
    i = tl.arange(0, HALF)
    g = tl.arange(0, GP)
    d = tl.arange(0, D)
    at, start = tl.load(at_ptr + b), tl.load(start_ptr + b)
    cos = tl.load(cos_ptr + (at - start) * HALF + i)
    sin = tl.load(sin_ptr + (at - start) * HALF + i)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    dtype = keys_ptr.dtype.element_ty
    heads = q_ptr + b * q_stride + (h * G + g[:, None]) * D + i
    mask = g[:, None] < G
    q1 = tl.load(heads, mask=mask, other=0.0).to(tl.float32)
    q2 = tl.load(heads + HALF, mask=mask, other=0.0).to(tl.float32)
    r1, r2 = (q1 * cos - q2 * sin).to(dtype), (q2 * cos + q1 * sin).to(dtype)  # (GP, D / 2)
    new = k_ptr + b * k_stride + h * D + i
    k1, k2 = tl.load(new).to(tl.float32), tl.load(new + HALF).to(tl.float32)
    n1, n2 = (k1 * cos - k2 * sin).to(dtype), (k2 * cos + k1 * sin).to(dtype)
    v = tl.load(v_ptr + b * v_stride + h * D + d)
    keys = keys_ptr + b * row_stride + h * head_stride
    values = values_ptr + b * row_stride + h * head_stride
    if share == 0:
        tl.store(keys + at * D + i, n1)
        tl.store(keys + at * D + HALF + i, n2)
        tl.store(values + at * D + d, v)
    first = start
    if window:
        first = tl.maximum(start, at + 1 - window)
    width = tl.cdiv(tl.cdiv(at - first, SHARES), SLOTS) * SLOTS
    low = first + share * width
    high = tl.minimum(low + width, at)
    # the new token sees itself, so the softmax of the first share starts from it; others start from nothing
    own = tl.sum(r1.to(tl.float32) * n1.to(tl.float32) + r2.to(tl.float32) * n2.to(tl.float32), axis=1) * scale
    top = tl.where(share == 0, own, -1e30)
    total = tl.zeros((GP,), tl.float32) + tl.where(share == 0, 1.0, 0.0)
    acc = tl.zeros((GP, D), tl.float32) + tl.where(share == 0, v.to(tl.float32), 0.0)
    for base in range(low, high, SLOTS):
        s = base + tl.arange(0, SLOTS)
        old = s < high
        place = s[:, None] * D + i
        o1 = tl.load(keys + place, mask=old[:, None], other=0.0)  # (SLOTS, D / 2)
        o2 = tl.load(keys + place + HALF, mask=old[:, None], other=0.0)
        w = tl.load(values + s[:, None] * D + d, mask=old[:, None], other=0.0)  # (SLOTS, D)
        z = tl.dot(r1, tl.trans(o1), input_precision="ieee") + tl.dot(r2, tl.trans(o2), input_precision="ieee")
        z = tl.where(old[None, :], z * scale, -float("inf"))
        higher = tl.maximum(top, tl.max(z, axis=1))
        p = tl.exp(z - higher[:, None])
        shrink = tl.exp(top - higher)
        total = total * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None] + tl.dot(p.to(dtype), w, input_precision="ieee")
        top = higher
    out = y_ptr + b * Hkv * G * D + (h * G + g[:, None]) * D + d
    if SHARES == 1:
        tl.store(out, (acc / total[:, None]).to(dtype), mask=mask)
    else:
        mine = (bh * SHARES + share) * GP + g
        tl.store(acc_ptr + mine[:, None] * D + d, acc, mask=mask)
        tl.store(top_ptr + mine, top)
        tl.store(total_ptr + mine, total)
        tl.debug_barrier()  # all threads have stored before one of them says so
        if tl.atomic_add(done_ptr + bh, 1, sem="acq_rel") == SHARES - 1:
            tl.store(done_ptr + bh, 0)
            theirs = bh * SHARES * GP + g
            top = tl.load(top_ptr + theirs, cache_modifier=".cg")
            for j in tl.static_range(1, SHARES):
                top = tl.maximum(top, tl.load(top_ptr + theirs + j * GP, cache_modifier=".cg"))
            total = tl.zeros((GP,), tl.float32)
            acc = tl.zeros((GP, D), tl.float32)
            for j in tl.static_range(SHARES):
                shrink = tl.exp(tl.load(top_ptr + theirs + j * GP, cache_modifier=".cg") - top)
                total += shrink * tl.load(total_ptr + theirs + j * GP, cache_modifier=".cg")
                part = acc_ptr + (theirs + j * GP)[:, None] * D + d
                acc += shrink[:, None] * tl.load(part, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(out, (acc / total[:, None]).to(dtype), mask=mask)


# ---- launch ----
def shares_of(heads: int, slots: int) -> int:
    """Programs among which a row's slots are shared out, for `heads` key heads of all rows and a cache of `slots`."""
    if slots <= SHORT:
        return 1
    return max(1, min(MOST_SHARES, PROGRAMS // max(heads, 1), -(-slots // 128)))


def new_work(keys: Tensor, heads: int) -> Tensor | None:
    """Memory in which programs meet, for caches like keys (B, Hkv, S, D) and `heads` query heads; None: none needed.

    Zeros; calls one after the other may share it.
    """
    B, Hkv, S, D = keys.shape
    shares = shares_of(B * Hkv, S)
    if shares == 1:
        return None
    GP = max(16, triton.next_power_of_2(heads // Hkv))
    return torch.zeros(B * Hkv * (shares * GP * (D + 2) + 1), dtype=torch.float32, device=keys.device)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    at: Tensor,
    start: Tensor,
    cos: Tensor,
    sin: Tensor,
    window: int = 0,
    work: Tensor | None = None,
    early: bool = False,
) -> Tensor:
    """y (B, H D) of one token a row; writes its key and value into slot `at` of the caches.

    q (B, H D), k and v (B, Hkv D), not turned yet; keys and values (B, Hkv, S, D) with S, D contiguous; at (B,) int64,
    the slot of each row's token; start (B,) int64, a row's first real slot (rows are padded on the left), so that its
    position is at - start; cos and sin (positions, D / 2) float32; window: how many keys a token sees, itself counted
    (0: all); work: of `new_work`, without which no row is shared out; early: at, start and older slots were complete
    before the launch before this one.
    """
    B, Hkv, S, D = keys.shape
    if q.shape[1] % (Hkv * D) or k.shape != (B, Hkv * D) or v.shape != k.shape or keys.stride()[2:] != (D, 1):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit caches {tuple(keys.shape)}"
        )
    if at.shape != (B,) or start.shape != (B,) or cos.shape != sin.shape or cos.shape[1:] != (D // 2,):
        raise ValueError(
            f"at {tuple(at.shape)}, start {tuple(start.shape)} and cos {tuple(cos.shape)} do not fit {B} rows of {D}"
        )
    whole = D in (32, 64, 128, 256) and all(t.stride(1) == 1 for t in (q, k, v))
    others = [] if work is None else [work]
    if not use_triton(q, k, v, keys, values, at, start, cos, sin, *others) or not whole:
        return attend_ref(q, k, v, keys, values, at, start, cos, sin, window)
    return _attend(q, k, v, keys, values, at, start, cos, sin, window, work, early)


@op("lora::attend", mutates=("keys", "values", "work"))
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    at: Tensor,
    start: Tensor,
    cos: Tensor,
    sin: Tensor,
    window: int,
    work: Tensor | None,
    early: bool,
) -> Tensor:
    B, Hkv, S, D = keys.shape
    G = q.shape[1] // (Hkv * D)
    GP = max(16, triton.next_power_of_2(G))
    shares = 1 if work is None else shares_of(B * Hkv, S)
    y = torch.empty(B, Hkv * G * D, dtype=q.dtype, device=q.device)
    acc = top = total = done = y  # not read where there is one share
    if work is not None:
        n = B * Hkv * shares * GP
        acc, top, total, done = work.split([n * D, n, n, B * Hkv])
        done = done.view(torch.int32)
    with torch.cuda.device_of(q):
        _attend_kernel[(B * Hkv, shares)](
            q, k, v, keys, values, at, start, cos, sin, y, acc, top, total, done,
            q.stride(0), k.stride(0), v.stride(0), keys.stride(0), keys.stride(1), Hkv, window, D**-0.5,
            G=G, D=D, GP=GP, SLOTS=64 if D <= 128 else 32, SHARES=shares, num_warps=4,
            num_stages=STAGES, **launch_early(early, q.device),
        )  # fmt: skip
    return y


@_attend.register_fake
def _(q, k, v, keys, values, at, start, cos, sin, window, work, early):
    return q.new_empty(q.shape)
