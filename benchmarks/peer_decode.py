"""Greedy decoding by a peer: the part of bench_decode.py that runs in a process of its own.

    hf        transformers + peft + bitsandbytes
    unsloth   from a checkpoint that peer_step.py writes, its own inference mode

Same shape, random weights, NF4 with double quantization, LoRA on all seven linears, bfloat16, a prompt of 32 tokens a
row, every answer to the end.  Prints a JSON line for each batch.

usage: python benchmarks/peer_decode.py hf|unsloth FOLDER [--batches 1 8] [--new 32] [--layers 32]
"""

import argparse
import importlib.metadata
import json
import os
import time
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
import torch
from peer_step import TARGETS, VOCAB, transformers_model

PROMPT, R = 32, 16


def unsloth(folder: str) -> Any:
    from unsloth import FastLanguageModel  # before transformers: it patches that

    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=512, dtype=torch.bfloat16, load_in_4bit=True, local_files_only=True
    )
    model = FastLanguageModel.get_peft_model(
        model, r=R, target_modules=TARGETS, lora_alpha=32, lora_dropout=0, bias="none", max_seq_length=512
    )
    FastLanguageModel.for_inference(model)
    return model


def hf(layers: int) -> Any:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=R, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(transformers_model(layers), settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("hf", "unsloth"))
    parser.add_argument("folder")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--layers", type=int, default=32)
    args = parser.parse_args()
    model = unsloth(args.folder) if args.kind == "unsloth" else hf(args.layers)
    model.eval()
    model.config.use_cache = True
    version = importlib.metadata.version("unsloth" if args.kind == "unsloth" else "transformers")
    for batch in args.batches:
        ids = torch.randint(0, VOCAB - 256, (batch, PROMPT), device="cuda")
        seconds = 0.0
        for new in (4, args.new):  # the first warms up
            torch.cuda.synchronize()
            start = time.perf_counter()
            with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
                made = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
                    do_sample=False, pad_token_id=0,
                )  # fmt: skip
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        assert made.shape[1] == PROMPT + args.new
        row = {"who": args.kind, "version": version, "batch": batch, "tok_s": batch * args.new / seconds}
        print("PEER", json.dumps(row | {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}), flush=True)


if __name__ == "__main__":
    main()
