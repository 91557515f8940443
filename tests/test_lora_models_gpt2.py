"""GPT-2 beside what every family is tested for: old names, turned matrices in 4 bits, adapters to and from peft."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import give_tokenizer
from torch import Tensor, nn

import lora
from lora.models.gpt2 import GPT2Config
from lora.quant.linear import Linear4bit
from lora.quant.weight import quantize_tensor

SIZES: dict[str, Any] = {"vocab_size": 272, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
LAYERS = [f"transformer.h.{i}.{n}" for i in range(2) for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
TARGETS = ["c_attn", "c_proj", "c_fc"]


def theirs() -> Any:
    """A random GPT-2 of transformers with biases away from 0 and norms from 1; the same one at every call."""
    torch.manual_seed(3)
    config = transformers.GPT2Config(**SIZES, initializer_range=0.1, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    for p in model.parameters():
        if p.dim() == 1:
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    theirs().save_pretrained(path)
    give_tokenizer(path)
    return path


def some_ids() -> Tensor:
    return torch.arange(2 * 40).view(2, 40) * 7 % 256 + 1


@torch.no_grad()
def shake(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        if p.requires_grad:
            p.add_(0.1 * torch.randn_like(p))
    return model


# ---- names ----
def old_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As in the file that OpenAI's model was published in: no prefix, and causal masks."""
    made = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    n = SIZES["n_positions"]
    for i in range(SIZES["n_layer"]):
        made[f"h.{i}.attn.bias"] = torch.ones(n, n).tril().view(1, 1, n, n)
        made[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return made


def masks_too(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"transformer.{name}": value for name, value in old_names(tensors).items()}


@torch.no_grad()
@pytest.mark.parametrize("rename", [dict, old_names, masks_too])
def test_names_with_and_without_prefix_and_masks_give_the_same_model(
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]], folder: Path
) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(rename(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    model, _ = lora.load(folder, device="cpu")
    assert (model(some_ids()) - theirs()(some_ids()).logits).abs().max() < 1e-5
    assert set(dict(model.named_parameters())) == set(tensors)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_file_without_one_bias_is_refused_by_its_name(folder: Path) -> None:
    tensors = old_names(load_file(folder / "model.safetensors"))
    del tensors["h.1.attn.c_attn.bias"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 tensors are missing \(transformer\.h\.1\.attn\.c_attn\.bias\), 0 have"):
        lora.load(folder, device="cpu")


# ---- 4 and 8 bits ----
def test_quantizing_while_loading_packs_the_turned_matrices(folder: Path) -> None:
    model, _ = lora.load(folder, quantize="nf4", device="cpu")
    packed = {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    assert sorted(packed) == sorted(LAYERS)
    reference = theirs()
    for name, layer in packed.items():
        conv = reference.get_submodule(name)
        want = quantize_tensor(conv.weight.T.contiguous(), "nf4", 64, True, name=name)
        assert (layer.out_features, layer.in_features) == tuple(conv.weight.shape)[::-1]
        assert torch.equal(layer.weight_as(torch.float32), Linear4bit(want).weight_as(torch.float32))
        assert torch.equal(layer.bias, conv.bias)
    after, _ = lora.load(folder, device="cpu")
    lora.quantize(after, "nf4")
    assert torch.equal(model(some_ids()), after(some_ids()))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_written_quantized_model_is_ours_and_transformers_again(kind: str, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model, tokenizer = lora.load(folder, quantize=kind, device="cpu")
    lora.save_pretrained(model, tokenizer, tmp_path / "q", dtype=torch.float32)
    again, _ = lora.load(tmp_path / "q", device="cpu")
    want = model(some_ids())
    assert torch.equal(again(some_ids()), want)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32, device_map="cpu")
    assert (other(some_ids()).logits - want).abs().max() < 3e-2 * want.abs().max()  # its CPU path rounds on the way


# ---- adapters ----
@torch.no_grad()
@pytest.mark.parametrize("targets", [TARGETS, ["c_attn"], ["attn.c_proj", "c_fc"]])
def test_an_adapter_of_peft_attaches(targets: list[str], folder: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets, fan_in_fan_out=True)
    reference = shake(peft.get_peft_model(theirs(), config).eval())
    reference.save_pretrained(tmp_path / "a")
    want = reference(some_ids()).logits
    model, _ = lora.load(folder, device="cpu")
    before = model(some_ids())
    lora.attach(model, tmp_path / "a")
    assert (model(some_ids()) - want).abs().max() < 1e-5
    assert (before - want).abs().max() > 1e-2
    lora.merge(model)
    assert (model(some_ids()) - want).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"targets": TARGETS}, {"targets": ["c_attn", "mlp.c_proj"]}])
def test_peft_loads_an_adapter_of_ours(options: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    model, _ = lora.load(folder, device="cpu")
    before = model(some_ids())
    shake(lora.wrap(model, r=4, alpha=12.0, **options)).eval()
    want = model(some_ids())
    lora.save(model, tmp_path / "a")
    other = peft.PeftModel.from_pretrained(theirs(), tmp_path / "a").eval()
    assert (other(some_ids()).logits - want).abs().max() < 1e-5
    assert (before - want).abs().max() > 1e-2


@torch.no_grad()
def test_a_merged_adapter_is_written_for_transformers(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = lora.load(folder, device="cpu")
    shake(lora.wrap(model, r=4)).eval()
    want = model(some_ids())
    lora.save_pretrained(lora.merge(model), tokenizer, tmp_path / "out", dtype=torch.float32)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (other(some_ids()).logits - want).abs().max() < 1e-4


# ---- config.json ----
def test_both_dialects_of_config_are_one(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"resid_pdrop": 0.0, "attn_pdrop": 0.2, "reorder_and_upcast_attn": True, "layer_norm_epsilon": 1e-6}
    raw |= {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False, "tie_word_embeddings": False}
    new = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
    new |= {"n_positions": "max_position_embeddings"}
    config = GPT2Config.from_json(raw)
    assert GPT2Config.from_json({new.get(key, key): value for key, value in raw.items()}) == config
    assert GPT2Config.from_json(raw | {new[key]: raw[key] for key in new}) == config
    assert GPT2Config.from_json(config.to_json()) == config
    assert (config.max_length, config.head_dim, config.intermediate_size) == (128, 16, 256)
    assert config.dropouts == (0.0, 0.1, 0.2) and config.eps == 1e-6 and config.upcast and not config.tied
    assert [config.scale(i) for i in range(2)] == [1.0, 0.5]


def test_the_published_model_has_its_number_of_parameters() -> None:
    raw = {"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "n_ctx": 1024}
    with torch.device("meta"):
        model = GPT2Config.from_json(raw).build()
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no width": ({"n_embd": None}, "lacks n_embd"),
    "width a text": ({"n_embd": "64"}, "lacks n_embd, or holds no whole number"),
    "two widths": ({"hidden_size": 32}, "n_embd=64 and hidden_size=32"),
    "no heads": ({"n_head": 0}, "n_head=0, which must be a whole number above 0"),
    "layers below 0": ({"n_layer": -1}, "n_layer=-1, which must be"),
    "heads that do not divide": ({"n_head": 5}, "n_embd=64, which n_head=5 does not divide"),
    "n_inner a fraction": ({"n_inner": 1.5}, "n_inner=1.5, which must be"),
    "eps a text": ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon='small', which must be"),
    "another activation": ({"activation_function": "tanh"}, "activation_function='tanh'; gpt2 has gelu_new, .*relu"),
    "cross attention": ({"add_cross_attention": True}, "add_cross_attention"),
}


@pytest.mark.parametrize("wrong", list(WRONG))
def test_a_wrong_config_is_one_clear_error(wrong: str) -> None:
    change, text = WRONG[wrong]
    with pytest.raises(ValueError, match=text):
        GPT2Config.from_json(SIZES | change)


def test_a_row_longer_than_the_positions_is_refused(folder: Path) -> None:
    model, _ = lora.load(folder, device="cpu")
    with pytest.raises(ValueError, match="129 tokens in a row, and this model was built for 128"):
        model(torch.ones(1, 129, dtype=torch.int64))
