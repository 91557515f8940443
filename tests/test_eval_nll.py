"""Pooled NLL against a naive float64 loop, for our model and for transformers'."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import lora
from lora.eval.nll import row_nll, token_nll
from lora.models.tokenizer import Tokenizer
from lora.render import Example, collate, render

ROWS = [
    {"prompt": "Once upon a time", "completion": " there was a little cat who sat on a mat."},
    {"prompt": "Lily", "completion": " played."},
    {"prompt": "", "completion": "The end of it all came quite soon, and everyone went home."},
    {"prompt": "Tom and his dog ran to the park to", "completion": " play"},
]


@pytest.fixture(scope="module")
def loaded(stories: Path) -> tuple[nn.Module, nn.Module, Tokenizer]:
    ours, tokenizer = lora.load(stories, device="cpu")
    return ours, transformers.LlamaForCausalLM.from_pretrained(stories).eval(), tokenizer


@torch.no_grad()
def naive(model: nn.Module, examples: list[Example]) -> tuple[list[float], list[int], list[int]]:
    totals, counts, hits = [], [], []
    for e in examples:
        p = model(torch.tensor([e.ids])).logits[0].double().log_softmax(-1)
        places = [k for k in range(1, len(e.ids)) if e.learned[k]]
        totals.append(-sum(p[k - 1, e.ids[k]].item() for k in places))
        counts.append(len(places))
        hits.append(sum(p[k - 1].argmax().item() == e.ids[k] for k in places))
    return totals, counts, hits


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("which", [0, 1], ids=["ours", "transformers"])
def test_row_nll_equals_a_naive_loop(which: int, batch: int, loaded: tuple[nn.Module, nn.Module, Tokenizer]) -> None:
    examples = render(ROWS, loaded[2], 512)
    totals, counts, hits = naive(loaded[1], examples)
    got = row_nll(loaded[which], examples, batch)
    assert got[0].tolist() == pytest.approx(totals, rel=1e-5)
    assert (got[1].tolist(), got[2].tolist()) == (counts, hits)


def test_the_mode_of_the_model_is_put_back(loaded: tuple[nn.Module, nn.Module, Tokenizer]) -> None:
    model, _, tokenizer = loaded
    model.train()
    row_nll(model, render(ROWS[:1], tokenizer, 512))
    assert model.training
    model.eval()


def test_token_nll_has_the_gradient_of_plain_cross_entropy(stories: Path) -> None:
    model, tokenizer = lora.load(stories, device="cpu")
    model.model.norm.weight.requires_grad_(True)
    batch = collate(render(ROWS, tokenizer, 512))
    nll, hit = token_nll(model, batch)
    nll.sum().backward()
    got = model.model.norm.weight.grad
    model.model.norm.weight.grad = None
    logits = model(batch.ids).flatten(0, 1)[batch.at]
    want = nn.functional.cross_entropy(logits, batch.target, reduction="none")
    want.sum().backward()
    assert (nll - want).abs().max() < 1e-4 and torch.equal(hit, logits.argmax(-1) == batch.target)
    assert got is not None and (got - model.model.norm.weight.grad).abs().max() < 1e-4 * got.abs().max()
