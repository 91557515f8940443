"""Where a run's log may go besides log.jsonl: any callable that takes a dict, and two ready ones.

    lora.fit(..., sinks=[print, tensorboard("runs/tb"), wandb("my project")])

An entry is what stands in log.jsonl, "step" in it.  TensorBoard and wandb are imported when asked for, and write from
the first entry on: a run that is refused leaves nothing behind, and its folder is empty until it begins.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

Sink = Callable[[dict[str, Any]], None]
READY = ("tensorboard", "wandb")


def tensorboard(folder: str | Path) -> Sink:
    """Writes numbers as scalars for TensorBoard. Raises ImportError with the command that installs it."""
    module = _needed("torch.utils.tensorboard", "tensorboard")
    writer: Any = None

    def sink(entry: dict[str, Any]) -> None:
        nonlocal writer
        writer = writer or module.SummaryWriter(str(folder))
        for key, value in entry.items():
            if key != "step" and isinstance(value, int | float):
                writer.add_scalar(key, value, entry["step"])
        if "train_runtime" in entry:
            writer.close()

    return sink


def wandb(project: str, **options: Any) -> Sink:
    """Sends entries to Weights & Biases; `options` go to wandb.init. Raises ImportError where it is not installed."""
    module = _needed("wandb", "wandb")
    run: Any = None

    def sink(entry: dict[str, Any]) -> None:
        nonlocal run
        run = run or module.init(project=project, **options)
        run.log({k: v for k, v in entry.items() if k != "step"}, step=entry["step"])
        if "train_runtime" in entry:
            run.finish()

    return sink


def ready(name: str, out: Path) -> Sink:
    """The sink that a command names: one of READY."""
    if name not in READY:
        raise ValueError(f"log_to={name!r}: one of {', '.join(READY)}")
    return tensorboard(out / "tensorboard") if name == "tensorboard" else wandb("lora", dir=str(out), name=out.name)


def _needed(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise ImportError(f"{package} is not installed, and a sink needs it: pip install {package}") from e
