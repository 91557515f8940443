"""States of blocks in pinned memory of the host: sent while the next block computes, fetched one block ahead.

Blocks are numbered in the order of the forward; `send` is called once a block going forward, `fetch` once going back.
Buffers on the host are used again every step.  What is sent is let go by a later block's call, behind a wait for the
copy: were it left to the allocator (record_stream), a CUDA graph being recorded would never get it back.  That call is
the next one's, unless the next block sends its input alone: the states of a block take longer over PCIe than products
in 8 bits, and have the time of two blocks then.
"""

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Host:
    """What a step put away.  On a CPU it puts nothing away and gives back what it was given."""

    def __init__(self) -> None:
        self.room: dict[tuple[int, int], Tensor] = {}  # (block, place) -> pinned bytes, as many as were ever needed
        self.away: dict[int, list[Tensor]] = {}  # block -> its own tensors
        self.inputs: dict[int, Tensor] = {}  # block -> x, where it is here
        self.coming: set[int] = set()
        self.leaving: list[tuple[Tensor, Sequence[Tensor]]] = []  # x and `own` of each block that copies still read
        self.stream: Any = None

    def send(self, block: int, x: Tensor, own: Sequence[Tensor] = ()) -> None:
        """Puts `x` away, which the caller forgets, and `own`, whose memory is given up and filled again by `fetch`.

        `own` are contiguous tensors that nobody but the block's state holds; views of them go and come with them.
        """
        self.away[block] = list(own)
        if not x.is_cuda:
            self.inputs[block] = x.clone()
            return
        if not stays([bool(old) for _, old in self.leaving], bool(own)):
            self.settle()
        if self.stream is None:
            self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for i, t in enumerate((x, *own)):
                self._pinned(block, i, t).copy_(t, non_blocking=True)
        self.leaving.append((x, own))

    def settle(self) -> None:
        """Lets go of what was put away: what comes next waits for the copies, begun a block or two ago."""
        if not self.leaving:
            return
        gone, self.leaving = self.leaving, []
        torch.cuda.current_stream().wait_stream(self.stream)
        for _, own in gone:
            for t in own:
                t.untyped_storage().resize_(0)

    def fetch(self, block: int, like: Tensor, shape: torch.Size) -> Tensor:
        """The x of `send`; its `own` are whole again.  Orders the block before, too."""
        if not like.is_cuda:
            self.away.pop(block)
            return self.inputs.pop(block)
        self.settle()
        if block not in self.coming:
            self._order(block, like, shape)
        torch.cuda.current_stream().wait_stream(self.stream)
        self.coming.discard(block)
        self.away.pop(block)
        x = self.inputs.pop(block)
        if block - 1 in self.away:
            self._order(block - 1, like, shape)
        return x

    def nbytes(self) -> int:
        """Bytes of pinned memory that are held."""
        return sum(t.numel() for t in self.room.values())

    def _order(self, block: int, like: Tensor, shape: torch.Size) -> None:
        own = self.away[block]
        x = self.inputs[block] = torch.empty(shape, dtype=like.dtype, device=like.device)
        for t in own:
            t.untyped_storage().resize_(t.numel() * t.element_size())
        self.stream.wait_stream(torch.cuda.current_stream())  # what this memory held may still be in use there
        with torch.cuda.stream(self.stream):
            for i, t in enumerate((x, *own)):
                # through a tensor of its own, since autograd would take a write to the saved one for a mistake
                whole = torch.empty(0, dtype=t.dtype, device=t.device).set_(
                    t.untyped_storage(), t.storage_offset(), t.shape, t.stride()
                )
                whole.copy_(self._pinned(block, i, t), non_blocking=True)
        self.coming.add(block)

    def _pinned(self, block: int, place: int, t: Tensor) -> Tensor:
        """The place on the host of a tensor like `t`."""
        size = t.numel() * t.element_size()
        room = self.room.get((block, place))
        if room is None or room.numel() < size:
            del room
            self.room.pop((block, place), None)  # given back before the next is taken
            room = self.room[block, place] = pinned(size)
        return room[:size].view(t.dtype).view(t.shape)


def stays(leaving: Sequence[bool], own: bool) -> bool:
    """Whether copies under way may stay so while a block sends its input alone, or with states of its `own`.

    `leaving` tells the same of each block that has sent them.
    """
    return list(leaving) == [True] and not own


def host_room() -> int | None:
    """Bytes of the host's memory that may still be pinned: most of what is available; None where nobody tells."""
    found = []
    limits = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
    for path, key in (("/proc/meminfo", "MemAvailable:"), *((limit, "") for limit in limits)):
        try:
            line = next(x for x in Path(path).read_text().splitlines() if x.startswith(key))
            found.append(int(line.removeprefix(key).split()[0]) * (1024 if key else 1))
        except (OSError, StopIteration, ValueError):  # another system, or a container without a limit ("max")
            continue
    return int(0.9 * min(found)) if found else None


def pinned(size: int) -> Tensor:
    """Bytes (size,) of pinned memory, as large as asked: PyTorch's own pinned tensors grow to the next power of two.

    Raises RuntimeError where the system gives none.
    """
    t = torch.empty(size, dtype=torch.uint8)
    if not size:
        return t
    driver = torch.cuda.cudart()
    if int(driver.cudaHostRegister(t.data_ptr(), size, 0)):
        raise RuntimeError(f"{size / 2**30:.2f} GiB more of pinned memory on the host were not to be had")
    # registered memory must not go back to the system before it is let go
    weakref.finalize(t.untyped_storage(), driver.cudaHostUnregister, t.data_ptr()).atexit = False
    return t
