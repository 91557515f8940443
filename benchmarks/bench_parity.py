"""Does the fast path train as the plain path does?

One adapter, the same batches in the same order, 200 steps, three times: in float32 by the plain path (the truth), in
bfloat16 by the plain path (whose distance from the truth is bfloat16's noise) and in bfloat16 by the fused blocks.
Before the first step and after the last, gradients of both bfloat16 paths against the same model in float64.
Bars: the fused curve's distance is that of the plain one, and the gradients' error, all of them together, is at most
1.1 times the plain one's.

usage: python benchmarks/bench_parity.py TEXT [--model PATH] [--steps 200] [--out FOLDER]
       TEXT to train on; PATH a model, e.g. SmolLM2's GGUF; without one, a model of SmolLM2's shape is made: from random
       weights, by full fine-tuning on TEXT read byte by byte for --pretrain steps
       python benchmarks/bench_parity.py --draw FOLDER      the picture again, where matplotlib is installed
"""

import argparse
import copy
import json
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from result import device_name
from torch import Tensor, nn

import lora
from lora.eval.nll import token_nll
from lora.models import llama
from lora.models.llama import Llama, LlamaConfig
from lora.render import Batch, Example, collate
from lora.train import graph
from lora.train.graph import Graphs
from lora.train.optim import AdamW
from lora.train.plot import write_curves

SMOLLM2 = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
    max_length=2048, eps=1e-5, rope_theta=100000.0, tied=True,
)  # fmt: skip
CUDA = torch.device("cuda")
PROBES = 16  # batches whose gradients are compared
SHOWN = 6  # tensors of each path, those with the largest errors


def batches(ids: list[int], steps: int, rows: int, length: int, seed: int) -> list[Batch]:
    """Rows from random places of the text, every token learned."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - length, (rows,), generator=draw).tolist()
        flags = (False,) + (True,) * (length - 1)
        made.append(collate([Example(tuple(ids[s : s + length]), flags, i) for i, s in enumerate(starts)]).to(CUDA))
    return made


def recordable(model: Any, batch: Batch) -> bool:
    """Graphs of the plain path too, or its launches would take the day."""
    return hasattr(model, "keeping")


@contextmanager
def took(model: Llama, fused: bool | None) -> Iterator[None]:
    """Ends the program where the forward inside took the other path than it should."""
    model.keeping.recordable = False  # the fused path alone sets it
    yield
    if fused is not None and model.keeping.recordable != fused:
        raise SystemExit(f"the {'plain' if fused else 'fused'} path ran where the other was meant")


def train(model: Llama, data: list[Batch], lr: float, fused: bool) -> list[float]:
    """The loss of each step."""
    llama.FUSED = {"cuda"} if fused else set()
    graph._recordable = recordable
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
    graphs = Graphs(model)
    losses: list[Tensor] = []
    for batch in data:
        with took(model, fused if len(losses) < 2 else None):  # later steps replay a graph of the second
            loss, _ = graphs.run(batch, batch.target.numel())
        losses.append(loss.clone())
        optimizer.gather()
        optimizer.clip(1.0)
        optimizer.step(lr, zero=True)
    return torch.stack(losses).tolist()


def gradients(model: Llama, batch: Batch, fused: bool) -> dict[str, Tensor]:
    llama.FUSED = {"cuda"} if fused else set()
    model.zero_grad(set_to_none=True)
    with took(model, fused):
        nll, _ = token_nll(model, batch)
    nll.mean().backward()
    return {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def errors(model: Llama, data: list[Batch]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Relative errors against float64 of all gradients together, over several batches: on one, chance decides.

    And a row for each of the tensors that the sum goes by: its share of all gradients' square and of each path's error,
    and its own relative error by each path.
    """
    wide, low = copy.deepcopy(model).double(), copy.deepcopy(model)
    squares: dict[str, dict[str, float]] = {"truth": {}, "plain": {}, "fused": {}}  # of each tensor, or of its error
    batches: dict[str, list[float]] = {"plain": [], "fused": []}  # error of each batch: one may be all of the sum
    for batch in data:
        truth = gradients(wide, batch, fused=False)
        add(squares["truth"], truth)
        for name, fused in (("plain", False), ("fused", True)):
            off = {n: g - truth[n] for n, g in gradients(low, batch, fused).items()}
            batches[name].append((length2(off) / length2(truth)) ** 0.5)
            add(squares[name], off)
    size, plain, fast = (sum(each.values()) for each in squares.values())
    own = {
        name: {n: (e / squares["truth"][n]) ** 0.5 for n, e in squares[name].items() if squares["truth"][n]}
        for name in ("plain", "fused")
    }
    ratios = sorted((squares["fused"][n] / e) ** 0.5 for n, e in squares["plain"].items() if e)
    found = {
        "plain": (plain / size) ** 0.5, "fused": (fast / size) ** 0.5, "ratio": (fast / plain) ** 0.5,
        "plain_median": statistics.median(own["plain"].values()),
        "fused_median": statistics.median(own["fused"].values()),
        "plain_batches": [statistics.median(batches["plain"]), max(batches["plain"])],
        "fused_batches": [statistics.median(batches["fused"]), max(batches["fused"])],
        "ratio_median": ratios[len(ratios) // 2], "ratio_worst": ratios[-1], "tensors": len(ratios),
        "batches": len(data),
    }  # fmt: skip
    first = dict.fromkeys(
        n
        for name in ("plain", "fused")
        for n in sorted(squares[name], key=squares[name].__getitem__)[: -SHOWN - 1 : -1]
    )
    rows = [
        {
            "tensor": n, "of_gradients": squares["truth"][n] / size, "of_plain_error": squares["plain"][n] / plain,
            "of_fused_error": squares["fused"][n] / fast, "plain": own["plain"].get(n, 0.0),
            "fused": own["fused"].get(n, 0.0),
        }
        for n in first
    ]  # fmt: skip
    return found, rows


def length2(tensors: dict[str, Tensor]) -> float:
    return sum(float(t.square().sum()) for t in tensors.values())


def add(sums: dict[str, float], tensors: dict[str, Tensor]) -> None:
    """Squared lengths of tensors to their sums."""
    for n, t in tensors.items():
        sums[n] = sums.get(n, 0.0) + float(t.square().sum())


def start(args: argparse.Namespace, text: str) -> tuple[Llama, list[int], str]:
    """A dense model in float32 on the GPU, the text as its tokens, and what it is."""
    if args.model:
        model, tokenizer = lora.load(args.model, dtype="float32", device="cuda")
        return model, tokenizer.encode(text), Path(args.model).name
    ids = list(text.encode())
    torch.manual_seed(0)
    with CUDA:
        model = SMOLLM2.build()
    for name, p in model.named_parameters():
        nn.init.normal_(p, std=0.02) if p.ndim > 1 else nn.init.ones_(p)
        p.requires_grad_(not name.startswith("lm_head"))
    losses = train(model.train(), batches(ids, args.pretrain, 8, 256, seed=1), 1e-3, fused=False)
    print(f"pretraining: loss {losses[0]:.3f} to {sum(losses[-10:]) / 10:.3f}", flush=True)
    return model, ids, f"SmolLM2's shape, random weights trained {args.pretrain} steps on the text's bytes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", type=Path)
    parser.add_argument("--model", default=None)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pretrain", type=int, default=150)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--draw", type=Path, default=None)
    args = parser.parse_args()
    if args.draw:
        document = json.loads((args.draw / "parity-gpu.json").read_text())
        write_curves(args.draw / "parity-gpu.png", document["curves"])
        return
    dense, ids, what = start(args, args.text.read_text(encoding="utf-8"))
    data = batches(ids, args.steps, args.batch, args.length, seed=2)
    dense.requires_grad_(False)
    lora.quantize(dense, "nf4")
    torch.manual_seed(3)
    lora.wrap(dense, r=16)
    curves: dict[str, list[float]] = {}
    found: dict[str, Any] = {}
    tensors: dict[str, list[dict[str, Any]]] = {}
    for name, dtype, fused in (
        ("float32, plain", torch.float32, False),
        ("bfloat16, plain", torch.bfloat16, False),
        ("bfloat16, fused", torch.bfloat16, True),
    ):
        model = lowered(copy.deepcopy(dense), dtype).train()
        if fused:
            found["gradients before"], tensors["before"] = errors(model, data[:PROBES])
        curves[name] = train(model, data, args.lr, fused)
        if fused:
            found["gradients after"], tensors["after"] = errors(model, data[-PROBES:])
        print(f"{name}: loss {curves[name][0]:.4f} to {sum(curves[name][-10:]) / 10:.4f}", flush=True)
    truth, plain, fast = (torch.tensor(c, dtype=torch.float64) for c in curves.values())
    for name, a, b in (
        ("plain - float32", plain, truth),
        ("fused - float32", fast, truth),
        ("fused - plain", fast, plain),
    ):
        d = (a - b).abs()
        found[name] = {"mean": float(d.mean()), "largest": float(d.max()), "bias": float((a - b).mean())}
    for key, value in found.items():
        print(f"{key:18s}", "  ".join(f"{k} {shown(v)}" for k, v in value.items()), flush=True)
    for when, rows in tensors.items():
        print(
            f"largest errors of gradients {when}: share of all gradients, of each path's error; own error", flush=True
        )
        for row in rows:
            print("  ".join(v if isinstance(v, str) else f"{k} {v:.3g}" for k, v in row.items()), flush=True)
    document = {
        "bench": "parity", "device": device_name(), "torch": torch.__version__, "model": what, "steps": args.steps,
        "batch": args.batch, "length": args.length, "lr": args.lr, "found": found, "tensors": tensors,
        "curves": curves,
    }  # fmt: skip
    (args.out / "parity-gpu.json").write_text(json.dumps(document) + "\n")
    write_curves(args.out / "parity-gpu.png", curves)
    print(json.dumps({k: v for k, v in document.items() if k not in ("curves", "tensors")}))


def shown(value: float | list[float]) -> str:
    """A number, or the median and the largest of several."""
    return f"{value[0]:.3g} to {value[1]:.3g}" if isinstance(value, list) else f"{value:.3g}"


def lowered(model: Llama, dtype: torch.dtype) -> Llama:
    """The model with its base in a dtype; factors stay float32."""
    model.to(dtype)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    return model


if __name__ == "__main__":
    main()
