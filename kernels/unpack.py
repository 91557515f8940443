"""What layers that read one input share: their weights decoded one under the other, their columns side by side."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora.kernels.code4 import Weight4, dequantize4
from lora.kernels.scratch import scratch


def decode(weights: Sequence[Weight4 | Tensor], out: Tensor) -> None:
    """The weights, in 4 bits or not, one under the other into `out` (Σ N, K), whose rows may lie apart."""
    row = 0
    for w in weights:
        n, K = w.shape
        part = out[row : row + n]
        if not isinstance(w, Weight4):
            part.copy_(w.detach())
        elif K % 2:  # a pair of values is written at a time
            part.copy_(dequantize4(w.q, w.scales, w.table, w.block, n * K, out.dtype).view(n, K))
        else:  # end to end there is no row to be found for a value
            place = part.view(-1) if part.is_contiguous() else part
            dequantize4(w.q, w.scales, w.table, w.block, n * K, out.dtype, out=place)
        row += n


def unpack(weights: Sequence[Weight4], like: Tensor) -> Tensor:
    """The weights (Σ N, K) in the dtype of `like`, in the reused buffer: use it before the next call."""
    N, K = sum(w.shape[0] for w in weights), weights[0].shape[1]
    buffer = scratch(N * K, like.dtype, like.device, "weight").view(N, K)
    decode(weights, buffer)
    return buffer


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
