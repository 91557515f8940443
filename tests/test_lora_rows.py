"""Rows: what is read, and every refusal with the line it is about."""

import gzip
import json
import os
import re
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from lora import sources
from lora.rows import prompt_of, read_rows, reference_of

PAIR = {"prompt": "2 + 2 =", "completion": " 4"}
CHAT = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_pairs_and_chats_are_read_from_a_file_and_from_a_list(tmp_path: Path) -> None:
    for row in (PAIR, CHAT):
        file = lines(tmp_path / "a.jsonl", row, "", row, "   ")
        assert list(read_rows(file)) == list(read_rows(str(file))) == list(read_rows([row, row])) == [row, row]
    assert read_rows(read_rows(file))[-1] == CHAT


def test_unicode_survives_the_file(tmp_path: Path) -> None:
    row = {"prompt": "日本 🙂 \u2028", "completion": "é"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert list(read_rows(tmp_path / "a.jsonl")) == [row]


def test_an_empty_prompt_and_extra_keys_are_allowed() -> None:
    row = {"prompt": "", "completion": "x", "id": 7}
    assert list(read_rows([row])) == [row]


BAD: dict[str, tuple[Any, str]] = {
    "cut json": ('{"prompt": "a", "compl', "not valid JSON"),
    "a list": ([1, 2], "is list, not an object"),
    "a number": (3, "is int, not an object"),
    "no completion": ({"prompt": "a"}, "has no 'completion'"),
    "no prompt": ({"completion": "a"}, "has no 'prompt'"),
    "other keys": ({"question": "a", "answer": "b"}, "it has .'answer', 'question'."),
    "Alpaca": ({"instruction": "a", "output": "b"}, "is a row of Alpaca, and .*(line 1|row 0) of prompt and compl"),
    "half a character": ('{"prompt": "a", "completion": "\\ud83d"}', "half a character"),
    "too deep": ("[" * 100_000, "nested too deeply"),
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
    good = CHAT if isinstance(row, dict) and "messages" in row else PAIR
    file = lines(tmp_path / "a.jsonl", good, "", row, good)
    with pytest.raises(ValueError, match=f"a.jsonl line 3.*{message}"):
        read_rows(file)


IN_LISTS = {name: bad for name, bad in BAD.items() if not isinstance(bad[0], str)}


@pytest.mark.parametrize(("row", "message"), IN_LISTS.values(), ids=IN_LISTS.keys())
def test_a_bad_row_in_a_list_is_refused_with_its_number(row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"row 1.*{message}"):
        read_rows([CHAT if isinstance(row, dict) and "messages" in row else PAIR, row])


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


# ---- kinds ----
SHAREGPT = {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}
ALPACA = {"instruction": "Add.", "input": "2 + 2", "output": "4"}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "prompt and completion": (PAIR, PAIR),
    "messages": (CHAT, CHAT),
    "ShareGPT": (SHAREGPT, CHAT),
    "plain text": ({"text": "2 + 2 = 4"}, {"text": "2 + 2 = 4"}),
}


@pytest.mark.parametrize(("row", "want"), KINDS.values(), ids=KINDS.keys())
def test_a_kind_is_recognised_and_said(
    row: dict[str, Any], want: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    rows = read_rows([row, row])
    assert list(rows) == [want, want]
    assert str(rows) == f"the list: 2 rows of {request.node.callspec.id}"


def test_sharegpt_may_name_a_system_text_beside_its_turns() -> None:
    [row] = read_rows([SHAREGPT | {"system": "Be brief.", "tools": [{"name": "f"}]}])
    assert row == {
        "messages": [{"role": "system", "content": "Be brief."}, *CHAT["messages"]],
        "tools": [{"name": "f"}],
    }
    with pytest.raises(ValueError, match="row 0: from 'bot' is not one of human, gpt"):
        read_rows([{"conversations": [{"from": "bot", "value": "x"}]}])
    with pytest.raises(ValueError, match="row 0: each turn needs from"):
        read_rows([{"conversations": ["x"]}])


def test_alpaca_is_put_as_alpaca_was() -> None:
    rows = read_rows([ALPACA, ALPACA | {"input": ""}, {"instruction": "Add {x}.", "output": "4"}])
    assert rows.kind == "Alpaca" and all(row["completion"] == "4" for row in rows)
    assert rows[0]["prompt"].startswith("Below is an instruction that describes a task, paired with an input")
    assert rows[0]["prompt"].endswith("\n\n### Instruction:\nAdd.\n\n### Input:\n2 + 2\n\n### Response:")
    assert "Input" not in rows[1]["prompt"]
    assert rows[2]["prompt"].endswith("### Instruction:\nAdd {x}.\n\n### Response:")


def test_a_row_of_no_kind_is_told_the_kinds() -> None:
    with pytest.raises(
        ValueError, match=r"row 0 has \['a', 'q'\], and a row is known by: messages; conversations \(Sha"
    ):
        read_rows([{"q": "1", "a": "2"}])
    for row, said in (
        ({"q": "1", "n": 3, "a": "2"}, 'as in {"prompt": "q", "completion": "a"}'),
        ({"story": "1"}, 'as in {"text": "story"}'),
        ({"n": 3}, 'as in {"prompt": "question", "completion": "answer"}'),
    ):
        with pytest.raises(ValueError, match=re.escape(said) + "$"):
            read_rows([row])


def test_columns_say_what_the_data_calls_its_parts() -> None:
    data = [{"question": "2 + 2 =", "answer": " 4", "id": 1}]
    rows = read_rows(data, {"prompt": "question", "completion": "answer"})
    assert (rows[0]["prompt"], rows[0]["completion"]) == ("2 + 2 =", " 4")
    assert str(rows).endswith("1 rows of prompt and completion (prompt from 'question', completion from 'answer')")
    with pytest.raises(ValueError, match="row 0 has no 'questoin', which columns gives for 'prompt'; it has .'answer'"):
        read_rows(data, {"prompt": "questoin"})
    with pytest.raises(ValueError, match="columns names 'promt', which is no part of a row"):
        read_rows(data, {"promt": "question"})
    with pytest.raises(ValueError, match=r"columns names 'question', .*; write {\"prompt\": \"question\"}$"):
        read_rows(data, {"question": "prompt"})
    again = read_rows(rows, {"prompt": "question", "completion": "answer"})
    assert again is rows and read_rows(rows) is rows  # rows that were read are not read again


# ---- files ----
def test_a_list_of_rows_in_one_json_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([PAIR, PAIR], indent=1))
    rows = read_rows(tmp_path / "a.json")
    assert list(rows) == [PAIR, PAIR] and rows.where(1) == f"{tmp_path}/a.json row 1"
    (tmp_path / "a.jsonl").write_text(json.dumps([PAIR, PAIR], indent=1))
    with pytest.raises(ValueError, match=r"a\.jsonl line 1 begins a JSON list; name the file \.json"):
        read_rows(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "holds no rows"), ("[]", "holds no rows"), ('{"a": 1}', "holds dict, not a list"), ("[{]", "not valid JSON")],
)
def test_a_bad_json_list_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.json {message}|a\.json is {message}"):
        read_rows(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz"])
def test_packed_files_are_read(name: str, tmp_path: Path) -> None:
    text = json.dumps(PAIR) + "\n" + json.dumps(PAIR) if "jsonl" in name else json.dumps([PAIR, PAIR])
    with gzip.open(tmp_path / name, "wt") as f:
        f.write(text)
    assert list(read_rows(tmp_path / name)) == [PAIR, PAIR]
    whole = (tmp_path / name).read_bytes()
    for damaged in (whole[:-9], b"plain", whole[:20] + b"\xff\xff" + whole[22:]):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name} is not a whole gzip file"):
            read_rows(tmp_path / name)


def test_a_parquet_file_is_read_by_row_group(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="the parquet extra")
    import pyarrow.parquet

    table = pa.table({"question": [f"q{i}" for i in range(10)], "answer": [f"a{i}" for i in range(10)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    rows = read_rows(tmp_path / "a.parquet", {"prompt": "question", "completion": "answer"})
    assert [(r["prompt"], r["completion"]) for r in rows] == [(f"q{i}", f"a{i}") for i in range(10)]
    assert rows[9]["prompt"] == "q9" and rows[0]["prompt"] == "q0" and rows.where(4).endswith("a.parquet row 4")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"b\.parquet is not a Parquet file"):
        read_rows(tmp_path / "b.parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match=r"needs pyarrow: pip install 'lora-torch\[parquet\]'"):
        read_rows(tmp_path / "a.parquet")


def test_a_file_of_another_suffix_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"a\.csv ends in \.csv; data is a file of rows: \.jsonl, "):
        read_rows(tmp_path / "a.csv")


def test_bytes_that_are_no_text_are_refused_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json.dumps(PAIR).encode() + b'\n{"prompt": "caf\xe9", "completion": "x"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl line 2 is not UTF-8 text \(invalid continuation byte at byte 15"):
        read_rows(tmp_path / "a.jsonl")


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode())
    assert list(read_rows(tmp_path / "a.jsonl")) == [PAIR]


def test_a_huge_line_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LONGEST_LINE", 1 << 20)
    lines(tmp_path / "a.jsonl", PAIR, {"prompt": "x" * (8 << 20), "completion": "y"})
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"a\.jsonl line 2 is longer than 1 MiB"):
        read_rows(tmp_path / "a.jsonl")
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_a_large_file_is_not_held(tmp_path: Path) -> None:
    file, row = tmp_path / "a.jsonl", json.dumps({"prompt": "x" * 5000, "completion": "y"}) + "\n"
    file.write_text(row * 4000)  # 20 MB
    tracemalloc.start()
    rows = read_rows(file)
    assert len(rows) == 4000 and sum(len(r["prompt"]) for r in rows) == 20_000_000
    assert rows[3999]["completion"] == rows[-1]["completion"] == "y" and len(rows[5:7]) == 2
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    with pytest.raises(IndexError, match="row 4000 of 4000"):
        rows[4000]


def test_a_file_that_changes_while_in_use_is_noticed(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", PAIR, PAIR)
    rows = read_rows(file)
    assert rows[1] == PAIR
    lines(file, PAIR | {"prompt": "3"}, PAIR)
    os.utime(file, ns=(1, 1))
    with pytest.raises(RuntimeError, match=r"a\.jsonl was changed while it was in use"):
        rows[1]
