"""A batch's forward and backward as one CUDA graph: small batches are bound by launches, not by the GPU.

A step of an 8B model over 512 tokens launches some 5,000 kernels: 320 ms from Python, 50 ms replayed (LOG.md).  A graph
serves batches of one shape: the rows' number and length, and room for so many learned tokens; unused room counts 0.
A shape is recorded when it comes the second time.  Gradients add up in the parameters' .grad, as without a graph.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from lora.eval.nll import token_nll
from lora.render import Batch

TOKENS = 8192  # of a batch, up to which launches matter: 2.7 % of a step at 8192 tokens of an 8B model
RECORD = True  # False runs every batch kernel by kernel
SPARE = 1.1  # a graph is recorded where so many times its memory is free
SHAPES = 4  # graphs held at once; each keeps its own memory


class _Recorded:
    def __init__(self, model: nn.Module, batch: Batch, room: int) -> None:
        device = batch.ids.device
        self.grads = _places(model)
        self.ids = batch.ids.clone()
        self.at = torch.zeros(room, dtype=torch.int64, device=device)
        self.target = torch.zeros(room, dtype=torch.int64, device=device)
        self.weight = torch.zeros(room, dtype=torch.float32, device=device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            padded = Batch(self.ids, batch.real, self.at, self.target, self.at, batch.rows)
            nll, hit = token_nll(model, padded)
            loss = (nll * self.weight).sum()
            loss.backward()
            self.loss = loss.detach()
            self.hits = (hit & (self.weight > 0)).sum()

    def run(self, batch: Batch, n: int) -> tuple[Tensor, Tensor]:
        m = batch.target.numel()
        self.ids.copy_(batch.ids)
        self.at.zero_()[:m].copy_(batch.at)
        self.target.zero_()[:m].copy_(batch.target)
        self.weight.zero_()[:m].fill_(1 / n)
        self.graph.replay()
        return self.loss, self.hits


class Graphs:
    """Runs batches of `model` forward and backward, recorded where that pays and is possible."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.seen: set[tuple[int, ...]] = set()
        self.graphs: OrderedDict[tuple[int, ...], _Recorded] = OrderedDict()

    def run(self, batch: Batch, n: int) -> tuple[Tensor, Tensor]:
        """Σ NLL / n and the number of learned tokens that were the likeliest, () each; gradients are added.

        The tensors are the graph's own: read or copy them before the next call.
        """
        key = (*batch.ids.shape, _room(batch.target.numel()))
        small = batch.ids.is_cuda and batch.ids.numel() <= TOKENS and batch.documents is None
        if RECORD and small and key in self.seen and _recordable(self.model):
            recorded = self.graphs.get(key)
            if recorded and recorded.grads != _places(self.model):  # it would add to memory that is others' now
                del self.graphs[key]
                recorded = None
            recorded = recorded or self._record(key, batch)
            if recorded:
                self.graphs.move_to_end(key)
                return recorded.run(batch, n)
        self.seen.add(key)
        nll, hit = token_nll(self.model, batch)
        loss = nll.sum() / n
        loss.backward()
        return loss.detach(), hit.sum()

    def _record(self, key: tuple[int, ...], batch: Batch) -> _Recorded | None:
        """The graph of a new shape; None where its memory does not fit beside what is there."""
        if None in _places(self.model):  # a gradient born in a graph would be lost with the next step
            return None
        if len(self.graphs) == SHAPES:
            self.graphs.popitem(last=False)
        torch.cuda.empty_cache()  # a graph has memory of its own: what the step without it used is of no use to it
        free, _ = torch.cuda.mem_get_info(batch.ids.device)
        keeping = self.model.keeping
        if keeping.budget is not None:
            free = min(free, keeping.budget - torch.cuda.memory_allocated(batch.ids.device))
        if free < SPARE * keeping.needs(batch.ids.numel(), self.model.place()[1].itemsize):
            return None
        self.graphs[key] = _Recorded(self.model, batch, key[-1])
        return self.graphs[key]


def _recordable(model: Any) -> bool:
    keeping = getattr(model, "keeping", None)
    return keeping is not None and keeping.recordable


def _places(model: nn.Module) -> list[int | None]:
    """Where the gradients of what trains lie; None for one that is not there yet."""
    return [None if p.grad is None else p.grad.data_ptr() for p in model.parameters() if p.requires_grad]


def _room(n: int) -> int:
    """Learned tokens that a graph for n of them has room for: the next of 1, 1.25, 1.5, 1.75 times a power of two."""
    step = max(16, 1 << max(0, (n - 1).bit_length() - 3))
    return -(-n // step) * step
