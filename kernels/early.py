"""Launches that may begin while the one before them ends (programmatic dependent launch, Hopper and later).

A kernel launched so fetches what does not depend on the launch before it, waits for that one, then goes on.  It can
only begin where a multiprocessor divides its 256 KB into cache and shared memory as the kernel that runs there does;
else the multiprocessor must first run empty.  The driver chooses the division by what each kernel asks for, so that
neighbours of other needs get others: a token of an 8B model took 3.7 ms on an H100, and takes 2.6 where kernels that
follow each other share one division (LOG.md).  Triton has no word for it, so the driver is asked here.

Source: PTX ISA, griddepcontrol; CUDA driver API, cuFuncSetAttribute, preferred shared memory carve-out.
"""

import ctypes
import functools
import warnings
from typing import Any

import torch

from lora.kernels._triton import AVAILABLE, triton
from lora.kernels.dispatch import INTERPRETED

ALIKE = {"gemv4_kernel", "_down_kernel", "_feed_kernel", "_attend_kernel"}  # kernels that follow each other in a token
CARVE_OUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
MOST_SHARED = 100  # per cent: as much shared memory as there is, which gemv4_kernel needs anyway


def divide(module: int, function: int, name: str, *_: Any) -> None:
    """Asks for one division for the kernels ALIKE; Triton calls it with each kernel that it loads onto a GPU."""
    if name in ALIKE and (status := _driver().cuFuncSetAttribute(ctypes.c_void_p(function), CARVE_OUT, MOST_SHARED)):
        warnings.warn(
            f"{name} keeps the driver's division of memory (error {status}): tokens come slower", stacklevel=2
        )


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


if AVAILABLE and not INTERPRETED:
    triton.knobs.runtime.kernel_load_end_hook.add(divide)


@functools.cache
def can_overlap(device: torch.device) -> bool:
    """Whether a launch may begin while the one before it ends."""
    return not INTERPRETED and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_early(early: bool, device: torch.device) -> dict[str, bool]:
    """Arguments of a launch that may begin before the one in front of it ends; the kernel waits by itself if EARLY."""
    early = early and can_overlap(device)
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}
