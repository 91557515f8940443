"""Files of rows: .jsonl, .ndjson, .json (a list), each also as .gz, and .parquet.

JSON lines and Parquet are never held whole: one pass finds where each row lies, and a row is read when it is asked for.
"""

import gzip
import json
import os
import shutil
import tempfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

LONGEST_LINE = 64 << 20  # bytes: beyond it, a file is no file of rows
SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz", ".parquet")


class Source(Protocol):
    """Objects in order, not yet checked. `scan` comes first, once, and may raise; then they can be read by number."""

    name: str

    def scan(self) -> Iterator[Any]: ...
    def where(self, i: int) -> str: ...
    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Any: ...


def open_source(data: str | Path | Sequence[Any]) -> Source:
    """The source of a file, by its suffix, or of a list.

    Raises FileNotFoundError; ValueError for a suffix that is not known, or a file that is not what its suffix says.
    """
    if not isinstance(data, str | Path):
        return Listed("the list", data)
    path = Path(data)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; data is a file of rows: {', '.join(SUFFIXES)}")
    suffix = "".join(path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:]).lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path} ends in {suffix or 'nothing'}; data is a file of rows: {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        return Parquet(path)
    file = _unpacked(path) if suffix.endswith(".gz") else path.open("rb")
    return _json_list(path, file) if suffix.removesuffix(".gz") == ".json" else Lines(path, file)


def _unpacked(path: Path) -> IO[bytes]:
    """The content of a .gz, in a file without a name: a packed file cannot be read from the middle."""
    file = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the source
    try:
        with gzip.open(path) as packed:
            shutil.copyfileobj(packed, file, 1 << 20)
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise ValueError(f"{path} is not a whole gzip file ({e}); it is damaged or cut short") from None
    file.seek(0)
    return file


class Lines:
    """One JSON object a line; blank lines are passed over. Holds 16 bytes a row."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.name, self.file = str(path), file
        self.starts, self.lines = array("q"), array("q")
        self.state = self._state()

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self.file.fileno())
        return found.st_size, found.st_mtime_ns

    def scan(self) -> Iterator[Any]:
        start, n = 0, 0
        while line := self.file.readline(LONGEST_LINE + 1):
            n += 1
            where = f"{self.name} line {n}"
            if len(line) > LONGEST_LINE:
                raise ValueError(f"{where} is longer than {LONGEST_LINE >> 20} MiB; the file must hold one row a line")
            text = line.removeprefix(b"\xef\xbb\xbf") if n == 1 else line  # the mark some editors begin a file with
            if text.strip():
                if not self.lines and text.strip() == b"[":
                    raise ValueError(f"{where} begins a JSON list; name the file .json, or write one row a line")
                row = _parsed(where, text)
                self.starts.append(start + len(line) - len(text))
                self.lines.append(n)
                after = self.file.tell()
                yield row
                self.file.seek(after)  # whoever scans may have read a row meanwhile
            start += len(line)

    def where(self, i: int) -> str:
        return f"{self.name} line {self.lines[i]}"

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, i: int) -> Any:
        if self._state() != self.state:
            raise RuntimeError(
                f"{self.name} was changed while it was in use; start again, and leave it alone meanwhile"
            )
        self.file.seek(self.starts[i])
        return _parsed(self.where(i), self.file.readline())


def _parsed(where: str, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise ValueError(f"{where} is not UTF-8 text ({e.reason} at byte {e.start})") from None
    except ValueError as e:
        raise ValueError(f"{where} is not valid JSON ({e})") from None
    except RecursionError:
        raise ValueError(f"{where} is not a row: its JSON is nested too deeply") from None


class Listed:
    """Rows that are in memory already."""

    def __init__(self, name: str, rows: Sequence[Any], before: str = "") -> None:
        self.name, self.rows, self.before = name, rows, before

    def scan(self) -> Iterator[Any]:
        return iter(self.rows)

    def where(self, i: int) -> str:
        return f"{self.before}row {i}"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]


def _json_list(path: Path, file: IO[bytes]) -> Listed:
    with file:
        text = file.read().removeprefix(b"\xef\xbb\xbf")
    if not text.strip():
        raise ValueError(f"{path} holds no rows")
    rows = _parsed(str(path), text)
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds {type(rows).__name__}, not a list of rows; rows one a line are a .jsonl file")
    return Listed(str(path), rows, f"{path} ")


class Parquet:
    """Rows of a Parquet file, one row group in memory at a time. Needs pyarrow."""

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise ImportError(
                f"{path} is a Parquet file, and reading it needs pyarrow: pip install 'lora-torch[parquet]', or write "
                "it as .jsonl"
            ) from None
        self.name = str(path)
        try:
            self.file = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as e:
            raise ValueError(f"{path} is not a Parquet file ({e}); it is damaged or cut short") from None
        self.groups = [self.file.metadata.row_group(k).num_rows for k in range(self.file.metadata.num_row_groups)]
        self.held: tuple[int, list[Any]] = (-1, [])

    def scan(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def where(self, i: int) -> str:
        return f"{self.name} row {i}"

    def __len__(self) -> int:
        return sum(self.groups)

    def __getitem__(self, i: int) -> Any:
        group = 0
        while i >= self.groups[group]:
            i -= self.groups[group]
            group += 1
        if self.held[0] != group:
            self.held = (group, self.file.read_row_group(group).to_pylist())
        return self.held[1][i]
