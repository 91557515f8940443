"""TrainConfig: how long, how fast, how much at once."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from lora.lengths import OVERLONG
from lora.render import LEARN


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one run.

    The default learning rate is ten times what full fine-tuning would take, as LoRA wants (Schulman et al., LoRA
    Without Regret, 2025); batches stay small for the same reason.

    Attributes:
        epochs: passes over the data; max_steps, where given, wins
        max_steps: optimizer steps in all; None counts them from epochs
        batch: rows that run together
        accumulate: batches to one optimizer step
        lr: highest learning rate
        warmup: share of the steps over which the learning rate rises; then a cosine takes it to 0
        weight_decay: AdamW's decoupled decay
        beta1: AdamW's decay of the mean gradient
        beta2: AdamW's decay of the mean squared gradient
        eps: AdamW's guard against division by zero
        optim_bits: bits of each of AdamW's two moments, 32 or 8; 8 keep 2 bytes a parameter instead of 8
        clip: largest joint norm of the gradients; 0 leaves them as they are
        max_length: longest row in tokens; None takes the model's own limit
        eval_every: steps between evaluations on the validation rows; 0 evaluates at the end only
        log_every: steps between lines of the log
        seed: of the order of the rows and of dropout
        out: run directory; None writes nothing
        progress: show a progress bar, or a line a log entry where there is no terminal
        pack: put several texts into each row of max_length tokens, without their seeing each other; `batch` then
            counts such rows
        overlong: what becomes of rows longer than max_length: error, drop, cut_prompt_left, cut_right or split
        learn: "assistant" learns every answer, "last" a chat's last one, "all" every token
        columns: what the data calls the parts of a row, as {"prompt": "question", "completion": "answer"}
    """

    epochs: float = 1.0
    max_steps: int | None = None
    batch: int = 8
    accumulate: int = 1
    lr: float = 2e-4
    warmup: float = 0.03
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    optim_bits: int = 32
    clip: float = 1.0
    max_length: int | None = None
    eval_every: int = 0
    log_every: int = 1
    seed: int = 42
    out: str | None = None
    progress: bool = True
    # data
    pack: bool = False
    overlong: str = "error"
    learn: str = "assistant"
    columns: dict[str, str] | None = None

    def __post_init__(self) -> None:
        for key, low in (("batch", 1), ("accumulate", 1), ("log_every", 1), ("eval_every", 0), ("seed", 0)):
            value = getattr(self, key)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"{key}={value!r}: a whole number, at least {low}")
        for key in ("max_steps", "max_length"):
            value = getattr(self, key)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{key}={value!r}: a whole number, at least 1, or None")
        if self.optim_bits not in (32, 8):
            raise ValueError(f"optim_bits={self.optim_bits!r}: 32 or 8")
        for key in ("epochs", "lr", "eps"):
            value = getattr(self, key)
            if not math.isfinite(value) or value <= 0:
                raise ValueError(f"{key}={value!r}: a finite number above 0")
        for key in ("warmup", "beta1", "beta2"):
            value = getattr(self, key)
            if not 0 <= value < 1:
                raise ValueError(f"{key}={value!r}: from 0 up to, not including, 1")
        for key in ("weight_decay", "clip"):
            value = getattr(self, key)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{key}={value!r}: a finite number, at least 0")
        for key, known in (("overlong", OVERLONG), ("learn", LEARN)):
            if getattr(self, key) not in known:
                raise ValueError(f"{key}={getattr(self, key)!r}: one of {', '.join(known)}")
        if self.pack and self.max_length is None:
            raise ValueError("pack=True needs max_length, the tokens of a packed row")

    def replace(self, **changes: Any) -> "TrainConfig":
        return dataclasses.replace(self, **changes)
