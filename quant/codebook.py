"""The sixteen values of a 4-bit code, and where they come from.

NF4 ("NormalFloat") puts its levels at quantiles of the normal distribution, eight above zero, seven
below and zero itself, so that weights drawn from a normal use the codes evenly.  FP4 is a float with
one sign, two exponent and one mantissa bit, with a subnormal of its own; its codes are not in order.
Both are scaled so that the largest value is 1.  Bit for bit those of bitsandbytes.

Source: QLoRA, arXiv:2305.14314, section 3 and appendix E; csrc/kernels.cu of bitsandbytes for FP4.
"""

import functools

import torch
from torch import Tensor

# Half of 1/32 + 1/30 off from 1: the mean of the outermost quantiles of 16 and 15 bins.  The published
# constant is this truncation of 0.96770833...; the exact value would change 12 of the 16 words.
_OFFSET = 0.9677083


@functools.cache
def nf4() -> Tensor:
    """The 16 NF4 levels, ascending, float32 (16,)."""
    # linspace in float32 and the inverse normal distribution in float64: any other mix changes bits
    up = torch.linspace(_OFFSET, 0.5, 9, dtype=torch.float32)[:-1].double()  # (8,)
    down = torch.linspace(_OFFSET, 0.5, 8, dtype=torch.float32)[:-1].double()  # (7,)
    levels = torch.cat((torch.special.ndtri(up), torch.zeros(1, dtype=torch.float64), -torch.special.ndtri(down)))
    levels = levels.sort().values.float()
    return levels / levels.max()


@functools.cache
def fp4() -> Tensor:
    """The 16 FP4 values in code order (sign, exponent, mantissa bits), float32 (16,)."""
    positive = torch.tensor([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]) / 12  # float32 division, as published
    return torch.cat((positive, -positive)) + 0.0  # + 0.0: code 8 decodes to +0.0


CODEBOOKS = {"nf4": nf4, "fp4": fp4}


def codebook(kind: str) -> Tensor:
    """The values of code book `kind`, "nf4" or "fp4"."""
    if kind not in CODEBOOKS:
        raise ValueError(f"quantize={kind!r}: no such 4-bit code; choose one of {sorted(CODEBOOKS)}")
    return CODEBOOKS[kind]()


@functools.cache
def dynamic_map(signed: bool = True) -> Tensor:
    """The 256 levels of the 8-bit dynamic code, ascending, float32 (256,): signed for block scales and for Adam's
    first moment, unsigned for its second.

    Decades 1e-6 .. 1, each with twice the levels of the one below, of both signs where signed, or else with twice
    as many of one; then 0 and 1.
    Source: 8-bit Optimizers, arXiv:2110.02861, section 2.1, in bitsandbytes' create_dynamic_map.
    """
    levels = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float32)
        middle = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        levels += [middle, -middle] if signed else [middle]
    return torch.cat(levels).sort().values
