"""Frozen weights of a model's first blocks that stay decoded from step to step, where memory is left for them.

A block's weights are decoded from 4 bits for each of its products, forward and back and where one is made again: 12
ms of a step of an 8B model on an H100, a quarter of one over 512 tokens.  Kept they take 0.42 GiB a block.  They lie as
the products want them, with room for the factors at the ends of rows and below (kernels/fold.py), in 8 bits
twice, forward and turned.  How many blocks that are is decided in budget.py.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora.kernels import fold8
from lora.kernels.fold import Group
from lora.kernels.fold8 import Eight
from lora.kernels.fp8 import F8
from lora.kernels.linear4 import Weight4
from lora.kernels.unpack import decode


@dataclass
class _Held:
    memory: list[Tensor]  # what was decoded
    marks: list[int]  # where that lies, and its versions
    kind: tuple[torch.dtype, tuple[tuple[int, int], ...]]  # of the buffers
    buffers: tuple[Tensor, ...]
    fill: Callable[[], None]


class Decoded:
    """The decoded weights of a model's first `blocks` blocks.

    Attributes:
        blocks: how many; 0 keeps none
        epoch: another number once buffers were given up: a CUDA graph of an earlier one reads what is others' now
    """

    def __init__(self) -> None:
        self.blocks, self.epoch = 0, 0
        self.held: dict[tuple[int, int], _Held] = {}

    def __reduce__(self) -> Any:
        return Decoded, ()  # a copy of a model, or one from a file, decodes for itself

    def of(self, block: int, which: int, group: Group, dtype: torch.dtype) -> Group:
        """The group, the `which`-th of its block, with its weights decoded in `dtype` if they stay so."""
        if block >= self.blocks:
            return group
        N, K, room = sum(group.sizes), group.K, group.room

        def fill(buffers: tuple[Tensor, ...]) -> None:
            decode(group.weights, buffers[0][:N, :K])

        found = self._find((block, which), group, dtype, ((N + room, K + room),), fill)
        return group if found is None else group._replace(decoded=found[0])

    def of_8(self, block: int, which: int, group: Group, eight: Eight) -> Eight:
        """What the group's products in 8 bits need, with its weights in 8 bits if they stay so."""
        if block >= self.blocks:
            return eight
        N, K, room = sum(group.sizes), group.K, fold8.room(group)

        def fill(buffers: tuple[Tensor, ...]) -> None:
            for buffer, turn in zip(buffers, (False, True), strict=True):
                fold8.decode(group, eight.scale, buffer, turn)

        found = self._find((block, which), group, F8, ((N, K + room), (K, N + room)), fill)
        return eight if found is None else eight._replace(decoded=(found[0], found[1]))

    def _find(
        self,
        key: tuple[int, int],
        group: Group,
        dtype: torch.dtype,
        shapes: tuple[tuple[int, int], ...],
        fill: Callable[[tuple[Tensor, ...]], None],
    ) -> tuple[Tensor, ...] | None:
        """The buffers of a group, filled; None while a graph is recorded, which would fill them each time it runs."""
        memory = [t for w in group.weights for t in ((w.q, *w.scales) if isinstance(w, Weight4) else (w,))]
        marks, held = _marks(memory), self.held.get(key)
        if held is not None and held.kind == (dtype, shapes) and held.marks == marks:
            return held.buffers
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None
        if held is not None:
            self._give_up(key)
        buffers = tuple(torch.empty(shape, dtype=dtype, device=memory[0].device) for shape in shapes)
        self.held[key] = _Held(memory, marks, (dtype, shapes), buffers, lambda: fill(buffers))
        fill(buffers)
        return buffers

    def refresh(self) -> None:
        """Decodes anew what somebody has written to since: before a CUDA graph runs, which does not look."""
        for held in self.held.values():
            marks = _marks(held.memory)
            if marks != held.marks:
                held.fill()
                held.marks = marks

    def clear(self) -> None:
        """Gives all memory back, and keeps nothing until a number of blocks is chosen again."""
        self.blocks = 0
        for key in list(self.held):
            self._give_up(key)

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for held in self.held.values() for t in held.buffers)

    def _give_up(self, key: tuple[int, int]) -> None:
        del self.held[key]
        self.epoch += 1


def _marks(memory: list[Tensor]) -> list[int]:
    """Other numbers once one of the tensors lies elsewhere or was written to."""
    return [mark for t in memory for mark in (t.data_ptr(), t._version)]


@contextmanager
def cleared(model: Any) -> Iterator[None]:
    """After the block, the model's decoded weights have given their memory back."""
    try:
        yield
    finally:
        if hasattr(model, "keeping"):
            model.keeping.decoded.clear()
