"""Adapters on any model: what a fresh one changes (nothing), what is adapted, what is refused, how to switch."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tiny import IDS, VOCAB, gpt2, llama, logits
from torch import Tensor, nn

import lora
from lora.layer import LoRAEmbedding, LoRALinear, TrainedModule, adapted
from lora.models.llama import Llama, LlamaConfig


class Plain(nn.Module):
    """A small model of one's own, with names of two levels."""

    def __init__(self, vocab: int = VOCAB) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, 16)
        self.body = nn.ModuleDict({"up": nn.Linear(16, 32), "down": nn.Linear(32, 16, bias=False)})
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, vocab)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.head(self.norm(x + self.body["down"](torch.tanh(self.body["up"](x)))))


class Twice(nn.Module):
    """One linear layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first
        self.other = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.second(torch.tanh(self.first(x))))


def our_llama(tied: bool = False) -> Llama:
    return Llama(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            max_length=64,
            tied=tied,
        )
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: Plain().eval(),
    "llama": lambda: our_llama().eval(),
    "tied_llama": lambda: our_llama(tied=True).eval(),
    "hf_llama": llama,
    "hf_gpt2": gpt2,
    "four_bit": lambda: lora.quantize(our_llama()).eval(),
    "four_bit_gpt2": lambda: lora.quantize(gpt2()),
}
every_model = pytest.mark.parametrize("kind", list(MODELS))


def shake(model: nn.Module, name: str = "default", size: float = 0.1) -> nn.Module:
    """Moves the factors of one adapter off their start, so that it does something."""
    with torch.no_grad():
        for _, layer in adapted(model):
            for p in layer.adapters[name].parameters() if name in layer.adapters else ():
                p.add_(torch.randn_like(p) * size)
    return model


def bits(model: nn.Module) -> dict[str, bytes]:
    """Every tensor of a model as bytes, those of adapters left out, by the name it has without adapters."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name.replace(".base.", "."): t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for name, t in tensors.items()
        if ".adapters." not in name
    }


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in adapted(model)]


# ---- a fresh adapter ----
@every_model
def test_a_fresh_adapter_changes_no_bit(kind: str) -> None:
    model = MODELS[kind]()
    before = logits(model)
    lora.wrap(model, r=4)
    assert torch.equal(logits(model), before)
    assert names(model)


@every_model
def test_a_trained_adapter_changes_the_output(kind: str) -> None:
    model = MODELS[kind]()
    before = logits(model)
    assert (logits(shake(lora.wrap(model, r=4))) - before).abs().max() > 1e-4


def test_a_fresh_adapter_on_an_embedding_changes_no_bit() -> None:
    model = Plain()
    before = logits(model)
    lora.wrap(model, targets=["table", "up"], r=4)
    assert torch.equal(logits(model), before)
    assert isinstance(model.table, LoRAEmbedding)
    assert (model.table.adapters["default"].a == 0).all() and model.table.adapters["default"].b.std() > 0.5


def test_factors_start_in_the_kaiming_range_and_at_zero() -> None:
    model = lora.wrap(Plain(), r=8, targets=["up"])
    adapter = model.body["up"].adapters["default"]
    bound = 1 / math.sqrt(16)
    assert adapter.a.abs().max() <= bound and adapter.a.abs().max() > 0.9 * bound
    assert (adapter.b == 0).all() and adapter.a.dtype == adapter.b.dtype == torch.float32
    assert adapter.a.shape == (8, 16) and adapter.b.shape == (32, 8)


def test_only_the_adapter_is_trainable() -> None:
    model = lora.wrap(our_llama(), r=4)
    for name, p in model.named_parameters():
        assert p.requires_grad == (".adapters." in name), name


def test_wrapping_keeps_the_mode_of_each_layer() -> None:
    model = Plain().eval()
    lora.wrap(model, dropout=0.5)
    assert not any(m.training for m in model.modules())
    model.train()
    assert all(m.training for m in model.modules())


def test_an_adapted_layer_shows_what_its_base_has() -> None:
    model = lora.wrap(Plain(), targets=["up"])
    up = model.body["up"]
    assert (up.in_features, up.out_features) == (16, 32) and up.weight is up.base.weight
    with pytest.raises(AttributeError):
        up.no_such_thing  # noqa: B018


# ---- which layers ----
def test_all_linear_leaves_the_head_out() -> None:
    assert names(lora.wrap(Plain())) == ["body.up", "body.down"]
    for model in (our_llama(), our_llama(tied=True), llama(), llama(tie_word_embeddings=True)):
        lora.wrap(model)
        assert len(names(model)) == 14 and not any("head" in name for name in names(model))


def test_all_linear_takes_the_conv1d_layers_of_gpt2() -> None:
    model = lora.wrap(gpt2(), r=2)
    assert len(names(model)) == 8
    c_attn = model.get_submodule("transformer.h.0.attn.c_attn").adapters["default"]
    assert c_attn.a.shape == (2, 32) and c_attn.b.shape == (96, 2)


def test_a_head_is_known_by_the_models_own_word() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mid, self.out = nn.Embedding(9, 4), nn.Linear(4, 9), nn.Linear(9, 7)

        def get_output_embeddings(self) -> nn.Module:
            return self.out

    assert names(lora.wrap(Named())) == ["mid"]


@pytest.mark.parametrize(
    ("targets", "want"),
    [
        (["up"], ["body.up"]),
        ("body.down", ["body.down"]),
        (["body.*"], ["body.up", "body.down"]),
        (["*"], ["table", "body.up", "body.down", "head"]),
        (["head", "table"], ["table", "head"]),
    ],
)
def test_targets_are_names_last_parts_and_globs(targets: str | Sequence[str], want: list[str]) -> None:
    assert names(lora.wrap(Plain(), targets=targets)) == want


def test_a_name_does_not_match_in_the_middle_of_a_word() -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "not_q_proj": nn.Linear(4, 4)})
    assert names(lora.wrap(model, targets=["q_proj"])) == ["q_proj"]


def test_excluded_layers_are_left_out() -> None:
    model = lora.wrap(our_llama(), exclude=["down_proj", "model.layers.0.*"])
    assert len(names(model)) == 6 and all(".1." in name and "down_proj" not in name for name in names(model))


def test_scale_is_alpha_over_r_or_its_root() -> None:
    def scale(**options: Any) -> float:
        return lora.wrap(Plain(), targets=["up"], **options).body["up"].adapters["default"].scale

    assert scale(r=8, alpha=16.0) == 2.0
    assert scale(r=16, alpha=16.0, rslora=True) == 4.0
    assert scale(r=3, alpha=1.0) == 1 / 3


def test_the_output_is_base_plus_scaled_product() -> None:
    model = shake(lora.wrap(Plain(), targets=["up"], r=4, alpha=8.0))
    up, x = model.body["up"], torch.randn(5, 16)
    part = up.adapters["default"]
    want = up.base(x) + 2.0 * (x @ part.a.T) @ part.b.T
    torch.testing.assert_close(up(x), want, rtol=1e-6, atol=1e-6)


def test_rank_and_alpha_patterns_override_single_layers() -> None:
    model = lora.wrap(
        our_llama(), r=8, alpha=8.0, rank_pattern={"q_proj": 2, "model.layers.1.mlp.*": 4}, alpha_pattern={"v_proj": 24}
    )
    layers = dict(adapted(model))
    ranks = {name: layer.adapters["default"].r for name, layer in layers.items()}
    assert {r for name, r in ranks.items() if name.endswith("q_proj")} == {2}
    assert {r for name, r in ranks.items() if "1.mlp" in name} == {4}
    assert ranks["model.layers.0.mlp.up_proj"] == ranks["model.layers.0.self_attn.k_proj"] == 8
    assert layers["model.layers.0.self_attn.v_proj"].adapters["default"].scale == 3.0
    assert layers["model.layers.0.self_attn.q_proj"].adapters["default"].scale == 4.0


def test_a_whole_module_is_trained_beside_the_adapter() -> None:
    model = Plain()
    before, head = logits(model), model.head
    lora.wrap(model, targets=["up"], train_modules=["head"])
    assert isinstance(model.head, TrainedModule) and model.head.base is head
    assert torch.equal(logits(model), before)
    copied = model.head.adapters["default"].weight
    assert copied.requires_grad and not head.weight.requires_grad and copied.data_ptr() != head.weight.data_ptr()
    model(IDS).sum().backward()
    assert copied.grad is not None


def test_one_layer_under_two_names_gets_one_adapter() -> None:
    model, x = Twice(), torch.randn(3, 8)
    before = model(x)
    first = model.first
    lora.wrap(model, r=2)
    assert model.first is model.second and isinstance(model.first, LoRALinear)
    assert torch.equal(model(x), before)
    shake(model)
    lora.detach(model, "default")
    assert model.first is first and model.second is first


# ---- refusals ----
@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"targets": ["upp"]}, ValueError, "targets='upp'.*did you mean 'up'"),
        ({"targets": ["up", "dwn"]}, ValueError, "targets='dwn'.*'down'"),
        ({"targets": ["body.x*"]}, ValueError, "matches no module"),
        ({"targets": ["norm"]}, ValueError, "none that can be adapted"),
        ({"exclude": ["dow"]}, ValueError, "exclude='dow'.*'down'"),
        ({"exclude": ["*"]}, ValueError, "leaves nothing"),
        ({"rank_pattern": {"upp": 4}}, ValueError, "rank_pattern='upp'.*'up'"),
        ({"alpha_pattern": {"body.z*": 4.0}}, ValueError, "alpha_pattern"),
        ({"targets": ["up"], "rank_pattern": {"down": 4}}, ValueError, "rank_pattern='down'"),
        ({"train_modules": ["haed"]}, ValueError, "train_modules='haed'.*'head'"),
        ({"targets": ["head"], "train_modules": ["head"]}, ValueError, "leave one out"),
        ({"targets": []}, ValueError, "targets is empty"),
        ({"r": 0}, ValueError, "r=0"),
        ({"r": -3}, ValueError, "r=-3"),
        ({"r": 2.0}, ValueError, "whole number"),
        ({"r": True}, ValueError, "whole number"),
        ({"rank_pattern": {"up": 0}}, ValueError, "up=0"),
        ({"alpha": math.nan}, ValueError, "alpha=nan"),
        ({"alpha": math.inf}, ValueError, "alpha=inf"),
        ({"alpha": 0.0}, ValueError, "alpha=0"),
        ({"alpha_pattern": {"up": -1.0}}, ValueError, "up=-1"),
        ({"dropout": 1.0}, ValueError, "dropout=1.0"),
        ({"dropout": -0.1}, ValueError, "dropout"),
        ({"dropout": math.nan}, ValueError, "dropout"),
        ({"name": ""}, ValueError, "not empty"),
        ({"name": "a.b"}, ValueError, "no dot"),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_and_leaves_the_model_alone(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    model = Plain()
    keys, trainable = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=text):
        lora.wrap(model, **options)
    assert list(model.state_dict()) == keys and [p.requires_grad for p in model.parameters()] == trainable


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="finds no linear layer"):
        lora.wrap(nn.Sequential(nn.LayerNorm(4), nn.ReLU()))


def test_a_bare_layer_is_refused() -> None:
    with pytest.raises((TypeError, ValueError)):
        lora.wrap(nn.Linear(4, 4))


def test_the_same_name_twice_is_refused() -> None:
    model = lora.wrap(Plain())
    with pytest.raises(ValueError, match="already has an adapter 'default'"):
        lora.wrap(model)


def test_a_clash_of_adapted_and_copied_whole_is_refused_and_the_model_as_before() -> None:
    model = shake(lora.wrap(Plain(), targets=["up", "head"]))
    before, kinds = logits(model), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="already carries"):
        lora.wrap(model, targets=["down"], train_modules=["head"], name="second")
    assert torch.equal(logits(model), before)
    assert [type(m) for m in model.modules()] == kinds


# ---- switching ----
@every_model
def test_disabled_is_the_base_bit_for_bit(kind: str) -> None:
    model = MODELS[kind]()
    base = logits(model)
    shake(lora.wrap(model, r=4))
    on = logits(model)
    with lora.disabled(model):
        assert torch.equal(logits(model), base)
        with lora.disabled(model):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), on) and not torch.equal(on, base)


@every_model
def test_disabled_is_the_base_after_a_merge_too(kind: str) -> None:
    model = MODELS[kind]()
    base = logits(model)
    lora.merge(shake(lora.wrap(model, r=4)))
    with lora.disabled(model):
        assert torch.equal(logits(model), base)
    assert not torch.equal(logits(model), base)


def test_disabled_keeps_what_is_trainable_and_ends_on_an_error() -> None:
    model = shake(lora.wrap(Plain(), train_modules=["head"], targets=["up"]))
    on, trainable = logits(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyError), lora.disabled(model):
        assert [p.requires_grad for p in model.parameters()] == trainable
        raise KeyError
    assert torch.equal(logits(model), on)
    assert [p.requires_grad for p in model.parameters()] == trainable


def test_disabled_without_adapters_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no adapters"), lora.disabled(Plain()):
        pass


def test_adapters_are_switched_and_added_up() -> None:
    model, x = nn.ModuleDict({"one": nn.Linear(6, 5)}), torch.randn(4, 6)
    shake(lora.wrap(model, r=2, name="first"), "first")
    shake(lora.wrap(model, r=3, name="second"), "second")
    layer = model["one"]
    base = layer.base(x)
    part = {n: x @ layer.adapters[n].delta().T for n in ("first", "second")}
    assert layer.active == ("second",)
    torch.testing.assert_close(layer(x), base + part["second"], rtol=1e-5, atol=1e-6)
    lora.activate(model, "first")
    torch.testing.assert_close(layer(x), base + part["first"], rtol=1e-5, atol=1e-6)
    lora.activate(model, ["first", "second"])
    torch.testing.assert_close(layer(x), base + part["first"] + part["second"], rtol=1e-5, atol=1e-6)


def test_two_adapters_on_a_4_bit_layer_add_up() -> None:
    model, x = lora.quantize(nn.ModuleDict({"one": nn.Linear(64, 5)})), torch.randn(4, 64)
    shake(lora.wrap(model, r=2, name="first"), "first")
    shake(lora.wrap(model, r=3, name="second"), "second")
    lora.activate(model, ["first", "second"])
    layer = model["one"]
    want = layer.base(x) + x @ (layer.adapters["first"].delta() + layer.adapters["second"].delta()).T
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)


def test_a_second_adapter_may_stand_on_other_layers() -> None:
    model = Plain()
    base = logits(model)
    shake(lora.wrap(model, targets=["up"], name="first"), "first")
    first = logits(model)
    lora.wrap(model, targets=["down"], name="second")
    assert torch.equal(logits(model), base)  # the first is not active now
    lora.activate(model, "first")
    assert torch.equal(logits(model), first)
    lora.detach(model, "first")
    assert names(model) == ["body.down"]


def test_a_later_adapter_leaves_the_earlier_one_trainable() -> None:
    model = lora.wrap(Plain(), name="first")
    lora.wrap(model, name="second")
    assert all(p.requires_grad for n, p in model.named_parameters() if ".adapters." in n)


def test_an_unknown_name_is_refused() -> None:
    model = lora.wrap(Plain())
    for call in (lora.activate, lora.detach):
        with pytest.raises(KeyError, match="no adapter 'other'"):
            call(model, "other")
    with pytest.raises(ValueError, match="each adapter once"):
        lora.activate(model, ["default", "default"])
    with pytest.raises(KeyError):
        lora.detach(Plain(), "default")


@every_model
def test_detach_puts_the_original_modules_back(kind: str) -> None:
    model = MODELS[kind]()
    before, held = logits(model), bits(model)
    modules = dict(model.named_modules())
    shake(lora.wrap(model, r=4))
    lora.detach(model, "default")
    assert {n: id(m) for n, m in model.named_modules()} == {n: id(m) for n, m in modules.items()}
    assert torch.equal(logits(model), before) and bits(model) == held


def test_one_of_two_adapters_is_detached_and_the_other_stays() -> None:
    model = shake(lora.wrap(Plain(), name="first"), "first")
    want = logits(model)
    shake(lora.wrap(model, name="second"), "second")
    lora.activate(model, ["first", "second"])
    lora.detach(model, "second")
    assert torch.equal(logits(model), want)
    assert lora.status(model).adapters == ("first",)


# ---- training ----
@every_model
def test_training_changes_the_adapter_and_no_bit_of_the_base(kind: str) -> None:
    model = MODELS[kind]()
    lora.wrap(model, r=4, dropout=0.1)
    before = bits(model)
    factors = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    model.train()
    step = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        step.zero_grad()
        y: Any = model(IDS)
        y = y if isinstance(y, Tensor) else y.logits
        nn.functional.cross_entropy(y.flatten(0, 1), IDS.flatten()).backward()
        step.step()
    assert bits(model) == before
    moved = {n: p for n, p in model.named_parameters() if n in factors and not torch.equal(p, factors[n])}
    assert set(moved) == set(factors)


@pytest.mark.parametrize("four_bit", [False, True])
def test_gradients_of_an_adapted_layer_pass_gradcheck(four_bit: bool) -> None:
    model: nn.Module = nn.ModuleDict({"one": nn.Linear(6, 5)})
    model = lora.quantize(model, block=32) if four_bit else model.double()
    layer = lora.wrap(model, r=2, alpha=3.0)["one"]
    if not four_bit:
        layer.adapters.double()
    a, b = (torch.randn_like(p, dtype=torch.float64).requires_grad_() for p in layer.adapters["default"].parameters())
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    weight = layer.base.weight_as(torch.float64) if four_bit else layer.base.weight
    adapter = layer.adapters["default"]

    def ours(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        # in place of the parameters, so that float64 factors reach the product
        adapter._parameters.update(a=a, b=b)
        return layer(x)

    def dense(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return x @ (weight + 1.5 * b @ a).T + layer.base.bias

    torch.testing.assert_close(ours(x, a, b), dense(x, a, b), rtol=1e-9, atol=1e-9)
    dy = torch.randn(2, 3, 5, dtype=torch.float64)
    got, want = (torch.autograd.grad(f(x, a, b), (x, a, b), dy) for f in (ours, dense))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(ours, (x, a, b))


def test_embedding_gradients_equal_those_of_the_dense_formula() -> None:
    model = shake(lora.wrap(Plain(), targets=["table"], r=3, alpha=6.0))
    table, adapter = model.table, model.table.adapters["default"]
    dy = torch.randn(2, 7, 16)
    got = torch.autograd.grad(table(IDS), (adapter.a, adapter.b), dy)
    dense = nn.functional.embedding(IDS, table.base.weight + 2.0 * (adapter.b @ adapter.a).T)
    torch.testing.assert_close(table(IDS), dense, rtol=1e-5, atol=1e-6)
    for g, w in zip(got, torch.autograd.grad(dense, (adapter.a, adapter.b), dy), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("four_bit", [False, True])
def test_dropout_acts_in_training_only_and_on_the_adapter_only(four_bit: bool) -> None:
    model: nn.Module = nn.ModuleDict({"one": nn.Linear(64, 8)})
    layer = shake(lora.wrap(lora.quantize(model) if four_bit else model, r=4, dropout=0.5))["one"]
    x = torch.randn(3, 64)
    layer.eval()
    still = layer(x)
    assert torch.equal(layer(x), still)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    with lora.disabled(model):
        assert torch.equal(layer(x), layer.base(x))
    layer.adapters["default"].dropout = 0.0
    torch.testing.assert_close(layer(x), still, rtol=1e-6, atol=1e-6)


def test_dropout_is_right_on_average() -> None:
    layer = shake(lora.wrap(nn.ModuleDict({"one": nn.Linear(64, 8)}), r=4, dropout=0.3))["one"]
    x = torch.randn(1, 64)
    still = layer.eval()(x)
    mean = layer.train()(x.expand(20000, 64)).mean(dim=0, keepdim=True)
    torch.testing.assert_close(mean, still, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_base_keeps_its_dtype_with_float32_factors(dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"one": nn.Linear(16, 8), "two": nn.Linear(16, 8)}).to(dtype)
    lora.wrap(model, targets=["one"], train_modules=["two"], r=2)
    shake(model)
    x = torch.randn(3, 16).to(dtype)
    for layer in model.values():
        assert layer(x).dtype == dtype
        assert all(p.dtype == torch.float32 for p in layer.adapters.parameters())


def test_a_wrapped_model_can_be_copied() -> None:
    model = shake(lora.wrap(lora.quantize(our_llama()).eval(), r=4))
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    shake(twin)
    assert not torch.equal(logits(twin), logits(model))


def test_a_whole_module_around_a_target_is_refused() -> None:
    model = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(8, 8)), "outer": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match="inner"):
        lora.wrap(model, r=2, targets=["inner.0", "outer"], train_modules=["inner"])
    lora.wrap(model, r=2, train_modules=["inner"])  # "all-linear" leaves out what is trained whole
    assert [(row.module, row.kind) for row in lora.status(model).rows] == [
        ("inner", "TrainedModule"),
        ("outer", "LoRALinear"),
    ]
