"""A run on disk, whole: weights, optimizer, place in the data, random states, place in the log, and what it belongs to.

    checkpoints/step-00000120/state.safetensors   the optimizer's buffers (its w are the weights), random states
                              state.json          the rest, and the SHA-256 of the file beside it
                              adapter/            peft's files, of an adapter: for use, not for going on

Written beside, flushed, renamed; older ones go only after.  So a folder that bears the name is whole, and a kill at
any moment leaves the one before.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora.files import new_directory, read_json
from lora.train.certificate import differences
from lora.train.optim import AdamW

FORMAT = 1
# Settings that change nothing of the steps to come, so that a run may go on with others
FREE = ("out", "progress", "log_every", "save_every", "keep_last", "probe")
_OTHER = {
    "data": "the training rows are other ones",
    "valid": "the validation rows are other ones",
    "base": "the base model is another one",
    "steps": "the number of steps is another",
}


@dataclass
class Progress:
    """How far a run has got, besides its weights and its optimizer."""

    step: int = 0  # steps taken, which is also the place in the data
    tokens: int = 0
    seconds: float = 0.0  # of the steps alone
    wall: float = 0.0  # of all
    loss_sum: float = 0.0
    scale: float = 1.0  # float16's loss scale, and its good steps in a row
    good: int = 0
    skipped: int = 0
    limit: float = float("inf")  # Divergence's
    strikes: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    stale: int = 0  # evaluations without a lower eval_loss
    owed: bool = False  # a signal broke off the evaluation of this step, and a run that goes on begins with it
    log_bytes: int = 0


# ---- random states ----
def random_states(device: torch.device) -> dict[str, Tensor]:
    """Those that a step may draw from: torch's on the CPU and on `device`."""
    states = {"rng.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng.cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["rng.cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["rng.cuda"], device)


# ---- write ----
def save_checkpoint(
    folder: Path, optimizer: AdamW, progress: Progress, identity: Mapping[str, Any], adapter: Any = None
) -> Path:
    """Writes folder/step-...; `adapter(path)` writes what else shall lie in it. One of this step is left as it is.

    Raises RuntimeError where a weight is not finite; OSError where it cannot be written: the older ones stay.
    """
    path = folder / f"step-{progress.step:08d}"
    if path.is_dir():
        return path
    if not torch.isfinite(optimizer.w).all():
        raise RuntimeError(f"weights are not finite after step {progress.step}; no checkpoint was written of them")
    state = optimizer.state_dict()
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items() if isinstance(v, Tensor)}
    tensors |= random_states(optimizer.w.device)
    version, words, gauss = random.getstate()
    record = {
        "format": FORMAT,
        "progress": dataclasses.asdict(progress),
        "optimizer": {k: v for k, v in state.items() if not isinstance(v, Tensor)},
        "python": [version, list(words), gauss],
        "identity": dict(identity),
    }
    try:
        with new_directory(path) as beside:
            save_file(tensors, beside / "state.safetensors")
            record["sha256"] = _sha256(beside / "state.safetensors")
            (beside / "state.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
            if adapter:
                adapter(beside / "adapter")
            flush(beside)
        _flush_one(folder)
    except (OSError, SafetensorError) as e:
        newest = checkpoints(folder)
        kept = f"{newest[-1]} is whole and stays" if newest else "there was none before"
        raise OSError(f"checkpoint of step {progress.step} could not be written: {reason(e)}; {kept}") from e
    return path


def reason(e: Exception) -> str:
    """Why a file could not be written, in few words."""
    if isinstance(e, OSError) and e.errno:
        return os.strerror(e.errno)
    return str(e)


@contextlib.contextmanager
def ending(out: Path | None) -> Iterator[None]:
    """Around what is written after the last step: where that fails, an OSError that says what one can go on from."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        found = checkpoints(out / "checkpoints") if out else []
        left = f"{found[-1]} is whole: make room, then go on with --resume {out}" if found else "no checkpoint was kept"
        raise OSError(f"the run ended, and {out} could not be written to the end: {reason(e)}; {left}") from e


def prune(folder: Path, keep_last: int, best: int | None) -> None:
    """Removes all checkpoints but the newest `keep_last` and that of step `best`, and what a kill left half written."""
    found = checkpoints(folder)
    for path in found[: max(0, len(found) - keep_last)]:
        if best is None or path.name != f"step-{best:08d}":
            gone = path.with_name(f".{path.name}.gone.tmp")
            path.rename(gone)  # at once: a folder half removed must not bear a checkpoint's name
            shutil.rmtree(gone)
    clean(folder)


def clean(folder: Path) -> None:
    for path in folder.glob(".step-*.tmp") if folder.is_dir() else ():
        shutil.rmtree(path)


def flush(folder: Path) -> None:
    """Brings every file below, and the names of them, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        _flush_one(path)


def _flush_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- read ----
def checkpoints(folder: Path) -> list[Path]:
    """All whole ones, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir()) if folder.is_dir() else []


def find_checkpoint(where: Path) -> Path | None:
    """The newest of a run directory, or `where` itself if it is one; None where the run has written none yet.

    Raises FileNotFoundError where there is neither run nor checkpoint.
    """
    if (where / "state.json").is_file():
        return where
    if not (where / "run.json").is_file():
        raise FileNotFoundError(f"{where} holds no run to go on with: neither run.json nor a checkpoint's state.json")
    found = checkpoints(where / "checkpoints")
    return found[-1] if found else None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """state.json; ValueError where it is damaged or of another format."""
    record = read_json(path / "state.json")
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path} is no checkpoint of format {FORMAT}")
    return record


def load_checkpoint(path: Path, optimizer: AdamW, identity: Mapping[str, Any]) -> Progress:
    """Puts weights, optimizer and random states back, and returns how far the run had got.

    Raises ValueError, and changes nothing, where the checkpoint is damaged or of another run: other settings, data,
    model or parameters.
    """
    record = read_checkpoint(path)
    saved = record["identity"]
    said = differences(saved["config"], identity["config"], FREE)
    for key, what in _OTHER.items():
        if saved[key] != identity[key]:
            said.append(f"{what} ({str(saved[key])[:12]}, now {str(identity[key])[:12]})")
    if saved["parameters"] != identity["parameters"]:
        pairs = zip(saved["parameters"], identity["parameters"], strict=False)
        a, b = next(((a, b) for a, b in pairs if a != b), (len(saved["parameters"]), len(identity["parameters"])))
        said.append(f"what trains is another: {a}, now {b}")
    if said:
        raise ValueError(f"{path} is a checkpoint of another run: {'; '.join(said)}; nothing was changed")
    file = path / "state.safetensors"
    if not file.is_file() or _sha256(file) != record["sha256"]:
        raise ValueError(f"{file} is damaged: its bytes are not those that were written; take an older checkpoint")
    tensors = load_file(file)
    optimizer.load_state_dict(record["optimizer"] | {k: v for k, v in tensors.items() if not k.startswith("rng.")})
    device = optimizer.w.device
    if device.type == "cuda" and "rng.cuda" not in tensors:
        raise ValueError(f"{path} is of a run on a CPU, and this model lies on {device}; the bits would not go on")
    set_random_states(tensors, device)
    version, words, gauss = record["python"]
    random.setstate((version, tuple(words), gauss))
    return Progress(**record["progress"])


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
