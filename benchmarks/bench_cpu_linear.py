"""How fast is a 4-bit linear layer on a CPU, beside bitsandbytes' and a dense one?

4096 x 4096, NF4 block 64 with double quantization, float32; M = 1, 64, 512 rows; forward, and forward with backward
to the input.  The three take turns on fresh inputs, the median of each counts.  `ceiling` is the dense product in
oneDNN (what our layer calls on AMD; on Intel MKL's, which torch uses), without any decoding.

usage: python benchmarks/bench_cpu_linear.py [--repeats 15] [--save]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora.kernels import gemm
from lora.quant.linear import Linear4bit
from lora.quant.weight import quantize_tensor

from result import finish  # isort: skip  (beside this script)

N = K = 4096


def layers() -> dict[str, nn.Module]:
    """The three layers on one weight. bitsandbytes stays in training mode: its eval mode packs another format."""
    import bitsandbytes as bnb

    w = torch.randn(N, K) * 0.02
    peer = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=True)
    peer.weight = bnb.nn.Params4bit(w.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    dense = nn.Linear(K, N, bias=False)
    dense.weight = nn.Parameter(w.clone(), requires_grad=False)
    return {"ours": Linear4bit(quantize_tensor(w)), "peer": peer.to("cpu").train(), "dense": dense}


def both(layer: nn.Module) -> Callable[[Tensor], None]:
    def run(x: Tensor) -> None:
        x = x.clone().requires_grad_()
        y = layer(x)
        y.backward(torch.ones_like(y))

    return run


def forward(layer: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    @torch.no_grad()
    def run(x: Tensor) -> None:
        layer(x)

    return run


def by_turns(runs: dict[str, Callable[[Tensor], None]], M: int, repeats: int) -> dict[str, float]:
    """Median ms of each, the runs taking turns on fresh inputs."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats + 2):
        for name, run in runs.items():
            x = torch.randn(M, K)
            start = time.perf_counter()
            run(x)
            if i >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(t) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--save", action="store_true", help="write results/cpu_linear-cpu.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    made = layers()
    w = torch.randn(N, K)
    rows = []
    for M in (1, 64, 512):
        for what, wrap in (("forward", forward), ("forward+backward", both)):
            runs = {name: wrap(layer) for name, layer in made.items()}
            if what == "forward":
                runs["ceiling"] = forward(lambda x: gemm.linear(x, w))
            ms = by_turns(runs, M, args.repeats)
            row = {"M": M, "what": what, **{f"{name}_ms": round(t, 2) for name, t in ms.items()}}
            row["speed"] = round(ms["peer"] / ms["ours"], 2)
            rows.append(row)
            print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    finish("cpu_linear", rows, args.save)


if __name__ == "__main__":
    main()
