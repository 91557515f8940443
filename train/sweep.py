"""Several adapters trained at once on one frozen base: each has its own learning rate, rank, alpha, seed and rows.

The rows of all members stand in one batch, so the base is decoded and multiplied once for all of them; an adapter acts
on its own rows alone (`lora.layer.ByRow`), and has its own loss, clipping, schedule and optimizer.  On a GPU the
products of all adapters of a layer are one (`stack.py`), and the batch is a CUDA graph.  Rows do not see
each other, so each member learns what it would have learned alone, up to rounding.
Prior art: mLoRA, arXiv:2312.02515; the memory of K solo runs becomes one base and K small states.
"""

import contextlib
import itertools
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora.batch import Batch, Example, Pack, to_device
from lora.config import LoRAConfig
from lora.eval.nll import row_nll
from lora.files import refuse_filled
from lora.kernels.scratch import keep_pages
from lora.layer import LoRALinear, adapted
from lora.models.base import refuse_encoder
from lora.models.bits import same_bits
from lora.models.decoded import cleared
from lora.models.llama import FUSED, Llama
from lora.models.tokenizer import Tokenizer
from lora.render import collate
from lora.rows import Data
from lora.train.batches import endless, longest, steps_per_epoch
from lora.train.config import TrainConfig
from lora.train.data import prepare
from lora.train.graph import Graphs, Learned, member_losses
from lora.train.guard import Divergence, Interrupted, Signals, Stopped
from lora.train.log import Log
from lora.train.loop import keep_within
from lora.train.loss import recomputed
from lora.train.members import Member, Result, Sweep, begin_folder, keep
from lora.train.optim import AdamW
from lora.train.schedule import learning_rate
from lora.train.stack import Stack
from lora.wrap import activate, wrap

Groups = Sequence[Sequence[Sequence[Example | Pack]]]  # of each member, the batches of a step
_FIXED = (
    "pack", "neftune", "label_smoothing", "best", "patience", "eval_generate", "eval_every", "save_every", "keep_last",
    "lora_plus", "compute",
)  # fmt: skip  # a sweep has none of them


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
    written to out/<name>/adapter, the losses of each step to out/log.jsonl, and the table to out/sweep.json.  A member
    whose loss diverges or is not finite is left out from then on and says so; the others go on.

    Raises ValueError where members are none or twice the same, the model has adapters already or is not frozen, or
    `config` asks for what a sweep has not; RuntimeError where the longest batch does not fit in memory; OSError where
    `config.out` cannot be written; a KeyboardInterrupt on Ctrl-C and SIGTERM, after the adapters were written as they
    stood.
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
    keep_within(model, config)
    stack, optimizers = _optimizers(model, members, config, targets)
    if out:
        begin_folder(out, config)
    keep_pages()
    begin = time.perf_counter()
    signals, device = Signals(), optimizers[0].w.device
    with signals, same_bits(config.deterministic):
        with Log(out / "log.jsonl" if out else None, steps, config.progress, device=device) as log:
            results = _train(model, examples, members, stack, optimizers, steps, config, signals, log)
        with contextlib.suppress(Stopped), signals.at_once():
            for x in results:
                if held_out and not x.failed:
                    activate(model, x.member.name)
                    nll, count, _ = row_nll(model, held_out, config.batch)
                    x.eval_loss = float(nll.sum()) / int(count.sum())
        took = time.perf_counter() - begin
        by_eval = held_out and all(x.failed or x.eval_loss is not None for x in results)
        score = {x.member.name: x.eval_loss if by_eval else x.losses[-1] if x.losses else None for x in results}
        results.sort(key=lambda x: (bool(x.failed), score[x.member.name] or 0.0))
        if out:
            keep(model, out, results, took, config, finished=signals.got is None)
    if signals.got is not None:
        left = f"the adapters lie under {out} as they stood; a sweep begins anew" if out else "nothing was written"
        raise Interrupted(signals.got, max(len(x.losses) for x in results), None, left)
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
    stack = Stack(layers, [m.name for m in members], joined=config.optim_bits == 32)
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
    signals: Signals,
    log: Log,
) -> list[Result]:
    results = [Result(m, []) for m in members]
    watches = [Divergence(model.config.vocab_size) for _ in members]  # type: ignore[union-attr,arg-type]
    orders = [endless(examples, config.batch, config.accumulate, m.seed) for m in members]
    device = optimizers[0].w.device
    graphs = Graphs(model, lambda: [stack.grad])
    fused = model.place()[1] if device.type in FUSED and isinstance(model, Llama) else None  # blocks want them rounded
    coming: tuple[list[int], Groups, list[_Laid]] | None = None  # laid out while the GPU computed
    tokens = 0
    model.train()
    try:
        with recomputed(model, config.recompute), cleared(model), warnings.catch_warnings():
            # that a stack's factors lie apart is meant: each adapter's are one run of memory
            warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
            if fused:
                stack.round(fused)
            if config.probe:
                _probe(graphs, stack, examples, len(members), config.batch)
            for step in range(steps):
                live = [k for k, x in enumerate(results) if not x.failed]
                if not live or signals.got is not None:
                    break
                start = time.perf_counter()
                groups = coming[1] if coming else [next(order)[1] for order in orders]
                laid = coming[2] if coming and coming[0] == live else _lay(groups, live, device)
                losses = torch.zeros(len(members), device=device)
                for batch in laid:
                    losses += _run(graphs, stack, batch, len(members))
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
                if fused:
                    stack.round(fused)
                done = sum(batch.n_tokens for batch in laid)
                tokens += done
                if (step + 1) % config.log_every == 0 or step + 1 == steps:
                    log.write(_entry(results, step, steps, config, tokens, done / (time.perf_counter() - start)))
    finally:
        stack.release()
    return results


def _probe(graphs: Graphs, stack: Stack, examples: Sequence[Any], members: int, batch: int) -> None:
    """Runs the longest batch of all members and changes nothing: what does not fit in memory fails now."""
    rows = longest(examples, batch)
    try:
        [laid] = _lay([[rows]] * members, range(members), stack.w.device)
        _run(graphs, stack, laid, members)
    except torch.OutOfMemoryError as e:
        raise RuntimeError(
            f"the longest batch, {members} times {len(rows)} rows of up to {len(rows[0].ids)} tokens, does not "
            f"fit in memory: {str(e).splitlines()[0]}; take fewer adapters at once, a smaller batch with more "
            "accumulate, recompute=True, or shorter rows"
        ) from None
    finally:
        stack.grad.zero_()


def _entry(
    results: Sequence[Result], step: int, steps: int, config: TrainConfig, tokens: int, speed: float
) -> dict[str, Any]:
    """A line of the log: the members' losses, null behind the end of one, and their mean."""
    losses = [x.losses[step] if len(x.losses) > step and not x.failed else None for x in results]
    there = [loss for loss in losses if loss is not None]
    mean = {"loss": sum(there) / len(there)} if there else {}
    return {
        **mean,
        "losses": losses,
        "learning_rate": max(
            learning_rate(step, steps, x.member.lr, config.warmup, config.schedule, config.decay) for x in results
        ),
        "num_tokens": tokens,
        "step": step + 1,
        "tokens_per_second": round(speed, 1),
    }


class _Laid(NamedTuple):
    """The rows of one batch of all members, where they are wanted: whose they are, up to which row each one's go; of
    whom each learned token is and what it counts in the loss, (n,); `alike` where all members have as many rows."""

    batch: Batch
    who: list[int]
    ends: list[int]
    member: Tensor
    share: Tensor
    alike: bool
    n_tokens: int


def _lay(groups: Groups, live: Sequence[int], device: torch.device) -> list[_Laid]:
    """The batches of one step, on their way to the device.

    On a GPU, rows of those that failed run on and count nothing: the batch keeps its shape, and so its graph.
    """
    counts = [sum(sum(e.learned[1:]) for part in group for e in part) for group in groups]
    weight = torch.tensor([1 / count if k in live else 0.0 for k, count in enumerate(counts)])
    found = []
    for parts in zip(*groups, strict=True):
        alike = len({len(part) for part in parts}) == 1
        who = list(range(len(parts))) if alike and device.type in FUSED else list(live)
        ends = list(itertools.accumulate(len(parts[k]) for k in who))
        b = collate([e for k in who for e in parts[k]])
        member = torch.tensor(who)[torch.bucketize(b.owner, torch.tensor(ends), right=True)]
        share, member = to_device(weight[member], device), to_device(member, device)
        found.append(_Laid(b.to(device), who, ends, member, share, alike, b.n_tokens))
    return found


def _run(graphs: Graphs, stack: Stack, laid: _Laid, members: int) -> Tensor:
    """Adds the gradients of one batch; returns the shares of the loss of every member (members,)."""
    stack.place(laid.who, laid.ends, together=laid.alike and len(laid.who) == members)
    if laid.alike:
        return graphs.run_members(laid.batch, laid.share, laid.member, members)[0]
    learned = Learned(laid.batch.at, laid.batch.target, laid.share, laid.member)
    return member_losses(graphs.model, laid.batch, learned, members)[0]


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
