"""Linear layers on 4-bit weights that never keep the weight in floats; several on one input run as one product.

    y_i = x W_iᵀ + bias_i + s_i (x a_iᵀ) b_iᵀ          W_i (N_i, K) decoded from the bytes of code4.py when used
    dx = Σ dy_i W_i + s_i (dy_i b_i) a_i      da_i = s_i (dy_i b_i)ᵀ x      db_i = s_i dy_iᵀ (x a_iᵀ)

The weights of q, k and v (or gate and up) are decoded one under the other, so that one product serves all, and so are
their factors a.  The low-rank parts are here, and not layers of their own, so that they are added where y and dx lie.
Source: QLoRA, arXiv:2305.14314, section 3; LoRA, arXiv:2106.09685, section 4.1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora.kernels import gemm
from lora.kernels.code4 import Low, Weight4
from lora.kernels.dropout import Drop
from lora.kernels.gemv4 import can_gemv4, down, gemv4, gemv4_group
from lora.kernels.linear16 import can_linear16, linears16
from lora.kernels.scratch import borrowed, mine
from lora.kernels.unpack import joined, unpack


class _Linear4(torch.autograd.Function):
    """Each W is unpacked twice and kept never: that is QLoRA's memory."""

    @staticmethod
    def forward(ctx, x, weights, scale, *factors):
        """`factors`: bias, a, b of each weight in turn (None where there is none); `scale`: s of each."""
        K = weights[0].shape[1]
        biases, a_s, b_s = factors[::3], factors[1::3], factors[2::3]
        flat = x.reshape(-1, K)  # (..., K) -> (M, K)
        y = gemm.linear(flat, unpack(weights, x))  # (M, Σ N)
        ys = list(y.split([w.shape[0] for w in weights], dim=1))
        have = [a for a in a_s if a is not None]
        xa: Any = None
        if have:
            xa = gemm.linear(flat, have[0] if len(have) == 1 else torch.cat(have))  # (M, Σ r)
        r0 = 0
        for part, bias, a, b, s in zip(ys, biases, a_s, b_s, scale, strict=True):
            if bias is not None:
                part += bias
            if a is not None:
                part.addmm_(xa[:, r0 : r0 + a.shape[0]], b.T, alpha=s)  # (M, r) (r, N)
                r0 += a.shape[0]
        ctx.still = [(len(w.scales), w.block, w.shape) for w in weights]
        ctx.scale, ctx.buffers = scale, mine()
        kept = [t for w in weights for t in (w.q, w.table, w.permute, *w.scales)]
        needs_x = any(ctx.needs_input_grad[4::3])  # only the gradient of a factor a reads it
        ctx.save_for_backward(x if needs_x else None, xa, *a_s, *b_s, *kept)
        if len(ys) == 1:
            # not .view: the result must be no view, so that a further update can be added to it in place
            return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[1]])
        return tuple(part.view(*x.shape[:-1], part.shape[1]) for part in ys)

    @staticmethod
    def backward(ctx, *grads):
        scale, n = ctx.scale, len(ctx.still)
        x, xa, *saved = ctx.saved_tensors
        a_s, b_s, kept = saved[:n], saved[n : 2 * n], iter(saved[2 * n :])
        weights = []
        for scales, block, NK in ctx.still:
            q, table, permute = next(kept), next(kept), next(kept)
            weights.append(Weight4(q, tuple(next(kept) for _ in range(scales)), table, permute, block, NK))
        shape = grads[0].shape[:-1]
        dys = [dy.reshape(-1, w.shape[0]) for dy, w in zip(grads, weights, strict=True)]  # (M, N)
        out: list[Tensor | None] = [None, None, None]
        have = [a for a in a_s if a is not None]
        dxa = None
        if have:
            dxa = torch.empty_like(xa)  # (M, Σ r)
            r0 = 0
            for dy, a, b, s in zip(dys, a_s, b_s, scale, strict=True):
                if a is not None:
                    torch.mul(gemm.matmul(dy, b), s, out=dxa[:, r0 : r0 + a.shape[0]])  # (M, N) (N, r)
                    r0 += a.shape[0]
            da = None if x is None else gemm.matmul(dxa.T, x.reshape(-1, x.shape[-1]))  # (Σ r, M) (M, K)
        r0 = 0
        for i, (dy, a, s) in enumerate(zip(dys, a_s, scale, strict=True)):
            out.append(dy.sum(dim=0) if ctx.needs_input_grad[3 + 3 * i] else None)
            if a is None:
                out += [None, None]
                continue
            r1 = r0 + a.shape[0]
            out += [None if da is None else da[r0:r1], (dy.T @ xa[:, r0:r1]).mul_(s)]  # (N, M) (M, r)
            r0 = r1
        if ctx.needs_input_grad[0]:
            dy = dys[0] if n == 1 else joined(dys)
            with borrowed(ctx.buffers):
                dx = gemm.matmul(dy, unpack(weights, dy))  # (M, Σ N) (Σ N, K)
            if dxa is not None:
                dx.addmm_(dxa, have[0] if len(have) == 1 else torch.cat(have))  # (M, Σ r) (Σ r, K)
            out[0] = dx.view(*shape, dx.shape[1])
        return tuple(out)


def linear4(
    x: Tensor, weight: Weight4, bias: Tensor | None = None, low: Low | None = None, drop: Drop | None = None
) -> Tensor:
    """x (..., K) through a frozen 4-bit weight (N, K), in the dtype of x; no gradient reaches the weight.

    `low` is (a (r, K), b (N, r), s) of a low-rank update, which does get gradients; `drop` its dropout, only where
    `can_linear16` says so.
    """
    return linears4(x, (weight,), (bias,), (low,), (drop,))[0]


def linears4(
    x: Tensor,
    weights: Sequence[Weight4],
    biases: Sequence[Tensor | None],
    lows: Sequence[Low | None],
    drops: Sequence[Drop | None] = (),
) -> tuple[Tensor, ...]:
    """`linear4` of several weights of one K on the same x: one decode into one buffer, one product.

    The results are the columns of one buffer, so their rows do not lie end to end.
    """
    flat: list[Tensor | None] = []
    for bias, low in zip(biases, lows, strict=True):
        flat += [bias, *(low[:2] if low else (None, None))]
    K = weights[0].shape[1]
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *flat))
    if not learns and not any(drops) and all(can_gemv4(x, w.q, w.block, K) for w in weights):
        rows = x.reshape(-1, K).contiguous()
        if len({(len(w.scales), w.block) for w in weights}) == 1:
            have = [low for low in lows if low is not None]
            xa = down([a for a, _, _ in have], [s for _, _, s in have], rows) if have else None
            ys = gemv4_group(rows, weights, biases, [low[1] if low else None for low in lows], xa)
        else:
            ys = tuple(gemv4(rows, w, bias, low) for w, bias, low in zip(weights, biases, lows, strict=True))
        return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)
    if any(lows) and can_linear16(x, *(w.q for w in weights)):
        return linears16(x, weights, biases, lows, drops)
    flat = [t if t is None else t.to(x.dtype) for t in flat]  # the factors are float32, and enter in the dtype of x
    y = _Linear4.apply(x, tuple(weights), tuple(low[2] if low else 0.0 for low in lows), *flat)
    return y if isinstance(y, tuple) else (y,)
