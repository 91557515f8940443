"""How the factors start.

Linear: A uniform in ±1/sqrt(in) (Kaiming with a = sqrt 5), B = 0, so that a fresh adapter adds nothing.  Embedding:
A = 0, B normal.  Source: loralib/layers.py of microsoft/LoRA, which peft follows.

PiSSA: A0 and B0 are the largest r singular triples of the weight, W = U S Vᵀ:
    A0 = sqrt(S_r / s) V_rᵀ,   B0 = U_r sqrt(S_r / s),   and the residual W - s B0 A0 is what stands frozen
    y = (W - s B0 A0) x + s B A x
The residual is never stored: the layer keeps W, and A0, B0 frozen beside A, B, and computes W x + s (B A - B0 A0) x.
So the base stays the base, bit for bit, when the adapter is off; the adapter is a plain LoRA of rank 2 r for any
other program (the known conversion); and a 4-bit base is not rounded to 4 bits a second time, which would add the
error of that rounding to a start that has one already.  It costs the product of a second pair of factors, and a fresh
adapter equals the base within rounding, not bit for bit.
Source: PiSSA, arXiv:2404.02948, section 3; `pissa_niter_N` draws its SVD at random (Halko et al., arXiv:0909.4061).
"""

import math

import torch
from torch import Tensor, nn

from lora.dora import dense


def init_linear(a: Tensor, b: Tensor) -> None:
    """A (r, in) Kaiming-uniform, B (out, r) zero, in place."""
    with torch.no_grad():
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        b.zero_()


def init_embedding(a: Tensor, b: Tensor) -> None:
    """A (r, vocab) zero, B (dim, r) standard normal, in place."""
    with torch.no_grad():
        a.zero_()
        nn.init.normal_(b)


@torch.no_grad()
def init_pissa(a: Tensor, b: Tensor, scale: float, base: nn.Module, how: str) -> None:
    """A (r, in) and B (out, r) from the largest singular triples of the base's weight, in place.

    `how` is "pissa", the whole SVD, or "pissa_niter_N", one of rank r by N iterations.  Raises ValueError where the
    weight has no r singular values.
    """
    w, r = dense(base), a.shape[0]
    if r > min(w.shape):
        raise ValueError(
            f"init={how!r} takes r={r} singular values, and a weight of {tuple(w.shape)} has {min(w.shape)}"
        )
    if how == "pissa":
        u, s, vt = torch.linalg.svd(w, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(w, min(r + 8, *w.shape), niter=int(how.rpartition("_")[2]))  # 8 more: a better r
        vt = v.T
    root = (s[:r] / scale).sqrt()
    a.copy_(root[:, None] * vt[:r])
    b.copy_(u[:, :r] * root)
