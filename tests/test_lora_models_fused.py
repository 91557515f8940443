"""The fused block against the plain path: the same loss and gradients, whatever it keeps."""

import pytest
import torch

import lora
from lora.layer import ByRow, adapted
from lora.models import fused, llama
from lora.models.budget import parse_bytes
from lora.models.llama import LlamaConfig
from lora.train.stack import Stack


def small(qkv_bias: bool = False, kv: int = 2) -> llama.Llama:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_layers=3, num_heads=4, num_kv_heads=kv, head_dim=16,
        max_length=128, attention_bias=qkv_bias,
    )  # fmt: skip
    model = config.build().requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def gradients(model: llama.Llama, ids: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    h = model.hidden(ids)
    h.backward(dy)
    return h.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(llama, "FUSED", {"cpu"})
    monkeypatch.setattr(llama, "LEAN", set())
    return monkeypatch


@pytest.mark.parametrize("keep", fused.KEEPS)
@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("bias", [False, True])
def test_it_equals_the_plain_path(keep: str, quantize: str | None, bias: bool, on_cpu: pytest.MonkeyPatch) -> None:
    model = small(bias)
    if quantize:
        lora.quantize(model, quantize)
    lora.wrap(model, r=5, alpha=7)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    ids, dy = torch.randint(0, 97, (2, 33)), torch.randn(2, 33, 64)
    on_cpu.setattr(llama, "FUSED", set())
    h0, want = gradients(model, ids, dy)
    on_cpu.setattr(llama, "FUSED", {"cpu"})
    assert fused.specs_of(model, model.embed(ids), {None: None}, model.keeping) is not None
    model.keeping.keep = keep
    h1, got = gradients(model, ids, dy)
    assert want.keys() == got.keys() and len(want) == 3 * 7 * 2
    torch.testing.assert_close(h1, h0, rtol=1e-5, atol=1e-5)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=2e-5 * float(want[name].abs().max()) + 1e-6)


@pytest.mark.filterwarnings("ignore:grad and param do not obey")  # of a stack's views
@pytest.mark.parametrize("keep", ["all", "input"])
@pytest.mark.parametrize("ranks", [(3, 3, 3), (2, 5)])
@pytest.mark.parametrize("bias", [False, True])
def test_adapters_side_by_side_equal_the_plain_path(
    keep: str, ranks: tuple[int, ...], bias: bool, on_cpu: pytest.MonkeyPatch
) -> None:
    model = small(bias)
    lora.quantize(model, "nf4")
    for i, r in enumerate(ranks):
        lora.wrap(model, r=r, alpha=3 * i + 2, name=f"m{i}")
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    layers = [layer for _, layer in adapted(model)]
    for layer in layers:
        layer.adapters.requires_grad_(True)
    stack = Stack(layers, [f"m{i}" for i in range(len(ranks))])
    B, k = 2 * len(ranks), len(ranks)
    ids, dy = torch.randint(0, 97, (B, 21)), torch.randn(B, 21, 64)
    found = []
    for device in (set(), {"cpu"}):
        on_cpu.setattr(llama, "FUSED", device)
        model.keeping.keep = keep
        for layer, low in zip(layers, stack.lows, strict=True):
            members = [(layer.adapters[f"m{i}"], 2 * i, 2 * i + 2) for i in range(k)]
            layer.by_row = ByRow(members, low if device else None)
        assert not device or fused.specs_of(model, model.embed(ids), {None: None}, model.keeping) is not None
        stack.grad.zero_()
        h = model.hidden(ids)
        h.backward(dy)
        found.append((h.detach(), stack.grad.clone()))
    (h0, want), (h1, got) = found
    torch.testing.assert_close(h1, h0, rtol=1e-5, atol=1e-5)
    assert want.abs().sum(dim=1).min() > 0
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5 * float(want.abs().max()))
    assert torch.equal(got == 0, want == 0)  # the room that smaller ranks leave stays empty


def test_the_gradient_of_the_input_passes_through(on_cpu: pytest.MonkeyPatch) -> None:
    model = lora.wrap(small(), r=4, targets=["q_proj", "down_proj"])
    model.model.embed_tokens.weight.requires_grad_(True)
    ids, dy = torch.randint(0, 97, (1, 20)), torch.randn(1, 20, 64)
    on_cpu.setattr(llama, "FUSED", set())
    _, want = gradients(model, ids, dy)
    on_cpu.setattr(llama, "FUSED", {"cpu"})
    _, got = gradients(model, ids, dy)
    assert "model.embed_tokens.weight" in got and got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["dropout", "dora", "two adapters", "hook", "trained norm"])
def test_what_it_cannot_do_takes_the_plain_path(how: str, on_cpu: pytest.MonkeyPatch) -> None:
    model = lora.wrap(small(), r=4, dropout=0.1 if how == "dropout" else 0.0, dora=how == "dora").train()
    if how == "two adapters":
        lora.wrap(model, r=2, name="second")
        lora.activate(model, ["default", "second"])
    elif how == "hook":
        model.model.layers[1].mlp.register_forward_hook(lambda *a: None)
    elif how == "trained norm":
        model.model.layers[2].input_layernorm.weight.requires_grad_(True)
    ids = torch.randint(0, 97, (1, 8))
    assert fused.specs_of(model, model.embed(ids), {None: None}, model.keeping) is None
    assert model(ids).requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("keep", fused.KEEPS)
def test_on_a_gpu_it_is_as_good_as_the_plain_path(keep: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 errors of states and gradients against the same model in float32, beside the plain path's errors."""
    model = lora.wrap(small(qkv_bias=True), r=5, alpha=8)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    model = model.cuda()
    ids, dy = torch.randint(0, 97, (2, 65), device="cuda"), torch.randn(2, 65, 64, device="cuda")
    monkeypatch.setattr(llama, "FUSED", set())
    h64, want = gradients(model.double(), ids, dy.double())
    model.bfloat16()
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    h0, plain = gradients(model, ids, dy.bfloat16())
    monkeypatch.setattr(llama, "FUSED", {"cuda"})
    model.keeping.keep = keep
    h1, got = gradients(model, ids, dy.bfloat16())
    error = lambda a, b: float((a.double() - b.double()).norm() / b.double().norm())  # noqa: E731
    assert error(h1, h64) <= 1.3 * error(h0, h64)
    for name in want:
        assert error(got[name], want[name]) <= 1.5 * error(plain[name], want[name]) + 1e-3, name


@pytest.mark.parametrize(("text", "want"), [("24GiB", 24 * 2**30), ("500MiB", 500 * 2**20), ("24GB", 24 * 10**9)])
def test_sizes_of_memory_are_read(text: str, want: int) -> None:
    assert parse_bytes(text) == want


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "lots", "nanGiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no size of memory"):
        parse_bytes(text)
