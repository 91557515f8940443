"""The same bits from every run: which attention a GPU takes, and what torch is asked for.

Our own kernels add up in one order.  cuDNN's attention does not in its backward: the gradient of q is a sum over blocks
of keys that arrive in any order, so that in some runs a few values of q_proj's update end on another bit (LOG.md).
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend

filling: Any = torch.utils.deterministic

# In the order of preference: cuDNN's is 1.7 times as fast as flash attention on an H100
BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def backends() -> list[SDPBackend]:
    """BACKENDS, without cuDNN's where torch is asked for the same bits from every run."""
    fixed = torch.are_deterministic_algorithms_enabled()
    return [b for b in BACKENDS if not fixed or b != SDPBackend.CUDNN_ATTENTION]


@contextlib.contextmanager
def same_bits(wanted: bool) -> Iterator[None]:
    """Inside, where `wanted`, torch takes ways that give the same bits again, or raises RuntimeError where it has none.

    Only warned, flash attention would stay with the ways it takes else.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it; read when cuBLAS starts
    before = torch.get_deterministic_debug_mode(), filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    filling.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        filling.fill_uninitialized_memory = before[1]
