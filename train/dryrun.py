"""A training step with every byte of its tensors counted: of a real model, or of one without memory.

Counted are the storages that are alive: those of the model, the optimizer and the batch, and every result of an
operation until its last user lets go of it.  Not counted is what operations take for themselves and give back.
Under FakeTensorMode the same code runs on tensors that are shapes alone, and gives the same count to the byte.
"""

import copy
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lora.kernels import beside, causal
from lora.kernels.adamw import BLOCK8
from lora.kernels.dispatch import as_on_gpu
from lora.kernels.scratch import borrowed
from lora.models.host import Host
from lora.quant.linear import Linear4bit
from lora.quant.linear8 import Linear8bit
from lora.render import Batch, Example, collate
from lora.train.graph import Graphs
from lora.train.loss import recomputed
from lora.train.optim import AdamW

GPU_GRAIN = 512  # bytes that PyTorch's allocator on a GPU rounds up to


class Tally(TorchDispatchMode):
    """Bytes of tensor storages alive, now and at most; `grain` rounds each up."""

    def __init__(self, grain: int = 1) -> None:
        super().__init__()
        self.grain, self.live, self.now, self.peak = grain, dict[int, int](), 0, 0

    def add(self, tensors: Iterable[Any]) -> int:
        """Counts storages that are not counted yet; their bytes."""
        before = self.now
        for t in tensors:
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                key = storage._cdata
                if key not in self.live:
                    self.live[key] = -(-storage.nbytes() // self.grain) * self.grain
                    self.now += self.live[key]
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._drop, key)
        return self.now - before

    def _drop(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.add(tree_iter(out))
        return out


@dataclass(frozen=True)
class Counted:
    """Bytes of two training steps."""

    weights4: int  # codes and scales of layers in 4 or 8 bits
    dense: int
    adapters: int  # what trains, as float32
    gradients: int
    optimizer: int
    kept: int  # at the end of the forward, beside the above
    peak: int  # of everything

    @property
    def base(self) -> int:
        """What is there before a step."""
        return self.weights4 + self.dense + self.adapters + self.gradients + self.optimizer


def count(
    model: nn.Module, batch: Batch, *, bits: int = 32, recompute: bool = False, grain: int = 1, steps: int = 2
) -> Counted:
    """Trains `steps` steps on one batch, as lora.fit does, and counts. The model's weights change.

    The second step meets the buffers that the first left behind, so two show the peak of a run.
    """
    # AdamW asks where gradients lie, and nowhere is an answer
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("nothing to train: no parameter requires a gradient")
    if bits == 8:
        return _in_8_bits(count(model, batch, recompute=recompute, grain=grain, steps=steps), trainable)
    low = {id(p) for p in trainable}
    tally = Tally(grain)
    with _apart():
        optimizer = AdamW(trainable, bits=bits)
        packed = [m for m in model.modules() if isinstance(m, Linear4bit | Linear8bit)]
        weights4 = tally.add(b for m in packed for b in m.buffers())
        adapters = tally.add([optimizer.w, *trainable])
        dense = tally.add([*(p for p in model.parameters() if id(p) not in low), *model.buffers()])
        gradients = tally.add([optimizer.grad])
        state = optimizer.state_dict()
        states = tally.add([*tree_iter(state), optimizer.m, optimizer.v, *tree_iter((optimizer.m, optimizer.v))])
        states += tally.add([optimizer.hyper])
        base = tally.now
        graphs, kept = Graphs(model), 0
        model.train()
        with tally, recomputed(model, recompute):
            tally.add([batch.ids, batch.real, batch.at, batch.target, batch.owner, batch.positions])
            for _ in range(steps):
                with _at_backward(tally) as seen:
                    _step(graphs, optimizer, batch)
                kept = max(kept, seen[0] - base)
        peak = tally.peak
    return Counted(weights4, dense, adapters, gradients, states, kept, peak)


def _in_8_bits(c: Counted, trainable: list[nn.Parameter]) -> Counted:
    """What 32-bit moments counted, with moments in 8 bits: their tables cannot be made without memory."""
    n = sum(p.numel() for p in trainable)
    states = 2 * (n + 4 * -(-n // BLOCK8)) + 2 * 2 * 256 * 4
    return replace(c, optimizer=states, peak=c.peak - c.optimizer + states)


def _step(graphs: Graphs, optimizer: AdamW, batch: Batch) -> None:
    """What Steps.step does with one batch, but for looking at the numbers."""
    losses, hits = torch.zeros((), device=batch.ids.device), torch.zeros((), dtype=torch.int64, device=batch.ids.device)
    part, hit = graphs.run(batch, batch.target.numel())
    losses, hits = losses + part, hits + hit
    optimizer.gather()
    norm = optimizer.clip(1.0)
    torch.stack((losses, norm.to(losses), hits.to(losses)))
    with _numbers():
        optimizer.step(1e-4)
    optimizer.zero_grad()


@contextmanager
def _numbers() -> Iterator[None]:
    """Inside, a tensor without memory reads as ones: the optimizer on a CPU reads its rates."""
    before = FakeTensor.tolist
    FakeTensor.tolist = lambda t: [1.0] * t.numel()  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        FakeTensor.tolist = before  # type: ignore[method-assign]


@contextmanager
def _at_backward(tally: Tally) -> Iterator[list[int]]:
    """Notes what is counted when a backward begins."""
    seen, backward = [0], Tensor.backward

    def note(self: Tensor, *args: Any, **kwargs: Any) -> None:
        seen[0] = tally.now
        backward(self, *args, **kwargs)

    Tensor.backward = note  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        Tensor.backward = backward  # type: ignore[method-assign]


@contextmanager
def without_memory(gpu: bool = False) -> Iterator[FakeTensorMode]:
    """Inside, tensors that are made have a shape and no memory; with `gpu` they take the way of tensors on one."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, as_on_gpu() if gpu else nullcontext(), _apart():
        yield mode


@contextmanager
def _apart() -> Iterator[None]:
    """Inside, what is made once and kept is made anew: other runs' is not this one's, nor this one's theirs."""
    before = dict(causal._triangles)
    causal._triangles.clear()
    beside.forget()
    try:
        with borrowed({}):
            yield
    finally:
        beside.forget()
        causal._triangles.clear()
        causal._triangles.update(before)


def like(model: nn.Module) -> Any:
    """A copy of a model whose tensors are empty and on the CPU. Call it inside `without_memory`."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="cpu"), requires_grad=p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = torch.empty(b.shape, dtype=b.dtype, device="cpu")
    keeping = getattr(model, "keeping", None)
    if keeping is not None:
        memo[id(keeping.host)] = Host()
    return copy.deepcopy(model, memo)


def even_batch(rows: int, length: int, learned: float = 1.0) -> Batch:
    """A batch of like rows whose last tokens, a share `learned` of them, are learned (all but the first at most)."""
    n = max(1, min(length - 1, round(length * learned)))
    flags = (False,) * (length - n) + (True,) * n
    return collate([Example((0,) * length, flags, i) for i in range(rows)])


def fake_batch(mode: FakeTensorMode, batch: Batch) -> Batch:
    """The batch with tensors of `mode`."""
    parts: dict[str, Any] = {k: mode.from_tensor(v) for k, v in vars(batch).items() if isinstance(v, Tensor)}
    return replace(batch, **parts)
