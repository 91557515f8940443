"""What benchmarks share: the JSON line at their end, kept under results/; peak memory; rivals in processes."""

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
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
    return {
        "kind": "gpu" if torch.cuda.is_available() else "cpu",
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
    on = on or where()
    if save:
        keep(bench, rows, on)
    print(json.dumps(_document(bench, rows, on)))


def keep(bench: str, rows: list[dict[str, Any]], on: dict[str, str] | None = None) -> None:
    """Writes results/<bench>-<cpu or gpu>.json: a long run does so after each part, and a cut-off loses one part."""
    on = on or where()
    _path(bench, on["kind"]).write_text(json.dumps(_document(bench, rows, on), indent=1) + "\n")


def _document(bench: str, rows: list[dict[str, Any]], on: dict[str, str]) -> dict[str, Any]:
    return {"bench": bench, **{key: on[key] for key in ("date", "device", "torch")}, "rows": rows}


def resident_peak() -> int:
    """Largest resident size of this process in bytes; getrusage's begins with that of the process that started it."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def peer_rows(script: str, who: str, *words: str) -> list[dict[str, Any]]:
    """What a rival's script beside this file prints behind PEER, from a process of its own; a failure is a row too."""
    command = [sys.executable, str(Path(__file__).with_name(script)), who, *words]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as child:
            for line in child.stdout or ():
                if line.startswith("PEER"):
                    rows.append(json.loads(line.removeprefix("PEER")))
                    print(rows[-1], flush=True)
        if child.returncode:
            errors.seek(0)
            rows.append({"who": who, "error": ([""] + errors.read().strip().splitlines())[-1][:300]})
            print(rows[-1], flush=True)
    return rows
