"""How many tokens a second does greedy decoding give on a GPU, beside transformers + peft + bitsandbytes and Unsloth?

Llama-3.1-8B's shape with random weights, NF4 with double quantization, LoRA r=16 on all linears attached, bfloat16,
a prompt of 32 tokens a row.  Every answer runs to the end.  Beside it: what recording cost the call before, a step
alone, a prompt alone, drawn instead of greedy tokens, long caches, and adapters switched between calls.  The best
possible is the bytes that a token must read (codes, scales, head, factors) over the copy bandwidth of the card,
measured in the same run.

usage: python benchmarks/bench_decode.py [--layers 32] [--new 128] [--batches 1 8] [--contexts 8192] [--profile]
       [--peer hf unsloth] [--save]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from result import finish, peer_rows
from timing import copy_gb_s
from torch import nn

import lora
from lora.kernels.dispatch import can_overlap
from lora.models import decode
from lora.models.decode import Decoder
from lora.models.decoders import decoder_for
from lora.models.generate import generate_ids
from lora.models.llama import Llama, LlamaConfig
from lora.quant.linear import Linear4bit
from lora.quant.weight import quantize_tensor

VOCAB, HIDDEN, WIDE, HEADS, KV_HEADS = 128256, 4096, 14336, 32, 8
PROMPT = 32


def ours(layers: int, hidden: int = HIDDEN, wide: int = WIDE, heads: int = HEADS) -> Llama:
    """Random weights, packed one layer at a time: never the whole model in 16 bits."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=wide, num_layers=layers, num_heads=heads,
        num_kv_heads=KV_HEADS, head_dim=128, max_length=8192, eps=1e-5, rope_theta=500000.0,
    )  # fmt: skip
    with torch.device("meta"):
        model = Llama(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            w = (torch.randn(module.weight.shape, device="cuda") * 0.02).bfloat16()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Linear4bit(quantize_tensor(w)))
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.is_meta:
                value = torch.randn(p.shape, device="cuda") * 0.02 if p.ndim > 1 else torch.ones(p.shape, device="cuda")
                setattr(module, name, nn.Parameter(value.bfloat16()))
    lora.wrap(model, r=16)
    for name, p in model.named_parameters():
        if name.endswith(".b"):
            nn.init.normal_(p, std=0.01)
    return model.eval()


def bytes_a_token(model: Llama) -> int:
    """What one token must read at least: everything but the embedding table."""
    tables = ("table", "permute", "nested_map")
    buffers = sum(t.numel() * t.element_size() for n, t in model.named_buffers() if n.rpartition(".")[2] not in tables)
    return buffers + sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "embed_tokens" not in n)


CLASSES = {  # of kernels, by a part of the name
    "products": ("gemv4", "mma_kernel"), "x aT": ("down", "feed_kernel"), "attention": ("attend",),
    "choice": ("choose",), "head": ("gemv", "gemm", "splitK", "cutlass", "nvjet"),
}  # fmt: skip


def profile(call: Callable[[], object]) -> dict[str, float]:
    """Where a replayed step or prompt spends its time: microseconds a class of kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        call()
        torch.cuda.synchronize()
    events = sorted(p.key_averages(), key=lambda e: -e.self_device_time_total)
    shares: dict[str, float] = {}
    for e in events[:18]:
        name = next((c for c, parts in CLASSES.items() if any(part in e.key for part in parts)), "other")
        shares[name] = shares.get(name, 0.0) + e.self_device_time_total
        print(f"    {e.self_device_time_total:9.1f} us  {e.count:5d} x  {name:10} {e.key[:60]}")
    print(
        "    " + "  ".join(f"{name} {us:.0f} us" for name, us in shares.items()),
        "launches",
        sum(e.count for e in events),
    )
    return shares


def profile_step(decoder: Decoder) -> dict[str, float]:
    """`profile` of a step whose launches wait for each other, so that each is charged with its own time only."""
    decode.can_overlap = lambda device: False  # type: ignore[assignment]
    decoder.now.steps.clear()
    decoder.step(greedy=True)
    go_to(decoder, PROMPT + 64)
    shares = profile(lambda: decoder.step(greedy=True))
    decode.can_overlap = can_overlap
    decoder.now.steps.clear()
    return shares


def seconds_of(call: Callable[[], object], repeats: int = 1) -> float:
    """Median seconds of call() until the GPU is done."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def go_to(decoder: Decoder, at: int) -> None:
    """Makes every row a row of at + 1 tokens."""
    decoder.at.fill_(at)
    decoder.start.zero_()
    decoder.filled = at + 1


def replay_ms(decoder: Decoder, at: int, steps: int = 64) -> float:
    """Milliseconds of a recorded greedy step, over `steps` of them from slot `at` on."""
    go_to(decoder, at)
    return seconds_of(lambda: [decoder.step(greedy=True) for _ in range(steps)]) / steps * 1e3


def show(row: dict[str, Any]) -> None:
    print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


def ours_at(model: Llama, batch: int, new: int, profiled: bool) -> dict[str, Any]:
    """Tokens a second from prompt to text, and what a call consists of."""
    prompts = torch.randint(0, VOCAB, (batch, PROMPT)).tolist()
    compiling = seconds_of(lambda: generate_ids(model, prompts, new))
    model.__dict__["_decoders"].clear()
    first = seconds_of(lambda: generate_ids(model, prompts, new))  # records the step
    second = seconds_of(lambda: generate_ids(model, prompts, new))  # records the prompt
    made: list[list[list[int]]] = []
    seconds = seconds_of(lambda: made.append(generate_ids(model, prompts, new)), 5)
    assert all(len(row) == new for row in made[0]) and made[0] == made[-1]
    row: dict[str, Any] = {"who": "ours", "batch": batch, "tok_s": batch * new / seconds, "compiling_s": compiling}
    row |= {"first_s": first, "second_s": second, "call_s": seconds}
    decoder = decoder_for(model, batch, PROMPT + new)
    ids = torch.tensor(prompts)
    row["step_ms"] = replay_ms(decoder, PROMPT)
    row["step_tok_s"] = batch * 1e3 / row["step_ms"]
    row["prompt_ms"] = seconds_of(lambda: decoder.begin(ids, torch.ones_like(ids, dtype=torch.bool)), 5) * 1e3
    draws: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seed": 0}
    generate_ids(model, prompts, new, **draws)
    row["drawn_tok_s"] = batch * new / seconds_of(lambda: generate_ids(model, prompts, new, **draws))
    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    show(row)
    if profiled:
        row["us"] = profile_step(decoder)
        row["prompt_us"] = profile(lambda: decoder.begin(ids, torch.ones_like(ids, dtype=torch.bool)))
    return row


def switching(model: Llama, new: int) -> dict[str, Any]:
    """Seconds of a call with one adapter, of the first with another of its shape, and of the first without any."""
    lora.wrap(model, r=16, name="other").eval()
    prompts = torch.randint(0, VOCAB, (1, PROMPT)).tolist()
    row: dict[str, Any] = {"who": "ours, adapters switched", "batch": 1}
    lora.activate(model, "default")
    for _ in range(3):
        generate_ids(model, prompts, new)
    row["same_s"] = seconds_of(lambda: generate_ids(model, prompts, new), 2)
    lora.activate(model, "other")
    row["other_s"] = seconds_of(lambda: generate_ids(model, prompts, new))
    lora.activate(model, ["default", "other"])
    row["both_first_s"] = seconds_of(lambda: generate_ids(model, prompts, new))
    row["both_s"] = seconds_of(lambda: generate_ids(model, prompts, new), 2)
    lora.activate(model, "default")
    row["back_s"] = seconds_of(lambda: generate_ids(model, prompts, new))
    show(row)
    return row


@torch.no_grad()
def long(model: Llama, batch: int, context: int) -> dict[str, Any]:
    """A step near the end of a long cache; what attention must read is that much more."""
    decoder = decoder_for(model, batch, context)
    decoder.begin(torch.zeros(batch, 8, dtype=torch.int64), torch.ones(batch, 8, dtype=torch.bool))
    decoder.cache.kv.normal_()
    decoder.take()
    for _ in range(2):
        decoder.step(greedy=True)  # compiles, records
    row: dict[str, Any] = {
        "who": "ours",
        "batch": batch,
        "context": context,
        "step_ms": replay_ms(decoder, context - 80),
    }
    row["cache_gb"] = decoder.cache.kv.nbytes / 1e9
    show(row)
    model.__dict__["_decoders"].clear()
    return row


def rivals(kinds: list[str], batches: list[int], layers: int) -> list[dict[str, Any]]:
    """The peers' rows, each from a process of its own."""
    rows: list[dict[str, Any]] = []
    scripts = Path(__file__).parent
    size = ["--layers", str(layers)]
    with tempfile.TemporaryDirectory() as folder:
        if "unsloth" in kinds:  # it loads a checkpoint only
            subprocess.run([sys.executable, str(scripts / "peer_step.py"), "hf", folder, "--write", *size], check=True)
        for kind in kinds:
            new = "128" if kind == "unsloth" else "32"
            rows += peer_rows("peer_decode.py", kind, folder, "--batches", *map(str, batches), "--new", new, *size)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--new", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="rows at once")
    parser.add_argument("--contexts", type=int, nargs="*", default=[8192], help="long caches, at the same batches")
    parser.add_argument("--peer", nargs="+", choices=("hf", "unsloth"), default=[], help="rivals in the same run")
    parser.add_argument("--profile", action="store_true", help="print where a step's time goes")
    parser.add_argument("--save", action="store_true", help="write results/decode-gpu.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    ceiling = copy_gb_s()
    model = ours(args.layers)
    must = bytes_a_token(model)
    print(
        f"copy {ceiling:.0f} GB/s; a token reads {must / 1e9:.2f} GB: at most {ceiling * 1e9 / must:.0f} tokens/s a row"
    )
    rows = [{"copy_gb_s": ceiling, "gb_a_token": must / 1e9}]
    rows += [ours_at(model, batch, args.new, args.profile) for batch in args.batches]
    rows += [long(model, batch, context) for context in args.contexts for batch in args.batches]
    rows.append(switching(model, args.new))
    if args.peer:
        del model
        torch.cuda.empty_cache()
        rows += rivals(args.peer, args.batches, args.layers)
    finish("decode", rows, args.save)


if __name__ == "__main__":
    main()
