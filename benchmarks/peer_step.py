"""One QLoRA step of a peer: the part of bench_step.py that runs in a process of its own.

    hf        transformers + peft + bitsandbytes, every layer checkpointed
    unsloth   from a checkpoint that `hf` writes, its offloaded checkpointing, and none where memory allows

Same shape, random weights, NF4 with double quantization, LoRA on all seven linears, bfloat16, every token learned,
torch's fused AdamW: the settings that each peer's own guide gives.  Prints a JSON line for each size and setting.

usage: python benchmarks/peer_step.py hf|unsloth FOLDER SIZES [--layers 32] [--r 16] [--write]
       SIZES as 4x2048:none 1x512:offload; FOLDER holds the checkpoint, which --write makes
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
import torch

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCAB = 128256
FOUR_BITS = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True, "load_in_8bit": False,
    "_load_in_8bit": False, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": ["lm_head"],
    "llm_int8_threshold": 6.0, "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False,
}  # fmt: skip


def transformers_model(layers: int) -> Any:
    """Llama-3.1-8B's shape, its linear layers packed one by one as they are made."""
    import bitsandbytes as bnb
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {"rope_theta": 500000.0}
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5, **shape,
        tie_word_embeddings=False, bos_token_id=128000, eos_token_id=128001,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            four = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16,
                compress_statistics=True, quant_type="nf4", device="meta",
            )  # fmt: skip
            w = bnb.nn.Params4bit(module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4")
            four.weight = w.cuda()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, four)
            del module.weight
    return model.requires_grad_(False)


def write(model: Any, folder: Path) -> None:
    """The checkpoint that Unsloth loads: bitsandbytes' layout, and a tokenizer of made-up words."""
    import tokenizers
    from safetensors.torch import save_file
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "quantization_config": FOUR_BITS}
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16", "dtype": "bfloat16"}))
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"]
    vocab = {f"w{i}": i for i in range(128000)} | {word: 128000 + i for i, word in enumerate(special)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=special[0], eos_token=special[1], pad_token=special[3],
        model_max_length=131072,
    ).save_pretrained(folder)  # fmt: skip


def measure(model: Any, optimizer: Any, batch: int, length: int, extra: dict[str, Any], steps: int) -> dict[str, Any]:
    """Median step, tokens/s and peak, after a warm-up."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    base, generator, seconds = torch.cuda.memory_allocated(), torch.Generator(device="cuda"), []
    for _ in range(steps + 3):
        ids = torch.randint(0, 128000, (batch, length), device="cuda", generator=generator)
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, **extra).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    took = statistics.median(seconds[3:])
    return {
        "batch": batch, "length": length, "ms": round(1e3 * took, 1), "tok_s": round(batch * length / took),
        "peak_GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2), "base_GiB": round(base / 2**30, 2),
        "loss": round(float(loss), 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("hf", "unsloth"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("sizes", nargs="*")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    sizes = [(*map(int, size.partition(":")[0].split("x")), size.partition(":")[2]) for size in args.sizes]
    extra: dict[str, Any] = {}
    fast: Any = None
    if args.kind == "unsloth":
        from unsloth import FastLanguageModel  # before transformers: it patches that

        fast = FastLanguageModel

        longest = max(length for _, length, _ in sizes)
        model, _ = fast.from_pretrained(
            str(args.folder), max_seq_length=longest, dtype=torch.bfloat16, load_in_4bit=True, local_files_only=True
        )
        model = fast.get_peft_model(
            model, r=args.r, target_modules=TARGETS, lora_alpha=16, lora_dropout=0, bias="none",
            use_gradient_checkpointing="unsloth", random_state=3407, max_seq_length=longest,
        )  # fmt: skip
        extra["attention_mask"] = None
    else:
        from peft import LoraConfig, get_peft_model

        model = transformers_model(args.layers)
        if args.write:
            write(model, args.folder)
        if not sizes:
            return
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        model.config.use_cache = False
        settings = LoraConfig(r=args.r, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
        model = get_peft_model(model, settings)
    version = importlib.metadata.version("unsloth" if fast else "transformers")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, fused=True)
    model.train()
    for batch, length, mode in sizes:
        if fast:
            fast.for_training(model, use_gradient_checkpointing=mode != "none")
        try:
            row = measure(model, optimizer, batch, length, extra, args.steps)
        except torch.OutOfMemoryError as e:
            row = {"batch": batch, "length": length, "error": str(e).split(".")[0]}
            optimizer.zero_grad(set_to_none=True)
        head = {"who": args.kind, "version": version, "checkpointing": mode if fast else "every layer"}
        print("PEER", json.dumps(head | row), flush=True)


if __name__ == "__main__":
    main()
