"""Commands that read models and adapters: to measure them, to ask them, to write them in another form."""

import json
from pathlib import Path

from jsonargparse import Namespace

import lora
from lora.combine import METHODS
from lora.commands.flags import ArgumentParser, Commands, columns_flag, dtype_device, json_flag, model_flags, numbers
from lora.eval.evaluate import METRICS
from lora.export import TARGETS
from lora.files import refuse_filled
from lora.quant.rounding import ROUNDINGS
from lora.requantize import LEAST
from lora.rows import read_rows
from lora.sources import SUFFIXES

PROBE = "The capital of France is Paris, and 12 + 30 = 42."


# ---- eval ----
def _eval_arguments() -> ArgumentParser:
    p = ArgumentParser(description="Measure a model on rows; with an adapter, the base against the tuned, paired.")
    model_flags(p)
    p.add_argument("--adapter", type=str | None, default=None, help="adapter folder; compared with the base")
    p.add_argument("--data", type=str, required=True, help=f"rows: {', '.join(SUFFIXES)}")
    columns_flag(p)
    p.add_argument("--metrics", type=str, default="perplexity,exact_match", help=f"some of {', '.join(METRICS)}")
    p.add_argument("--max_new_tokens", type=int, default=64, help="longest answer")
    p.add_argument("--batch", type=int, default=16, help="rows that run together")
    p.add_argument("--out", type=str | None, default=None, help="report.html, or .json with every row")
    json_flag(p)
    return p


def _eval(a: Namespace) -> None:
    from lora.eval.report import write_report

    metrics = [m.strip() for m in a.metrics.split(",") if m.strip()]
    if a.out and Path(a.out).suffix not in (".html", ".json"):
        raise ValueError(f"--out {a.out}: a report ends in .html or .json")
    model, tokenizer = lora.load(a.model, quantize=a.quantize, **dtype_device(a))
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
    model_flags(p)
    p.add_argument("--adapter", type=str | None, default=None, help="adapter folder")
    p.add_argument("--prompt", type=str, required=True, help="the text to continue")
    p.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    p.add_argument("--max_new_tokens", type=int, default=64, help="longest answer")
    p.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token each time")
    p.add_argument("--top_k", type=int, default=0, help="draw among the k likeliest; 0 for all")
    p.add_argument("--top_p", type=float, default=1.0, help="draw among the likeliest that together reach p")
    p.add_argument("--seed", type=int | None, default=None, help="of the draws")
    json_flag(p)
    return p


def _generate(a: Namespace) -> None:
    model, tokenizer = lora.load(a.model, quantize=a.quantize, **dtype_device(a))
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
    json_flag(p)
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
    model_flags(p)
    p.add_argument("--into", choices=("dense", "4bit"), default="dense", help="4bit needs --quantize")
    p.add_argument("--rounding", choices=ROUNDINGS, default="stochastic", help="of weights that stay in 4 bits")
    p.add_argument("--at_least", type=float, default=LEAST, help="share of the update that must survive in 4 bits")
    p.add_argument("--adapter", type=str, required=True, help="adapter folder")
    p.add_argument("--out", type=str, required=True, help="folder to write; must not hold anything")
    json_flag(p)
    return p


def _merge(a: Namespace) -> None:
    import torch

    refuse_filled(Path(a.out))
    model, tokenizer = lora.load(a.model, quantize=a.quantize, **dtype_device(a))
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
        written, _ = lora.load(a.out, **dtype_device(a))
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
    json_flag(p)
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
    json_flag(p)
    return p


def _combine(a: Namespace) -> None:
    weights = numbers(a, "weights", float) if a.weights else None
    made = lora.combine(a.adapters, a.out, weights, a.method, a.rank)
    print(json.dumps({"out": a.out, "r": made.r, "error": made.error, "errors": made.errors}) if a.json else made)


COMMANDS: Commands = {
    "eval": (_eval_arguments, _eval),
    "generate": (_generate_arguments, _generate),
    "quantize": (_quantize_arguments, _quantize),
    "merge": (_merge_arguments, _merge),
    "export": (_export_arguments, _export),
    "combine": (_combine_arguments, _combine),
}
