"""Answers that are numbers: how they are read out of text, and how far off they are.

    guess  the first number after $ and , are removed; an answer without one counts as 0 and is reported apart
    MAE    mean |guess - truth|
    RMSLE  sqrt(mean (ln(guess + 1) - ln(truth + 1))²), negative guesses taken as 0
    hits   share with |guess - truth| < 40, or < 0.2 truth

Source: the tester of ed-donner/llm_engineering, whose definitions these are; there an unreadable answer is 0 in
silence, and a minus sign counts only before a decimal point.
"""

import math
import re

_NUMBER = re.compile(r"[-+]?(?:\d*\.\d+|\d+)")


def read_number(text: str) -> float | None:
    """The first number in `text`, or None."""
    found = _NUMBER.search(text.replace("$", "").replace(",", ""))
    return float(found.group()) if found else None


def absolute_error(guess: float, truth: float) -> float:
    return abs(guess - truth)


def squared_log_error(guess: float, truth: float) -> float:
    return (math.log1p(max(guess, 0.0)) - math.log1p(max(truth, 0.0))) ** 2


def is_hit(guess: float, truth: float) -> bool:
    """Within $40, or within 20 % of the truth."""
    error = abs(guess - truth)
    return error < 40 or error < 0.2 * abs(truth)
