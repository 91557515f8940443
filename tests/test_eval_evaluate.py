"""evaluate: metrics against values worked by hand, mistakes refused before anything runs."""

import json
import math
from pathlib import Path

import pytest
import transformers

import lora
from lora.eval.evaluate import Result, aggregate, statistic
from lora.models.llama import Llama
from lora.models.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def small(stories: Path) -> tuple[Llama, Tokenizer]:
    return lora.load(stories, device="cpu")


def test_metrics_equal_those_worked_by_hand() -> None:
    rows = [
        Result("a", " 100 ", "100", 2.0, 2, 100.0, 100.0),
        Result("b", "200", "260", 4.0, 6, 260.0, 200.0),
        Result("c", "9", "none", 6.0, 4, None, 9.0),
    ]
    got = {m: aggregate(m, [statistic(m, r) for r in rows]) for m in lora.eval.evaluate.METRICS}
    assert got["nll"] == 1.0 and got["perplexity"] == pytest.approx(math.e)
    assert got["exact_match"] == pytest.approx(1 / 3)
    assert got["mae"] == pytest.approx((0 + 60 + 9) / 3)
    assert got["rmsle"] == pytest.approx(math.sqrt((math.log(261 / 201) ** 2 + math.log(10) ** 2) / 3))
    assert got["hits"] == pytest.approx(2 / 3)  # 9 against 0 is within 40


def test_answers_and_unread_numbers_are_reported(small: tuple[Llama, Tokenizer], tmp_path: Path) -> None:
    model, tokenizer = small
    rows = [{"prompt": "Once upon a", "completion": " time 3"}, {"prompt": "Lily had", "completion": " $1,200"}]
    report = lora.evaluate(model, tokenizer, rows, ["mae", "exact_match", "nll"], max_new_tokens=4)
    assert [r.truth for r in report.rows] == [3.0, 1200.0]
    assert [r.answer for r in report.rows] == lora.generate(model, tokenizer, [r["prompt"] for r in rows], 4)
    assert report.unread == sum(r.guess is None for r in report.rows)
    report.save(tmp_path / "a.json")
    saved = json.loads((tmp_path / "a.json").read_text())
    assert saved["metrics"] == report.metrics and len(saved["rows"]) == 2
    assert str(report).startswith("2 rows")


def test_a_right_answer_is_an_exact_match(small: tuple[Llama, Tokenizer]) -> None:
    model, tokenizer = small
    said = lora.generate(model, tokenizer, "Once upon a time", 5)
    rows = [{"prompt": "Once upon a time", "completion": c} for c in (f" {said} ", said + "x")]
    assert lora.evaluate(model, tokenizer, rows, ["exact_match"], max_new_tokens=5).metrics == {"exact_match": 0.5}


def test_likelihood_of_a_transformers_model_is_measured(small: tuple[Llama, Tokenizer], stories: Path) -> None:
    rows = [{"prompt": "Once", "completion": " upon a time"}, {"prompt": "A", "completion": " cat"}]
    theirs = transformers.LlamaForCausalLM.from_pretrained(stories)
    a = lora.evaluate(small[0], small[1], rows, ["perplexity"]).metrics["perplexity"]
    b = lora.evaluate(theirs, small[1], rows, ["perplexity"]).metrics["perplexity"]
    assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.parametrize("metrics", [["bleu"], ["nll", "bleu"], []])
def test_an_unknown_metric_is_refused(metrics: list[str], small: tuple[Llama, Tokenizer]) -> None:
    with pytest.raises(ValueError, match="choose from nll, perplexity"):
        lora.evaluate(*small, [{"prompt": "a", "completion": "b"}], metrics)


def test_a_number_asked_of_words_is_refused(small: tuple[Llama, Tokenizer]) -> None:
    rows = [{"prompt": "a", "completion": "3"}, {"prompt": "a", "completion": "three"}]
    with pytest.raises(ValueError, match=r"row 1: 'mae' needs a number.*'three'"):
        lora.evaluate(*small, rows, ["mae"])
