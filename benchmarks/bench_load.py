"""How much memory does loading a model in NF4 take at its peak?

Bound: twice the largest float32 tensor, plus the 4-bit layers, plus embedding, head and norms.  Measured as the
largest resident size of the process over what it was after the imports; reading the file's header, tokenizer and
vocabulary counts as part of loading.

usage: python benchmarks/bench_load.py [--save]
"""

import argparse
import resource

import torch

import lora
from lora.models.gguf import GGUF
from lora.quant.linear import Linear4bit

from models import smollm2  # isort: skip  (beside this script)
from result import finish  # isort: skip

MIB = 2**20


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write results/load-cpu.json")
    args = parser.parse_args()
    path = smollm2()
    lora.load  # noqa: B018  (imports what it needs)
    before = peak_mib()
    model, _ = lora.load(path, quantize="nf4", dtype="float32", device="cpu")
    peak = peak_mib() - before
    largest = max(4 * torch.Size(shape).numel() for _, _, shape, *_ in GGUF(path).tensors_info) / MIB
    packed = sum(m.packed().nbytes for m in model.modules() if isinstance(m, Linear4bit)) / MIB
    dense = sum(p.numel() * 4 for p in model.parameters()) / MIB  # a tied head is counted once
    bound = 2 * largest + packed + dense
    row = {
        "peak_mib": round(peak, 1),
        "bound_mib": round(bound, 1),
        "largest_tensor_mib": round(largest, 1),
        "packed_mib": round(packed, 1),
        "dense_mib": round(dense, 1),
        "within": peak < bound,
    }
    print("  ".join(f"{k} {v}" for k, v in row.items()))
    finish("load", [row], args.save)


if __name__ == "__main__":
    main()
