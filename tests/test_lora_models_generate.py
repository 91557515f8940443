"""Generation: greedy equals transformers, a batch equals its rows, draws follow their seed, mistakes are refused."""

from typing import Any

import pytest
import torch
import transformers
from tiny import give_tokenizer

import lora
from lora.models.generate import generate_ids, pick
from lora.models.llama import Llama
from lora.models.tokenizer import Tokenizer

PROMPTS = ["Once upon a time", "a", "The quick brown fox jumps over the lazy dog", "12 + 30 =", "x y"]
Three = tuple[Llama, Tokenizer, transformers.LlamaForCausalLM]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Three:
    """A random model of ours and of transformers with the same weights, and a tokenizer of one token a byte."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96, initializer_range=0.3, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(folder)
    give_tokenizer(folder)
    return *lora.load(folder, device="cpu"), theirs


@torch.no_grad()
def test_greedy_equals_transformers(tiny: Three) -> None:
    model, tokenizer, theirs = tiny
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        want = theirs.generate(
            torch.tensor([ids]), max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert generate_ids(model, [ids], 32)[0] == want[0, len(ids) :].tolist()


@pytest.mark.parametrize("batch", [1, 2, 32])
def test_a_batch_gives_what_its_rows_give_alone(batch: int, tiny: Three) -> None:
    model, tokenizer, _ = tiny
    ids = [tokenizer.encode(p) for p in PROMPTS]
    alone = [generate_ids(model, [row], 32)[0] for row in ids]
    assert generate_ids(model, ids, 32, batch=batch) == alone
    assert lora.generate(model, tokenizer, PROMPTS, 32, batch=batch) == [
        lora.generate(model, tokenizer, p, 32) for p in PROMPTS
    ]


def test_a_text_gives_a_text_and_a_list_a_list(tiny: Three) -> None:
    model, tokenizer, _ = tiny
    assert isinstance(lora.generate(model, tokenizer, "ab", 3), str)
    assert lora.generate(model, tokenizer, ["ab"], 3) == [lora.generate(model, tokenizer, "ab", 3)]
    assert lora.generate(model, tokenizer, [], 3) == []


def test_a_stop_token_ends_its_row_alone_and_is_left_out(tiny: Three) -> None:
    model, tokenizer, _ = tiny
    ids = [tokenizer.encode(p) for p in PROMPTS]
    free = generate_ids(model, ids, 24)
    stop = free[0][5]
    cut = [row[: row.index(stop)] if stop in row else row for row in free]
    assert generate_ids(model, ids, 24, (stop,)) == cut
    assert len(cut[0]) <= 5 and stop not in cut[0]


def test_stop_ids_of_the_call_add_to_those_of_the_tokenizer(tiny: Three) -> None:
    model, tokenizer, _ = tiny
    first = generate_ids(model, [tokenizer.encode("ab")], 4)[0]
    assert lora.generate(model, tokenizer, "ab", 4, stop=first[:1]) == ""


def test_the_same_seed_draws_the_same_text(tiny: Three) -> None:
    model, tokenizer, _ = tiny
    draws = [lora.generate(model, tokenizer, PROMPTS, 16, temperature=1.0, seed=s) for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    before = torch.random.get_rng_state()
    lora.generate(model, tokenizer, "ab", 4, temperature=1.0, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_a_seed_draws_differ(tiny: Three) -> None:
    model, tokenizer, _ = tiny
    assert len({lora.generate(model, tokenizer, "ab", 16, temperature=2.0) for _ in range(3)}) > 1


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"top_k": 1, "top_p": 0.5}])
def test_the_narrowest_draw_is_greedy(options: dict[str, Any], tiny: Three) -> None:
    model, tokenizer, _ = tiny
    ids = [tokenizer.encode(p) for p in PROMPTS]
    assert generate_ids(model, ids, 16, temperature=3.0, **options) == generate_ids(model, ids, 16)


P = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04])


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ((1.0, 0, 1.0), [0, 1, 2, 3, 4]),
        ((1.0, 2, 1.0), [0, 1]),
        ((1.0, 99, 1.0), [0, 1, 2, 3, 4]),
        ((1.0, 0, 0.65), [0, 1]),
        ((1.0, 0, 0.75), [0, 1, 2]),
        ((1.0, 0, 0.39), [0]),
        ((1.0, 3, 0.65), [0, 1]),
        ((0.5, 0, 1.0), [0, 1, 2, 3, 4]),
    ],
)
def test_draws_follow_the_cut_and_tempered_distribution(options: tuple[float, int, float], kept: list[int]) -> None:
    order = torch.tensor([3, 0, 4, 2, 1])  # so that the likeliest is not the first
    logits = torch.empty(5)
    logits[order] = P.log()
    n = 20_000
    draw = torch.Generator().manual_seed(0)
    share = torch.bincount(pick(logits.expand(n, 5), *options, draw), minlength=5)[order] / n
    want = torch.zeros(5)
    want[kept] = P[kept] ** (1 / options[0])
    want /= want.sum()
    assert share[want == 0].sum() == 0
    assert (share - want).abs().max() < 0.015


def test_the_mode_of_the_model_is_put_back(tiny: Three) -> None:
    model, tokenizer, _ = tiny
    model.train()
    lora.generate(model, tokenizer, "ab", 2)
    assert model.training
    model.eval()
    lora.generate(model, tokenizer, "ab", 2)
    assert not model.training


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["a", ""], {}, "prompt 1 is empty"),
        (["a" * 90], {"max_new_tokens": 7}, r"prompt 0 has 90 tokens.*96"),
        (["a"], {"temperature": -0.1}, "temperature=-0.1"),
        (["a"], {"top_p": 0.0}, "top_p=0.0"),
        (["a"], {"top_p": 1.1}, "top_p=1.1"),
        (["a"], {"top_k": -1}, "top_k=-1"),
        (["a"], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[{"role": "user", "content": "hi"}]], {}, "no chat template"),
    ],
)
def test_a_mistake_is_refused(prompts: list[Any], options: dict[str, Any], message: str, tiny: Three) -> None:
    with pytest.raises(ValueError, match=message):
        lora.generate(tiny[0], tiny[1], prompts, **options)


def test_a_prompt_that_just_fits_is_taken(tiny: Three) -> None:
    model, tokenizer, _ = tiny
    assert len(generate_ids(model, [tokenizer.encode("a" * 90)], 6)[0]) == 6


def test_a_foreign_model_is_refused(tiny: Three) -> None:
    with pytest.raises(TypeError, match="LlamaForCausalLM is not a model of lora.load"):
        lora.generate(tiny[2], tiny[1], "a")
