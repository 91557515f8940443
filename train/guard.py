"""What stops a run before it does harm: numbers that are not finite, a loss that runs away, a signal, a full card."""

import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lora.eval.nll import token_nll
from lora.render import Batch

STRIKES = 3  # steps in a row above the limit that make a divergence


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended the run, after it was saved. `code` is what a command exits with: 130 or 143.

    `left` says what there is instead of a checkpoint.
    """

    def __init__(self, number: int, step: int, saved: Path | None, left: str = "nothing was written") -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        where = f"saved as {saved}; go on with --resume {saved.parent.parent}" if saved else left
        super().__init__(f"{name} after step {step}: {where}")
        self.code, self.step, self.saved = 128 + number, step, saved


class Stopped(KeyboardInterrupt):
    """A signal came within `Signals.at_once`."""


class Signals:
    """Within the block, the first Ctrl-C or SIGTERM only sets `got`; the second one acts as ever.

    Outside the main thread, where Python delivers no signal, it does nothing.
    """

    def __init__(self) -> None:
        self.got: int | None = None
        self._hurry = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.got = number
        self._restore()
        if self._hurry:
            raise Stopped

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """For what changes nothing and may take minutes: a signal in it, or before it, raises Stopped."""
        self._hurry = True
        try:
            if self.got is not None:
                raise Stopped
            yield
        finally:
            self._hurry = False

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)


class Divergence:
    """Watches for a loss that is no better than guessing, ln V.

    The limit is 0.99 ln V for a run that began below 0.9 ln V: a wild learning rate can flatten a model's output, and
    its loss then stands at ln V.  A run that began near or above a guess has 1.2 ln V, or 1.5 x its first loss; for it
    only ln V to five digits counts, which no model gives that still tells one token from another.

    One step on hard rows may be; STRIKES in a row, or all but the first of a shorter run, is a run that went astray.
    """

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.limit = math.inf
        self.strikes = 0

    def see(self, step: int, loss: float, lr: float) -> None:
        """Raises RuntimeError at the last strike."""
        if self.limit == math.inf:
            guess = math.log(self.vocabulary)
            self.limit = 0.99 * guess if loss < 0.9 * guess else max(1.2 * guess, 1.5 * loss)
        flat = math.isclose(loss, math.log(self.vocabulary), rel_tol=1e-5)
        self.strikes = self.strikes + 1 if loss > self.limit or flat else 0
        if self.strikes >= STRIKES:
            raise RuntimeError(self.sentence(step, loss, lr))

    def end(self, step: int, loss: float, lr: float, first: Callable[[], float]) -> None:
        """Raises RuntimeError where the run was too short for as many strikes, and had no good step but its first.

        `first` measures the rows of the first step once more: where they are still better than a guess, those of the
        others were hard.
        """
        if step > 1 and self.strikes == step - 1 and not first() <= self.limit:
            raise RuntimeError(self.sentence(step, loss, lr))

    def sentence(self, step: int, loss: float, lr: float) -> str:
        return (
            f"step {step}: loss {loss:.4g} is no better than a guess among {self.vocabulary:,} tokens "
            f"({math.log(self.vocabulary):.4g}) for {self.strikes} steps in a row: the run diverged at learning rate "
            f"{lr:.3g}; nothing was saved from it; take a lower lr"
        )


def not_finite(model: nn.Module, batches: Sequence[Batch], step: int, loss: float, norm: float) -> str:
    """The sentence on a loss or gradient that is NaN or infinite: the step, the rows, the module it began in."""
    rows = [row for b in batches for row in b.rows]
    if math.isfinite(loss):
        bad = [n for n, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
        # it came from the loss, so the last in the model is where it came in
        where = f"first in the gradient of {bad[-1]}" if bad else "in the sum of finite gradients"
    else:
        rows, module = _source(model, batches, rows)
        where = f"first in the output of {module}" if module else "in no module's output when run again"
    return (
        f"step {step}: loss {loss}, gradient norm {norm}; not finite, on rows {rows}, {where}; the step was not taken "
        "and nothing was saved from it"
    )


@torch.no_grad()
def _source(model: nn.Module, batches: Sequence[Batch], rows: list[int]) -> tuple[list[int], str | None]:
    """The rows whose loss is not finite, and the first module, in the order of running, that gave such a value."""
    first: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            y = output[0] if isinstance(output, tuple) else output
            if not first and isinstance(y, Tensor) and y.is_floating_point() and not torch.isfinite(y).all():
                first.append(name)

        return hook

    handles = [m.register_forward_hook(look(name)) for name, m in model.named_modules() if name]
    bad: list[int] = []
    try:
        for b in batches:
            nll, _ = token_nll(model, b)
            owners = b.owner[~torch.isfinite(nll)].unique().tolist()
            bad += [b.rows[i] for i in owners]
    finally:
        for handle in handles:
            handle.remove()
    return bad or rows, first[0] if first else None


class LossScale:
    """float16's small gradients multiplied out of reach of zero: doubled after 2000 steps, halved where they overflow.

    Source: arXiv:1710.03740, section 3.2; numbers as torch.amp.GradScaler's.
    """

    def __init__(self, on: bool) -> None:
        self.on, self.value, self.good = on, 2.0**16 if on else 1.0, 0

    def overflowed(self) -> None:
        """Raises RuntimeError where the scale is spent, so that the overflow is the model's own."""
        self.value, self.good = self.value / 2, 0
        if self.value < 1:
            raise RuntimeError(
                "float16 gradients overflow even unscaled; load the model in bfloat16 or float32 instead"
            )

    def went_well(self) -> None:
        self.good += 1
        if self.on and self.good == 2000:
            self.value, self.good = min(self.value * 2, 2.0**24), 0
