"""Packing: rows come out full, and packed, padded left, padded right and alone all mean the same numbers."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lora_models_families import CASES, build
from torch import nn

import lora
from lora.batch import Batch, Example, Pack, collate
from lora.eval.nll import token_nll
from lora.kernels.documents import document_attention
from lora.models.documents import Documents
from lora.tokens import Examples
from lora.train.pack import Packs, best_fit


# ---- which texts share a row ----
def naive_best_fit(lengths: list[int], size: int) -> list[int]:
    """Room left in each row, by looking at every row for every text."""
    rooms: list[int] = []
    for n in sorted(lengths, reverse=True):
        fits = [room for room in rooms if room >= n]
        if fits:
            rooms.remove(min(fits))
            rooms.append(min(fits) - n)
        else:
            rooms.append(size - n)
    return sorted(rooms)


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), max_size=60))
def test_best_fit_equals_a_search_of_all_rows(lengths: list[int]) -> None:
    rows = best_fit(lengths, 40)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert sorted(40 - sum(lengths[i] for i in row) for row in rows) == naive_best_fit(lengths, 40)


def test_a_text_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="a text of 41 tokens was to be packed into rows of 40"):
        best_fit([3, 41], 40)


def test_packs_are_examples_put_together() -> None:
    packs = Packs(some_examples(30), 64)
    assert sorted(e.row for p in packs for e in p.examples) == list(range(30))
    assert all(len(p.ids) == len(p.learned) <= 64 for p in packs)
    assert 0.8 < packs.filled <= 1 and packs.filled * 64 * len(packs) == pytest.approx(sum(len(p.ids) for p in packs))
    assert packs[-1] == packs[len(packs) - 1] == packs[-1:][0] and list(packs.lengths()) == [64] * len(packs)


# ---- documents ----
def test_documents_count_from_0_in_each() -> None:
    d = Documents(((3, 1, 2), (6,)))
    assert d.positions().tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5]]
    assert d.numbers().tolist() == [[0, 0, 0, 1, 2, 2], [0] * 6]
    assert d.longest == 6


@pytest.mark.parametrize("lengths", [((3, 1), (5,)), ((3, 0),), ((4, -1),)])
def test_documents_that_fill_no_row_are_refused(lengths: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="each row's lengths are at least 1"):
        Documents(lengths)


@pytest.mark.parametrize("window", [None, 1, 3, 99])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_by_document_equals_one_block_diagonal_mask(window: int | None, softcap: float | None) -> None:
    lengths = ((5, 1, 7), (13,))
    q, k, v = (torch.randn(2, 3, 13, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    got = document_attention(q, k, v, lengths, window=window, softcap=softcap, scale=0.4)
    scores = q @ k.transpose(-1, -2) * 0.4
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    of = Documents(lengths).numbers()
    place = torch.arange(13)
    ago = place[:, None] - place
    sees = (of[:, :, None] == of[:, None]) & (ago >= 0) & (ago < (window or 99))
    want = scores.masked_fill(~sees[:, None], -torch.inf).softmax(-1) @ v
    probe = torch.randn_like(want)
    gradients = [torch.autograd.grad((y * probe).sum(), (q, k, v)) for y in (got, want)]
    assert (got - want).abs().max() < (1e-12 if softcap is None else 1e-6)  # capped scores are summed in float32
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() < (1e-12 if softcap is None else 1e-5)


# ---- the same numbers ----
def some_examples(n: int, longest: int = 30, seed: int = 0) -> list[Example]:
    draw = random.Random(seed)
    found = []
    for row in range(n):
        k = draw.randint(2, longest)
        learned = [False, *(draw.random() < 0.6 for _ in range(k - 1))]
        learned[-1] = True
        found.append(Example(tuple(draw.randrange(1, 257) for _ in range(k)), tuple(learned), row))
    return found


def loss_and_gradients(model: nn.Module, batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Σ NLL / learned tokens over all batches, and what it says of each parameter."""
    n = sum(b.target.numel() for b in batches)
    model.zero_grad()
    total = 0.0
    for b in batches:
        nll, _ = token_nll(model, b)
        (nll.sum() / n).backward()
        total += nll.detach().double().sum().item()
    return total / n, {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CASES)
def test_packed_padded_and_single_rows_agree(name: str, tmp_path: Path) -> None:
    build(name, tmp_path)
    model, _ = lora.load(tmp_path, device="cpu")
    lora.wrap(model, r=4)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.05)
    examples = some_examples(9)
    ways = {
        "packed": [collate([p]) for p in Packs(examples, 64)],
        "packed at once": [collate(list(Packs(examples, 64)), pad=7)],
        "packed, padding left": [collate(list(Packs(examples, 50)), side="left")],
        "right": [collate(examples[:5]), collate(examples[5:], pad=9)],
        "left": [collate(examples[:5], side="left"), collate(examples[5:], pad=9, side="left")],
    }
    want, gradients = loss_and_gradients(model, [collate([e]) for e in examples])
    assert gradients and all(g.abs().max() > 0 for g in gradients.values())
    for way, batches in ways.items():
        got, found = loss_and_gradients(model, batches)
        assert got == pytest.approx(want, abs=1e-5), way
        assert found.keys() == gradients.keys()
        for key, g in found.items():
            assert (g - gradients[key]).abs().max() < 1e-5 * max(1.0, float(gradients[key].abs().max())), (way, key)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """Gemma 3's blocks: windows in some layers, two rotary bases, norms on q and k; with an awake adapter."""
    folder = tmp_path_factory.mktemp("windowed")
    build("gemma3 ropes", folder)
    model, _ = lora.load(folder, device="cpu")
    lora.wrap(model, r=4)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.05)
    return model


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 12), st.integers(2, 40), st.integers(0, 30), st.integers(0, 9999), st.sampled_from(["left", "right"])
)
def test_any_packing_agrees_with_single_rows(
    windowed: nn.Module, n: int, longest: int, room: int, seed: int, side: str
) -> None:
    examples = some_examples(n, longest, seed)
    want, gradients = loss_and_gradients(windowed, [collate([e]) for e in examples])
    for batch in (collate(list(Packs(examples, longest + room)), side=side), collate(examples, side=side)):
        got, found = loss_and_gradients(windowed, [batch])
        assert got == pytest.approx(want, abs=1e-5)
        for key, g in found.items():
            assert (g - gradients[key]).abs().max() < 1e-5 * max(1.0, float(gradients[key].abs().max())), key


def test_a_packed_row_may_be_longer_than_the_model_and_a_document_not(tmp_path: Path) -> None:
    build("gpt2", tmp_path)
    model, _ = lora.load(tmp_path, device="cpu")
    ids = torch.randint(1, 257, (1, 400))
    got = model(ids, documents=Documents(((256, 144),)))
    assert (got[:, :256] - model(ids[:, :256])).abs().max() < 1e-5
    assert (got[:, 256:] - model(ids[:, 256:])).abs().max() < 1e-5
    with pytest.raises(ValueError, match="257 tokens in a packed document, and packed this model takes 256"):
        model(ids, documents=Documents(((257, 143),)))


def test_longrope_packs_only_what_its_short_waves_reach(tmp_path: Path) -> None:
    build("phi3 longrope", tmp_path)
    model, _ = lora.load(tmp_path, device="cpu")
    with pytest.raises(ValueError, match="33 tokens in a packed document, and packed this model takes 32"):
        model(torch.ones(1, 40, dtype=torch.int64), documents=Documents(((33, 7),)))


MISUSED: dict[str, tuple[dict[str, Any], str]] = {
    "padding": ({"padding": torch.ones(1, 6, dtype=torch.bool)}, "padding is a document of its own"),
    "other shape": ({"documents": Documents(((3, 2),))}, r"1 rows of 5 tokens were given with ids of shape \(1, 6\)"),
}


@pytest.mark.parametrize(("given", "message"), MISUSED.values(), ids=MISUSED.keys())
def test_documents_that_cannot_be_meant_are_refused(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    build("llama", tmp_path)
    model, _ = lora.load(tmp_path, device="cpu")
    with pytest.raises(ValueError, match=message):
        model(torch.ones(1, 6, dtype=torch.int64), **({"documents": Documents(((4, 2),))} | given))
    with pytest.raises(ValueError, match="packed documents and a cache"):
        model(torch.ones(1, 6, dtype=torch.int64), cache=model.new_cache(1, 9), documents=Documents(((4, 2),)))


def test_collate_puts_padding_where_it_was_asked_for() -> None:
    batch = collate([Example((5, 6), (False, True), 3), Example((7, 8, 9), (False, False, True), 4)], 0, "left")
    assert batch.ids.tolist() == [[0, 5, 6], [7, 8, 9]] and batch.real.tolist() == [[False, True, True], [True] * 3]
    assert (batch.at.tolist(), batch.target.tolist(), batch.owner.tolist()) == ([1, 4], [6, 9], [0, 1])
    with pytest.raises(ValueError, match="side='up'"):
        collate([Example((5, 6), (False, True), 3)], 0, "up")


def test_the_first_token_of_a_document_is_no_target() -> None:
    two = (Example((5, 6), (True, True), 0), Example((7, 8), (True, True), 1))
    batch = collate([Pack(two, 6)])
    assert batch.target.tolist() == [6, 8] and batch.owner.tolist() == [0, 1] and batch.rows == (0, 1)


# ---- tokens kept small ----
@pytest.mark.parametrize("in_memory", [0, 100, 1 << 20])
def test_stored_examples_come_back(in_memory: int) -> None:
    examples = [*some_examples(50), Example((0, 2**31 - 1), (True, True), 7)]
    store = Examples(in_memory)
    for e in examples:
        store.append(e)
    store.freeze()
    assert list(store) == examples and len(store) == 51
    assert store[-1] == examples[-1] and store[3:9:2] == examples[3:9:2]
    assert list(store.lengths()) == [len(e.ids) for e in examples]
    with pytest.raises(IndexError, match="example 51 of 51"):
        store[51]


def test_no_examples_are_a_store_too() -> None:
    assert list(Examples().freeze()) == [] and list(Examples().freeze().lengths()) == []
