"""What do products in 8 bits cost in loss?  QLoRA runs with compute="bf16" and compute="fp8" beside each other.

The same base in NF4, the same batches in the same order and the same first adapter a seed; r 16 on all linears.  The
held-out loss is measured in bfloat16 for both, as the adapter would be used.  MODEL is a folder or .gguf file; without
one, a Llama of 94 M parameters over bytes is trained first, on the spot, on PRETRAIN, then tuned on TEXT, both plain
text.

usage: python benchmarks/bench_fp8_parity.py --text TEXT (--model MODEL | --pretrain PRETRAIN) [--steps 300]
       [--seeds 0 1 2] [--save]
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from result import finish

import lora
from lora.eval.nll import token_nll
from lora.models.llama import Llama, LlamaConfig
from lora.render import Batch, Example, collate
from lora.train.graph import Graphs
from lora.train.optim import AdamW
from lora.train.plot import write_curves
from lora.train.schedule import learning_rate

LENGTH, BATCH, LR, R, ALPHA, HELD = 512, 8, 3e-4, 16, 32, 64
STEPS_BEFORE, BATCH_BEFORE, LR_BEFORE = 300, 16, 6e-4  # of the base that is trained on the spot
GPU = torch.device("cuda")


def rows_of(ids: list[int]) -> torch.Tensor:
    """Rows (n, LENGTH) of a text."""
    n = len(ids) // LENGTH
    return torch.tensor(ids[: n * LENGTH]).view(n, LENGTH)


def batch_of(rows: torch.Tensor) -> Batch:
    learned = (False,) + (True,) * (LENGTH - 1)
    return collate([Example(tuple(row), learned, i) for i, row in enumerate(rows.tolist())]).to(GPU)


def train(model: Llama, rows: torch.Tensor, steps: int, batch: int, lr: float, seed: int) -> list[float]:
    """The loss of each step; batches are drawn by `seed`."""
    optimizer, graphs = AdamW([p for p in model.parameters() if p.requires_grad]), Graphs(model)
    draw, losses = torch.Generator().manual_seed(seed), []
    for step in range(steps):
        data = batch_of(rows[torch.randint(0, len(rows), (batch,), generator=draw)])
        loss, _ = graphs.run(data, data.target.numel())
        losses.append(loss.clone())
        optimizer.gather()
        optimizer.clip(1.0)
        optimizer.step(learning_rate(step, steps, lr, 0.03, "cosine", 0.2), zero=True)
    return torch.stack(losses).tolist()


def held_out(model: Llama, rows: torch.Tensor) -> float:
    """Nats a token."""
    model.eval()
    with torch.no_grad():
        parts = [token_nll(model, batch_of(part))[0] for part in rows.split(BATCH)]
    model.train()
    return float(torch.cat(parts).double().mean())


def small(text: Path) -> Llama:
    """A base trained on the bytes of a text: random weights have neither outliers nor structure."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=1024, intermediate_size=2816, num_layers=8, num_heads=16, num_kv_heads=8,
        head_dim=64, max_length=LENGTH,
    )  # fmt: skip
    model = config.build()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02) if p.ndim > 1 else torch.nn.init.ones_(p)
    torch.set_float32_matmul_precision("high")
    model = model.to(GPU).train()
    losses = train(model, rows_of(list(text.read_bytes())), STEPS_BEFORE, BATCH_BEFORE, LR_BEFORE, seed=0)
    print({"pretrained": [round(loss, 3) for loss in losses[:: len(losses) // 8]]}, flush=True)
    return model.bfloat16().requires_grad_(False)


def tune(model: Llama, compute: str, seed: int, rows: torch.Tensor, held: torch.Tensor, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    lora.wrap(model, r=R, alpha=ALPHA)
    model.keeping.compute, model.keeping.keep = compute, "all"
    model.train()
    losses = train(model, rows, steps, BATCH, LR, seed)
    row = {
        "compute": compute, "seed": seed, "last_50": round(statistics.fmean(losses[-50:]), 4),
        "held_out": round(held_out(model, held), 4), "losses": [round(x, 4) for x in losses],
    }  # fmt: skip
    print({k: v for k, v in row.items() if k != "losses"}, model.keeping.said, flush=True)
    lora.detach(model, "default")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--pretrain", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    if (args.model is None) == (args.pretrain is None):
        parser.error("give --model, or --pretrain for a base that is trained here: one of them")
    if args.model is not None:
        model, tokenizer = lora.load(args.model, quantize="nf4", dtype="bfloat16", device="cuda")
        rows = rows_of(tokenizer.encode(args.text.read_text(encoding="utf-8")))
    else:
        model, rows = lora.quantize(small(args.pretrain), "nf4"), rows_of(list(args.text.read_bytes()))
    model.requires_grad_(False)
    rows, held = rows[:-HELD], rows[-HELD:]
    base = held_out(model, held)
    print({"rows": len(rows), "held_out_of_the_base": round(base, 4)}, flush=True)
    name = args.model.name if args.model is not None else "94 M over bytes, trained on the spot"
    head, runs = {"base": name, "held_out_of_the_base": round(base, 4)}, []
    for seed in args.seeds:
        runs += [tune(model, c, seed, rows, held, args.steps) for c in ("bf16", "fp8")]
        finish("fp8_parity", [head, *runs], args.save)  # a run that is cut short loses one seed
    by = {c: [r for r in runs if r["compute"] == c] for c in ("bf16", "fp8")}
    for key in ("last_50", "held_out"):
        a, b = ([r[key] for r in by[c]] for c in ("bf16", "fp8"))
        gap = [y - x for x, y in zip(a, b, strict=True)]
        spread = round(max(a) - min(a), 4)
        print({key: {"bf16": a, "fp8": b, "fp8_minus_bf16": [round(g, 4) for g in gap], "spread_of_bf16": spread}})
    if args.save:
        smooth = {
            f"{r['compute']}, seed {r['seed']}": [
                statistics.fmean(r["losses"][max(0, i - 9) : i + 1]) for i in range(len(r["losses"]))
            ]
            for r in runs
        }
        write_curves(Path(__file__).parent / "results" / "fp8_parity.png", smooth)


if __name__ == "__main__":
    main()
