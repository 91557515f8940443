"""The paired bootstrap: seeded, zero where nothing differs, sure of a known shift, and only on the same rows."""

import math

import numpy as np
import pytest

from lora.eval.compare import compare
from lora.eval.evaluate import Report, Result, aggregate, statistic


def report(guesses: list[float], truths: list[float], nlls: list[float] | None = None) -> Report:
    nlls = nlls or [1.0] * len(truths)
    rows = tuple(
        Result(f"q{i}", str(t), str(g), nll, 2 + i % 3, g, t)
        for i, (g, t, nll) in enumerate(zip(guesses, truths, nlls, strict=True))
    )
    metrics = ("mae", "rmsle", "hits", "nll", "perplexity")
    return Report({m: aggregate(m, [statistic(m, r) for r in rows]) for m in metrics}, rows, 0, 0.0)


TRUTHS = [float(t) for t in np.random.default_rng(0).integers(50, 2000, 60)]
NOISE = np.random.default_rng(1).normal(0, 30, 60)
A = report([t + 100 + n for t, n in zip(TRUTHS, NOISE, strict=True)], TRUTHS, list(2 + np.abs(NOISE) / 30))
B = report([t + 80 + n for t, n in zip(TRUTHS, NOISE, strict=True)], TRUTHS, list(1 + np.abs(NOISE) / 30))


def test_the_same_reports_differ_by_nothing() -> None:
    for line in compare(A, A, resamples=200).lines:
        assert (line.delta, line.low, line.high, line.p) == (0.0, 0.0, 0.0, 1.0)
        assert (line.wins, line.ties, line.losses) == (0, 60, 0)
        assert not line.better


def test_the_seed_decides_the_interval() -> None:
    assert compare(A, B, resamples=200) == compare(A, B, resamples=200)
    assert compare(A, B, resamples=200, seed=1) != compare(A, B, resamples=200)


def test_a_shift_that_every_row_shares_is_found_whole() -> None:
    high = report([t + 100 for t in TRUTHS], TRUTHS)
    low = report([t + 80 for t in TRUTHS], TRUTHS)
    line = next(x for x in compare(high, low, resamples=500).lines if x.metric == "mae")
    assert line.delta == pytest.approx(-20) and line.low == pytest.approx(-20) and line.high == pytest.approx(-20)
    assert line.better and (line.wins, line.ties, line.losses) == (60, 0, 0)


@pytest.mark.parametrize("metric", ["mae", "rmsle", "perplexity", "nll", "hits"])
def test_the_interval_equals_a_naive_loop(metric: str) -> None:
    line = next(x for x in compare(A, B, resamples=300, seed=7).lines if x.metric == metric)
    draws = np.random.default_rng(7).integers(0, 60, size=(300, 60))
    d = []
    for draw in draws:
        values = []
        for r in (A, B):
            picked = [r.rows[i] for i in draw]
            if metric in ("nll", "perplexity"):
                mean = sum(x.nll or 0 for x in picked) / sum(x.tokens or 0 for x in picked)
                values.append(math.exp(mean) if metric == "perplexity" else mean)
            else:
                pairs = [(x.guess or 0.0, x.truth or 0.0) for x in picked]
                if metric == "mae":
                    values.append(sum(abs(g - t) for g, t in pairs) / 60)
                elif metric == "rmsle":
                    values.append(math.sqrt(sum((math.log1p(g) - math.log1p(t)) ** 2 for g, t in pairs) / 60))
                else:
                    values.append(sum(abs(g - t) < max(40, 0.2 * t) for g, t in pairs) / 60)
        d.append(values[1] - values[0])
    assert (line.low, line.high) == pytest.approx(tuple(np.quantile(d, [0.025, 0.975])))
    beyond = sum(abs(x - np.mean(d)) >= abs(line.delta) for x in d)
    assert line.p == pytest.approx((1 + beyond) / 301)
    assert line.delta == pytest.approx(B.metrics[metric] - A.metrics[metric])


def test_reports_of_other_rows_are_refused() -> None:
    for other in (report([1.0], [2.0]), report([t + 1 for t in TRUTHS], TRUTHS[::-1])):
        with pytest.raises(ValueError, match="different rows"):
            compare(A, other)


def test_reports_without_a_common_metric_are_refused() -> None:
    other = Report({"exact_match": 1.0}, A.rows, 0, 0.0)
    with pytest.raises(ValueError, match="share no metric"):
        compare(A, other)


def test_a_comparison_prints_as_a_table() -> None:
    text = str(compare(A, B, resamples=100))
    assert text.startswith("60 rows, paired\n") and len(text.splitlines()) == 7
