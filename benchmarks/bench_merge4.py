"""What becomes of an adapter that is merged into its 4-bit base: share of the update that survives, and KL.

For each way to round: the figures of `lora.merge_4bit` over all layers, and, on the given texts, the KL of the next
token between the adapter on top and the merged model, beside that between the adapter on top and the bare base (what
forgetting everything costs) and the merge into dense bfloat16.

usage: python benchmarks/bench_merge4.py MODEL ADAPTER TEXTS [--texts 32] [--save]
TEXTS is a JSONL file with "prompt" and "completion".
"""

import argparse

import torch
from torch import Tensor

import lora
from lora.layer import adapted
from lora.models.tokenizer import Tokenizer
from lora.quant.rounding import ROUNDINGS
from lora.requantize import _kl, _log_p
from lora.rows import read_rows

from result import finish  # isort: skip  (beside this script)


def texts(path: str, tokenizer: Tokenizer, count: int) -> list[Tensor]:
    rows = read_rows(path)[:count]
    return [torch.tensor([tokenizer.encode(str(row.get("prompt", "")) + str(row["completion"]))[:256]]) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or .gguf file, loaded as NF4")
    parser.add_argument("adapter", help="folder of an adapter trained on it")
    parser.add_argument("texts_file", metavar="TEXTS", help="JSONL of prompt and completion")
    parser.add_argument("--texts", type=int, default=32, help="how many of them")
    parser.add_argument("--save", action="store_true", help="write results/merge4-cpu.json")
    args = parser.parse_args()
    model, tokenizer = lora.load(args.model, quantize="nf4", device="cpu")
    lora.attach(model, args.adapter, any_base=True)
    ids = texts(args.texts_file, tokenizer, args.texts)
    want = [_log_p(model, row) for row in ids]

    def kl() -> float:
        return round(sum(_kl(p, _log_p(model, row)) for p, row in zip(want, ids, strict=True)) / len(ids), 5)

    with lora.disabled(model):
        rows = [{"merge": "none: the bare base", "survival": 0.0, "noise": 1.0, "kl": kl()}]
    lora.merge(model)
    for _, layer in adapted(model):
        layer.merged.weight.data = layer.merged.weight.bfloat16().float()  # as written, computed with as read on a CPU
    rows.append({"merge": "dense bfloat16", "kl": kl()})
    lora.unmerge(model)
    for rounding in ROUNDINGS:
        got = lora.merge_4bit(model, rounding, at_least=0)
        rows.append(
            {
                "merge": f"nf4, {rounding}",
                "survival": round(got.survival, 4),
                "least": round(min(s for s, _ in got.layers.values()), 4),
                "noise": round(got.noise, 3),
                "kl": kl(),
            }
        )
        lora.unmerge(model)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    finish("merge4", rows, args.save)


if __name__ == "__main__":
    main()
