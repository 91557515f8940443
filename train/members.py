"""The adapters of a sweep: what each is to be, what came of it, and its files."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from lora.files import write_text
from lora.save import save
from lora.train.checkpoint import reason
from lora.train.config import TrainConfig
from lora.train.plot import write_curves


@dataclass(frozen=True, kw_only=True)
class Member:
    """One adapter of a sweep."""

    lr: float
    r: int = 16
    alpha: float = 32.0
    seed: int = 42

    @property
    def name(self) -> str:
        return f"lr{self.lr:g}-r{self.r}-a{self.alpha:g}-s{self.seed}".replace(".", "_")


@dataclass
class Result:
    """What came of a member: its loss at each step, the last validation loss, and why it ended early, if it did."""

    member: Member
    losses: list[float]
    eval_loss: float | None = None
    failed: str = ""


@dataclass(frozen=True)
class Sweep:
    """All members, best first. `print` it for the table."""

    results: tuple[Result, ...]
    seconds: float

    def __str__(self) -> str:
        lines = [f"{'lr':>10s} {'r':>5s} {'alpha':>7s} {'seed':>6s} {'loss':>9s} {'eval_loss':>10s}"]
        for x in self.results:
            m, held = x.member, "-" if x.eval_loss is None else f"{x.eval_loss:.4f}"
            last = f"{x.losses[-1]:.4f}" if x.losses else "-"
            row = f"{m.lr:10.2e} {m.r:5d} {m.alpha:7g} {m.seed:6d} {last:>9s} {held:>10s}"
            lines.append(f"{row}  {x.failed}".rstrip())
        return "\n".join(lines)


def grid(lrs: Sequence[float], rs: Sequence[int], alphas: Sequence[float], seeds: Sequence[int]) -> list[Member]:
    """A member for each combination."""
    every = itertools.product(lrs, rs, alphas, seeds)
    return [Member(lr=lr, r=r, alpha=alpha, seed=seed) for lr, r, alpha, seed in every]


def begin_folder(out: Path, config: TrainConfig) -> None:
    """The folder of a sweep before its first step.  Raises OSError where it cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "sweep.json", json.dumps({"finished": False, "config": asdict(config)}) + "\n")
    except OSError as e:
        raise OSError(f"{out} cannot be written, so nothing was trained: {reason(e)}") from e


def keep(
    model: nn.Module, out: Path, results: Sequence[Result], took: float, config: TrainConfig, finished: bool
) -> None:
    """Writes what came of a sweep: every adapter that can be.  Raises OSError that names what could not."""
    lost: list[str] = []
    why = ""
    for x in results:
        if not x.failed:
            try:
                save(model, out / x.member.name / "adapter", name=x.member.name)
            except (OSError, SafetensorError) as e:
                lost, why = [*lost, x.member.name], reason(e)
    try:
        rows = [asdict(x) for x in results]
        table = {"finished": finished and not lost, "seconds": took, "config": asdict(config), "members": rows}
        write_text(out / "sweep.json", json.dumps(table) + "\n")
        write_curves(out / "sweep.png", {x.member.name: x.losses for x in results})
    except OSError as e:
        lost, why = [*lost, "the table"], reason(e)
    if lost:
        raise OSError(f"the sweep ended, and {', '.join(lost)} could not be written to {out}: {why}; the rest is whole")
