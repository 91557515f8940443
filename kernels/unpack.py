"""What layers that read one input share: their 4-bit weights decoded under one another, their columns side by side."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora.kernels.code4 import Weight4, dequantize4
from lora.kernels.scratch import scratch


def unpack(weights: Sequence[Weight4], like: Tensor) -> Tensor:
    """The weights (Σ N, K) in the dtype of `like`, in the reused buffer: use it before the next call."""
    K = weights[0].shape[1]
    N = sum(w.shape[0] for w in weights)
    buffer = scratch(N * K + 1, like.dtype, like.device, "weight")  # + 1: an odd count ends on half a byte
    start = 0
    for q, scales, table, _, block, shape in weights:
        n = shape[0] * K
        out = buffer[start:] if start % 2 == 0 else None  # a pair of values is written at a time
        decoded = dequantize4(q, scales, table, block, n, like.dtype, out=out)
        if out is None:
            buffer[start : start + n] = decoded
        start += n
    return buffer[: N * K].view(N, K)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """(M, N_i) side by side, without a copy where they already lie so."""
    first, at = parts[0], parts[0].data_ptr()
    storage = first.untyped_storage().data_ptr()
    for part in parts:
        same = part.untyped_storage().data_ptr() == storage and part.stride() == (first.stride(0), 1)
        if not same or part.data_ptr() != at:
            return torch.cat(tuple(parts), dim=1)
        at += part.shape[1] * part.element_size()
    N = sum(part.shape[1] for part in parts)
    return first.as_strided((first.shape[0], N), first.stride())
