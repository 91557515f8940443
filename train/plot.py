"""loss.png: the curve of a run; sweep.png: those of a sweep; both where matplotlib is installed."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_plot(path: Path, history: Sequence[dict[str, Any]]) -> bool:
    """Training and validation loss over the steps; returns whether it was drawn (False without matplotlib)."""
    named = (("loss", "training"), ("eval_loss", "validation"))
    points = {label: [(h["step"], h[key]) for h in history if key in h] for key, label in named}
    return _draw(path, points)


def write_curves(path: Path, losses: Mapping[str, Sequence[float]]) -> bool:
    """One curve a name, a loss a step; returns whether it was drawn."""
    return _draw(path, {name: list(enumerate(values, start=1)) for name, values in losses.items()})


def _draw(path: Path, curves: Mapping[str, Sequence[tuple[int, float]]]) -> bool:
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure  # no pyplot: it would pick a window system

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 20 else None, markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.legend()
    figure.savefig(path, dpi=120)
    return True
