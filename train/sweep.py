"""Several adapters trained at once on one frozen base: each has its own learning rate, rank, alpha, seed and rows.

The rows of all members stand in one batch, so the base is decoded and multiplied once for all of them; an adapter acts
on its own rows alone (`lora.layer.ByRow`), and has its own loss, clipping, schedule and optimizer.  Rows do not see
each other, so each member learns what it would have learned alone, up to rounding.
Prior art: mLoRA, arXiv:2312.02515; the memory of K solo runs becomes one base and K small states.
"""

import itertools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora.adapter import ByRow
from lora.config import LoRAConfig
from lora.eval.nll import row_nll, token_nll
from lora.files import refuse_filled, write_text
from lora.kernels.scratch import keep_pages
from lora.layer import LoRALinear, adapted
from lora.models.base import refuse_encoder
from lora.models.tokenizer import Tokenizer
from lora.render import collate
from lora.rows import Data
from lora.save import save
from lora.train.batches import endless, steps_per_epoch
from lora.train.config import TrainConfig
from lora.train.data import prepare
from lora.train.guard import Divergence
from lora.train.loss import recomputed
from lora.train.optim import AdamW
from lora.train.plot import write_curves
from lora.train.schedule import learning_rate
from lora.wrap import activate, wrap

_FIXED = (
    "pack",
    "neftune",
    "label_smoothing",
    "best",
    "patience",
    "eval_generate",
    "lora_plus",
)  # a sweep has none of them


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


def sweep(
    model: nn.Module,
    tokenizer: Tokenizer,
    train: Data,
    valid: Data | None = None,
    *,
    members: Sequence[Member],
    config: TrainConfig | None = None,
    targets: str | Sequence[str] = "all-linear",
) -> Sweep:
    """Trains one adapter a member beside each other on `model`, which has none yet, and leaves them on it, by name.

    `config` gives all that members share; its lr and seed are theirs instead.  With `config.out`, each adapter is
    written to out/<name>/adapter, and the table to out/sweep.json.  A member whose loss diverges or is not finite is
    left out from then on and says so; the others go on.

    Raises ValueError where members are none or twice the same, the model has adapters already or is not frozen, or
    `config` asks for what a sweep has not.
    """
    config = config or TrainConfig()
    refuse_encoder(model, "lora.sweep")
    names = [m.name for m in members]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"members={names}: at least one, and no two alike")
    if any(True for _ in adapted(model)):
        raise ValueError("a sweep puts its own adapters on a model, and this one has some already; load it anew")
    asked = [key for key in _FIXED if getattr(config, key) != getattr(TrainConfig(), key)]
    if asked:
        raise ValueError(f"{asked[0]}={getattr(config, asked[0])} is not for a sweep; train that one alone")
    out = Path(config.out) if config.out else None
    if out:
        refuse_filled(out)
    examples = prepare(train, model, tokenizer, config).units
    held_out = prepare(valid, model, tokenizer, config, held_out=True).examples if valid is not None else []
    steps = config.max_steps or max(
        1, math.ceil(config.epochs * steps_per_epoch(len(examples), config.batch, config.accumulate))
    )
    optimizers = _optimizers(model, members, config, targets)
    keep_pages()
    begin = time.perf_counter()
    results = _train(model, examples, members, optimizers, steps, config)
    for x in results:
        if held_out and not x.failed:
            activate(model, x.member.name)
            nll, count, _ = row_nll(model, held_out, config.batch)
            x.eval_loss = float(nll.sum()) / int(count.sum())
    took = time.perf_counter() - begin
    score = {x.member.name: x.eval_loss if held_out else x.losses[-1] if x.losses else None for x in results}
    results.sort(key=lambda x: (bool(x.failed), score[x.member.name] or 0.0))
    if out:
        for x in results:
            if not x.failed:
                save(model, out / x.member.name / "adapter", name=x.member.name)
        out.mkdir(parents=True, exist_ok=True)
        rows = [asdict(x) for x in results]
        write_curves(out / "sweep.png", {x.member.name: x.losses for x in results})
        write_text(out / "sweep.json", json.dumps({"seconds": took, "config": asdict(config), "members": rows}) + "\n")
    return Sweep(tuple(results), took)


def _optimizers(
    model: nn.Module, members: Sequence[Member], config: TrainConfig, targets: str | Sequence[str]
) -> list[AdamW]:
    """Puts the adapters on the model, each begun as alone with its seed, and gives each its optimizer."""
    where = targets if isinstance(targets, str) else tuple(targets)
    for m in members:
        torch.manual_seed(m.seed)
        wrap(model, name=m.name, config=LoRAConfig(r=m.r, alpha=m.alpha, targets=where))
    layers = [layer for _, layer in adapted(model)]
    if not all(isinstance(layer, LoRALinear) for layer in layers):
        raise ValueError("a sweep trains adapters of linear layers only; leave embeddings out of targets")
    made = []
    for m in members:
        own = [p for layer in layers for p in layer.adapters[m.name].parameters()]
        for p in own:
            p.requires_grad_(True)
        made.append(
            AdamW(
                own,
                betas=(config.beta1, config.beta2),
                eps=config.eps,
                weight_decay=config.weight_decay,
                bits=config.optim_bits,
            )
        )
    return made


def _train(
    model: nn.Module,
    examples: Sequence[Any],
    members: Sequence[Member],
    optimizers: Sequence[AdamW],
    steps: int,
    config: TrainConfig,
) -> list[Result]:
    results = [Result(m, []) for m in members]
    watches = [Divergence(model.config.vocab_size) for _ in members]  # type: ignore[union-attr,arg-type]
    orders = [endless(examples, config.batch, config.accumulate, m.seed) for m in members]
    layers = [layer for _, layer in adapted(model)]
    device = optimizers[0].w.device
    model.train()
    try:
        with recomputed(model, config.recompute):
            for step in range(steps):
                groups = [next(order)[1] for order in orders]
                live = [k for k, x in enumerate(results) if not x.failed]
                if not live:
                    break
                counts = {k: sum(collate(part).target.numel() for part in groups[k]) for k in live}
                losses = dict.fromkeys(live, 0.0)
                for parts in zip(*(groups[k] for k in live), strict=True):
                    ends = list(itertools.accumulate(len(part) for part in parts))
                    for layer in layers:
                        adapters = [layer.adapters[members[k].name] for k in live]
                        layer.by_row = ByRow(list(zip(adapters, [0, *ends[:-1]], ends, strict=True)))
                    b = collate([e for part in parts for e in part]).to(device)
                    nll, _ = token_nll(model, b)
                    member = torch.bucketize(b.owner, torch.tensor(ends, device=device), right=True)
                    # a sum for each member: one that is not finite must not reach the others
                    sums = [nll[member == i].sum() / counts[k] for i, k in enumerate(live)]
                    torch.autograd.backward(sums)
                    for k, value in zip(live, sums, strict=True):
                        losses[k] += value.item()
                for k in live:
                    _step(optimizers[k], results[k], watches[k], losses[k], step, steps, config)
    finally:
        for layer in layers:
            layer.by_row = None
    return results


def _step(
    optimizer: AdamW, x: Result, watch: Divergence, loss: float, step: int, steps: int, config: TrainConfig
) -> None:
    """One member's step; marks it as failed instead where its numbers are no good."""
    optimizer.gather()
    norm = optimizer.clip(config.clip).item()
    lr = learning_rate(step, steps, x.member.lr, config.warmup, config.schedule, config.decay)
    x.losses.append(loss)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        x.failed = f"not finite at step {step + 1}"
        return
    try:
        watch.see(step + 1, loss, lr)
    except RuntimeError:
        x.failed = f"diverged at step {step + 1}"
        return
    optimizer.step(lr)
    optimizer.zero_grad()
