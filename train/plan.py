"""plan: what a training step takes in memory and time, before anything is loaded.

Where the blocks run as one step each (the fast path on a GPU), peak and recompute come from the account that the run
itself decides by (lora.models.budget).  Elsewhere a step is run dry: the real code on tensors without memory
(dryrun.py).  Seconds are counted work over the ceilings of this machine or of a named card (ceilings.py).
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora.config import LoRAConfig
from lora.layer import adapted
from lora.models.base import CausalLM, refuse_encoder
from lora.models.budget import (
    CUBLAS,
    MARGIN,
    Widths,
    account,
    free_bytes,
    graph_fits,
    host_bytes,
    keep_on_gpu,
    parse_bytes,
    widths_of,
)
from lora.models.llama import Llama
from lora.models.outline import Outline, outline, skeleton
from lora.quant.linear import Linear4bit
from lora.quant.linear8 import Linear8bit
from lora.train import graph
from lora.train.ceilings import Card, card_of, measure, step_seconds
from lora.train.dryrun import GPU_GRAIN, count, even_batch, fake_batch, like, without_memory
from lora.wrap import wrap

METHODS = ("qlora", "lora", "full")
SOLVE = ("batch", "length", "rank")
CONTEXT = 2**29  # bytes of a CUDA context and its kernels, outside PyTorch's allocator: about
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What a step would take. `print` shows it as a table.

    Attributes:
        parts: bytes by what they are for; their sum is `peak`, the most that tensors take at once
        apart: bytes beside that: the CUDA context, pinned memory of the host
        keep: what each block keeps from its forward to its backward, a word of fused.KEEPS; empty off the fast path
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
            lines.append(f"blocks keep: {_runs(self.keep)}" + (", one CUDA graph" if self.recorded else ""))
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


@dataclass(frozen=True)
class _Setup:
    """What is planned, but for its size."""

    source: Outline | nn.Module
    name: str
    method: str
    config: LoRAConfig
    quantize: str | None
    dtype: str
    gpu: bool
    card: Card
    limit: int
    room: int | None  # bytes for tensors, whatever the budget; None is `limit`
    learned: float
    pack: bool
    recompute: bool
    bits: int
    keep: str | None


@dataclass(frozen=True)
class _Found:
    parts: dict[str, int]
    apart: dict[str, int]
    keep: tuple[str, ...]
    moment: str
    recorded: bool
    by: str

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


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
    pack: bool = False,
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
        pack: rows of several texts, which run without CUDA graphs
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
        name, most = Path(path_or_model).name, source.config.max_length
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
    setup = _Setup(
        source, name, method, config, quantize, dtype, gpu, ceiling, limit, room if gpu else None, learned, pack,
        recompute, optim_bits, keep,
    )  # fmt: skip
    planner = _Planner(setup)
    found = planner.find(batch, length, r)
    largest = {key: planner.largest(key, batch, length, r, most) for key in solve}
    return Plan(
        name, method, batch, length, planner.facts(r).r, "cuda" if gpu else "cpu", ceiling.name,
        f"{ceiling.matmul:,.3g} TFLOP/s, copy {ceiling.copy:,.0f} GB/s ({ceiling.source})", found.parts, found.apart,
        found.keep, found.moment, found.recorded, planner.seconds(found, batch, length, r), limit, found.by, largest,
    )  # fmt: skip


def _room(gpu: bool, here: bool, card: Card) -> int:
    """Bytes that tensors may take on the machine."""
    if not gpu:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if here:
        device = torch.device("cuda")
        return free_bytes(device) + torch.cuda.memory_allocated(device)
    return int(card.memory * (1 - MARGIN)) - CONTEXT


@dataclass(frozen=True)
class _Facts:
    """What a plan needs to know of a model, whatever the size of its batches."""

    weights4: int  # bytes
    dense: int
    trained: int  # parameters
    widths: Widths
    fused: bool
    itemsize: int
    r: int
    given: bool  # whether the adapter came with the model


class _Planner:
    def __init__(self, setup: _Setup) -> None:
        self.s = setup
        self.known: dict[int, _Facts] = {}
        self.found: dict[tuple[int, int, int], _Found] = {}

    def build(self, r: int) -> Any:
        """The model without memory, as a run would train it. Call it inside `without_memory`."""
        s = self.s
        if isinstance(s.source, nn.Module):
            model = like(s.source)
            if any(p.requires_grad for p in model.parameters()):
                return model
        else:
            model = skeleton(s.source, s.quantize, s.dtype, "cuda" if s.gpu else "cpu")
        if s.method == "full":
            return model.requires_grad_(True)
        return wrap(model, config=dataclasses.replace(s.config, r=r))

    def facts(self, r: int) -> _Facts:
        if r in self.known:
            return self.known[r]
        grain = GPU_GRAIN if self.s.gpu else 1
        with without_memory(self.s.gpu):
            model = self.build(r)
            tensors: dict[int, Tensor] = {}
            for t in (*model.parameters(), *model.buffers()):
                tensors.setdefault(t.untyped_storage()._cdata, t)
            size = {key: -(-t.untyped_storage().nbytes() // grain) * grain for key, t in tensors.items()}
            packed = {
                t.untyped_storage()._cdata
                for m in model.modules()
                if isinstance(m, Linear4bit | Linear8bit)
                for t in m.buffers()
            }
            trained = {p.untyped_storage()._cdata: p.numel() for p in model.parameters() if p.requires_grad}
            ranks = {a.r for _, layer in adapted(model) for a in layer.adapters.values() if hasattr(a, "r")}
            fused = self.s.gpu and not self.s.recompute and self._is_fused(model)
            facts = _Facts(
                weights4=sum(size[key] for key in packed),
                dense=sum(n for key, n in size.items() if key not in packed and key not in trained),
                trained=sum(trained.values()),
                widths=widths_of(model.config, model) if isinstance(model, Llama) else _widths_like(model),
                fused=fused,
                itemsize=model.place()[1].itemsize,
                r=max(ranks, default=0),
                given=isinstance(self.s.source, nn.Module) and any(p.requires_grad for p in self.s.source.parameters()),
            )
        self.known[r] = facts
        return facts

    @staticmethod
    def _is_fused(model: Any) -> bool:
        """Whether the blocks run as one step each: asked of the model itself, over two tokens."""
        head = model.lm_head
        if not isinstance(model, Llama) or model.softcap is not None or type(head) is not nn.Linear:
            return False
        if head.weight.requires_grad or model.embedding().weight.requires_grad:
            return False
        model.keeping.recordable = False
        model.train().hidden(torch.zeros(1, 2, dtype=torch.int64))
        return model.keeping.recordable

    def find(self, batch: int, length: int, r: int) -> _Found:
        """Peak and recompute of one size."""
        key = (batch, length, r)
        if key not in self.found:
            facts = self.facts(r)
            self.found[key] = self._account(facts, batch, length) if facts.fused else self._dry(batch, length, r)
        return self.found[key]

    def _account(self, facts: _Facts, batch: int, length: int) -> _Found:
        s, w, i, M = self.s, facts.widths, facts.itemsize, batch * length
        n, learned = facts.trained, _learned(s.learned, batch, length)
        states = 8 * n if s.bits == 32 else 2 * (n + 4 * -(-n // 256)) + 4096
        base = facts.weights4 + facts.dense + 8 * n + states + CUBLAS
        if s.keep is not None:
            keep = [s.keep] * w.blocks
        else:
            keep = keep_on_gpu(w, M, i, s.limit - base - CUBLAS, learned)
        a = account(w, keep, M, i, learned)
        small = graph.RECORD and M <= graph.TOKENS and not s.pack
        there = base + a.reused
        recorded = small and graph_fits(w, keep, M, i, s.limit - there, (s.room or s.limit) - there)
        chunk = a.chunk if a.moment == "head" else 0
        parts = {
            "4-bit weights": facts.weights4,
            "dense weights": facts.dense,
            "trained weights, float32": 4 * n,
            "gradients": 4 * n,
            "optimizer states": states,
            "kept by blocks": a.kept,
            "reused buffers": a.reused,
            "working set": a.working - chunk,
            "chunk of logits": chunk,
            "cuBLAS": CUBLAS * (1 + recorded),
        }
        apart = {
            "CUDA context, about": CONTEXT,
            "pinned on the host": sum(host_bytes(w, word, M, i) for word in keep),
        }
        return _Found(parts, apart, tuple(keep), a.moment, recorded, "account")

    def _dry(self, batch: int, length: int, r: int) -> _Found:
        s = self.s
        grain = GPU_GRAIN if s.gpu else 1
        rows = even_batch(batch, length, s.learned)
        with without_memory(s.gpu) as mode:
            c = count(self.build(r), fake_batch(mode, rows), bits=s.bits, recompute=s.recompute, grain=grain)
        parts = {
            "4-bit weights": c.weights4,
            "dense weights": c.dense,
            "trained weights, float32": c.adapters,
            "gradients": c.gradients,
            "optimizer states": c.optimizer,
            "kept by blocks": c.kept,
            "working set": c.peak - c.base - c.kept,
            "cuBLAS": CUBLAS if s.gpu else 0,
        }
        return _Found(parts, {"CUDA context, about": CONTEXT if s.gpu else 0}, (), "step", False, "dry run")

    def seconds(self, found: _Found, batch: int, length: int, r: int) -> dict[str, float]:
        """Of one step, by what they are spent on."""
        s, facts = self.s, self.facts(r)
        keep = found.keep or ["input" if s.recompute else "all"] * facts.widths.blocks
        return step_seconds(
            facts.widths, s.card, rows=batch, length=length, keep=keep, itemsize=facts.itemsize,
            bits4=facts.weights4 > 0, trained=facts.trained, learned=_learned(s.learned, batch, length),
            recorded=found.recorded, full=s.method == "full", gpu=s.gpu,
        )  # fmt: skip

    def largest(self, key: str, batch: int, length: int, r: int, longest: int) -> int:
        """The largest batch, length or rank that fits; 0 where none does.

        A dry run takes seconds, so by dry runs it is exact to a sixteenth only.
        """
        facts = self.facts(r)
        if key == "rank" and (facts.given or not facts.r):
            raise ValueError("solve='rank' varies the rank of a fresh adapter; this model trains something else")
        sizes: dict[str, Callable[[int], tuple[int, int, int]]] = {
            "batch": lambda x: (x, length, r),
            "length": lambda x: (batch, x, r),
            "rank": lambda x: (batch, length, x),
        }
        low, most = {"batch": (0, 2**20), "length": (1, longest), "rank": (0, facts.widths.states)}[key]
        at = {"batch": batch, "length": length, "rank": r}[key]

        def fits(x: int) -> bool:
            size = sizes[key](x)
            if key == "rank" and facts.fused and x not in self.known:
                self.known[x] = _ranked(facts, x)
            return self.find(*size).peak <= self.s.limit

        high: int | None = None
        while high is None or high - low > max(1, 0 if facts.fused else low // 16):
            if not low < at < (high or most + 1):
                at = min(most, 2 * max(1, low)) if high is None else (low + high) // 2
            if fits(at):
                low = at
                if low == most:
                    break
            else:
                high = at
        return low if low > (1 if key == "length" else 0) else 0


def _ranked(facts: _Facts, r: int) -> _Facts:
    """The facts of an adapter of rank r, from those of another rank."""
    w = facts.widths
    ranks = tuple(n // facts.r * r for n in w.ranks)
    return dataclasses.replace(facts, trained=facts.trained // facts.r * r, widths=w._replace(ranks=ranks), r=r)


def _learned(share: float, batch: int, length: int) -> int:
    return batch * max(1, min(length - 1, round(length * share)))


def _widths_like(model: Any) -> Widths:
    """Of a model whose blocks are not Llama's: a gate as wide as makes the number of weights right."""
    c = model.config
    d = model.embedding().weight.shape[1]
    heads = getattr(c, "num_heads", c.num_kv_heads)
    qkv, attended = (heads + 2 * c.num_kv_heads) * c.head_dim, heads * c.head_dim
    head = id(model.lm_head)
    weights = 0
    for m in model.modules():
        if id(m) != head and hasattr(m, "in_features") and hasattr(m, "out_features") and not hasattr(m, "adapters"):
            weights += m.in_features * m.out_features
    gate = max(1, (weights // c.num_layers - d * (qkv + attended)) // (3 * d))
    r = max((a.r for _, layer in adapted(model) for a in layer.adapters.values() if hasattr(a, "r")), default=0)
    return Widths(d, qkv, attended, gate, c.num_layers, heads, c.vocab_size, (3 * r, r, 2 * r, r))
