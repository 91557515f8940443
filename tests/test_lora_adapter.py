"""An update is the plain LoRA that its factors say; paths that take A and B alone take no other kind."""

from typing import Any

import pytest
import torch
from torch import nn

import lora
from lora.models import reading
from lora.models.spec import Plain, group_of

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True},
    "train_a": {"train_a": False},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "parts": {"parts": {"gate_up_proj": ["up"]}},
}
PLAIN = {"plain", "rslora", "train_a"}


def wrapped(kind: str, quantized: bool) -> Any:
    torch.manual_seed(0)
    model = nn.ModuleDict({"gate_up_proj": nn.Linear(64, 96).requires_grad_(False)})
    if quantized:
        lora.quantize(model, "nf4")
    lora.wrap(model, r=4, **KINDS[kind])
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
    return model["gate_up_proj"]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_block_takes_plain_updates_alone(kind: str, quantized: bool) -> None:
    layer = wrapped(kind, quantized)
    assert layer.adapters["default"].is_plain() == (kind in PLAIN)
    if kind in PLAIN:
        assert group_of(layer).lows[0] is not None
    else:
        with pytest.raises(Plain, match="more than two factors"):
            group_of(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_takes_what_its_factors_say_in_full(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BUFFERED", {"cpu"})
    layer = wrapped(kind, True)
    part = reading.part_of(layer)
    assert (part is not None) == (kind not in ("dora", "bias", "lora_bias"))
    assert part is None or part.rank() >= layer.adapters["default"].factors()[0].shape[0]


def test_a_recording_knows_which_rows_have_which_adapter() -> None:
    model: Any = nn.Sequential(nn.Linear(64, 96))
    lora.wrap(model, r=4, targets=["0"], name="one")
    lora.wrap(model, r=4, targets=["0"], name="two")
    seen = [reading.places(model)]
    for names in (["one", "two"], ["two", "one"]):
        with lora.mixed(model, names):
            seen.append(reading.places(model))
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "dora"])
@torch.no_grad()
def test_the_output_is_that_of_the_factors_and_the_bias(kind: str, quantized: bool) -> None:
    layer = wrapped(kind, quantized)
    part, x = layer.adapters["default"], torch.randn(5, 64)
    a, b, s = part.low()
    assert a.shape[0] == b.shape[1] == part.rank and torch.allclose(part.delta(), s * b @ a, atol=1e-6)
    want = layer.base(x) + s * x @ a.T @ b.T + (part.bias.shift() if part.bias else 0.0)
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)
    for rows in (1, 3):  # few rows without a gradient take a kernel of their own
        torch.testing.assert_close(layer(x[:rows]), want[:rows], rtol=1e-5, atol=1e-5)
