"""A catalogue of made-up products whose best possible price is known.

    ln price = category + tier + what the specification says + condition + noise,   noise ~ Normal(0, 0.10²)

A shop knows a product by a line of words; the price follows from the words but for the noise, so no predictor can
beat exp(the sum without the noise) by more than luck.  Every number here is invented; the seed decides the rows.
"""

import math
import random
from dataclasses import dataclass

NOISE = 0.10  # of ln price: 10 % up or down is common, 20 % seldom

# category: (price of a plain, new, mid-range one, {word: factor})
CATEGORIES: dict[str, tuple[float, dict[str, float]]] = {
    "laptop": (800, {"8 GB": 0.75, "16 GB": 1.0, "32 GB": 1.4}),
    "phone": (450, {"64 GB": 0.75, "128 GB": 1.0, "512 GB": 1.45}),
    "television": (600, {"32 inch": 0.5, "55 inch": 1.0, "75 inch": 1.9}),
    "headphones": (120, {"wired": 0.6, "wireless": 1.0, "noise cancelling": 1.7}),
    "office chair": (180, {"fabric": 0.8, "mesh": 1.0, "leather": 1.6}),
    "desk lamp": (40, {"plastic": 0.7, "steel": 1.0, "brass": 1.7}),
    "bicycle": (550, {"city": 0.8, "gravel": 1.2, "carbon": 2.4}),
    "kettle": (45, {"1 litre": 0.8, "glass": 1.0, "variable heat": 1.6}),
    "watch": (220, {"quartz": 0.7, "solar": 1.0, "automatic": 1.9}),
    "backpack": (70, {"nylon": 0.8, "canvas": 1.0, "waterproof": 1.5}),
}
TIERS = {"budget": 0.6, "standard": 1.0, "premium": 1.7}
CONDITIONS = {"new": 1.0, "open box": 0.85, "used": 0.6, "for parts": 0.3}


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
        price = max(1, round(best * math.exp(draw.gauss(0.0, NOISE))))
        products.append(Product(f"{category}, {tier}, {spec}, {condition}", price, best))
    return products
