"""How fast is an AdamW step on a GPU, beside torch's fused one and bitsandbytes' 8-bit one?

One float32 parameter of 80 M values and its gradient.  `torch`: AdamW(fused=True).  `ours 32`, `ours 8`: the step of
lora.kernels.adamw; `+ zero` leaves the gradient at zero in the same pass.  `bnb 8`: AdamW8bit, if it is installed,
launched from Python only: it keeps its step count on the host.  `whole`: clipping by the joint norm, step and zeroed
gradients, as a training loop does them.  Milliseconds are medians, in a CUDA graph and launched from Python.
Bytes a parameter that must move: 28 in 32 bits (g, w, m, v read, w, m, v written); 16.06 in 8 bits; + 4 to zero g;
+ 4 for the norm.  `of_copy` is their rate by the copy bandwidth of this card in this run.
Wanted: ours 32 at most torch's, ours 8 at most 0.6 ms on an H100.

usage: python benchmarks/bench_adamw.py [--millions 80] [--sweep] [--save]
"""

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from lora.kernels import adamw as kernels
from lora.quant.codebook import dynamic_map
from lora.train.optim import AdamW

from result import finish  # isort: skip  (beside this script)
from timing import copy_gb_s, eager_ms, graph_ms  # isort: skip

BYTES32, BYTES8 = 28.0, 16 + 4 * 2 * 2 / 256
SWEEP32 = [(512, 2), (512, 4), (1024, 4), (1024, 8), (2048, 4), (2048, 8), (4096, 8), (4096, 16)]  # BLOCK, WARPS
SWEEP8 = [(rows, warps) for warps in (1, 2, 4) for rows in (1, 2, 4, 8)]  # ROWS8, WARPS8
Call = Callable[[int], object]


def fresh(n: int) -> list[nn.Parameter]:
    p = nn.Parameter(torch.randn(n, device="cuda"))
    p.grad = torch.randn(n, device="cuda") * 1e-2
    return [p]


def ours(n: int, bits: int, zero: bool) -> Call:
    w, g = (torch.randn(n, device="cuda") for _ in range(2))
    hyper = torch.tensor(kernels.rates(1e-4, 10), device="cuda")
    if bits == 8:
        m8, v8 = (kernels.moment8(n, dynamic_map(signed).cuda()) for signed in (True, False))
        return lambda _: kernels.adamw8(w, g, m8, v8, hyper, zero=zero)
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    return lambda _: kernels.adamw(w, g, m, v, hyper, zero=zero)


def torchs(n: int) -> Call:
    optimizer = torch.optim.AdamW(fresh(n), lr=1e-4, fused=True, capturable=True)
    return lambda _: optimizer.step()


def bnbs(n: int) -> Call:
    import bitsandbytes as bnb

    optimizer = bnb.optim.AdamW8bit(fresh(n), lr=1e-4)
    return lambda _: optimizer.step()


def whole_torch(n: int) -> Call:
    params = fresh(n)
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)

    def run(_: int) -> None:
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return run


def whole_ours(n: int, bits: int) -> Call:
    optimizer = AdamW(fresh(n), bits=bits)

    def run(_: int) -> None:
        optimizer.clip(1.0)
        optimizer.step(1e-4, zero=True)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=80.0, help="parameters")
    parser.add_argument("--sweep", action="store_true", help="every block size and number of warps of our kernels")
    parser.add_argument("--save", action="store_true", help="keep the result under benchmarks/results/")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    n, copy = int(args.millions * 1e6), copy_gb_s()
    rows: list[dict[str, Any]] = []

    def measure(name: str, make: Callable[[], Call], size: float, graph: bool = True, **knobs: Any) -> None:
        call = make()
        in_graph = graph_ms(call, 1) if graph else None  # one set of buffers: the smallest is many times the cache
        eager = eager_ms(call, 1)
        best = in_graph or eager
        gb_s = size * n / best / 1e6
        row = {"name": name, "graph_ms": in_graph, "eager_ms": eager, "gb_s": gb_s, "of_copy": gb_s / copy} | knobs
        rows.append(row)
        shown = "     -" if in_graph is None else f"{in_graph:6.3f}"
        knob = "  ".join(f"{key} {value}" for key, value in knobs.items())
        print(
            f"{name:14}  graph_ms {shown}  eager_ms {eager:6.3f}  gb_s {gb_s:5.0f}  of_copy {gb_s / copy:.2f}  {knob}"
        )

    print(f"{n:,} parameters; copy {copy:.0f} GB/s")
    measure("torch", lambda: torchs(n), BYTES32)
    measure("ours 32", lambda: ours(n, 32, False), BYTES32)
    measure("ours 32 + zero", lambda: ours(n, 32, True), BYTES32 + 4)
    measure("ours 8", lambda: ours(n, 8, False), BYTES8)
    measure("ours 8 + zero", lambda: ours(n, 8, True), BYTES8 + 4)
    measure("whole torch", lambda: whole_torch(n), BYTES32 + 8, graph=False)
    measure("whole ours 32", lambda: whole_ours(n, 32), BYTES32 + 8, graph=False)
    measure("whole ours 8", lambda: whole_ours(n, 8), BYTES8 + 8, graph=False)
    if find_spec("bitsandbytes"):
        measure("bnb 8", lambda: bnbs(n), BYTES8, graph=False)
    if args.sweep:
        kept = {name: getattr(kernels, name) for name in ("BLOCK", "WARPS", "ROWS8", "WARPS8", "EXACT8")}
        for kernels.BLOCK, kernels.WARPS in SWEEP32:
            knobs: dict[str, Any] = {"BLOCK": kernels.BLOCK, "WARPS": kernels.WARPS}
            measure("ours 32", lambda: ours(n, 32, False), BYTES32, **knobs)
        for kernels.ROWS8, kernels.WARPS8 in SWEEP8:
            for kernels.EXACT8 in (True, False):
                knobs = {"ROWS8": kernels.ROWS8, "WARPS8": kernels.WARPS8, "EXACT8": kernels.EXACT8}
                measure("ours 8", lambda: ours(n, 8, False), BYTES8, **knobs)
        for name, value in kept.items():
            setattr(kernels, name, value)
    finish("adamw", rows, args.save)


if __name__ == "__main__":
    main()
