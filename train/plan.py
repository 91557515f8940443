"""plan: what a training step takes in memory and time, before anything is loaded.

Where the blocks run as one step each (the fast path on a GPU), peak and recompute come from the account that the run
itself decides by (lora.models.budget).  Elsewhere a step is run dry: the real code on tensors without memory
(dryrun.py).  Seconds are counted work over the ceilings of this machine or of a named card (ceilings.py).
"""

import dataclasses
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora.config import LoRAConfig
from lora.models.base import CausalLM, refuse_encoder
from lora.models.budget import MARGIN, free_bytes, parse_bytes
from lora.models.host import host_room
from lora.models.outline import Outline, outline
from lora.train.ceilings import Card, card_of, measure
from lora.train.planner import CONTEXT, Planner, Setup

METHODS = ("qlora", "lora", "full")
SOLVE = ("batch", "length", "rank")
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What a step would take. `print` shows it as a table.

    Attributes:
        parts: bytes by what they are for; their sum is `peak`, the most that tensors take at once
        apart: bytes beside that: the CUDA context, pinned memory of the host
        keep: what each block keeps from its forward to its backward, a word of fused.KEEPS; empty off the fast path
        decoded: the weights of so many blocks, the first ones, stay decoded from step to step
        moment: of the step when the peak is
        recorded: whether the step runs as one CUDA graph
        seconds: of one optimizer step; `spent` says on what
        limit: bytes that tensors may take; `fits` is whether they do
        largest: the largest batch, length or rank that fits, for those that were asked for
        by: "account" or "dry run"
    """

    name: str
    method: str
    batch: int
    length: int
    r: int
    device: str
    card: str
    ceilings: str
    parts: dict[str, int]
    apart: dict[str, int]
    keep: tuple[str, ...]
    decoded: int
    moment: str
    recorded: bool
    spent: dict[str, float]
    limit: int
    by: str
    largest: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit

    @property
    def seconds(self) -> float:
        return sum(self.spent.values())

    @property
    def tokens_per_second(self) -> float:
        return self.batch * self.length / self.seconds

    def to_json(self) -> dict[str, Any]:
        more = ("peak", "fits", "seconds", "tokens_per_second")
        return dataclasses.asdict(self) | {key: getattr(self, key) for key in more}

    def __str__(self) -> str:
        rank = "" if self.method == "full" else f" r={self.r}"
        lines = [f"{self.name}: {self.method}{rank}, {self.batch} x {self.length:,} tokens on {self.card}", ""]
        unit, size = ("GiB", GIB) if self.peak >= GIB else ("MiB", 2**20)
        width = max(map(len, (*self.parts, *self.apart)))
        lines += [f"{name:<{width}}  {n / size:9.2f}" for name, n in self.parts.items() if n]
        lines.append(f"{'peak of tensors':<{width}}  {self.peak / size:9.2f} {unit}, in the {self.moment} ({self.by})")
        lines += [f"{name:<{width}}  {n / size:9.2f} apart" for name, n in self.apart.items() if n]
        verdict = "fits into" if self.fits else "DOES NOT FIT into"
        lines += ["", f"{verdict} {self.limit / size:,.2f} {unit}"]
        if self.keep:
            decoded = f"; weights of the first {self.decoded} stay decoded" if self.decoded else ""
            lines.append(f"blocks keep: {_runs(self.keep)}{decoded}" + ("; one CUDA graph" if self.recorded else ""))
        spent = ", ".join(f"{name} {1e3 * s:,.0f}" for name, s in self.spent.items() if 1e3 * s >= 0.5)
        lines.append(f"step: {self.seconds:.3f} s, {self.tokens_per_second:,.0f} tokens/s (ms: {spent})")
        lines.append(f"ceilings: {self.ceilings}")
        if self.largest:
            lines.append("largest that fits: " + ", ".join(f"{key} {n:,}" for key, n in self.largest.items()))
        return "\n".join(lines)


def _runs(keep: Sequence[str]) -> str:
    """0-3 host, 4-31 all."""
    out, at = [], 0
    for word, same in itertools.groupby(keep):
        n = len(list(same))
        out.append(f"{at}-{at + n - 1} {word}" if n > 1 else f"{at} {word}")
        at += n
    return ", ".join(out)


def plan(
    path_or_model: str | Path | nn.Module,
    batch: int = 4,
    length: int = 2048,
    r: int = 16,
    quantize: str | None = "nf4",
    budget: int | str | None = None,
    *,
    method: str | None = None,
    targets: str | Sequence[str] = "all-linear",
    dtype: str = "auto",
    device: str = "auto",
    card: str | Card | None = None,
    learned: float = 1.0,
    pack: int = 0,
    recompute: bool = False,
    optim_bits: int = 32,
    keep: str | None = None,
    solve: Sequence[str] = (),
) -> Plan:
    """Memory and time of a training step of `batch` rows of `length` tokens, without weights.

    Args:
        path_or_model: a model folder (its config.json will do), .gguf file or hub name (config.json alone is fetched);
            or a model, which is planned as it stands, wrapped with r where nothing of it trains
        quantize: of a path: "nf4", "fp4", "int8" or None; layers that are stored in 4 or 8 bits stay so
        budget: bytes that tensors may take, as a number or "24GiB"; None is the memory of the machine
        method: "qlora", "lora" or "full"; by default by `quantize`
        device: "cuda" or "cpu"; "auto" is the GPU when there is one or a card is named
        card: a card, or its name (lora.train.ceilings.CARDS); None measures this machine, a second's work
        learned: share of the tokens that are learned from: their logits alone are made
        pack: texts in each row, where rows are packed: attention takes some room for each
        recompute, optim_bits: as in TrainConfig
        keep: what every block keeps, a word of fused.KEEPS; None lets memory decide, as a run does
        solve: of "batch", "length", "rank": the largest that fits, the others as given

    Raises ValueError for a setting out of range, FileNotFoundError where there is no model, TypeError for an encoder.
    """
    for key, value in (("batch", batch), ("length", length), ("r", r)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key}={value!r}: a whole number, at least 1")
    if length < 2:
        raise ValueError(f"length={length}: a row of one token has nothing to predict")
    if not 0 < learned <= 1:
        raise ValueError(f"learned={learned!r}: a share above 0, at most 1")
    if not isinstance(pack, int) or not 0 <= pack <= length:
        raise ValueError(f"pack={pack!r}: how many texts stand in a row of {length} tokens, 0 where it is not packed")
    unknown = [key for key in solve if key not in SOLVE]
    if unknown:
        raise ValueError(f"solve={unknown[0]!r}: one of {', '.join(SOLVE)}")
    method = method or ("qlora" if quantize else "lora")
    if method not in METHODS:
        raise ValueError(f"method={method!r}: one of {', '.join(METHODS)}")
    if device not in ("auto", "cuda", "cpu"):
        raise ValueError(f"device={device!r}: one of auto, cuda, cpu")
    here = torch.cuda.is_available()
    gpu = device == "cuda" or (device == "auto" and (here or card is not None))
    if isinstance(path_or_model, nn.Module):
        refuse_encoder(path_or_model, "lora.plan")
        if not isinstance(path_or_model, CausalLM):
            raise TypeError(f"lora.plan knows models of lora.load's, and {type(path_or_model).__name__} is none")
        source: Outline | nn.Module = path_or_model
        name, most = type(path_or_model).__name__, path_or_model.config.max_length
    else:
        source = outline(path_or_model)
        path = Path(path_or_model)
        name = path.name if path.name.strip(".") else path.resolve().name  # "." and ".." say no name
        most = source.config.max_length
    if length > most:
        raise ValueError(f"length={length}: {name} was built for {most} tokens a row")
    named = card_of(card) if isinstance(card, str) else card
    ceiling = named if named else measure(torch.device("cuda" if here else "cpu")) if here or not gpu else None
    ceiling = ceiling or card_of("h100")
    wanted = parse_bytes(budget) if isinstance(budget, str) else budget
    room = _room(gpu, here and card is None, ceiling)
    limit = room if wanted is None else min(wanted, room)
    quantize = {"qlora": quantize or "nf4", "lora": None, "full": None}[method]
    config = LoRAConfig(r=r, targets=targets if isinstance(targets, str) else tuple(targets))
    setup = Setup(
        source, name, method, config, quantize, dtype, gpu, ceiling, limit, room if gpu else None,
        host_room() if here and card is None else None, learned, pack, recompute, optim_bits, keep,
    )  # fmt: skip
    planner = Planner(setup)
    found = planner.find(batch, length, r)
    largest = {key: planner.largest(key, batch, length, r, most) for key in solve}
    return Plan(
        name, method, batch, length, planner.facts(r).r, "cuda" if gpu else "cpu", ceiling.name,
        f"{ceiling.matmul:,.3g} TFLOP/s, copy {ceiling.copy:,.0f} GB/s ({ceiling.source})", found.parts, found.apart,
        found.keep, found.decoded, found.moment, found.recorded, planner.seconds(found, batch, length, r), limit,
        found.by, largest,
    )  # fmt: skip


def _room(gpu: bool, here: bool, card: Card) -> int:
    """Bytes that tensors may take on the machine."""
    if not gpu:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if here:
        device = torch.device("cuda")
        return free_bytes(device) + torch.cuda.memory_allocated(device)
    return int(card.memory * (1 - MARGIN)) - CONTEXT
