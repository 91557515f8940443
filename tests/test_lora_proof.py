"""The proof of masks: it holds for the families' templates, and fails for every mask that is wrong."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_lora_chat_templates import CASES, CHATS, says, template, user, write

from lora.batch import Example
from lora.models.tokenizer import Tokenizer
from lora.proof import prove
from lora.render import LEARN, render, render_row

PAIR = {"prompt": "2 + 2 =", "completion": " four, or 4"}


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("chatml")
    write(folder, CASES["chatml_tools"], template("chatml_tools"))
    return Tokenizer.from_directory(folder)


def learned_text(e: Example, tokenizer: Tokenizer) -> str:
    return tokenizer.decode([i for i, learn in zip(e.ids, e.learned, strict=True) if learn], special=True)


# ---- it holds ----
@pytest.mark.parametrize("learn", LEARN)
@pytest.mark.parametrize("name", CASES)
def test_the_proof_holds_for_the_templates_of_the_families(name: str, learn: str, tmp_path: Path) -> None:
    case = CASES[name]
    write(tmp_path, case, template(name))
    tokenizer = Tokenizer.from_directory(tmp_path)
    chats = [c for key, c in CHATS.items() if key not in (*case.refuses, *case.moves) and "tool" not in key]
    assert len(chats) >= 3
    assert len(render(chats, tokenizer, 8192, learn=learn, proof=True)) == len(chats)


def test_the_proof_holds_for_tools(chatml: Tokenizer) -> None:
    chats = [CHATS["tools"], CHATS["tool call"], CHATS["tools in two turns"]]
    assert len(render(chats, chatml, 8192, proof=True)) == 3


PAIRS = [
    PAIR,
    {"prompt": "", "completion": "alone"},
    {"prompt": "x", "completion": " "},
    {"prompt": "naïve 日本", "completion": "語 🙂\n\nmore "},
    {"prompt": "a", "completion": " b<|im_end|>"},
]


@pytest.mark.parametrize("row", PAIRS)
@pytest.mark.parametrize("which", ["smollm2_files", "stories"])
def test_the_proof_holds_for_pairs(row: dict[str, str], which: str, request: pytest.FixtureRequest) -> None:
    tokenizer = Tokenizer.from_directory(request.getfixturevalue(which))
    if which == "smollm2_files" or "im_end" not in row["completion"]:
        assert len(render([row], tokenizer, 512, proof=True)) == 1


# ---- learn ----
def test_learn_says_which_tokens(chatml: Tokenizer) -> None:
    chat = CHATS["turns"]
    each = {learn: render_row(chat, chatml, 0, learn) for learn in LEARN}
    assert len({e.ids for e in each.values()}) == 1
    assert learned_text(each["assistant"], chatml) == "Blue.<|im_end|>Red,\n\nor teal.<|im_end|>No<|im_end|>"
    assert learned_text(each["last"], chatml) == "No<|im_end|>"
    assert each["all"].learned == (False, *[True] * (len(each["all"].ids) - 1))
    pair = {learn: render_row(PAIR, chatml, 0, learn) for learn in LEARN}
    assert learned_text(pair["assistant"], chatml) == learned_text(pair["last"], chatml) == " four, or 4<|im_end|>"
    assert pair["all"].n_learned == len(pair["all"].ids) - 1
    with pytest.raises(ValueError, match="learn='some': one of assistant, last, all"):
        render([PAIR], chatml, 99, learn="some")


def test_plain_text_is_learned_whole_with_its_end(chatml: Tokenizer) -> None:
    for text in ("Some text.", "Some text.<|im_end|>"):
        [e] = render([{"text": text}], chatml, 99, proof=True)
        assert chatml.decode(e.ids, special=True) == "Some text.<|im_end|>"
        assert e.learned == (False, *[True] * (len(e.ids) - 1))


# ---- exactly one beginning ----
def test_a_beginning_that_the_text_writes_out_is_not_doubled(stories: Path) -> None:
    tokenizer = Tokenizer.from_directory(stories)
    assert tokenizer.add_bos and tokenizer.bos is not None
    bos = tokenizer.decode([tokenizer.bos], special=True)
    for prompt in ("Once upon", bos + "Once upon"):
        [e] = render([{"prompt": prompt, "completion": " a time"}], tokenizer, 99, proof=True)
        assert list(e.ids).count(tokenizer.bos) == 1 and e.ids[0] == tokenizer.bos
    with pytest.raises(ValueError, match=f"row 0: it begins with '{bos}' twice"):
        render([{"prompt": bos + bos + "Once upon", "completion": " a time"}], tokenizer, 99, proof=True)


# ---- it fails ----
def flip(e: Example, *places: int) -> Example:
    learned = list(e.learned)
    for k in places:
        learned[k] = not learned[k]
    return replace(e, learned=tuple(learned))


def wrong_masks(e: Example) -> dict[str, Example]:
    first, last = e.learned.index(True), len(e.ids) - 1 - e.learned[::-1].index(True)
    ids = list(e.ids)
    ids[first + 1] = ids[first]
    return {
        "begins a token early": flip(e, first - 1),
        "begins a token late": flip(e, first),
        "has no end": flip(e, last),
        "learns a hole less": flip(e, first + 1),
        "learns some of the prompt": flip(e, 2),
        "learns the whole prompt": flip(e, *range(1, first)),
        "is shifted by one": replace(e, learned=(*e.learned[1:], False)),
        "has another token": replace(e, ids=tuple(ids)),
    }


@pytest.mark.parametrize("row", [PAIR, CHATS["plain"], CHATS["turns"]], ids=["pair", "chat", "turns"])
@pytest.mark.parametrize("way", wrong_masks(Example(tuple(range(9)), (False,) * 4 + (True,) * 4 + (False,), 0)))
def test_a_wrong_mask_is_found(way: str, row: dict[str, Any], chatml: Tokenizer) -> None:
    e = render_row(row, chatml)
    prove(row, e, chatml, "assistant")
    with pytest.raises(ValueError, match=r"would|twice|learned"):
        prove(row, wrong_masks(e)[way], chatml, "assistant")


def test_all_that_is_not_all_is_found(chatml: Tokenizer) -> None:
    e = render_row(PAIR, chatml, 0, "all")
    with pytest.raises(ValueError, match="part of it is not"):
        prove(PAIR, flip(e, 3), chatml, "all")
    with pytest.raises(ValueError, match="3 turns"):
        prove(CHATS["turns"], render_row(CHATS["turns"], chatml, 0, "last"), chatml, "assistant")


# ---- templates that lose something ----
def given_template(folder: Path, text: str) -> Tokenizer:
    write(folder, CASES["chatml_tools"], text)
    return Tokenizer.from_directory(folder)


def test_a_template_without_an_end_of_turn_is_refused(tmp_path: Path) -> None:
    plain = given_template(
        tmp_path,
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    )
    assert len(render([CHATS["plain"]], plain, 99)) == 1
    with pytest.raises(ValueError, match=r"row 0: the answer 'Blue\.' ends in .* the tuned model would never stop"):
        render([CHATS["plain"]], plain, 99, proof=True)


def test_a_template_that_drops_what_the_assistant_thought_is_refused(tmp_path: Path) -> None:
    write(tmp_path, CASES["deepseek"], template("deepseek"))
    tokenizer = Tokenizer.from_directory(tmp_path)
    row = {"messages": [user("Name a colour."), says("<think>Sky.</think>Blue.")]}
    with pytest.raises(ValueError, match=r"row 0: it would teach 'Blue\.', and the answer is '<think>Sky"):
        render([row], tokenizer, 99, proof=True)


def test_an_answer_that_holds_the_end_of_turn_is_refused(chatml: Tokenizer) -> None:
    row = {"messages": [user("Name a colour."), says("Blue.<|im_end|>\n<|im_start|>user\nAnd now?")]}
    with pytest.raises(ValueError, match=r"row 0: it would teach 'Blue\.', and the answer is"):
        render([row], chatml, 99, proof=True)


def test_a_template_may_add_its_own_words_to_an_answer(tmp_path: Path) -> None:
    thinks = given_template(
        tmp_path,
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n"
        "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
    [e] = render([CHATS["plain"]], thinks, 99, proof=True)
    assert learned_text(e, thinks) == "<think>\n\n</think>\n\nBlue.<|im_end|>"
