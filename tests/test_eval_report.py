"""The report page: whole in itself, safe with any text, and with its two charts."""

import re
from pathlib import Path

from lora.eval.compare import compare
from lora.eval.evaluate import Report, Result
from lora.eval.report import write_report

EVIL = "<script>alert('x')</script> & <b>\"bold\"</b>"


def report(shift: float) -> Report:
    rows = tuple(
        Result(f"{EVIL} {i}", f"{10 * i + 10}", f"{EVIL}{i}", 1.0 + shift, 3, 10.0 * i + shift, 10.0 * i + 10)
        for i in range(20)
    )
    return Report({"mae": 10 + shift, "nll": (1 + shift) / 3}, rows, 0, 1.0)


HISTORY = [{"step": k, "loss": 3.0 / k} for k in range(1, 30)] + [{"step": 29, "eval_loss": 1.5}, {"train_loss": 1.0}]


def page(path: Path) -> str:
    a, b = report(0.0), report(0.5)
    write_report(
        path, EVIL, HISTORY, summary=(("metric", EVIL), [("mae", EVIL)]),
        comparison=compare(a, b, resamples=100), reports=(a, b), settings={EVIL: EVIL},
    )  # fmt: skip
    return path.read_text()


def test_the_page_needs_no_network_and_no_script(tmp_path: Path) -> None:
    text = page(tmp_path / "report.html").lower()
    assert not re.search(r"https?://|<script|<link|<img|@import|url\(", text)


def test_the_page_escapes_every_text(tmp_path: Path) -> None:
    text = page(tmp_path / "report.html")
    assert "<b>" not in text and "&lt;script&gt;" in text


def test_the_page_holds_two_charts(tmp_path: Path) -> None:
    text = page(tmp_path / "report.html")
    assert text.count("<svg") == text.count("</svg>") == 2
    assert text.count("<circle") >= 40
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_run_of_one_step_has_a_page(tmp_path: Path) -> None:
    write_report(tmp_path / "a.html", "one", [{"step": 1, "loss": 2.0}])
    assert (tmp_path / "a.html").read_text().count("<svg") == 1


def test_truths_of_zero_have_a_page(tmp_path: Path) -> None:
    rows = tuple(Result("q", "0", "3", None, None, 3.0, 0.0) for _ in range(3))
    zero = Report({"mae": 3.0}, rows, 0, 0.0)
    write_report(tmp_path / "a.html", "zero", [], reports=(zero, zero))
    assert "<svg" in (tmp_path / "a.html").read_text()
