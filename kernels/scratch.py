"""Buffers that are used again and again: fresh pages cost more than what is written into them."""

import contextlib
import ctypes
import platform
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_local = threading.local()


def scratch(n: int, dtype: torch.dtype, device: torch.device, use: str) -> Tensor:
    """A buffer of n values that the next call of the same thread, device, stream and use will overwrite.

    Fresh pages cost more than the decoding itself (QLoRA unpacks each weight twice a step), so they are reused.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    buffers = mine()
    key = (dtype, device, stream, use)
    if key not in buffers or buffers[key].numel() < n:
        buffers.pop(key, None)
        buffers[key] = torch.empty(n, dtype=dtype, device=device)
    return buffers[key][:n]


def room(n: int) -> int:
    """Room for n values, of few sizes: the next of 1, 1.25, 1.5, 1.75 times a power of two, or of the multiples of 16.

    What is as large serves many n: a buffer, a CUDA graph.
    """
    step = max(16, 1 << max(0, (n - 1).bit_length() - 3))
    return -(-n // step) * step


def mine() -> dict[Any, Tensor]:
    """This thread's buffers, to be lent to the thread that runs the backward."""
    return _local.__dict__.setdefault("buffers", {})


@contextlib.contextmanager
def borrowed(buffers: dict[Any, Tensor]) -> Iterator[None]:
    """Inside, this thread uses another's buffers, which must wait meanwhile: as the caller of a backward does.

    Autograd runs the backward on a GPU in a thread of its own, which would otherwise hold a second set.
    """
    own = mine()
    _local.__dict__["buffers"] = buffers
    try:
        yield
    finally:
        _local.__dict__["buffers"] = own


@contextlib.contextmanager
def lent(stream: torch.cuda.Stream) -> Iterator[list[Tensor]]:
    """Inside, `stream` uses this thread's buffers of the current stream, which must wait meanwhile: as it does while
    `stream` records a CUDA graph.  The list holds them afterwards, and whoever replays the graph must hold it.
    """
    buffers, here, held = mine(), torch.cuda.current_stream().cuda_stream, list[Tensor]()
    for (dtype, device, at, use), buffer in list(buffers.items()):
        if at == here and device.type == "cuda":
            buffers[dtype, device, stream.cuda_stream, use] = buffer
    try:
        yield held
    finally:
        held += [buffers.pop(key) for key in list(buffers) if key[2] == stream.cuda_stream]


def keep_pages() -> bool:
    """Tells the C library to keep freed memory for the next allocation; whether it listened (glibc does).

    A step allocates and frees the same hundreds of MB again and again.  glibc gives blocks above 32 MB back at every
    free and trims the rest: 36 000 page faults a step of SmolLM2 at 8 x 64, 0.17 of 2.2 s (LOG.md, 2026-11-23).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_threshold, top_pad = -1, -3, -2
    limit = 2**31 - 1
    return all((mallopt(trim_threshold, limit), mallopt(mmap_threshold, limit), mallopt(top_pad, 2**26)))
