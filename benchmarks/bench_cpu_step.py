"""How fast is a whole QLoRA step on a CPU, and in how much memory, beside transformers + peft + bitsandbytes?

SmolLM2-135M-Instruct, NF4 with double quantization, LoRA r=16 on all linears, float32 compute, every token
learned, AdamW.  Each side runs in a process of its own (peak memory is that of the process), the two by turns;
a step is zero_grad, forward, backward, optimizer; the median step counts.

A shape that is not asked for keeps its row of results/cpu_step-cpu.json.

usage: python benchmarks/bench_cpu_step.py [--shape 8x64] [--rounds 2] [--steps 6] [--save]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch

from result import finish, kept_rows, resident_peak  # isort: skip  (beside this script)

SHAPES = ((8, 64), (1, 64), (2, 512))
R, ALPHA, LR = 16, 32, 1e-4


def ours(folder: str) -> Callable[[torch.Tensor], None]:
    import lora
    from lora.eval.nll import token_nll
    from lora.kernels.scratch import keep_pages
    from lora.render import Batch
    from lora.train.optim import AdamW

    model, _ = lora.load(folder, quantize="nf4", dtype="float32")
    lora.wrap(model, r=R, alpha=ALPHA).train()
    keep_pages()  # as fit does
    optimizer = AdamW(p for p in model.parameters() if p.requires_grad)

    def step(ids: torch.Tensor) -> None:
        B, S = ids.shape
        at = torch.arange(B * S).view(B, S)[:, :-1].reshape(-1)
        batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), at, ids.view(-1)[at + 1], at // S, tuple(range(B)))
        nll, _ = token_nll(model, batch)
        nll.mean().backward()
        optimizer.gather()
        optimizer.step(LR)
        optimizer.zero_grad()

    return step


def peer(folder: str) -> Callable[[torch.Tensor], None]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=four)
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)

    def step(ids: torch.Tensor) -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def one(side: str, folder: str, B: int, S: int, steps: int) -> None:
    """One side on one shape, in this process; prints a JSON line."""
    torch.manual_seed(0)
    step = {"ours": ours, "peer": peer}[side](folder)
    times = []
    for _ in range(steps + 1):
        ids = torch.randint(5, 49000, (B, S))
        start = time.perf_counter()
        step(ids)
        times.append(time.perf_counter() - start)
    peak = resident_peak() / 2**30
    print(json.dumps({"s": times[1:], "peak_gib": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side per shape")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each process")
    parser.add_argument("--shape", action="append", help="rows x tokens, such as 8x64; may be given again (all three)")
    parser.add_argument("--save", action="store_true", help="write results/cpu_step-cpu.json")
    parser.add_argument("--one", nargs=4, metavar=("SIDE", "FOLDER", "B", "S"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.one[0], args.one[1], int(args.one[2]), int(args.one[3]), args.steps)
        return
    from models import smollm2

    import lora

    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shape] if args.shape else list(SHAPES)
    rows = kept_rows("cpu_step", lambda row: (row["batch"], row["length"]) not in shapes) if args.save else []
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = lora.load(smollm2())
        lora.save_pretrained(model, tokenizer, f"{folder}/bf16")
        del model
        for B, S in shapes:
            seconds: dict[str, list[float]] = {"ours": [], "peer": []}
            peak = {"ours": 0.0, "peer": 0.0}
            for _ in range(args.rounds):
                for side in ("peer", "ours"):
                    command = [sys.executable, __file__, "--steps", str(args.steps)]
                    command += ["--one", side, f"{folder}/bf16", str(B), str(S)]
                    done = subprocess.run(
                        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
                    )
                    result = json.loads(done.stdout.splitlines()[-1])
                    seconds[side] += result["s"]
                    peak[side] = max(peak[side], result["peak_gib"])
            median = {side: statistics.median(s) for side, s in seconds.items()}
            row = {
                "batch": B,
                "length": S,
                "peer_tok_s": round(B * S / median["peer"], 1),
                "ours_tok_s": round(B * S / median["ours"], 1),
                "speed": round(median["peer"] / median["ours"], 3),
                "peer_peak_gib": round(peak["peer"], 3),
                "ours_peak_gib": round(peak["ours"], 3),
            }
            rows.append(row)
            print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    places = {shape: i for i, shape in enumerate(SHAPES)}
    rows.sort(key=lambda row: places.get((row["batch"], row["length"]), len(SHAPES)))
    finish("cpu_step", rows, args.save)


if __name__ == "__main__":
    main()
