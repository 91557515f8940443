"""Causal attention inside documents that lie one behind the other in a packed row: no token sees another document.

The torch reference runs each document through PyTorch's attention as if it were alone, so packing changes no number
that matters and costs Σ length², not (Σ length)².  On a GPU a kernel for ragged batches takes its place, which reads
where documents end from memory: a CUDA graph of it serves other documents.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora.kernels.causal import can_causal, causal_attention
from lora.kernels.scratch import room

BLOCK = 128  # queries of one document that the kernel for ragged batches takes at a time


class Ragged(NamedTuple):
    """Documents as the kernel for ragged batches takes them.

    ends: where each begins in the flattened batch, and its end, (documents + 1,) int32 on the GPU; documents without
        tokens may stand behind the last.
    longest: a bound on their lengths, by which the kernel's grid is laid out.
    """

    ends: Tensor
    longest: int

    @property
    def documents(self) -> int:
        """How many, those without tokens too."""
        return self.ends.numel() - 1


def takes_ragged(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention of such states goes by a `Ragged` alone."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and _varlen() is not None


@functools.cache
def _varlen() -> Callable[..., Any] | None:
    """PyTorch's attention of ragged batches, None before torch 2.10; imported on a GPU only, since it costs 140 MB."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    # newer ones want to be told that a key head serves several query heads
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
    return functools.partial(varlen_attn, **grouped)


def document_attention(
    q: Tensor,  # (B, H, T, D)
    k: Tensor,  # (B, H_kv, T, D), a head for each H / H_kv query heads
    v: Tensor,
    lengths: Sequence[Sequence[int]],
    *,
    ragged: Ragged | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(q kᵀ · scale) v within each document, (B, H, T, D).

    `lengths[b]` are the lengths of row b's documents, in order; their sum is T.  `ragged` tells the same, where it is
    at hand.  A query sees the last `window` keys of its document, itself counted, and none behind itself.  `scale`
    defaults to D ** -0.5; `softcap` squeezes the scores into ±softcap by tanh.
    """
    if softcap is None and takes_ragged(q.device, q.dtype):
        return _ragged(q, k, v, ragged or ragged_of(lengths, q.device), window, scale)
    if q.shape[1] > k.shape[1] and not (softcap is None and can_causal(q, k)):
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    rows = []
    for b, row in enumerate(lengths):
        qs, ks, vs = (t[b].split(list(row), dim=1) for t in (q, k, v))  # (H, L, D) each
        parts = zip(qs, ks, vs, strict=True)
        rows.append(torch.cat([_alone(q, k, v, window, scale, softcap) for q, k, v in parts], dim=1))
    return torch.stack(rows)


def ragged_of(lengths: Sequence[Sequence[int]], device: torch.device) -> Ragged:
    """The documents of these lengths, on a device.

    Like batches get the same shapes: documents without tokens fill up their number, and the bound is a power of two.
    """
    ends = [0, *itertools.accumulate(n for row in lengths for n in row)]
    ends += ends[-1:] * (room(len(ends) - 1) + 1 - len(ends))
    longest = max(BLOCK, 1 << (max(max(row) for row in lengths) - 1).bit_length())
    host = torch.tensor(ends, dtype=torch.int32, pin_memory=device.type == "cuda")
    return Ragged(host.to(device, non_blocking=True), longest)


def _ragged(q: Tensor, k: Tensor, v: Tensor, documents: Ragged, window: int | None, scale: float | None) -> Tensor:
    B, _, T, _ = q.shape
    varlen, (ends, longest) = _varlen(), documents
    assert varlen is not None
    flat = (t.transpose(1, 2).reshape(B * T, t.shape[1], t.shape[3]) for t in (q, k, v))
    before = -1 if window is None else window - 1
    y = varlen(*flat, ends, ends, longest, longest, window_size=(before, 0), scale=scale)
    return y.view(B, T, *y.shape[1:]).transpose(1, 2)


def _alone(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None, softcap: float | None) -> Tensor:
    if softcap is None and can_causal(q[None], k[None]):
        return causal_attention(q[None], k[None], v[None], window=window, scale=scale)[0]
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
