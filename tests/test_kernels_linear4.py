"""The 4-bit linear layer against the dense formula."""

import pytest
import torch
from torch import Tensor

from lora.kernels.code4 import byte_table
from lora.kernels.gemv4 import permute_table
from lora.kernels.linear4 import Weight4, linear4, linears4
from lora.quant.weight import Packed, quantize_tensor


def layer(N: int, K: int, double: bool = False, block: int = 32) -> Packed:
    return quantize_tensor(torch.randn(N, K), "nf4", block, double)


def weight4(p: Packed) -> Weight4:
    return Weight4(p.q.view(-1), p.scales, byte_table(p.code), permute_table(p.code), p.block, (p.shape[0], p.shape[1]))


def call(x: Tensor, p: Packed, bias: Tensor | None = None, low: tuple[Tensor, Tensor, float] | None = None) -> Tensor:
    return linear4(x, weight4(p), bias, low)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(8, 16), (7, 33), (5, 96), (64, 40)])
@pytest.mark.parametrize("rows", [(1,), (3,), (2, 11), (40,)])
def test_linear4_equals_a_product_with_the_decoded_weight(
    rows: tuple[int, ...], shape: tuple[int, int], double: bool
) -> None:
    p = layer(*shape, double)
    x, bias = torch.randn(*rows, shape[1]), torch.randn(shape[0])
    want = x @ p.dequantize().T
    torch.testing.assert_close(call(x, p), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(call(x, p, bias), want + bias, rtol=1e-5, atol=1e-5)
    assert call(x, p).shape == (*rows, shape[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_linear4_computes_in_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    p, x = layer(16, 64), torch.randn(5, 64).to(dtype)
    y = call(x, p)
    assert y.dtype == dtype
    exact = x.double() @ p.dequantize(dtype).double().T
    plain = (x @ p.dequantize(dtype).T).double()
    assert (y.double() - exact).abs().max() <= 1.1 * (plain - exact).abs().max() + 1e-6


def test_linear4_of_unit_vectors_reads_the_weight_out() -> None:
    p = layer(24, 40)
    assert torch.equal(call(torch.eye(40), p).T, p.dequantize())


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_low", [False, True])
def test_linear4_gradients_pass_gradcheck(with_low: bool, with_bias: bool, double: bool) -> None:
    N, K, r = 6, 10, 3
    p = layer(N, K, double)
    x = torch.randn(2, 3, K, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(N, dtype=torch.float64, requires_grad=True) if with_bias else None
    a = torch.randn(r, K, dtype=torch.float64, requires_grad=True) if with_low else None
    b = torch.randn(N, r, dtype=torch.float64, requires_grad=True) if with_low else None
    inputs = [t for t in (x, bias, a, b) if t is not None]

    def f(*_: Tensor) -> Tensor:
        return call(x, p, bias, None if a is None or b is None else (a, b, 0.7))

    assert torch.autograd.gradcheck(f, inputs)


def test_linear4_gradients_equal_those_of_the_dense_formula() -> None:
    N, K, r, s = 33, 48, 4, 2.0
    p = layer(N, K, True)
    W = p.dequantize().double()

    def leaves() -> list[Tensor]:
        torch.manual_seed(1)
        shapes = [(2, 20, K), (N,), (r, K), (N, r)]
        return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    x, bias, a, b = ours = leaves()
    dy = torch.randn(2, 20, N, dtype=torch.float64)
    call(x, p, bias, (a, b, s)).backward(dy)
    x, bias, a, b = dense = leaves()
    (x @ W.T + bias + s * (x @ a.T) @ b.T).backward(dy)
    for got, want in zip(ours, dense, strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-9, atol=1e-9)


def test_linear4_with_a_frozen_input_still_trains_the_factors() -> None:
    p, x = layer(8, 16), torch.randn(5, 16)
    a, b = torch.randn(2, 16, requires_grad=True), torch.randn(8, 2, requires_grad=True)
    call(x, p, low=(a, b, 0.5)).sum().backward()
    assert a.grad is not None and b.grad is not None
    torch.testing.assert_close(b.grad, (0.5 * torch.ones(5, 8)).T @ (x @ a.detach().T))


def test_two_layers_share_the_scratch_buffer_without_harm() -> None:
    # both weights are unpacked into one buffer, so a backward that read a stale one would show here
    first, second = layer(40, 24), layer(16, 40)
    x = torch.randn(3, 24, requires_grad=True)
    call(call(x, first).tanh(), second).sum().backward()
    z = x.detach().clone().requires_grad_()
    ((z @ first.dequantize().T).tanh() @ second.dequantize().T).sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_low", [False, True])
def test_linear4_keeps_no_unpacked_weight_for_the_backward(with_low: bool) -> None:
    N, K = 64, 96
    p, x = layer(N, K, True), torch.randn(4, K, requires_grad=True)
    low = (torch.randn(2, K, requires_grad=True), torch.randn(N, 2, requires_grad=True), 1.0) if with_low else None
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = call(x, p, low=low)
    assert kept
    floats = [t for t in kept if t.is_floating_point()]
    assert max((t.untyped_storage().nbytes() for t in floats), default=0) < N * K
    assert any(t.data_ptr() == x.data_ptr() for t in floats) == with_low  # x is kept only where a factor needs it
    y.sum().backward()
    assert x.grad is not None


# ---- several on one input ----
@pytest.mark.parametrize("sizes", [(8, 4, 4), (7, 5), (6, 3, 10)])
@pytest.mark.parametrize("K", [16, 33])
def test_linears4_equal_one_layer_after_the_other(K: int, sizes: tuple[int, ...]) -> None:
    packed = [layer(N, K, double=i == 1) for i, N in enumerate(sizes)]
    weights = [weight4(p) for p in packed]

    def leaves() -> tuple[Tensor, list[Tensor | None], list[tuple[Tensor, Tensor, float] | None]]:
        torch.manual_seed(2)
        x = torch.randn(2, 9, K, dtype=torch.float64, requires_grad=True)
        biases: list[Tensor | None] = [
            torch.randn(N, dtype=torch.float64, requires_grad=True) if i != 1 else None for i, N in enumerate(sizes)
        ]
        lows: list[tuple[Tensor, Tensor, float] | None] = []
        for i, N in enumerate(sizes):
            a = torch.randn(2 + i, K, dtype=torch.float64, requires_grad=True)
            b = torch.randn(N, 2 + i, dtype=torch.float64, requires_grad=True)
            lows.append((a, b, 0.5 + i) if i != 1 else None)
        return x, biases, lows

    x, biases, lows = leaves()
    together = linears4(x, weights, biases, lows)
    x1, biases1, lows1 = leaves()
    alone = [linear4(x1, w, bias, low) for w, bias, low in zip(weights, biases1, lows1, strict=True)]
    for got, want in zip(together, alone, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    dys = [torch.randn(2, 9, N, dtype=torch.float64) for N in sizes]
    torch.autograd.backward(together, dys)
    torch.autograd.backward(alone, dys)
    pairs = [(x, x1), *zip(biases, biases1, strict=True)]
    for low, low1 in zip(lows, lows1, strict=True):
        pairs += [] if low is None or low1 is None else [(low[0], low1[0]), (low[1], low1[1])]
    for got_leaf, want_leaf in pairs:
        if got_leaf is not None and want_leaf is not None:
            torch.testing.assert_close(got_leaf.grad, want_leaf.grad, rtol=1e-12, atol=1e-12)


def test_linears4_take_gradients_that_lie_in_one_buffer_or_in_none() -> None:
    weights = [weight4(layer(6, 16)), weight4(layer(4, 16))]
    dy = torch.randn(5, 10)
    grads = []
    for parts in (dy.split([6, 4], dim=1), (dy[:, :6].clone(), dy[:, 6:].clone()), (dy[:, :6], None)):
        x = torch.ones(5, 16, requires_grad=True)
        ys = linears4(x, weights, [None, None], [None, None])
        used = [(y, d) for y, d in zip(ys, parts, strict=True) if d is not None]
        torch.autograd.backward([y for y, _ in used], [d for _, d in used])
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1])
    assert not torch.equal(grads[0], grads[2])
