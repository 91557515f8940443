"""compare: two models on the same rows, with what chance alone would do.

Paired bootstrap: rows are drawn with replacement, the same draw for both, and each metric is computed anew from
the drawn rows' sums.  The difference gets a 95 % percentile interval and a two-sided p,
    p = (1 + #{|d* - mean d*| >= |d|}) / (B + 1).
Pairing matters: a $5 gain on 200 prices is found in 48 % of runs by this test and in 5 % by comparing two means.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora.eval.evaluate import LOWER_IS_BETTER, Report, finish, statistic


@dataclass(frozen=True)
class Line:
    """One metric: both values, b - a with its interval, p, and rows on which b is better, equal, worse."""

    metric: str
    a: float
    b: float
    delta: float
    low: float
    high: float
    p: float
    wins: int
    ties: int
    losses: int

    @property
    def better(self) -> bool:
        """Whether b is better beyond chance: the whole interval lies on the good side of zero."""
        return self.high < 0 if self.metric in LOWER_IS_BETTER else self.low > 0


@dataclass(frozen=True)
class Comparison:
    lines: tuple[Line, ...]
    n: int

    def __str__(self) -> str:
        head = f"{'metric':12s} {'a':>10s} {'b':>10s} {'b - a':>10s}  {'95 % interval':>23s} {'p':>8s}  win/tie/loss"
        rows = [
            f"{x.metric:12s} {x.a:10.4f} {x.b:10.4f} {x.delta:+10.4f}  [{x.low:+10.4f}, {x.high:+10.4f}] {x.p:8.4f}  "
            f"{x.wins}/{x.ties}/{x.losses}"
            for x in self.lines
        ]
        return "\n".join([f"{self.n} rows, paired", head, *rows])


def compare(a: Report, b: Report, *, resamples: int = 10_000, seed: int = 12345) -> Comparison:
    """b against a on the metrics both have.

    Raises ValueError unless both reports are of the same rows in the same order, or they share no metric.
    """
    if [(r.prompt, r.reference) for r in a.rows] != [(r.prompt, r.reference) for r in b.rows]:
        raise ValueError(
            f"the reports are of different rows ({len(a.rows)} and {len(b.rows)}); evaluate both on the same"
        )
    metrics = [m for m in a.metrics if m in b.metrics]
    if not metrics:
        raise ValueError(f"the reports share no metric: {sorted(a.metrics)} and {sorted(b.metrics)}")
    n = len(a.rows)
    draws = np.random.default_rng(seed).integers(0, n, size=(resamples, n))
    return Comparison(tuple(_line(m, a, b, draws) for m in metrics), n)


def _line(metric: str, a: Report, b: Report, draws: np.ndarray) -> Line:
    x = np.array([statistic(metric, r) for r in a.rows])  # (n, 2): numerator, denominator
    y = np.array([statistic(metric, r) for r in b.rows])
    delta = b.metrics[metric] - a.metrics[metric]
    d = _drawn(metric, y, draws) - _drawn(metric, x, draws)
    low, high = np.quantile(d, [0.025, 0.975])
    p = (1 + int((np.abs(d - d.mean()) >= abs(delta)).sum())) / (len(d) + 1)
    gain = (x[:, 0] - y[:, 0]) * (1 if metric in LOWER_IS_BETTER else -1)
    wins, losses = int((gain > 0).sum()), int((gain < 0).sum())
    return Line(
        metric,
        a.metrics[metric],
        b.metrics[metric],
        delta,
        float(low),
        float(high),
        p,
        wins,
        len(x) - wins - losses,
        losses,
    )


def _drawn(metric: str, parts: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The metric of every draw of rows, (resamples,)."""
    chunks: Sequence[np.ndarray] = np.array_split(draws, max(1, draws.size // 2_000_000))
    sums = np.concatenate([parts[chunk].sum(axis=1) for chunk in chunks])  # (resamples, 2)
    return finish(metric, sums[:, 0] / sums[:, 1], np.exp, np.sqrt)
