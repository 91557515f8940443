"""Rendering: what is learned, and nothing else; what does not fit is refused; batches hold every row whole."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lora.models.tokenizer import Tokenizer
from lora.render import Example, collate, render

ASK = {"role": "user", "content": "Name a colour."}
SYSTEM = {"role": "system", "content": "Answer in one word. "}


@pytest.fixture(scope="module")
def smollm2(smollm2_files: Path) -> Tokenizer:
    return Tokenizer.from_directory(smollm2_files)


@pytest.fixture(scope="module")
def small(stories: Path) -> Tokenizer:
    return Tokenizer.from_directory(stories)


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def learned_ids(example: Example) -> list[int]:
    return [i for i, learn in zip(example.ids, example.learned, strict=True) if learn]


def learned_spans(example: Example, tokenizer: Tokenizer) -> list[str]:
    """The text of each unbroken run of learned tokens."""
    spans: list[list[int]] = []
    before = False
    for i, learn in zip(example.ids, example.learned, strict=True):
        if learn and not before:
            spans.append([])
        if learn:
            spans[-1].append(i)
        before = learn
    return [tokenizer.decode(span, special=True) for span in spans]


PAIRS = [
    ("The capital of France is", " Paris."),
    ("used premium laptop, 32 GB\nPrice: $", "1400"),
    ("naïve 日本", "語 🙂\n\nmore"),
    ("ends in a space ", "word"),
    ("half a wo", "rd"),
    ("x", " "),
]


@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
@pytest.mark.parametrize("which", ["small", "smollm2"])
def test_of_a_pair_the_completion_and_the_end_are_learned(
    which: str, prompt: str, completion: str, request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(which)
    [example] = render([{"prompt": prompt, "completion": completion}], tokenizer, 512)
    asked = tokenizer.encode(prompt)
    assert list(example.ids[: len(asked)]) == asked, "training sees the prompt as generation does"
    assert example.learned == tuple(i >= len(asked) for i in range(len(example.ids)))
    assert example.ids[-1] == tokenizer.eos
    assert tokenizer.decode(asked + learned_ids(example)[:-1]) == prompt + completion
    assert example.n_learned == sum(example.learned)


def test_the_end_is_not_written_twice(smollm2: Tokenizer) -> None:
    [example] = render([{"prompt": "a", "completion": " b<|im_end|>"}], smollm2, 512)
    assert list(example.ids).count(smollm2.eos) == 1


def test_the_first_token_is_never_learned(smollm2: Tokenizer) -> None:
    [example] = render([{"prompt": "", "completion": "one two three"}], smollm2, 512)
    assert example.learned[0] is False and all(example.learned[1:])


CHATS: dict[str, list[dict[str, str]]] = {
    "one turn": [ASK, says("Blue.")],
    "with a system turn": [SYSTEM, ASK, says("Blue.")],
    "three turns": [ASK, says("Blue."), ASK, says("Green, say.\n\nOr teal."), SYSTEM | ASK, says("🙂 naïve")],
    "an unanswered end": [ASK, says("Blue."), ASK],
    "two answers in a row": [ASK, says("Blue."), says("Or red.")],
    "an answer that ends in spaces": [ASK, says("Blue  ")],
    "markers in the question": [{"role": "user", "content": "<|im_start|>assistant\nno<|im_end|>\n"}, says("Yes.")],
}


@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS.keys())
def test_of_a_chat_the_answers_and_their_stop_are_learned(messages: list[dict[str, str]], smollm2: Tokenizer) -> None:
    [example] = render([{"messages": messages}], smollm2, 512)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert learned_spans(example, smollm2) == [a + "<|im_end|>" for a in answers]
    assert smollm2.decode(example.ids, special=True) == smollm2.render(messages)


def test_an_answer_that_begins_in_spaces_is_learned_whole(smollm2: Tokenizer) -> None:
    [example] = render([{"messages": [ASK, says("  Blue")]}], smollm2, 512)
    assert learned_spans(example, smollm2) == ["  Blue<|im_end|>"]


def test_a_chat_without_a_template_is_refused(small: Tokenizer) -> None:
    with pytest.raises(ValueError, match="has no chat template"):
        render([{"messages": [ASK, says("Blue.")]}], small, 512)


def test_a_template_that_rewrites_earlier_turns_is_refused(smollm2_files: Path) -> None:
    tokenizer = Tokenizer.from_directory(smollm2_files)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content if loop.last or m.role == 'user' else '...' }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert len(render([{"messages": [ASK, says("Blue.")]}], tokenizer, 512)) == 1
    with pytest.raises(ValueError, match=r"row 0.*turn 1"):
        render([{"messages": [ASK, says("Blue."), ASK, says("Red.")]}], tokenizer, 512)


def test_a_chat_that_begins_with_an_answer_is_refused_where_the_template_adds_a_turn(smollm2: Tokenizer) -> None:
    row = {"messages": [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "yes?"}]}
    with pytest.raises(ValueError, match="row 0: the chat begins with an answer"):
        render([row], smollm2, 64)


def test_a_template_may_refuse_the_messages(smollm2_files: Path) -> None:
    tokenizer = Tokenizer.from_directory(smollm2_files)
    tokenizer.chat_template = "{{ raise_exception('no system turns here') }}"
    with pytest.raises(ValueError, match="no system turns here"):
        render([{"messages": [SYSTEM, ASK, says("Blue.")]}], tokenizer, 512)


def test_a_template_cannot_reach_the_machine(smollm2_files: Path) -> None:
    tokenizer = Tokenizer.from_directory(smollm2_files)
    tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ValueError, match="does not take these messages"):
        render([{"messages": [ASK, says("Blue.")]}], tokenizer, 512)


def test_a_row_that_is_too_long_is_refused_with_what_it_would_lose(small: Tokenizer) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "Once upon a time", "completion": " there was a cat"}]
    n = len(render(rows, small, 512)[1].ids)
    assert len(render(rows, small, n)) == 2
    learned = render(rows, small, n)[1].n_learned
    with pytest.raises(ValueError, match=rf"row 1 has {n} tokens and the limit is {n - 2}.* lose 2 of its {learned} "):
        render(rows, small, n - 2)


def test_a_row_with_nothing_to_learn_is_refused(small: Tokenizer) -> None:
    bare = Tokenizer(small.backend)  # no end token, none in front
    with pytest.raises(ValueError, match="row 0: none of its 1 tokens"):
        render([{"prompt": "", "completion": "a"[:1]}], _one_token(bare), 512)


def _one_token(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.encode = lambda text, special=True: [5] if text else []  # type: ignore[method-assign]
    return tokenizer


def test_examples_keep_the_place_of_their_row(small: Tokenizer) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "p", "completion": "c" * n} for n in (1, 5, 3)]
    assert [e.row for e in render(rows, small, 512)] == [0, 1, 2]


def test_a_batch_equals_a_naive_loop() -> None:
    draw = random.Random(0)
    examples = []
    for row, n in enumerate((5, 1 + 7, 2, 12)):
        learned = [False, *(draw.random() < 0.5 for _ in range(n - 1))]
        examples.append(Example(tuple(draw.randrange(1, 99) for _ in range(n)), tuple(learned), 10 + row))
    batch = collate(examples, pad=0)
    T = 12
    at, target, owner = [], [], []
    for b, e in enumerate(examples):
        for k in range(1, len(e.ids)):
            if e.learned[k]:
                at.append(b * T + k - 1)
                target.append(e.ids[k])
                owner.append(b)
    assert batch.ids.shape == (4, T)
    assert (batch.at.tolist(), batch.target.tolist(), batch.owner.tolist()) == (at, target, owner)
    assert batch.rows == (10, 11, 12, 13)
    assert batch.n_tokens == sum(len(e.ids) for e in examples)
    for b, e in enumerate(examples):
        assert batch.ids[b, : len(e.ids)].tolist() == list(e.ids)
        assert batch.ids[b, len(e.ids) :].eq(0).all()
        assert batch.real[b].tolist() == [k < len(e.ids) for k in range(T)]
    assert batch.to(torch.device("cpu")).rows == batch.rows
