"""The steps of a run, one after the other, with all that may happen between two of them.

loss of a step = Σ NLL / number of learned tokens, over all its batches: the same whatever the batch size.
"""

import itertools
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora.batch import Pack
from lora.eval.evaluate import Result, evaluate
from lora.eval.nll import row_nll, token_nll
from lora.files import write_text
from lora.models.bits import same_bits
from lora.models.decoded import cleared
from lora.models.llama import Llama
from lora.models.tokenizer import Tokenizer
from lora.render import Batch, Example, collate
from lora.rows import Row
from lora.train.batches import endless, longest
from lora.train.checkpoint import Progress, checkpoints, prune, random_states, save_checkpoint, set_random_states
from lora.train.config import TrainConfig
from lora.train.graph import Graphs
from lora.train.guard import Divergence, Interrupted, LossScale, Signals, Stopped, not_finite
from lora.train.log import Log, peak_bytes
from lora.train.loss import noise, recomputed, token_loss
from lora.train.optim import AdamW
from lora.train.schedule import learning_rate

PAD = 0  # never looked at: attention is causal and padding stands on the right


class Ahead:
    """Batches of optimizer steps, collated one step before they are taken."""

    def __init__(self, groups: Iterator[Sequence[Sequence[Example | Pack]]]) -> None:
        self.groups = groups
        self.ready: list[Batch] | None = None

    def look(self) -> None:
        """Makes the next step's batches, where there is one."""
        group = next(self.groups, None)
        self.ready = None if group is None else [collate(part, PAD) for part in group]

    def take(self) -> list[Batch] | None:
        """The next step's batches, None behind the last."""
        if self.ready is None:
            self.look()
        ready, self.ready = self.ready, None
        return ready


@dataclass
class Steps:
    """A run under way. `run` takes its steps from `progress.step` on."""

    model: nn.Module
    tokenizer: Tokenizer
    examples: Sequence[Example | Pack]
    held_out: Sequence[Example]
    held_rows: Sequence[Row]  # validation rows that were not cut; the first of them are answered in text
    steps: int
    per_epoch: int
    optimizer: AdamW
    config: TrainConfig  # lr resolved
    identity: Mapping[str, Any]
    out: Path | None = None
    save_adapter: Any = None  # writes peft's files into a folder, where an adapter trains
    progress: Progress = field(default_factory=Progress)
    probed: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.device = self.optimizer.w.device
        dtypes = [p.dtype for n, p in self.model.named_parameters() if p.is_floating_point() and ".adapters." not in n]
        self.scale = LossScale(torch.float16 in dtypes)
        config: Any = self.model.config
        if not hasattr(config, "vocab_size"):
            config = config.get_text_config()  # transformers' models of more than text
        self.divergence = Divergence(config.vocab_size)
        self.signals = Signals()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.graphs = Graphs(self.model, lambda: [p.grad for p in trained])

    @property
    def folder(self) -> Path | None:
        return self.out / "checkpoints" if self.out else None

    def run(self, log: Log, until: int | None = None, write: bool = True) -> None:
        """Steps up to the end, or up to step `until`; without `write` neither evaluates nor saves.

        Raises RuntimeError on a loss or gradient that is not finite, a divergence, or a longest batch that does not fit
        in memory; Interrupted on Ctrl-C and SIGTERM, after saving.
        """
        self._take_up()
        last, config = until or self.steps, self.config
        begin, before = time.perf_counter(), self.progress.wall
        entry: dict[str, Any] | None = None
        self.model.train()
        with (
            self.signals,
            same_bits(config.deterministic),
            recomputed(self.model, config.recompute),
            cleared(self.model),
        ):
            if config.probe:
                self.probe()
            if write and config.save_every and not self.progress.step:
                self.checkpoint(log)
            if write and self.progress.owed:
                self.after(log, self.progress.step == last)
                if self.signals.got is not None:
                    raise self._leave(log, write)
            groups = endless(self.examples, config.batch, config.accumulate, config.seed)
            coming = Ahead(group for _, group in itertools.islice(groups, self.progress.step, last))
            while (collated := coming.take()) is not None:
                if write and config.patience and self.progress.stale >= config.patience:
                    break
                first = entry is None
                entry = self.take(collated, coming.look)
                if first and isinstance(self.model, Llama) and self.model.keeping.said:
                    log.say(self.model.keeping.said)
                self.progress.wall = before + time.perf_counter() - begin
                if entry is None:
                    raise self._leave(log, write)
                self.divergence.see(entry["step"], entry["loss"], entry["learning_rate"])
                if entry["step"] % config.log_every == 0 or entry["step"] == last:
                    log.write(entry)
                if write:
                    self.after(log, entry["step"] == last)
                if self.signals.got is not None:
                    raise self._leave(log, write)
        if entry:
            self.divergence.end(entry["step"], entry["loss"], entry["learning_rate"], self._first_again)

    def _take_up(self) -> None:
        """Takes what a checkpoint knows into the watchers."""
        p = self.progress
        self.divergence.limit, self.divergence.strikes = p.limit, p.strikes
        if p.step:
            self.scale.value, self.scale.good = p.scale, p.good

    @torch.no_grad()
    def _first_again(self) -> float:
        """The loss that the rows of the first step have now."""
        _, group = next(endless(self.examples, self.config.batch, self.config.accumulate, self.config.seed))
        self.model.eval()
        parts = [token_nll(self.model, collate(part, PAD).to(self.device))[0].double() for part in group]
        self.model.train()
        return torch.cat(parts).mean().item()

    def _leave(self, log: Log, write: bool) -> Interrupted:
        """Saves where the run stands; returns what to raise."""
        saved, left = self.checkpoint(log) if write else None, "nothing was written"
        older = checkpoints(self.folder) if self.folder and not saved else []
        if older:
            left = f"its loss was no better than a guess, and {older[-1]} stays; go on with --resume {self.out}"
        return Interrupted(self.signals.got or signal.SIGINT, self.progress.step, saved, left)

    # ---- one step ----
    def step(self, group: Sequence[Sequence[Example | Pack]]) -> dict[str, Any] | None:
        """One optimizer step on these batches. See `take`."""
        return self.take([collate(part, PAD) for part in group])

    def take(self, collated: Sequence[Batch], meanwhile: Callable[[], None] = lambda: None) -> dict[str, Any] | None:
        """One optimizer step; returns its line of the log, or None where a signal broke it off and nothing changed.

        `meanwhile` is called while the device computes: the host has nothing else to do then.
        """
        begin, config, optimizer, p = time.perf_counter(), self.config, self.optimizer, self.progress
        before = random_states(self.device)
        tokens, n = (sum(count) for count in zip(*((b.n_tokens, b.target.numel()) for b in collated), strict=True))
        micro = [b.to(self.device) for b in collated]
        losses, hits = torch.zeros((), device=self.device), torch.zeros((), dtype=torch.int64, device=self.device)
        for b in micro:
            if self.signals.got is not None and b is not micro[0]:
                optimizer.zero_grad()
                set_random_states(before, self.device)
                return None
            part, hit = self._backward(b, n)
            losses, hits = losses + part, hits + hit
        optimizer.gather()
        if self.scale.on:
            optimizer.grad.mul_(1 / self.scale.value)
        numbers = torch.stack((losses, optimizer.clip(config.clip).to(losses), hits.to(losses)))
        meanwhile()
        # the step's only wait for the device: whether it may be taken depends on these numbers
        loss, norm, hits_seen = numbers.tolist()
        lr = learning_rate(p.step, self.steps, config.lr or 0.0, config.warmup, config.schedule, config.decay)
        if math.isfinite(loss) and not math.isfinite(norm) and self.scale.on:
            self.scale.overflowed()  # the step is left out, as float16 asks for now and then
            p.skipped += 1
        elif not (math.isfinite(loss) and math.isfinite(norm)):
            raise RuntimeError(not_finite(self.model, micro, p.step + 1, loss, norm))
        else:
            optimizer.step(lr)
            self.scale.went_well()
        optimizer.zero_grad()
        took = time.perf_counter() - begin
        p.step, p.tokens = p.step + 1, p.tokens + tokens
        p.seconds, p.loss_sum = p.seconds + took, p.loss_sum + loss
        entry = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": lr,
            "mean_token_accuracy": hits_seen / n,
            "num_tokens": p.tokens,
            "epoch": round(p.step / self.per_epoch, 4),
            "step": p.step,
            "tokens_per_second": round(tokens / took, 1),
        }
        return entry | ({"loss_scale": self.scale.value, "skipped": p.skipped} if self.scale.on else {})

    def _backward(self, b: Batch, n: int, record: bool = True) -> tuple[Tensor, Tensor]:
        """Adds the gradient of one batch of a step of `n` learned tokens; its share of the loss and its hits, ()."""
        plain = not (self.config.neftune or self.config.label_smoothing or self.scale.on)
        if plain and record:
            return self.graphs.run(b, n)
        with noise(self.model, self.config.neftune, b.real):
            nll, hit = token_loss(self.model, b, self.config.label_smoothing)
        (nll.sum() / n * self.scale.value).backward()
        return nll.detach().sum() / n, hit.sum()

    def probe(self) -> None:
        """Runs the longest batch forward and backward and changes nothing: what does not fit fails now.

        Raises RuntimeError where memory runs out.
        """
        rows = longest(self.examples, self.config.batch)
        before, begin = random_states(self.device), time.perf_counter()
        size = f"{len(rows)} rows of up to {len(rows[0].ids)} tokens"
        try:
            b = collate(rows, PAD).to(self.device)
            self._backward(b, b.target.numel(), record=False)
        except torch.OutOfMemoryError as e:
            raise RuntimeError(
                f"the longest batch, {size}, does not fit in memory: {str(e).splitlines()[0]}; "
                "take a smaller batch with more accumulate, recompute=True, or shorter rows"
            ) from None
        finally:
            self.optimizer.gather()
            self.optimizer.zero_grad()
            set_random_states(before, self.device)
        took = round(time.perf_counter() - begin, 3)
        self.probed = {"batch": size, "seconds": took, "peak_bytes": peak_bytes(self.device)}

    # ---- between two steps ----
    def after(self, log: Log, last: bool) -> None:
        """What is due after the step just taken: evaluation, then a checkpoint."""
        config, p = self.config, self.progress
        best = False
        due = config.eval_every and p.step % config.eval_every == 0
        if self.held_out and (due or last):
            p.owed = True
            try:
                with self.signals.at_once():
                    found, answers = self.evaluate()
            except Stopped:
                return
            p.owed = False
            self._keep_answers(answers)
            log.write(found | {"epoch": round(p.step / self.per_epoch, 4), "step": p.step})
            best = p.best_loss is None or found["eval_loss"] < p.best_loss
            if best:
                p.best_loss, p.best_step, p.stale = found["eval_loss"], p.step, 0
            else:
                p.stale += 1
        if (config.best and best) or (config.save_every and p.step % config.save_every == 0 and not last):
            self.checkpoint(log)

    def checkpoint(self, log: Log) -> Path | None:
        """Writes one, unless the loss says that the weights are no good; then prunes the old ones."""
        p, folder = self.progress, self.folder
        if folder is None or self.divergence.strikes:
            return None
        p.limit, p.strikes = self.divergence.limit, self.divergence.strikes
        p.scale, p.good, p.log_bytes = self.scale.value, self.scale.good, log.flush()
        saved = save_checkpoint(folder, self.optimizer, p, self.identity, self.save_adapter)
        prune(folder, self.config.keep_last, p.best_step if self.config.best else None)
        return saved

    def evaluate(self) -> tuple[dict[str, Any], Sequence[Result]]:
        """Loss on the validation rows and exact matches of the answers to the first of them; and these answers."""
        start, batch = time.perf_counter(), self.config.batch
        nll, count, hits = row_nll(self.model, self.held_out, batch)
        took, n = time.perf_counter() - start, int(count.sum())
        found: dict[str, Any] = {
            "eval_loss": float(nll.sum()) / n,
            "eval_mean_token_accuracy": int(hits.sum()) / n,
            "eval_num_tokens": n,
            "eval_runtime": round(took, 3),
            "eval_samples_per_second": round(len(self.held_out) / took, 3),
            "eval_steps_per_second": round(-(-len(self.held_out) // batch) / took, 3),
        }
        asked = self.held_rows[: self.config.eval_generate]
        if not asked:
            return found, ()
        self.model.eval()
        try:
            report = evaluate(self.model, self.tokenizer, list(asked), ("exact_match",), batch=batch)
        finally:
            self.model.train()
        return found | {"eval_exact_match": report.metrics["exact_match"]}, report.rows

    def _keep_answers(self, results: Sequence[Result]) -> None:
        """samples.jsonl: what the model answered, step by step."""
        if not self.out or not results:
            return
        path = self.out / "samples.jsonl"
        old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        # a run that goes on answers again what it had answered after its checkpoint
        lines = [line for line in old if json.loads(line)["step"] < self.progress.step]
        for r in results:
            answer = {"step": self.progress.step, "prompt": r.prompt, "reference": r.reference, "answer": r.answer}
            lines.append(json.dumps(answer, ensure_ascii=False))
        write_text(path, "".join(line + "\n" for line in lines))
