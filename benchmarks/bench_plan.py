"""Does lora.plan know the peak of a step, and its time, before anything is loaded?

For each case the plan is made from config.json alone; then the model stands on the GPU, random weights in place,
trains a few steps, and torch.cuda.max_memory_allocated and the median time are set beside what was predicted.
The aim is a peak within 3 %.

usage: python benchmarks/bench_plan.py [--only SHAPE] [--save]
"""

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path

import torch
from models import SHAPES, at_random, write_config
from result import finish

import lora
from lora.kernels.scratch import mine
from lora.models.budget import parse_bytes
from lora.train.ceilings import Card, measure
from lora.train.dryrun import even_batch
from lora.train.graph import Graphs
from lora.train.optim import AdamW

# shape, method, batch, length, r, budget or a word of fused.KEEPS or nothing
CASES = (
    ("8b", "qlora", 4, 2048, 16, "36GiB"),
    ("8b", "qlora", 4, 2048, 16, "16GiB"),
    ("8b", "qlora", 4, 2048, 16, "8.2GiB"),
    ("8b", "qlora", 1, 8192, 16, "8.2GiB"),
    ("8b", "qlora", 1, 512, 16, ""),
    ("8b", "qlora", 8, 2048, 64, "input"),
    ("8b", "lora", 4, 2048, 16, "45GiB"),
    ("8b", "lora", 4, 2048, 16, "20GiB"),
    ("1b", "qlora", 8, 2048, 16, ""),
    ("1b", "qlora", 8, 2048, 16, "5GiB"),
    ("1b", "lora", 8, 2048, 128, "8GiB"),
    ("1b", "lora", 2, 1024, 16, ""),
    ("1b", "full", 2, 2048, 16, ""),
    ("3b", "qlora", 4, 2048, 16, ""),
    ("3b", "qlora", 2, 8192, 32, "9GiB"),
    ("3b", "lora", 2, 4096, 16, "14GiB"),
    ("3b", "lora", 1, 512, 16, ""),
)


def run(shape: str, method: str, batch: int, length: int, r: int, keep: str, card: Card) -> dict:
    """One row: predicted and measured."""
    config = SHAPES[shape]
    budget = keep if keep.endswith("GiB") else None
    word = keep if keep and not budget else None
    with tempfile.TemporaryDirectory() as folder:
        write_config(config, Path(folder))
        plan = lora.plan(
            folder, batch, length, r, method=method, budget=budget, device="cuda", card=card, keep=word
        )  # fmt: skip
    model = at_random(config, method, r)
    model.keeping.keep = word
    model.keeping.budget = parse_bytes(budget) if budget else None
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    data = even_batch(batch, length).to(torch.device("cuda"))
    graphs, seconds = Graphs(model), []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        graphs.run(data, data.target.numel())
        optimizer.gather()
        optimizer.clip(1.0)
        optimizer.step(1e-4, zero=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak, took = torch.cuda.max_memory_allocated(), statistics.median(seconds[2:])
    there = [name for name in ("4-bit weights", "dense weights", "trained weights, float32", "gradients")]
    predicted_base = sum(plan.parts[name] for name in (*there, "optimizer states"))
    chosen = model.keeping.chosen.keep or [word or ""] * config.num_layers
    mib = 2**20
    return {
        "case": f"{shape} {method} {batch}x{length} r{r} {keep}".strip(), "by": plan.by,
        "predicted_GiB": round(plan.peak / 2**30, 3), "measured_GiB": round(peak / 2**30, 3),
        "off_%": round(100 * (plan.peak / peak - 1), 2), "moment": plan.moment,
        "base_MiB": [round(predicted_base / mib), round(base / mib)],
        "stays_MiB": [
            round((plan.parts.get("reused buffers", 0) + plan.parts["cuBLAS"]) / mib),
            round((torch.cuda.memory_allocated() - base) / mib),
        ],
        "reserved_GiB": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "whole": [plan.keep.count("all"), chosen.count("all")], "graph": [plan.recorded, bool(graphs.graphs)],
        "predicted_ms": round(1e3 * plan.seconds, 1), "measured_ms": round(1e3 * took, 1),
        "time_off_%": round(100 * (plan.seconds / took - 1), 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases that begin so")
    parser.add_argument("--save", action="store_true", help="write results/plan-gpu.json")
    args = parser.parse_args()
    card = measure(torch.device("cuda"))
    torch._C._cuda_clearCublasWorkspaces()
    rows: list[dict] = [card._asdict()]
    print(rows[0], flush=True)
    for case in CASES:
        if not " ".join(map(str, case)).startswith(args.only):
            continue
        try:
            row = run(*case, card)
        except Exception as e:  # one case that fails leaves the others
            row = {"case": " ".join(map(str, case)), "error": f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"}
        mine().clear()
        torch._C._cuda_clearCublasWorkspaces()  # what a case leaves behind is not the next one's
        gc.collect()
        torch.cuda.empty_cache()
        rows.append(row)
        print(row, flush=True)
    off = [abs(row["off_%"]) for row in rows if "off_%" in row]
    print(f"{len(off)} cases, {sum(x <= 3 for x in off)} within 3 %, largest {max(off, default=0):.2f} %")
    finish("plan", rows, args.save)


if __name__ == "__main__":
    main()
