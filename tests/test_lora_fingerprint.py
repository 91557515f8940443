"""An adapter knows its base: the same one, the same in another precision, another one."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lora
from lora.fingerprint import KEY
from lora.quant.linear8 import Linear8bit, quantize8


def base(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(96, 130), nn.ReLU(), nn.Linear(130, 64), nn.ReLU(), nn.Linear(64, 96))


def in_format(model: nn.Module, form: str) -> nn.Module:
    model = copy.deepcopy(model)
    if form in ("bfloat16", "float16"):
        return model.to(getattr(torch, form)).float()
    if form == "int8":
        for i in (0, 2, 4):
            model[i] = Linear8bit(*quantize8(model[i].weight), model[i].bias)
        return model
    if form == "float32":
        return model
    kind, _, double = form.partition(" ")
    return lora.quantize(model, kind, double=bool(double))


FORMATS = ["float32", "bfloat16", "float16", "nf4", "nf4 double", "fp4", "int8"]


def saved(model: nn.Module, folder: Path) -> Path:
    lora.wrap(model, r=2, targets=["0", "2", "4"])
    return lora.save(model, folder)


@pytest.mark.parametrize("form", FORMATS)
def test_its_own_base_is_known_without_a_word(form: str, tmp_path: Path) -> None:
    folder = saved(in_format(base(), form), tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora.attach(in_format(base(), form), folder)


@pytest.mark.parametrize("now", FORMATS)
@pytest.mark.parametrize("before", ["float32", "nf4", "nf4 double", "int8"])
def test_another_precision_is_allowed_and_said(before: str, now: str, tmp_path: Path) -> None:
    if before == now:
        return
    folder = saved(in_format(base(), before), tmp_path / "a")
    with pytest.warns(UserWarning, match="the same model in another precision"):
        lora.attach(in_format(base(), now), folder)


@pytest.mark.parametrize("now", FORMATS)
@pytest.mark.parametrize("before", ["float32", "nf4 double", "int8"])
def test_another_model_is_refused_and_the_model_left_as_it_was(before: str, now: str, tmp_path: Path) -> None:
    folder = saved(in_format(base(), before), tmp_path / "a")
    other = in_format(base(1), now)
    x = torch.randn(3, 96)
    want = other(x)
    with pytest.raises(ValueError, match="was trained on another base: .* any_base=True"):
        lora.attach(other, folder)
    assert torch.equal(other(x), want) and not lora.status(other).adapters
    lora.attach(other, folder, any_base=True)


def test_a_relative_of_the_base_is_another_model(tmp_path: Path) -> None:
    folder = saved(in_format(base(), "nf4"), tmp_path / "a")
    relative = base()
    with torch.no_grad():
        for p in relative.parameters():
            p.add_(0.1 * p.std() * torch.randn_like(p))
    with pytest.raises(ValueError, match="another base"):
        lora.attach(relative, folder)


def test_a_file_without_or_with_a_broken_fingerprint(tmp_path: Path) -> None:
    folder = saved(base(), tmp_path / "a")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    with safe_open(file, framework="pt") as f:
        sketch = json.loads(f.metadata()[KEY])
    assert len(sketch) == 3
    save_file(tensors, file, metadata={"format": "pt"})  # as peft writes it
    lora.attach(base(1), folder)
    save_file(tensors, file, metadata={"format": "pt", KEY: '{"0": 1}'})
    with pytest.raises(ValueError, match="fingerprint of the base is damaged"):
        lora.attach(base(), folder)
