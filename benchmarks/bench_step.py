"""How fast is one QLoRA training step on a GPU, and in how much memory, beside its rivals in the same run?

Llama's shapes with random weights, NF4 with double quantization, LoRA on all linears, bfloat16, every token learned,
AdamW with 32-bit states.  Forward, backward, clipping and the optimizer's step are timed; median of the steps after a
warm-up; peak of torch.cuda.max_memory_allocated.  One model serves all cases; what a case leaves behind is cleared.
Rivals run in processes of their own.

usage: python benchmarks/bench_step.py [--case BATCHxLENGTH:KEEP[:fp8] ...]
       KEEP: of fused.KEEPS, or a budget such as 36GiB; fp8: the frozen base's products in 8 bits
       [--shape 8b|70b|1b|3b] [--layers N] [--r 16] [--eager] [--profile] [--save]
       [--peer hf unsloth]     the same sizes by rivals (8b only), the fastest of their settings within the budget;
                               hf at the first size alone
       [--through fit]         by lora.fit on packed rows instead, and what that keeps of the bare step's tokens/s
       [--longest [TOKENS]]    the longest row of batch 1 that trains, by bisection, or whether this one does; --layers
                               with --ballast leaves blocks out of the time and their bytes in memory
"""

import argparse
import dataclasses
import gc
import math
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from models import SHAPES, at_random
from result import finish, keep, peer_rows
from timing import copy_gb_s, matmul_tflop_s

import lora
from lora.kernels.scratch import mine
from lora.models.budget import CUBLAS, free_bytes, keep_on_gpu, kept_bytes, parse_bytes
from lora.models.host import Host, host_room
from lora.models.llama import Llama
from lora.render import Batch
from lora.train import graph
from lora.train.dryrun import even_batch
from lora.train.graph import Graphs
from lora.train.optim import AdamW

CASES = [
    "4x2048:36GiB", "4x2048:36GiB:fp8", "4x2048:8.2GiB", "4x2048:8.2GiB:fp8", "1x512:36GiB", "1x8192:8.2GiB",
]  # fmt: skip
NONE_FROM = 16 * 2**30  # of a budget, from which on rivals are tried without checkpointing too
SLACK = 1.02  # of a budget that a rival may take: Unsloth's own figure for 36 GiB is 36.3


class Case(NamedTuple):
    batch: int
    length: int
    keep: str
    compute: Any  # bf16 or fp8

    @classmethod
    def of(cls, text: str) -> "Case":
        size, keep, compute, *_ = [*text.split(":"), "", ""]
        batch, length = (int(n) for n in size.split("x"))
        return cls(batch, length, keep or "all", compute or "bf16")

    @property
    def budget(self) -> int | None:
        return parse_bytes(self.keep) if self.keep.endswith("GiB") else None


def model_of(args: argparse.Namespace) -> Llama:
    """The model on the GPU."""
    config = SHAPES[args.shape]
    return at_random(dataclasses.replace(config, num_layers=args.layers or config.num_layers), r=args.r)


def optimizer_of(model: Llama) -> AdamW:
    return AdamW([p for p in model.parameters() if p.requires_grad])


def clear(model: Llama) -> None:
    """Gives back what steps leave behind: reused buffers, pinned memory, libraries' workspaces, gradients."""
    model.keeping.forget()
    model.keeping.host = Host()
    mine().clear()
    model.zero_grad(set_to_none=True)
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def measure(model: Llama, case: Case, steps: int, profile: bool) -> dict:
    """One row of the table."""
    (batch, length, keep, compute), keeping = case, model.keeping
    keeping.compute, keeping.budget = compute, case.budget
    keeping.keep = None if case.budget else keep
    clear(model)
    optimizer = optimizer_of(model)
    base = torch.cuda.memory_allocated()
    seconds, trained = [], [p for p in model.parameters() if p.requires_grad]
    graphs = Graphs(model, lambda: [p.grad for p in trained])  # as lora.fit has it
    for _ in range(steps + 3):
        data = batch_of(model, batch, length)
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
        "who": "ours", "batch": batch, "length": length, "keep": keep, "compute": compute,
        "ms": round(1e3 * took, 1), "tok_s": round(batch * length / took),
        "peak_GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2), "base_GiB": round(base / 2**30, 2),
        "blocks_whole": keeping.chosen.keep.count("all"), "blocks_decoded": keeping.decoded.blocks,
        "graph": bool(graphs.graphs), "loss": round(finite(loss), 3),
    }  # fmt: skip


def finite(loss: torch.Tensor) -> float:
    """Its value.  Numbers that are none take less power to multiply, and so less time: they are no measurement."""
    if not math.isfinite(loss.item()):
        raise ArithmeticError(f"the loss is {loss.item()}")
    return loss.item()


def batch_of(model: Llama, batch: int, length: int) -> Batch:
    """Rows of random tokens, all learned."""
    data = even_batch(batch, length).to(torch.device("cuda"))
    data.ids.random_(0, model.config.vocab_size - 256)
    data.target.copy_(data.ids.view(-1)[data.at + 1])
    return data


def one(graphs: Graphs, optimizer: AdamW, data: Batch) -> torch.Tensor:
    loss, _ = graphs.run(data, data.target.numel())
    optimizer.gather()
    optimizer.clip(1.0)
    optimizer.step(1e-4, zero=True)
    return loss


# ---- through lora.fit ----
def through_fit(model: Llama, case: Case, steps: int, folder: Path) -> dict:
    """lora.fit on texts of 100 to 1,000 tokens packed into rows of `length`; its own tokens/s, median of the steps."""
    from tokenizers import Tokenizer as Words
    from tokenizers import models, pre_tokenizers

    from lora.models.tokenizer import Tokenizer

    batch, length, keep, _ = case
    vocab = {"</s>": 0} | {f"w{i}": i for i in range(1, 2000)}
    words = Words(models.WordLevel(vocab, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    while sum(row["n"] for row in rows) < 1.02 * (steps + 5) * batch * length:
        n = int(torch.randint(100, 1000, (), generator=generator))
        text = " ".join(f"w{i}" for i in torch.randint(1, 2000, (n,), generator=generator).tolist())
        rows.append({"prompt": "", "completion": text, "n": n})
    texts = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]
    config = lora.TrainConfig(
        batch=batch, pack=True, max_length=length, max_steps=steps + 4, learn="all", probe=False, progress=False,
        budget=keep if case.budget else None, lr=1e-4, compute=case.compute,
    )  # fmt: skip
    clear(model)
    run = lora.fit(model, Tokenizer.from_directory(folder), texts, config=config)
    wall = [h["tokens_per_second"] for h in run.history if "tokens_per_second" in h][4:]
    return {
        "who": "lora.fit", "batch": batch, "length": length, "keep": keep, "tok_s": round(statistics.median(wall)),
        "of_wall_tok_s": round(run.tokens / run.history[-1]["train_runtime"]),
        "peak_GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }  # fmt: skip


# ---- the longest row ----
def longest(args: argparse.Namespace) -> list[dict]:
    """Rows for each length tried, the last the longest that trained."""
    model = model_of(args)
    optimizer = optimizer_of(model)
    missing = SHAPES[args.shape].num_layers - model.config.num_layers
    kept = []
    if args.ballast and missing:  # the bytes of the blocks that are left out: weights, factors and their states
        one_block = sum(t.numel() * t.element_size() for t in model.model.layers[0].buffers())
        trained = optimizer.w.numel() // model.config.num_layers
        kept = [torch.empty(missing * (one_block + 16 * trained), dtype=torch.uint8, device="cuda")]
    rows: list[dict] = []

    def trains(tokens: int) -> bool:
        clear(model)
        states = []
        if kept:  # blocks keep what all of them together could, and what those left out would keep takes memory too
            w = model.keeping.widths._replace(blocks=missing + model.config.num_layers)
            words = keep_on_gpu(w, tokens, 2, free_bytes(torch.device("cuda")) - 2 * CUBLAS, host=host_room())
            model.keeping.keep = words[missing:]
            size = sum(kept_bytes(w, word, tokens, 2) for word in words[:missing])
            states = [torch.empty(size, dtype=torch.uint8, device="cuda")]
        start = time.perf_counter()
        try:
            loss = one(Graphs(model), optimizer, batch_of(model, 1, tokens))
            torch.cuda.synchronize()
            found: dict[str, Any] = {"loss": round(loss.item(), 3), "s": round(time.perf_counter() - start, 1)}
        except (torch.OutOfMemoryError, RuntimeError) as e:
            found = {"error": f"{type(e).__name__}: {str(e).splitlines()[0][:160]}"}
            optimizer.zero_grad()
        row = {
            "who": "ours", "longest": tokens, "r": args.r, "layers": model.config.num_layers, "ballast": bool(kept),
            "keep": sorted(set(model.keeping.keep or model.keeping.chosen.keep)), **found,
            "peak_GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "reserved_GiB": round(torch.cuda.max_memory_reserved() / 2**30, 2),
            "host_GiB": round(model.keeping.host.nbytes() / 2**30, 2),
        }  # fmt: skip
        del states
        rows.append(row)
        print(row, flush=True)
        return "error" not in row

    if args.longest > 1:
        trains(args.longest)
        return rows
    low, high = 2**14, None
    while high is None or high - low > 4096:
        tokens = 2 * low if high is None else (low + high) // 2
        if trains(tokens):
            low = tokens
        else:
            high = tokens
    return rows


# ---- rivals ----
def roomy() -> str | None:
    """Where a checkpoint of 6 GB is written quickest: in memory, where there is enough of that."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > 16 * 2**30 else None


def rivals(kind: str, write: bool, cases: list[Case], folder: str, r: int, layers: int) -> list[dict]:
    """The rows of one rival; hf can `write` what unsloth loads into the folder, and takes the first size alone."""
    sizes = dict.fromkeys(f"{c.batch}x{c.length}:offload" for c in cases)
    if kind == "hf":
        sizes = dict.fromkeys(list(sizes)[:1])
    else:
        sizes |= dict.fromkeys(f"{c.batch}x{c.length}:none" for c in cases if (c.budget or 0) >= NONE_FROM)
    more = ["--write"] if write else []
    return peer_rows("peer_step.py", kind, folder, *sizes, "--r", str(r), "--layers", str(layers), *more)


def beside(ours: list[dict], theirs: list[dict]) -> list[dict]:
    """For each case of ours and each rival: tokens/s over the rival's fastest setting within the budget."""
    table = []
    for row in ours:
        if "tok_s" not in row or row["who"] != "ours":
            continue
        case = Case(row["batch"], row["length"], row["keep"], row["compute"])
        limit = SLACK * case.budget / 2**30 if case.budget else float("inf")
        for who in dict.fromkeys(r["who"] for r in theirs):
            same = [
                r
                for r in theirs
                if r["who"] == who and (r.get("batch"), r.get("length")) == (row["batch"], row["length"])
            ]
            # transformers never fits a small budget: it is compared as it is
            fit = [r for r in same if "tok_s" in r and (who == "hf" or r["peak_GiB"] <= limit)]
            if fit:
                best = max(fit, key=lambda r: r["tok_s"])
                table.append(
                    {
                        "case": f"{case.batch}x{case.length}:{case.keep}:{case.compute}",
                        "rival": who,
                        "speed": round(row["tok_s"] / best["tok_s"], 2),
                        "memory": round(row["peak_GiB"] / best["peak_GiB"], 2),
                        "ours": [row["tok_s"], row["peak_GiB"]],
                        "theirs": [best["tok_s"], best["peak_GiB"]],
                    }
                )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", default=CASES)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="8b")
    parser.add_argument("--layers", type=int, default=0, help="0: the shape's own")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--peer", nargs="+", choices=("hf", "unsloth"), default=[])
    parser.add_argument("--through", choices=("step", "fit"), default="step")
    parser.add_argument("--longest", type=int, nargs="?", const=1, default=0)
    parser.add_argument("--ballast", action="store_true", help="with --layers: memory of the blocks left out")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    apart = [args.shape] * (args.shape != "8b") + ["longest"] * bool(args.longest) + ["fit"] * (args.through == "fit")
    name = "_".join([Path(__file__).stem.removeprefix("bench_"), *apart])
    graph.RECORD = not args.eager
    rows: list[dict] = []
    theirs: list[dict] = []

    def add(some: list[dict], new: list[dict]) -> None:
        """Rows are printed as they come, and kept: a long run that is cut off loses one part."""
        for row in new if some is rows else []:
            print(row, flush=True)
        some += new
        if args.save:
            keep(name, rows + theirs + beside(rows, theirs))

    add(rows, [{"copy_GB_s": round(copy_gb_s()), "matmul_TFLOP_s": round(matmul_tflop_s())}])
    torch.cuda.empty_cache()
    if args.longest:
        finish(name, rows + longest(args), args.save)
        return
    model = model_of(args)
    factors = [p for p in model.parameters() if p.requires_grad]
    fresh = [p.detach().cpu() for p in factors]
    for text in args.case:
        case = Case.of(text)
        torch._foreach_copy_([p.detach() for p in factors], fresh)  # no case trains on where another ended
        try:
            add(rows, [measure(model, case, args.steps, args.profile)])
            if args.through == "fit":
                with tempfile.TemporaryDirectory() as folder:
                    again = through_fit(model, case, max(12, args.steps), Path(folder))
                add(rows, [again | {"of_the_step": round(again["tok_s"] / rows[-1]["tok_s"], 3)}])
        except (torch.OutOfMemoryError, ArithmeticError) as e:
            add(rows, [{"case": text, "error": str(e).split(".")[0]}])
        clear(model)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory(dir=roomy()) as folder:
        for kind in ("hf", "unsloth"):  # hf writes what unsloth loads
            write = kind == "hf" and "unsloth" in args.peer
            if kind in args.peer or write:
                cases = [Case.of(case) for case in args.case] if kind in args.peer else []
                add(theirs, rivals(kind, write, cases, folder, args.r, args.layers or 32))
    table = beside(rows, theirs)
    print(*table, sep="\n")
    finish(name, rows + theirs + table, args.save)


if __name__ == "__main__":
    main()
