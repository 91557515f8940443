"""What do six adapters cost, trained at once on one base, beside six runs one after the other?

Llama-3.2-1B's shape with random weights, NF4 with double quantization, LoRA on all linears, bfloat16, rows of 256
tokens all learned, 4 rows a batch and adapter: lora.fit six times, and lora.sweep once, as a user calls them.  Each is
run for two numbers of steps: the difference gives a step without what comes once (data, probe, recording a graph), and
the longer one is given whole.  A solo step is the median over the members.

What a person waits for is more: imports, loading, quantizing, compiling, recording, writing.  --commands times the
commands themselves on a bfloat16 checkpoint of that shape: `lora train` a member, some of them, and one `lora sweep`.

usage: python benchmarks/bench_sweep.py [--members 6] [--r 16] [--batch 4] [--length 256] [--steps 10 50]
       [--layers 16] [--eager] [--profile] [--commands STEPS [--alone N]] [--save]
       --r 8,16 gives half of the members each
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tokenizers
import torch
from result import finish
from tokenizers import decoders, models, pre_tokenizers
from torch import nn

import lora
from lora.models.llama import Llama, LlamaConfig
from lora.models.tokenizer import Tokenizer
from lora.quant.linear import Linear4bit
from lora.quant.weight import quantize_tensor
from lora.train import graph
from lora.train.members import Member
from lora.train.sweep import sweep

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def shape(args: argparse.Namespace) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=4 * args.hidden, num_layers=args.layers,
        num_heads=args.hidden // 64, num_kv_heads=args.hidden // 256, head_dim=64, max_length=8192, eps=1e-5,
        rope_theta=500000.0, tied=True,
    )  # fmt: skip


def base(config: LlamaConfig, dtype: torch.dtype) -> Llama:
    """Random weights, packed one layer at a time."""
    with torch.device("meta"):
        model = Llama(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            w = (torch.randn(module.weight.shape, device=DEVICE) * 0.02).to(dtype)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Linear4bit(quantize_tensor(w)))
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.is_meta:
                value = torch.randn(p.shape, device=DEVICE) * 0.02 if p.ndim > 1 else torch.ones(p.shape, device=DEVICE)
                setattr(module, name, nn.Parameter(value.to(dtype), requires_grad=False))
    model.tie()
    return model


def bytes_tokenizer() -> Tokenizer:
    """One token a byte."""
    vocab = {token: i for i, token in enumerate(["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    with tempfile.TemporaryDirectory() as folder:
        backend.save(str(Path(folder) / "tokenizer.json"))
        (Path(folder) / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
        return Tokenizer.from_directory(Path(folder))


def commands(args: argparse.Namespace, tokenizer: Tokenizer, rows: list[dict[str, str]]) -> dict[str, Any]:
    """Seconds of `lora train`, of args.alone members, and of `lora sweep` of them all, after one that compiles."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with torch.device(DEVICE):
            model = shape(args).build().to(torch.bfloat16)
        for p in model.parameters():
            nn.init.normal_(p, std=0.02) if p.ndim > 1 else nn.init.ones_(p)
        model.tie()
        lora.save_pretrained(model, tokenizer, folder / "base")
        del model
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

        def run(word: str, out: str, *more: str) -> float:
            line = [sys.executable, "-m", "lora", word, "--model", str(folder / "base"), "--learn", "all"]
            line += ["--data", str(folder / "rows.jsonl"), "--out", str(folder / out), "--batch", str(args.batch)]
            line += ["--max_steps", str(args.commands), "--progress", "false", *more]
            start = time.perf_counter()
            done = subprocess.run(line, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"lora {word} ended with {done.returncode}:\n{done.stderr[-2000:]}")
            return time.perf_counter() - start

        rates = [f"{1e-4 * (1 + i):g}" for i in range(args.members)]
        run("train", "warm", "--lr", rates[0], "--max_steps", "3", "--save_every", "0")
        alone = [run("train", f"solo{i}", "--lr", rates[i], "--save_every", "0") for i in range(args.alone)]
        together = run("sweep", "sweep", "--lr", ",".join(rates))
    one = statistics.median(alone)
    return {
        "commands": args.commands,
        "train_s": [round(s, 2) for s in alone],
        f"{args.members}_trains_s": round(one * args.members, 2),
        "sweep_s": round(together, 2),
        "ratio": round(together / (one * args.members), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=6)
    parser.add_argument("--r", default="16")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, nargs=2, default=[10, 50])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--profile", action="store_true", help="print where the steps' time on the GPU goes")
    parser.add_argument("--commands", type=int, default=0, help="also time commands of so many steps")
    parser.add_argument("--alone", type=int, default=3, help="how many `lora train` of them, for the median")
    parser.add_argument("--turns", type=int, default=2, help="how often all is measured")
    parser.add_argument("--save", action="store_true", help="write results/sweep-<cpu or gpu>.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    graph.RECORD = not args.eager
    model = base(shape(args), torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    tokenizer, draw = bytes_tokenizer(), random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz "
    rows = [{"text": "".join(draw.choices(letters, k=args.length - 1))} for _ in range(args.batch * max(args.steps))]
    ranks = [int(r) for r in args.r.split(",")]
    members = [Member(lr=1e-4 * (1 + i), r=ranks[i * len(ranks) // args.members], seed=i) for i in range(args.members)]
    options: dict[str, Any] = {"batch": args.batch, "progress": False, "learn": "all"}

    def wait() -> float:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def solo(m: Member, steps: int) -> float:
        torch.manual_seed(m.seed)
        start = wait()
        lora.wrap(model, r=m.r, alpha=m.alpha)
        lora.fit(model, tokenizer, rows, config=lora.TrainConfig(lr=m.lr, seed=m.seed, max_steps=steps, **options))
        took = wait() - start
        lora.detach(model, "default")
        return took

    def together(steps: int) -> float:
        start = wait()
        found = sweep(model, tokenizer, rows, members=members, config=lora.TrainConfig(max_steps=steps, **options))
        took = wait() - start
        assert not any(x.failed for x in found.results), found
        for m in members:
            lora.detach(model, m.name)
        return took

    solo(members[0], 3)  # compiles
    together(3)
    few, many = args.steps
    rows_out = []
    for turn in range(args.turns):
        alone = [(solo(m, few), solo(m, many)) for m in members]
        at_once = (together(few), together(many))
        one = statistics.median((b - a) / (many - few) for a, b in alone)
        all_at_once = (at_once[1] - at_once[0]) / (many - few)
        tokens = args.batch * args.length * args.members
        rows_out.append(
            {
                "turn": turn,
                "solo_step_ms": round(1e3 * one, 2),
                "sweep_step_ms": round(1e3 * all_at_once, 2),
                "step_ratio": round(all_at_once / (args.members * one), 3),
                "sweep_tok_s": round(tokens / all_at_once),
                f"solo_{many}_s": round(sum(b for _, b in alone), 2),
                f"sweep_{many}_s": round(at_once[1], 2),
                "whole_ratio": round(at_once[1] / sum(b for _, b in alone), 3),
                "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if DEVICE == "cuda" else None,
            }
        )
        print(rows_out[-1], flush=True)
    if args.profile:
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as record

        for run in (lambda: together(12), lambda: solo(members[0], 12)):
            with record(activities=[ProfilerActivity.CUDA]) as p:
                run()
            print(p.key_averages().table(sort_by="cuda_time_total", row_limit=32, max_name_column_width=64))
    if args.commands:
        del model
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        rows_out.append(commands(args, tokenizer, rows))
        print(rows_out[-1], flush=True)
    finish("sweep", [vars(args) | {"device": DEVICE}, *rows_out], args.save)


if __name__ == "__main__":
    main()
