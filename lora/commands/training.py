"""Commands that train, or look at what would be trained on and in how much memory."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

import lora
from lora.commands.flags import ArgumentParser, Commands, columns_flag, dtype_device, json_flag, model_flags, numbers
from lora.files import read_json, refuse_filled
from lora.render import LEARN
from lora.rows import Rows, read_rows
from lora.sources import SUFFIXES
from lora.train.ceilings import CARDS
from lora.train.config import TrainConfig
from lora.train.sinks import READY, ready


# ---- demo ----
def _demo_arguments() -> ArgumentParser:
    p = ArgumentParser(description="Quantize, tune, measure and report a real 135 M model on the CPU, in minutes.")
    p.add_argument(
        "--out", type=str | None, default=None, help="run directory; runs/demo, or runs/demo-2, ... if taken"
    )
    p.add_argument("--seed", type=int, default=0, help="of the catalogue, the adapter and the order of rows")
    json_flag(p)
    return p


def _demo(a: Namespace) -> None:
    from lora.train.demo import ask_command, run_demo

    demo = run_demo(a.out, seed=a.seed)
    if a.json:
        table = [dict(zip(demo.table[0], row, strict=True)) for row in demo.table[1:]]
        print(json.dumps({"table": table, "seconds": demo.seconds, "out": str(demo.out)}))
        return
    print(f"\n{demo}\n\n{demo.comparison}\n\n{demo.seconds:.0f} s; report: {demo.out}/report.html")
    print(f"Ask the tuned model yourself:\n\n  {ask_command(demo)}\n")


# ---- train ----
def _train_arguments() -> ArgumentParser:
    p = ArgumentParser(description="Tune a model on rows of text.")
    p.add_argument("--config", action="config", help="a YAML file with any of these settings")
    model_flags(p, quantize=False, required=False)
    p.add_argument("--data", type=str | None, default=None, help=f"rows: {', '.join(SUFFIXES)}")
    p.add_argument("--valid", type=str | None, default=None, help="rows to evaluate on")
    p.add_argument("--method", choices=("qlora", "lora", "full"), default="qlora", help="what is trained, on what base")
    p.add_argument("--out", type=str | None, default=None, help="run directory; must not hold another run")
    p.add_argument(
        "--resume", type=str | None, default=None, help="run directory to go on with; takes no other setting"
    )
    p.add_argument("--log_to", type=str, default="", help=f"also log to some of {', '.join(READY)}")
    p.add_class_arguments(TrainConfig, None, skip={"out"})
    p.add_class_arguments(lora.LoRAConfig, "lora")
    json_flag(p)
    return p


def _train(a: Namespace) -> None:
    if a.resume:
        given = [k for k, v in vars(_train_arguments().get_defaults()).items() if k not in _BESIDE and a[k] != v]
        if given:
            raise ValueError(
                f"--resume takes every setting from {a.resume}; leave out {', '.join(map('--{}'.format, given))}"
            )
        (notes, columns), out, config = _notes_of(Path(a.resume)), Path(a.resume), None
    else:
        missing = [f"--{key}" for key in ("model", "data", "out") if not a[key]]
        if missing:
            raise ValueError(f"lora train needs {', '.join(missing)}, or --resume DIR")
        fields = {f.name: a[f.name] for f in dataclasses.fields(TrainConfig) if f.name != "out"}
        config, out, columns = TrainConfig(**fields, out=a.out), Path(a.out), a.columns
        notes = {key: a[key] for key in _RECIPE} | {"seed": config.seed}
        notes["lora"] = dataclasses.asdict(lora.LoRAConfig(**vars(a.lora)))
        refuse_filled(out)
    sinks = [ready(name.strip(), out) for name in a.log_to.split(",") if name.strip()]
    rows = _rows(notes, columns)
    model, tokenizer = _recipe(notes)
    print(lora.status(model), file=sys.stderr)
    run = lora.fit(model, tokenizer, *rows, config, resume=a.resume, sinks=sinks, notes=notes)
    last = {k: v for h in run.history for k, v in h.items() if k in ("loss", "eval_loss", "train_runtime")}
    if a.json:
        print(
            json.dumps(last | {"steps": run.steps, "tokens": run.tokens, "peak_bytes": run.peak_bytes, "out": str(out)})
        )
    else:
        held = f", validation {last['eval_loss']:.4f}" if "eval_loss" in last else ""
        print(
            f"{run.steps} steps, {run.tokens:,} tokens, {run.tokens_per_second:,.0f} tokens/s, "
            f"loss {last['loss']:.4f}{held}"
        )
        print(f"{'model' if notes['method'] == 'full' else 'adapter'}, log and report: {out}")


_RECIPE = ("model", "data", "valid", "method", "dtype", "device")  # with lora's settings, what a run begins from
_BESIDE = ("resume", "json", "log_to", "progress", "config")


def _recipe(notes: dict[str, Any]) -> tuple[Any, Any]:
    """The model and tokenizer of a run, as before its first step."""
    import torch

    quantize = "nf4" if notes["method"] == "qlora" else None
    model, tokenizer = lora.load(notes["model"], quantize=quantize, dtype=notes["dtype"], device=notes["device"])
    if notes["method"] == "full":
        model.requires_grad_(True)
    else:
        torch.manual_seed(notes["seed"])  # of the adapter's first values
        lora.wrap(model, config=lora.LoRAConfig(**notes["lora"]))
    return model, tokenizer


def _rows(notes: dict[str, Any], columns: dict[str, str] | None) -> tuple[Rows, Rows | None]:
    """Rows to train on and to evaluate on, checked before a model is loaded, which may take minutes."""
    return read_rows(notes["data"], columns), read_rows(notes["valid"], columns) if notes["valid"] else None


def _notes_of(run: Path) -> tuple[dict[str, Any], dict[str, str] | None]:
    """How the command that made a run directory began, and the names of its data's columns."""
    if not (run / "run.json").is_file():
        raise FileNotFoundError(f"{run} is no run directory: it holds no run.json")
    certificate = read_json(run / "run.json")
    notes = certificate.get("notes") or {}
    if not notes.keys() >= {*_RECIPE, "lora", "seed"}:
        raise ValueError(f"{run} was not made by `lora train`, so its model is not known; call lora.fit(resume=...)")
    return notes, certificate["config"]["columns"]


# ---- verify ----
def _verify_arguments() -> ArgumentParser:
    p = ArgumentParser(description="Repeat the last steps of a run and compare bits; exit code 2 where they differ.")
    p.add_argument("run", type=str, help="run directory")
    p.add_argument("--steps", type=int | None, default=None, help="how many to repeat at least")
    json_flag(p)
    return p


def _verify(a: Namespace) -> None:
    from lora.train.verify import verify

    notes, columns = _notes_of(Path(a.run))
    rows = _rows(notes, columns)
    verdict = verify(a.run, *_recipe(notes), *rows, steps=a.steps)
    if not verdict.equal:
        raise RuntimeError(f"{a.run}: {verdict}")
    print(json.dumps(dataclasses.asdict(verdict)) if a.json else f"{a.run}: {verdict}")


# ---- sweep ----
def _sweep_arguments() -> ArgumentParser:
    p = ArgumentParser(description="Train an adapter for each combination of settings, all at once on one base.")
    model_flags(p, quantize=False)
    p.add_argument("--data", type=str, required=True, help=".jsonl of prompt and completion, or messages")
    p.add_argument("--valid", type=str | None, default=None, help=".jsonl to evaluate on")
    p.add_argument("--method", choices=("qlora", "lora"), default="qlora", help="in 4 bits, or as it is")
    p.add_argument("--out", type=str, required=True, help="folder to write; must not hold anything")
    p.add_argument("--lr", type=str, required=True, help="learning rates, commas between them")
    p.add_argument("--r", type=str, default="16", help="ranks")
    p.add_argument("--alpha", type=str, default="32", help="alphas")
    p.add_argument("--seeds", type=str, default="42", help="of adapter and order of rows")
    p.add_class_arguments(TrainConfig, None, skip={"out", "lr", "seed"})
    json_flag(p)
    return p


def _sweep(a: Namespace) -> None:
    from lora.train.members import grid
    from lora.train.sweep import sweep

    fields = {f.name: a[f.name] for f in dataclasses.fields(TrainConfig) if f.name not in ("out", "lr", "seed")}
    config = TrainConfig(**fields, out=a.out)
    members = grid(numbers(a, "lr", float), numbers(a, "r", int), numbers(a, "alpha", float), numbers(a, "seeds", int))
    refuse_filled(Path(a.out))
    rows = _rows({"data": a.data, "valid": a.valid}, a.columns)
    model, tokenizer = lora.load(a.model, quantize="nf4" if a.method == "qlora" else None, **dtype_device(a))
    found = sweep(model, tokenizer, *rows, members=members, config=config)
    if a.json:
        print(json.dumps([dataclasses.asdict(x) for x in found.results]))
    else:
        print(f"{found}\n\n{len(members)} adapters in {found.seconds:.0f} s: {a.out}")


# ---- data ----
def _data_arguments() -> ArgumentParser:
    p = ArgumentParser(description="Rows as the model will see them: what is learned marked, every mask proved.")
    p.add_argument("action", choices=("show",), help="show: check all rows, and show some")
    p.add_argument("file", type=str, help=f"rows to look at: {', '.join(SUFFIXES)}")
    p.add_argument("--model", type=str, required=True, help="model folder or .gguf file; its tokenizer is used")
    p.add_argument("--rows", type=int, default=3, help="how many to show; all are checked")
    p.add_argument("--start", type=int, default=0, help="the first to show")
    p.add_argument("--learn", choices=LEARN, default="assistant", help="which tokens are learned")
    p.add_argument("--max_length", type=int | None, default=None, help="longest row in tokens; the model's own")
    columns_flag(p)
    p.add_argument("--html", type=str | None, default=None, help="write a page instead")
    json_flag(p)
    return p


def _data(a: Namespace) -> None:
    from rich.console import Console

    from lora.models.load import load_tokenizer
    from lora.train.show import as_json, as_text, heading, look, write_page

    tokenizer, limit = load_tokenizer(a.model)
    limit = a.max_length or limit or 2**31
    found = look(a.file, tokenizer, limit, learn=a.learn, columns=a.columns, start=a.start, count=a.rows)
    if a.html:
        write_page(a.html, f"{a.file} for {a.model}", str(found), found.shown, tokenizer)
    if a.json:
        head = {"file": a.file, "kind": found.rows.kind, "lengths": found.report.to_json(), "problems": found.problems}
        print(
            json.dumps(head | {"rows": [as_json(where, e, tokenizer) for where, e in found.shown]}, ensure_ascii=False)
        )
    else:
        console = Console(highlight=False, soft_wrap=True)
        for where, e in [] if a.html else found.shown:
            console.print(heading(where, e), style="bold")
            console.print(as_text(e, tokenizer, marks=not console.is_terminal), end="\n\n")
        print(f"{found}{f'{chr(10)}page: {a.html}' if a.html else ''}")
    if found.problems:
        raise ValueError(f"{len(found.problems)} of {len(found.rows)} rows cannot be trained on; {found.problems[0]}")


# ---- plan ----
def _plan_arguments() -> ArgumentParser:
    p = ArgumentParser(description="Memory and time of a training step, before anything is loaded.")
    p.add_argument(
        "--model", type=str, required=True, help="model folder (config.json will do), .gguf file or hub name"
    )
    p.add_argument("--method", choices=("qlora", "lora", "full"), default="qlora", help="what is trained, on what base")
    p.add_argument("--batch", type=int, default=4, help="rows that run together")
    p.add_argument("--length", type=int, default=2048, help="tokens of each")
    p.add_argument("--budget", type=str | None, default=None, help="what tensors may take, 24GiB say; the machine's")
    p.add_argument("--learned", type=float, default=1.0, help="share of the tokens that are learned from")
    p.add_argument("--pack", type=int, default=0, help="texts in each row, where rows are packed")
    p.add_argument("--recompute", type=bool, default=False, help="as in train")
    p.add_argument("--optim_bits", type=int, default=32, help="of each of AdamW's two moments: 32 or 8")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="dense weights")
    p.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: the GPU, if there is one")
    p.add_argument("--card", type=str | None, default=None, help=f"plan for one of {', '.join(CARDS)}; this machine")
    p.add_argument("--solve", type=str, default="", help="largest that fits, of batch, length, rank; commas between")
    p.add_argument("--lora.r", type=int, default=16, help="rank of the update")
    p.add_argument("--lora.targets", type=str | list[str], default="all-linear", help="layers that get one")
    json_flag(p)
    return p


def _plan(a: Namespace) -> None:
    from rich.console import Console

    solve = [part.strip() for part in a.solve.split(",") if part.strip()]
    same = {key: a[key] for key in ("method", "learned", "pack", "recompute", "optim_bits", "dtype", "device", "card")}
    with Console(stderr=True).status("planning; a step for a CPU is run dry, without memory, which takes a minute"):
        made = lora.plan(
            a.model, a.batch, a.length, a.lora.r, budget=a.budget, targets=a.lora.targets, solve=solve, **same
        )  # fmt: skip
    print(json.dumps(made.to_json()) if a.json else made)


COMMANDS: Commands = {
    "demo": (_demo_arguments, _demo),
    "train": (_train_arguments, _train),
    "data": (_data_arguments, _data),
    "verify": (_verify_arguments, _verify),
    "plan": (_plan_arguments, _plan),
    "sweep": (_sweep_arguments, _sweep),
}
