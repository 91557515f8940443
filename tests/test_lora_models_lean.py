"""The block of a CPU against the plain path: the same states and gradients, whatever is adapted, packed or kept."""

from typing import Any

import pytest
import torch
from torch import Tensor

import lora
from lora.models import lean, llama
from lora.models.documents import Documents
from lora.models.llama import LlamaConfig
from lora.quant.linear import Linear4bit


def small(kv: int = 2, bias: bool = False, windows: tuple[int | None, ...] = (), d: int = 64) -> llama.Llama:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=d, intermediate_size=96, num_layers=3, num_heads=4, num_kv_heads=kv, head_dim=16,
        max_length=512, attention_bias=bias, output_bias=bias, mlp_bias=bias, windows=windows,
    )  # fmt: skip
    model = config.build().requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def learn(model: torch.nn.Module) -> None:
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)


def both(
    model: llama.Llama, ids: Tensor, monkeypatch: pytest.MonkeyPatch, documents: Documents | None = None, **options: Any
) -> None:
    """States and gradients of the two paths, equal; and the lean one was really taken."""
    dy = torch.randn(*ids.shape, model.config.hidden_size, dtype=model.model.norm.weight.dtype)
    made = []
    for way in (set(), {"cpu"}):
        monkeypatch.setattr(llama, "LEAN", way)
        model.zero_grad()
        h = model.hidden(ids, documents=documents, **options)
        names = {type(node[0]).__name__ for node in h.grad_fn.next_functions if node[0] is not None}
        assert ("_BlockBackward" in names) == bool(way)
        h.backward(dy)
        made.append((h.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (h0, want), (h1, got) = made
    fine = 0.01 if h0.dtype == torch.float64 else 1.0  # the plain path's norms compute in float32 there too
    torch.testing.assert_close(h1, h0, rtol=1e-5, atol=1e-5 * fine)
    assert want.keys() == got.keys() and want
    for name in want:
        bound = fine * (2e-5 * float(want[name].abs().max()) + 1e-6)
        torch.testing.assert_close(got[name], want[name], rtol=1e-4 * fine, atol=bound)


@pytest.mark.parametrize("keep", ["all", "input"])
@pytest.mark.parametrize("quantize", [None, "nf4", "plain scales", "odd"])
@pytest.mark.parametrize(("kv", "bias"), [(2, False), (4, True), (1, True)])
def test_it_equals_the_plain_path(
    keep: str, quantize: str | None, kv: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small(kv, bias, d=63 if quantize == "odd" else 64)  # 63: blocks that straddle rows, and end short
    if quantize:
        lora.quantize(model, "nf4", double=quantize == "nf4")
    learn(lora.wrap(model, r=5, alpha=7))
    model.keeping.keep = keep
    both(model, torch.randint(0, 97, (2, 33)), monkeypatch)
    both(model, torch.randint(0, 97, (1, 150)), monkeypatch)


def test_it_equals_the_plain_path_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(bias=True).double()
    learn(lora.wrap(model, r=5, alpha=7).double())
    both(model, torch.randint(0, 97, (2, 37)), monkeypatch)


@pytest.mark.parametrize("windows", [(), (7, None, 40)])
def test_packed_documents_and_windows(windows: tuple[int | None, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(windows=windows)
    learn(lora.wrap(model, r=4))
    ids = torch.randint(0, 97, (2, 160))
    both(model, ids, monkeypatch, Documents(((5, 130, 1, 24), (160,))))
    both(model, ids, monkeypatch)
    both(model, ids[:, :6], monkeypatch, positions=torch.tensor([[0, 1, 2, 3, 4, 5], [3, 4, 5, 6, 7, 8]]))


def test_some_layers_adapted_and_a_trained_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora.wrap(small(), r=4, targets=["q_proj", "v_proj", "down_proj"], alpha_pattern={"v_proj": 3.0})
    learn(model)
    model.model.embed_tokens.weight.requires_grad_(True)
    both(model, torch.randint(0, 97, (1, 20)), monkeypatch)


def test_weights_that_wait_for_their_backward_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    lora.quantize(model, "nf4")
    learn(lora.wrap(model, r=4))
    factors = [p for p in model.parameters() if p.requires_grad]
    ids, made = torch.randint(0, 97, (1, 20)), []
    block = (
        sum(m.in_features * m.out_features for m in model.model.layers[0].modules() if isinstance(m, Linear4bit)) * 4
    )
    for room, kept in ((0, 0), (2 * block, 2), (3 * block, 3)):
        monkeypatch.setattr(lean, "KEPT_WEIGHTS", room)
        specs = lean.specs_of(model, model.embed(ids), None, model.keeping)
        assert specs is not None
        assert [spec.keep_weights for spec in specs] == [False] * (3 - kept) + [True] * kept
        made.append(torch.autograd.grad(model.hidden(ids).square().sum(), factors))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*made, strict=True))


def test_a_second_backward_over_one_graph_gives_the_same_gradients() -> None:
    model = lora.wrap(small(), r=4)
    learn(model)
    h = model.hidden(torch.randint(0, 97, (1, 20)))
    factors = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(h.square().sum(), factors, retain_graph=True)
    again = torch.autograd.grad(h.square().sum(), factors)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_scales_that_change_in_place_are_read_again() -> None:
    model = small()
    lora.quantize(model, "nf4")
    learn(lora.wrap(model, r=4))
    ids = torch.randint(0, 97, (1, 20))
    before = model.hidden(ids)
    layer: Any = model.model.layers[0].mlp.up_proj.base
    layer.absmax.fill_(0)  # every block gets the scale of map[0] * absmax2 + offset
    after = model.hidden(ids)
    assert not torch.equal(before, after)
    with torch.no_grad():
        torch.testing.assert_close(after, model.hidden(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["dropout", "dora", "two adapters", "hook", "trained norm", "padding", "bfloat16"])
def test_what_it_cannot_do_takes_the_plain_path(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora.wrap(small(), r=4, dropout=0.1 if how == "dropout" else 0.0, dora=how == "dora").train()
    ids, padding = torch.randint(0, 97, (2, 8)), None
    if how == "two adapters":
        lora.wrap(model, r=2, name="second")
        lora.activate(model, ["default", "second"])
    elif how == "hook":
        model.model.layers[1].mlp.register_forward_hook(lambda *a: None)
    elif how == "trained norm":
        model.model.layers[2].input_layernorm.weight.requires_grad_(True)
    elif how == "bfloat16":
        model.bfloat16()
    elif how == "padding":
        padding = torch.tensor([[False] * 3 + [True] * 5, [True] * 8])
    monkeypatch.setattr(lean, "block", lambda *a: pytest.fail("the lean block was taken"))
    assert model.hidden(ids, padding).requires_grad
