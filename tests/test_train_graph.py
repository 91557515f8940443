"""Recorded batches: the same losses and gradients as without a graph, for every batch of a shape."""

import gc
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from blocks import family

import lora
from lora.batch import Batch, Example, Pack, collate
from lora.eval.nll import token_nll
from lora.kernels.documents import ragged_of
from lora.kernels.fp8 import refusal
from lora.kernels.scratch import mine, room
from lora.models.fused import KEEPS
from lora.models.host import Host
from lora.models.llama import LlamaConfig
from lora.train.graph import Graphs, _inputs, _own
from lora.train.optim import AdamW

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def small(keep: str | None = None, layers: int = 2):
    torch.manual_seed(0)
    model = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_layers=layers, num_heads=4, num_kv_heads=2,
        head_dim=16, max_length=128,
    ).build().requires_grad_(False)  # fmt: skip
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    model = lora.quantize(model.bfloat16() if DEVICE.type == "cuda" else model, "nf4")
    lora.wrap(model, r=4)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    model.keeping.keep = keep
    return model.to(DEVICE).train()


def batch(seed: int, rows: int = 3, length: int = 20, learned: int = 9) -> Batch:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 97, (rows, length), generator=g).tolist()
    marks = tuple(i >= length - learned + seed % 3 for i in range(length))
    return collate([Example(tuple(row), marks, i) for i, row in enumerate(ids)]).to(DEVICE)


def packed_batch(seed: int, rows: int = 3, size: int = 40) -> Batch:
    """Rows of three texts each, of other lengths for each seed."""
    g = torch.Generator().manual_seed(seed)
    packs = []
    for i in range(rows):
        ids = [torch.randint(0, 97, (n,), generator=g).tolist() for n in (5 + seed, 12, 20 - seed)]
        packs.append(Pack(tuple(Example(tuple(x), (True,) * len(x), 3 * i + j) for j, x in enumerate(ids)), size))
    return collate(packs).to(DEVICE)


def plain(model, b: Batch, n: int) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=False)
    nll, _ = token_nll(model, b)
    (nll.sum() / n).backward()
    return float(nll.detach().sum()) / n, {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("keep", [None, *KEEPS])
def test_a_batch_runs_as_without_it(keep: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora.train.graph.RECORD", True)
    model = small(keep)
    graphs = Graphs(model)
    for seed in range(6):
        b = batch(seed)
        n = b.target.numel() + seed
        want, gradients = plain(model, b, n)
        for p in model.parameters():
            if p.grad is not None:
                p.grad.zero_()
        loss, hits = graphs.run(b, n)
        assert float(loss) == pytest.approx(want, rel=1e-5) and 0 <= int(hits) <= n
        for k, p in model.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(p.grad, gradients[k], rtol=1e-3, atol=1e-5)
    assert len(graphs.graphs) == (1 if DEVICE.type == "cuda" else 0)


@on_gpu
@pytest.mark.parametrize("keep", [None, *KEEPS])
def test_packed_rows_of_other_documents_run_in_one_graph(keep: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora.train.graph.RECORD", True)
    model = small(keep)
    graphs = Graphs(model)
    for seed in range(8):  # of 9 or 12 documents, the longest 20 to 13 tokens long
        b = packed_batch(seed)
        want, gradients = plain(model, b, 9)
        for p in model.parameters():
            if p.grad is not None:
                p.grad.zero_()
        loss, hits = graphs.run(b, 9)
        assert float(loss) == pytest.approx(want, rel=1e-5) and 0 <= int(hits) <= b.target.numel()
        for k, p in model.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(p.grad, gradients[k], rtol=1e-3, atol=1e-5)
    assert len(graphs.graphs) == 1
    long = collate([Pack((Example((1,) * 129, (True,) * 129, 0),), 129)]).to(DEVICE)
    for _ in range(2):
        with pytest.raises(ValueError, match="129 tokens in a packed document"):
            graphs.run(long, 9)


def test_a_recorded_batch_has_inputs_of_its_own() -> None:
    """All that differs from batch to batch: tokens, and where rows are packed positions and the ends of documents."""
    b = packed_batch(0)
    assert b.documents is not None
    b = replace(b, documents=replace(b.documents, ragged=ragged_of(b.documents.lengths, DEVICE)))
    for given, count in ((b, 3), (batch(0), 1)):
        own = _own(given)
        assert len(_inputs(own)) == len(_inputs(given)) == count
        for kept, theirs in zip(_inputs(own), _inputs(given), strict=True):
            assert torch.equal(kept, theirs) and kept.data_ptr() != theirs.data_ptr()
        assert (own.documents, own.rows) == (given.documents, given.rows)
    ends = _own(b).ragged
    assert ends is not None and b.ragged is not None and ends.longest == b.ragged.longest
    assert ends.documents == b.ragged.documents == 16


@on_gpu
def test_documents_that_a_graph_would_hold_on_to_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 no kernel reads where they end from memory."""
    monkeypatch.setattr("lora.train.graph.RECORD", True)
    model = small().float()
    graphs = Graphs(model)
    for seed in (0, 3, 0, 3):
        b = packed_batch(seed)
        want, _ = plain(model, b, 9)
        assert float(graphs.run(b, 9)[0]) == pytest.approx(want, rel=1e-5)
    assert not graphs.graphs and model.keeping.recordable


@on_gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral", "phi3-long", "gemma3"])
def test_every_family_of_fused_blocks_is_recorded(name: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora.wrap(lora.quantize(family(name).to(DEVICE, torch.bfloat16), "nf4"), r=4).train()
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
            p.grad = torch.zeros_like(p)
    made = []
    for record in (True, False):
        monkeypatch.setattr("lora.train.graph.RECORD", record)
        graphs, found = Graphs(model), []
        for seed in range(4):
            model.zero_grad(set_to_none=False)
            b = packed_batch(seed) if packed else batch(seed, length=40)
            found.append([float(graphs.run(b, 9)[0]), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
        assert len(graphs.graphs) == record
        made.append(found)
    for (loss, *got), (want_loss, *want) in zip(*made, strict=True):
        assert loss == pytest.approx(want_loss, rel=1e-5)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


@on_gpu
def test_gradients_add_up_over_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora.train.graph.RECORD", True)
    model = small()
    plain(model, batch(0), 10)
    graphs = Graphs(model)
    for _ in range(2):  # seen, then recorded
        graphs.run(batch(0), 10)
    model.zero_grad(set_to_none=False)
    graphs.run(batch(1), 10)
    graphs.run(batch(2), 10)
    got = {k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad}
    one, two = plain(model, batch(1), 10)[1], plain(model, batch(2), 10)[1]
    for k, g in got.items():
        torch.testing.assert_close(g, one[k] + two[k], rtol=1e-3, atol=1e-5)


def test_room_is_little_more_than_needed() -> None:
    for n in range(1, 3000):
        assert n <= room(n) <= max(16, 1.25 * n + 16)


@on_gpu
def test_graphs_share_buffers_and_pinned_memory_with_what_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora.train.graph.RECORD", True)
    model = small("host")
    graphs = Graphs(model)
    for length in (20, 20, 60, 60, 20, 100, 20, 60):  # the room of the first two grows under their graphs
        b = batch(length, length=length)
        want, gradients = plain(model, b, 9)
        model.zero_grad(set_to_none=False)
        loss, _ = graphs.run(b, 9)
        assert float(loss) == pytest.approx(want, rel=1e-5)
        for k, p in model.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(p.grad, gradients[k], rtol=1e-3, atol=1e-5)
    assert len(graphs.graphs) == 2
    assert not {key[2] for key in mine()} & {graphs.stream.cuda_stream}


PLANS = (  # of four blocks
    ["host", "host", "host", "all"],
    ["host", "input_host", "host", "all"],
    ["input_host", "input_host", "input_host", "input"],
    ["no_gate", "host", "input", "input_host"],
)


def trained(model, start: list[torch.Tensor], steps: int) -> tuple[list[float], list[list[torch.Tensor]], Graphs]:
    """Losses and gradients of steps from the factors `start` on, in a new run; what lies on the host between two steps
    is NaN, so that nothing of a step before can be taken for this one's."""
    factors = [p for p in model.parameters() if p.requires_grad]
    torch._foreach_copy_([p.detach() for p in factors], start)
    mine().clear()
    model.keeping.host = Host()
    optimizer, graphs = AdamW(factors), Graphs(model)
    losses, grads = [], []
    for seed in range(steps):
        b = batch(seed)
        loss, _ = graphs.run(b, b.target.numel())
        optimizer.gather()
        losses.append(float(loss))
        grads.append([p.grad.clone() for p in factors if p.grad is not None])
        optimizer.step(1e-3, zero=True)
        torch.cuda.synchronize()
        for pinned in model.keeping.host.room.values():
            pinned.fill_(255)
    return losses, grads, graphs


@on_gpu
def test_plans_one_after_the_other_train_as_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(layers=4)
    start = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    fp8 = ["fp8"] if refusal(DEVICE, torch.bfloat16) is None else []
    for compute in ["bf16", *fp8, "bf16", *fp8]:
        model.keeping.compute = compute
        for model.keeping.keep in PLANS:
            made = []
            for record in (True, False):
                monkeypatch.setattr("lora.train.graph.RECORD", record)
                made.append(trained(model, start, 5))
                assert len(made[-1][2].graphs) == record
            (losses, grads, _), (plain_losses, plain_grads, _) = made
            assert losses == pytest.approx(plain_losses, rel=1e-5), (compute, model.keeping.keep)
            for step, (got, want) in enumerate(zip(grads, plain_grads, strict=True)):
                for a, b in zip(got, want, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=lambda m, s=step: f"step {s}: {m}")


@on_gpu
def test_a_run_with_graphs_equals_one_without(stories, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"Once upon {i} ", "completion": "a time there was a dog."} for i in range(8)]
    monkeypatch.setattr("lora.train.graph.RECORD", True)
    losses = []
    for tokens in (8192, 0):
        monkeypatch.setattr("lora.train.graph.TOKENS", tokens)
        model, tokenizer = lora.load(stories, quantize="nf4", dtype="bfloat16", device="cuda")
        torch.manual_seed(1)
        lora.wrap(model, r=4)
        config = lora.TrainConfig(max_steps=8, batch=2, lr=1e-3, progress=False)
        losses.append([h["loss"] for h in lora.fit(model, tokenizer, rows, config=config).history if "loss" in h])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0][-1] < losses[0][0]


@on_gpu
@pytest.mark.parametrize("keep", [None, "host", "input_host"])
@pytest.mark.parametrize(("record", "packed"), [(True, False), (True, True), (False, False), (False, True)])
def test_no_step_waits_for_the_gpu_and_memory_does_not_grow(
    record: bool, packed: bool, keep: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora.train.graph.RECORD", record)
    model = small(keep)
    optimizer, graphs = AdamW([p for p in model.parameters() if p.requires_grad]), Graphs(model)
    batches = [packed_batch(seed) if packed else batch(seed) for seed in range(6)]

    def step(b: Batch) -> None:
        graphs.run(b, b.target.numel())
        optimizer.gather()
        optimizer.clip(1.0)
        optimizer.step(1e-5, zero=True)

    for b in batches:
        step(b)
    gc.collect()  # what other tests left behind would be let go in between
    torch.cuda.set_sync_debug_mode("error")
    try:
        before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        for i in range(1000):
            step(batches[i % 6])
        assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.parametrize("pack", [False, True])
def test_a_step_of_a_run_waits_once(pack: bool, stories: Path) -> None:
    """For loss, norm and hits, which decide whether the step is taken; PyTorch warns of each wait."""
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "Lily", "played", "outside"]
    rows = [{"prompt": "", "completion": " ".join(words[: 2 + i % 8])} for i in range(64)]
    waits = []
    for steps in (5, 25):
        model, tokenizer = lora.load(stories, quantize="nf4", dtype="bfloat16", device="cuda")
        lora.wrap(model, r=4)
        config = lora.TrainConfig(max_steps=steps, batch=4, progress=False, pack=pack, max_length=64, learn="all")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                lora.fit(model, tokenizer, rows, config=config)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing CUDA operation" in str(w.message) for w in seen))
    assert waits[1] - waits[0] <= 20
