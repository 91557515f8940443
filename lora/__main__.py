"""The `lora` command: parse, one library call, print. A notebook can do all that stands here.

Exit code 0 on success; 2 on a caller's mistake, with one sentence and no traceback, or where `verify` finds other
bits; 130 on Ctrl-C and 143 on SIGTERM, after a run was saved.
"""

import dataclasses
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

import lora
from lora.combine import METHODS
from lora.eval.evaluate import METRICS
from lora.export import TARGETS
from lora.files import read_json, refuse_filled
from lora.quant.rounding import ROUNDINGS
from lora.render import LEARN
from lora.requantize import LEAST
from lora.rows import read_rows
from lora.sources import SUFFIXES
from lora.train.ceilings import CARDS
from lora.train.config import TrainConfig
from lora.train.sinks import READY, ready

PROBE = "The capital of France is Paris, and 12 + 30 = 42."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    parser = ArgumentParser(prog="lora", description="QLoRA from scratch: tune, measure and use language models.")
    parser.add_argument("--version", action="version", version=f"lora {lora.__version__}")
    commands = parser.add_subcommands(required=True, dest="command")
    for name, (sub, _) in _COMMANDS.items():
        commands.add_subcommand(name, sub())
    config = parser.parse_args(argv)
    warnings.formatwarning = lambda message, *_, **__: f"lora: note: {message}\n"  # a sentence, not a source line
    try:
        _COMMANDS[config.command][1](config[config.command])
    except KeyboardInterrupt as e:
        print(f"lora: interrupted {e}".rstrip(), file=sys.stderr)
        return getattr(e, "code", 130)
    except (ValueError, TypeError, LookupError, RuntimeError, OSError, ImportError) as e:
        if not _deliberate(e):
            raise
        print(f"lora: error: {e.args[0] if isinstance(e, KeyError) else e}", file=sys.stderr)
        return 2
    return 0


def _deliberate(e: BaseException) -> bool:
    """Whether a `raise` of ours made it, a sentence for the caller. Anything else is a bug and keeps its traceback."""
    last = traceback.extract_tb(e.__traceback__)[-1]
    return isinstance(e, OSError) or (last.line or "").lstrip().startswith("raise ")


# ---- demo ----
def _demo_arguments() -> ArgumentParser:
    p = ArgumentParser(description="Quantize, tune, measure and report a real 135 M model on the CPU, in minutes.")
    p.add_argument(
        "--out", type=str | None, default=None, help="run directory; runs/demo, or runs/demo-2, ... if taken"
    )
    p.add_argument("--seed", type=int, default=0, help="of the catalogue, the adapter and the order of rows")
    _json_flag(p)
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
    _model_flags(p, quantize=False, required=False)
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
    _json_flag(p)
    return p


def _train(a: Namespace) -> None:
    if a.resume:
        given = [k for k, v in vars(_train_arguments().get_defaults()).items() if k not in _BESIDE and a[k] != v]
        if given:
            raise ValueError(
                f"--resume takes every setting from {a.resume}; leave out {', '.join(map('--{}'.format, given))}"
            )
        notes, out, config = _notes_of(Path(a.resume)), Path(a.resume), None
    else:
        missing = [f"--{key}" for key in ("model", "data", "out") if not a[key]]
        if missing:
            raise ValueError(f"lora train needs {', '.join(missing)}, or --resume DIR")
        fields = {f.name: a[f.name] for f in dataclasses.fields(TrainConfig) if f.name != "out"}
        config, out = TrainConfig(**fields, out=a.out), Path(a.out)
        notes = {key: a[key] for key in _RECIPE} | {"seed": config.seed}
        notes["lora"] = dataclasses.asdict(lora.LoRAConfig(**vars(a.lora)))
        refuse_filled(out)
    sinks = [ready(name.strip(), out) for name in a.log_to.split(",") if name.strip()]
    model, tokenizer = _recipe(notes)
    print(lora.status(model), file=sys.stderr)
    run = lora.fit(
        model, tokenizer, notes["data"], notes["valid"], config, resume=a.resume, sinks=sinks, notes=notes
    )  # fmt: skip
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
        print(f"adapter, log and report: {out}")


_RECIPE = ("model", "data", "valid", "method", "dtype", "device")  # with lora's settings, what a run begins from
_BESIDE = ("resume", "json", "log_to", "progress", "config")


def _recipe(notes: dict[str, Any]) -> tuple[Any, Any]:
    """The model and tokenizer of a run, as before its first step."""
    import torch

    for file in filter(None, (notes["data"], notes["valid"])):
        if not Path(file).is_file():
            raise FileNotFoundError(f"{file} is not there; data is a file of rows: {', '.join(SUFFIXES)}")
    quantize = "nf4" if notes["method"] == "qlora" else None
    model, tokenizer = lora.load(notes["model"], quantize=quantize, dtype=notes["dtype"], device=notes["device"])
    if notes["method"] == "full":
        model.requires_grad_(True)
    else:
        torch.manual_seed(notes["seed"])  # of the adapter's first values
        lora.wrap(model, config=lora.LoRAConfig(**notes["lora"]))
    return model, tokenizer


def _notes_of(run: Path) -> dict[str, Any]:
    """How the command that made a run directory began."""
    if not (run / "run.json").is_file():
        raise FileNotFoundError(f"{run} is no run directory: it holds no run.json")
    notes = read_json(run / "run.json").get("notes") or {}
    if not notes.keys() >= {*_RECIPE, "lora", "seed"}:
        raise ValueError(f"{run} was not made by `lora train`, so its model is not known; call lora.fit(resume=...)")
    return notes


# ---- verify ----
def _verify_arguments() -> ArgumentParser:
    p = ArgumentParser(description="Repeat the last steps of a run and compare bits; exit code 2 where they differ.")
    p.add_argument("run", type=str, help="run directory")
    p.add_argument("--steps", type=int | None, default=None, help="how many to repeat at least")
    _json_flag(p)
    return p


def _verify(a: Namespace) -> None:
    from lora.train.verify import verify

    notes = _notes_of(Path(a.run))
    model, tokenizer = _recipe(notes)
    verdict = verify(a.run, model, tokenizer, notes["data"], notes["valid"], steps=a.steps)
    if not verdict.equal:
        raise RuntimeError(f"{a.run}: {verdict}")
    print(json.dumps(dataclasses.asdict(verdict)) if a.json else f"{a.run}: {verdict}")


# ---- sweep ----
def _sweep_arguments() -> ArgumentParser:
    p = ArgumentParser(description="Train an adapter for each combination of settings, all at once on one base.")
    _model_flags(p, quantize=False)
    p.add_argument("--data", type=str, required=True, help=".jsonl of prompt and completion, or messages")
    p.add_argument("--valid", type=str | None, default=None, help=".jsonl to evaluate on")
    p.add_argument("--method", choices=("qlora", "lora"), default="qlora", help="in 4 bits, or as it is")
    p.add_argument("--out", type=str, required=True, help="folder to write; must not hold anything")
    p.add_argument("--lr", type=str, required=True, help="learning rates, commas between them")
    p.add_argument("--r", type=str, default="16", help="ranks")
    p.add_argument("--alpha", type=str, default="32", help="alphas")
    p.add_argument("--seeds", type=str, default="42", help="of adapter and order of rows")
    p.add_class_arguments(TrainConfig, None, skip={"out", "lr", "seed"})
    _json_flag(p)
    return p


def _sweep(a: Namespace) -> None:
    from lora.train.members import grid
    from lora.train.sweep import sweep

    fields = {f.name: a[f.name] for f in dataclasses.fields(TrainConfig) if f.name not in ("out", "lr", "seed")}
    config = TrainConfig(**fields, out=a.out)
    members = grid(_list(a, "lr", float), _list(a, "r", int), _list(a, "alpha", float), _list(a, "seeds", int))
    refuse_filled(Path(a.out))
    model, tokenizer = lora.load(a.model, quantize="nf4" if a.method == "qlora" else None, **_dtype_device(a))
    found = sweep(model, tokenizer, a.data, a.valid, members=members, config=config)
    if a.json:
        print(json.dumps([dataclasses.asdict(x) for x in found.results]))
    else:
        print(f"{found}\n\n{len(members)} adapters in {found.seconds:.0f} s: {a.out}")


def _list(a: Namespace, key: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(part) for part in a[key].split(",")]
    except ValueError:
        raise ValueError(f"--{key} {a[key]}: numbers with commas between them, 1e-4,2e-4 say") from None


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
    p.add_argument("--columns", type=dict[str, str] | None, default=None, help="what the data calls its parts")
    p.add_argument("--html", type=str | None, default=None, help="write a page instead")
    _json_flag(p)
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


# ---- eval ----
def _eval_arguments() -> ArgumentParser:
    p = ArgumentParser(description="Measure a model on rows; with an adapter, the base against the tuned, paired.")
    _model_flags(p)
    p.add_argument("--adapter", type=str | None, default=None, help="adapter folder; compared with the base")
    p.add_argument("--data", type=str, required=True, help=f"rows: {', '.join(SUFFIXES)}")
    p.add_argument("--columns", type=dict[str, str] | None, default=None, help="what the data calls its parts")
    p.add_argument("--metrics", type=str, default="perplexity,exact_match", help=f"some of {', '.join(METRICS)}")
    p.add_argument("--max_new_tokens", type=int, default=64, help="longest answer")
    p.add_argument("--batch", type=int, default=16, help="rows that run together")
    p.add_argument("--out", type=str | None, default=None, help="report.html, or .json with every row")
    _json_flag(p)
    return p


def _eval(a: Namespace) -> None:
    from lora.eval.report import write_report

    metrics = [m.strip() for m in a.metrics.split(",") if m.strip()]
    if a.out and Path(a.out).suffix not in (".html", ".json"):
        raise ValueError(f"--out {a.out}: a report ends in .html or .json")
    model, tokenizer = lora.load(a.model, quantize=a.quantize, **_dtype_device(a))
    options = {"metrics": metrics, "max_new_tokens": a.max_new_tokens, "batch": a.batch}
    data = read_rows(a.data, a.columns)
    reports = [lora.evaluate(model, tokenizer, data, **options)]
    comparison = None
    if a.adapter:
        lora.attach(model, a.adapter)
        reports.append(lora.evaluate(model, tokenizer, data, **options))
        comparison = lora.compare(*reports)
    if a.out and a.out.endswith(".json"):
        reports[-1].save(a.out)
    elif a.out:
        head = ("metric", *("base", "tuned")[: len(reports)])
        rows = [(m, *(f"{r.metrics[m]:.4f}" for r in reports)) for m in metrics]
        both = (reports[0], reports[-1])
        write_report(a.out, f"{a.model} on {a.data}", [], summary=(head, rows), comparison=comparison, reports=both)
    if a.json:
        print(json.dumps({name: r.metrics for name, r in zip(("base", "tuned"), reports, strict=False)}))
    else:
        print(comparison or reports[0])


# ---- generate ----
def _generate_arguments() -> ArgumentParser:
    p = ArgumentParser(description="Continue a text, or with --chat answer a question.")
    _model_flags(p)
    p.add_argument("--adapter", type=str | None, default=None, help="adapter folder")
    p.add_argument("--prompt", type=str, required=True, help="the text to continue")
    p.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    p.add_argument("--max_new_tokens", type=int, default=64, help="longest answer")
    p.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token each time")
    p.add_argument("--top_k", type=int, default=0, help="draw among the k likeliest; 0 for all")
    p.add_argument("--top_p", type=float, default=1.0, help="draw among the likeliest that together reach p")
    p.add_argument("--seed", type=int | None, default=None, help="of the draws")
    _json_flag(p)
    return p


def _generate(a: Namespace) -> None:
    model, tokenizer = lora.load(a.model, quantize=a.quantize, **_dtype_device(a))
    if a.adapter:
        lora.attach(model, a.adapter)
    prompt = [{"role": "user", "content": a.prompt}] if a.chat else a.prompt
    options = {k: a[k] for k in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}
    text = lora.generate(model, tokenizer, [prompt], **options)[0]
    print(json.dumps({"prompt": a.prompt, "text": text}, ensure_ascii=False) if a.json else text)


# ---- quantize ----
def _quantize_arguments() -> ArgumentParser:
    p = ArgumentParser(description="Write a model's linear layers in 4 bits, in the layout of bitsandbytes.")
    p.add_argument("path", type=str, help="model folder or .gguf file")
    p.add_argument("out", type=str, help="folder to write; must not hold anything")
    p.add_argument("--kind", choices=("nf4", "fp4"), default="nf4", help="the 16 levels")
    p.add_argument("--block", type=int, default=64, help="weights to one scale")
    p.add_argument("--double", type=bool, default=True, help="block scales in 8 bits")
    _json_flag(p)
    return p


def _quantize(a: Namespace) -> None:
    refuse_filled(Path(a.out))
    model, tokenizer = lora.load(a.path, quantize=a.kind, block=a.block, double=a.double)
    lora.save_pretrained(model, tokenizer, a.out)
    size = sum(f.stat().st_size for f in Path(a.out).iterdir())
    print(
        json.dumps({"out": a.out, "bytes": size}) if a.json else f"{a.out}: {size / 1e6:,.1f} MB\n{lora.status(model)}"
    )


# ---- merge ----
def _merge_arguments() -> ArgumentParser:
    p = ArgumentParser(description="Fold an adapter into its base and write the model, dense in bfloat16 or in 4 bits.")
    _model_flags(p)
    p.add_argument("--into", choices=("dense", "4bit"), default="dense", help="4bit needs --quantize")
    p.add_argument("--rounding", choices=ROUNDINGS, default="stochastic", help="of weights that stay in 4 bits")
    p.add_argument("--at_least", type=float, default=LEAST, help="share of the update that must survive in 4 bits")
    p.add_argument("--adapter", type=str, required=True, help="adapter folder")
    p.add_argument("--out", type=str, required=True, help="folder to write; must not hold anything")
    _json_flag(p)
    return p


def _merge(a: Namespace) -> None:
    import torch

    refuse_filled(Path(a.out))
    model, tokenizer = lora.load(a.model, quantize=a.quantize, **_dtype_device(a))
    lora.attach(model, a.adapter)
    ids = torch.tensor([tokenizer.encode(PROBE)], device=next(model.parameters()).device)
    told = ""
    with torch.no_grad():
        want = model(ids).float()
        if a.into == "4bit":
            told = f"{lora.merge_4bit(model, a.rounding, at_least=a.at_least, prompts=[ids])}\n"
        else:
            lora.merge(model)
        lora.save_pretrained(model, tokenizer, a.out, verify=False)  # it is loaded and compared here
        written, _ = lora.load(a.out, **_dtype_device(a))
        drift = (written(ids).float() - want).abs().max().item()
    base = f"the {a.quantize} base" if a.quantize else "the dense base"
    if a.json:
        print(json.dumps({"out": a.out, "max_logit_difference": drift, "told": told.strip()}))
    else:
        print(
            f"{told}{a.out}: adapter merged into {base}; reloaded, its logits differ by at most {drift:.4f} on a probe"
        )


# ---- export ----
def _export_arguments() -> ArgumentParser:
    p = ArgumentParser(description="Rewrite an adapter so that another program computes what we do.")
    p.add_argument("adapter", type=str, help="adapter folder")
    p.add_argument("out", type=str, help="folder to write; must not hold anything")
    p.add_argument("--target", choices=TARGETS, default="peft", help="the program that will load it")
    p.add_argument("--base", type=str, default=None, help="name of the base model, where the adapter holds none")
    _json_flag(p)
    return p


def _export(a: Namespace) -> None:
    found = [str(f) for f in lora.export(a.adapter, a.out, a.target, base=a.base)]
    if a.json:
        print(json.dumps({"out": a.out, "target": a.target, "mended": found}))
    else:
        print("\n".join([f"mended: {f}" for f in found] + [f"{a.out}: ready for {a.target}"]))


# ---- combine ----
def _combine_arguments() -> ArgumentParser:
    p = ArgumentParser(description="Add adapters up into one, with weights; or bring one to a lower rank.")
    p.add_argument("adapters", nargs="+", type=str, help="adapter folders of one base")
    p.add_argument("--out", type=str, required=True, help="folder to write; must not hold anything")
    p.add_argument("--weights", type=str, default=None, help="one each, commas between them; 1 each")
    p.add_argument("--method", choices=METHODS, default="cat", help="cat is exact, svd has the rank you say")
    p.add_argument("--rank", type=int | None, default=None, help="of the result, for svd")
    _json_flag(p)
    return p


def _combine(a: Namespace) -> None:
    weights = _list(a, "weights", float) if a.weights else None
    made = lora.combine(a.adapters, a.out, weights, a.method, a.rank)
    print(json.dumps({"out": a.out, "r": made.r, "error": made.error, "errors": made.errors}) if a.json else made)


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
    p.add_argument("--pack", type=bool, default=False, help="rows of several texts")
    p.add_argument("--recompute", type=bool, default=False, help="as in train")
    p.add_argument("--optim_bits", type=int, default=32, help="of each of AdamW's two moments: 32 or 8")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="dense weights")
    p.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: the GPU, if there is one")
    p.add_argument("--card", type=str | None, default=None, help=f"plan for one of {', '.join(CARDS)}; this machine")
    p.add_argument("--solve", type=str, default="", help="largest that fits, of batch, length, rank; commas between")
    p.add_argument("--lora.r", type=int, default=16, help="rank of the update")
    p.add_argument("--lora.targets", type=str | list[str], default="all-linear", help="layers that get one")
    _json_flag(p)
    return p


def _plan(a: Namespace) -> None:
    solve = [part.strip() for part in a.solve.split(",") if part.strip()]
    same = {key: a[key] for key in ("method", "learned", "pack", "recompute", "optim_bits", "dtype", "device", "card")}
    made = lora.plan(
        a.model, a.batch, a.length, a.lora.r, budget=a.budget, targets=a.lora.targets, solve=solve, **same
    )  # fmt: skip
    print(json.dumps(made.to_json()) if a.json else made)


# ---- shared flags ----
def _model_flags(p: ArgumentParser, quantize: bool = True, required: bool = True) -> None:
    kind: Any = {"type": str, "required": True} if required else {"type": str | None, "default": None}
    p.add_argument("--model", **kind, help="model folder or .gguf file")
    if quantize:
        p.add_argument("--quantize", choices=("nf4", "fp4"), default=None, help="pack linear layers while loading")
    p.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of dense weights"
    )
    p.add_argument("--device", type=str, default="auto", help="cpu, cuda, or auto")


def _json_flag(p: ArgumentParser) -> None:
    p.add_argument("--json", action="store_true", help="print one line of JSON instead of text")


def _dtype_device(a: Namespace) -> dict[str, Any]:
    return {"dtype": a.dtype, "device": a.device}


_COMMANDS: dict[str, tuple[Callable[[], ArgumentParser], Callable[[Namespace], None]]] = {
    "demo": (_demo_arguments, _demo),
    "train": (_train_arguments, _train),
    "data": (_data_arguments, _data),
    "verify": (_verify_arguments, _verify),
    "plan": (_plan_arguments, _plan),
    "sweep": (_sweep_arguments, _sweep),
    "eval": (_eval_arguments, _eval),
    "generate": (_generate_arguments, _generate),
    "quantize": (_quantize_arguments, _quantize),
    "merge": (_merge_arguments, _merge),
    "export": (_export_arguments, _export),
    "combine": (_combine_arguments, _combine),
}

if __name__ == "__main__":
    sys.exit(main())
