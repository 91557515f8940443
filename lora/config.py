"""LoRAConfig: what to wrap, and how."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """An adapter: y = base(x) + scale * dropout(x) Aᵀ Bᵀ, A (r, in), B (out, r), scale = alpha / r.

    Source: LoRA, arXiv:2106.09685; `rslora`: arXiv:2312.03732, scale = alpha / sqrt(r).

    Attributes:
        r: rank of the update: rows of A, columns of B
        alpha: the update is scaled by alpha / r
        targets: "all-linear" (every linear layer but the output head), or names, last parts of names or globs
        exclude: names, last parts of names or globs to leave out
        dropout: probability of dropping an element of the adapter's input, in training only
        rslora: scale by alpha / sqrt(r) instead of alpha / r
        dora: learn the length of each row of the weight on its own (dora.py)
        train_a: False leaves A as it began and trains B alone (LoRA-FA, arXiv:2308.03303): half the states, and a
            layer need not keep its input for the backward
        rank_pattern: {name or glob: rank}, overriding r
        alpha_pattern: {name or glob: alpha}, overriding alpha
        train_modules: names or globs of whole modules to train beside the adapter (a fresh head, say)
    """

    r: int = 16
    alpha: float = 32.0
    targets: str | tuple[str, ...] = "all-linear"
    exclude: tuple[str, ...] = ()
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    train_a: bool = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    train_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key, names in (("targets", self.targets), ("exclude", self.exclude), ("train_modules", self.train_modules)):
            if isinstance(names, str) and not (key == "targets" and names == "all-linear"):
                object.__setattr__(self, key, (names,))
            elif not isinstance(names, str):
                object.__setattr__(self, key, tuple(names))
        for where, r in [("r", self.r), *self.rank_pattern.items()]:
            if isinstance(r, bool) or not isinstance(r, int) or r < 1:
                raise ValueError(f"{where}={r!r}: a rank is a whole number, at least 1")
        for where, alpha in [("alpha", self.alpha), *self.alpha_pattern.items()]:
            if not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha <= 0:
                raise ValueError(f"{where}={alpha!r}: alpha is a finite number above 0")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout!r}: a probability from 0 up to, not including, 1")
        if not self.targets and not self.train_modules:
            raise ValueError('targets is empty, so nothing would be adapted; say "all-linear" or name some layers')

    def scale(self, r: int, alpha: float) -> float:
        """What the product B A is multiplied by."""
        return alpha / (math.sqrt(r) if self.rslora else r)

    def replace(self, **changes: Any) -> "LoRAConfig":
        return dataclasses.replace(self, **changes)
