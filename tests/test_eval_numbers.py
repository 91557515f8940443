"""Numbers out of answers, and how far off they are, against values worked by hand."""

import math

import pytest

from lora.eval.numbers import absolute_error, is_hit, read_number, squared_log_error


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("$1,299.50", 1299.5),
        ("1400", 1400.0),
        (" about $87, perhaps $90", 87.0),
        ("-5 degrees", -5.0),
        ("-$5", -5.0),
        ("+3.5", 3.5),
        (".75", 0.75),
        ("12.", 12.0),
        ("1,000,000", 1e6),
        ("Price is $12.99.", 12.99),
        ("no idea", None),
        ("", None),
        ("$,.", None),
        ("nan inf", None),
    ],
)
def test_the_first_number_is_read(text: str, number: float | None) -> None:
    assert read_number(text) == number


def test_errors_are_those_worked_by_hand() -> None:
    assert absolute_error(90.0, 100.0) == 10.0
    assert squared_log_error(math.e - 1, 0.0) == pytest.approx(1.0)
    assert squared_log_error(99.0, 9.0) == pytest.approx(math.log(10) ** 2)
    assert squared_log_error(-7.0, 0.0) == 0.0


@pytest.mark.parametrize(
    ("guess", "truth", "hit"),
    [(139, 100, True), (140, 100, False), (1199, 1000, True), (1200, 1000, False), (0, 39, True), (5, 0, True)],
)
def test_a_hit_is_within_40_or_a_fifth(guess: float, truth: float, hit: bool) -> None:
    assert is_hit(guess, truth) is hit
