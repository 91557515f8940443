"""The demo's catalogue: the same for the same seed, learnable, and with digits where the prompt ends."""

import math
from pathlib import Path
from statistics import median

import pytest

from lora.train.catalogue import NOISE, catalogue, two_digits
from lora.train.demo import free_name


def test_the_catalogue_follows_its_seed() -> None:
    assert catalogue(50, 3) == catalogue(50, 3) != catalogue(50, 4)
    assert catalogue(80, 3)[:50] == catalogue(50, 3)


def test_the_best_possible_guess_beats_a_constant() -> None:
    products = catalogue(1000, 0)
    constant = median(p.price for p in products)
    best = sum(abs(p.best - p.price) for p in products)
    assert best < 0.25 * sum(abs(constant - p.price) for p in products)
    spread = math.sqrt(sum(math.log(p.price / p.best) ** 2 for p in products) / 1000)
    assert spread == pytest.approx(NOISE, rel=0.15)


def test_a_row_ends_its_prompt_where_the_digits_begin() -> None:
    for p in catalogue(200, 1):
        assert p.row["prompt"] == f"{p.text}\nPrice: $"
        assert p.row["completion"] == str(p.price) and p.row["completion"].isdigit()


@pytest.mark.parametrize(
    ("price", "shown"), [(87.3, 87), (234.0, 230), (1449.0, 1400), (9.6, 10), (0.2, 1), (995, 1000)]
)
def test_prices_have_two_digits(price: float, shown: int) -> None:
    assert two_digits(price) == shown


def test_a_taken_name_gets_a_number(tmp_path: Path) -> None:
    assert free_name(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    assert free_name(tmp_path / "demo") == tmp_path / "demo-2"
    (tmp_path / "demo-2").write_text("")
    assert free_name(tmp_path / "demo") == tmp_path / "demo-3"
