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

from lora.kernels import fold, fold8
from lora.kernels.fold import Group
from lora.kernels.fold8 import Eight
from lora.kernels.fp8 import F8
from lora.kernels.linear4 import Weight4


@dataclass
class _Held:
    seen: list[tuple[Tensor, int, int]]  # what was decoded, where it lies, and its version
    kind: Any  # of the buffers: how they were laid out
    buffers: tuple[Tensor, ...]
    fill: Callable[[], None]

    def is_current(self) -> bool:
        return all(t._version == version for t, _, version in self.seen)


class Decoded:
    """The decoded weights of a model's first `blocks` blocks.

    Attributes:
        blocks: how many; 0 keeps none
        epoch: another number once buffers were given up: a CUDA graph of an earlier one reads what is others' now
    """

    def __init__(self) -> None:
        self.blocks, self.epoch = 0, 0
        self.held: dict[tuple[int, int], _Held] = {}

    def __deepcopy__(self, memo: Any) -> "Decoded":
        return Decoded()  # a copy of a model decodes for itself

    def of(self, block: int, which: int, group: Group, dtype: torch.dtype) -> Group:
        """The group, the `which`-th of its block, with its weights decoded in `dtype` if they stay so."""
        room, N, K = group.room, sum(group.sizes), group.K
        like = _memory(group)[0]

        def make() -> tuple[Tensor, ...]:
            return (torch.empty(N + room, K + room, dtype=dtype, device=like.device),)

        def fill(buffers: tuple[Tensor, ...]) -> None:
            fold.decode(group.weights, buffers[0][:N, :K])

        found = self._find((block, which), group, (dtype, room), make, fill)
        return group if found is None else group._replace(decoded=found[0])

    def of_8(self, block: int, which: int, group: Group, eight: Eight) -> Eight:
        """What the group's products in 8 bits need, with its weights in 8 bits if they stay so."""
        room, N, K = fold8.room(group), sum(group.sizes), group.K
        like = _memory(group)[0]

        def make() -> tuple[Tensor, ...]:
            return tuple(torch.empty(n, k + room, dtype=F8, device=like.device) for n, k in ((N, K), (K, N)))

        def fill(buffers: tuple[Tensor, ...]) -> None:
            for buffer, turn in zip(buffers, (False, True), strict=True):
                fold8.decode(group, eight.scale, buffer, turn)

        found = self._find((block, which), group, (F8, room, eight.scale), make, fill)
        return eight if found is None else eight._replace(decoded=(found[0], found[1]))

    def _find(
        self,
        key: tuple[int, int],
        group: Group,
        kind: Any,
        make: Callable[[], tuple[Tensor, ...]],
        fill: Callable[[tuple[Tensor, ...]], None],
    ) -> tuple[Tensor, ...] | None:
        if key[0] >= self.blocks:
            return None
        seen = [(t, t.data_ptr(), t._version) for t in _memory(group)]
        held = self.held.get(key)
        if held is not None and held.kind == kind and [s[1:] for s in held.seen] == [s[1:] for s in seen]:
            return held.buffers
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None  # a graph would decode each time it runs
        if held is not None:
            self._give_up(key)
        buffers = make()
        self.held[key] = _Held(seen, kind, buffers, lambda: fill(buffers))
        fill(buffers)
        return buffers

    def refresh(self) -> None:
        """Decodes anew what somebody has written to since: before a CUDA graph runs, which does not look."""
        for held in self.held.values():
            if not held.is_current():
                held.fill()
                held.seen = [(t, t.data_ptr(), t._version) for t, _, _ in held.seen]

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


def _memory(group: Group) -> list[Tensor]:
    """Tensors that a group's weights are made of."""
    return [t for w in group.weights for t in ((w.q, *w.scales) if isinstance(w, Weight4) else (w,))]


@contextmanager
def cleared(model: Any) -> Iterator[None]:
    """After the block, the model's decoded weights have given their memory back."""
    try:
        yield
    finally:
        if hasattr(model, "keeping"):
            model.keeping.decoded.clear()
