"""PiSSA: where it begins, that it trains as peft's does, and that the base stays the base on every format."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import lora
from lora.dora import dense
from lora.layer import LoRALinear, adapted
from lora.quant.linear8 import Linear8bit, quantize8

IDS = torch.arange(40).view(2, 20) % 60
TARGETS = ["q_proj", "up_proj"]


def base(kind: str = "llama") -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        small = transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=32, **still)
        return transformers.GPT2LMHeadModel(small).eval()
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def single(form: str) -> nn.Module:
    torch.manual_seed(1)
    linear: Any = nn.Linear(64, 96)
    if form == "nf4":
        linear = lora.quantize(nn.Sequential(linear), "nf4")[0]
    elif form == "int8":
        linear = Linear8bit(*quantize8(linear.weight), linear.bias)
    elif form == "bfloat16":
        linear = linear.bfloat16()
    return nn.Sequential(linear)


def theirs(kind: str, targets: list[str], how: str = "pissa") -> Any:
    fan = kind == "gpt2"
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=how, fan_in_fan_out=fan)
    return peft.get_peft_model(base(kind), config).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


def train(model: Any) -> Any:
    """Two steps of plain gradient descent."""
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None and p.requires_grad:
                    p -= 0.3 * p.grad
                p.grad = None
    return model


@pytest.mark.parametrize("form", ["float32", "bfloat16", "nf4", "int8"])
@torch.no_grad()
def test_it_begins_at_the_largest_singular_values_and_leaves_the_base_alone(form: str) -> None:
    model = single(form)
    bytes_before = {k: v.clone() for k, v in model.state_dict().items()}
    layer = lora.wrap(model, r=4, targets=["0"], init="pissa")[0]
    assert isinstance(layer, LoRALinear)
    part, w = layer.adapters["default"], dense(layer.base)
    values = torch.linalg.svdvals(w)
    start = part.scale * part.b @ part.a
    torch.testing.assert_close(torch.linalg.svdvals(start)[:4], values[:4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.linalg.svdvals(w - start)[:3], values[4:7], rtol=1e-4, atol=1e-5)
    x = torch.randn(5, 64, dtype=torch.bfloat16 if form == "bfloat16" else torch.float32)
    gap = (layer(x).float() - layer.base(x).float()).abs().max()
    assert gap <= (0.02 if form == "bfloat16" else 1e-5)
    assert all(torch.equal(v, layer.base.state_dict()[k.removeprefix("0.")]) for k, v in bytes_before.items())
    part.b.mul_(1.2)
    want = x.float() @ (w + layer.delta()).T + layer.base.bias.float()
    assert (layer(x).float() - want).abs().max() <= (0.1 if form == "bfloat16" else 1e-4)


@pytest.mark.parametrize(("kind", "targets"), [("llama", TARGETS), ("gpt2", ["c_attn", "c_fc"])])
def test_it_trains_as_pefts_does(kind: str, targets: list[str]) -> None:
    other, model = theirs(kind, targets), lora.wrap(base(kind), r=4, alpha=6.0, targets=targets, init="pissa")
    assert (logits(model) - logits(base(kind))).abs().max() < 1e-5
    train(other)
    train(model)
    assert (logits(model) - logits(base(kind))).abs().max() > 0.01
    assert (logits(model) - logits(other)).abs().max() < 1e-5


@pytest.mark.parametrize("quantized", [False, True])
def test_disabled_merged_and_unmerged_the_base_is_the_base(quantized: bool) -> None:
    model = lora.quantize(base(), "nf4") if quantized else base()
    want = logits(model)
    train(lora.wrap(model, r=4, targets=TARGETS, init="pissa"))
    tuned = logits(model)
    with lora.disabled(model):
        assert torch.equal(logits(model), want)
    lora.merge(model)
    assert (logits(model) - tuned).abs().max() < 1e-4
    with lora.disabled(model):
        assert torch.equal(logits(model), want)
    lora.unmerge(model)
    assert torch.equal(logits(model), tuned)
    lora.detach(model, "default")
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize(("kind", "targets"), [("llama", TARGETS), ("gpt2", ["c_attn", "c_fc"])])
def test_saved_it_is_a_plain_adapter_of_the_unchanged_base(kind: str, targets: list[str], tmp_path: Path) -> None:
    model = train(lora.wrap(base(kind), r=4, alpha=6.0, targets=targets, init="pissa"))
    want = logits(model)
    lora.save(model, tmp_path / "a")
    read = peft.PeftModel.from_pretrained(base(kind), tmp_path / "a").eval()
    assert (logits(read) - want).abs().max() <= 2e-6
    again = lora.attach(base(kind), tmp_path / "a", trainable=True)
    assert (logits(again) - want).abs().max() <= 2e-6
    assert {row.r for row in lora.status(again).rows} == {8} and {row.r for row in lora.status(model).rows} == {4}
    assert lora.export(tmp_path / "a", tmp_path / "v", "vllm") == []
    assert (logits(lora.attach(base(kind), tmp_path / "v")) - want).abs().max() <= 2e-6


@pytest.mark.parametrize(("kind", "targets"), [("llama", TARGETS), ("gpt2", ["c_attn", "c_fc"])])
def test_pefts_files_are_read_as_they_are_and_converted(kind: str, targets: list[str], tmp_path: Path) -> None:
    other = theirs(kind, targets)
    other.save_pretrained(tmp_path / "start")
    train(other)
    want = logits(other)
    other.save_pretrained(tmp_path / "raw")
    ours = lora.attach(base(kind), tmp_path / "raw")
    assert (logits(ours) - want).abs().max() <= 5e-6
    other.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert (logits(lora.attach(base(kind), tmp_path / "converted")) - want).abs().max() <= 5e-6
    with pytest.raises(ValueError, match="stands on PiSSA's residual"):
        lora.combine([tmp_path / "raw"], tmp_path / "no", method="svd")
    with pytest.raises(ValueError, match="stands on PiSSA's residual"):
        lora.export(tmp_path / "raw", tmp_path / "no")


@torch.no_grad()
def test_a_quick_svd_is_near_and_begins_at_the_base_all_the_same() -> None:
    quick, whole = (lora.wrap(single("float32"), r=4, targets=["0"], init=how)[0] for how in ("pissa_niter_8", "pissa"))
    x = torch.randn(5, 64)
    assert (quick(x) - quick.base(x)).abs().max() < 1e-5
    one, other = (layer.adapters["default"].b @ layer.adapters["default"].a for layer in (quick, whole))
    assert 0.98 * other.norm() < one.norm() < 1.0001 * other.norm()  # none of rank 4 holds more of the weight


def test_a_deep_copy_and_a_state_dict_keep_where_it_began() -> None:
    model = train(lora.wrap(base(), r=4, targets=TARGETS, init="pissa_niter_2"))
    twin = lora.wrap(base(), r=4, targets=TARGETS, init="pissa_niter_2")
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(twin), logits(model))
    trained = [p for _, layer in adapted(model) for p in layer.adapters.parameters()]
    assert sum(p.numel() for p in trained) == lora.status(model).trainable


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 65}, "takes r=65 singular values, and a weight of .96, 64. has 64"),
        ({"init": "svd"}, "init='svd': 'kaiming', 'pissa' or"),
        ({"init": "pissa_niter_0"}, "N iterations"),
        ({"dora": True}, "dora and init='pissa' were asked for"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    model = single("float32")
    with pytest.raises(ValueError, match=message):
        lora.wrap(model, **({"targets": ["0"], "init": "pissa"} | options))
    assert list(model.state_dict()) == ["0.weight", "0.bias"] and all(p.requires_grad for p in model.parameters())


def test_an_embedding_is_refused() -> None:
    with pytest.raises(ValueError, match="init='pissa' is for linear layers"):
        lora.wrap(base(), targets=["embed_tokens"], init="pissa")
