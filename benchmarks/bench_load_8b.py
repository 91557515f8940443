"""How long does a 16-bit checkpoint of 8B take into NF4 on the GPU, and in how much memory, beside transformers?

A checkpoint of Llama-3.1-8B's shape with random bfloat16 weights is written in shards of at most 5 GB, and read once,
so that it lies in the page cache for both.  Each side loads it twice in processes of its own, by turns.  Nested NF4,
the head left dense, on either side.
    imports  from the process's start: Python, torch, the library
    first    the first load of the process, with all that it imports and compiles.  Ours needs two kernels of Triton's:
             `cache` empty: compiled, as by the first process ever; kept: found where that one left them
    seconds  the second load, all warm
    modules  Python modules that the first load imported
    result   bytes of the loaded model on the GPU
    peak     torch's peak over the result: what loading needed besides
    host     largest resident size of the process, and what of it stood before the call
    forward  the first forward, of four tokens, which compiles too

usage: python benchmarks/bench_load_8b.py [--folder DIR] [--layers 32] [--rounds 2] [--save]
The folder gets 16 GB, and is removed afterwards if it was not there before.
"""

import argparse
import gc
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from result import finish, resident_peak  # isort: skip  (beside this script)

GIB = 2**30
SHARD = 5 * 10**9


def write(folder: Path, layers: int, hidden: int, vocab: int) -> int:
    """The checkpoint; returns its bytes."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models

    wide, kv = hidden * 7 // 2, hidden // 4
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {
            at + "self_attn.q_proj.weight": (hidden, hidden), at + "self_attn.k_proj.weight": (kv, hidden),
            at + "self_attn.v_proj.weight": (kv, hidden), at + "self_attn.o_proj.weight": (hidden, hidden),
            at + "mlp.gate_proj.weight": (wide, hidden), at + "mlp.up_proj.weight": (wide, hidden),
            at + "mlp.down_proj.weight": (hidden, wide), at + "input_layernorm.weight": (hidden,),
            at + "post_attention_layernorm.weight": (hidden,),
        }  # fmt: skip
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = total = 0
    for name, shape in shapes.items():
        n = 2 * torch.Size(shape).numel()
        if size + n > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size, total = size + n, total + n
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight_map: dict[str, str] = {}
    for i, part in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name, shape in part.items():
            drawn = torch.randn(shape, device=device) * 0.02 if len(shape) > 1 else torch.ones(shape)
            tensors[name] = drawn.bfloat16().cpu()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden,
        "intermediate_size": wide, "num_hidden_layers": layers, "num_attention_heads": hidden // 128,
        "num_key_value_heads": kv // 128, "head_dim": 128, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    return total


def ours(folder: Path) -> Any:
    import lora

    return lora.load(folder, quantize="nf4", dtype="bfloat16")[0]


def theirs(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=four, dtype=torch.bfloat16, device_map={"": device}
    )


def one(who: str, folder: Path, started: float) -> dict[str, Any]:
    """One side's row, measured in this process, which was asked for at `started` and has loaded nothing before."""
    if who == "ours":
        import lora.models.load
        import lora.quant.linear  # noqa: F401
    else:
        import accelerate  # noqa: F401
        import bitsandbytes  # noqa: F401
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: F401
    row: dict[str, Any] = {"who": who, "imports": round(time.time() - started, 2)}
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
    before, modules = resident_peak(), len(sys.modules)
    load = {"ours": ours, "theirs": theirs}[who]
    for turn in ("first", "seconds"):
        model = None
        gc.collect()
        start = time.perf_counter()
        model = load(folder)
        if on_gpu:
            torch.cuda.synchronize()
        row[turn] = round(time.perf_counter() - start, 2)
        if turn == "first":
            row["modules"] = len(sys.modules) - modules
            if on_gpu:
                result = torch.cuda.memory_allocated()
                row |= {
                    "result_gib": round(result / GIB, 3),
                    "peak_over_gib": round((torch.cuda.max_memory_allocated() - result) / GIB, 3),
                    "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
                }
            row["host_gib"] = round(resident_peak() / GIB, 3)
            row["host_before_gib"] = round(before / GIB, 3)
    assert model is not None
    with torch.no_grad():  # it is a model that runs
        ids = torch.zeros(1, 4, dtype=torch.int64, device="cuda" if on_gpu else "cpu")
        start = time.perf_counter()
        y = model(ids)
        assert (y if torch.is_tensor(y) else y.logits).isfinite().all()
        row["forward"] = round(time.perf_counter() - start, 2)
    return row


def turns(rounds: int, rivals: bool, caches: Path) -> Iterator[tuple[str, str, Path]]:
    """Side, state of Triton's cache and its folder, one process after the other: each second round goes backwards."""
    for i in range(rounds):
        cache = caches / str(i)  # filled by the first process that gets it, and found by the second
        order = [("ours", "empty", cache), ("ours", "kept", cache)]
        other = [("theirs", "empty", caches / "theirs")] if rivals else []
        yield from order + other if i % 2 == 0 else other + order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the checkpoint lies or is to be written")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--one", choices=("ours", "theirs"), help="(used by the script itself)")
    parser.add_argument("--started", type=float, help="(used by the script itself)")
    parser.add_argument("--save", action="store_true", help="write results/load_8b-gpu.json")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one, args.folder, args.started)))
        return
    folder = args.folder or Path(tempfile.mkdtemp(prefix="load-8b-"))
    kept = folder.exists() and args.folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    try:
        start = time.perf_counter()
        if not (folder / "model.safetensors.index.json").is_file():
            write(folder, args.layers, args.hidden, args.vocab)
        size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        for file in folder.glob("*.safetensors"):
            with file.open("rb") as f:
                while f.read(2**26):
                    pass
        print(f"{size / 1e9:.2f} GB written and read in {time.perf_counter() - start:.0f} s", flush=True)
        rivals = all(importlib.util.find_spec(name) for name in ("bitsandbytes", "transformers"))
        rows: list[dict[str, Any]] = []
        for who, cache, place in turns(args.rounds, rivals, folder / "triton"):
            words = [sys.executable, __file__, "--one", who, "--folder", str(folder), "--started", str(time.time())]
            env = os.environ | {"TRITON_CACHE_DIR": str(place)}
            done = subprocess.run(words, capture_output=True, text=True, env=env)
            row: dict[str, Any] = {"who": who}
            if done.returncode:
                row["error"] = done.stderr.strip().splitlines()[-1][:300]
            else:
                row = json.loads(done.stdout.strip().splitlines()[-1]) | {"gb": round(size / 1e9, 2)}
            rows.append(row | ({"cache": cache} if who == "ours" else {}))
            print(rows[-1], flush=True)
        for side in (("ours", "empty"), ("ours", "kept"), ("theirs", None)):
            found = [r for r in rows if (r["who"], r.get("cache")) == side and "seconds" in r]
            if found:
                medians = {key: statistics.median(r[key] for r in found) for key in ("imports", "first", "seconds")}
                told = "  ".join(f"{key} {value:.2f} s" for key, value in medians.items())
                print(f"{side[0]}, cache {side[1]}: {told}  {size / 1e9 / medians['seconds']:.1f} GB/s")
        finish("load_8b", rows, args.save)
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
