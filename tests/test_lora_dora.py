"""DoRA against peft's, against the dense formula, on every base, through files and merges."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import lora
from lora.dora import dense, length
from lora.layer import LoRALinear
from lora.quant.linear8 import Linear8bit, quantize8

IDS = torch.arange(40).view(2, 20) % 60


def base(kind: str = "llama") -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        small = transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=32)
        return transformers.GPT2LMHeadModel(small).eval().requires_grad_(False)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.1, attention_bias=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def stir(model: nn.Module) -> None:
    """Puts numbers that show into every factor and length."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name:
                p.mul_(1 + 0.2 * torch.rand_like(p))
            elif "lora_" in name or ".adapters." in name:
                p.normal_(std=0.2)


def layer(form: str) -> LoRALinear:
    torch.manual_seed(1)
    linear = nn.Linear(24, 40)
    if form == "nf4":
        holder = lora.quantize(nn.Sequential(linear), "nf4")
        linear = holder[0]
    elif form == "int8":
        linear = Linear8bit(*quantize8(linear.weight), linear.bias)
    elif form == "bfloat16":
        linear = linear.bfloat16()
    model = lora.wrap(nn.Sequential(linear), r=3, targets=["0"], dora=True)
    return model[0]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_peft_and_we_read_each_other(kind: str, tmp_path: Path) -> None:
    targets = ["c_attn", "c_fc"] if kind == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=targets, fan_in_fan_out=kind == "gpt2")
    theirs = peft.get_peft_model(base(kind), config).eval()
    stir(theirs)
    want = theirs(IDS).logits
    near = 1e-6 * max(1.0, float(want.abs().max()))
    theirs.save_pretrained(tmp_path / "a")
    ours = lora.attach(base(kind), tmp_path / "a")
    assert (ours(IDS).logits - want).abs().max() <= near
    assert (want - base(kind)(IDS).logits).abs().max() > 0.05
    lora.save(ours, tmp_path / "b")
    again = peft.PeftModel.from_pretrained(base(kind), tmp_path / "b").eval()
    assert (again(IDS).logits - want).abs().max() <= near
    lora.merge(ours)
    assert (ours(IDS).logits - want).abs().max() < 1e-4
    lora.unmerge(ours)
    lora.export(tmp_path / "b", tmp_path / "c")
    assert (lora.attach(base(kind), tmp_path / "c")(IDS).logits - want).abs().max() < 1e-5
    with pytest.raises(ValueError, match="it is a DoRA adapter; merge it"):
        lora.export(tmp_path / "b", tmp_path / "d", "vllm")


def test_gradients_equal_pefts() -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["q_proj", "up_proj"])
    theirs = peft.get_peft_model(base(), config)
    ours = lora.wrap(base(), r=4, alpha=6, targets=["q_proj", "up_proj"], dora=True)
    parts = {name: part for name, part in ours.named_modules() if isinstance(part, LoRALinear)}
    stir(theirs)
    pairs = []
    for name, part in parts.items():
        other, mine = theirs.base_model.model.get_submodule(name), part.adapters["default"]
        lengths = other.lora_magnitude_vector["default"].weight
        for a, b in ((mine.a, other.lora_A["default"].weight), (mine.b, other.lora_B["default"].weight)):
            a.data.copy_(b)
            pairs.append((a, b))
        mine.magnitude.data.copy_(lengths)
        pairs.append((mine.magnitude, lengths))
    for model in (ours, theirs):
        (model(IDS).logits ** 2).mean().backward()
    for a, b in pairs:
        assert a.grad is not None and torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "nf4", "int8"])
def test_a_fresh_adapter_changes_no_bit_and_lengths_need_no_dense_product(form: str) -> None:
    wrapped = layer(form)
    x = torch.randn(5, 24, dtype=torch.bfloat16 if form == "bfloat16" else torch.float32)
    assert torch.equal(wrapped(x), wrapped.base(x))
    part = wrapped.adapters["default"]
    with torch.no_grad():
        part.b.normal_()
        part.magnitude.mul_(1.3)
    want = (dense(wrapped.base) + part.delta()).norm(dim=1)
    assert torch.allclose(length(part, wrapped.base), want, rtol=2e-6)
    y = wrapped(x)
    formula = (part.magnitude / want)[:, None] * (dense(wrapped.base) + part.delta())
    assert torch.allclose(
        y.float(), x.float() @ formula.T + wrapped.base.bias.float(), atol=0.1 if form == "bfloat16" else 1e-4
    )


@torch.no_grad()
def test_with_a_plain_adapter_beside_it_the_changes_add_up() -> None:
    wrapped = layer("float32")
    x = torch.randn(5, 24)
    model = nn.Sequential(wrapped)
    lora.wrap(model, r=2, targets=["0"], name="plain")
    stir(model)
    parts = []
    for name in ("default", "plain"):
        lora.activate(model, name)
        parts.append(model(x) - wrapped.base(x))
    lora.activate(model, ["default", "plain"])
    assert torch.allclose(model(x), wrapped.base(x) + parts[0] + parts[1], atol=1e-5)
    with lora.disabled(model):
        assert torch.equal(model(x), wrapped.base(x))


def test_an_embedding_and_a_file_that_disagrees_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dora is for linear layers, and 'model.embed_tokens' is an embedding"):
        lora.wrap(base(), targets=["embed_tokens", "q_proj"], dora=True)
    folder = lora.save(lora.wrap(base(), r=2, targets=["q_proj"], dora=True), tmp_path / "a")
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": true', '"use_dora": false'))
    with pytest.raises(ValueError, match="has lengths of rows .DoRA., and .* says use_dora: false"):
        lora.attach(base(), folder)
