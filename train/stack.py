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
from lora.kernels.side import Rounded
from lora.layer import Adapted


class Stack:
    """Takes over the storage of the adapters `names` of `layers`, in which all of them have one.

    In memory a and b of a layer follow each other, as in a solo run, on which 8-bit moments depend: their blocks go
    over borders.  With `joined` come all a, then all b: those of layers that read one input are then one tensor.

    Attributes:
        w, grad: (k, n) float32; optimizers and the adapters' own parameters are views into them
        lows: of each layer, (a (k, r, K), b (k, N, r), scales (k,)) with gradients that add up in `grad`; after `round`
            also the factors rounded
    """

    def __init__(self, layers: Sequence[Adapted], names: Sequence[str], joined: bool = True) -> None:
        self.layers, self.names = list(layers), list(names)
        adapters: list[list[Adapter]] = [[layer.adapters[name] for name in names] for layer in layers]
        k, r = len(names), max(adapter.r for row in adapters for adapter in row)
        device = adapters[0][0].a.device
        pairs = [((r, row[0].a.shape[1]), (row[0].b.shape[0], r)) for row in adapters]
        L = len(layers)
        order = [(j, which) for j in range(L) for which in range(2)]
        if joined:
            order.sort(key=lambda place: place[1])
        shapes = [torch.Size(pairs[j][which]) for j, which in order]
        ends = list(itertools.accumulate(shape.numel() for shape in shapes))
        self.n = ends[-1]
        n = -(-self.n // BLOCK8) * BLOCK8  # every row begins where a kernel may load widely
        self.w, self.grad = (torch.zeros(k, n, dtype=torch.float32, device=device) for _ in range(2))
        self.places = [(*place, end, shape) for place, end, shape in zip(order, ends, shapes, strict=True)]
        self.members: list[list[nn.Parameter]] = [[] for _ in names]  # of each adapter, factors with their room
        self.placed: tuple[Any, ...] | None = None
        self.low: Tensor | None = None  # (2, k, n): w rounded, as it is and times the scales
        leaves: dict[tuple[int, int], Tensor] = {}
        grads = self._views(self.grad)
        for (j, which), w in self._views(self.w).items():
            grad = grads[j, which]
            for i, adapter in enumerate(adapters[j]):
                own: nn.Parameter = adapter.b if which else adapter.a
                rows, columns = own.shape
                w[i, :rows, :columns].copy_(own.detach())
                own.data, own.grad = w[i, :rows, :columns], grad[i, :rows, :columns]
                whole = nn.Parameter(w[i])
                whole.grad = grad[i]
                self.members[i].append(whole)
            leaves[j, which] = w.detach().requires_grad_()
            leaves[j, which].grad = grad
        scales = [[adapter.scale for adapter in row] for row in adapters]
        if any(row != scales[0] for row in scales):
            raise ValueError("an adapter of a stack has one scale in all its layers")
        self.scales = torch.tensor(scales[0], dtype=torch.float32, device=device)  # (k,)
        self.lows: list[tuple[Any, ...]] = [(leaves[j, 0], leaves[j, 1], self.scales) for j in range(L)]

    def _views(self, flat: Tensor) -> dict[tuple[int, int], Tensor]:
        """The factors in a buffer (k, n), by layer and which: a (k, r, K) is 0, b (k, N, r) is 1."""
        return {(j, which): flat[:, end - x.numel() : end].unflatten(1, x) for j, which, end, x in self.places}

    @torch.no_grad()
    def round(self, dtype: torch.dtype) -> None:
        """Gives `lows` the factors as they are now, rounded, for the blocks that take them: call it after each step."""
        if self.low is None:
            self.low = torch.zeros(2, *self.w.shape, dtype=dtype, device=self.w.device)
            plain, scaled = self._views(self.low[0]), self._views(self.low[1])
            self.lows = [
                (*low[:3], Rounded(plain[j, 0], plain[j, 1], scaled[j, 0], scaled[j, 1]))
                for j, low in enumerate(self.lows)
            ]
            self.placed = None
        self.low[0].copy_(self.w)
        torch.mul(self.w, self.scales[:, None], out=self.low[1])

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
