"""What benchmarks share: the JSON line at their end, kept under results/; peak memory; rivals in processes."""

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def device_name() -> str:
    """The GPU, or the processor with its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {os.cpu_count()} cores"


def where() -> dict[str, str]:
    """What a row was measured on, and when."""
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    return {
        "kind": kind,
        "date": datetime.date.today().isoformat(),
        "device": device_name(),
        "torch": str(torch.__version__),
    }


def _path(bench: str, kind: str | None = None) -> Path:
    return Path(__file__).parent / "results" / f"{bench}-{kind or where()['kind']}.json"


def kept_rows(bench: str, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """The saved rows that `keep` says yes to: those of cases that this run leaves alone, each with its own date."""
    path = _path(bench)
    if not path.is_file():
        return []
    document = json.loads(path.read_text())
    return [{"date": document["date"]} | row for row in document["rows"] if keep(row)]


def finish(bench: str, rows: list[dict[str, Any]], save: bool, on: dict[str, str] | None = None) -> None:
    """Prints the JSON line and, with `save`, writes results/<bench>-<cpu or gpu>.json.

    `on` is `where()` of the machine that measured, if it was not this one.
    """
    said = on or where()
    document = {"bench": bench, **{key: said[key] for key in ("date", "device", "torch")}, "rows": rows}
    if save:
        _path(bench, said["kind"]).write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


def resident_peak() -> int:
    """Largest resident size of this process in bytes; getrusage's begins with that of the process that started it."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def peer_rows(script: str, who: str, *words: str) -> list[dict[str, Any]]:
    """What a rival's script beside this file prints behind PEER, from a process of its own; a failure is a row too."""
    command = [sys.executable, str(Path(__file__).with_name(script)), who, *words]
    told = subprocess.run(command, capture_output=True, text=True)
    found = [json.loads(x.removeprefix("PEER")) for x in told.stdout.splitlines() if x.startswith("PEER")]
    if told.returncode:
        found.append({"who": who, "error": told.stderr.strip().splitlines()[-1][:300]})
    print(*found, sep="\n", flush=True)
    return found
