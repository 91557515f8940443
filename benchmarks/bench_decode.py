"""How many tokens a second does greedy decoding give on a GPU, beside transformers + peft + bitsandbytes?

Llama-3.1-8B's shape with random weights, NF4 with double quantization, LoRA r=16 on all linears attached, bfloat16,
a prompt of 32 tokens a row.  Every answer runs to the end.  The best possible is the bytes that a token must read
(codes, scales, head, factors) over the copy bandwidth of the card, measured in the same run.

usage: python benchmarks/bench_decode.py [--layers 32] [--new 128] [--batches 1 8] [--profile] [--save]
"""

import argparse
import importlib.util
import time

import torch
from result import finish
from timing import copy_gb_s
from torch import nn

import lora
from lora.models.decode import Decoder, decoder_for
from lora.models.generate import generate_ids
from lora.models.llama import Llama, LlamaConfig
from lora.quant.linear import Linear4bit
from lora.quant.weight import quantize_tensor

VOCAB, HIDDEN, WIDE, HEADS, KV_HEADS = 128256, 4096, 14336, 32, 8


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


def peer(layers: int):
    """transformers' model with bitsandbytes' layers and peft's adapter."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig as Config
    from transformers import LlamaForCausalLM

    config = Config(
        hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, vocab_size=VOCAB, max_position_embeddings=8192, rms_norm_eps=1e-5,
        tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            four = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16,
                compress_statistics=True, quant_type="nf4", device="meta",
            )  # fmt: skip
            w = bnb.nn.Params4bit(module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4")
            four.weight = w.cuda()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, four)
            del module.weight
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")).eval()


def profile(decoder: Decoder, token: torch.Tensor) -> None:
    """Where a replayed step spends its time: microseconds a kernel, the largest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        decoder.step(token)
        torch.cuda.synchronize()
    events = sorted(p.key_averages(), key=lambda e: -e.self_device_time_total)
    for e in events[:14]:
        print(f"    {e.self_device_time_total:9.1f} us  {e.count:5d} x  {e.key[:70]}")
    us = sum(e.self_device_time_total for e in events)
    print(f"    {us:9.1f} us in kernels, {sum(e.count for e in events)} launches")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--new", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="rows at once")
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
    for batch in args.batches:
        prompts = torch.randint(0, VOCAB, (batch, 32)).tolist()
        for _ in range(2):  # the first compiles and records
            torch.cuda.synchronize()
            start = time.perf_counter()
            made = generate_ids(model, prompts, args.new)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        assert all(len(row) == args.new for row in made)
        decoder = decoder_for(model, batch, 32 + args.new)
        token = torch.zeros(batch, dtype=torch.int64, device="cuda")
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        decoder.at.fill_(32)
        first.record()
        for _ in range(64):
            decoder.step(token)
        last.record()
        torch.cuda.synchronize()
        row = {"who": "ours", "batch": batch, "tok_s": batch * args.new / seconds}
        row |= {"step_ms": first.elapsed_time(last) / 64, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}
        rows.append(row)
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
        if args.profile:
            decoder.at.fill_(32)
            profile(decoder, token)
    if importlib.util.find_spec("bitsandbytes") and importlib.util.find_spec("peft"):
        del model, decoder
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        model = peer(args.layers)
        for batch in args.batches:
            ids = torch.randint(0, VOCAB, (batch, 32), device="cuda")
            for new in (4, 32):
                torch.cuda.synchronize()
                start = time.perf_counter()
                with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
                    model.generate(
                        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
                        do_sample=False, pad_token_id=0,
                    )  # fmt: skip
                torch.cuda.synchronize()
                seconds = time.perf_counter() - start
            row = {"who": "transformers + peft + bitsandbytes", "batch": batch, "tok_s": batch * new / seconds}
            rows.append(row)
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    finish("decode", rows, args.save)


if __name__ == "__main__":
    main()
