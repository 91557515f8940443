"""report.html: one run on one page that needs nothing else, not a network, not a script."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora.eval.chart import line_chart, scatter_chart
from lora.eval.compare import Comparison
from lora.eval.evaluate import Report
from lora.files import write_text

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --paper: #fff; --grid: #e2e2e6; --a: #c2410c; --b: #1d4ed8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ea; --paper: #17171a; --grid: #34343a; --a: #fb923c; --b: #7da2ff; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 56rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 12px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--grid); }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; } .said td { text-align: left; vertical-align: top; white-space: pre-wrap; }
"""

Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # head, rows


def write_report(
    path: str | Path,
    title: str,
    history: Sequence[Mapping[str, Any]],
    *,
    summary: Table | None = None,
    comparison: Comparison | None = None,
    reports: tuple[Report, Report] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes the page: `history` is a run's log; `reports` are base and tuned on the same rows."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if summary:
        parts.append(_table(*summary))
    if reports and all(r.guess is not None or r.truth is not None for r in reports[0].rows):
        parts += ["<h2>Truth against answer, before and after</h2>", _scatter(*reports)]
    losses = [h for h in history if "loss" in h]
    if losses:
        parts += ["<h2>Loss</h2>", _curve(history)]
    if comparison:
        head = ("metric", "base", "tuned", "difference", "95 % interval", "p", "better / equal / worse")
        rows = [
            (
                x.metric,
                f"{x.a:.4f}",
                f"{x.b:.4f}",
                f"{x.delta:+.4f}",
                f"{x.low:+.4f} to {x.high:+.4f}",
                f"{x.p:.4f}",
                f"{x.wins} / {x.ties} / {x.losses}",
            )
            for x in comparison.lines
        ]
        parts += [f"<h2>Base against tuned, paired over {comparison.n} rows</h2>", _table(head, rows)]
    if reports and reports[0].rows[0].answer is not None:
        said = [
            (a.prompt, a.reference, a.answer or "", b.answer or "")
            for a, b in zip(reports[0].rows[:10], reports[1].rows[:10], strict=True)
        ]
        parts += ["<h2>First answers</h2>", _table(("asked", "wanted", "base", "tuned"), said, "said")]
    if settings:
        pairs = [(key, str(value)) for key, value in settings.items()]
        parts += ["<h2>Settings</h2>", _table(("setting", "value"), pairs)]
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )
    write_text(Path(path), page)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><tr>{top}</tr>{body}</table></div>'


def _curve(history: Sequence[Mapping[str, Any]]) -> str:
    raw = [(h["step"], h["loss"]) for h in history if "loss" in h]
    smooth, mean = [], raw[0][1]
    for step, loss in raw:  # an exponential mean over some ten steps
        mean += 0.1 * (loss - mean)
        smooth.append((step, mean))
    held = [(h["step"], h["eval_loss"]) for h in history if "eval_loss" in h]
    series = [("each step", "var(--b)", raw, "faint"), ("training, smoothed", "var(--b)", smooth, "line")]
    if held:
        series.append(("validation", "var(--a)", held, "dots"))
    return line_chart(series, "optimizer step", "nats a learned token")


def _scatter(base: Report, tuned: Report) -> str:
    series = [
        (name, colour, [(r.truth or 0.0, r.guess or 0.0) for r in report.rows])
        for name, colour, report in (("base", "var(--a)", base), ("tuned", "var(--b)", tuned))
    ]
    return scatter_chart(series, "truth", "answer")
