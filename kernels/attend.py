"""One new token's attention, with its rotary embedding and its place in the key-value cache, in one launch.

    q, k = rope(q), rope(k)         cache[at] = k, v         y = softmax(q Kᵀ / sqrt(D)) V over slots start to at

A program takes one row and one key head with the G query heads that read it: it turns them, stores the key and the
value, and walks over the older slots with an online softmax.  The new key is used from registers, so nothing waits for
memory to be visible.  Bytes that move: the cache once, 2 (at - start) D a key head.

Source: arXiv:2104.09864 (rope), arXiv:2205.14135 section 3.1 (online softmax).
"""

import torch
from torch import Tensor

from lora.kernels._triton import tl, triton
from lora.kernels.dispatch import use_triton
from lora.kernels.rope import turn_ref


# ---- reference ----
def attend_ref(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, at: Tensor, start: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    B, Hkv, S, D = keys.shape
    turn = (t[:, None, None].to(q.dtype) for t in (cos, sin))
    cos, sin = turn  # (B, 1, 1, D / 2)
    q = turn_ref(q.view(B, 1, -1, D), cos, sin)[:, 0]  # (B, H, D)
    slot = at.view(1, 1, 1, 1).expand(B, Hkv, 1, D)
    keys.scatter_(2, slot, turn_ref(k.view(B, 1, Hkv, D), cos, sin).transpose(1, 2))
    values.scatter_(2, slot, v.view(B, Hkv, 1, D))
    G = q.shape[1] // Hkv
    z = torch.einsum("bhgd,bhsd->bhgs", q.view(B, Hkv, G, D).float(), keys.float()) * D**-0.5
    seen = torch.arange(S, device=q.device)
    seen = (seen >= start[:, None]) & (seen <= at)  # (B, S)
    p = z.masked_fill(~seen[:, None, None], -torch.inf).softmax(dim=-1)
    return torch.einsum("bhgs,bhsd->bhgd", p, values.float()).reshape(B, -1).to(q.dtype)


# ---- kernel ----
@triton.jit
def _attend_kernel(
    q_ptr, k_ptr, v_ptr,  # (B, Hkv G D), (B, Hkv D), (B, Hkv D), rows apart by their strides
    keys_ptr, values_ptr,  # (B, Hkv, S, D), rows and heads apart by their strides
    at_ptr, start_ptr,  # (1,) i64, (B,) i64
    cos_ptr, sin_ptr,  # (B, D / 2) f32
    y_ptr,  # (B, Hkv G D)
    q_stride, k_stride, v_stride, row_stride, head_stride, Hkv, scale,
    G: tl.constexpr,
    D: tl.constexpr,
    GP: tl.constexpr,  # G up to what a matrix product takes
    SLOTS: tl.constexpr,  # at a time
):  # fmt: skip
    b, h = (tl.program_id(0) // Hkv).to(tl.int64), tl.program_id(0) % Hkv
    HALF: tl.constexpr = D // 2
    i = tl.arange(0, HALF)
    g = tl.arange(0, GP)
    cos, sin = tl.load(cos_ptr + b * HALF + i), tl.load(sin_ptr + b * HALF + i)
    dtype = keys_ptr.dtype.element_ty
    heads = q_ptr + b * q_stride + (h * G + g[:, None]) * D + i
    mask = g[:, None] < G
    q1, q2 = (
        tl.load(heads, mask=mask, other=0.0).to(tl.float32),
        tl.load(heads + HALF, mask=mask, other=0.0).to(tl.float32),
    )
    r1, r2 = (q1 * cos - q2 * sin).to(dtype), (q2 * cos + q1 * sin).to(dtype)  # (GP, D / 2)
    new = k_ptr + b * k_stride + h * D + i
    k1, k2 = tl.load(new).to(tl.float32), tl.load(new + HALF).to(tl.float32)
    n1, n2 = (k1 * cos - k2 * sin).to(dtype), (k2 * cos + k1 * sin).to(dtype)
    d = tl.arange(0, D)
    v = tl.load(v_ptr + b * v_stride + h * D + d)
    at, first = tl.load(at_ptr), tl.load(start_ptr + b)
    keys = keys_ptr + b * row_stride + h * head_stride
    values = values_ptr + b * row_stride + h * head_stride
    tl.store(keys + at * D + i, n1)
    tl.store(keys + at * D + HALF + i, n2)
    tl.store(values + at * D + d, v)
    # the new token sees itself, so the softmax starts from it and is never empty
    top = tl.sum(r1.to(tl.float32) * n1.to(tl.float32) + r2.to(tl.float32) * n2.to(tl.float32), axis=1) * scale
    total = tl.full((GP,), 1.0, tl.float32)
    acc = tl.zeros((GP, D), tl.float32) + v.to(tl.float32)
    for base in range(first, at, SLOTS):
        s = base + tl.arange(0, SLOTS)
        old = s < at
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
    tl.store(out, (acc / total[:, None]).to(dtype), mask=mask)


# ---- launch ----
def attend(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, at: Tensor, start: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """y (B, H D) of one token a row; writes its key and value into slot `at` of the caches.

    q (B, H D), k and v (B, Hkv D), not turned yet; keys and values (B, Hkv, S, D) with S, D contiguous; at (1,) int64,
    the slot of this token in every row; start (B,) int64, a row's first real slot (rows are padded on the left);
    cos and sin (B, D / 2) float32 of each row's position.
    """
    B, Hkv, _, D = keys.shape
    if q.shape[1] % (Hkv * D) or k.shape != (B, Hkv * D) or v.shape != k.shape or keys.stride()[2:] != (D, 1):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit caches {tuple(keys.shape)}"
        )
    whole = D in (32, 64, 128, 256) and all(t.stride(1) == 1 for t in (q, k, v))
    if not whole or not use_triton(q, k, v, keys, values, at, start, cos, sin):
        return attend_ref(q, k, v, keys, values, at, start, cos, sin)
    return _attend(q, k, v, keys, values, at, start, cos, sin)


@torch.library.custom_op("lora::attend", mutates_args=("keys", "values"))
def _attend(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, at: Tensor, start: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    B, Hkv, _, D = keys.shape
    G = q.shape[1] // (Hkv * D)
    y = torch.empty(B, Hkv * G * D, dtype=q.dtype, device=q.device)
    with torch.cuda.device_of(q):
        _attend_kernel[(B * Hkv,)](
            q, k, v, keys, values, at, start, cos, sin, y,
            q.stride(0), k.stride(0), v.stride(0), keys.stride(0), keys.stride(1), Hkv, D**-0.5,
            G=G, D=D, GP=max(16, triton.next_power_of_2(G)), SLOTS=64 if D <= 128 else 32, num_warps=4,
        )  # fmt: skip
    return y


@_attend.register_fake
def _(q, k, v, keys, values, at, start, cos, sin):
    return q.new_empty(q.shape)
