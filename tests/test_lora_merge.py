"""Merging: the same function as one matrix, and the way back to the same bits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora
from lora.layer import Adapted, adapted

VOCAB = 41


class Plain(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16, bias=False)
        self.head = nn.Linear(16, VOCAB, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.head(x + self.down(torch.tanh(self.up(x))))


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    return transformers.GPT2LMHeadModel(config).eval()


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "dense": (lambda: Plain().eval(), {}),
    "four_bit": (lambda: lora.quantize(Plain().eval(), double=False, skip=["head"]), {}),
    "four_bit_double": (lambda: lora.quantize(Plain().eval(), skip=["head"]), {}),
    "conv1d": (gpt2, {}),
    "embedding": (lambda: Plain().eval(), {"targets": ["table", "up"]}),
    "head": (lambda: Plain().eval(), {"targets": ["head"]}),
}
every_case = pytest.mark.parametrize("case", list(CASES))


def built(case: str) -> nn.Module:
    make, options = CASES[case]
    return shake(lora.wrap(make(), r=4, **options))


def shake(model: nn.Module, name: str = "default") -> nn.Module:
    with torch.no_grad():
        for _, layer in adapted(model):
            for p in layer.adapters[name].parameters() if name in layer.adapters else ():
                p.add_(torch.randn_like(p) * 0.1)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    y: Any = model(torch.arange(14).view(2, 7) * 5 % VOCAB)
    return y if isinstance(y, Tensor) else y.logits


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@every_case
def test_merged_computes_what_unmerged_did(case: str) -> None:
    model = built(case)
    before = logits(model)
    with lora.disabled(model):
        base = logits(model)
    assert lora.merge(model) is model
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert (logits(model) - base).abs().max() > 1e-3


@every_case
def test_unmerge_gives_back_every_bit(case: str) -> None:
    model = built(case)
    before, state = logits(model), copied(model)
    lora.merge(model)
    assert lora.unmerge(model) is model
    assert torch.equal(logits(model), before)
    assert same(copied(model), state)


@every_case
def test_unload_leaves_plain_modules_and_the_original_keys(case: str) -> None:
    model = CASES[case][0]()
    dense_keys = list((gpt2() if case == "conv1d" else Plain()).state_dict())
    kinds = {name: type(m) for name, m in model.named_modules()}
    want = logits(shake(lora.wrap(model, r=4, **CASES[case][1])))
    lora.merge(model, unload=True)
    assert not any(isinstance(m, Adapted) for m in model.modules())
    assert list(model.state_dict()) == dense_keys
    if "four_bit" not in case:
        assert {name: type(m) for name, m in model.named_modules()} == kinds
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)


def test_unload_after_merge_leaves_the_merged_weights() -> None:
    model = lora.merge(built("dense"))
    merged = logits(model)
    lora.merge(model, unload=True)
    assert torch.equal(logits(model), merged) and not any(isinstance(m, Adapted) for m in model.modules())


def test_unload_puts_trained_modules_in_place() -> None:
    model = shake(lora.wrap(Plain().eval(), targets=["up"], train_modules=["head"], r=2))
    want, copy = logits(model), model.head.adapters["default"]
    lora.merge(model, unload=True)
    assert model.head is copy
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)


def test_the_merged_weight_is_the_sum_rounded_once() -> None:
    model = Plain().bfloat16().eval()
    shake(lora.wrap(model, targets=["up"], r=4))
    want = (model.up.base.weight.float() + model.up.adapters["default"].delta()).bfloat16()
    lora.merge(model, unload=True)
    assert torch.equal(model.up.weight, want)


def test_a_4_bit_base_is_merged_from_its_decoded_weight() -> None:
    model = built("four_bit")
    want = model.up.base.weight_as(torch.float32) + model.up.adapters["default"].delta()
    lora.merge(model, unload=True, dtype=torch.float16)
    assert type(model.up) is nn.Linear and torch.equal(model.up.weight, want.half())


def test_only_active_adapters_are_merged() -> None:
    model = shake(lora.wrap(Plain().eval(), r=2, name="first"), "first")
    shake(lora.wrap(model, r=3, name="second"), "second")
    lora.activate(model, ["first", "second"])
    both = logits(model)
    lora.merge(model)
    torch.testing.assert_close(logits(model), both, rtol=1e-5, atol=1e-5)
    lora.unmerge(model)
    lora.activate(model, "first")
    first = logits(model)
    lora.merge(model)
    torch.testing.assert_close(logits(model), first, rtol=1e-5, atol=1e-5)
    assert (both - first).abs().max() > 1e-3


def test_a_layer_under_two_names_is_merged_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    model, x = shake(lora.wrap(Twice().eval(), r=2)), torch.randn(3, 8)
    want = model(x)
    lora.merge(model, unload=True)
    assert type(model.first) is nn.Linear and model.first is model.second
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)


# ---- refusals ----
def test_merging_twice_is_refused() -> None:
    model = lora.merge(built("dense"))
    merged = logits(model)
    with pytest.raises(RuntimeError, match="merged already"):
        lora.merge(model)
    assert torch.equal(logits(model), merged)


def test_what_is_not_merged_cannot_be_unmerged_and_what_has_no_adapter_cannot_be_merged() -> None:
    with pytest.raises(RuntimeError, match="not merged"):
        lora.unmerge(built("dense"))
    with pytest.raises(RuntimeError, match="no adapters"):
        lora.merge(Plain())


def test_a_merged_model_does_not_train_or_change_its_adapters() -> None:
    model = lora.merge(built("dense"))
    with pytest.raises(RuntimeError, match="unmerge"):
        model.train()
    for call in (
        lambda: lora.wrap(model, name="second"),
        lambda: lora.detach(model, "default"),
        lambda: lora.activate(model, "default"),
    ):
        with pytest.raises(RuntimeError, match="merged"):
            call()
    lora.unmerge(model).train()


@pytest.mark.parametrize("unload", [False, True])
@pytest.mark.parametrize("target", ["table", "head"])
def test_a_tied_weight_is_refused_and_the_model_unchanged(target: str, unload: bool) -> None:
    model = shake(lora.wrap(Plain(tied=True).eval(), targets=[target, "up"], r=2))
    before, state = logits(model), copied(model)
    with pytest.raises(ValueError, match="shares its weight"):
        lora.merge(model, unload=unload)
    assert torch.equal(logits(model), before) and same(copied(model), state)
    assert not lora.status(model).merged


@pytest.mark.parametrize("unload", [False, True])
@pytest.mark.parametrize("case", ["dense", "four_bit", "conv1d", "embedding"])
def test_a_broken_adapter_is_refused_and_the_model_unchanged(case: str, unload: bool) -> None:
    model = built(case)
    layers = list(adapted(model))
    with torch.no_grad():
        layers[-1][1].adapters["default"].b[0, 0] = float("nan")
    state, training = copied(model), model.training
    with pytest.raises(ValueError, match=f"{layers[-1][0]} gives values that are not finite"):
        lora.merge(model, unload=unload)
    after = copied(model)
    assert all(torch.equal(after[k].nan_to_num(9.0), state[k].nan_to_num(9.0)) for k in state)
    assert after.keys() == state.keys() and model.training == training and not lora.status(model).merged


def test_unmerge_gives_back_the_mode_too() -> None:
    model = lora.wrap(Plain().train(), r=2, dropout=0.5)
    lora.unmerge(lora.merge(model))
    assert all(m.training for m in model.modules())
