"""What each block of a training step keeps, by the memory that is free: all it can on the GPU, the rest on the host.

A block of M tokens whose widths are d (states), q (queries, keys and values), a (attention's output), f (the gate's)
keeps M (2 d + q + a + 2 f) values of "all", and nothing but M / 1000 of "host" (fused.py).  On an H100 with an 8B
model a block kept whole saves 2.8 ms of 600 for 0.77 GiB, while "no_gate" saves 0.25 ms for 0.28 GiB: so blocks are
kept whole or not at all.  The last blocks are kept, since their turn in the backward comes first.
Source: figures of benchmarks/bench_step.py in LOG.md.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora.kernels.cross_entropy import BUDGET_GPU
from lora.kernels.fold import ROOM
from lora.models.host import Host

MARGIN = 0.03  # of the card, for what nobody counts: fragments, libraries' workspaces


class Widths(NamedTuple):
    """Values a token of the parts of a block, and the number of blocks."""

    states: int
    qkv: int
    attended: int
    gate: int
    blocks: int

    def kept(self) -> int:
        """Values a token that a block keeps of "all"."""
        return 2 * self.states + self.qkv + self.attended + 2 * self.gate + ROOM

    def working(self) -> int:
        """Values a token that a step needs however little it keeps: one block's backward, and the states around it."""
        reused = self.gate + 2 * self.states + self.qkv + 4 * ROOM
        # of attention's backward: gradients of q, k, v, and float32 sums and per-head copies inside cuDNN
        attention = 2 * self.qkv + 5 * self.attended
        sending = 3 * (self.states + self.qkv + self.attended)  # copies to the host that are still under way
        return reused + self.kept() + max(2 * self.gate, attention) + sending + 4 * self.states


def fixed_bytes(widths: Widths, tokens: int, itemsize: int) -> int:
    """Bytes that a step takes beside the model however little its blocks keep."""
    decoded = (2 * widths.gate + ROOM) * (widths.states + ROOM)  # of the largest weight
    return (tokens * widths.working() + decoded) * itemsize + 2 * BUDGET_GPU


def keep_on_gpu(widths: Widths, tokens: int, itemsize: int, free: int) -> list[str]:
    """What each block keeps when `free` bytes may be used for a step over `tokens` tokens."""
    block = tokens * widths.kept() * itemsize
    whole = (free - fixed_bytes(widths, tokens, itemsize)) // block
    whole = max(0, min(widths.blocks, whole))
    return ["host"] * (widths.blocks - whole) + ["all"] * whole


def free_bytes(device: torch.device, limit: int | None = None) -> int:
    """Bytes that tensors of this process may still take on a GPU, within `limit` bytes for all its tensors."""
    driver, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    free = driver + reserved - allocated - int(MARGIN * total)
    return free if limit is None else min(free, limit - allocated)


class Keeping:
    """What the blocks of one model keep, as its user wishes or as memory allows.

    Attributes:
        keep: a word of `fused.KEEPS` for all blocks, or one for each; None goes by what is free
        budget: bytes that tensors may take on the GPU in all; None is what is free
        recordable: whether the last step ran fused with all kept on the GPU, and so fits a CUDA graph
    """

    def __init__(self, config: Any) -> None:
        c = config
        heads = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        self.widths = Widths(c.hidden_size, heads, c.num_heads * c.head_dim, c.intermediate_size, c.num_layers)
        self.keep: str | list[str] | None = None
        self.budget: int | None = None
        self.recordable = False
        self.host = Host()
        self.chosen: tuple[int, list[str]] = (0, [])  # tokens of the largest step so far, and what goes with it

    def choose(self, x: Tensor) -> list[str]:
        """What each block keeps of a step over the states x (B, T, d); decided anew only for a larger step."""
        tokens = x.shape[0] * x.shape[1]
        if isinstance(self.keep, list):
            return self.keep
        if self.keep is not None or not x.is_cuda:
            return [self.keep or "all"] * self.widths.blocks
        if tokens > self.chosen[0]:
            free = free_bytes(x.device, self.budget)
            self.chosen = tokens, keep_on_gpu(self.widths, tokens, x.element_size(), free)
        return self.chosen[1]

    def needs(self, tokens: int, itemsize: int) -> int:
        """Bytes that a step takes at most, beside the model, with all kept."""
        whole = self.widths.blocks * tokens * self.widths.kept() * itemsize
        return fixed_bytes(self.widths, tokens, itemsize) + whole


def parse_bytes(text: str) -> int:
    """24GiB, 500MiB or 8e9 as bytes."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("GB", 10**9), ("", 1)):
        if text.endswith(unit):
            try:
                value = float(text.removesuffix(unit)) * size
            except ValueError:
                break
            if math.isfinite(value) and value > 0:
                return int(value)
            break
    raise ValueError(f"{text!r} is no size of memory; write 24GiB, 500MiB or 24GB")
