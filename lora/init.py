"""How the factors start: one random, the other zero, so that a fresh adapter adds nothing.

Linear: A uniform in ±1/sqrt(in) (Kaiming with a = sqrt 5), B = 0.  Embedding: A = 0, B normal.
Source: loralib/layers.py of microsoft/LoRA, which peft follows.
"""

import math

import torch
from torch import Tensor, nn


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
