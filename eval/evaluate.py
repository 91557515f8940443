"""evaluate: a model on rows, by what it thinks likely and by what it answers."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lora.eval.nll import row_nll
from lora.eval.numbers import absolute_error, is_hit, read_number, squared_log_error
from lora.files import write_text
from lora.models.generate import generate
from lora.models.tokenizer import Tokenizer
from lora.render import length_limit, render
from lora.rows import Data, prompt_of, read_rows, reference_of

LIKELIHOOD = ("nll", "perplexity")
ANSWERS = ("exact_match", "mae", "rmsle", "hits")
METRICS = LIKELIHOOD + ANSWERS
LOWER_IS_BETTER = ("nll", "perplexity", "mae", "rmsle")


@dataclass(frozen=True)
class Result:
    """One row: what was asked, wanted and answered, and how likely the wanted answer was."""

    prompt: str
    reference: str
    answer: str | None
    nll: float | None
    tokens: int | None
    guess: float | None
    truth: float | None


@dataclass(frozen=True)
class Report:
    """Metrics over all rows, and the rows. `print` it for a table."""

    metrics: dict[str, float]
    rows: tuple[Result, ...]
    unread: int
    seconds: float

    def __str__(self) -> str:
        lines = [f"{name:12s} {value:10.4f}" for name, value in self.metrics.items()]
        if self.unread:
            lines.append(f"{self.unread} of {len(self.rows)} answers held no number and count as 0")
        return "\n".join([f"{len(self.rows)} rows, {self.seconds:.1f} s", *lines])

    def save(self, path: str | Path) -> None:
        """Writes metrics and rows as JSON."""
        write_text(Path(path), json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")


def evaluate(
    model: nn.Module,
    tokenizer: Tokenizer,
    data: Data,
    metrics: Sequence[str] = ("perplexity", "exact_match"),
    *,
    max_new_tokens: int = 64,
    batch: int = 16,
) -> Report:
    """Measures `model` on rows (a .jsonl file or a list).

    Metrics: "nll" and "perplexity" of the completions given their prompts, pooled over tokens; "exact_match" of the
    greedy answer with the completion, white space at the ends aside; for numbers "mae", "rmsle" and "hits"
    (`lora.eval.numbers`).

    Raises ValueError for an unknown metric, or a number asked of rows whose completion holds none.
    """
    unknown = [m for m in metrics if m not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"metrics={list(metrics)}: {unknown or 'none'} is not known; choose from {', '.join(METRICS)}")
    rows = read_rows(data)
    references = [reference_of(row) for row in rows]
    numeric = [m for m in metrics if m in ("mae", "rmsle", "hits")]
    truths = [read_number(r) for r in references] if numeric else [None] * len(rows)
    if numeric and None in truths:
        i = truths.index(None)
        raise ValueError(f"row {i}: {numeric[0]!r} needs a number in the completion, which is {references[i]!r}")
    start = time.perf_counter()
    nll = count = answers = None
    if any(m in LIKELIHOOD for m in metrics):
        total, tokens, _ = row_nll(model, render(rows, tokenizer, length_limit(model)), batch)
        nll, count = total.tolist(), tokens.tolist()
    if any(m in ANSWERS for m in metrics):
        prompts = [prompt_of(row) for row in rows]
        answers = generate(model, tokenizer, prompts, max_new_tokens, batch=2 * batch)
    guesses = [read_number(a) for a in answers] if answers and numeric else [None] * len(rows)
    results = tuple(
        Result(
            prompt=p if isinstance(p, str) else json.dumps(p, ensure_ascii=False),
            reference=references[i],
            answer=answers[i] if answers else None,
            nll=nll[i] if nll else None,
            tokens=count[i] if count else None,
            guess=guesses[i],
            truth=truths[i],
        )
        for i, p in enumerate(map(prompt_of, rows))
    )
    values = {m: aggregate(m, [statistic(m, r) for r in results]) for m in metrics}
    unread = sum(g is None for g in guesses) if numeric else 0
    return Report(values, results, unread, time.perf_counter() - start)


def statistic(metric: str, r: Result) -> tuple[float, float]:
    """What one row adds to a metric: (numerator, denominator), summed over rows and divided in `aggregate`."""
    if metric in LIKELIHOOD:
        assert r.nll is not None and r.tokens is not None
        return r.nll, float(r.tokens)
    if metric == "exact_match":
        return float((r.answer or "").strip() == r.reference.strip()), 1.0
    assert r.truth is not None
    guess = 0.0 if r.guess is None else r.guess
    value: Any = {"mae": absolute_error, "rmsle": squared_log_error, "hits": is_hit}[metric](guess, r.truth)
    return float(value), 1.0


def finish(metric: str, mean: Any, exp: Any = math.exp, sqrt: Any = math.sqrt) -> Any:
    """The metric from its mean statistic: exp for perplexity, the root for RMSLE."""
    return exp(mean) if metric == "perplexity" else sqrt(mean) if metric == "rmsle" else mean


def aggregate(metric: str, parts: Sequence[tuple[float, float]]) -> float:
    return finish(metric, sum(n for n, _ in parts) / sum(d for _, d in parts))
