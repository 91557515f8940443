"""fit: one loop for LoRA, QLoRA and full fine-tuning; what trains is what requires a gradient.

loss of a step = Σ NLL / number of learned tokens, over all its batches: the same whatever the batch size.
"""

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora.eval.compare import compare
from lora.eval.evaluate import evaluate
from lora.eval.nll import row_nll, token_nll
from lora.eval.report import write_report
from lora.files import refuse_filled, write_text
from lora.kernels.scratch import keep_pages
from lora.layer import adapted
from lora.models.base import Model, refuse_encoder
from lora.models.save import save_pretrained
from lora.models.tokenizer import Tokenizer
from lora.render import Example, collate, length_limit, render
from lora.rows import Data, read_rows
from lora.store import save
from lora.train.batches import endless, steps_per_epoch
from lora.train.config import TrainConfig
from lora.train.log import Log, peak_bytes
from lora.train.optim import AdamW
from lora.train.schedule import learning_rate
from lora.wrap import adapter_names, disabled, is_merged


@dataclass(frozen=True)
class Run:
    """What came of a run: its log, totals, and where the adapter lies (None without `out`)."""

    history: tuple[dict[str, Any], ...]
    steps: int
    seconds: float
    tokens: int
    peak_bytes: int
    adapter: Path | None

    @property
    def tokens_per_second(self) -> float:
        """Tokens that are not padding, learned or not, over the time of the steps alone."""
        return self.tokens / self.seconds


def fit(
    model: nn.Module,
    tokenizer: Tokenizer,
    train: Data,
    valid: Data | None = None,
    config: TrainConfig | None = None,
) -> Run:
    """Trains what requires a gradient, in place; under `config.out` writes log.jsonl, config.yaml, report.html, and
    adapter/, or model/ after full fine-tuning.

    `train` and `valid` are a .jsonl file or a list of rows (`lora.rows`).  Everything that can be checked is checked
    before the first step and before a file is written.

    Raises TypeError for an encoder; ValueError when nothing is trainable, a row cannot be used, or the data is empty;
    FileExistsError when `config.out` holds another run; RuntimeError on a merged model, or when a loss or gradient is
    not finite.
    """
    config = config or TrainConfig()
    refuse_encoder(model, "lora.fit")
    if is_merged(model):
        raise RuntimeError("this model is merged, so its adapters would not train; call lora.unmerge(model) first")
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(
            "nothing to train: no parameter requires a gradient; call lora.wrap(model) for an adapter, "
            "lora.attach(..., trainable=True) to go on with one, or model.requires_grad_(True) for full fine-tuning"
        )
    limit = length_limit(model, config.max_length)
    examples = render(read_rows(train), tokenizer, limit)
    held_out = render(read_rows(valid), tokenizer, limit) if valid is not None else []
    per_epoch = steps_per_epoch(len(examples), config.batch, config.accumulate)
    steps = config.max_steps or max(1, math.ceil(config.epochs * per_epoch))
    out = Path(config.out) if config.out else None
    if out:
        refuse_filled(out)
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "config.yaml", _yaml(dataclasses.asdict(config)))
    torch.manual_seed(config.seed)
    keep_pages()  # a step frees and allocates the same hundreds of MB again and again
    optimizer = AdamW(
        trainable,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        bits=config.optim_bits,
    )
    with Log(out / "log.jsonl" if out else None, steps, config.progress) as log:
        seconds, tokens = _steps(model, examples, held_out, steps, per_epoch, optimizer, config, log)
    adapter = None
    if out and adapter_names(model):
        adapter = save(model, out / "adapter", name=_trained_name(model))
    elif out and isinstance(model, Model):
        save_pretrained(model, tokenizer, out / "model", dtype=trainable[0].dtype)
    if out:
        _report(out, model, tokenizer, valid if held_out and adapter else None, log.history, config)
    device = trainable[0].device
    return Run(tuple(log.history), steps, seconds, tokens, peak_bytes(device), adapter)


def _steps(
    model: nn.Module,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    steps: int,
    per_epoch: int,
    optimizer: AdamW,
    config: TrainConfig,
    log: Log,
) -> tuple[float, int]:
    """Runs the optimizer steps; returns their seconds and the tokens they saw."""
    device = optimizer.w.device
    pad = 0  # never looked at: attention is causal and padding stands on the right
    seen, busy, losses = 0, 0.0, 0.0
    start = time.perf_counter()
    batches = endless(examples, config.batch, config.accumulate, config.seed)
    model.train()
    for step, (_, group) in enumerate(itertools.islice(batches, steps)):
        begin = time.perf_counter()
        micro = [collate(part, pad).to(device) for part in group]
        n = sum(b.target.numel() for b in micro)
        loss, hits = 0.0, 0
        for b in micro:
            nll, hit = token_nll(model, b)
            (nll.sum() / n).backward()
            loss += nll.detach().sum().item() / n
            hits += int(hit.sum())
        optimizer.gather()
        norm = optimizer.clip(config.clip).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            rows = [row for b in micro for row in b.rows]
            raise RuntimeError(f"step {step + 1}: loss {loss}, gradient norm {norm}; not finite, on rows {rows}")
        lr = learning_rate(step, steps, config.lr, config.warmup)
        optimizer.step(lr)
        optimizer.zero_grad()
        tokens = sum(b.n_tokens for b in micro)
        took = time.perf_counter() - begin
        seen, busy, losses = seen + tokens, busy + took, losses + loss
        epoch = round((step + 1) / per_epoch, 4)
        if (step + 1) % config.log_every == 0 or step + 1 == steps:
            log.write(
                {
                    "loss": loss,
                    "grad_norm": norm,
                    "learning_rate": lr,
                    "mean_token_accuracy": hits / n,
                    "num_tokens": seen,
                    "epoch": epoch,
                    "step": step + 1,
                    "tokens_per_second": round(tokens / took, 1),
                }
            )
        due = config.eval_every and (step + 1) % config.eval_every == 0
        if held_out and (due or step + 1 == steps):
            log.write(_evaluate(model, held_out, config.batch) | {"epoch": epoch, "step": step + 1})
    total = time.perf_counter() - start
    log.write(
        {
            "train_runtime": round(total, 3),
            "train_samples_per_second": round(min(steps / per_epoch * len(examples), 1e12) / total, 3),
            "train_steps_per_second": round(steps / total, 3),
            "train_loss": losses / steps,
            "epoch": round(steps / per_epoch, 4),
            "step": steps,
        }
    )
    return busy, seen


def _evaluate(model: nn.Module, examples: Sequence[Example], batch: int) -> dict[str, float]:
    start = time.perf_counter()
    nll, count, hits = row_nll(model, examples, batch)
    took, n = time.perf_counter() - start, int(count.sum())
    return {
        "eval_loss": float(nll.sum()) / n,
        "eval_mean_token_accuracy": int(hits.sum()) / n,
        "eval_num_tokens": n,
        "eval_runtime": round(took, 3),
        "eval_samples_per_second": round(len(examples) / took, 3),
        "eval_steps_per_second": round(-(-len(examples) // batch) / took, 3),
    }


def _report(
    out: Path,
    model: nn.Module,
    tokenizer: Tokenizer,
    valid: Data | None,
    history: Sequence[dict[str, Any]],
    config: TrainConfig,
) -> None:
    """report.html: the loss curve, and on validation rows the base against the tuned."""
    comparison = None
    if valid is not None:
        metrics = ("nll", "perplexity")
        with disabled(model):
            base = evaluate(model, tokenizer, valid, metrics, batch=config.batch)
        comparison = compare(base, evaluate(model, tokenizer, valid, metrics, batch=config.batch))
    settings = dataclasses.asdict(config)
    write_report(out / "report.html", f"Run {out.name}", history, comparison=comparison, settings=settings)


def _trained_name(model: nn.Module) -> str:
    """The adapter that just trained: the one whose parameters require a gradient."""
    for _, layer in adapted(model):
        for name in layer.active:
            if name in layer.adapters and any(p.requires_grad for p in layer.adapters[name].parameters()):
                return name
    return adapter_names(model)[0]


def _yaml(settings: dict[str, Any]) -> str:
    """A flat mapping as YAML: JSON values are YAML values."""
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items())
