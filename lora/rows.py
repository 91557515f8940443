"""Rows of text: recognised, checked before anything else runs, and brought to three kinds.

{"prompt": "...", "completion": "..."}           the completion is learned
{"messages": [{"role": ..., "content": ...}]}    every assistant turn is learned
{"text": "..."}                                  all of it is learned

Two more are read as one of these: ShareGPT ({"conversations": [{"from": "human", "value": ...}]}) as messages, Alpaca
({"instruction", "input", "output"}) as prompt and completion, in the words that Alpaca was trained with.

Beside messages may stand "tools" and "documents", lists of objects for the chat template; an assistant's message may
hold "tool_calls", and then leave out its content.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from lora.sources import open_source

Row = dict[str, Any]
Data = str | Path | Sequence[Row]
ROLES = ("system", "user", "assistant", "tool")
GIVEN = ("tools", "documents")  # what a chat template is given besides the messages
KINDS = {  # what a row of each must have, in the order in which they are recognised
    "messages": ("messages",),
    "ShareGPT": ("conversations",),
    "prompt and completion": ("prompt", "completion"),
    "Alpaca": ("instruction", "output"),
    "plain text": ("text",),
}
_OPTIONAL = ("input", "system", *GIVEN)  # may be named in `columns` too
_SHAREGPT = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
# github.com/tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


def read_rows(data: Data, columns: Mapping[str, str] | None = None) -> "Rows":
    """The checked rows of a file (`lora.sources`) or of a list of dicts; all are of one kind.

    `columns` says what the data calls a part of a row: {"prompt": "question", "completion": "answer"}.

    Raises FileNotFoundError, or ValueError naming the line: malformed JSON, no rows, a row of no kind or of another
    than the first, a text that is none, an empty completion.
    """
    return data if isinstance(data, Rows) and data.columns == dict(columns or data.columns) else Rows(data, columns)


class Rows(Sequence[Row]):
    """Rows in order, read when they are asked for. `print` it for what they are."""

    def __init__(self, data: Data, columns: Mapping[str, str] | None = None) -> None:
        known = sorted({part for parts in KINDS.values() for part in parts} | set(_OPTIONAL))
        for ours, theirs in (columns or {}).items():
            if ours not in known:
                right = f'; write {{"{theirs}": "{ours}"}}' if theirs in known else ""
                raise ValueError(
                    f"columns names {ours!r}, which is no part of a row; parts are {', '.join(known)}{right}"
                )
        self.columns = dict(columns or {})
        self.source, self.kind = open_source(data), ""
        for i, raw in enumerate(self.source.scan()):
            where = self.source.where(i)
            row = self._named(where, raw)
            if not self.kind:
                self.kind = _recognised(where, row)
            _has(where, row, self.kind, self.source.where(0))
            _normal(where, row, self.kind)
        if not self.kind:
            raise ValueError(f"{self.source.name} holds no rows")

    def _named(self, where: str, raw: Any) -> Row:
        if not isinstance(raw, dict):
            raise ValueError(f"{where} is {type(raw).__name__}, not an object with prompt and completion, or messages")
        for ours, theirs in self.columns.items():
            if theirs not in raw:
                raise ValueError(f"{where} has no {theirs!r}, which columns gives for {ours!r}; it has {sorted(raw)}")
        return raw | {ours: raw[theirs] for ours, theirs in self.columns.items()} if self.columns else raw

    def where(self, i: int) -> str:
        """The row's line, for a sentence: "train.jsonl line 3"; "row 3" of a list."""
        return self.source.where(i)

    def __str__(self) -> str:
        renamed = ", ".join(f"{ours} from {theirs!r}" for ours, theirs in self.columns.items())
        return f"{self.source.name}: {len(self):,} rows of {self.kind}{f' ({renamed})' if renamed else ''}"

    def __len__(self) -> int:
        return len(self.source)

    @overload
    def __getitem__(self, i: int) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> list[Row]: ...
    def __getitem__(self, i: int | slice) -> Row | list[Row]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        i %= len(self)
        where = self.source.where(i)
        return _normal(where, self._named(where, self.source[i]), self.kind)

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))


def where_of(rows: Sequence[Row], i: int) -> str:
    """What to call row i in a sentence."""
    return rows.where(i) if isinstance(rows, Rows) else f"row {i}"


def _kind_of(row: Row) -> str | None:
    return next((k for k, parts in KINDS.items() if all(row.get(p) is not None for p in parts)), None)


def _recognised(where: str, row: Row) -> str:
    kind = _kind_of(row)
    if kind is None:  # one of its parts is there, or it is of no kind at all
        kind = next((k for k, parts in KINDS.items() if any(p in row for p in parts)), None)
    if kind is None:
        kinds = "; ".join(f"{', '.join(parts)} ({k})" if k not in parts else k for k, parts in KINDS.items())
        raise ValueError(
            f"{where} has {sorted(row)}, and a row is known by: {kinds}; columns can say which of yours is which, "
            f"as in {_columns_like(row)}"
        )
    return kind


def _columns_like(row: Row) -> str:
    """How `columns` would be written for such a row: its first text as prompt, its last as completion."""
    texts = [str(key) for key, value in row.items() if isinstance(value, str)]
    if len(texts) == 1:
        return json.dumps({"text": texts[0]}, ensure_ascii=False)
    prompt, completion = (texts[0], texts[-1]) if texts else ("question", "answer")
    return json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False)


def _has(where: str, row: Row, kind: str, first: str) -> None:
    for part in KINDS[kind]:
        if part not in row:
            other = _kind_of(row)
            if other:
                raise ValueError(f"{where} is a row of {other}, and {first} of {kind}; all rows must be of one kind")
            raise ValueError(
                f"{where} has no {part!r}; it has {sorted(row)}, and a row of {kind} needs {', '.join(KINDS[kind])}"
            )


def _text(where: str, row: Row, part: str) -> str:
    text = row[part]
    if not isinstance(text, str):
        raise ValueError(f"{where}: {part!r} is {type(text).__name__}, and must be text")
    return _encodable(where, text)


def _encodable(where: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"{where} holds half a character, \\u{ord(text[e.start]):x}, which is no text") from None
    return text


def _normal(where: str, row: Row, kind: str) -> Row:
    """The row as one of the three kinds; raises ValueError for one that cannot be."""
    if kind == "messages":
        _check_messages(where, row["messages"])
        _check_given(where, row)
        return row
    if kind == "ShareGPT":
        messages = [_from_sharegpt(where, turn) for turn in _list(where, row["conversations"], "conversations")]
        if isinstance(row.get("system"), str) and row["system"] and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": row["system"]})
        _check_messages(where, messages)
        _check_given(where, row)
        return {"messages": messages} | given_in(row)
    if kind == "plain text":
        if not _text(where, row, "text"):
            raise ValueError(f"{where} has an empty text, so nothing could be learned from it")
        return row
    if kind == "Alpaca":
        given = {key: row.get(key) or "" for key in ("instruction", "input", "output")}
        texts = {key: _text(where, given, key) for key in given}
        prompt = (_ALPACA_INPUT if texts["input"] else _ALPACA).format_map(texts)
        row = {"prompt": prompt, "completion": texts["output"]}
    _text(where, row, "prompt")
    if not _text(where, row, "completion"):
        raise ValueError(f"{where} has an empty completion, so nothing could be learned from it")
    return row


def _list(where: str, value: Any, name: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {name} must be a list that is not empty")
    return value


def _from_sharegpt(where: str, turn: Any) -> Row:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise ValueError(f"{where}: each turn needs from, and a text as value, and one is {turn!r}")
    if turn.get("from") not in _SHAREGPT:
        raise ValueError(f"{where}: from {turn.get('from')!r} is not one of {', '.join(_SHAREGPT)}")
    return {"role": _SHAREGPT[turn["from"]], "content": turn["value"]}


def _check_given(where: str, row: Row) -> None:
    for key in GIVEN:
        value = row.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(v, dict) for v in value)):
            raise ValueError(f"{where}: {key!r} must be a list of objects")


def _check_messages(where: str, messages: Any) -> None:
    for message in _list(where, messages, "messages"):
        calls = isinstance(message, dict) and message.get("role") == "assistant" and message.get("tool_calls")
        if calls and message.get("content") is None:
            continue
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"{where}: each message needs a role and a text as content, and one is {message!r}")
        if message.get("role") not in ROLES:
            raise ValueError(f"{where}: role {message.get('role')!r} is not one of {', '.join(ROLES)}")
        _encodable(where, message["content"])
    if not any(m["role"] == "assistant" and (m.get("content") or m.get("tool_calls")) for m in messages):
        raise ValueError(f"{where} has no assistant message with content, so nothing could be learned from it")


def given_in(row: Row) -> Row:
    """The tools and documents of a chat."""
    return {key: row[key] for key in GIVEN if row.get(key) is not None}


def prompt_of(row: Row) -> str | list[Row] | Row:
    """What the model is asked in a row: the prompt, nothing before a plain text, or the chat up to its last assistant
    turn, with its tools."""
    if "messages" in row:
        last = max(i for i, m in enumerate(row["messages"]) if m["role"] == "assistant")
        asked, given = row["messages"][:last], given_in(row)
        return {"messages": asked} | given if given else asked
    return row.get("prompt", "")


def reference_of(row: Row) -> str:
    """What it should answer: the completion, the plain text, or the text of the last assistant turn, which is empty
    where it calls tools."""
    if "messages" in row:
        return [m.get("content") or "" for m in row["messages"] if m["role"] == "assistant"][-1]
    return row["completion"] if "completion" in row else row["text"]
