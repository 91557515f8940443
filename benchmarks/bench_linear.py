"""What does a LoRA linear layer of a model without fused blocks cost on a GPU, beside its base alone and its peers?

bfloat16, r = 16, a frozen base in NF4 (nested scales) or dense.  Milliseconds of one layer forward, and forward and
backward (dX, da, db), as CUDA graphs that take turns, medians; `eager`: forward and backward launched from Python.
Inputs and layers rotate through more than the cache.  `peak` is what one forward and backward takes beside x and dy.
    base     the frozen product alone, decoding included: the ceiling
    ours     lora.wrap's layer (kernels/linear16.py): the update's product first, the base's added to it
    behind   the same layer as other devices take it: the base's product first
    inside   the update in columns of the base's product, as decoder blocks have it (kernels/fold.py)
    torch    x Wᵀ + s (x Aᵀ) Bᵀ by autograd, dense only, factors in bfloat16
    peft     peft's layer on torch's or bitsandbytes', factors in bfloat16 (its default, float32, casts x too)
`over` is the time beside the base's, in percent.

usage: python benchmarks/bench_linear.py [--rows 2048 8192] [--dropout 0.0] [--save]
"""

import argparse
import contextlib
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from result import finish
from timing import copy_gb_s, eager_ms, matmul_tflop_s, recorded
from torch import Tensor, nn

import lora
from lora.kernels import dropout, fold, linear16
from lora.kernels.code4 import Weight4
from lora.kernels.fold import Group
from lora.kernels.scratch import borrowed, mine
from lora.kernels.unpack import unpack

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))  # N, K
R, SCALE, SETS, ROUNDS = 16, 2.0, 3, 11
Way = Callable[[Tensor], Tensor]


class Base(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.w, ctx.buffers = w, mine()
        return x @ (unpack([w], x) if isinstance(w, Weight4) else w).T

    @staticmethod
    def backward(ctx, *grads):
        (dy,) = grads
        with borrowed(ctx.buffers):
            return dy @ (unpack([ctx.w], dy) if isinstance(ctx.w, Weight4) else ctx.w), None


class Inside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, a, b):
        ctx.group, ctx.buffers = Group((w,), (None,), ((a.detach(), b.detach(), SCALE),)), mine()
        y, t = fold.forward(ctx.group, fold.taken(ctx.group, x))
        ctx.save_for_backward(x, t)
        return y

    @staticmethod
    def backward(ctx, *grads):
        (dy,), (x, t), group = grads, ctx.saved_tensors, ctx.group
        with borrowed(ctx.buffers):
            dyw = fold.wide(dy.shape[0], dy.shape[1], group.room, dy, "dy")
            dyw[:, : dy.shape[1]].copy_(dy)
            dx, u, dbs = fold.backward(group, dyw, t)
            (da,) = fold.grad_a(group, u, x)
        return dx, None, da, dbs[0]


@contextlib.contextmanager
def behind() -> Iterator[None]:
    """Inside, layers take the way of other devices."""
    before = linear16.on_gpu
    linear16.on_gpu = dropout.on_gpu = lambda t: False
    try:
        yield
    finally:
        linear16.on_gpu = dropout.on_gpu = before


def wrapped(N: int, K: int, four: bool, p: float) -> Any:
    model: Any = nn.ModuleDict({"one": nn.Linear(K, N, bias=False, device="cuda", dtype=torch.bfloat16)})
    if four:
        model = lora.quantize(model, "nf4")
    model = lora.wrap(model, r=R, alpha=SCALE * R, targets=["one"], dropout=p).train()
    layer = model["one"]
    nn.init.normal_(layer.adapters["default"].b, std=1e-3)
    return layer


def ours(layer: Any) -> tuple[dict[str, Way], list[Tensor]]:
    """Every way of one layer of ours, and what learns."""
    adapter, base = layer.adapters["default"], layer.base
    w = base.weight if isinstance(base, nn.Linear) else base.weight4()

    def other(x: Tensor) -> Tensor:
        with behind():
            return layer(x)

    ways: dict[str, Way] = {"base": lambda x: Base.apply(x, w), "ours": layer, "behind": other}
    if not adapter.dropout:
        ways["inside"] = lambda x: Inside.apply(x, w, adapter.a, adapter.b)
    return ways, [adapter.a, adapter.b]


def plain(N: int, K: int, p: float) -> tuple[Way, list[Tensor]]:
    w = torch.randn(N, K, device="cuda", dtype=torch.bfloat16) * 0.02
    a = torch.randn(R, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    b = torch.randn(N, R, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def way(x: Tensor) -> Tensor:
        h = nn.functional.dropout(x, p) if p else x
        return nn.functional.linear(x, w) + nn.functional.linear(nn.functional.linear(h, a), b) * SCALE

    return way, [a, b]


def peer(N: int, K: int, four: bool, p: float) -> tuple[Way, list[Tensor]]:
    import peft

    lin: Any = nn.Linear(K, N, bias=False, device="cuda", dtype=torch.bfloat16)
    if four:
        import bitsandbytes as bnb

        made = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        w = bnb.nn.Params4bit(lin.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
        made.weight = w.cuda()
        lin = made
    config = peft.LoraConfig(r=R, lora_alpha=int(SCALE * R), target_modules=["0"], lora_dropout=p)
    model: Any = peft.get_peft_model(nn.Sequential(lin.cuda()), config, autocast_adapter_dtype=False).cuda().train()
    learned = [t for t in model.parameters() if t.requires_grad]
    for t in learned:
        t.data = t.data.bfloat16()
    return model, learned


def timed(call: Callable[[int], object], repeats: int = 2 * SETS) -> Callable[[], float]:
    """Milliseconds of one call(i), i going round through the sets, in a CUDA graph that runs when it is asked."""
    graph = recorded(call, SETS, repeats)

    def ms() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / repeats

    return ms


def measure(M: int, N: int, K: int, four: bool, p: float) -> list[dict[str, Any]]:
    xs = [torch.randn(M, K, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(SETS)]
    dys = [torch.randn(M, N, device="cuda", dtype=torch.bfloat16) for _ in range(SETS)]
    sets = [ours(wrapped(N, K, four, p)) for _ in range(SETS)]
    ways = {name: [(made[name], learned) for made, learned in sets] for name in sets[0][0]}
    if not four:
        ways["torch"] = [plain(N, K, p) for _ in range(SETS)]
    if importlib.util.find_spec("peft") and (not four or importlib.util.find_spec("bitsandbytes")):
        ways["peft"] = [peer(N, K, four, p) for _ in range(SETS)]

    def forward(name: str) -> Callable[[int], object]:
        return lambda i: ways[name][i][0](xs[i])

    def both(name: str) -> Callable[[int], object]:
        def call(i: int) -> object:
            way, learned = ways[name][i]
            return torch.autograd.grad(way(xs[i]), [xs[i], *(() if name == "base" else learned)], dys[i])

        return call

    graphs = {(name, part): timed(make(name)) for name in ways for part, make in (("f", forward), ("fb", both))}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in graphs}
    for _ in range(ROUNDS):
        for case, run in graphs.items():
            times[case].append(run())
    graphs.clear()
    torch.cuda.empty_cache()
    rows = []
    for name in ways:
        row: dict[str, Any] = {"M": M, "N": N, "K": K, "base": "nf4" if four else "dense", "dropout": p}
        row["way"] = name
        for part, key in (("f", "forward"), ("fb", "both")):
            ms, ceiling = statistics.median(times[name, part]), statistics.median(times["base", part])
            row |= {f"{key}_ms": round(ms, 4), f"{key}_over": round(100 * (ms / ceiling - 1), 1)}
        call = both(name)
        row["eager_ms"] = round(eager_ms(call, SETS), 4)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(0)
        row["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
        rows.append(row)
        print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 8192], help="rows of x")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0], help="of the update's input")
    parser.add_argument("--save", action="store_true", help="write results/linear-gpu.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA GPU")
    torch.manual_seed(0)
    copy, product = copy_gb_s(), matmul_tflop_s()
    print(f"copy {copy:.0f} GB/s  matmul {product:.0f} TFLOP/s  {torch.cuda.get_device_name()}", flush=True)
    rows: list[dict[str, Any]] = [{"copy_gb_s": round(copy), "matmul_tflop_s": round(product)}]
    for p in args.dropout:
        for N, K in SHAPES:
            for M in args.rows:
                for four in (True, False):
                    rows += measure(M, N, K, four, p)
                    torch.cuda.empty_cache()
    finish("linear", rows, args.save)


if __name__ == "__main__":
    main()
