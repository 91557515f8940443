"""How fast do a few rows go through an NF4 weight, beside bitsandbytes and a bfloat16 linear layer?

GB/s counts the bytes of codes and scales, once (4.5 bits a weight plain, 4.13 nested), under a CUDA graph, weights
rotating through several times the L2 cache; each launch may begin before the last one ends, as in decoding.  Several
N are weights of one x in one launch; the peers multiply by one weight of as many rows.
The ceiling is the card's copy bandwidth, measured in the same run.

usage: python benchmarks/bench_gemv4.py [--rows 1 8 16 32 64] [--low 16] [--sweep] [--save]
"""

import argparse
import importlib.util

import torch
from result import finish, keep
from timing import copies, copy_gb_s, graph_ms, matmul_tflop_s

from lora.kernels import gemv4 as kernel
from lora.kernels.code4 import Weight4, byte_table, dequantize4
from lora.kernels.gemv4 import down, gemv4_group, permute_table
from lora.quant.weight import Packed, quantize_tensor

SHAPES: tuple[tuple[tuple[int, ...], int], ...] = (
    ((4096,), 4096), ((14336,), 4096), ((4096,), 14336), ((28672,), 8192), ((4096, 1024, 1024), 4096),
    ((14336, 14336), 4096),
)  # fmt: skip
# For --sweep: see Plan
PLANS = [
    (1, 4, 2, 2, 16), (1, 4, 3, 2, 16), (1, 4, 2, 3, 16), (1, 2, 2, 2, 16), (1, 2, 3, 2, 16), (1, 4, 3, 3, 8),
    (1, 4, 3, 2, 8), (2, 4, 2, 2, 8), (2, 2, 3, 3, 8), (2, 1, 3, 2, 16),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 32, 64], help="rows of x")
    parser.add_argument("--low", type=int, default=0, help="rank of a low-rank update beside each weight, 0: none")
    parser.add_argument("--sweep", action="store_true", help="time other plans of the kernel too")
    parser.add_argument("--save", action="store_true", help="write results/gemv4-gpu.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    ceiling = copy_gb_s()
    print(f"copy {ceiling:.0f} GB/s  matmul {matmul_tflop_s():.0f} TFLOP/s  {torch.cuda.get_device_name()}", flush=True)
    rows = []
    for Ns, K in SHAPES:
        for nested in (False, True):
            N = sum(Ns)
            nbytes = N * K // 2 + N * K // 64 * (1 if nested else 4)
            sets = copies(nbytes)
            groups = [[packed(n, K, nested) for n in Ns] for _ in range(sets)]
            W = torch.cat([p.dequantize() for p in groups[0]])  # float32
            bnb = peer(N, K, nested, sets) if importlib.util.find_spec("bitsandbytes") else None
            dense = [torch.randn(N, K, device="cuda", dtype=torch.bfloat16) for _ in range(copies(2 * N * K))]
            for M in args.rows:
                row, call = measure(M, groups, W, dense, bnb, nbytes, ceiling, args.low)
                rows.append(row)
                line = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
                print("  ".join(line), flush=True)
                if args.save:  # a run that is cut off has saved what it measured
                    keep("gemv4", [{"copy_gb_s": ceiling}, *rows])
                if args.sweep:
                    sweep(call, sets, nbytes)
    finish("gemv4", [{"copy_gb_s": ceiling}, *rows], args.save)


def packed(N: int, K: int, nested: bool) -> Packed:
    return quantize_tensor((torch.randn(N, K, device="cuda") * 0.02).bfloat16(), "nf4", 64, nested)


def weight(p: Packed) -> Weight4:
    return Weight4(p.q.view(-1), p.scales, byte_table(p.code), permute_table(p.code), p.block, (p.shape[0], p.shape[1]))


def measure(M, groups, W, dense, bnb, nbytes, ceiling, r):
    K, sets = W.shape[1], len(groups)
    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
    sets_of = [[weight(p) for p in group] for group in groups]
    none = [None] * len(groups[0])
    a = [torch.randn(r, K, device="cuda") for _ in none]
    b = [torch.randn(p.shape[0], r, device="cuda") * 1e-3 for p in groups[0]]

    def ours(i, x=x):
        if not r:
            return gemv4_group(x, sets_of[i], none, none, None, early=True)
        return gemv4_group(x, sets_of[i], none, b, down(a, [2.0] * len(a), x, early=True), early=True)

    def errors(x):
        """Of ours and of a product with the weight rounded to bfloat16, against float64."""
        plain = x.double() @ W.double().T
        low = [2.0 * (x.double() @ ai.double().T) @ bi.double().T for ai, bi in zip(a, b, strict=True)]
        want = plain + torch.cat(low, 1) if r else plain
        rounded = (x.float() @ W.bfloat16().float().T).bfloat16()
        pairs = ((torch.cat(ours(0, x), dim=1), want), (rounded, plain))
        return [float((found.double() - right).norm() / right.norm()) for found, right in pairs]

    error, rounded = errors(x)
    one_sign = errors(x.abs())  # over which what a code's rounding loses adds up
    row = {"N": [w.shape[0] for w in sets_of[0]], "K": K, "nested": groups[0][0].double, "M": M, "r": r}
    row |= {"error": error, "error_of_bf16_weight": rounded}
    row |= {"error_one_sign": one_sign[0], "error_one_sign_of_bf16_weight": one_sign[1], "ms": graph_ms(ours, sets)}
    row["gb_s"] = nbytes / row["ms"] / 1e6
    row["share_of_copy"] = row["gb_s"] / ceiling
    row["bf16_ms"] = graph_ms(lambda i: x @ dense[i].T, len(dense))
    row["decode_ms"] = graph_ms(lambda i: decoded(x, sets_of[i]), sets)
    if bnb:
        row["bnb_ms"] = graph_ms(lambda i: bnb(x, i), sets)
        row["bnb_gb_s"] = nbytes / row["bnb_ms"] / 1e6
    return row, ours


def decoded(x, weights):
    """The other way: each weight unpacked to memory, then a plain product."""
    return [
        x @ dequantize4(w.q, w.scales, w.table, w.block, w.shape[0] * w.shape[1], x.dtype).view(w.shape).T
        for w in weights
    ]


def peer(N, K, nested, sets):
    """bitsandbytes' 4-bit product on weights of its own making, of the same shapes."""
    import bitsandbytes as bnb
    import bitsandbytes.functional as F

    made = [
        F.quantize_4bit(
            torch.randn(N, K, device="cuda").bfloat16(), blocksize=64, quant_type="nf4", compress_statistics=nested
        )
        for _ in range(sets)
    ]
    return lambda x, i: bnb.matmul_4bit(x, made[i][0].t(), quant_state=made[i][1])


def sweep(call, sets: int, nbytes: int) -> None:
    kept = kernel.plan
    found = []
    for plan in PLANS:
        kernel.plan = lambda *_, plan=plan: kernel.Plan(*plan)
        what = "rows {} unit {} slots {} look {} warps {}".format(16 * plan[0], *plan[1:])
        try:
            found.append((nbytes / graph_ms(call, sets) / 1e6, what))
        except Exception as e:  # a plan that does not fit the card is a result, not an end
            found.append((0.0, f"{what}: {type(e).__name__}"))
    kernel.plan = kept
    print("     ", ", ".join(f"{gb_s:.0f} ({what})" for gb_s, what in sorted(found, reverse=True)[:6]), flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
