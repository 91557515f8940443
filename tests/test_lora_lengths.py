"""Rows that do not fit: what is said of them, and what each way out keeps and loses."""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.batch import Example
from lora.lengths import OVERLONG, LengthReport, shorten
from lora.models.tokenizer import Tokenizer
from lora.render import render

ROW = Example((1, 10, 11, 12, 13, 20, 21, 22), (False,) * 5 + (True,) * 3, 4)


@pytest.fixture(scope="module")
def small(stories: Path) -> Tokenizer:
    return Tokenizer.from_directory(stories)


def pieces(found: list[Example]) -> list[tuple[list[int], str]]:
    assert all(e.row == 4 for e in found)
    return [(list(e.ids), "".join("-x"[learn] for learn in e.learned)) for e in found]


def test_each_way_out() -> None:
    assert shorten(ROW, 6, "drop") == []
    assert pieces(shorten(ROW, 6, "cut_right")) == [([1, 10, 11, 12, 13, 20], "-----x")]
    assert pieces(shorten(ROW, 5, "cut_right")) == []
    assert pieces(shorten(ROW, 6, "cut_prompt_left")) == [([11, 12, 13, 20, 21, 22], "---xxx")]
    assert pieces(shorten(ROW, 6, "cut_prompt_left", bos=1)) == [([1, 12, 13, 20, 21, 22], "---xxx")]
    assert pieces(shorten(ROW, 4, "cut_prompt_left", bos=1)) == [([1, 20, 21, 22], "-xxx")]
    assert pieces(shorten(ROW, 6, "split")) == [([1, 10, 11, 12, 13, 20], "-----x"), ([20, 21, 22], "-xx")]
    assert pieces(shorten(ROW, 4, "split")) == [([12, 13, 20, 21], "--xx"), ([21, 22], "-x")]
    assert pieces(shorten(ROW, 2, "split")) == [([13, 20], "-x"), ([20, 21], "-x"), ([21, 22], "-x")]


@pytest.mark.parametrize("bos", [None, 1])
def test_a_prompt_is_not_cut_when_that_does_not_help(bos: int | None) -> None:
    assert len(shorten(ROW, 4, "cut_prompt_left", bos)) == 1
    with pytest.raises(
        ValueError, match=r"3 tokens from its first learned one on.* do not fit into 3, so cut_prompt_left"
    ):
        shorten(ROW, 3, "cut_prompt_left", bos)
    with pytest.raises(ValueError, match="pieces of 1 token"):
        shorten(ROW, 1, "split")


@settings(deadline=None)
@given(st.integers(2, 60), st.integers(2, 20), st.integers(0, 9999))
def test_split_teaches_every_learned_token_once(n: int, limit: int, seed: int) -> None:
    draw = random.Random(seed)
    e = Example(tuple(range(n)), (False, *(draw.random() < 0.5 for _ in range(n - 1))), 0)
    parts = shorten(e, limit, "split")
    taught = [i for p in parts for i, learn in zip(p.ids, p.learned, strict=True) if learn]
    assert taught == [i for i, learn in zip(e.ids, e.learned, strict=True) if learn]
    assert all(len(p.ids) <= limit and p.learned[0] is False for p in parts)
    assert all(list(p.ids) == list(range(p.ids[0], p.ids[-1] + 1)) for p in parts)


@settings(deadline=None)
@given(st.integers(2, 60), st.integers(2, 20), st.integers(1, 59))
def test_cutting_the_prompt_keeps_all_that_is_learned(n: int, limit: int, first: int) -> None:
    first = min(first, n - 1)
    e = Example(tuple(range(n)), tuple(k >= first for k in range(n)), 0)
    if n - first + 1 > limit:
        with pytest.raises(ValueError, match="cannot help"):
            shorten(e, min(limit, n - 1), "cut_prompt_left", bos=0)
    elif n > limit:
        [kept] = shorten(e, limit, "cut_prompt_left", bos=0)
        assert len(kept.ids) == limit and kept.ids[0] == 0 and kept.n_learned == n - first and not kept.learned[0]


# ---- the report ----
ROWS = [{"prompt": "a", "completion": " b" * n} for n in (1, 2, 3, 30, 40)]


def test_the_report_counts_what_was_done(small: Tokenizer) -> None:
    whole = render(ROWS, small, 512)
    long = [e for e in whole if len(e.ids) > 20]
    assert len(long) == 2
    at_stake = sum(sum(e.learned[20:]) for e in long)
    for how in OVERLONG[1:]:
        report = LengthReport(20, how)
        if how == "cut_prompt_left":
            with pytest.raises(ValueError, match="row 3: it has .* cut_prompt_left cannot help"):
                render(ROWS, small, 20, overlong=how)
            continue
        kept = render(ROWS, small, 20, overlong=how, report=report)
        assert max(len(e.ids) for e in kept) <= 20
        assert list(report.lengths) == [len(e.ids) for e in whole]
        assert (report.too_long, report.at_stake) == (2, at_stake)
        assert report.lost == sum(e.n_learned for e in whole) - sum(e.n_learned for e in kept)
        assert report.lost == {"drop": sum(e.n_learned for e in long), "cut_right": at_stake, "split": 0}[how]
        assert report.left_out == (2 if how == "drop" else 0) and report.pieces == len(kept) - 3
        assert f"2 of 5 rows are longer; {how}: {report.left_out} left out" in str(report)
        assert f"{report.lost} learned tokens lost" in str(report)
        assert report.to_json()["lost"] == report.lost and report.to_json()["rows"] == 5


def test_the_error_says_what_cutting_would_lose_and_what_to_do(small: Tokenizer) -> None:
    whole = render(ROWS, small, 512)
    n, learned = len(whole[3].ids), sum(e.n_learned for e in whole)
    stake = sum(sum(e.learned[20:]) for e in whole)
    message = (
        rf"row 3 has {n} tokens and the limit is 20; .*; 2 of 5 rows are too long, and {stake} of {learned} learned"
    )
    with pytest.raises(ValueError, match=message + r".* set overlong to drop, cut_prompt_left, cut_right or split"):
        render(ROWS, small, 20)
    with pytest.raises(ValueError, match="overlong='cut': one of error, drop"):
        render(ROWS, small, 20, overlong="cut")


def test_no_row_left_is_an_error(small: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"none of 2 rows is left: all are longer than 20 tokens \(drop\)"):
        render(ROWS[3:], small, 20, overlong="drop")


def test_quantiles_are_lengths_of_rows() -> None:
    assert str(LengthReport(100, "error")) == "no row came to be counted in tokens; limit 100"
    report = LengthReport(100, "error")
    for n in (5, 1, 9, 7, 3):
        report.add("row", Example((1,) * n, (True,) * n, 0))
    assert report.quantiles() == {"0 %": 1, "50 %": 5, "90 %": 9, "99 %": 9, "100 %": 9}
    assert str(report).splitlines()[0] == "tokens a row: 0 % 1, 50 % 5, 90 % 9, 99 % 9, 100 % 9"
