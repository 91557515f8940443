"""The mask microscope: rows as the model will see them, what is learned marked, special tokens visible.

In a terminal learned text is green on dark, special tokens are magenta; written to a file or a pipe, learned text
stands in ⟦ ⟧.  As HTML it is one page that needs nothing else.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from lora.batch import Example
from lora.files import write_text
from lora.lengths import LengthReport
from lora.models.tokenizer import Tokenizer
from lora.proof import prove
from lora.render import render_row
from lora.rows import Data, Rows, read_rows

_LEARNED, _SPECIAL, _BOTH = "bold green on grey15", "magenta", "bold magenta on grey15"


@dataclass(frozen=True)
class Look:
    """What a look at data found: the rows, lengths, some rows as examples with what to call them, and rows that cannot
    be trained on, each in a sentence."""

    rows: Rows
    report: LengthReport
    shown: list[tuple[str, Example]]
    problems: list[str]

    def __str__(self) -> str:
        lines = [str(self.rows), str(self.report)]
        if self.problems:
            lines.append(f"{len(self.problems):,} of {len(self.rows):,} rows cannot be trained on:")
            lines += [f"  {p}" for p in self.problems[:10]]
        return "\n".join(lines)


def look(
    data: Data,
    tokenizer: Tokenizer,
    max_length: int,
    *,
    learn: str = "assistant",
    columns: Mapping[str, str] | None = None,
    start: int = 0,
    count: int = 3,
) -> Look:
    """Reads, renders and proves every row, and keeps `count` of them from `start` on to be shown.

    Raises what `read_rows` raises; a row that cannot be rendered or fails its proof becomes one of `problems`.
    """
    rows = read_rows(data, columns)
    found = Look(rows, LengthReport(max_length, "error"), [], [])
    for i, row in enumerate(rows):
        try:
            e = render_row(row, tokenizer, i, learn)
            if start <= i < start + count:
                found.shown.append((rows.where(i), e))
            prove(row, e, tokenizer, learn)
            found.report.add(rows.where(i), e)
        except ValueError as error:
            found.problems.append(f"{rows.where(i)}: {error}")
    return found


@dataclass(frozen=True)
class Piece:
    """An unbroken stretch of a row: its text, whether it is learned, whether it is one special token."""

    text: str
    learned: bool
    special: bool


def pieces(e: Example, tokenizer: Tokenizer) -> list[Piece]:
    """A row cut where what is learned begins or ends, and around special tokens; the texts make up the row.

    A character of several tokens that a border runs through is shown in the piece that holds its last token.
    """
    added = {i for i, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    found: list[Piece] = []
    shown, start = "", 0
    for k in range(1, len(e.ids) + 1):
        alone = e.ids[k - 1] in added
        goes_on = k < len(e.ids) and not alone and e.ids[k] not in added and e.learned[k] == e.learned[k - 1]
        if goes_on:
            continue
        whole = tokenizer.decode(e.ids[:k], special=True)
        if k < len(e.ids):
            whole = whole.rstrip("\ufffd")
        text = whole[len(shown) :] if whole.startswith(shown) else tokenizer.decode(e.ids[start:k], special=True)
        found.append(Piece(text, e.learned[k - 1], alone))
        shown, start = whole, k
    return found


def as_text(e: Example, tokenizer: Tokenizer, *, marks: bool = False) -> Text:
    """A row for a terminal; with `marks`, learned stretches in ⟦ ⟧ for where there is no colour."""
    text, inside = Text(), False
    for p in pieces(e, tokenizer):
        if marks and p.learned != inside:
            text.append("⟦" if p.learned else "⟧")
        inside = p.learned
        style = _BOTH if p.learned and p.special else _LEARNED if p.learned else _SPECIAL if p.special else ""
        text.append(p.text.replace("\n", "⏎\n") if p.learned else p.text, style=style)
    if marks and inside:
        text.append("⟧")
    return text


def as_json(where: str, e: Example, tokenizer: Tokenizer) -> dict[str, Any]:
    """A row for machines."""
    parts = [{"text": p.text, "learned": p.learned, "special": p.special} for p in pieces(e, tokenizer)]
    return {"row": where, "tokens": len(e.ids), "learned": e.n_learned, "pieces": parts}


def heading(where: str, e: Example) -> str:
    return f"{where}: {len(e.ids):,} tokens, {e.n_learned:,} learned"


_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --paper: #fff; --line: #e2e2e6;
        --learned: #d3f2d9; --special: #9d1a8b; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ea; --paper: #17171a; --line: #34343a; --learned: #1d4a2b; --special: #f08ae0; }
}
body { font: 15px/1.6 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1rem; margin-top: 2rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); padding: .8rem; }
.l { background: var(--learned); } .s { color: var(--special); }
"""


def write_page(
    path: str | Path, title: str, notes: str, rows: Sequence[tuple[str, Example]], tokenizer: Tokenizer
) -> None:
    """Writes `rows`, each with what to call it, as one HTML page under a title and notes."""
    legend = '<span class="l">learned</span>, <span class="s">special token</span>'
    parts = [f"<h1>{html.escape(title)}</h1>", f"<pre>{html.escape(notes)}</pre>", f"<p>{legend}</p>"]
    for where, e in rows:
        spans = "".join(_span(p) for p in pieces(e, tokenizer))
        parts.append(f"<h2>{html.escape(heading(where, e))}</h2>\n<pre>{spans}</pre>")
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    body = "\n".join(parts)
    write_text(
        Path(path),
        f"<!doctype html>\n<html lang=en><head>{head}<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n",
    )


def _span(p: Piece) -> str:
    text = html.escape(p.text).replace("\n", "⏎\n") if p.learned else html.escape(p.text)
    kind = " ".join(name for name, yes in (("l", p.learned), ("s", p.special)) if yes)
    return f'<span class="{kind}">{text}</span>' if kind else text
