"""Triton, or a stand-in under which a kernel file can still be imported where Triton has no wheel.

`triton.jit` of the stand-in returns its argument, so the file's torch twin works and its kernel is never launched:
`dispatch.use_triton` is the only choice, and it knows AVAILABLE.
"""

from typing import Any

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
except ImportError:  # macOS, Windows
    AVAILABLE = False

    class _Language:
        """Enough of triton.language for the signatures of kernels."""

        constexpr = staticmethod(lambda value: value)

    class _Triton:
        """Enough of triton for the decorators of kernels."""

        jit = staticmethod(lambda function: function)

    tl: Any = _Language()  # type: ignore[no-redef]
    triton: Any = _Triton()  # type: ignore[no-redef]

__all__ = ["AVAILABLE", "tl", "triton"]
