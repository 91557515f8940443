"""Linear4bit against the dense layer, and what quantize_module replaces, leaves and refuses."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora.quant import linear as linear_file
from lora.quant.linear import Linear4bit, quantize_module
from lora.quant.weight import quantize_tensor


class Tiny(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 64)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)
        self.lm_head = nn.Linear(64, 50, bias=False)
        if tied:
            self.lm_head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.down(torch.tanh(self.up(self.table(ids)))))


def made(double: bool = True, bias: bool = True) -> Linear4bit:
    return Linear4bit(quantize_tensor(torch.randn(48, 96), double=double), torch.randn(48) if bias else None)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_linear4bit_equals_a_dense_layer_of_the_decoded_weight(bias: bool, double: bool) -> None:
    layer, x = made(double, bias), torch.randn(2, 5, 96)
    want = nn.functional.linear(x, layer.weight_as(torch.float32), layer.bias)
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to": lambda m: m.to(torch.bfloat16),
    "to device and dtype": lambda m: m.to("cpu", torch.float16),
    "double": lambda m: m.double(),
    "within a model": lambda m: nn.Sequential(m).half()[0],
}


@pytest.mark.parametrize("cast", list(CASTS))
@pytest.mark.parametrize("double", [False, True])
def test_a_cast_leaves_every_scale_and_so_the_weight(double: bool, cast: str) -> None:
    layer = made(double)
    before, weight = {k: v.clone() for k, v in layer.named_buffers()}, layer.weight_as(torch.float32)
    layer = CASTS[cast](layer)
    for key, value in layer.named_buffers():
        assert value.dtype == before[key].dtype and torch.equal(value, before[key]), key
    assert layer.bias.dtype != torch.float32
    assert torch.equal(layer.weight_as(torch.float32), weight)
    x = torch.randn(3, 96).to(layer.bias.dtype)
    exact = x.double() @ layer.weight_as(x.dtype).double().T + layer.bias.double()
    tol = {torch.float16: 0.05, torch.bfloat16: 0.3, torch.float64: 1e-10}[x.dtype]
    assert layer(x).dtype == x.dtype
    torch.testing.assert_close(layer(x).double(), exact, rtol=0, atol=tol)


def test_output_has_the_dtype_of_the_input_whatever_the_bias_has() -> None:
    layer = made()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert layer(torch.randn(2, 96).to(dtype)).dtype == dtype


def test_nothing_of_it_is_trainable_and_the_gradient_passes_through() -> None:
    layer, x = made(), torch.randn(2, 96, requires_grad=True)
    assert not any(p.requires_grad for p in layer.parameters())
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight_as(torch.float32).sum(0).expand(2, 96), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("double", [False, True])
def test_state_moves_to_another_layer(double: bool) -> None:
    one, two, x = made(double), made(double), torch.randn(2, 96)
    assert not torch.equal(one(x), two(x))
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(x), two(x))
    names = ["weight", "absmax", "nested_absmax", "nested_offset"] if double else ["weight", "absmax"]
    assert sorted(one.state_dict()) == sorted([*names, "bias"])


def test_repr_says_the_code_and_the_bits_of_a_weight() -> None:
    layer = Linear4bit(quantize_tensor(torch.randn(256, 1024), double=False))
    assert "1024, 256, nf4, block=64, 4.500 bit/weight" in repr(layer)
    layer = Linear4bit(quantize_tensor(torch.randn(1024, 1024)))
    assert "4.127 bit/weight" in repr(layer)


def test_a_weight_that_is_no_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a matrix"):
        Linear4bit(quantize_tensor(torch.randn(2, 3, 4)))


# ---- quantize_module ----
def test_linear_layers_are_replaced_and_the_head_is_left() -> None:
    model = Tiny()
    head, bias = model.lm_head, model.up.bias
    assert quantize_module(model) is model
    assert isinstance(model.up, Linear4bit) and isinstance(model.down, Linear4bit)
    assert model.lm_head is head and type(model.table) is nn.Embedding
    assert torch.equal(model.up.bias, bias)


def test_each_layer_computes_what_its_decoded_weight_would() -> None:
    model, dense = Tiny(), Tiny()
    dense.load_state_dict(model.state_dict())
    quantize_module(model, block=32, double=False)
    with torch.no_grad():
        dense.up.weight.copy_(model.up.weight_as(torch.float32))
        dense.down.weight.copy_(model.down.weight_as(torch.float32))
    ids = torch.arange(10).view(2, 5)
    torch.testing.assert_close(model(ids), dense(ids), rtol=1e-5, atol=1e-5)


def test_a_tied_head_is_left_alone_whatever_its_name() -> None:
    model = Tiny(tied=True)
    quantize_module(model, skip=())
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.table.weight
    untied = quantize_module(Tiny(), skip=())
    assert isinstance(untied.lm_head, Linear4bit)


@pytest.mark.parametrize("skip", [("up",), ("u*",), ["up", "lm_head"]])
def test_skipped_layers_stay_dense(skip: Any) -> None:
    model = quantize_module(Tiny(), skip=skip)
    assert type(model.up) is nn.Linear and isinstance(model.down, Linear4bit)


def test_a_layer_under_two_names_stays_one_layer() -> None:
    layer = nn.Linear(64, 64)
    model = nn.ModuleDict({"one": layer, "two": layer, "three": nn.Linear(64, 64)})
    quantize_module(model)
    assert isinstance(model["one"], Linear4bit) and model["one"] is model["two"] and model["three"] is not model["one"]


def test_conv1d_of_gpt2_becomes_the_same_function() -> None:
    transformers = pytest.importorskip("transformers")
    conv = transformers.pytorch_utils.Conv1D(96, 32)  # 32 in, 96 out
    with torch.no_grad():
        conv.bias.normal_()
    model = quantize_module(nn.Sequential(conv))
    layer, x = model[0], torch.randn(3, 32)
    assert isinstance(layer, Linear4bit) and (layer.in_features, layer.out_features) == (32, 96)
    assert torch.equal(layer.weight_as(torch.float32), quantize_tensor(conv.weight.T).dequantize())
    torch.testing.assert_close(layer(x), x @ layer.weight_as(torch.float32).T + conv.bias, rtol=1e-5, atol=1e-5)
    assert (layer(x) - conv(x)).norm() < 0.15 * conv(x).norm()


def test_the_mode_of_a_layer_is_kept() -> None:
    assert not quantize_module(Tiny().eval()).up.training
    assert quantize_module(Tiny().train()).up.training


def test_nothing_to_quantize_is_an_error() -> None:
    for model, skip in ((nn.Sequential(nn.ReLU()), ()), (Tiny(), ("*",)), (quantize_module(Tiny()), ("lm_head",))):
        with pytest.raises(ValueError, match="nothing was quantized"):
            quantize_module(model, skip=skip)


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = Tiny()
    with torch.no_grad():
        model.down.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"down\.weight holds 1 values that are NaN or inf"):
        quantize_module(model)


def test_a_bare_layer_another_block_and_another_code_are_refused() -> None:
    with pytest.raises(TypeError, match="itself a linear layer"):
        quantize_module(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="block=48"):
        quantize_module(Tiny(), block=48)
    with pytest.raises(ValueError, match="nf3"):
        quantize_module(Tiny(), "nf3")


def test_layers_of_one_code_share_its_tables_and_leave_nothing_behind() -> None:
    one, two = made(), made(double=False)
    other = Linear4bit(quantize_tensor(torch.randn(8, 64), "fp4"))
    assert one.table is two.table and one.permute is two.permute and one.nested_map is made().nested_map
    assert other.table is not one.table and not torch.equal(other.table, one.table)
    kept = len(linear_file._made)
    packed = dataclasses.replace(one.packed(), code=one.code.clone())  # a code of its own
    alone = Linear4bit(packed)
    assert alone.table is not one.table and torch.equal(alone.table, one.table)
    assert len(linear_file._made) == kept + 1
    del alone, packed
    assert len(linear_file._made) == kept
