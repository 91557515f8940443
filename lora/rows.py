"""Rows of text: read from JSONL, and checked before anything else runs.

{"prompt": "...", "completion": "..."}           the completion is learned
{"messages": [{"role": ..., "content": ...}]}    every assistant turn is learned

Beside messages may stand "tools" and "documents", lists of objects for the chat template; an assistant's message may
hold "tool_calls", and then leave out its content.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Data = str | Path | Sequence[Row]
ROLES = ("system", "user", "assistant", "tool")
GIVEN = ("tools", "documents")  # what a chat template is given besides the messages


def read_rows(data: Data) -> list[Row]:
    """The checked rows of a .jsonl file, or of a list of dicts.

    Raises FileNotFoundError, or ValueError naming the line: malformed JSON, no rows, a row of neither kind, an
    empty completion.
    """
    if isinstance(data, str | Path):
        path = Path(data)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; data is a .jsonl file, one row a line")
        rows, source = [], str(path)
        with path.open("rb") as f:
            for n, line in enumerate(f, start=1):
                if not line.strip():
                    continue
                try:
                    rows.append((f"{path} line {n}", json.loads(line.decode("utf-8"))))
                except UnicodeDecodeError as e:
                    raise ValueError(f"{path} line {n} is not UTF-8 text ({e.reason} at byte {e.start})") from None
                except ValueError as e:
                    raise ValueError(f"{path} line {n} is not valid JSON ({e})") from None
    else:
        rows, source = [(f"row {i}", row) for i, row in enumerate(data)], "the list"
    if not rows:
        raise ValueError(f"{source} holds no rows")
    for where, row in rows:
        _check(where, row)
    return [row for _, row in rows]


def _check(where: str, row: Any) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {type(row).__name__}, not an object with prompt and completion, or messages")
    if "messages" in row:
        _check_messages(where, row["messages"])
        for key in GIVEN:
            value = row.get(key)
            if value is not None and not (isinstance(value, list) and all(isinstance(v, dict) for v in value)):
                raise ValueError(f"{where}: {key!r} must be a list of objects")
        return
    for key in ("prompt", "completion"):
        if key not in row:
            raise ValueError(
                f"{where} has no {key!r}; it has {sorted(row)}, and needs prompt and completion, or messages"
            )
        if not isinstance(row[key], str):
            raise ValueError(f"{where}: {key!r} is {type(row[key]).__name__}, and must be text")
    if not row["completion"]:
        raise ValueError(f"{where} has an empty completion, so nothing could be learned from it")


def _check_messages(where: str, messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: messages must be a list that is not empty")
    for message in messages:
        calls = isinstance(message, dict) and message.get("role") == "assistant" and message.get("tool_calls")
        if calls and message.get("content") is None:
            continue
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"{where}: each message needs a role and a text as content, and one is {message!r}")
        if message.get("role") not in ROLES:
            raise ValueError(f"{where}: role {message.get('role')!r} is not one of {', '.join(ROLES)}")
    if not any(m["role"] == "assistant" and (m.get("content") or m.get("tool_calls")) for m in messages):
        raise ValueError(f"{where} has no assistant message with content, so nothing could be learned from it")


def given_in(row: Row) -> Row:
    """The tools and documents of a chat."""
    return {key: row[key] for key in GIVEN if row.get(key) is not None}


def prompt_of(row: Row) -> str | list[Row] | Row:
    """What the model is asked in a row: the prompt, or the chat up to its last assistant turn, with its tools."""
    if "messages" in row:
        last = max(i for i, m in enumerate(row["messages"]) if m["role"] == "assistant")
        asked, given = row["messages"][:last], given_in(row)
        return {"messages": asked} | given if given else asked
    return row["prompt"]


def reference_of(row: Row) -> str:
    """What it should answer: the completion, or the text of the last assistant turn, empty where it calls tools."""
    if "messages" in row:
        return [m.get("content") or "" for m in row["messages"] if m["role"] == "assistant"][-1]
    return row["completion"]
