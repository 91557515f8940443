"""On a real model in bfloat16, the fused blocks' gradients are as near to float64's as the plain path's."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lora
from lora.eval.nll import token_nll
from lora.models import llama
from lora.models.llama import Llama
from lora.render import Batch, Example, collate


def gradients(model: Llama, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    nll, _ = token_nll(model, batch)
    nll.mean().backward()
    return {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None}


def off(got: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    assert got.keys() == truth.keys()
    above = sum(float((got[n] - truth[n]).square().sum()) for n in truth)
    return (above / sum(float(t.square().sum()) for t in truth.values())) ** 0.5


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_gradients_are_as_good_as_the_plain_path(
    device: str, quantize: str | None, stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several adapters: on one, chance makes either path the better by a factor of two."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    model, tokenizer = lora.load(stories, quantize=quantize, dtype="bfloat16", device=device)
    lora.wrap(model, r=8, alpha=16)
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. " * 4
    ids = tuple(tokenizer.encode(text)[:128])
    rows = [Example(ids[i:] + ids[:i], (False,) + (True,) * (len(ids) - 1), i) for i in range(4)]
    batch = collate(rows).to(torch.device(device))
    squares = {"plain": 0.0, "fused": 0.0}
    monkeypatch.setattr(llama, "LEAN", set())
    for _ in range(6):
        for name, p in model.named_parameters():
            if name.endswith((".a", ".b")):
                torch.nn.init.normal_(p, std=0.1 if name.endswith(".a") else 0.02)
        monkeypatch.setattr(llama, "FUSED", set())
        plain = gradients(model, batch)
        truth = gradients(copy.deepcopy(model).double(), batch)
        monkeypatch.setattr(llama, "FUSED", {device})
        fast = gradients(model, batch)
        assert len(truth) == 2 * 7 * model.config.num_layers
        assert off(fast, plain) > 0, "it was the plain path twice"
        squares["plain"] += off(plain, truth) ** 2
        squares["fused"] += off(fast, truth) ** 2
    assert 0 < squares["fused"] <= 1.1**2 * squares["plain"]
