"""The fused block against the plain path: the same loss and gradients, whatever it keeps."""

import pytest
import torch
from blocks import SIZES, family

import lora
from lora.kernels.dropout import Drop, keep_mask
from lora.layer import ByRow, adapted
from lora.models import fused, llama
from lora.models.budget import parse_bytes
from lora.models.documents import Documents
from lora.models.llama import LlamaConfig
from lora.models.mistral import MistralConfig
from lora.render import Example, collate
from lora.train.graph import Graphs
from lora.train.stack import Stack


def small(qkv_bias: bool = False, kv: int = 2) -> llama.Llama:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_layers=3, num_heads=4, num_kv_heads=kv, head_dim=16,
        max_length=128, attention_bias=qkv_bias,
    )  # fmt: skip
    model = config.build().requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def specs_of(model: llama.Llama, ids: torch.Tensor) -> list[fused.Spec] | None:
    x = model.embed(ids)
    turns = model.config.rotations(torch.arange(ids.shape[1])[None], x.dtype)
    return fused.specs_of(model, x, turns, {None: None}, model.keeping)


def gradients(
    model: llama.Llama, ids: torch.Tensor, dy: torch.Tensor, documents: Documents | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    h = model.hidden(ids, documents=documents)
    h.backward(dy)
    return h.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(llama, "FUSED", {"cpu"})
    monkeypatch.setattr(llama, "LEAN", set())
    return monkeypatch


@pytest.mark.parametrize("keep", fused.KEEPS)
@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("bias", [False, True])
def test_it_equals_the_plain_path(keep: str, quantize: str | None, bias: bool, on_cpu: pytest.MonkeyPatch) -> None:
    model = small(bias)
    if quantize:
        lora.quantize(model, quantize)
    lora.wrap(model, r=5, alpha=7)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    ids, dy = torch.randint(0, 97, (2, 33)), torch.randn(2, 33, 64)
    on_cpu.setattr(llama, "FUSED", set())
    h0, want = gradients(model, ids, dy)
    on_cpu.setattr(llama, "FUSED", {"cpu"})
    assert specs_of(model, ids) is not None
    model.keeping.keep = keep
    h1, got = gradients(model, ids, dy)
    assert want.keys() == got.keys() and len(want) == 3 * 7 * 2
    torch.testing.assert_close(h1, h0, rtol=1e-5, atol=1e-5)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=2e-5 * float(want[name].abs().max()) + 1e-6)


@pytest.mark.filterwarnings("ignore:grad and param do not obey")  # of a stack's views
@pytest.mark.parametrize("keep", ["all", "input"])
@pytest.mark.parametrize("ranks", [(3, 3, 3), (2, 5)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("joined", "rounded"), [(False, False), (True, False), (True, True)])
def test_adapters_side_by_side_equal_the_plain_path(
    keep: str, ranks: tuple[int, ...], bias: bool, joined: bool, rounded: bool, on_cpu: pytest.MonkeyPatch
) -> None:
    model = small(bias)
    lora.quantize(model, "nf4")
    for i, r in enumerate(ranks):
        lora.wrap(model, r=r, alpha=3 * i + 2, name=f"m{i}")
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    layers = [layer for _, layer in adapted(model)]
    for layer in layers:
        layer.adapters.requires_grad_(True)
    stack = Stack(layers, [f"m{i}" for i in range(len(ranks))], joined)
    if rounded:
        stack.round(torch.float32)
    B, k = 2 * len(ranks), len(ranks)
    ids, dy = torch.randint(0, 97, (B, 21)), torch.randn(B, 21, 64)
    found = []
    for device in (set(), {"cpu"}):
        on_cpu.setattr(llama, "FUSED", device)
        model.keeping.keep = keep
        for layer, low in zip(layers, stack.lows, strict=True):
            members = [(layer.adapters[f"m{i}"], 2 * i, 2 * i + 2) for i in range(k)]
            layer.by_row = ByRow(members, low if device else None)
        assert not device or specs_of(model, ids) is not None
        stack.grad.zero_()
        h = model.hidden(ids)
        h.backward(dy)
        found.append((h.detach(), stack.grad.clone()))
    (h0, want), (h1, got) = found
    torch.testing.assert_close(h1, h0, rtol=1e-5, atol=1e-5)
    assert want.abs().sum(dim=1).min() > 0
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5 * float(want.abs().max()))
    assert torch.equal(got == 0, want == 0)  # the room that smaller ranks leave stays empty


@pytest.mark.parametrize("keep", fused.KEEPS)
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral", "phi3", "gemma3"])
def test_other_families_equal_the_plain_path(name: str, keep: str, on_cpu: pytest.MonkeyPatch) -> None:
    model = lora.wrap(lora.quantize(family(name), "nf4"), r=5, alpha=7)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    ids, dy = torch.randint(0, 97, (2, 33)), torch.randn(2, 33, 64)
    on_cpu.setattr(llama, "FUSED", set())
    h0, want = gradients(model, ids, dy)
    on_cpu.setattr(llama, "FUSED", {"cpu"})
    model.keeping.keep = keep
    h1, got = gradients(model, ids, dy)
    assert model.keeping.said.startswith("3 blocks run fused")
    assert want.keys() == got.keys()
    torch.testing.assert_close(h1, h0, rtol=1e-5, atol=2e-5)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=3e-5 * float(want[name].abs().max()) + 1e-6)


@pytest.mark.parametrize("keep", fused.KEEPS)
@pytest.mark.parametrize("windows", [(), (7, None, 7)])
def test_packed_rows_equal_the_plain_path(
    keep: str, windows: tuple[int | None, ...], on_cpu: pytest.MonkeyPatch
) -> None:
    """Documents of several lengths, in each row others: none sees another, by either path."""
    torch.manual_seed(0)
    model = MistralConfig(**SIZES, windows=windows).build().requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    lora.wrap(lora.quantize(model, "nf4"), r=5, alpha=7)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    ids, dy = torch.randint(0, 97, (2, 33)), torch.randn(2, 33, 64)
    documents = Documents(((20, 1, 12), (5, 28)))
    on_cpu.setattr(llama, "FUSED", set())
    h0, want = gradients(model, ids, dy, documents)
    on_cpu.setattr(llama, "FUSED", {"cpu"})
    model.keeping.keep = keep
    h1, got = gradients(model, ids, dy, documents)
    assert model.keeping.said.startswith("3 blocks run fused") and want.keys() == got.keys()
    assert not torch.allclose(h0, gradients(model, ids, dy)[0], atol=1e-2)  # alone they see less
    torch.testing.assert_close(h1, h0, rtol=1e-5, atol=2e-5)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=3e-5 * float(want[name].abs().max()) + 1e-6)


@pytest.mark.parametrize(
    ("keep", "again"),
    [("all", ""), ("no_gate", "gate"), ("host", "gate"), ("input", "qkv o gate"), ("input_host", "qkv o gate")],
)
def test_the_backward_makes_no_product_that_it_does_not_need(keep: str, again: str, on_cpu: pytest.MonkeyPatch) -> None:
    """W_d's output is in no gradient, and W_o's is in s, which is made again only where nothing but x was kept."""
    model = lora.wrap(lora.quantize(small(), "nf4"), r=4)
    model.keeping.keep = keep
    made: list[int] = []
    product = fused._product

    def counted(spec: fused.Spec, which: int, *args: object, **kwargs: object):
        made.append(which)
        return product(spec, which, *args, **kwargs)

    on_cpu.setattr(fused, "_product", counted)
    h = model.hidden(torch.randint(0, 97, (1, 20)))
    assert sorted(made) == 3 * [fused.QKV] + 3 * [fused.O] + 3 * [fused.GATE] + 3 * [fused.DOWN]
    made.clear()
    h.sum().backward()
    names = {"qkv": fused.QKV, "o": fused.O, "gate": fused.GATE}
    assert made == 3 * [names[name] for name in again.split()]


@pytest.mark.parametrize(
    ("name", "why"), [("gemma2", "scores of attention are capped"), ("phi4-mini", "part of a head")]
)
def test_a_family_that_it_cannot_run_is_told_why(name: str, why: str, on_cpu: pytest.MonkeyPatch) -> None:
    model = lora.wrap(family(name), r=4)
    assert model(torch.randint(0, 97, (1, 8))).requires_grad
    assert model.keeping.said.startswith("blocks run by the plain path") and why in model.keeping.said


def test_a_rank_too_wide_for_the_gate_takes_products(on_cpu: pytest.MonkeyPatch) -> None:
    model = lora.wrap(small(), r=65, targets=["gate_proj", "up_proj", "down_proj"])
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    ids, dy = torch.randint(0, 97, (1, 20)), torch.randn(1, 20, 64)
    on_cpu.setattr(llama, "FUSED", set())
    _, want = gradients(model, ids, dy)
    on_cpu.setattr(llama, "FUSED", {"cpu"})
    _, got = gradients(model, ids, dy)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=3e-5 * float(want[name].abs().max()) + 1e-6)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "phi3"])
@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("keep", ["all", "input"])
def test_products_in_8_bits_stay_near(name: str, quantize: str | None, keep: str, on_cpu: pytest.MonkeyPatch) -> None:
    """e4m3 keeps 4 bits: a product errs by some 3 %, and gradients through three blocks by some more."""
    model = family(name) if name != "llama" else small(True)
    if quantize:
        lora.quantize(model, quantize)
    lora.wrap(model, r=5, alpha=7)
    torch.manual_seed(100)  # over draws of the factors the worst tensor errs by 0.2 to 0.4
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    ids, dy = torch.randint(0, 97, (2, 33)), torch.randn(2, 33, 64)
    h0, want = gradients(model, ids, dy)
    model.keeping.compute, model.keeping.keep = "fp8", keep
    h1, got = gradients(model, ids, dy)
    assert model.keeping.said.endswith("its products in 8 bits") and want.keys() == got.keys()
    assert 0.001 < float((h1 - h0).norm() / h0.norm()) < 0.12
    for one in want:
        assert float((got[one] - want[one]).norm() / want[one].norm()) < 0.35, one
    wrong, whole = (
        sum(float(t.square().sum()) for t in ts) for ts in ([got[i] - want[i] for i in want], want.values())
    )
    assert (wrong / whole) ** 0.5 < 0.25


def test_8_bits_are_refused_where_blocks_run_by_the_plain_path(on_cpu: pytest.MonkeyPatch) -> None:
    model = lora.wrap(family("gemma2"), r=4)
    model.keeping.compute = "fp8"
    with pytest.raises(RuntimeError, match="fused blocks only, and scores of attention are capped"):
        model(torch.randint(0, 97, (1, 8)))


def test_8_bits_are_refused_for_odd_sizes(on_cpu: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    odd = LlamaConfig(**(SIZES | {"intermediate_size": 90})).build().requires_grad_(False)
    for p in odd.parameters():
        torch.nn.init.normal_(p, std=0.1)
    model = lora.wrap(odd, r=4)
    model.keeping.compute = "fp8"
    with pytest.raises(RuntimeError, match="no multiples of 16"):
        model(torch.randint(0, 97, (1, 8)))


def test_the_gradient_of_the_input_passes_through(on_cpu: pytest.MonkeyPatch) -> None:
    model = lora.wrap(small(), r=4, targets=["q_proj", "down_proj"])
    model.model.embed_tokens.weight.requires_grad_(True)
    ids, dy = torch.randint(0, 97, (1, 20)), torch.randn(1, 20, 64)
    on_cpu.setattr(llama, "FUSED", set())
    _, want = gradients(model, ids, dy)
    on_cpu.setattr(llama, "FUSED", {"cpu"})
    _, got = gradients(model, ids, dy)
    assert "model.embed_tokens.weight" in got and got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keep", ["all", "no_gate", "input"])
@pytest.mark.parametrize("name", ["llama", "phi3", "gemma3"])
def test_dropout_falls_alike_forward_again_and_back(name: str, keep: str, on_cpu: pytest.MonkeyPatch) -> None:
    """The plain path, given the masks that the counter makes."""
    model = lora.wrap(small() if name == "llama" else family(name), r=5, alpha=7, dropout=0.3).train()
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    ids, dy = torch.randint(0, 97, (2, 33)), torch.randn(2, 33, 64)
    calls: list[int] = []

    def counted(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
        mask = keep_mask(66, x.shape[-1], Drop(p, torch.tensor([4711]), len(calls)))
        calls.append(1)
        return x * mask.view(x.shape) * Drop(p, ids, 0).scale

    on_cpu.setattr(torch, "randint", lambda *a, **k: torch.tensor([4711]))
    on_cpu.setattr(torch.nn.functional, "dropout", counted)
    on_cpu.setattr(llama, "FUSED", set())
    h0, want = gradients(model, ids, dy)
    on_cpu.setattr(llama, "FUSED", {"cpu"})
    model.keeping.keep = keep
    n = len(calls)
    h1, got = gradients(model, ids, dy)
    assert len(calls) == n == 3 * (4 if name == "phi3" else 7) and model.keeping.said.startswith("3 blocks run fused")
    torch.testing.assert_close(h1, h0, rtol=1e-5, atol=2e-5)
    for one in want:
        torch.testing.assert_close(got[one], want[one], rtol=1e-4, atol=3e-5 * float(want[one].abs().max()) + 1e-6)


def test_dropout_is_another_one_each_step_and_none_in_evaluation(on_cpu: pytest.MonkeyPatch) -> None:
    model = lora.wrap(small(), r=4, dropout=0.5).train()
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    ids = torch.randint(0, 97, (1, 20))
    one, two = model.hidden(ids), model.hidden(ids)
    assert not torch.equal(one, two)
    torch.manual_seed(5)
    three = model.hidden(ids)
    torch.manual_seed(5)
    assert torch.equal(three, model.hidden(ids))
    model.eval()
    assert torch.equal(model.hidden(ids), model.hidden(ids))


@pytest.mark.parametrize("how", ["dora", "two adapters", "hook", "trained norm"])
def test_what_it_cannot_do_takes_the_plain_path(how: str, on_cpu: pytest.MonkeyPatch) -> None:
    model = lora.wrap(small(), r=4, dora=how == "dora").train()
    if how == "two adapters":
        lora.wrap(model, r=2, name="second")
        lora.activate(model, ["default", "second"])
    elif how == "hook":
        model.model.layers[1].mlp.register_forward_hook(lambda *a: None)
    elif how == "trained norm":
        model.model.layers[2].input_layernorm.weight.requires_grad_(True)
    ids = torch.randint(0, 97, (1, 8))
    assert specs_of(model, ids) is None
    assert model(ids).requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("name", "keep"), [*(("llama", k) for k in fused.KEEPS), ("qwen3", "all"), ("qwen3", "host"), ("phi3", "all"),
                       ("gemma3", "all"), ("gemma3", "host")],
)  # fmt: skip
def test_on_a_gpu_it_is_as_good_as_the_plain_path(name: str, keep: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 errors of states and gradients against the same model in float64, beside the plain path's errors."""
    model = lora.wrap(small(qkv_bias=True) if name == "llama" else family(name), r=5, alpha=8)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    model = model.cuda()
    ids, dy = torch.randint(0, 97, (2, 65), device="cuda"), torch.randn(2, 65, 64, device="cuda")
    monkeypatch.setattr(llama, "FUSED", set())
    h64, want = gradients(model.double(), ids, dy.double())
    model.bfloat16()
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    h0, plain = gradients(model, ids, dy.bfloat16())
    monkeypatch.setattr(llama, "FUSED", {"cuda"})
    model.keeping.keep = keep
    h1, got = gradients(model, ids, dy.bfloat16())
    assert model.keeping.said.startswith("3 blocks run fused")
    error = lambda a, b: float((a.double() - b.double()).norm() / b.double().norm())  # noqa: E731
    assert error(h1, h64) <= 1.3 * error(h0, h64)
    for name in want:
        assert error(got[name], want[name]) <= 1.5 * error(plain[name], want[name]) + 1e-3, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_dropout_is_that_of_the_cpu_and_new_each_time_a_graph_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora.wrap(small(), r=5, alpha=8, dropout=0.3).train()
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    ids, dy = torch.randint(0, 97, (2, 65)), torch.randn(2, 65, 64)
    monkeypatch.setattr(llama, "FUSED", {"cpu", "cuda"})
    with monkeypatch.context() as m:
        m.setattr(torch, "randint", lambda *a, device, **k: torch.tensor([4711], device=device))
        h0, want = gradients(model, ids, dy)
        model.cuda()
        h1, got = gradients(model, ids.cuda(), dy.cuda())
    torch.testing.assert_close(h1.cpu(), h0, rtol=1e-3, atol=1e-3)
    for one in want:
        assert float((got[one].cpu() - want[one]).norm()) < 1e-2 * float(want[one].norm()), one
    model.bfloat16()
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    model.zero_grad()
    rows = [Example(tuple(row), (False,) + (True,) * 64, i) for i, row in enumerate(ids.tolist())]
    batch, graphs = collate(rows).to(torch.device("cuda")), Graphs(model)
    losses = [float(graphs.run(batch, 128)[0]) for _ in range(5)]
    assert len(graphs.graphs) == 1 and len(set(losses)) == 5 and max(losses) < 1.5 * min(losses)


@pytest.mark.parametrize(("text", "want"), [("24GiB", 24 * 2**30), ("500MiB", 500 * 2**20), ("24GB", 24 * 10**9)])
def test_sizes_of_memory_are_read(text: str, want: int) -> None:
    assert parse_bytes(text) == want


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "lots", "nanGiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no size of memory"):
        parse_bytes(text)
