"""How long does a 16-bit checkpoint of 8B take into NF4 on the GPU, and in how much memory, beside transformers?

A checkpoint of Llama-3.1-8B's shape with random bfloat16 weights is written in shards of at most 5 GB, and read once,
so that it lies in the page cache for both.  Each side loads it in a process of its own, by turns, after a checkpoint of
a few MB: what a first call imports and compiles is `first`.  Nested NF4, the head left dense, on either side.
    result   bytes of the loaded model on the GPU
    peak     torch's peak over the result: what loading needed besides
    host     largest resident size of the process, and what of it stood before the call

usage: python benchmarks/bench_load_8b.py [--folder DIR] [--layers 32] [--rounds 2] [--save]
The folder gets 16 GB, and is removed afterwards if it was not there before.
"""

import argparse
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
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


def one(who: str, folder: Path) -> dict[str, Any]:
    """One side's row, measured in this process."""
    if who == "ours":
        import lora.models.load
        import lora.quant.linear  # noqa: F401
    else:
        import accelerate  # noqa: F401
        import bitsandbytes  # noqa: F401
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: F401
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
    before = resident_peak()
    load = {"ours": ours, "theirs": theirs}[who]
    took = []
    for place in (folder / "tiny", folder):
        start = time.perf_counter()
        model = load(place)
        if on_gpu:
            torch.cuda.synchronize()
        took.append(round(time.perf_counter() - start, 2))
    row: dict[str, Any] = {"who": who, "seconds": took[1], "first": took[0]}
    if on_gpu:
        result = torch.cuda.memory_allocated()
        row |= {
            "result_gib": round(result / GIB, 3),
            "peak_over_gib": round((torch.cuda.max_memory_allocated() - result) / GIB, 3),
            "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
        }
    row["host_gib"] = round(resident_peak() / GIB, 3)
    row["host_before_gib"] = round(before / GIB, 3)
    with torch.no_grad():  # it is a model that runs
        ids = torch.zeros(1, 4, dtype=torch.int64, device="cuda" if on_gpu else "cpu")
        y = model(ids)
        assert (y if torch.is_tensor(y) else y.logits).isfinite().all()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the checkpoint lies or is to be written")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--one", choices=("ours", "theirs"), help="(used by the script itself)")
    parser.add_argument("--save", action="store_true", help="write results/load_8b-gpu.json")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one, args.folder)))
        return
    folder = args.folder or Path(tempfile.mkdtemp(prefix="load-8b-"))
    kept = folder.exists() and args.folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    try:
        start = time.perf_counter()
        if not (folder / "model.safetensors.index.json").is_file():
            write(folder, args.layers, args.hidden, args.vocab)
        (folder / "tiny").mkdir(exist_ok=True)
        write(folder / "tiny", 1, 512, 512)
        size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        for file in folder.glob("*.safetensors"):
            with file.open("rb") as f:
                while f.read(2**26):
                    pass
        print(f"{size / 1e9:.2f} GB written and read in {time.perf_counter() - start:.0f} s", flush=True)
        sides = ["ours"]
        if importlib.util.find_spec("bitsandbytes") and importlib.util.find_spec("transformers"):
            sides.append("theirs")
        rows: list[dict[str, Any]] = []
        for turn in range(args.rounds):
            for who in sides if turn % 2 == 0 else sides[::-1]:
                words = [sys.executable, __file__, "--one", who, "--folder", str(folder)]
                done = subprocess.run(words, capture_output=True, text=True)
                if done.returncode:
                    rows.append({"who": who, "error": done.stderr.strip().splitlines()[-1][:300]})
                else:
                    rows.append(json.loads(done.stdout.strip().splitlines()[-1]) | {"gb": round(size / 1e9, 2)})
                print(rows[-1], flush=True)
        took = {who: [r["seconds"] for r in rows if r["who"] == who and "seconds" in r] for who in sides}
        for who, seconds in took.items():
            if seconds:
                print(f"{who}: median {statistics.median(seconds):.2f} s, {size / 1e9 / min(seconds):.1f} GB/s at best")
        finish("load_8b", rows, args.save)
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
