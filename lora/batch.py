"""Rows that run together: examples padded to one length, or packed one behind the other without seeing each other."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora.kernels.documents import Ragged
from lora.models.documents import Documents


@dataclass(frozen=True)
class Example:
    """One row as token ids, and which of them are learned; `row` is its place in the data."""

    ids: tuple[int, ...]
    learned: tuple[bool, ...]
    row: int

    @property
    def n_learned(self) -> int:
        return sum(self.learned)


@dataclass(frozen=True)
class Pack:
    """Examples that share one row of `size` tokens; what they leave of it is padding."""

    examples: tuple[Example, ...]
    size: int

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(i for e in self.examples for i in e.ids)

    @property
    def learned(self) -> tuple[bool, ...]:
        return tuple(learn for e in self.examples for learn in e.learned)

    @property
    def n_learned(self) -> int:
        return sum(e.n_learned for e in self.examples)


@dataclass(frozen=True)
class Batch:
    """Rows of one length.

    ids (B, T) int64; `real` (B, T) bool marks tokens that are not padding; `at` (n,) int64 are places in the
    flattened (B*T) whose next token is learned, `target` (n,) those tokens, `owner` (n,) which of `rows` they are of.
    `documents` and `positions` (B, T) are None where each row is one text with its padding on the right: attention
    that never looks ahead needs neither.
    """

    ids: Tensor
    real: Tensor
    at: Tensor
    target: Tensor
    owner: Tensor
    rows: tuple[int, ...]
    positions: Tensor | None = None
    documents: Documents | None = None

    @property
    def n_tokens(self) -> int:
        return int(self.real.sum())

    @property
    def ragged(self) -> Ragged | None:
        """What a GPU is told of the documents, where rows are packed and lie on one."""
        return None if self.documents is None else self.documents.ragged

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device. To a GPU it goes by pinned memory, and nobody waits for it."""
        ids, real, at, target, owner = (
            to_device(t, device) for t in (self.ids, self.real, self.at, self.target, self.owner)
        )
        positions = None if self.positions is None else to_device(self.positions, device)
        documents = None if self.documents is None else self.documents.on(device)
        return Batch(ids, real, at, target, owner, self.rows, positions, documents)


def to_device(t: Tensor, device: torch.device) -> Tensor:
    """`t` there; to a GPU it goes by pinned memory, and nobody waits for it."""
    by_pinned = device.type == "cuda" and not t.is_cuda
    return t.pin_memory().to(device, non_blocking=True) if by_pinned else t.to(device)


def collate(examples: Sequence[Example | Pack], pad: int = 0, side: str = "right") -> Batch:
    """One batch of these examples or packs, in their order, padded with `pad` on the right or left."""
    if side not in ("right", "left"):
        raise ValueError(f"side={side!r}: padding stands on the right or on the left")
    texts = [e.examples if isinstance(e, Pack) else (e,) for e in examples]  # of each row
    filled = [sum(len(e.ids) for e in row) for row in texts]
    packed = any(isinstance(e, Pack) for e in examples)
    T = max(e.size if isinstance(e, Pack) else n for e, n in zip(examples, filled, strict=True))
    starts = [T - n if side == "left" else 0 for n in filled]
    ids = torch.full((len(texts), T), pad, dtype=torch.int64)
    owner = torch.full((len(texts), T), -1, dtype=torch.int64)
    learned = torch.zeros(len(texts), T, dtype=torch.bool)
    rows: list[int] = []
    for b, row in enumerate(texts):
        at = starts[b]
        for e in row:
            end = at + len(e.ids)
            ids[b, at:end] = torch.tensor(e.ids)
            learned[b, at:end] = torch.tensor(e.learned)
            learned[b, at] = False  # what stands before it is another text
            owner[b, at:end] = len(rows)
            rows.append(e.row)
            at = end
    documents = None
    if packed or side == "left":
        longest = max(len(e.ids) for row in texts for e in row)
        parts = []
        for row, n in zip(texts, filled, strict=True):
            padding = [longest] * ((T - n) // longest) + [(T - n) % longest] * ((T - n) % longest > 0)
            lengths = [len(e.ids) for e in row]
            parts.append(tuple(padding + lengths if side == "left" else lengths + padding))
        documents = Documents(tuple(parts))
    flat = learned.view(-1).nonzero()[:, 0]  # (n,)
    positions = None if documents is None else documents.positions()
    found = (ids, owner >= 0, flat - 1, ids.view(-1)[flat], owner.view(-1)[flat])
    return Batch(*found, tuple(rows), positions, documents)
