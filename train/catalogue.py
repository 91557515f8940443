"""A catalogue of made-up products whose best possible price is known.

    ln price = condition + tier + category + specification + noise,   noise ~ Normal(0, 0.10²)

The price follows from the words but for the noise and a rounding to two digits, so no predictor can beat exp(the
sum without the noise) by more than luck.  Every number here is invented; the seed decides the rows.
"""

import math
import random
from dataclasses import dataclass

NOISE = 0.10  # of ln price: 10 % up or down is common, 20 % seldom

# category: (price of a standard new one, {word: factor})
CATEGORIES: dict[str, tuple[float, dict[str, float]]] = {
    "laptop": (440, {"16 GB": 1.0, "32 GB": 1.25}),
    "phone": (380, {"128 GB": 1.0, "512 GB": 1.25}),
    "television": (420, {"55 inch": 1.0, "75 inch": 1.25}),
    "headphones": (330, {"wired": 0.85, "wireless": 1.1}),
    "office chair": (300, {"mesh": 1.0, "leather": 1.25}),
    "bicycle": (400, {"steel": 0.9, "carbon": 1.25}),
}
TIERS = {"budget": 0.7, "standard": 1.0, "premium": 1.5}
CONDITIONS = {"new": 1.0, "used": 0.6}


@dataclass(frozen=True)
class Product:
    """One line of the catalogue; `best` is the price without the noise."""

    text: str
    price: int
    best: float

    @property
    def row(self) -> dict[str, str]:
        """As a training row. The prompt ends where the digits begin."""
        return {"prompt": ask(self.text), "completion": str(self.price)}


def ask(text: str) -> str:
    """The question that the model learns to answer."""
    return f"{text}\nPrice: $"


def catalogue(n: int, seed: int) -> list[Product]:
    """n products drawn with `seed`, the same on every machine."""
    draw = random.Random(seed)
    products = []
    for _ in range(n):
        category = draw.choice(list(CATEGORIES))
        base, words = CATEGORIES[category]
        tier, spec, condition = draw.choice(list(TIERS)), draw.choice(list(words)), draw.choice(list(CONDITIONS))
        best = base * TIERS[tier] * words[spec] * CONDITIONS[condition]
        price = best * math.exp(draw.gauss(0.0, NOISE))
        products.append(Product(f"{condition} {tier} {category}, {spec}", two_digits(price), best))
    return products


def two_digits(price: float) -> int:
    """A price as shops write it: 87, 230, 1400."""
    unit = 10 ** max(0, math.floor(math.log10(price)) - 1)
    return max(1, round(price / unit) * unit)
