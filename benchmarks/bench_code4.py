"""How close to copy bandwidth are 4-bit quantizing and dequantizing on a GPU, beside bitsandbytes?

NF4, block 64, bfloat16 weights: quantize to float32 scales and to scales in 8 bits, dequantize from either.  GB/s count
the bytes that must move: weight, codes, scales.  `share` divides by the copy bandwidth (read plus write) of this card
in this run.  Inputs and outputs rotate through several times the cache; medians, under a CUDA graph and launched from
Python.  bitsandbytes' quantizer is not captured: it copies its code book from the host.

--sweep runs the kernels' two knobs instead (what a program takes, what a thread takes) and prints the best of each.

usage: python benchmarks/bench_code4.py [--sweep] [--save]
"""

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora.kernels import code4, encode4
from lora.quant.blocks import quantize_scales
from lora.quant.codebook import codebook
from lora.quant.weight import quantize_tensor

from result import finish  # isort: skip  (beside this script)
from timing import copies, copy_gb_s, eager_ms, graph_ms  # isort: skip

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
BLOCK = 64
Call = Callable[[int], object]


def moved(n: int, double: bool) -> int:
    """Bytes of one weight of n values: bfloat16, codes, and scales."""
    b = n // BLOCK
    return 2 * n + n // 2 + (b + 4 * -(-b // code4.NESTED) + 4 if double else 4 * b)


def weights(N: int, K: int) -> list[Tensor]:
    return [torch.randn(N, K, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(copies(moved(N * K, False)))]


def encode(ws: list[Tensor], double: bool) -> Call:
    code = codebook("nf4").to("cuda")
    cells = encode4.decision_cells(code)

    def call(i: int) -> object:
        q, absmax, sums = encode4.quantize4(ws[i], code, BLOCK, cells)
        return quantize_scales(absmax, sums) if double else q

    return call


def decode(ws: list[Tensor], double: bool) -> Call:
    packed = [quantize_tensor(w, "nf4", BLOCK, double) for w in ws]
    table = code4.byte_table(packed[0].code)
    outs = [torch.empty(w.numel(), dtype=w.dtype, device=w.device) for w in ws]
    qs = [p.q.view(-1) for p in packed]
    n = ws[0].numel()
    return lambda i: code4.dequantize4(qs[i], packed[i].scales, table, BLOCK, n, outs[i].dtype, out=outs[i])


def peer_encode(ws: list[Tensor], double: bool) -> Call:
    import bitsandbytes.functional as bnb

    return lambda i: bnb.quantize_4bit(ws[i], blocksize=BLOCK, compress_statistics=double, quant_type="nf4")


def peer_decode(ws: list[Tensor], double: bool) -> Call:
    import bitsandbytes.functional as bnb

    packed = [bnb.quantize_4bit(w, blocksize=BLOCK, compress_statistics=double, quant_type="nf4") for w in ws]
    outs = [torch.empty_like(w) for w in ws]
    return lambda i: bnb.dequantize_4bit(packed[i][0], packed[i][1], out=outs[i])


def compare() -> list[dict[str, Any]]:
    ceiling = copy_gb_s()
    print(f"copy {ceiling:.0f} GB/s")
    makers: list[tuple[str, str, Callable[[list[Tensor], bool], Call]]] = [
        ("ours", "quantize", encode),
        ("ours", "dequantize", decode),
    ]
    if importlib.util.find_spec("bitsandbytes") is not None:
        makers += [("bitsandbytes", "quantize", peer_encode), ("bitsandbytes", "dequantize", peer_decode)]
    rows: list[dict[str, Any]] = []
    for N, K in SHAPES:
        ws = weights(N, K)
        for who, what, make in makers:
            for double in (False, True):
                call, nbytes = make(ws, double), moved(N * K, double)
                ms = {"eager": eager_ms(call, len(ws))}
                if (who, what) != ("bitsandbytes", "quantize"):
                    ms["graph"] = graph_ms(call, len(ws))
                row: dict[str, Any] = {
                    "N": N,
                    "K": K,
                    "who": who,
                    "what": what,
                    "scales": "8 bits" if double else "f32",
                }
                for how, time in ms.items():
                    gb_s = nbytes / time / 1e6
                    row |= {
                        f"{how}_ms": round(time, 4),
                        f"{how}_gb_s": round(gb_s),
                        f"{how}_share": round(gb_s / ceiling, 3),
                    }
                rows.append(row | {"bytes": nbytes, "copy_gb_s": round(ceiling)})
                print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
                del call
                torch.cuda.empty_cache()
    return rows


def sweep() -> list[dict[str, Any]]:
    """GB/s under a graph of each pair of knobs; the first of each table is what the code has."""
    pairs = [(a, b) for a in (512, 1024, 2048, 4096) for b in (2, 4, 8, 16, 32) if a // b // 32 in range(1, 17)]
    knobs: list[tuple[Any, str, Callable[[list[Tensor], bool], Call]]] = [
        (code4, "DECODE_BYTES", decode),
        (encode4, "VALUES", encode),
    ]
    rows: list[dict[str, Any]] = []
    for N, K in SHAPES[:2] + SHAPES[3:]:
        ws = weights(N, K)
        for file, name, make in knobs:
            now = (getattr(file, name), getattr(file, f"{name}_THREAD"))
            for double in (False, True):
                call = make(ws, double)
                want, tried = None, []
                for pair in [now, *(p for p in pairs if p != now)]:
                    setattr(file, name, pair[0])
                    setattr(file, f"{name}_THREAD", pair[1])
                    got = call(0)
                    got = got[0] if isinstance(got, tuple) else got  # with its scales in 8 bits: their bytes
                    assert isinstance(got, Tensor)
                    want = got.clone() if want is None else want
                    assert torch.equal(got, want), (name, pair)  # whatever the knobs, the same bits
                    tried.append((round(moved(N * K, double) / graph_ms(call, len(ws)) / 1e6), *pair))
                setattr(file, name, now[0])
                setattr(file, f"{name}_THREAD", now[1])
                head = f"{N} x {K}  {name}{' nested' if double else ''}"
                best = "  ".join(f"{a}/{b}: {gb_s}" for gb_s, a, b in sorted(tried, reverse=True))
                print(f"{head}  GB/s now ({now[0]}/{now[1]}) {tried[0][0]}\n    {best}", flush=True)
                rows += [
                    {"N": N, "K": K, "knob": name, "nested": double, "program": a, "thread": b, "gb_s": gb_s}
                    for gb_s, a, b in tried
                ]
                del call, want, got
                torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="the kernels' knobs instead of the comparison")
    parser.add_argument("--save", action="store_true", help="write results/code4-gpu.json (code4_sweep-gpu.json)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA GPU")
    finish("code4_sweep" if args.sweep else "code4", sweep() if args.sweep else compare(), args.save)


if __name__ == "__main__":
    main()
