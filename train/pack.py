"""Rows of one size made of several texts: best fit decreasing, and no text is cut.

The longest text first, each into the row with the least room that still takes it.  Rows come out the same for the same
lengths, whatever the order of an epoch, so a run can be taken up again anywhere.
"""

import bisect
from collections.abc import Iterator, Sequence
from typing import overload

from lora.batch import Example, Pack
from lora.tokens import lengths_of


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which texts share a row: places in `lengths`, so that each row's lengths sum to at most `size`.

    Raises ValueError for a text that no row holds.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> rows that have it
    rooms: list[int] = []  # its keys, in order
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        n = lengths[i]
        if n > size:
            raise ValueError(f"a text of {n} tokens was to be packed into rows of {size}")
        k = bisect.bisect_left(rooms, n)
        if k == len(rooms):
            row, room = len(rows), size
            rows.append([])
        else:
            room = rooms[k]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[k]
        rows[row].append(i)
        left = room - n
        if left:
            if left not in by_room:
                by_room[left] = []
                bisect.insort(rooms, left)
            by_room[left].append(row)
    return rows


class Packs(Sequence[Pack]):
    """Examples packed into rows of `size` tokens, put together when they are asked for."""

    def __init__(self, examples: Sequence[Example], size: int) -> None:
        lengths = lengths_of(examples)
        self.examples, self.size = examples, size
        self.rows = best_fit(lengths, size)
        self.filled = sum(lengths) / (len(self.rows) * size) if self.rows else 0.0

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, i: int) -> Pack: ...
    @overload
    def __getitem__(self, i: slice) -> list[Pack]: ...
    def __getitem__(self, i: int | slice) -> Pack | list[Pack]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        return Pack(tuple(self.examples[k] for k in self.rows[i]), self.size)

    def __iter__(self) -> Iterator[Pack]:
        return (self[i] for i in range(len(self)))

    def lengths(self) -> Sequence[int]:
        return [self.size] * len(self)
