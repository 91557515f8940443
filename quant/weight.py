"""Packed: a weight as bytes, scales and a shape, one dataclass; and the one function that makes it from floats."""

import dataclasses
import functools
import math

import torch
from torch import Tensor

from lora.kernels.code4 import byte_table, check4, dequantize4, dequantize_scales
from lora.kernels.encode4 import decision_cells, quantize4
from lora.quant.blocks import nested_map, quantize_scales
from lora.quant.codebook import codebook

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclasses.dataclass(frozen=True)
class Packed:
    """A 4-bit weight of any shape.

    q        uint8, ceil(n/2) bytes; as (N, K/2) for a matrix of even K, so that rows can be cut out, else (bytes,)
    scales   (absmax,) float32, or doubly quantized (q_absmax u8, map f32 (256,), absmax2 f32, offset f32 ())
    code     (16,) float32
    """

    kind: str
    shape: tuple[int, ...]
    block: int
    q: Tensor
    code: Tensor
    scales: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        check_block(self.block)
        n = math.prod(self.shape)
        check4(self.q, self.scales, self.block, n)
        if self.q.numel() > (n + 1) // 2 or self.scales[0].numel() > -(-n // self.block):
            raise ValueError(
                f"{self.q.numel()} bytes and {self.scales[0].numel()} scales are more than a weight of shape "
                f"{self.shape} has in blocks of {self.block}: {(n + 1) // 2} and {-(-n // self.block)}"
            )
        if self.code.dtype != torch.float32 or self.code.shape != (16,):
            raise ValueError(
                f"the code is {self.code.dtype} of shape {tuple(self.code.shape)}; it has 16 float32 values"
            )

    @property
    def double(self) -> bool:
        return len(self.scales) > 1

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales; the code books are shared and small, and not counted."""
        counted = self.scales if not self.double else (self.scales[0], self.scales[2], self.scales[3])
        return self.q.numel() + sum(t.numel() * t.element_size() for t in counted)

    def absmax(self) -> Tensor:
        """The block scales, float32 (ceil(n/block),)."""
        if not self.double:
            return self.scales[0]
        q, code, absmax, offset = self.scales
        return dequantize_scales(q, code, absmax, offset)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as floats, in its own shape."""
        table, n = byte_table(self.code), math.prod(self.shape)
        flat = dequantize4(self.q.view(-1), self.scales, table, self.block, n, dtype)
        return flat.view(self.shape)


def check_block(block: int) -> None:
    if block not in BLOCKS:
        raise ValueError(f"block={block}: a block holds one of {BLOCKS} weights")


def pack_shape(shape: tuple[int, ...], q: Tensor) -> Tensor:
    """q as (N, K/2) where the weight is a matrix whose rows end on whole bytes, else flat."""
    return q.view(shape[0], shape[1] // 2) if len(shape) == 2 and shape[1] % 2 == 0 else q.view(-1)


def quantize_tensor(
    w: Tensor, kind: str = "nf4", block: int = 64, double: bool = True, name: str = "the weight"
) -> Packed:
    """`w` (any shape, float32/bfloat16/float16) in 4 bits; `name` is what an error calls it.

    Raises ValueError for an unknown code or block size, an empty tensor, or a value that is not finite:
    one NaN or inf would spoil its whole block without a word.
    """
    check_block(block)
    code, cells = code_on(kind, w.device)
    if not w.is_floating_point():
        raise TypeError(f"{name} is {w.dtype}: only floating weights can be quantized")
    if w.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(w.shape)}: nothing to quantize")
    q, absmax, sums = quantize4(w, code, block, cells)
    # A NaN or inf anywhere makes its block's absmax NaN or inf, so the scales tell without another pass
    if not math.isfinite(sums.sum().item()):
        bad = int((~torch.isfinite(w)).sum())
        raise ValueError(f"{name} holds {bad} values that are NaN or inf; repair the checkpoint before quantizing it")
    scales: tuple[Tensor, ...] = (absmax,)
    if double:
        q2, absmax2, offset = quantize_scales(absmax, sums)
        scales = (q2, nested_map(w.device), absmax2, offset)
    return Packed(kind, tuple(w.shape), block, pack_shape(tuple(w.shape), q), code, scales)


@functools.cache
def code_on(kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """The code and its decision cells on a device, made once: a copy from the host would wait for the GPU."""
    with torch.inference_mode(False):  # or, first asked for there, no backward could save them ever after
        code = codebook(kind)
        return code.to(device), decision_cells(code).to(device)
