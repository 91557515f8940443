"""Frozen layers with their updates as a GPU takes them, in 16 bits: against the formula in float64, and the other way.

On a CPU the same code runs where `way` says so; what only a GPU shows is at the end.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora
from lora.kernels import dropout, linear16
from lora.kernels.code4 import Weight4, byte_table
from lora.kernels.dropout import Drop, keep_mask
from lora.kernels.gemv4 import permute_table
from lora.kernels.linear16 import can_linear16, linears16
from lora.layer import together
from lora.quant.weight import quantize_tensor

F64 = torch.float64


@pytest.fixture
def way(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Sends layers through linear16.py, whatever device and dtype they have, or never."""

    def send(there: bool) -> None:
        for module in (linear16, dropout):
            monkeypatch.setattr(module, "on_gpu", lambda t: there)
        monkeypatch.setattr(linear16, "HALVES", (torch.bfloat16, torch.float16, torch.float32, F64))

    return send


@pytest.fixture
def poison() -> Iterator[None]:
    """Fills memory that nobody has written yet with nan."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each pass through linear16.py had."""
    seen: list[int] = []
    apply = linear16._Linear16.apply

    def count(x: Tensor, weights: Any, *rest: Any) -> Any:
        seen.append(len(weights))
        return apply(x, weights, *rest)

    monkeypatch.setattr(linear16._Linear16, "apply", count)
    return seen


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, requires_grad=True)


def weight(N: int, K: int, four: bool) -> tuple[Any, Tensor]:
    """A frozen weight and what it is in float64."""
    w = torch.randn(N, K)
    if not four:
        return w.double(), w.double()
    p = quantize_tensor(w, "nf4", 32, True)
    q, shape = p.q.view(-1), (N, K)
    return Weight4(q, p.scales, byte_table(p.code), permute_table(p.code), p.block, shape), p.dequantize().double()


def case(four: bool, p: tuple[float, ...], sizes: tuple[int, ...] = (6, 5, 8)) -> tuple[Any, ...]:
    """x, weights, the same dense, biases, updates, dropouts of three layers of one input; the second has no update."""
    K, seed = 10, torch.tensor([4711])
    made = [weight(n, K, four) for n in sizes]
    lows = [None if i == 1 else (leaf(2 + i, K), leaf(n, 2 + i), 0.7 + i * four) for i, n in enumerate(sizes)]
    biases = [leaf(n) if i < 2 else None for i, n in enumerate(sizes)]
    drops = [Drop(q, seed, i) if q else None for i, q in enumerate(p)] if any(p) else []
    return leaf(2, 3, K), [w for w, _ in made], [w for _, w in made], biases, lows, drops


def formula(x: Tensor, dense: Any, biases: Any, lows: Any, drops: Any) -> list[Tensor]:
    ys = []
    for i, (w, bias, low) in enumerate(zip(dense, biases, lows, strict=True)):
        y = x @ w.T if bias is None else x @ w.T + bias
        if low is not None:
            drop, h = drops[i] if drops else None, x
            if drop is not None:
                h = x * drop.scale * keep_mask(x.numel() // x.shape[-1], x.shape[-1], drop).view(x.shape)
            y = y + low[2] * (h @ low[0].T) @ low[1].T
        ys.append(y)
    return ys


@pytest.mark.parametrize("p", [(0.0, 0.0, 0.0), (0.5, 0.0, 0.3), (0.0, 0.0, 0.3), (0.4, 0.0, 0.0)])
@pytest.mark.parametrize("four", [False, True])
@pytest.mark.parametrize("large", [0, 2**60], ids=["first", "behind"])
def test_results_and_gradients_are_those_of_the_formula(
    large: int, four: bool, p: tuple[float, ...], poison: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear16, "LARGE", large)
    x, weights, dense, biases, lows, drops = case(four, p)
    x = x if large else x.detach().view(6, 10).requires_grad_()
    leaves = [t for t in (x, *biases, *(t for low in lows if low for t in low[:2])) if t is not None]
    want = formula(x, dense, biases, lows, drops)
    dys = [torch.randn_like(y) for y in want]
    exact = torch.autograd.grad(want, leaves, dys)
    for _ in range(2):
        ys = linears16(x, weights, biases, lows, drops)
        got = torch.autograd.grad(ys, leaves, dys)
        for one, other in zip((*ys, *got), (*want, *exact), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("large", [0, 2**60], ids=["first", "behind"])
@pytest.mark.parametrize("four", [False, True])
def test_one_layer_gives_what_a_further_update_can_be_added_to_in_place(
    four: bool, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear16, "LARGE", large)
    x, weights, dense, biases, lows, _ = case(four, (0.0,) * 3)
    (y,) = linears16(x, weights[:1], biases[:1], lows[:1])
    assert not y._is_view() and y.is_contiguous()
    torch.testing.assert_close(y, formula(x, dense[:1], biases[:1], lows[:1], [])[0], rtol=1e-9, atol=1e-9)


def test_what_nobody_asks_for_is_not_made() -> None:
    x, weights, _, _, lows, _ = case(False, (0.0,) * 3)
    a, b, s = lows[0]
    (y,) = linears16(x.detach(), weights[:1], [None], [(a, b, s)])
    y.sum().backward()
    assert x.grad is None and a.grad is not None and b.grad is not None
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        (y,) = linears16(x, weights[:1], [None], [(a.detach(), b, s)])
    assert all(t.data_ptr() != x.data_ptr() for t in kept)  # only da reads x
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("four", [False, True])
def test_nothing_is_kept_but_x_thin_factors_and_the_seed(four: bool, p: float) -> None:
    x, weights, _, _, lows, drops = case(four, (p, 0.0, p))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linears16(x, weights, [None] * 3, lows, drops)
    mine = {t.data_ptr() for t in (x, *(t for low in lows if low for t in low[:2]))}
    fresh = [t for t in kept if t.data_ptr() not in mine]
    assert sorted(t.numel() for t in fresh) == [1] * (2 if p else 0) + [6 * (2 + 4), (2 + 4) * 10]


# ---- the layer ----
class Conv1D(nn.Module):
    """GPT-2's, as transformers has it."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) * 0.2), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(12, 7),
    "no bias": lambda: nn.Linear(12, 7, bias=False),
    "conv1d": lambda: Conv1D(7, 12),
    "nf4": lambda: lora.quantize(nn.Sequential(nn.Linear(12, 7)), "nf4", block=32)[0],  # type: ignore[index]
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {}, "pissa": {"init": "pissa"}, "frozen a": {"train_a": False}, "bias": {"bias": "all"},
    "dora": {"dora": True}, "rslora": {"rslora": True, "alpha": 3.0},
}  # fmt: skip


def wrapped(kind: str, **options: Any) -> Any:
    torch.manual_seed(3)
    model = lora.wrap(nn.ModuleDict({"one": KINDS[kind]()}), r=3, targets=["one"], **options)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    return model.double()


def both(model: Any, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y and all gradients of model["one"]."""
    x = x.clone().requires_grad_()
    y = model["one"](x)
    return [y, *torch.autograd.grad(y, [x, *(p for p in model.parameters() if p.requires_grad)], dy)]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_gives_what_it_gave(kind: str, option: str, way: Any, calls: list[int]) -> None:
    model = wrapped(kind, **OPTIONS[option])
    x, dy = torch.randn(2, 5, 12, dtype=F64), torch.randn(2, 5, 7, dtype=F64)
    way(False)
    want = both(model, x, dy)
    assert not calls
    way(True)
    got = both(model, x, dy)
    inside = option != "dora" and not (option == "bias" and kind != "no bias")
    assert calls == [1] * inside
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_further_adapters_are_added_behind(kind: str, way: Any, calls: list[int]) -> None:
    model = wrapped(kind)
    lora.wrap(model, r=2, targets=["one"], name="second")
    lora.activate(model, ["default", "second"])
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    model.double()
    x, dy = torch.randn(4, 12, dtype=F64), torch.randn(4, 7, dtype=F64)
    way(False)
    want = both(model, x, dy)
    way(True)
    for one, other in zip(both(model, x, dy), want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert calls == [1]


@pytest.mark.parametrize("how", ["hook", "own forward", "trains", "other dtype", "off", "compiled"])
def test_the_base_is_called_where_it_must_be(how: str, way: Any, calls: list[int]) -> None:
    model = wrapped("linear")
    layer, x = model["one"], torch.randn(3, 12, dtype=F64)
    way(True)
    seen: list[int] = []
    if how == "hook":
        layer.base.register_forward_hook(lambda *_: seen.append(1))
    elif how == "own forward":  # as accelerate sets it
        forward = layer.base.forward
        layer.base.forward = lambda x: (seen.append(1), forward(x))[1]
    elif how == "trains":
        layer.base.weight.requires_grad_(True)
    elif how == "other dtype":
        layer.base.float()
        x = x.float()
        assert can_linear16(x, layer.base.weight)
        layer.base.double()
    elif how == "off":
        layer.off = True
    if how == "other dtype":
        with pytest.raises(RuntimeError, match="dtype"):
            layer(x)
    elif how == "compiled":
        torch._dynamo.reset()
        y = torch.compile(layer, backend="eager", fullgraph=True)(x)
        way(False)
        torch.testing.assert_close(y, layer(x))
    else:
        layer(x)
    assert not calls and len(seen) == (how in ("hook", "own forward"))


def test_autocast_to_another_dtype_takes_the_old_way(way: Any) -> None:
    way(True)
    x = torch.randn(2, 3, dtype=torch.float16)
    assert can_linear16(x, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_linear16(x, x) and can_linear16(x.bfloat16(), x)


# ---- several on one input ----
@pytest.mark.parametrize("four", [False, True])
def test_together_equals_one_after_the_other(four: bool, way: Any, calls: list[int]) -> None:
    model: Any = nn.ModuleDict({n: nn.Linear(12, s) for n, s in (("q", 8), ("k", 4), ("v", 6))})
    model = lora.quantize(model, "nf4", block=32) if four else model
    model = lora.wrap(model, r=3, targets=["q", "v"]).double()
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    learned = [p for p in model.parameters() if p.requires_grad]
    found = []
    for there, one_by_one in ((False, True), (True, True), (True, False)):
        way(there)
        torch.manual_seed(5)
        x = torch.randn(2, 5, 12, dtype=F64, requires_grad=True)
        ys = [layer(x) for layer in model.values()] if one_by_one else together(x, *model.values())
        dys = [torch.randn(2, 5, n, dtype=F64) for n in (8, 4, 6)]
        found.append([*ys, *torch.autograd.grad(ys, [x, *learned], dys)])
    assert calls == [1, 1, 3]
    for got in found[1:]:
        for one, other in zip(got, found[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    model["k"].register_forward_hook(lambda *_: calls.append(0))
    together(x, *model.values())
    assert calls == [1, 1, 3, 1, 0, 1]


# ---- dropout ----
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_falls_by_a_seed_of_the_generator_alike_in_the_second_run(kind: str, way: Any) -> None:
    model = wrapped(kind, dropout=0.4)
    layer, learned = model["one"].train(), [p for p in model.parameters() if p.requires_grad]
    x, dy = torch.randn(20, 12, dtype=F64, requires_grad=True), torch.randn(20, 7, dtype=F64)
    way(True)
    torch.manual_seed(9)
    seed = torch.randint(2**62, (1,))
    mask = keep_mask(20, 12, Drop(0.4, seed, 0)).double() * Drop(0.4, seed, 0).scale
    adapter = layer.adapters["default"]
    want = layer.base(x) + adapter.scale * ((x * mask) @ adapter.a.T) @ adapter.b.T
    exact = torch.autograd.grad(want, [x, *learned], dy)
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(9)
        y = run(x)
        torch.manual_seed(1)  # what the generator does between does not matter
        got = torch.autograd.grad(y, [x, *learned], dy)
        for one, other in zip((y, *got), (want, *exact), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_layers_that_are_called_together_drop_each_in_its_own_way(way: Any) -> None:
    model: Any = lora.wrap(
        nn.ModuleDict({n: nn.Linear(12, 8, bias=False) for n in "qkv"}), r=3, dropout=0.5, targets=["*"]
    )
    same = copy.deepcopy(model["q"])
    nn.init.normal_(same.adapters["default"].b)
    layers = [copy.deepcopy(same) for _ in "qkv"]
    way(True)
    x = torch.randn(9, 12)
    torch.manual_seed(2)
    ys = together(x, *layers)
    assert not torch.equal(ys[0], ys[1]) and not torch.equal(ys[1], ys[2])
    torch.manual_seed(2)
    assert all(torch.equal(y, z) for y, z in zip(ys, together(x, *layers), strict=True))
    for layer in layers:
        layer.eval()
    ys = together(x, *layers)
    assert torch.equal(ys[0], ys[1])


# ---- on a GPU ----
def model16(kind: str, device: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    model: Any = nn.ModuleDict({"one": nn.Linear(512, 768)})
    if kind == "nf4":
        model = lora.quantize(model, "nf4")
    model = lora.wrap(model.bfloat16(), r=16, targets=["one"], **options).to(device).train()
    nn.init.normal_(model["one"].adapters["default"].b, std=0.02)
    return model


def error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm())


@pytest.mark.parametrize("large", [0, 2**60], ids=["first", "behind"])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # torch's, where a thread begins with a product
def test_on_a_gpu_it_is_as_near_to_float64_and_takes_no_more_memory(
    kind: str, large: int, gpu: torch.device, way: Any, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear16, "LARGE", large)
    model = model16(kind, gpu)
    x, dy = torch.randn(3, 700, 512, device=gpu), torch.randn(3, 700, 768, device=gpu)
    x16, dy16 = x.bfloat16(), dy.bfloat16()
    exact = copy.deepcopy(model)
    if kind == "nf4":
        base = nn.Linear(512, 768, device=gpu, dtype=F64).requires_grad_(False)
        base.weight.copy_(exact["one"].base.weight_as(torch.bfloat16))
        base.bias.copy_(exact["one"].base.bias)
        exact["one"].base = base
    want = both(exact.double(), x16.double(), dy16.double())
    errors, peaks = [], []
    for there in (False, True):
        way(there)
        both(model, x16, dy16)  # buffers that are used again
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        got = both(model, x16, dy16)
        peaks.append(torch.cuda.max_memory_allocated() - start)
        again = both(model, x16, dy16)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
        errors.append([error(a, b) for a, b in zip(got, want, strict=True)])
    assert calls == [1] * 3
    assert all(new <= 1.1 * old for old, new in zip(*errors, strict=True)), errors
    # gradients of the factors are made in float32, where the other way rounds them and casts them after
    assert peaks[1] <= peaks[0] + 16 * (512 + 768) * 4, peaks


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
def test_on_a_gpu_dropout_is_new_each_time_a_graph_runs(kind: str, gpu: torch.device, calls: list[int]) -> None:
    model = model16(kind, gpu, dropout=0.5)
    layer, x = model["one"], torch.randn(300, 512, device=gpu, dtype=torch.bfloat16, requires_grad=True)
    learned = [x, *(p for p in model.parameters() if p.requires_grad)]

    def run() -> tuple[Tensor, list[Tensor]]:
        y = layer(x)
        return y.detach(), list(torch.autograd.grad(y, learned, torch.ones_like(y)))

    run()
    torch.manual_seed(4)
    y, grads = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run()
    torch.manual_seed(4)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip((y, *grads), (recorded[0], *recorded[1]), strict=True))
    graph.replay()
    assert not torch.equal(y, recorded[0])
    assert calls == [1] * 3
    torch.manual_seed(4)
    z = checkpoint(layer, x, use_reentrant=False)
    assert torch.equal(z, y)
    assert all(
        torch.equal(a, b) for a, b in zip(torch.autograd.grad(z, learned, torch.ones_like(z)), grads, strict=True)
    )


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
def test_on_a_gpu_dropout_keeps_no_mask(kind: str, gpu: torch.device) -> None:
    model = model16(kind, gpu, dropout=0.1)
    x = torch.randn(2000, 512, device=gpu, dtype=torch.bfloat16, requires_grad=True)
    model["one"](x).sum().backward()  # buffers that are used again
    before = torch.cuda.memory_allocated()
    y = model["one"](x)
    assert torch.cuda.memory_allocated() - before < y.numel() * 2 + 2000 * 16 * 2 + 2**16
