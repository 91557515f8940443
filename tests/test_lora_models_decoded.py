"""Weights that stay decoded: the same step as with weights decoded each time, whoever writes to them meanwhile."""

import copy
import pickle

import pytest
import torch

import lora
from lora.models import llama
from lora.models.budget import Keeping, Widths, account, blocks_decoded, decoded_bytes
from lora.models.decoded import cleared
from lora.models.fused import KEEPS
from lora.models.llama import LlamaConfig
from lora.train.graph import Graphs
from tests.test_train_graph import batch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTHS = Widths(4096, 6144, 4096, 14336, 32, 32, 128256, (48, 16, 32, 16))
GIB = 2**30


def model_of(quantize: str | None = "nf4", bias: bool = False, r: int = 5) -> llama.Llama:
    torch.manual_seed(0)
    model = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16,
        max_length=128, attention_bias=bias,
    ).build().requires_grad_(False)  # fmt: skip
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    if quantize:
        lora.quantize(model, quantize)
    lora.wrap(model, r=r, alpha=7)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    return model


def gradients(model: llama.Llama, seed: int = 1) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids, dy = torch.randint(0, 97, (2, 33), generator=g), torch.randn(2, 33, 64, generator=g)
    model.zero_grad()
    h = model.hidden(ids)
    h.backward(dy)
    return {"": h.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6 * float(want[name].abs().max()))


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "FUSED", {"cpu"})
    monkeypatch.setattr(llama, "LEAN", set())


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize(
    ("quantize", "bias", "compute"),
    [("nf4", False, "bf16"), ("nf4", True, "bf16"), (None, True, "bf16"), ("nf4", False, "fp8"), (None, True, "fp8")],
)
def test_a_step_is_the_same(fused: None, quantize: str | None, bias: bool, compute: str, keep: str) -> None:
    model = model_of(quantize, bias)
    model.keeping.keep, model.keeping.compute = keep, compute
    want = gradients(model)
    model.keeping.decoded.blocks = 2
    for _ in range(2):  # the second finds them decoded
        close(gradients(model), want)
    held = model.keeping.decoded.held
    assert sorted(held) == [(block, which) for block in range(2) for which in range(4)]
    assert all(len(h.buffers) == (2 if compute == "fp8" else 1) for h in held.values())
    for p in model.parameters():  # an optimizer's step: factors are laid anew, weights are not decoded anew
        if p.requires_grad:
            p.data.mul_(-1.5)
    got = gradients(model)
    model.keeping.decoded.clear()
    close(got, gradients(model))


def test_they_are_read_and_not_decoded_anew(fused: None) -> None:
    model = model_of()
    model.keeping.decoded.blocks = 1
    before = gradients(model)
    for held in model.keeping.decoded.held.values():
        held.buffers[0].mul_(2.0)
    assert not torch.allclose(gradients(model)[""], before[""])


@pytest.mark.parametrize("quantize", ["nf4", None])
def test_a_weight_that_was_written_to_is_decoded_anew(fused: None, quantize: str | None) -> None:
    model = model_of(quantize)
    model.keeping.decoded.blocks = 3
    gradients(model)
    with torch.no_grad():
        for block in model.model.layers:
            base = block.mlp.up_proj.base
            base.weight.add_(1)  # other codes, or other numbers
    got = gradients(model)
    model.keeping.decoded.clear()
    close(got, gradients(model))


def test_refresh_decodes_in_place_what_was_written_to(fused: None) -> None:
    model = model_of()
    decoded = model.keeping.decoded
    decoded.blocks = 3
    gradients(model)
    buffers = {key: held.buffers[0] for key, held in decoded.held.items()}
    for t in buffers.values():
        t.nan_to_num_()  # the corner that nobody writes
    before = {key: t.clone() for key, t in buffers.items()}
    decoded.refresh()
    assert all(torch.equal(t, before[key]) for key, t in buffers.items())
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.base.absmax.mul_(2)
    decoded.refresh()
    changed = [key for key, t in buffers.items() if not torch.equal(t, before[key])]
    assert changed == [(1, 1)] and decoded.held[1, 1].buffers[0] is buffers[1, 1] and decoded.epoch == 0
    want = model.model.layers[1].self_attn.o_proj.base.weight_as(torch.float32)
    assert torch.equal(buffers[1, 1][:64, :64], want)


def test_an_adapter_of_another_rank_gets_buffers_of_its_own(fused: None) -> None:
    model = model_of(r=5)
    decoded = model.keeping.decoded
    decoded.blocks = 3
    gradients(model)
    epoch, shape = decoded.epoch, decoded.held[0, 0].buffers[0].shape
    lora.wrap(model, r=40, name="wide")
    lora.activate(model, "wide")
    got = gradients(model)
    assert decoded.epoch > epoch and decoded.held[0, 0].buffers[0].shape > shape
    decoded.clear()
    close(got, gradients(model))


def test_cleared_gives_all_memory_back_even_after_an_error(fused: None) -> None:
    model = model_of()
    decoded = model.keeping.decoded
    with pytest.raises(KeyError), cleared(model):
        decoded.blocks = 3
        gradients(model)
        assert decoded.nbytes() > 0
        raise KeyError
    assert decoded.nbytes() == 0 and not decoded.held and decoded.epoch == 12
    gradients(model)
    assert not decoded.held  # until a number is chosen again


def test_a_copy_of_a_model_holds_none(fused: None) -> None:
    model = model_of()
    model.keeping.decoded.blocks = 3
    want = gradients(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not other.keeping.decoded.held and model.keeping.decoded.held
        close(gradients(other), want)


def test_a_model_that_moves_leaves_none_behind(fused: None) -> None:
    model = model_of()
    model.keeping.decoded.blocks = 3
    gradients(model)
    assert model.keeping.decoded.nbytes() > 0
    model.double()
    assert model.keeping.decoded.nbytes() == 0 and model.keeping.chosen == (0, 0, ())


def test_blocks_fill_a_budget_and_leave_half_of_the_card() -> None:
    keep, M, each = ["all"] * 32, 8192, decoded_bytes(WIDTHS, 2)
    assert each == 2 * sum((n + 64) * (k + 64) for n, k in WIDTHS.shapes)
    rooms = zip(WIDTHS.shapes, (144, 48, 96, 48), strict=True)
    assert decoded_bytes(WIDTHS, 2, eights=True) == sum(n * (k + r) + k * (n + r) for (n, k), r in rooms)
    total = account(WIDTHS, keep, M, 2).total
    for blocks in range(33):
        free = total + blocks * each
        assert blocks_decoded(WIDTHS, keep, M, 2, free, 200 * GIB) == blocks
        assert blocks == 0 or blocks_decoded(WIDTHS, keep, M, 2, free - 1, 200 * GIB) == blocks - 1
        room = int(1.1 * total) + 2 * blocks * each
        assert blocks_decoded(WIDTHS, keep, M, 2, 200 * GIB, room + 2) == blocks
        assert blocks == 0 or blocks_decoded(WIDTHS, keep, M, 2, 200 * GIB, room - 2) == blocks - 1
    assert blocks_decoded(WIDTHS, keep, M, 2, 0, 0) == 0


def test_a_larger_step_chooses_again(monkeypatch: pytest.MonkeyPatch) -> None:
    keeping = Keeping(None)
    keeping.config = type("Config", (), {"num_layers": 32})
    monkeypatch.setattr(Keeping, "widths", WIDTHS)
    monkeypatch.setattr(Keeping, "_free", lambda self, x: (60 * GIB, 60 * GIB))
    small, large = (torch.empty(1, n, 4096, dtype=torch.bfloat16, device="meta") for n in (512, 8192))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert keeping.choose(small) == ["all"] * 32
    few = keeping.decoded.blocks
    keeping.decoded.held[0, 0] = object()  # type: ignore[assignment]
    assert few == 32 and keeping.choose(small) and keeping.decoded.held
    keeping.choose(large)
    assert keeping.chosen.tokens == 8192 and not keeping.decoded.held and keeping.decoded.epoch == 1
    keeping.decoded.held[0, 0] = object()  # type: ignore[assignment]
    keeping.choose(large, documents=16)
    assert keeping.chosen == (8192, 16, ["all"] * 32) and not keeping.decoded.held
    keeping.decoded.held[0, 0] = object()  # type: ignore[assignment]
    keeping.choose(small, documents=32)  # more of them than before: by the largest of both
    assert keeping.chosen[:2] == (8192, 32) and not keeping.decoded.held
    keeping.choose(large, documents=16)
    assert keeping.chosen[:2] == (8192, 32)
    keeping.forget()
    assert keeping.chosen == (0, 0, ()) and keeping.decoded.blocks == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_step_reads_what_stands_there_now() -> None:
    model = model_of().bfloat16().to(DEVICE).train()
    graphs, decoded = Graphs(model), model.keeping.decoded
    for seed in range(4):
        graphs.run(batch(seed), 100)
    assert graphs.graphs and decoded.blocks == 3 and decoded.nbytes() > 0

    def recorded_and_not() -> None:
        model.zero_grad(set_to_none=False)
        loss, _ = graphs.run(batch(7), 100)
        got, loss = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, float(loss)
        blocks, decoded.blocks = decoded.blocks, 0
        model.zero_grad(set_to_none=False)
        monkey = Graphs(model)  # sees the shape for the first time
        want, _ = monkey.run(batch(7), 100)
        decoded.blocks = blocks
        assert loss == pytest.approx(float(want), rel=1e-4)
        for n, p in model.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(got[n], p.grad, rtol=0.05, atol=0.02 * float(p.grad.abs().max()) + 1e-8)

    recorded_and_not()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.base.nested_absmax.mul_(3)
    recorded_and_not()
    (old,) = graphs.graphs.values()
    decoded.clear()
    decoded.blocks = 3
    recorded_and_not()
    assert old not in graphs.graphs.values()
