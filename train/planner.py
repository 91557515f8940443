"""What a step of one size takes: by the account that the fused blocks decide by, or by a dry run of the real code.

`Planner` knows a model without its weights, at any rank, and answers for a batch, a length and a rank; `largest` asks
it again and again.  plan.py is its door.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora.config import LoRAConfig
from lora.kernels.scratch import room
from lora.layer import adapted
from lora.models.budget import (
    CUBLAS,
    Widths,
    account,
    blocks_decoded,
    decoded_bytes,
    graph_fits,
    host_bytes,
    keep_on_gpu,
    widths_of,
)
from lora.models.llama import Llama
from lora.models.outline import Outline, skeleton
from lora.quant.linear import Linear4bit
from lora.quant.linear8 import Linear8bit
from lora.train import graph
from lora.train.ceilings import Card, step_seconds
from lora.train.dryrun import GPU_GRAIN, count, even_batch, fake_batch, like, without_memory
from lora.wrap import wrap

CONTEXT = 2**29  # bytes of a CUDA context and its kernels, outside PyTorch's allocator: about


@dataclass(frozen=True)
class Setup:
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
    host: int | None  # bytes that may be pinned on the host; None is not known
    learned: float
    pack: int  # texts a row, 0 where rows are not packed
    recompute: bool
    bits: int
    keep: str | None


@dataclass(frozen=True)
class Found:
    parts: dict[str, int]
    apart: dict[str, int]
    keep: tuple[str, ...]
    decoded: int  # blocks whose weights stay decoded
    moment: str
    recorded: bool
    by: str

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Facts:
    """What a plan needs to know of a model, whatever the size of its batches."""

    weights4: int  # bytes
    dense: int
    trained: int  # parameters
    widths: Widths
    fused: bool
    itemsize: int
    r: int
    given: bool  # whether the adapter came with the model


class Planner:
    def __init__(self, setup: Setup) -> None:
        self.s = setup
        self.known: dict[int, Facts] = {}
        self.found: dict[tuple[int, int, int], Found] = {}

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

    def facts(self, r: int) -> Facts:
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
            facts = Facts(
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

    def find(self, batch: int, length: int, r: int) -> Found:
        """Peak and recompute of one size."""
        key = (batch, length, r)
        if key not in self.found:
            facts = self.facts(r)
            self.found[key] = self._account(facts, batch, length) if facts.fused else self._dry(batch, length, r)
        return self.found[key]

    def _account(self, facts: Facts, batch: int, length: int) -> Found:
        s, i, M = self.s, facts.itemsize, batch * length
        w = facts.widths._replace(documents=room(batch * s.pack) if s.pack else 0)
        n, learned = facts.trained, _learned(s.learned, batch, length)
        states = 8 * n if s.bits == 32 else 2 * (n + 4 * -(-n // 256)) + 4096
        base = facts.weights4 + facts.dense + 8 * n + states + CUBLAS
        if s.keep is not None:
            keep = [s.keep] * w.blocks
        else:
            keep = keep_on_gpu(w, M, i, s.limit - base - CUBLAS, learned, s.host)
        a = account(w, keep, M, i, learned)
        free, on_card = (limit - base - CUBLAS for limit in (s.limit, s.room or s.limit))
        decoded = blocks_decoded(w, keep, M, i, free, on_card) if s.keep is None else 0
        small = graph.RECORD and M <= graph.TOKENS
        stay = decoded * decoded_bytes(w, i)
        there = base + a.reused + stay
        recorded = small and graph_fits(w, keep, M, i, s.limit - there, (s.room or s.limit) - there)
        chunk = a.chunk if a.moment == "head" else 0
        parts = {
            "4-bit weights": facts.weights4,
            "dense weights": facts.dense,
            "trained weights, float32": 4 * n,
            "gradients": 4 * n,
            "optimizer states": states,
            "weights that stay decoded": stay,
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
        return Found(parts, apart, tuple(keep), decoded, a.moment, recorded, "account")

    def _dry(self, batch: int, length: int, r: int) -> Found:
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
        return Found(parts, {"CUDA context, about": CONTEXT if s.gpu else 0}, (), 0, "step", False, "dry run")

    def seconds(self, found: Found, batch: int, length: int, r: int) -> dict[str, float]:
        """Of one step, by what they are spent on."""
        s, facts = self.s, self.facts(r)
        keep = found.keep or ["input" if s.recompute else "all"] * facts.widths.blocks
        return step_seconds(
            facts.widths, s.card, rows=batch, length=length, keep=keep, itemsize=facts.itemsize,
            decoded=found.decoded, bits4=facts.weights4 > 0, trained=facts.trained,
            learned=_learned(s.learned, batch, length), recorded=found.recorded, full=s.method == "full", gpu=s.gpu,
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


def _ranked(facts: Facts, r: int) -> Facts:
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
