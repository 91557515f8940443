"""Every family on each kind of base: train, keep the adapter, attach it again, merge, write, read back.

Encoders that classify are tested in test_lora_models_bert.
"""

import json
from pathlib import Path

import pytest
import torch
from test_lora_models_families import build, some_ids
from torch import Tensor, nn

import lora
from lora.layer import adapted
from lora.models.families import FAMILIES

TABLE = {
    "RefinedWeb": "falcon 40B",
    "RefinedWebModel": "falcon 7B",
    "falcon": "falcon 11B",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "mistral",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}  # model_type -> one of its layouts
ELSEWHERE = {"bert", "roberta"}
ROWS = [{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "the capital of France is", "completion": " Paris"}]


def write(family: str, folder: Path) -> None:
    """A random model, under the name and the settings' names that files of this family have."""
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
    assert TABLE.keys() | ELSEWHERE == FAMILIES.keys()


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

    lora.wrap(model, r=4)
    assert {type(layer.base).__name__ for _, layer in adapted(model)} == {kinds[storage]}
    base = base_of(model)
    config = lora.TrainConfig(max_steps=2, lr=5e-3, batch=2, progress=False)
    run = lora.fit(model, tokenizer, ROWS, config=config)
    first, second = (line["loss"] for line in run.history if "loss" in line)
    assert second < first
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
