"""How fast is one QLoRA training step on a GPU, and in how much memory?

Llama-3.1-8B's shape with random weights, NF4 with double quantization, LoRA r=16 on all linears, bfloat16, every token
learned, AdamW with 32-bit states.  Forward, backward, clipping and the optimizer's step are timed; median of the
steps after a warm-up; peak of torch.cuda.max_memory_allocated.

usage: python benchmarks/bench_step.py [--case BATCHxLENGTH:KEEP ...]  KEEP: of fused.KEEPS, or a budget such as 36GiB
       [--layers 32] [--shape 8b|70b] [--profile] [--save]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from bench_decode import VOCAB, ours
from result import finish
from timing import copy_gb_s, matmul_tflop_s

from lora.models.budget import parse_bytes
from lora.models.llama import Llama
from lora.render import Batch, Example, collate
from lora.train import graph
from lora.train.graph import Graphs
from lora.train.optim import AdamW


def measure(model: Llama, optimizer: AdamW, batch: int, length: int, keep: str, steps: int, profile: bool) -> dict:
    """One row of the table."""
    keeping = model.keeping
    keeping.keep, keeping.chosen, keeping.budget = keep, (0, []), None
    if keep.endswith("GiB"):
        keeping.keep, keeping.budget = None, parse_bytes(keep)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    graphs = Graphs(model)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps + 3):
        rows = torch.randint(0, VOCAB - 256, (batch, length), generator=generator).tolist()
        learned = (False,) + (True,) * (length - 1)
        data = collate([Example(tuple(row), learned, i) for i, row in enumerate(rows)]).to(torch.device("cuda"))
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = one(graphs, optimizer, data)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    if profile:
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as record

        with record(activities=[ProfilerActivity.CUDA]) as p:
            one(graphs, optimizer, data)
            torch.cuda.synchronize()
        print(p.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=70))
    took = statistics.median(seconds[3:])
    return {
        "batch": batch, "length": length, "keep": keep, "ms": round(1e3 * took, 1),
        "tok_s": round(batch * length / took), "peak_GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "base_GiB": round(base / 2**30, 2), "blocks_whole": keeping.chosen[1].count("all"),
        "loss": round(loss.item(), 3),
    }  # fmt: skip


def one(graphs: Graphs, optimizer: AdamW, data: Batch) -> torch.Tensor:
    loss, _ = graphs.run(data, data.target.numel())
    optimizer.gather()
    optimizer.clip(1.0)
    optimizer.step(1e-4, zero=True)
    return loss


def alone(case: str, words: list[str]) -> list[str]:
    """The rows that this script prints for one case."""
    rest = [w for w in words if ":" not in w and w not in ("--case", "--save")]
    printed = subprocess.run([sys.executable, __file__, *rest, "--case", case], stdout=subprocess.PIPE, text=True)
    last = json.loads(printed.stdout.strip().splitlines()[-1])
    print(*last["rows"], sep="\n", flush=True)
    return [json.dumps(row) for row in last["rows"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", default=["4x2048:36GiB", "4x2048:8.2GiB", "1x8192:8.2GiB", "1x512:36GiB"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shape", choices=("8b", "70b"), default="8b")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    if len(args.case) > 1:  # each in a process of its own: buffers that one leaves behind are not another's memory
        rows = [json.loads(line) for case in args.case for line in alone(case, sys.argv[1:])]
        finish(Path(__file__).stem.removeprefix("bench_"), rows, args.save)
        return
    rows = [{"copy_GB_s": round(copy_gb_s()), "matmul_TFLOP_s": round(matmul_tflop_s())}]
    print(rows[0], flush=True)
    torch.cuda.empty_cache()
    graph.RECORD = not args.eager
    model = (ours(80, 8192, 28672, 64) if args.shape == "70b" else ours(args.layers)).requires_grad_(False).train()
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith((".a", ".b")))
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
    for case in args.case:
        size, _, keep = case.partition(":")
        batch, length = (int(n) for n in size.split("x"))
        try:
            row = measure(model, optimizer, batch, length, keep or "all", args.steps, args.profile)
        except torch.OutOfMemoryError as e:
            row = {"case": case, "error": str(e).split(".")[0]}
            optimizer.zero_grad()
        rows.append(row)
        print(row, flush=True)
    finish(Path(__file__).stem.removeprefix("bench_"), rows, args.save)


if __name__ == "__main__":
    main()
