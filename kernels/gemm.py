"""The two matrix products of a linear layer, by the faster of the two libraries inside torch.

    linear(x, w)   y  = x wᵀ     (M, K) (N, K) -> (M, N)
    matmul(dy, w)  dx = dy w     (M, N) (N, K) -> (M, K)

On a CPU torch sends float32 products to MKL, which leaves AVX-512 unused on AMD processors; oneDNN,
in the same wheel, uses it: 84 against 130 ms for 512x4096x4096 on two Zen 4 cores (LOG.md, 2026-11-23).
The rule looks only at the machine and the operands, never at a timing, so a run repeats bit for bit.

oneDNN puts the second factor of a product in an order of its own first, for which wᵀ must be turned over, all of it:
a fifth of the time where x has 64 rows.  There the product is yᵀ = w xᵀ: w is read as it lies (LOG.md, 2026-11-27).
"""

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor

FEW = 128  # rows up to which yᵀ is made
PIECE = 4096  # rows of w at a time, so that yᵀ is still in the cache when it is turned over


@functools.cache
def _is_amd() -> bool:
    info = Path("/proc/cpuinfo")
    vendor = info.read_text()[:400] if info.is_file() else platform.processor()
    return "AuthenticAMD" in vendor


@functools.cache
def _has_avx512() -> bool:
    info = Path("/proc/cpuinfo")
    return info.is_file() and " avx512f" in info.read_text()


def _by_onednn(x: Tensor, w: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == w.dtype == torch.float32
        and x.shape[0] >= 16  # below that both are bound by memory, and oneDNN's set-up costs more
        and _is_amd()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _is_few(x: Tensor, w: Tensor) -> bool:
    return x.shape[0] <= min(FEW, w.shape[0]) and w.is_contiguous()


def linear(x: Tensor, w: Tensor) -> Tensor:
    """x wᵀ for x (M, K), w (N, K). No gradient: call it inside an autograd function."""
    if not _by_onednn(x, w):
        return x @ w.T
    M, N = x.shape[0], w.shape[0]
    if not _is_few(x, w):
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    y = x.new_empty(M, N)
    for start in range(0, N, PIECE):
        part = slice(start, start + PIECE)
        # times one: copy_ turns over with one thread
        torch.mul(torch.ops.mkldnn._linear_pointwise(w[part], x, None, "none", [], "").T, 1.0, out=y[:, part])
    return y


def linear_anyhow(x: Tensor, w: Tensor) -> Tensor:
    """`linear` whose result may lie in memory by columns: where it is read once, by an operation of its own."""
    if _is_few(x, w) and _by_onednn(x, w):
        return torch.ops.mkldnn._linear_pointwise(w, x, None, "none", [], "").T
    return linear(x, w)


def matmul(x: Tensor, w: Tensor) -> Tensor:
    """x w for x (M, N), w (N, K). No gradient: call it inside an autograd function."""
    if _has_avx512() and _by_onednn(x, w):
        return torch.ops.mkldnn._linear_pointwise(x, w.T, None, "none", [], "")
    return x @ w
