"""Causal attention inside documents that lie one behind the other in a packed row: no token sees another document.

The torch reference runs each document through PyTorch's attention as if it were alone, so packing changes no number
that matters and costs Σ length², not (Σ length)².  A kernel for ragged batches (cu_seqlens) takes its place here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def document_attention(
    q: Tensor,  # (B, H, T, D)
    k: Tensor,  # (B, H, T, D)
    v: Tensor,
    lengths: Sequence[Sequence[int]],
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(q kᵀ · scale) v within each document, (B, H, T, D).

    `lengths[b]` are the lengths of row b's documents, in order; their sum is T.  A query sees the last `window` keys
    of its document, itself counted, and none behind itself.  `scale` defaults to D ** -0.5; `softcap` squeezes the
    scores into ±softcap by tanh.
    """
    rows = []
    for b, row in enumerate(lengths):
        qs, ks, vs = (t[b].split(list(row), dim=1) for t in (q, k, v))  # (H, L, D) each
        parts = zip(qs, ks, vs, strict=True)
        rows.append(torch.cat([_alone(q, k, v, window, scale, softcap) for q, k, v in parts], dim=1))
    return torch.stack(rows)


def _alone(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None, softcap: float | None) -> Tensor:
    L = q.shape[1]
    mask = None
    if softcap is not None or (window is not None and window < L):
        mask = torch.ones(L, L, dtype=torch.bool, device=q.device).tril()
        if window is not None:
            mask = mask.triu(1 - window)
    if softcap is None:
        # a batch of one: PyTorch's fused kernels take four dimensions
        sdpa = nn.functional.scaled_dot_product_attention
        return sdpa(q[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, scale=scale)[0]
    assert mask is not None
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v
