"""A batch's forward and backward as one CUDA graph: small batches are bound by launches, not by the GPU.

A step of an 8B model over 512 tokens launches some 5,000 kernels: 320 ms from Python, 50 ms replayed (LOG.md).  A graph
serves batches of one shape: the rows' number, their length and the number of learned tokens, both rounded up so that
batches of like rows share one; what is unused counts 0.  In packed rows the number of documents and the longest of them
are rounded up too (kernels/documents.py), and their ends are an input like the tokens.  A shape is recorded when it
comes the second time.  All graphs share their memory, since one runs at a time, and the reused buffers with what is not
recorded.  What blocks send to the host and fetch again is part of a graph.  Gradients add up in the parameters' .grad,
as without a graph.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora.eval.nll import token_nll
from lora.kernels.documents import takes_ragged
from lora.kernels.scratch import lent, room
from lora.models.base import CausalLM
from lora.render import Batch

TOKENS = 8192  # of a batch, up to which launches matter: 2.7 % of a step at 8192 tokens of an 8B model
RECORD = True  # False runs every batch kernel by kernel
SHAPES = 16  # graphs held at once: a kernel of one takes a few KB of the card


class Learned(NamedTuple):
    """The learned tokens of a batch, each with its weight in the loss and which loss it counts to, (n,) each."""

    at: Tensor
    target: Tensor
    weight: Tensor
    member: Tensor


def member_losses(model: nn.Module, batch: Batch, learned: Learned, members: int) -> tuple[Tensor, Tensor]:
    """Σ weight * NLL of each member (members,), and how many learned tokens were the likeliest; gradients are added."""
    nll, hit = token_nll(model, replace(batch, at=learned.at, target=learned.target, owner=learned.at))
    nll = nll * learned.weight
    if members == 1:
        sums = [nll.sum()]
    else:  # a sum for each: one that is not finite must not reach the others
        sums = [torch.where(learned.member == i, nll, 0.0).sum() for i in range(members)]
    torch.autograd.backward(sums)
    return torch.stack([loss.detach() for loss in sums]), (hit & (learned.weight > 0)).sum()


class _Recorded:
    def __init__(
        self,
        model: Any,
        batch: Batch,
        learned: Learned,
        members: int,
        pool: Any,
        stream: Any,
        grads: list[int | None],
    ) -> None:
        self.grads, self.epoch = grads, model.keeping.decoded.epoch
        self.batch = _own(batch)
        self.learned = Learned(*(t.clone() for t in learned))
        self.graph = torch.cuda.CUDAGraph()
        model.keeping.host.settle()
        with lent(stream) as self.buffers, torch.cuda.graph(self.graph, pool=pool, stream=stream):
            self.losses, self.hits = member_losses(model, self.batch, self.learned, members)
        self.away = list(model.keeping.host.room.values())

    def run(self, batch: Batch, learned: Learned) -> tuple[Tensor, Tensor]:
        for mine, theirs in zip((*_inputs(self.batch), *self.learned), (*_inputs(batch), *learned), strict=True):
            mine.copy_(theirs)
        self.graph.replay()
        return self.losses, self.hits


class Graphs:
    """Runs batches of `model` forward and backward, recorded where that pays and is possible.

    `grads` names the gradients that a batch adds to, where that is known: a walk over a model takes milliseconds.
    """

    def __init__(self, model: nn.Module, grads: Callable[[], Sequence[Tensor | None]] | None = None) -> None:
        self.model: Any = model
        self.grads = grads or (lambda: [p.grad for p in model.parameters() if p.requires_grad])
        self.seen: set[tuple[int, ...]] = set()
        self.graphs: OrderedDict[tuple[int, ...], _Recorded] = OrderedDict()
        self.pool: Any = None
        self.stream: Any = None
        self.held = 0  # bytes that recording took

    def run(self, batch: Batch, n: int) -> tuple[Tensor, Tensor]:
        """Σ NLL / n and the number of learned tokens that were the likeliest, () each; gradients are added.

        The tensors are the graph's own: read or copy them before the next call.
        """
        if not self._is_small(batch):
            nll, hit = token_nll(self.model, batch)
            loss = nll.sum() / n
            loss.backward()
            return loss.detach(), hit.sum()
        weight = torch.full_like(batch.target, 1 / n, dtype=torch.float32)
        losses, hits = self.run_members(batch, weight, torch.zeros_like(batch.target), 1)
        return losses[0], hits

    def run_members(self, batch: Batch, weight: Tensor, member: Tensor, members: int) -> tuple[Tensor, Tensor]:
        """`run` with several losses (members,): learned token i adds weight[i] NLL_i to loss member[i]."""
        if not self._is_small(batch):
            learned = Learned(batch.at, batch.target, weight, member)
            return member_losses(self.model, batch, learned, members)
        batch = _widened(batch, self.model.config.max_length)
        learned = Learned(batch.at, batch.target, weight, member)
        # unused room counts 0; a batch that is not recorded has it too, so that it gives the same bits as one that is
        n = room(batch.target.numel())
        learned = Learned(*(nn.functional.pad(t, (0, n - t.numel())) for t in learned))
        packed = (batch.ragged.documents, batch.ragged.longest) if batch.ragged else ()
        key = (*batch.ids.shape, n, members, *packed)
        if RECORD and key in self.seen and _recordable(self.model, batch):
            recorded = self.graphs.get(key)
            # it would add to memory, or read weights from some, that is others' now
            if recorded and (recorded.grads, recorded.epoch) != (self._places(), self.model.keeping.decoded.epoch):
                del self.graphs[key]
                recorded = None
            recorded = recorded or self._record(key, batch, learned, members)
            if recorded:
                self.graphs.move_to_end(key)
                self.model.keeping.decoded.refresh()
                return recorded.run(batch, learned)
        self.seen.add(key)
        return member_losses(self.model, batch, learned, members)

    def _places(self) -> list[int | None]:
        """Where the gradients of what trains lie; None for one that is not there yet."""
        return [None if g is None else g.data_ptr() for g in self.grads()]

    def _is_small(self, batch: Batch) -> bool:
        ours = isinstance(self.model, CausalLM)  # whose attention never looks at padding on the right
        return ours and batch.ids.is_cuda and batch.ids.numel() <= TOKENS

    def _record(self, key: tuple[int, ...], batch: Batch, learned: Learned, members: int) -> _Recorded | None:
        """The graph of a new shape; None where its memory does not fit beside what is there."""
        if None in self._places():  # a gradient born in a graph would be lost with the next step
            return None
        if len(self.graphs) == SHAPES:
            self.graphs.popitem(last=False)
        torch.cuda.empty_cache()  # a graph has memory of its own: what the step without it used is of no use to it
        device, keeping = batch.ids.device, self.model.keeping
        driver, _ = torch.cuda.mem_get_info(device)
        free = on_card = driver + self.held
        if keeping.budget is not None:
            free = min(free, keeping.budget - torch.cuda.memory_allocated(device))
        if not keeping.graph_fits(batch.ids.numel(), self.model.place()[1].itemsize, free, on_card):
            return None
        if not self.graphs:  # a pool whose graphs are all gone takes no other
            self.pool = torch.cuda.graph_pool_handle()
        self.stream = self.stream or torch.cuda.Stream(device)
        self.graphs[key] = _Recorded(self.model, batch, learned, members, self.pool, self.stream, self._places())
        self.held += max(0, driver - torch.cuda.mem_get_info(device)[0])
        return self.graphs[key]


def _recordable(model: Any, batch: Batch) -> bool:
    keeping = getattr(model, "keeping", None)
    if keeping is None or not keeping.recordable:
        return False
    if batch.documents is None:
        return True
    model.where(batch.ids, batch.positions, None, batch.documents)  # refuses a document that is too long
    # else the graph would hold on to the documents of one batch
    return batch.positions is not None and takes_ragged(*model.place())


def _inputs(batch: Batch) -> list[Tensor]:
    """What a recorded batch reads of one, besides what is learned of it."""
    ends = batch.ragged.ends if batch.ragged else None
    return [t for t in (batch.ids, batch.positions, ends) if t is not None]


def _own(batch: Batch) -> Batch:
    """The batch with `_inputs` of its own."""
    documents, ragged = batch.documents, batch.ragged
    if documents is not None and ragged is not None:
        documents = replace(documents, ragged=ragged._replace(ends=ragged.ends.clone()))
    positions = None if batch.positions is None else batch.positions.clone()
    return replace(batch, ids=batch.ids.clone(), positions=positions, documents=documents)


def _widened(batch: Batch, limit: int) -> Batch:
    """The batch with its rows padded on the right to one of few lengths; packed rows are all of one."""
    T = batch.ids.shape[1]
    more = min(room(T), limit) - T
    if more <= 0 or batch.documents is not None:
        return batch
    ids, real = (nn.functional.pad(t, (0, more)) for t in (batch.ids, batch.real))
    return replace(batch, ids=ids, real=real, at=batch.at + batch.at // T * more)
