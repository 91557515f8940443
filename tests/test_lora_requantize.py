"""Merging into 4 bits: nearest rounding loses a small update and is refused, another way keeps it, and undo works."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lora
from lora.quant.codebook import codebook
from lora.quant.rounding import ROUNDINGS, round_tensor
from lora.quant.weight import quantize_tensor
from lora.requantize import merge_4bit


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(128, 192), nn.Linear(192, 128), nn.Linear(128, 50)
        self.table = nn.Embedding(50, 128)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        return self.head(x + self.down(torch.relu(self.up(x))))


def tuned(size: float, kind: str = "nf4", double: bool = True) -> Any:
    """A 4-bit model with an update `size` times as large as its weights."""
    model = lora.quantize(Net(), kind, double=double, skip=["head"])
    lora.wrap(model, r=8)
    with torch.no_grad():
        for layer in (model.up, model.down):
            part = layer.adapters["default"]
            part.b.normal_()
            part.b.mul_(size * layer.base.weight_as(torch.float32).norm() / part.delta().norm())
    return model


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(32, 64), (5, 77), (301,), (1,)])
def test_each_rounding_picks_one_of_the_two_levels_beside(kind: str, double: bool, shape: tuple[int, ...]) -> None:
    w = torch.randn(shape)
    levels = codebook(kind).sort().values
    for rounding in ROUNDINGS:
        packed = round_tensor(w, kind, 64, double, rounding)
        scale = packed.absmax().repeat_interleave(64)[: w.numel()]
        x, y = w.view(-1) / scale, packed.dequantize().view(-1) / scale
        high = torch.searchsorted(levels, x.clamp(-1, 1)).clamp(1, 15)
        near = torch.minimum((y - levels[high]).abs(), (y - levels[high - 1]).abs())
        assert near.max() < 1e-5


def test_nearest_is_quantize_and_search_has_no_larger_error() -> None:
    w = torch.randn(64, 256)
    plain, nearest, search = (
        quantize_tensor(w, "nf4", 64, False),
        round_tensor(w, "nf4", 64, False, "nearest"),
        round_tensor(w, "nf4", 64, False, "search"),
    )
    assert torch.equal(plain.q, nearest.q)
    error = [(p.dequantize() - w).view(-1, 64).pow(2).sum(dim=1) for p in (plain, search)]
    assert bool((error[1] <= error[0] * 1.000001).all()) and error[1].sum() < 0.97 * error[0].sum()


def test_stochastic_rounding_is_right_in_the_mean_and_repeats_by_seed() -> None:
    w = torch.randn(1, 64)
    draw = torch.Generator().manual_seed(1)
    mean = torch.stack([round_tensor(w, "nf4", 64, False, "stochastic", draw).dequantize() for _ in range(4000)]).mean(
        0
    )
    assert (mean - w).abs().max() < 0.02 * w.abs().max()
    a, b = (round_tensor(w, "nf4", 64, True, "stochastic", torch.Generator().manual_seed(7)).q for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize("double", [False, True])
def test_nearest_loses_a_small_update_and_stochastic_keeps_it(double: bool) -> None:
    ids = torch.randint(0, 50, (1, 30))
    model = tuned(0.01, double=double)
    state = copy.deepcopy(model.state_dict())
    want = model(ids)
    with pytest.raises(ValueError, match=r"would lose what was learned: nearest rounding: .* at_least=0"):
        merge_4bit(model, "nearest")
    assert torch.equal(model(ids), want)  # undone
    lost = merge_4bit(model, "nearest", at_least=0, prompts=[ids])
    assert lost.survival < 0.2 and lost.kl is not None and lost.kl > 0
    lora.unmerge(model)
    kept = merge_4bit(model, "stochastic", prompts=[ids])
    assert 0.7 < kept.survival < 1.3 and set(kept.layers) == {"up", "down"}
    assert type(model.up.merged).__name__ == "Linear4bit"
    lora.unmerge(model)
    assert torch.equal(model(ids), want)
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())


def test_the_figures_are_those_of_the_formulas() -> None:
    model = tuned(0.3)
    before = {n: getattr(model, n).base.weight_as(torch.float32) for n in ("up", "down")}
    delta = {n: getattr(model, n).delta() for n in ("up", "down")}
    got = merge_4bit(model, "search")
    for name in ("up", "down"):
        moved = getattr(model, name).merged.weight_as(torch.float32) - before[name]
        d = delta[name]
        assert got.layers[name][0] == pytest.approx(float((moved * d).sum() / (d * d).sum()), rel=1e-4)
        assert got.layers[name][1] == pytest.approx(float((moved - d).norm() / d.norm()), rel=1e-4)
    assert got.survival > 0.9


def test_merged_and_unloaded_it_is_a_plain_4_bit_model() -> None:
    model = tuned(0.2)
    ids = torch.randint(0, 50, (1, 9))
    merge_4bit(model)
    want = model(ids)
    lora.merge(model, unload=True)
    assert type(model.up).__name__ == "Linear4bit" and torch.equal(model(ids), want)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="choose one of nearest, stochastic, search"):
        merge_4bit(tuned(0.1), "random")
    with pytest.raises(ValueError, match=r"no adapted layer is in 4 bits; use lora\.merge"):
        merge_4bit(lora.wrap(Net(), r=2))
    model = tuned(0.5)
    merge_4bit(model)
    with pytest.raises(RuntimeError, match="merged already"):
        merge_4bit(model)
