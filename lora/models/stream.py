"""Tensors of safetensors files straight to a GPU: read by threads into pinned memory, copied beside the reading.

    files -> CHUNK bytes at a time, THREADS at once -> SLOTS pinned pieces, in turn -> each tensor's own GPU memory

A map of the file costs a page fault every 4 KB and a second copy through the driver's own staging memory; plain reads
into memory that the GPU can fetch from cost neither, and what is on the way never exceeds SLOTS * CHUNK on the host.
A tensor's copies are under way while the threads read on, and while the caller quantizes the tensor before it.
Source: the format is that of github.com/huggingface/safetensors, README; its own library checks the header.
"""

import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

CHUNK, SLOTS, THREADS = 16 * 2**20, 12, 8  # 192 MiB pinned; figures of benchmarks/bench_load_8b.py in LOG.md

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class Entry(NamedTuple):
    """Where a tensor lies: bytes `begin` .. `end` of the file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class Piece(NamedTuple):
    """Bytes `begin` .. `end` of a file, which go to `at` .. of entry number `entry`."""

    entry: int
    path: Path
    begin: int
    end: int
    at: int


def entries(path: Path) -> dict[str, Entry]:
    """Every tensor of a file by its name.

    Raises ValueError, naming the file, where it is damaged or cut short, or a dtype is not known.
    """
    try:
        with safe_open(path, framework="pt"):  # refuses offsets that overlap, leave gaps or leave the file
            pass
        with path.open("rb") as f:
            size = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(size))
    except (SafetensorError, ValueError, OSError) as e:
        raise ValueError(f"{path} is damaged or cut short ({e})") from None
    found = {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        if about["dtype"] not in _DTYPES:
            raise ValueError(f"{path}: {name} is of dtype {about['dtype']}; {', '.join(_DTYPES)} are read")
        begin, end = about["data_offsets"]
        start = 8 + size
        found[name] = Entry(path, _DTYPES[about["dtype"]], tuple(about["shape"]), start + begin, start + end)
    return found


def pieces(wanted: Sequence[Entry], chunk: int) -> Iterator[Piece]:
    """The bytes of every entry in turn, at most `chunk` at a time."""
    for i, e in enumerate(wanted):
        for begin in range(e.begin, e.end, chunk):
            yield Piece(i, e.path, begin, min(begin + chunk, e.end), begin - e.begin)


def _read(piece: Piece, slot: Tensor, free: Any) -> None:
    """Fills `slot` with the piece's bytes, once what it held before has reached the GPU."""
    if free is not None:
        free.synchronize()
    bytes_of: Any = slot.numpy()
    view = memoryview(bytes_of)[: piece.end - piece.begin]
    with piece.path.open("rb", buffering=0) as f:
        f.seek(piece.begin)
        while view:
            n = f.readinto(view)
            if not n:
                raise OSError(f"it ended {len(view):,} bytes early")
            view = view[n:]


def stream(
    wanted: Sequence[Entry], device: torch.device, chunk: int = CHUNK, slots: int = SLOTS, threads: int = THREADS
) -> Iterator[Tensor]:
    """The tensors of `wanted`, in order, each in memory of its own on `device`, made when it is asked for.

    Their bytes may still be on their way on the current stream, which is where they may be used.

    Raises ValueError, naming the file, where it cannot be read or became shorter.
    """
    on_gpu = device.type == "cuda"
    todo = pieces(wanted, chunk)
    ring = [torch.empty(chunk, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(slots)]
    free: list[Any] = [None] * slots  # the event after which a slot may be written again
    waiting: deque[tuple[Piece, int, Future[None]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="weights") as pool:

        def send(slot: int) -> None:
            piece = next(todo, None)
            if piece is not None:
                waiting.append((piece, slot, pool.submit(_read, piece, ring[slot], free[slot])))

        try:
            for slot in range(slots):
                send(slot)
            for i, e in enumerate(wanted):
                out = torch.empty(e.end - e.begin, dtype=torch.uint8, device=device)
                while waiting and waiting[0][0].entry == i:
                    piece, slot, read = waiting.popleft()
                    try:
                        read.result()
                    except OSError as error:
                        raise ValueError(f"{piece.path} is damaged or cut short ({error})") from None
                    n = piece.end - piece.begin
                    out[piece.at : piece.at + n].copy_(ring[slot][:n], non_blocking=on_gpu)
                    if on_gpu:
                        free[slot] = torch.cuda.Event()
                        free[slot].record(torch.cuda.current_stream(device))
                    send(slot)
                yield out.view(e.dtype).view(e.shape)
                del out  # the caller may be the last to hold it
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
