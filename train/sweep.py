"""Several adapters trained at once on one frozen base: each has its own learning rate, rank, alpha, seed and rows.

The rows of all members stand in one batch, so the base is decoded and multiplied once for all of them; an adapter acts
on its own rows alone (`lora.layer.ByRow`), and has its own loss, clipping, schedule and optimizer.  On a GPU the
products of all adapters of a layer are one (`stack.py`), and the batch is a CUDA graph.  Rows do not see
each other, so each member learns what it would have learned alone, up to rounding.
Prior art: mLoRA, arXiv:2312.02515; the memory of K solo runs becomes one base and K small states.
"""

import itertools
import json
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora.batch import Batch, Example, Pack
from lora.config import LoRAConfig
from lora.eval.nll import row_nll
from lora.files import refuse_filled, write_text
from lora.kernels.scratch import keep_pages
from lora.layer import LoRALinear, adapted
from lora.models.base import refuse_encoder
from lora.models.llama import FUSED
from lora.models.tokenizer import Tokenizer
from lora.render import collate
from lora.rows import Data
from lora.save import save
from lora.train.batches import endless, steps_per_epoch
from lora.train.config import TrainConfig
from lora.train.data import prepare
from lora.train.graph import Graphs, Learned, member_losses
from lora.train.guard import Divergence
from lora.train.loss import recomputed
from lora.train.optim import AdamW
from lora.train.plot import write_curves
from lora.train.schedule import learning_rate
from lora.train.stack import Stack
from lora.wrap import activate, wrap

Groups = Sequence[Sequence[Sequence[Example | Pack]]]  # of each member, the batches of a step
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
    stack, optimizers = _optimizers(model, members, config, targets)
    keep_pages()
    begin = time.perf_counter()
    results = _train(model, examples, members, stack, optimizers, steps, config)
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
) -> tuple[Stack, list[AdamW]]:
    """Puts the adapters on the model, each begun as alone with its seed, and gives each its optimizer."""
    where = targets if isinstance(targets, str) else tuple(targets)
    for m in members:
        torch.manual_seed(m.seed)
        wrap(model, name=m.name, config=LoRAConfig(r=m.r, alpha=m.alpha, targets=where))
    layers = [layer for _, layer in adapted(model)]
    if not all(isinstance(layer, LoRALinear) for layer in layers):
        raise ValueError("a sweep trains adapters of linear layers only; leave embeddings out of targets")
    for layer in layers:
        layer.adapters.requires_grad_(True)
    stack = Stack(layers, [m.name for m in members])
    made = [
        AdamW(
            stack.members[i],
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            bits=config.optim_bits,
            buffers=stack.buffers(i),
        )
        for i in range(len(members))
    ]
    return stack, made


def _train(
    model: nn.Module,
    examples: Sequence[Any],
    members: Sequence[Member],
    stack: Stack,
    optimizers: Sequence[AdamW],
    steps: int,
    config: TrainConfig,
) -> list[Result]:
    results = [Result(m, []) for m in members]
    watches = [Divergence(model.config.vocab_size) for _ in members]  # type: ignore[union-attr,arg-type]
    orders = [endless(examples, config.batch, config.accumulate, m.seed) for m in members]
    graphs, device = Graphs(model), optimizers[0].w.device
    coming: tuple[list[int], Groups, list[_Laid]] | None = None  # laid out while the GPU computed
    model.train()
    try:
        with recomputed(model, config.recompute), warnings.catch_warnings():
            # that a stack's factors lie apart is meant: each adapter's are one run of memory
            warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
            for step in range(steps):
                live = [k for k, x in enumerate(results) if not x.failed]
                if not live:
                    break
                groups = coming[1] if coming else [next(order)[1] for order in orders]
                laid = coming[2] if coming and coming[0] == live else _lay(groups, live, device)
                counts = [sum(sum(e.learned[1:]) for part in group for e in part) for group in groups]
                losses = torch.zeros(len(members), device=device)
                for batch in laid:
                    losses += _run(graphs, stack, batch, live, counts)
                for k in live:
                    optimizers[k].gather()
                norms = torch.stack([optimizers[k].clip(config.clip) for k in live])
                if step + 1 < steps:
                    groups = [next(order)[1] for order in orders]
                    coming = live, groups, _lay(groups, live, device)
                numbers = torch.stack((losses[live], norms)).T.tolist()  # the step's only wait for the device
                for k, (loss, norm) in zip(live, numbers, strict=True):
                    _step(optimizers[k], results[k], watches[k], loss, norm, step, steps, config)
                stack.grad.zero_()
    finally:
        stack.release()
    return results


class _Laid(NamedTuple):
    """The rows of one batch of all members: whose they are, up to which row each one's go, and of whom each learned
    token is (n,); `alike` where all members have as many rows."""

    batch: Batch
    who: list[int]
    ends: list[int]
    member: Tensor
    alike: bool


def _lay(groups: Groups, live: Sequence[int], device: torch.device) -> list[_Laid]:
    """The batches of one step, on the host.

    On a GPU, rows of those that failed run on and count nothing: the batch keeps its shape, and so its graph.
    """
    found = []
    for parts in zip(*groups, strict=True):
        alike = len({len(part) for part in parts}) == 1
        who = list(range(len(parts))) if alike and device.type in FUSED else list(live)
        ends = list(itertools.accumulate(len(parts[k]) for k in who))
        b = collate([e for k in who for e in parts[k]])
        place = torch.bucketize(b.owner, torch.tensor(ends), right=True)
        found.append(_Laid(b, who, ends, torch.tensor(who)[place], alike))
    return found


def _run(graphs: Graphs, stack: Stack, laid: _Laid, live: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Adds the gradients of one batch; returns the shares of the loss of every member (members,)."""
    device, n = stack.w.device, len(counts)
    stack.place(laid.who, laid.ends, together=laid.alike and len(laid.who) == n)
    share = torch.tensor([1 / count if k in live else 0.0 for k, count in enumerate(counts)])[laid.member]
    b, share, member = laid.batch.to(device), share.to(device), laid.member.to(device)
    if laid.alike:
        return graphs.run_members(b, share, member, n)[0]
    return member_losses(graphs.model, b, Learned(b.at, b.target, share, member), n)[0]


def _step(
    optimizer: AdamW, x: Result, watch: Divergence, loss: float, norm: float, step: int, steps: int, config: TrainConfig
) -> None:
    """One member's step; marks it as failed instead where its numbers are no good."""
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
