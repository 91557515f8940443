"""Repositories of the Hugging Face hub, downloaded on first use; and the bar that shows a long load."""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

# Weights as safetensors only: a pickle is not even fetched
FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
LONG = 2**30  # bytes of a checkpoint above which a bar is shown

Groups = Iterator[tuple[str, dict[str, Tensor]]]


def from_hub(path: str | Path, files: Sequence[str] = FILES) -> Path:
    """`path` itself, or the local folder of the repository that it names ("owner/name") where no such path exists,
    with such `files` of it.

    Raises ImportError without huggingface_hub, FileNotFoundError where the hub has no such repository or cannot
    be reached.
    """
    name = str(path)
    if Path(path).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) or name.endswith(".gguf"):
        return Path(path)
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError(
            f"{name} is no folder here; to download a repository of that name: pip install 'lora-torch[hub]'"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(files)))
    except Exception as e:  # its errors derive from requests', httpx's and its own, by version
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise FileNotFoundError(f"{name} is no folder here, and the hub did not give it: {reason}") from None


def watched(groups: Groups, path: Path) -> Groups:
    """The same weights, with a bar over the bytes read where the checkpoint is large and someone looks."""
    size = sum(f.stat().st_size for f in (path.glob("*.safetensors") if path.is_dir() else [path]))
    if size < LONG or not sys.stderr.isatty():
        yield from groups
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("loading {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(path.name, total=size)
        for name, tensors in groups:
            read = sum(t.numel() * t.element_size() for t in tensors.values())
            yield name, tensors
            bar.advance(task, read)
