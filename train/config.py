"""TrainConfig: how long, how fast, how much at once."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from lora.lengths import OVERLONG
from lora.models.budget import parse_bytes
from lora.render import LEARN
from lora.train.schedule import SCHEDULES


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one run.

    The default learning rate is ten times as high for an adapter as for full fine-tuning (`lora.train.advice`), as
    LoRA wants (Schulman et al., LoRA Without Regret, 2025); batches stay small for the same reason.

    Attributes:
        epochs: passes over the data; max_steps, where given, wins
        max_steps: optimizer steps in all; None counts them from epochs
        batch: rows that run together
        accumulate: batches to one optimizer step
        lr: highest learning rate; None takes one by method and model width (`lora.train.advice.default_lr`)
        warmup: share of the steps over which the learning rate rises
        weight_decay: AdamW's decoupled decay
        beta1: AdamW's decay of the mean gradient
        beta2: AdamW's decay of the mean squared gradient
        eps: AdamW's guard against division by zero
        optim_bits: bits of each of AdamW's two moments, 32 or 8; 8 keep 2 bytes a parameter instead of 8
        schedule: the learning rate after its rise: cosine or linear to 0, constant, or wsd (constant, then to 0)
        decay: share of the steps over which wsd falls at the end
        lora_plus: B's learning rate over A's; 16 is what LoRA+ advises, 1 treats them alike
        neftune: noise on the embeddings while training, alpha / sqrt(tokens * width); 0 adds none, 5 is usual
        label_smoothing: share of the target spread evenly over the vocabulary; evaluation does not smooth
        recompute: keep only the input of each block and run it again in the backward pass: less memory, more time
        probe: run the longest batch before the first step, so that running out of memory happens at once
        save_every: steps between checkpoints, the first before step 1; 0 saves only when interrupted; needs `out`
        keep_last: how many checkpoints stay, the newest; the best stays too
        best: keep a checkpoint of the lowest eval_loss, and end with its weights instead of the last
        patience: end after so many evaluations without a lower eval_loss; 0 never does
        eval_generate: validation rows that are answered at each evaluation, for eval_exact_match and samples.jsonl
        clip: largest joint norm of the gradients; 0 leaves them as they are
        max_length: longest row in tokens; None takes the model's own limit
        eval_every: steps between evaluations on the validation rows; 0 evaluates at the end only
        log_every: steps between lines of the log
        seed: of the order of the rows and of dropout
        out: run directory; None writes nothing
        budget: what tensors may take on a GPU in all, 24GiB say: blocks that do not fit are kept on the host; None is
            what is free
        compute: what the frozen base's products run in: bf16, that is the dtype of the states; or fp8, for Hopper GPUs
            and newer: faster, and each product errs by some 3 % (README says what that does to the loss)
        deterministic: the same bits from every run on a GPU too, by flash attention instead of cuDNN's, whose backward
            adds up in no fixed order: a few per cent slower; on a CPU all runs are so
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
    lr: float | None = None
    warmup: float = 0.03
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    optim_bits: int = 32
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    decay: float = 0.2
    lora_plus: float = 1.0
    neftune: float = 0.0
    label_smoothing: float = 0.0
    recompute: bool = False
    probe: bool = True
    save_every: int = 500
    keep_last: int = 2
    best: bool = False
    patience: int = 0
    eval_generate: int = 0
    clip: float = 1.0
    max_length: int | None = None
    eval_every: int = 0
    log_every: int = 1
    seed: int = 42
    out: str | None = None
    progress: bool = True
    budget: str | None = None
    compute: Literal["bf16", "fp8"] = "bf16"
    deterministic: bool = False
    # data
    pack: bool = False
    overlong: str = "error"
    learn: str = "assistant"
    columns: dict[str, str] | None = None

    def __post_init__(self) -> None:
        counts = (("batch", 1), ("accumulate", 1), ("log_every", 1), ("eval_every", 0), ("seed", 0), ("save_every", 0))
        for key, low in (*counts, ("keep_last", 1), ("patience", 0), ("eval_generate", 0)):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{key}={value!r}: a whole number, at least {low}")
        for key in ("max_steps", "max_length"):
            value = getattr(self, key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{key}={value!r}: a whole number, at least 1, or None")
        if self.optim_bits not in (32, 8):
            raise ValueError(f"optim_bits={self.optim_bits!r}: 32 or 8")
        if self.budget is not None:
            try:
                parse_bytes(self.budget)
            except ValueError as e:
                raise ValueError(f"budget={self.budget!r}: {e}") from None
        if self.compute not in ("bf16", "fp8"):
            raise ValueError(f"compute={self.compute!r}: 'bf16' or 'fp8'")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r}: one of {', '.join(SCHEDULES)}")
        for key in ("epochs", "lr", "eps", "lora_plus"):
            value = getattr(self, key)
            if key == "lr" and value is None:
                continue
            if not _is_finite(value) or value <= 0:
                raise ValueError(f"{key}={value!r}: a finite number above 0")
        for key in ("warmup", "beta1", "beta2", "label_smoothing"):
            value = getattr(self, key)
            if not _is_finite(value) or not 0 <= value < 1:
                raise ValueError(f"{key}={value!r}: from 0 up to, not including, 1")
        if not _is_finite(self.decay) or not 0 < self.decay <= 1:
            raise ValueError(f"decay={self.decay!r}: a share above 0, at most 1")
        for key in ("weight_decay", "clip", "neftune"):
            value = getattr(self, key)
            if not _is_finite(value) or value < 0:
                raise ValueError(f"{key}={value!r}: a finite number, at least 0")
        for key, known in (("overlong", OVERLONG), ("learn", LEARN)):
            if getattr(self, key) not in known:
                raise ValueError(f"{key}={getattr(self, key)!r}: one of {', '.join(known)}")
        if self.pack and self.max_length is None:
            raise ValueError("pack=True needs max_length, the tokens of a packed row")
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(f"warmup={self.warmup} and decay={self.decay} take more than all of the steps")
        for key in ("best", "patience"):
            if getattr(self, key) and not self.eval_every:
                raise ValueError(f"{key}={getattr(self, key)} compares evaluations; say how often with eval_every")
        if self.best and not self.out:
            raise ValueError("best=True keeps a checkpoint, and out=None writes nothing; give a run directory")

    def replace(self, **changes: Any) -> "TrainConfig":
        return dataclasses.replace(self, **changes)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
