"""The factors of several adapters side by side in memory, so that a layer's are one batched tensor.

    w, grad (k, n) float32      a row an adapter, its factors end to end; a layer's a is w[:, i : j] as (k, r, K)

Ranks may differ: each adapter has room for the largest, and what it does not use is and stays 0, since the gradient
of a row of a comes through the column of b and the other way round.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora.adapter import Adapter, ByRow
from lora.kernels.adamw import BLOCK8
from lora.kernels.side import Rounded, Segments, round_into, segments
from lora.layer import Adapted


class Stack:
    """Takes over the storage of the adapters `names` of `layers`, in which all of them have one.

    Attributes:
        w, grad: (k, n) float32; optimizers and the adapters' own parameters are views into them
        lows: of each layer, (a (k, r, K), b (k, N, r), scales (k,)) with gradients that add up in `grad`; after `round`
            also the factors rounded
    """

    def __init__(self, layers: Sequence[Adapted], names: Sequence[str]) -> None:
        self.layers, self.names = list(layers), list(names)
        adapters: list[list[Adapter]] = [[layer.adapters[name] for name in names] for layer in layers]
        k, r = len(names), max(adapter.r for row in adapters for adapter in row)
        device = adapters[0][0].a.device
        pairs = [((r, row[0].a.shape[1]), (row[0].b.shape[0], r)) for row in adapters]
        shapes = [torch.Size(shape) for pair in pairs for shape in pair]  # a and b of a layer, as a solo run has them
        sizes = [shape.numel() for shape in shapes]
        self.n = sum(sizes)
        n = -(-self.n // BLOCK8) * BLOCK8  # every row begins where a kernel may load widely
        self.w, self.grad = (torch.zeros(k, n, dtype=torch.float32, device=device) for _ in range(2))
        self.shapes, self.starts = shapes, [0, *itertools.accumulate(sizes)][:-1]
        self.members: list[list[nn.Parameter]] = [[] for _ in names]  # of each adapter, factors with their room
        self.placed: tuple[Any, ...] | None = None
        self.low: tuple[Tensor, Tensor, Segments] | None = (
            None  # w rounded, as it is and times the scales; what is where
        )
        leaves = []
        for j, (w, grad) in enumerate(zip(self._views(self.w), self._views(self.grad), strict=True)):
            for i, adapter in enumerate(adapters[j // 2]):
                own: nn.Parameter = adapter.b if j % 2 else adapter.a
                rows, columns = own.shape
                w[i, :rows, :columns].copy_(own.detach())
                own.data, own.grad = w[i, :rows, :columns], grad[i, :rows, :columns]
                whole = nn.Parameter(w[i])
                whole.grad = grad[i]
                self.members[i].append(whole)
            leaf = w.detach().requires_grad_()
            leaf.grad = grad
            leaves.append(leaf)
        scales = [[adapter.scale for adapter in row] for row in adapters]
        if any(row != scales[0] for row in scales):
            raise ValueError("an adapter of a stack has one scale in all its layers")
        self.scales = torch.tensor(scales[0], dtype=torch.float32, device=device)  # (k,)
        self.lows: list[tuple[Any, ...]] = [(a, b, self.scales) for a, b in zip(leaves[::2], leaves[1::2], strict=True)]

    def _views(self, flat: Tensor, starts: Sequence[int] | None = None) -> list[Tensor]:
        """The factors in a buffer (k, n): a (k, r, K) and b (k, N, r) of every layer in turn."""
        places = zip(starts or self.starts, self.shapes, strict=True)
        return [flat[:, start : start + shape.numel()].unflatten(1, shape) for start, shape in places]

    @torch.no_grad()
    def round(self, dtype: torch.dtype) -> None:
        """Gives `lows` the factors as they are now, rounded, for the blocks that take them: call it after each step."""
        if self.low is None:
            # all a, then all b: those of layers that read one input lie side by side, and so are one tensor for fold.py
            sizes = [shape.numel() for shape in self.shapes]
            ends = list(itertools.accumulate(sizes[::2] + sizes[1::2]))
            firsts = [end - size for end, size in zip(ends, sizes[::2] + sizes[1::2], strict=True)]
            L = len(self.layers)
            starts = [start for pair in zip(firsts[:L], firsts[L:], strict=True) for start in pair]
            plain, scaled = (torch.zeros(self.w.shape, dtype=dtype, device=self.w.device) for _ in range(2))
            self.low = plain, scaled, segments(self.starts, starts, sizes, self.w.device)
            as_is, times = self._views(plain, starts), self._views(scaled, starts)
            self.lows = [
                (*low[:3], Rounded(as_is[2 * j], as_is[2 * j + 1], times[2 * j], times[2 * j + 1]))
                for j, low in enumerate(self.lows)
            ]
            self.placed = None
        plain, scaled, where = self.low
        round_into(self.w, self.scales, where, plain, scaled)

    def buffers(self, i: int) -> tuple[Tensor, Tensor]:
        """The memory (n,) of adapter i's factors, and of their gradients."""
        return self.w[i, : self.n], self.grad[i, : self.n]

    def place(self, who: Sequence[int], ends: Sequence[int], together: bool) -> None:
        """Gives adapters `who` their rows of the next batch: up to ends[0] the first one's, and so on.

        With `together`, which takes all of them and as many rows of each, a layer's factors are one batched tensor.
        """
        wanted = (tuple(who), tuple(ends), together)
        if wanted == self.placed:
            return
        self.placed = wanted
        starts = [0, *ends[:-1]]
        for layer, low in zip(self.layers, self.lows, strict=True):
            adapters = [layer.adapters[self.names[i]] for i in who]
            layer.by_row = ByRow(list(zip(adapters, starts, ends, strict=True)), low if together else None)

    def release(self) -> None:
        """Takes the rows away again, and gives every adapter memory of its own."""
        self.placed = None
        for layer in self.layers:
            layer.by_row = None
            for name in self.names:
                for own in (layer.adapters[name].a, layer.adapters[name].b):
                    own.data, own.grad = own.data.clone(memory_format=torch.contiguous_format), None
