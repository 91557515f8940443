"""Two charts as SVG text: a line over steps and a scatter on logarithmic axes. No library, no script, no file beside.

Colours are CSS variables of the page (--a, --b, --grid, --ink), so that a chart follows its light or dark scheme.
"""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

W, H, LEFT, RIGHT, TOP, BOTTOM = 640, 380, 64, 16, 36, 48
Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """Maps a value to a pixel, and says where to write numbers."""

    place: Callable[[float], float]
    ticks: tuple[float, ...]


def linear_axis(low: float, high: float, start: float, end: float) -> Axis:
    """An axis from low to high over pixels start to end, ticks on 1, 2 or 5 times a power of ten."""
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(m for m in (1, 2, 5, 10) if span / (m * step) <= 6)
    first = math.ceil(low / step)
    ticks = tuple(k * step for k in range(first, math.floor((low + span) / step) + 1))
    return Axis(lambda v: start + (v - low) / span * (end - start), ticks)


def log_axis(low: float, high: float, start: float, end: float) -> Axis:
    """A logarithmic axis, ticks on powers of ten and their threes; low is above 0."""
    a, b = math.log(low), math.log(max(high, low * 1.01))
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = tuple(m * 10.0**k for k in decades for m in (1, 3) if low <= m * 10.0**k <= high)
    return Axis(lambda v: start + (math.log(v) - a) / (b - a) * (end - start), ticks)


def line_chart(series: Sequence[tuple[str, str, Sequence[Point], str]], x_name: str, y_name: str) -> str:
    """Lines through points: series of (name, colour, points, "line" | "faint" | "dots")."""
    points = [p for *_, ps, _ in series for p in ps if math.isfinite(p[1])]
    x = linear_axis(min(p[0] for p in points), max(p[0] for p in points), LEFT, W - RIGHT)
    y = linear_axis(min(0.0, min(p[1] for p in points)), max(p[1] for p in points) * 1.05, H - BOTTOM, TOP)
    marks = []
    for name, colour, ps, style in series:
        at = [(x.place(a), y.place(b)) for a, b in ps if math.isfinite(b)]
        if style == "dots":
            marks += [
                _dot(a, b, colour, 4, f"{name} {p[1]:.4f} at {p[0]:g}") for (a, b), p in zip(at, ps, strict=False)
            ]
        elif at:
            width, opacity = (1, 0.35) if style == "faint" else (2, 1)
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in at)
            marks.append(
                f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}" opacity="{opacity}"/>'
            )
    legend = [(name, colour) for name, colour, _, style in series if style != "faint"]
    return _frame(x, y, x_name, y_name, "".join(marks), legend, _plain)


def scatter_chart(series: Sequence[tuple[str, str, Sequence[Point]]], x_name: str, y_name: str) -> str:
    """Truth (x) against prediction (y) on equal logarithmic axes, with the diagonal; values below 1 lie on the edge."""
    values = [max(v, 1.0) for *_, ps in series for p in ps for v in p]
    truths = [p[0] for *_, ps in series for p in ps]
    # a wild guess must not squeeze the rest: the axis ends a factor 10 past the truths, and marks stop at its edge
    low = max(1.0, min(truths) / 10)
    high = max(10 * low, min(max(values), max(truths) * 10))
    x, y = log_axis(low, high, LEFT, W - RIGHT), log_axis(low, high, H - BOTTOM, TOP)
    marks = [
        f'<line x1="{x.place(low):.1f}" y1="{y.place(low):.1f}" x2="{x.place(high):.1f}" y2="{y.place(high):.1f}" '
        'stroke="var(--ink)" stroke-dasharray="4 4" opacity="0.6"/>'
    ]
    for name, colour, ps in series:
        for truth, guess in ps:
            at = x.place(min(max(truth, low), high)), y.place(min(max(guess, low), high))
            marks.append(_dot(*at, colour, 4, f"{name}: truth {truth:g}, said {guess:g}"))
    return _frame(x, y, x_name, y_name, "".join(marks), [(name, colour) for name, colour, _ in series], _money)


def _dot(x: float, y: float, colour: str, r: int, title: str) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" fill="{colour}" fill-opacity="0.6"><title>{html.escape(title)}'
        "</title></circle>"
    )


def _plain(v: float) -> str:
    return f"{v:g}"


def _money(v: float) -> str:
    return f"${v:,.0f}"


def _frame(
    x: Axis,
    y: Axis,
    x_name: str,
    y_name: str,
    marks: str,
    legend: Sequence[tuple[str, str]],
    show: Callable[[float], str],
) -> str:
    grid = [
        f'<line x1="{LEFT}" x2="{W - RIGHT}" y1="{y.place(t):.1f}" y2="{y.place(t):.1f}" stroke="var(--grid)"/>'
        f'<text x="{LEFT - 8}" y="{y.place(t) + 4:.1f}" text-anchor="end">{show(t)}</text>'
        for t in y.ticks
    ]
    grid += [f'<text x="{x.place(t):.1f}" y="{H - BOTTOM + 18}" text-anchor="middle">{show(t)}</text>' for t in x.ticks]
    names = "".join(
        f'<circle cx="{LEFT + 8 + 170 * i}" cy="14" r="5" fill="{colour}"/>'
        f'<text x="{LEFT + 20 + 170 * i}" y="18">{html.escape(name)}</text>'
        for i, (name, colour) in enumerate(legend)
    )
    return (
        f'<svg viewBox="0 0 {W} {H}" role="img" aria-label="{html.escape(y_name)} against {html.escape(x_name)}">'
        f"{''.join(grid)}{marks}{names}"
        f'<text x="{(LEFT + W - RIGHT) / 2}" y="{H - 8}" text-anchor="middle">{html.escape(x_name)}</text>'
        f'<text transform="translate(14 {(TOP + H - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(y_name)}</text></svg>"
    )
