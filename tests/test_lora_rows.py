"""Rows: what is read, and every refusal with the line it is about."""

import json
from pathlib import Path
from typing import Any

import pytest

from lora.rows import prompt_of, read_rows, reference_of

PAIR = {"prompt": "2 + 2 =", "completion": " 4"}
CHAT = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_pairs_and_chats_are_read_from_a_file_and_from_a_list(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", PAIR, "", CHAT, "   ")
    assert read_rows(file) == read_rows(str(file)) == read_rows([PAIR, CHAT]) == [PAIR, CHAT]


def test_unicode_survives_the_file(tmp_path: Path) -> None:
    row = {"prompt": "日本 🙂 \u2028", "completion": "é"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_rows(tmp_path / "a.jsonl") == [row]


def test_an_empty_prompt_and_extra_keys_are_allowed() -> None:
    row = {"prompt": "", "completion": "x", "id": 7}
    assert read_rows([row]) == [row]


BAD: dict[str, tuple[Any, str]] = {
    "cut json": ('{"prompt": "a", "compl', "not valid JSON"),
    "a list": ([1, 2], "is list, not an object"),
    "a number": (3, "is int, not an object"),
    "no completion": ({"prompt": "a"}, "has no 'completion'"),
    "no prompt": ({"completion": "a"}, "has no 'prompt'"),
    "other keys": ({"instruction": "a", "output": "b"}, "it has .'instruction', 'output'."),
    "prompt not text": ({"prompt": 3, "completion": "a"}, "'prompt' is int"),
    "completion not text": ({"prompt": "a", "completion": ["b"]}, "'completion' is list"),
    "completion null": ({"prompt": "a", "completion": None}, "'completion' is NoneType"),
    "empty completion": ({"prompt": "a", "completion": ""}, "empty completion"),
    "no messages": ({"messages": []}, "list that is not empty"),
    "messages a text": ({"messages": "hi"}, "list that is not empty"),
    "message a text": ({"messages": ["hi"]}, "each message needs"),
    "no content": ({"messages": [{"role": "user"}]}, "each message needs"),
    "content null": ({"messages": [{"role": "assistant", "content": None}]}, "each message needs"),
    "content a list": ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "each message needs"),
    "unknown role": ({"messages": [{"role": "bot", "content": "hi"}]}, "role 'bot'"),
    "no role": ({"messages": [{"content": "hi"}]}, "role None"),
    "no assistant": ({"messages": [{"role": "user", "content": "hi"}]}, "no assistant message"),
    "empty assistant": ({"messages": [{"role": "assistant", "content": ""}]}, "no assistant message"),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_row_in_a_file_is_refused_with_its_line(row: Any, message: str, tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", PAIR, "", row, CHAT)
    with pytest.raises(ValueError, match=f"a.jsonl line 3.*{message}"):
        read_rows(file)


@pytest.mark.parametrize(("row", "message"), list(BAD.values())[1:], ids=list(BAD.keys())[1:])
def test_a_bad_row_in_a_list_is_refused_with_its_number(row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"row 1.*{message}"):
        read_rows([PAIR, row])


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_file_without_rows_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"a\.jsonl holds no rows"):
        read_rows(tmp_path / "a.jsonl")


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no rows"):
        read_rows([])


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl is not there"):
        read_rows(tmp_path / "none.jsonl")


def test_prompt_and_reference_of_a_pair() -> None:
    assert prompt_of(PAIR) == "2 + 2 ="
    assert reference_of(PAIR) == " 4"


def test_prompt_and_reference_of_a_chat_are_about_its_last_answer() -> None:
    first, more = CHAT["messages"], [{"role": "user", "content": "+1?"}, {"role": "assistant", "content": "5"}]
    late = {"role": "user", "content": "thanks"}
    row = {"messages": [*first, *more, late]}
    assert prompt_of(row) == [*first, more[0]]
    assert reference_of(row) == "5"
