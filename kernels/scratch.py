"""Buffers that are used again and again: fresh pages cost more than what is written into them."""

import threading

import torch
from torch import Tensor

_local = threading.local()


def scratch(n: int, dtype: torch.dtype, device: torch.device, use: str) -> Tensor:
    """A buffer of n values that the next call of the same thread, device, stream and use will overwrite.

    Fresh pages cost more than the decoding itself (QLoRA unpacks each weight twice a step), so they are reused.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    buffers = _local.__dict__.setdefault("buffers", {})
    key = (dtype, device, stream, use)
    if key not in buffers or buffers[key].numel() < n:
        buffers.pop(key, None)
        buffers[key] = torch.empty(n, dtype=dtype, device=device)
    return buffers[key][:n]
