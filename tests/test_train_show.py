"""The mask microscope: what is shown is the row, and what is marked is what is learned; `lora data show`."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_lora_chat_templates import CASES, CHATS, template, write

from lora.__main__ import main
from lora.batch import Example
from lora.models.load import load_tokenizer
from lora.models.tokenizer import Tokenizer
from lora.render import LEARN, render_row
from lora.rows import read_rows
from lora.train.show import as_text, look, pieces, write_page


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with ChatML and tools."""
    folder = tmp_path_factory.mktemp("chatml")
    write(folder, CASES["chatml_tools"], template("chatml_tools"))
    return folder


@pytest.fixture(scope="module")
def chatml(folder: Path) -> Tokenizer:
    return Tokenizer.from_directory(folder)


def chats(path: Path, *names: str) -> Path:
    path.write_text("".join(json.dumps(CHATS[name]) + "\n" for name in names))
    return path


@pytest.mark.parametrize("learn", LEARN)
@pytest.mark.parametrize("name", ["plain", "turns", "unicode", "tools in two turns"])
def test_pieces_make_up_the_row(name: str, learn: str, chatml: Tokenizer) -> None:
    e = render_row(CHATS[name], chatml, 0, learn)
    found = pieces(e, chatml)
    assert "".join(p.text for p in found) == chatml.decode(e.ids, special=True)
    learned = [i for i, yes in zip(e.ids, e.learned, strict=True) if yes]
    assert "".join(p.text for p in found if p.learned) == chatml.decode(learned, special=True)
    assert {p.text for p in found if p.special} == {"<|im_end|>"}


def test_a_space_that_a_tokenizer_hides_in_front_is_shown(stories: Path) -> None:
    tokenizer = Tokenizer.from_directory(stories)
    e = render_row({"prompt": "Once upon", "completion": " a time"}, tokenizer)
    assert [(p.text, p.learned, p.special) for p in pieces(e, tokenizer)][-2:] == [
        (" a time", True, False),
        ("</s>", True, True),
    ]


def test_a_border_inside_a_character_loses_nothing(chatml: Tokenizer) -> None:
    ids = tuple(chatml.encode("a🙂b"))  # one token a byte
    e = Example(ids, tuple(k >= 3 for k in range(len(ids))), 0)
    assert [(p.text, p.learned) for p in pieces(e, chatml)] == [("a", False), ("🙂b", True)]


def test_without_colour_what_is_learned_stands_in_brackets(chatml: Tokenizer) -> None:
    e = render_row(CHATS["turns"], chatml)
    marked = as_text(e, chatml, marks=True).plain
    assert re.findall("⟦(.*?)⟧", marked, re.DOTALL) == [
        "Blue.<|im_end|>",
        "Red,⏎\n⏎\nor teal.<|im_end|>",
        "No<|im_end|>",
    ]
    assert marked.translate({ord(c): None for c in "⟦⟧⏎"}) == chatml.decode(e.ids, special=True)
    assert as_text(render_row(CHATS["plain"], chatml, 0, "all"), chatml, marks=True).plain.endswith("⟧")
    coloured = as_text(e, chatml)
    assert "⟦" not in coloured.plain and any("green" in str(span.style) for span in coloured.spans)


class Page(HTMLParser):
    """The text of a page, and the text of its spans by class."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.kind = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.kind = dict(attrs).get("class") or "" if tag == "span" else self.kind if tag == "span" else ""

    def handle_endtag(self, tag: str) -> None:
        self.kind = ""

    def handle_data(self, data: str) -> None:
        self.found.append((self.kind, data))


def test_the_page_marks_the_same_and_escapes_what_is_no_markup(chatml: Tokenizer, tmp_path: Path) -> None:
    row = {"prompt": "<b>&amp;</b> {{ x }}", "completion": "<script>alert('x')</script>\n</pre>"}
    e = render_row(row, chatml)
    write_page(tmp_path / "page.html", "a <title>", "notes & more", [("line 1", e)], chatml)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in text and "<b>" not in text and "http" not in text
    learned = "".join(data for kind, data in Page(text).found if kind.split()[:1] == ["l"] and data != "learned")
    assert learned == row["completion"].replace("\n", "⏎\n") + "<|im_end|>"


# ---- look ----
def test_a_look_lists_rows_that_cannot_be_trained_on(chatml: Tokenizer, tmp_path: Path) -> None:
    bad = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x<|im_end|>y"}]}
    file = chats(tmp_path / "a.jsonl", "plain", "turns", "plain")
    with file.open("a") as f:
        f.write(json.dumps(bad) + "\n")
    found = look(file, chatml, 200, start=1, count=2)
    assert [where for where, _ in found.shown] == [f"{file} line 2", f"{file} line 3"]
    assert [e.row for _, e in found.shown] == [1, 2]
    assert len(found.problems) == 1 and f"{file} line 4: it would teach 'x'" in found.problems[0]
    assert "1 of 4 rows cannot be trained on:" in str(found)
    assert found.report.too_long == 1 and "1 of 3 rows are longer, and" in str(found)


# ---- the command ----
def test_data_show_prints_a_row_and_the_lengths(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = chats(tmp_path / "a.jsonl", "plain", "turns")
    assert main(["data", "show", str(file), "--model", str(folder), "--rows", "1"]) == 0
    out = capsys.readouterr().out
    assert "⟦Blue.<|im_end|>⟧" in out and "teal" not in out
    assert f"{file}: 2 rows of messages\n" in out and "tokens a row: 0 % " in out


def test_data_show_writes_a_page_and_json(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, page = chats(tmp_path / "a.jsonl", "plain", "turns"), tmp_path / "page.html"
    words = ["data", "show", str(file), "--model", str(folder), "--learn", "last", "--html", str(page), "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["lengths"]["rows"], found["problems"]) == ("messages", 2, [])
    learned = ["".join(p["text"] for p in row["pieces"] if p["learned"]) for row in found["rows"]]
    assert learned == ["Blue.<|im_end|>", "No<|im_end|>"]
    assert page.read_text(encoding="utf-8").count("<h2>") == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"messages": [{"role": "assistant", "content": "x<|im_end|>y"}]}', "1 of 1 rows cannot be trained on; "),
        ('{"messages": 3}', "line 1: messages must be a list"),
        ("", "holds no rows"),
    ],
)
def test_data_show_fails_on_data_that_would(
    text: str, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    assert main(["data", "show", str(tmp_path / "a.jsonl"), "--model", str(folder)]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and len(error.splitlines()) == 1


def test_data_show_maps_columns(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text('[{"q": "2 + 2?", "a": " 4"}]')
    words = ["data", "show", str(tmp_path / "a.json"), "--model", str(folder)]
    assert main([*words, "--columns.prompt", "q", "--columns.completion", "a"]) == 0
    assert "2 + 2?⟦ 4<|im_end|>⟧" in capsys.readouterr().out


def test_the_tokenizer_alone_is_loaded(stories: Path, tmp_path: Path, folder: Path) -> None:
    tokenizer, limit = load_tokenizer(stories)
    assert limit == 512 and tokenizer.encode("a") == Tokenizer.from_directory(stories).encode("a")
    assert load_tokenizer(folder)[1] is None
    with pytest.raises(FileNotFoundError, match="none does not exist; give a folder with tokenizer"):
        load_tokenizer(tmp_path / "none")


# ---- real data ----
REAL = {
    "alpaca/train.jsonl.gz": ("Alpaca", {}),
    "gsm8k/train.jsonl.gz": ("prompt and completion", {"prompt": "question", "completion": "answer"}),
}


@pytest.mark.parametrize(("name", "want"), REAL.items())
def test_masks_of_real_data_are_proved(name: str, want: tuple[str, dict[str, str]], smollm2_files: Path) -> None:
    file = smollm2_files.parents[1] / "data" / name
    if not file.is_file():
        pytest.skip(f"real data is not here: {file}")
    rows = read_rows(file, want[1])
    assert rows.kind == want[0] and len(rows) > 1000
    tokenizer, limit = load_tokenizer(smollm2_files)
    assert limit is not None
    found = look(rows[:300], tokenizer, limit)
    assert found.problems == [] and len(found.report.lengths) == 300
