"""The factors of several adapters side by side in memory, so that a layer's are one batched tensor.

    w, grad (k, n) float32      a row an adapter, its factors end to end; a layer's a is w[:, i : j] as (k, r, K)

Ranks may differ: each adapter has room for the largest, and what it does not use is and stays 0, since the gradient
of a row of a comes through the column of b and the other way round.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora.adapter import Adapter, ByRow
from lora.kernels.adamw import BLOCK8
from lora.layer import Adapted


class Stack:
    """Takes over the storage of the adapters `names` of `layers`, in which all of them have one.

    Attributes:
        w, grad: (k, n) float32; optimizers and the adapters' own parameters are views into them
        lows: of each layer, (a (k, r, K), b (k, N, r), scales (k,)) with gradients that add up in `grad`
    """

    def __init__(self, layers: Sequence[Adapted], names: Sequence[str]) -> None:
        self.layers, self.names = list(layers), list(names)
        adapters: list[list[Adapter]] = [[layer.adapters[name] for name in names] for layer in layers]
        k, r = len(names), max(adapter.r for row in adapters for adapter in row)
        device = adapters[0][0].a.device
        shapes = [((r, row[0].a.shape[1]), (row[0].b.shape[0], r)) for row in adapters]
        n = sum(torch.Size(shape).numel() for pair in shapes for shape in pair)
        self.n = n
        n = -(-n // BLOCK8) * BLOCK8  # every row begins where a kernel may load widely
        self.w, self.grad = (torch.zeros(k, n, dtype=torch.float32, device=device) for _ in range(2))
        self.lows: list[tuple[Tensor, Tensor, Tensor]] = []
        self.members: list[list[nn.Parameter]] = [[] for _ in names]  # of each adapter, factors with their room
        self.placed: tuple[Any, ...] | None = None
        start = 0
        for row, pair in zip(adapters, shapes, strict=True):
            both: list[Any] = []
            for which, shape in zip(("a", "b"), pair, strict=True):
                part = slice(start, start + torch.Size(shape).numel())
                start = part.stop
                w, grad = (t[:, part].unflatten(1, shape) for t in (self.w, self.grad))
                for i, adapter in enumerate(row):
                    own: nn.Parameter = getattr(adapter, which)
                    rows, columns = own.shape
                    w[i, :rows, :columns].copy_(own.detach())
                    own.data, own.grad = w[i, :rows, :columns], grad[i, :rows, :columns]
                    whole = nn.Parameter(w[i])
                    whole.grad = grad[i]
                    self.members[i].append(whole)
                leaf = w.detach().requires_grad_()
                leaf.grad = grad
                both.append(leaf)
            scales = torch.tensor([adapter.scale for adapter in row], dtype=torch.float32, device=device)
            self.lows.append((both[0], both[1], scales))

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
