"""Every family on each kind of base: train, keep the adapter, attach it again, merge, write, read back.

Language models train by `lora.fit`; encoders that classify by two steps of their own.  Then every kind of adapter on a
family that has a place for it.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_lora_models_bert import make as make_encoder
from test_lora_models_bert import two_steps
from test_lora_models_families import build, some_ids
from torch import Tensor, nn

import lora
from lora.layer import LoRALinear, adapted
from lora.models.families import FAMILIES

TABLE = {
    "RefinedWeb": "falcon 40B",
    "RefinedWebModel": "falcon 7B",
    "bert": "BertForSequenceClassification",
    "falcon": "falcon 11B",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "mistral",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "roberta": "RobertaForSequenceClassification",
}  # model_type -> one of its layouts
ENCODERS = {"bert", "roberta"}
ROWS = [{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "the capital of France is", "completion": " Paris"}]


def write(family: str, folder: Path) -> None:
    """A random model, under the name and the settings' names that files of this family have."""
    if family in ENCODERS:
        make_encoder(TABLE[family], folder)
        return
    build(TABLE[family], folder)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"model_type": family}
    if family.startswith("RefinedWeb"):
        config["n_head"], config["n_layer"] = config.pop("num_attention_heads"), config.pop("num_hidden_layers")
        config["n_head_kv"] = config.pop("num_kv_heads")
    path.write_text(json.dumps(config))


def base_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the bytes of all tensors besides the adapters'."""
    return {
        key: t.detach().clone().reshape(-1).view(torch.uint8)
        for key, t in model.state_dict().items()
        if ".adapters." not in key
    }


def test_every_family_is_in_the_table() -> None:
    assert TABLE.keys() == FAMILIES.keys()


def train(model: nn.Module, tokenizer: Any, family: str) -> tuple[float, float]:
    """The loss at first, and after a step or two."""
    if family in ENCODERS:
        return two_steps(model.train())
    config = lora.TrainConfig(max_steps=2, lr=5e-3, batch=2, progress=False)
    run = lora.fit(model, tokenizer, ROWS, config=config)
    first, second = (line["loss"] for line in run.history if "loss" in line)
    return first, second


@pytest.mark.parametrize("storage", [None, "nf4", "int8"], ids=["dense", "nf4", "int8"])
@pytest.mark.parametrize("family", TABLE)
def test_an_adapter_is_trained_kept_attached_merged_and_written(
    family: str, storage: str | None, tmp_path: Path
) -> None:
    write(family, tmp_path)
    ids = some_ids(2, 20)
    model, tokenizer = lora.load(tmp_path, quantize=storage, device="cpu")
    kinds = {None: "Linear", "nf4": "Linear4bit", "int8": "Linear8bit"}
    with torch.no_grad():
        plain = model(ids)

    lora.wrap(model, r=4, train_modules=["classifier"] if family in ENCODERS else [])
    bases = {type(layer.base).__name__ for _, layer in adapted(model) if isinstance(layer, LoRALinear)}
    assert bases == {kinds[storage]}
    base = base_of(model)
    first, last = train(model, tokenizer, family)
    assert last < first
    after = base_of(model)
    assert base.keys() == after.keys()
    assert all(torch.equal(base[key], after[key]) for key in base)
    model.eval()

    with torch.no_grad():
        tuned = model(ids)
        assert (tuned - plain).abs().max() > 1e-3
        lora.save(model, tmp_path / "adapter")
        fresh, _ = lora.load(tmp_path, quantize=storage, device="cpu")
        lora.attach(fresh, tmp_path / "adapter")
        assert torch.equal(fresh(ids), tuned)

        lora.merge(fresh)
        lora.save_pretrained(fresh, tokenizer, tmp_path / "merged", dtype=torch.float32)
        merged, _ = lora.load(tmp_path / "merged", device="cpu")
        assert not any("bit" in type(m).__name__ for m in merged.modules())
        assert (merged(ids) - tuned).abs().max() < 1e-4 * max(1.0, float(tuned.abs().max()))


# family, options of lora.wrap: what `CASES` of test_lora_kinds are for transformers' models, here for ours
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("llama", {"dora": True}),
    "pissa": ("llama", {"init": "pissa"}),
    "pissa, some layers": ("mistral", {"init": "pissa_niter_4", "targets": ["q_proj", "down_proj"]}),
    "biases of targets": ("qwen2", {"bias": "lora_only"}),
    "all biases": ("gpt2", {"bias": "all"}),
    "tokens": ("qwen3", {"train_tokens": [5, 51, 44]}),
    "tokens, tied": ("qwen2", {"train_tokens": [5, 51, 44]}),
    "tokens, scaled table": ("gemma2", {"train_tokens": [5, 51, 44]}),
    "q and v of c_attn": ("gpt2", {"parts": {"c_attn": ["q", "v"]}}),
    "q and v of qkv_proj": ("phi3", {"parts": {"qkv_proj": ["q", "v"], "gate_up_proj": ["up"]}}),
    "q and v of query_key_value": ("falcon", {"parts": {"query_key_value": ["q", "v"]}}),
    "a stacked parameter": ("llama", {"targets": ["q_proj"], "parameters": ["embed_tokens.weight"]}),
}


@pytest.mark.parametrize("storage", [None, "nf4"], ids=["dense", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_adapter_is_trained_kept_attached_merged_and_written(
    kind: str, storage: str | None, tmp_path: Path
) -> None:
    family, options = KINDS[kind]
    write(family, tmp_path)
    ids = some_ids(2, 20)
    model, tokenizer = lora.load(tmp_path, quantize=storage, device="cpu")
    with torch.no_grad():
        plain = model(ids)
    lora.wrap(model, r=4, **options)
    base = base_of(model)
    first, last = train(model, tokenizer, family)
    assert last < first
    assert all(torch.equal(base[key], value) for key, value in base_of(model).items())
    model.eval()
    with torch.no_grad():
        with lora.disabled(model):
            assert torch.equal(model(ids), plain)
        tuned = model(ids)
        assert (tuned - plain).abs().max() > 1e-3
        lora.save(model, tmp_path / "adapter")
        fresh, _ = lora.load(tmp_path, quantize=storage, device="cpu")
        lora.attach(fresh, tmp_path / "adapter")
        near = 1e-5 * max(1.0, float(tuned.abs().max()))
        assert (fresh(ids) - tuned).abs().max() <= near
        lora.merge(fresh)
        lora.save_pretrained(fresh, tokenizer, tmp_path / "merged", dtype=torch.float32)
        merged, _ = lora.load(tmp_path / "merged", device="cpu")
        assert (merged(ids) - tuned).abs().max() < 10 * near
