"""Tokenised rows kept small: 4 bytes a token in one run of int32, on disk and mapped into memory once it is large.

A learned token i is stored as ~i, which is negative; any other as i.
"""

import tempfile
from array import array
from collections.abc import Iterator, Sequence
from typing import IO, Any, overload

import numpy as np

from lora.batch import Example

_IN_MEMORY = 64 << 20  # bytes of tokens; beyond, they lie in an unnamed file


class Examples(Sequence[Example]):
    """Examples in order, each made when it is asked for. `append` them, then `freeze`."""

    def __init__(self, in_memory: int = _IN_MEMORY) -> None:
        self.in_memory, self.held = in_memory, bytearray()
        self.file: IO[bytes] | None = None
        self.starts, self.row = array("q", [0]), array("q")
        self.tokens: np.ndarray | None = None  # (all tokens,) int32

    def append(self, e: Example) -> None:
        """Adds one, behind the others."""
        ids = np.array(e.ids, dtype=np.int32)
        self.held += np.where(e.learned, ~ids, ids).tobytes()
        if len(self.held) > self.in_memory:
            self._spill()
        self.starts.append(self.starts[-1] + len(e.ids))
        self.row.append(e.row)

    def freeze(self) -> "Examples":
        """Ends the appending: from here on examples can be read."""
        if self.file is None:
            self.tokens = np.frombuffer(self.held, dtype=np.int32)
        else:
            self._spill()
            self.tokens = np.memmap(self.file, dtype=np.int32, mode="r")
        return self

    def _spill(self) -> None:
        if self.file is None:
            self.file = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as this object, and has no name
        self.file.write(self.held)
        self.file.flush()
        self.held = bytearray()

    def __len__(self) -> int:
        return len(self.row)

    @overload
    def __getitem__(self, i: int) -> Example: ...
    @overload
    def __getitem__(self, i: slice) -> list[Example]: ...
    def __getitem__(self, i: int | slice) -> Example | list[Example]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        assert self.tokens is not None, "freeze() comes before reading"
        i %= len(self)
        part = self.tokens[self.starts[i] : self.starts[i + 1]]
        learned = part < 0
        return Example(tuple(np.where(learned, ~part, part).tolist()), tuple(learned.tolist()), self.row[i])

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def lengths(self) -> Sequence[int]:
        """Tokens of each example."""
        return np.diff(np.frombuffer(self.starts, dtype=np.int64)).tolist()


def lengths_of(examples: Sequence[Any]) -> Sequence[int]:
    """Tokens of each of some examples, without making those that are stored."""
    counted = getattr(examples, "lengths", None)
    return counted() if counted else [len(e.ids) for e in examples]
