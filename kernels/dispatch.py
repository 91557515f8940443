"""Torch or Triton: the only place that chooses.

LORA_KERNELS=auto    (the default) Triton for tensors on a GPU, the torch twin elsewhere
LORA_KERNELS=torch   the twin everywhere
LORA_KERNELS=triton  Triton or an error; with TRITON_INTERPRET=1 set before Python starts, Triton's interpreter
                     runs the kernels on CPU tensors: slow, exact, for tests without a GPU
"""

import contextlib
import functools
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from lora.kernels import _triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when a kernel is defined, so it is fixed now
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_dry = False  # inside `as_on_gpu`


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """Inside, tensors take the way that a GPU's would: for fake ones, whose kernels never run (a dry run)."""
    global _dry
    before, _dry = _dry, True
    try:
        yield
    finally:
        _dry = before


def on_gpu(t: Tensor) -> bool:
    """Whether a tensor lies on a GPU, or is to be taken for one that does."""
    return t.is_cuda or _dry


def use_triton(*tensors: Tensor) -> bool:
    """Whether a Triton kernel takes these tensors.  float64 always goes to the twin: kernels compute in float32.

    Raises ValueError for tensors on several devices, RuntimeError where Triton was insisted on and cannot run.
    """
    wish = os.environ.get("LORA_KERNELS", "auto")
    if wish not in ("auto", "torch", "triton"):
        raise ValueError(f"LORA_KERNELS={wish!r}: there are 'auto', 'torch' and 'triton'")
    first = tensors[0].device
    if any(t.device != first for t in tensors):
        devices = ", ".join(sorted({str(t.device) for t in tensors}))
        raise ValueError(f"one operation got tensors on {devices}; move them to one device")
    wide = any(t.is_floating_point() and t.dtype not in _DTYPES for t in tensors)
    if _dry:
        return not wide
    there = first.type == "cuda"
    if wish == "triton":
        if not _triton.AVAILABLE:
            raise RuntimeError("LORA_KERNELS=triton, but Triton is not installed: pip install triton")
        if not (there or INTERPRETED):
            raise RuntimeError(
                f"LORA_KERNELS=triton, but the tensors are on {first}; "
                "move them to a GPU, or set TRITON_INTERPRET=1 before Python starts"
            )
        if wide:
            dtypes = ", ".join(sorted({str(t.dtype) for t in tensors if t.is_floating_point()}))
            raise RuntimeError(f"LORA_KERNELS=triton, but the tensors are {dtypes}; kernels take 32 and 16 bits")
        return True
    return wish == "auto" and there and _triton.AVAILABLE and not wide


@functools.cache
def can_overlap(device: torch.device) -> bool:
    """Whether a launch may begin while the one before it ends (programmatic dependent launch: Hopper and later)."""
    return not INTERPRETED and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_early(early: bool, device: torch.device) -> dict[str, bool]:
    """Arguments of a launch that may begin before the one in front of it ends; the kernel waits by itself if EARLY."""
    early = early and can_overlap(device)
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


@functools.cache
def _shared_memory(index: int) -> int:
    """Bytes of shared memory that a program may take on GPU `index`, as Triton counts them."""
    return _triton.triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]


def stages(nbytes: int, device: torch.device) -> int:
    """Steps of `nbytes` at once: three where shared memory has room for them and for what a reduction needs."""
    if device.type != "cuda":
        return 1
    index = torch.cuda.current_device() if device.index is None else device.index
    return 3 if 3 * nbytes <= _shared_memory(index) - 2**14 else 1
