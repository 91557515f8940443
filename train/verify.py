"""verify: takes the last steps of a finished run again, from its checkpoint, and compares bits."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lora.models.tokenizer import Tokenizer
from lora.rows import Data
from lora.train.certificate import differences, environment, read_certificate, weights_digest
from lora.train.checkpoint import checkpoints, load_checkpoint
from lora.train.config import TrainConfig
from lora.train.log import Log
from lora.train.loop import prepare

# Said of a difference on a GPU
ORDER = (
    "; on a GPU cuDNN's attention adds up a gradient in no fixed order: a run with deterministic=True takes flash "
    "attention, which does it in one"
)
_COMPARED = ("loss", "grad_norm", "learning_rate", "mean_token_accuracy", "num_tokens", "epoch")


@dataclass(frozen=True)
class Verdict:
    """Whether steps first..last came out with the same bits. `print` it for the sentence."""

    equal: bool
    sentence: str
    first: int
    last: int

    def __str__(self) -> str:
        return self.sentence


def verify(
    run: str | Path,
    model: nn.Module,
    tokenizer: Tokenizer,
    train: Data,
    valid: Data | None = None,
    *,
    steps: int | None = None,
) -> Verdict:
    """Repeats a run from a checkpoint to its end: each logged step must have the same numbers, and the weights at the
    end the digest that run.json names.

    `model` is made as it was for the run; its adapter may hold any values.  `steps` is how many to repeat at least;
    None takes the newest checkpoint before the end.  The run directory is only read.

    Raises FileNotFoundError where `run` holds no certificate or no checkpoint before its end; ValueError where it did
    not finish, or model, data or settings are not the run's.
    """
    folder = Path(run)
    certificate = read_certificate(folder)
    if certificate is None:
        raise FileNotFoundError(f"{folder} holds no run.json, so there is nothing to verify")
    if not certificate.get("finished"):
        raise ValueError(f"{folder} is a run that has not finished; go on with it first (--resume)")
    end = certificate["steps"]
    points = {int(p.name.removeprefix("step-")): p for p in checkpoints(folder / "checkpoints")}
    before = [k for k in points if k < end]
    if not before:
        raise FileNotFoundError(f"{folder} holds no checkpoint before its last step, {end}; save_every keeps some")
    start = max((k for k in before if end - k >= (steps or 1)), default=min(before))
    config = TrainConfig(**certificate["config"]).replace(out=str(folder), probe=False, progress=False, log_every=1)
    again = prepare(model, tokenizer, train, valid, config)
    again.progress = load_checkpoint(points[start], again.optimizer, again.identity)
    again.out = None  # from here on nothing is written
    with Log(None, end, False) as log:
        again.run(log, until=end, write=False)
    said = _first_difference(folder, log, start)
    if said is None and weights_digest(again.optimizer.w) != certificate["weights_after"]:
        said = f"every number of the log is the same, but the weights after step {end} are not"
    if said is None:
        return Verdict(True, f"steps {start + 1} to {end} repeated with the same bits", start + 1, end)
    changed = differences(certificate["environment"], environment(again.device))
    return Verdict(
        False, f"steps {start + 1} to {end} differ: {said}{_why(changed, again.device, config)}", start + 1, end
    )


def _why(changed: list[str], device: torch.device, config: TrainConfig) -> str:
    why = f"; since the run {'; '.join(changed)}" if changed else "; the environment is the same"
    return why + ORDER * (device.type == "cuda" and not config.deterministic)


def _first_difference(folder: Path, log: Log, start: int) -> str | None:
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    written = {h["step"]: h for h in map(json.loads, lines) if "loss" in h and h["step"] > start}
    for entry in log.history:
        old = written.get(entry["step"], {})
        for key in _COMPARED:
            if key in old and old[key] != entry[key]:
                return f"{key} of step {entry['step']} was {old[key]!r} and is {entry[key]!r}"
    return None
