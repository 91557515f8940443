"""What each setting means in a model: refusals of what cannot be meant, and the model as before."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora
from lora.layer import TrainedBias, adapted
from lora.match import input_table
from lora.vocab import TrainedTokens


class Net(nn.Module):
    def __init__(self, tied: bool = False, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(20, 8), nn.Embedding(5, 8)
        self.norm: Any = norm(8) if norm is nn.LayerNorm else norm(2, 8)
        self.up, self.bare, self.head = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 20, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.place(ids % 5)
        return self.head(self.bare(torch.tanh(self.up(self.norm(x)))))


IDS = torch.arange(12).view(3, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_tokens": [3, 20]}, "is Embedding with 20 rows; ids are below that"),
        ({"train_tokens": [3, -1]}, "whole numbers from 0 on"),
        ({"train_tokens": [3, 3]}, "each once"),
        ({"train_tokens": [True]}, "token ids are whole numbers"),
        ({"train_tokens": {"tabel": [3]}}, "did you mean 'table'"),
        ({"train_tokens": {"norm": [3]}}, "none that can be adapted"),
        ({"train_tokens": [3], "targets": ["table"]}, "'table' was asked for as LoRAEmbedding and TrainedTokens"),
        ({"train_tokens": [3], "train_modules": ["table"]}, "'table' was asked for as TrainedModule and TrainedTokens"),
        ({"bias": "some"}, "bias='some': choose one of none, lora_only, all"),
        ({"bias": "all", "lora_bias": True}, "they add up to one bias: choose one"),
        ({"lora_bias": True, "targets": ["table"]}, "lora_bias is for linear layers, and 'table' is an embedding"),
        ({"targets": []}, "nothing would be adapted"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    model = Net()
    with pytest.raises(ValueError, match=message):
        lora.wrap(model, **({"targets": ["up"]} | options))
    assert not any("adapters" in key for key in model.state_dict()) and all(p.requires_grad for p in model.parameters())


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="use_dora"):
        lora.wrap(Net(), use_dora=True)


def test_a_bias_that_cannot_be_learned_beside_its_module_is_refused() -> None:
    with pytest.raises(ValueError, match=r"means norm.bias, of GroupNorm; only linear layers and LayerNorm do"):
        lora.wrap(Net(norm=nn.GroupNorm), targets=["up"], bias="all")


def test_all_biases_are_those_of_layers_and_norms() -> None:
    model = lora.wrap(Net(), targets=["up"], bias="all", r=2)
    assert isinstance(model.norm, TrainedBias) and model.up.adapters["default"].bias is not None
    assert {row.module: row.kind for row in lora.status(model).rows} == {"norm": "TrainedBias", "up": "LoRALinear"}
    assert "bias" in str(lora.status(model))


def test_tied_tokens_are_one_parameter_and_merge_into_one_weight() -> None:
    model = lora.wrap(Net(tied=True), targets=["up"], train_tokens=[4, 2], r=2)
    assert model.table.adapters["default"] is model.head.adapters["default"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 8 + 2 * 2 * 8
    base = model.table.base.weight.detach().clone()
    with torch.no_grad():
        model.table.adapters["default"].rows.add_(1.0)
    want = model(IDS)
    lora.merge(model)
    assert model.table.merged.weight is model.head.merged.weight
    torch.testing.assert_close(model(IDS), want, rtol=1e-5, atol=1e-5)
    lora.merge(model, unload=True)
    assert model.table.weight is model.head.weight and not list(adapted(model))
    others = [i for i in range(20) if i not in (2, 4)]
    assert torch.equal(model.table.weight[others], base[others]) and torch.equal(
        model.table.weight[[2, 4]], base[[2, 4]] + 1
    )


def test_tied_layers_must_train_the_same_tokens() -> None:
    with pytest.raises(ValueError, match="share their weight, and train_tokens names other ids for each"):
        lora.wrap(Net(tied=True), targets=["up"], train_tokens={"table": [1], "head": [2]})
    model = lora.wrap(Net(tied=True), targets=["up"], train_tokens={"table": [1], "head": [1]})
    assert isinstance(model.head, TrainedTokens)


def test_a_tied_head_that_carries_another_kind_is_refused() -> None:
    model = lora.wrap(Net(tied=True), targets=["head"], name="first")
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="'head' already carries LoRALinear; it cannot also be TrainedTokens"):
        lora.wrap(model, targets=["up"], train_tokens=[1], name="second")
    assert list(model.state_dict()) == keys


def test_two_adapters_with_a_row_for_one_token_do_not_add_up() -> None:
    model = lora.wrap(Net(), targets=["up"], train_tokens=[1, 2], name="one")
    lora.wrap(model, targets=["up"], train_tokens=[2, 3], name="two")
    lora.wrap(model, targets=["up"], train_tokens=[7], name="three")
    with pytest.raises(ValueError, match="'one' and 'two' both have a row for token 2"):
        lora.activate(model, ["one", "two"])
    with torch.no_grad():
        for name in ("one", "three"):
            model.table.adapters[name].rows.fill_(2.0)
    lora.activate(model, ["one", "three"])
    moved = (model.table(torch.arange(20)) - model.table.base(torch.arange(20))).abs().sum(dim=1) > 1e-6
    assert moved.nonzero().flatten().tolist() == [1, 2, 7]


def test_the_input_table_is_known_by_the_models_word_or_by_its_size() -> None:
    class Plain(nn.Module):
        def __init__(self, tables: int) -> None:
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(20, 8) for _ in range(tables))

    assert input_table(Net()) == "table" and input_table(Plain(1)) == "tables.0" and input_table(Plain(2)) is None
    with pytest.raises(ValueError, match="has no one embedding; name the module"):
        lora.wrap(Plain(2), targets=[], train_tokens=[1])


def test_a_second_adapter_that_fails_leaves_the_first_as_it_was() -> None:
    model = lora.wrap(Net(), targets=["up", "bare"], r=2, name="first")
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="takes r=9 singular values"):
        lora.wrap(model, targets=["up", "bare"], r=2, rank_pattern={"bare": 9}, init="pissa", name="second")
    assert list(model.state_dict()) == keys and lora.status(model).adapters == ("first",)
