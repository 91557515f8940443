"""Files that are never half there: written beside under another name, flushed, then renamed."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Writes `path` whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the block ends well and vanishes when it does not.

    Raises FileExistsError where `path` already holds something.
    """
    path = Path(path)
    refuse_filled(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        beside.chmod(0o755)  # mkdtemp's is private
        yield beside
        if path.exists():
            path.rmdir()  # empty: refused above otherwise
        beside.rename(path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def sort_metadata(path: Path) -> None:
    """Puts a safetensors file's metadata in order, so that the same tensors make the same bytes.

    Source: the format, eight bytes of the header's length, then the header, JSON padded with spaces.
    """
    with path.open("r+b") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise RuntimeError(f"{path}: its header of {size} bytes cannot hold the same {len(text)} bytes in order")
        f.seek(8)
        f.write(text.ljust(size))


def refuse_filled(path: Path) -> None:
    """Raises FileExistsError where `path` is a file or a folder that holds something."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        held = "a file" if not path.is_dir() else f"a folder that holds {next(path.iterdir()).name!r} and perhaps more"
        raise FileExistsError(f"{path} is {held}; it is not overwritten: give another name, or remove it first")


def read_json(path: Path) -> Any:
    """The object in a JSON file; ValueError with the file's name where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is not valid JSON ({e}); the file is damaged or cut short") from None
