"""LoRA-FA: A stays as it began, B is trained, and no layer keeps its input for an A that needs no gradient."""

from pathlib import Path

import pytest
import torch
from torch import nn

import lora


def net(quantize: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))
    return lora.quantize(model, "nf4") if quantize else model


@pytest.mark.parametrize("quantize", [False, True])
def test_b_alone_learns_as_in_plain_lora(quantize: bool) -> None:
    x = torch.randn(5, 64)
    grads = []
    for train_a in (True, False):
        model = lora.wrap(net(quantize), r=4, train_a=train_a)
        torch.manual_seed(1)
        for name, p in model.named_parameters():
            if ".adapters." in name:
                nn.init.normal_(p, std=0.2)
        model(x).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert {n for n in grads[0] if n.endswith(".b")} == set(grads[1]) and len(grads[1]) == 2
    for name, g in grads[1].items():
        torch.testing.assert_close(g, grads[0][name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("train_a", [True, False])
@pytest.mark.parametrize("quantize", [True, False])
def test_only_a_trained_a_keeps_the_input(train_a: bool, quantize: bool) -> None:
    layer = nn.Sequential(nn.Linear(64, 96))
    model = lora.wrap(lora.quantize(layer, "nf4") if quantize else layer, r=4, train_a=train_a)
    x = torch.randn(1000, 64, requires_grad=True)
    kept: list[int] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept.append(t.nbytes)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x * 1.0)
    assert kept.count(x.nbytes) == (1 if train_a else 0)


def test_it_is_saved_as_plain_lora(tmp_path: Path) -> None:
    model = lora.wrap(net(False), r=4, train_a=False)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4 * 96 + 4 * 64  # the two B
    assert "640 of" in str(lora.status(model))
    lora.save(model, tmp_path / "a")
    other = lora.attach(net(False), tmp_path / "a")
    x = torch.randn(3, 64)
    assert torch.equal(other(x), model(x))


def test_an_embedding_is_refused() -> None:
    with pytest.raises(ValueError, match="train_a"):
        lora.wrap(nn.Sequential(nn.Embedding(7, 4)), targets=["0"], train_a=False)
