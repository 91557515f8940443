"""What a run says while it goes: a line of JSON a step in log.jsonl, and a bar or plain lines for a person.

Names are TRL's: loss, grad_norm (before clipping), learning_rate (the one used), mean_token_accuracy, num_tokens
(all tokens seen that are not padding), epoch, step; eval_loss and kin; train_runtime and kin at the end.
"""

import json
import resource
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Log:
    """Keeps every entry in `history`, appends it to `path`, and shows it."""

    def __init__(self, path: Path | None, steps: int, show: bool) -> None:
        self.history: list[dict[str, Any]] = []
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
            self.task = self.bar.add_task("", total=steps)

    def __enter__(self) -> "Log":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()
        if self.file:
            self.file.close()

    def write(self, entry: dict[str, Any]) -> None:
        self.history.append(entry)
        if self.file:
            self.file.write(json.dumps(entry) + "\n")
            self.file.flush()
        if self.bar:
            if "loss" in entry:
                text = f"loss {entry['loss']:.4f}  {entry['tokens_per_second']:,.0f} tok/s"
                self.bar.update(self.task, completed=entry["step"], description=text)
        elif self.show:
            print(_line(entry), file=sys.stderr, flush=True)


def _line(entry: dict[str, Any]) -> str:
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in entry.items()}
    return "  ".join(f"{k} {v}" for k, v in shown.items())


def peak_bytes(device: torch.device) -> int:
    """The most memory held so far: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
