"""What a run says while it goes: a line of JSON a step in log.jsonl, and a bar or plain lines for a person.

Names are TRL's: loss, grad_norm (before clipping), learning_rate (the one used), mean_token_accuracy, num_tokens
(all tokens seen that are not padding), epoch, step; eval_loss and kin; train_runtime and kin at the end.
"""

import contextlib
import json
import os
import resource
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lora.train.sinks import Sink


class Log:
    """Keeps every entry in `history`, appends it to `path`, shows it, and hands it to the sinks.

    `keep` bytes of a log that is there already are kept and read, and what stands behind them goes: a run that goes on
    takes those steps again.  Raises ValueError where the file is shorter than that.
    """

    def __init__(
        self,
        path: Path | None,
        steps: int,
        show: bool,
        sinks: Sequence[Sink] = (),
        keep: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.history: list[dict[str, Any]] = []
        self.sinks, self.device = list(sinks), device or torch.device("cpu")
        self.path = path
        if path and path.exists():
            if path.stat().st_size < keep:
                raise ValueError(f"{path} holds {path.stat().st_size} bytes, and {keep} were written: it was cut short")
            with path.open("rb") as f:
                self.history = [json.loads(line) for line in f.read(keep).splitlines()]
            os.truncate(path, keep)
        elif path and keep:
            raise ValueError(f"{path} is gone, and the run that goes on had written {keep} bytes of it")
        self.file = path.open("a", encoding="utf-8") if path else None
        console = Console(file=sys.stderr)
        self.bar: Progress | None = None
        self.show = show
        if show and console.is_terminal:
            columns = (
                BarColumn(),
                TextColumn("{task.completed}/{task.total} {task.description}"),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=console, transient=False)
            self.task = self.bar.add_task("", total=steps, completed=max((h["step"] for h in self.history), default=0))

    def __enter__(self) -> "Log":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()
        if self.file:
            with contextlib.suppress(OSError):  # on a full disk, where `write` has raised before
                self.file.close()

    def write(self, entry: dict[str, Any]) -> None:
        """Raises OSError where the line cannot be written."""
        self.history.append(entry)
        if self.file:
            try:
                self.file.write(json.dumps(entry) + "\n")
                self.file.flush()
            except OSError as e:
                raise OSError(f"{self.path} could not be written at step {entry['step']}: {e.strerror}") from e
        if self.bar:
            if "loss" in entry:
                self.bar.update(self.task, completed=entry["step"], description=self._short(entry))
        elif self.show:
            print(_line(entry), file=sys.stderr, flush=True)
        for sink in list(self.sinks):
            try:
                sink(dict(entry))
            except Exception as e:  # a sink is the caller's: its failure must not end a run of hours
                self.sinks.remove(sink)
                warnings.warn(f"a sink failed at step {entry['step']} and gets no more entries: {e!r}", stacklevel=2)

    def say(self, sentence: str) -> None:
        """A sentence for the person who looks on; the file does not get it."""
        if self.bar:
            self.bar.console.print(sentence, markup=False, highlight=False)
        elif self.show:
            print(sentence, file=sys.stderr, flush=True)

    def flush(self) -> int:
        """Brings the log to the disk; returns its length in bytes."""
        if not self.file:
            return 0
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.tell()

    def _short(self, entry: dict[str, Any]) -> str:
        memory = peak_bytes(self.device) / 2**30
        rate, speed = entry["learning_rate"], entry["tokens_per_second"]
        return f"loss {entry['loss']:.4f}  lr {rate:.1e}  {speed:,.0f} tok/s  {memory:.1f} GiB"


def _line(entry: dict[str, Any]) -> str:
    return "  ".join(f"{key} {_short(value)}" for key, value in entry.items())


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_short, value))
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def peak_bytes(device: torch.device) -> int:
    """The most memory held so far: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
