"""Updates of parts of fused projections: which rows they are, in every family; as a plain LoRA; cut for loaders."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import lora
from lora.models.families import FAMILIES
from lora.parts import parts_of

IDS = torch.arange(24).view(2, 12) % 60
SMALL: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def falcon(**kind: Any) -> Any:
    config = transformers.FalconConfig(**SMALL, **kind)
    config._attn_implementation = "eager"
    return transformers.FalconForCausalLM(config)


def make(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config: Any = transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=32, **still)
        return transformers.GPT2LMHeadModel(config).eval()
    if kind == "phi3":
        more = {"num_key_value_heads": 2, "intermediate_size": 48, "pad_token_id": 0}
        return transformers.Phi3ForCausalLM(transformers.Phi3Config(**SMALL, **more)).eval()
    kinds: dict[str, dict[str, Any]] = {
        "falcon 7B": {"multi_query": True, "new_decoder_architecture": False},
        "falcon 40B": {"new_decoder_architecture": True, "num_kv_heads": 2},
        "falcon RW": {"multi_query": False, "new_decoder_architecture": False, "parallel_attn": False, "bias": True},
    }
    return falcon(**kinds[kind]).eval()


FUSED = {
    "gpt2": ("transformer.h.0.attn.c_attn", "qkv"),
    "phi3": ("model.layers.0.self_attn.qkv_proj", "qkv"),
    "falcon 7B": ("transformer.h.0.self_attention.query_key_value", "qkv"),
    "falcon 40B": ("transformer.h.0.self_attention.query_key_value", "qkv"),
    "falcon RW": ("transformer.h.0.self_attention.query_key_value", "qkv"),
}
every_family = pytest.mark.parametrize("kind", list(FUSED))


def split_by_the_model(kind: str, model: Any, y: Tensor) -> dict[str, Tensor]:
    """q, k and v of a fused output (B, T, rows), as the model's own code takes them apart."""
    if kind == "gpt2":
        return dict(zip("qkv", y.split(32, dim=-1), strict=True))
    if kind == "phi3":
        attention = model.model.layers[0].self_attn
        n, m = 4 * attention.head_dim, 2 * attention.head_dim
        return {"q": y[..., :n], "k": y[..., n : n + m], "v": y[..., n + m :]}
    return dict(zip("qkv", model.transformer.h[0].self_attention._split_heads(y), strict=True))


def shaken(model: nn.Module) -> Any:
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 if p.requires_grad else p)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


@every_family
@pytest.mark.parametrize("part", ["q", "k", "v"])
@torch.no_grad()
def test_an_update_of_one_part_changes_that_part_alone(part: str, kind: str) -> None:
    path, _ = FUSED[kind]
    model = shaken(lora.wrap(make(kind), r=2, targets=[path], parts={path: [part]}))
    layer = model.get_submodule(path)
    x = torch.randn(2, 5, 32)
    moved = split_by_the_model(kind, model, layer(x) - layer.base(x))
    assert all((t.abs().max() > 1e-3) == (name == part) for name, t in moved.items())


@every_family
def test_our_models_have_the_same_rows(kind: str) -> None:
    theirs = make(kind)
    ours = FAMILIES[theirs.config.model_type].from_json(theirs.config.to_dict()).build()
    path = FUSED[kind][0]
    layer = theirs.get_submodule(path)
    n = layer.nf if kind == "gpt2" else layer.out_features
    one, other = parts_of(theirs, path, n), parts_of(ours, path, n)
    assert list(one) == list(other) == ["q", "k", "v"]
    assert all(torch.equal(one[p], other[p]) for p in one)
    assert torch.equal(torch.cat(list(one.values())).sort().values, torch.arange(n))


@every_family
def test_it_is_an_equal_plain_adapter_for_peft_and_here(kind: str, tmp_path: Path) -> None:
    end = FUSED[kind][0].rpartition(".")[2]
    model = lora.wrap(make(kind), r=3, alpha=6.0, parts={end: ["v", "q"]}, targets=[end], rslora=True)
    base = logits(model)
    assert torch.equal(base, logits(make(kind)))
    shaken(model)
    want = logits(model)
    assert (want - base).abs().max() > 1e-3
    tensors = load_file(lora.save(model, tmp_path / "a") / "adapter_model.safetensors")
    path = FUSED[kind][0]
    b = tensors[f"base_model.model.{path}.lora_B.weight"]
    rows = parts_of(model, path, b.shape[0])
    assert b.shape[1] == 6 and not b[rows["k"]].any() and not b[rows["q"], 3:].any() and not b[rows["v"], :3].any()
    assert (logits(lora.attach(make(kind), tmp_path / "a")) - want).abs().max() <= 1e-6
    read = peft.PeftModel.from_pretrained(make(kind), tmp_path / "a").eval()
    assert (logits(read) - want).abs().max() <= 1e-6
    lora.merge(model)
    assert (logits(model) - want).abs().max() <= 1e-5
    lora.unmerge(model)
    with lora.disabled(model):
        assert torch.equal(logits(model), base)


def test_gate_and_up_of_phi3() -> None:
    path = "model.layers.0.mlp.gate_up_proj"
    model = shaken(lora.wrap(make("phi3"), r=2, targets=[path], parts={"gate_up_proj": ["up"]}))
    layer, x = model.get_submodule(path), torch.randn(3, 32)
    gate, up = (layer(x) - layer.base(x)).chunk(2, dim=-1)
    assert not gate.any() and up.abs().max() > 1e-3


@pytest.mark.parametrize("quantized", [False, True])
def test_training_leaves_the_other_rows_at_zero_and_counts_what_trains(quantized: bool) -> None:
    model = make("gpt2")
    if quantized:
        lora.quantize(model, "nf4")
    lora.wrap(model, r=2, targets=["c_attn"], parts={"c_attn": ["q", "v"]})
    learned = [p for p in model.parameters() if p.requires_grad]
    assert lora.status(model).trainable == sum(p.numel() for p in learned) == 2 * (2 * 2 * 32 + 2 * 32 * 2)
    steps, losses = torch.optim.AdamW(learned, lr=5e-3, weight_decay=0.1), []
    for _ in range(4):
        loss = model(IDS, labels=IDS).loss
        losses.append(loss.item())
        steps.zero_grad()
        loss.backward()
        steps.step()
    assert losses[-1] < losses[0]
    part = model.transformer.h[0].attn.c_attn.adapters["default"]
    b = part.factors()[1].detach()
    assert not b[32:64].any() and not b[:32, 2:].any() and b[:32, :2].any() and b[64:, 2:].any()


def test_gradients_are_those_of_the_rows() -> None:
    torch.manual_seed(1)
    model = shaken(lora.wrap(make("gpt2"), r=2, alpha=3.0, targets=["c_attn"], parts={"c_attn": ["q", "v"]}))
    layer = model.transformer.h[0].attn.c_attn
    part, x = layer.adapters["default"], torch.randn(5, 32)
    g = torch.randn(5, 96)
    got = torch.autograd.grad((layer(x) * g).sum(), (part.a, part.b))
    a_q, a_v = part.a[:2], part.a[2:]
    b_q, b_v = part.b[:32], part.b[32:]
    zero = torch.zeros(5, 32)
    dense = torch.cat((x @ a_q.T @ b_q.T, zero, x @ a_v.T @ b_v.T), dim=1) * part.scale
    want = torch.autograd.grad((dense * g).sum(), (part.a, part.b))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


class Cut(nn.Module):
    """The q and v of a fused layer as layers of their own."""

    def __init__(self, fused: Any, rows: dict[str, Tensor]) -> None:
        super().__init__()
        for name in ("q", "k", "v"):
            layer = nn.Linear(32, len(rows[name]), bias=False)
            layer.weight.data.copy_(fused.weight[rows[name]])
            self.add_module(f"{name}_proj", layer)


@pytest.mark.parametrize("kind", ["phi3", "falcon 7B", "falcon 40B"])
@torch.no_grad()
def test_cut_for_a_loader_that_knows_q_k_and_v(kind: str, tmp_path: Path) -> None:
    path = FUSED[kind][0]
    end = path.rpartition(".")[2]
    model = shaken(lora.wrap(make(kind), r=3, targets=[path], parts={end: ["q", "v"]}))
    layer = model.get_submodule(path)
    rows = parts_of(model, path, layer.out_features)
    lora.save(model, tmp_path / "a")
    split = {end: {f"{name}_proj": where.tolist() for name, where in rows.items()}}
    assert lora.export(tmp_path / "a", tmp_path / "out", "vllm", split=split) == []
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    names = {key.split(".")[-3] for key in tensors}
    assert names == {"q_proj", "v_proj"} and {t.shape[0] for k, t in tensors.items() if "lora_A" in k} == {8}
    holder = nn.Module()
    parent = holder
    *above, _ = path.split(".")
    for name in above[:-1]:
        parent.add_module(name, nn.Module())
        parent = parent.get_submodule(name)
    parent.add_module(above[-1], Cut(layer.base, rows))
    lora.attach(holder, tmp_path / "out")
    cut: Any = holder.get_submodule(".".join(above))
    x = torch.randn(4, 32)
    moved = layer(x) - layer.base(x)
    for name, piece in (("q", cut.q_proj), ("v", cut.v_proj)):
        torch.testing.assert_close(piece(x) - piece.base(x), moved[:, rows[name]], rtol=1e-5, atol=1e-5)
    assert type(cut.k_proj) is nn.Linear


def test_a_cut_that_does_not_add_up_is_refused(tmp_path: Path) -> None:
    model = shaken(lora.wrap(make("phi3"), r=2, targets=["qkv_proj"]))
    lora.save(model, tmp_path / "a")
    n = 64
    for split, message in (
        ({"q": list(range(n - 1)), "k": [0]}, "names a row twice"),
        ({"q": list(range(n - 1))}, "names 63 rows, and .* has 64"),
    ):
        with pytest.raises(ValueError, match=message):
            lora.export(tmp_path / "a", tmp_path / "out", split={"qkv_proj": split})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": {"c_attn": ["q", "w"]}}, "parts of .*c_attn' are q, k, v; asked for q, w"),
        ({"parts": {"c_attn": []}}, "asked for none"),
        ({"parts": {"c_fc": ["q"]}}, "whose rows are not known; known are c_attn"),
        ({"parts": {"c_attn": ["q"]}, "targets": ["c_fc"]}, "but none that can be adapted"),
        ({"parts": {"c_attn": ["q"]}, "dora": True}, "dora and parts were asked for"),
        ({"parts": {"c_attn": ["q"]}, "init": "pissa"}, "init='pissa' and parts were asked for"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    model = make("gpt2")
    with pytest.raises(ValueError, match=message):
        lora.wrap(model, **({"targets": ["c_attn", "c_fc"]} | options))
    assert not any("adapters" in key for key in model.state_dict())
