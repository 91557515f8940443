"""How fast do a few rows go through an NF4 weight, beside bitsandbytes and a bfloat16 linear layer?

GB/s counts the bytes of codes and scales, once (4.5 bits a weight plain, 4.13 nested), under a CUDA graph, weights
rotating through several times the L2 cache.  The ceiling is the card's copy bandwidth, measured in the same run.

usage: python benchmarks/bench_gemv4.py [--rows 1 8 16 32 64] [--sweep] [--save]
"""

import argparse
import importlib.util

import torch
from result import finish
from timing import copies, copy_gb_s, graph_ms, matmul_tflop_s

from lora.kernels import gemv4 as kernel
from lora.kernels.gemv4 import gemv4, permute_table
from lora.quant.weight import quantize_tensor

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
# For --sweep: 16 rows of W a program, blocks ahead, warps, and whether a launch starts before the last one ends
PLANS = [
    (1, 1, 16, True), (1, 2, 4, True), (1, 2, 8, True), (1, 2, 16, True), (1, 4, 4, True), (1, 4, 8, True),
    (1, 4, 16, True), (2, 2, 4, True), (1, 4, 4, False), (1, 4, 16, False), (1, 2, 8, False),
]  # fmt: skip
EARLY = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 32, 64], help="rows of x")
    parser.add_argument("--sweep", action="store_true", help="time other plans of the kernel too")
    parser.add_argument("--save", action="store_true", help="write results/gemv4-gpu.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    ceiling = copy_gb_s()
    print(f"copy {ceiling:.0f} GB/s  matmul {matmul_tflop_s():.0f} TFLOP/s  {torch.cuda.get_device_name()}", flush=True)
    rows = []
    for N, K in SHAPES:
        for nested in (False, True):
            nbytes = N * K // 2 + N * K // 64 * (1 if nested else 4)
            sets = copies(nbytes)
            packs = []
            for _ in range(sets):
                packs.append(quantize_tensor((torch.randn(N, K, device="cuda") * 0.02).bfloat16(), "nf4", 64, nested))
            table = permute_table(packs[0].code)
            W = packs[0].dequantize()  # float32
            bnb = peer(packs) if importlib.util.find_spec("bitsandbytes") else None
            dense = [torch.randn(N, K, device="cuda", dtype=torch.bfloat16) for _ in range(copies(2 * N * K))]
            for M in args.rows:
                row, call = measure(M, packs, table, W, dense, bnb, nbytes, ceiling)
                rows.append(row)
                line = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
                print("  ".join(line), flush=True)
                if args.sweep:
                    sweep(call, sets, nbytes)
    finish("gemv4", [{"copy_gb_s": ceiling}, *rows], args.save)


def measure(M, packs, table, W, dense, bnb, nbytes, ceiling):
    (N, K), sets = W.shape, len(packs)
    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)

    def ours(i):
        return gemv4(x, packs[i].q.view(-1), packs[i].scales, table, 64, N, early=EARLY)

    want = x.double() @ packs[0].dequantize().double().T
    error = float((ours(0).double() - want).norm() / want.norm())
    rounded = float(((x.float() @ W.bfloat16().float().T).bfloat16().double() - want).norm() / want.norm())
    row = {"N": N, "K": K, "nested": packs[0].double, "M": M, "error": error, "error_of_bf16_weight": rounded}
    row["ms"] = graph_ms(ours, sets)
    row["gb_s"] = nbytes / row["ms"] / 1e6
    row["share_of_copy"] = row["gb_s"] / ceiling
    row["bf16_ms"] = graph_ms(lambda i: x @ dense[i].T, len(dense))
    if bnb:
        row["bnb_ms"] = graph_ms(lambda i: bnb(x, i), sets)
        row["bnb_gb_s"] = nbytes / row["bnb_ms"] / 1e6
    return row, ours


def peer(packs):
    """bitsandbytes' 4-bit product on weights of its own making, of the same shapes."""
    import bitsandbytes as bnb
    import bitsandbytes.functional as F

    made = [
        F.quantize_4bit(p.dequantize(torch.bfloat16), blocksize=64, quant_type="nf4", compress_statistics=p.double)
        for p in packs
    ]
    return lambda x, i: bnb.matmul_4bit(x, made[i][0].t(), quant_state=made[i][1])


def sweep(call, sets: int, nbytes: int) -> None:
    kept = kernel.plan
    found = []
    global EARLY
    for rows, ahead, warps, EARLY in PLANS:
        plan = (rows, ahead, warps)
        kernel.plan = lambda *_, plan=plan: plan
        what = f"rows {16 * rows} ahead {ahead} warps {warps} early {EARLY:d}"
        try:
            found.append((nbytes / graph_ms(call, sets) / 1e6, what))
        except Exception as e:  # a plan that does not fit the card is a result, not an end
            found.append((0.0, f"{what}: {type(e).__name__}"))
    kernel.plan, EARLY = kept, True
    print("     ", ", ".join(f"{gb_s:.0f} ({what})" for gb_s, what in sorted(found, reverse=True)[:6]), flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
