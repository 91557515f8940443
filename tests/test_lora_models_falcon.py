"""Falcon beside what every family is tested for: old names, layouts of the published models, 4 bits, bad configs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import give_tokenizer

import lora
from lora.models.falcon import FalconConfig, slopes
from lora.quant.linear import Linear4bit

SIZES: dict[str, Any] = {"vocab_size": 272, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LAYERS = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    config = transformers.FalconConfig(**SIZES, initializer_range=0.1, bos_token_id=0, eos_token_id=0)
    transformers.FalconForCausalLM(config).save_pretrained(tmp_path / "model")
    give_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder: Path, change: dict[str, Any], without: tuple[str, ...] = ()) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw = {key: value for key, value in raw.items() if key not in without} | change
    (folder / "config.json").write_text(json.dumps(raw))


def some_ids() -> torch.Tensor:
    return torch.arange(2 * 24).view(2, 24) * 7 % 256 + 1


@torch.no_grad()
@pytest.mark.parametrize("kind", ["RefinedWebModel", "RefinedWeb"])
def test_the_first_releases_names_give_the_same_model(kind: str, folder: Path) -> None:
    if kind == "RefinedWeb":  # its 40B said nothing of a new decoder: the name did
        config = transformers.FalconConfig(**SIZES, new_decoder_architecture=True, num_kv_heads=2)
        transformers.FalconForCausalLM(config).save_pretrained(folder)
    model, _ = lora.load(folder, device="cpu")
    want = model(some_ids())
    old = {"model_type": kind, "n_head": 4, "n_layer": 2} | ({"n_head_kv": 2} if kind == "RefinedWeb" else {})
    now = ("num_attention_heads", "num_hidden_layers", "num_kv_heads", "ffn_hidden_size", "new_decoder_architecture")
    rewrite(folder, old, without=now)
    again, tokenizer = lora.load(folder, device="cpu")
    assert torch.equal(again(some_ids()), want)
    lora.save_pretrained(again, tokenizer, folder.parent / "out", dtype=torch.float32)
    other = transformers.AutoModelForCausalLM.from_pretrained(folder.parent / "out").eval()
    assert (other(some_ids()).logits - want).abs().max() < 1e-5


@torch.no_grad()
def test_a_tied_file_may_carry_its_head_twice(folder: Path) -> None:
    want = lora.load(folder, device="cpu")[0](some_ids())
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model, _ = lora.load(folder, device="cpu")
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert torch.equal(model(some_ids()), want)


def test_quantizing_packs_every_product_but_the_head(folder: Path) -> None:
    model, _ = lora.load(folder, quantize="nf4", device="cpu")
    packed = sorted(name for name, m in model.named_modules() if isinstance(m, Linear4bit))
    assert packed == sorted(f"transformer.h.{i}.{name}" for i in range(2) for name in LAYERS)
    lora.wrap(model, r=4)
    assert sorted(row.module for row in lora.status(model).rows) == packed


PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "7b": (
        {"vocab_size": 65024, "hidden_size": 4544, "num_attention_heads": 71, "num_hidden_layers": 32}
        | {"multi_query": True, "parallel_attn": True, "bias": False},
        6_921_720_704,
    ),
    "40b": (
        {"vocab_size": 65024, "hidden_size": 8192, "num_attention_heads": 128, "num_hidden_layers": 60}
        | {"new_decoder_architecture": True, "num_kv_heads": 8, "bias": False},
        41_303_293_952,
    ),
    "rw-1b": (
        {"vocab_size": 50304, "hidden_size": 2048, "num_attention_heads": 32, "num_hidden_layers": 24}
        | {"multi_query": False, "parallel_attn": False, "bias": True, "alibi": True},
        1_311_625_216,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_have_as_many_parameters_as_transformers_counts(name: str) -> None:
    raw, count = PUBLISHED[name]
    with torch.device("meta"):
        model = FalconConfig.from_json(raw).build()
        theirs = transformers.FalconForCausalLM(transformers.FalconConfig(**raw))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters()) == count


def test_slopes_halve_from_head_to_head_and_fill_between() -> None:
    assert slopes(8).tolist() == [0.5**i for i in range(1, 9)]
    assert torch.equal(slopes(6)[:4], slopes(4))
    assert slopes(6)[4:].tolist() == [2.0**-1, 2.0**-3]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no width": ({"hidden_size": None}, "lacks hidden_size"),
    "no heads": ({"num_attention_heads": 0}, "0 heads"),
    "heads that do not divide": ({"num_attention_heads": 5}, "hidden_size=64, 5 heads"),
    "odd heads": ({"num_attention_heads": 64}, "even parts"),
    "key heads": ({"new_decoder_architecture": True, "num_kv_heads": 3}, "3 key heads"),
    "another activation": ({"activation": "relu"}, "activation='relu'; falcon's is 'gelu'"),
    "norms": ({"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn=3"),
    "a RoPE it has not": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_config_is_one_clear_error(wrong: str) -> None:
    change, text = WRONG[wrong]
    with pytest.raises(ValueError, match=text):
        FalconConfig.from_json(SIZES | change)
