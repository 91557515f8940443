"""fit: one loop for LoRA, QLoRA and full fine-tuning; what trains is what requires a gradient.

What a step is: steps.py.  What is kept of a run: checkpoint.py, certificate.py.
"""

import contextlib
import dataclasses
import json
import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from lora.eval.compare import compare
from lora.eval.evaluate import evaluate
from lora.eval.report import write_report
from lora.files import refuse_filled, write_text
from lora.kernels.fp8 import refusal
from lora.kernels.scratch import keep_pages
from lora.layer import adapted, updates
from lora.models.base import Model, refuse_encoder
from lora.models.budget import parse_bytes
from lora.models.llama import Llama
from lora.models.save import save_pretrained
from lora.models.tokenizer import Tokenizer
from lora.rows import Data, Row
from lora.save import save
from lora.train.advice import default_lr, warnings_for
from lora.train.batches import steps_per_epoch
from lora.train.certificate import (
    base_digest,
    data_digest,
    environment,
    read_certificate,
    weights_digest,
    write_certificate,
)
from lora.train.checkpoint import clean, ending, find_checkpoint, load_checkpoint, read_checkpoint
from lora.train.config import TrainConfig
from lora.train.data import prepare as prepare_rows
from lora.train.guard import Interrupted, Stopped
from lora.train.log import Log, peak_bytes
from lora.train.optim import AdamW
from lora.train.plot import write_plot
from lora.train.sinks import Sink
from lora.train.steps import Steps
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
    *,
    resume: str | Path | None = None,
    sinks: Sequence[Sink] = (),
    notes: Mapping[str, Any] | None = None,
) -> Run:
    """Trains what requires a gradient, in place; under `config.out` writes log.jsonl, config.yaml, run.json,
    checkpoints/, report.html, and adapter/, or model/ after full fine-tuning.

    `train` and `valid` are a file of rows or a list of them (`lora.rows`, `lora.sources`).  Everything that can be
    checked is checked before the first step and before a file is written.

    `resume` is the directory of a run that ended early, or one of its checkpoints: it goes on to the same bits as if it
    had never stopped, with the same model, rows and settings (its own where `config` is None); a run that wrote no
    checkpoint yet begins again.  `sinks` get each entry of the log (`lora.train.sinks`); `notes` are kept in
    config.yaml and run.json: the path of the model, say.

    Raises TypeError for an encoder; ValueError when nothing is trainable, a row cannot be used, the data is empty,
    `config.compute` cannot be had, or `resume` is a checkpoint of another run; FileExistsError when `config.out` holds
    another run; RuntimeError on a merged model, when a loss or gradient is not finite, or when the loss diverges;
    OSError when a file cannot be written; a KeyboardInterrupt that names the checkpoint on Ctrl-C and SIGTERM.
    """
    config, notes, point = _settle(config, notes, resume)
    if config.out and resume is None:
        refuse_filled(Path(config.out))
    steps = prepare(model, tokenizer, train, valid, config)
    config, out = steps.config, steps.out
    if point:
        steps.progress = load_checkpoint(point, steps.optimizer, steps.identity)
        clean(point.parent)
    if out:
        _start(out, steps, notes, point)
    between = min(config.eval_every or steps.steps, steps.steps)
    for sentence in warnings_for(model, steps.examples, config.batch * config.accumulate, steps.held_out, between):
        warnings.warn(sentence, stacklevel=2)
    p = steps.progress
    log_path = out / "log.jsonl" if out else None
    with Log(log_path, steps.steps, config.progress, sinks, p.log_bytes, steps.device) as log:
        steps.run(log)
        last = weights_digest(steps.optimizer.w) if out else ""
        log.write(_totals(steps))
        _best_again(steps)
    with ending(out):
        adapter = _keep(steps, tokenizer)
        if out:
            with contextlib.suppress(Stopped), steps.signals, steps.signals.at_once():
                _report(out, model, tokenizer, steps.held_rows if adapter else [], log.history, config)
            write_plot(out / "loss.png", log.history)
            ended = {"steps": p.step, "tokens": p.tokens, "best_step": p.best_step if config.best else None}
            write_certificate(out, finished=True, **ended, probe=steps.probed, weights_after=last)
    if steps.signals.got is not None:
        raise Interrupted(steps.signals.got, p.step, None, f"the run had ended and {out} is whole but for report.html")
    return Run(tuple(log.history), p.step, p.seconds, p.tokens, peak_bytes(steps.device), adapter)


def prepare(model: nn.Module, tokenizer: Tokenizer, train: Data, valid: Data | None, config: TrainConfig) -> Steps:
    """A run ready for its first step: everything is checked, nothing is written."""
    refuse_encoder(model, "lora.fit")
    if is_merged(model):
        raise RuntimeError("this model is merged, so its adapters would not train; call lora.unmerge(model) first")
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(
            "nothing to train: no parameter requires a gradient; call lora.wrap(model) for an adapter, "
            "lora.attach(..., trainable=True) to go on with one, or model.requires_grad_(True) for full fine-tuning"
        )
    examples = prepare_rows(train, model, tokenizer, config).units
    held = prepare_rows(valid, model, tokenizer, config, held_out=True) if valid is not None else None
    held_out = held.examples if held else []
    whole = held.whole_rows() if held else []
    for key in ("patience", "best", "eval_generate"):
        if getattr(config, key) and not held_out:
            raise ValueError(f"{key}={getattr(config, key)} goes by validation rows, and there are none; give valid")
    if config.lr is None:
        config = config.replace(lr=default_lr(model))
    per_epoch = steps_per_epoch(len(examples), config.batch, config.accumulate)
    steps = config.max_steps or max(1, math.ceil(config.epochs * per_epoch))
    fast = {id(a.b) for _, _, a in updates(model)}
    if config.lora_plus != 1.0 and not any(id(p) in fast for p in trainable):
        raise ValueError(f"lora_plus={config.lora_plus} is the learning rate of adapters' B, and no adapter trains")
    names = [[n, list(p.shape), str(p.dtype)] for n, p in model.named_parameters() if p.requires_grad]
    adapters = [[n, name, a.scale, a.dropout] for n, name, a in updates(model)]
    identity = {
        "config": dataclasses.asdict(config),
        "steps": steps,
        "data": data_digest(examples),
        "valid": data_digest(held_out) if held_out else None,
        "base": base_digest(model),
        "parameters": names + adapters,
    }
    keep_within(model, config)
    torch.manual_seed(config.seed)
    keep_pages()  # a step frees and allocates the same hundreds of MB again and again
    optimizer = AdamW(
        trainable,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        bits=config.optim_bits,
        ratio=lambda p: config.lora_plus if id(p) in fast else 1.0,
    )
    out = Path(config.out) if config.out else None
    name = _trained_name(model) if adapter_names(model) else None
    keep = (lambda folder: save(model, folder, name=name)) if name else None
    return Steps(
        model, tokenizer, examples, held_out, whole, steps, per_epoch, optimizer, config, identity, out, keep
    )  # fmt: skip


def keep_within(model: nn.Module, config: TrainConfig) -> None:
    """Tells a model's blocks what they may hold and what their products run in.

    Raises ValueError where that cannot be had.
    """
    device = next(model.parameters()).device
    if config.budget and not isinstance(model, Llama):
        raise ValueError(
            f"budget={config.budget!r} is kept by the Llama family's blocks, and this is {type(model).__name__}"
        )
    if config.budget and device.type != "cuda":
        raise ValueError(f"budget={config.budget!r} is what tensors may take on a GPU, and the model is on {device}")
    if isinstance(model, Llama):
        model.keeping.budget = parse_bytes(config.budget) if config.budget else None
        model.keeping.forget()  # what an earlier run's budget and adapter chose
    _choose_compute(model, config.compute)


def _choose_compute(model: nn.Module, compute: str) -> None:
    if isinstance(model, Llama):
        device, dtype = model.place()[0], model.place()[1]
        why = f"the model is on {device}, not a GPU" if device.type != "cuda" else refusal(device, dtype)
        if compute == "fp8" and why:
            raise ValueError(f"compute='fp8' was asked for, and {why}; take compute='bf16'")
        model.keeping.compute, model.keeping.said = compute, ""
    elif compute == "fp8":
        raise ValueError(f"compute='fp8' runs in the Llama family's blocks, and this is {type(model).__name__}")


def _settle(
    config: TrainConfig | None, notes: Mapping[str, Any] | None, resume: str | Path | None
) -> tuple[TrainConfig, dict[str, Any], Path | None]:
    """Settings and notes, a resumed run's own where none are given, and the checkpoint to go on from."""
    if resume is None:
        return config or TrainConfig(), dict(notes or {}), None
    resume = Path(resume)
    point = find_checkpoint(resume)
    out = point.parent.parent if point else resume
    written = read_certificate(out) or {}
    if written.get("finished"):
        raise ValueError(
            f"{out} is a run that finished all its {written['steps']} steps; there is nothing to go on with"
        )
    if point is None:
        warnings.warn(f"{out} holds no checkpoint yet, so the run begins again at step 1", stacklevel=3)
    saved = read_checkpoint(point)["identity"]["config"] if point else written.get("config", {})
    if config is None:
        config = TrainConfig(**saved)
    elif config.out is not None and Path(config.out).resolve() != out.resolve():
        raise ValueError(f"resume={resume} goes on in {out}, and out={config.out!r} is another; leave out away")
    return config.replace(out=str(out)), dict(notes or written.get("notes") or {}), point


def _start(out: Path, steps: Steps, notes: Mapping[str, Any], point: Path | None) -> None:
    """The run directory as it stands before the first step."""
    settings = dataclasses.asdict(steps.config)
    device = environment(steps.device)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if point:
            again = [*(read_certificate(out) or {}).get("resumed", []), {"from": point.name, "environment": device}]
            write_certificate(out, resumed=again)
            return
        write_text(out / "config.yaml", _yaml({k: v for k, v in {**notes, **settings}.items() if k != "out"}))
        weights = weights_digest(steps.optimizer.w)
        known = {key: steps.identity[key] for key in ("data", "valid", "base")}
        counts = {"rows": len(steps.examples), "planned_steps": steps.steps}
        write_certificate(
            out, finished=False, config=settings, notes=dict(notes), environment=device, digests=known, **counts,
            weights_before=weights,
        )  # fmt: skip
    except OSError as e:
        raise OSError(f"{out} cannot be written, so nothing was trained: {e.strerror or e}") from e


def _totals(steps: Steps) -> dict[str, Any]:
    p = steps.progress
    rows = p.step / steps.per_epoch * len(steps.examples)
    return {
        "train_runtime": round(p.wall, 3),
        "train_samples_per_second": round(min(rows, 1e12) / p.wall, 3),
        "train_steps_per_second": round(p.step / p.wall, 3),
        "train_loss": p.loss_sum / p.step,
        "epoch": round(p.step / steps.per_epoch, 4),
        "step": p.step,
    }


def _best_again(steps: Steps) -> None:
    """Puts back the weights of the lowest eval_loss, where that is asked for."""
    best = steps.progress.best_step
    if not steps.config.best or best is None or best == steps.progress.step or steps.folder is None:
        return
    w = load_file(steps.folder / f"step-{best:08d}" / "state.safetensors")["w"]
    steps.optimizer.load_state_dict(steps.optimizer.state_dict() | {"w": w})


def _keep(steps: Steps, tokenizer: Tokenizer) -> Path | None:
    """Writes what the run was for: adapter/, or model/. A run that goes on may find its own from before a kill."""
    out, model = steps.out, steps.model
    if not out:
        return None
    for folder in (out / "adapter", out / "model"):
        if folder.exists():
            shutil.rmtree(folder)
    if steps.save_adapter:
        return steps.save_adapter(out / "adapter")
    if isinstance(model, Model):
        dtype = next(p.dtype for p in model.parameters() if p.requires_grad)
        save_pretrained(model, tokenizer, out / "model", dtype=dtype)
    return None


def _report(
    out: Path,
    model: nn.Module,
    tokenizer: Tokenizer,
    valid: Sequence[Row],
    history: Sequence[dict[str, Any]],
    config: TrainConfig,
) -> None:
    """report.html: the loss curve, and on validation rows the base against the tuned."""
    comparison = None
    if valid:
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
