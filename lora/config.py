"""LoRAConfig: what to wrap, and how."""

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

BIASES = ("none", "lora_only", "all")  # peft's words


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
        bias: "none", "lora_only" (learn the biases of the adapted layers too) or "all" (every bias of the model)
        lora_bias: learn a bias of B, where the base has none to learn
        init: how the factors start (init.py): "kaiming", "pissa", or "pissa_niter_N" for a quick SVD of N iterations
        parts: {name or glob of a fused projection: parts of its rows to adapt, each by factors of its own}, such as
            {"c_attn": ("q", "v")} (parts.py)
        train_a: False leaves A as it began and trains B alone (LoRA-FA, arXiv:2308.03303): half the states, and a
            layer need not keep its input for the backward
        rank_pattern: {name or glob: rank}, overriding r
        alpha_pattern: {name or glob: alpha}, overriding alpha
        parameters: names, last parts or globs of parameters of 2 or 3 dimensions to adapt: a mixture's stacked experts
        train_modules: names or globs of whole modules to train beside the adapter (a fresh head, say)
        train_tokens: ids of tokens whose rows of the embedding (and of a head tied to it) to train; or {module: ids}
    """

    r: int = 16
    alpha: float = 32.0
    targets: str | tuple[str, ...] = "all-linear"
    exclude: tuple[str, ...] = ()
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    bias: str = "none"
    lora_bias: bool = False
    init: str = "kaiming"
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    train_a: bool = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    train_modules: tuple[str, ...] = ()
    train_tokens: tuple[int, ...] | dict[str, tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        for key in ("targets", "exclude", "parameters", "train_modules"):
            names = getattr(self, key)
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
        for key in ("rank_pattern", "alpha_pattern", "parts"):
            object.__setattr__(self, key, dict(getattr(self, key) or {}))
        object.__setattr__(self, "parts", {k: (v,) if isinstance(v, str) else tuple(v) for k, v in self.parts.items()})
        tokens = self.train_tokens
        listed = {k: _ids(v) for k, v in tokens.items()} if isinstance(tokens, dict) else _ids(tokens or ())
        object.__setattr__(self, "train_tokens", listed)
        self._check_kinds()
        if not (self.targets or self.train_modules or self.parameters or self.train_tokens):
            raise ValueError('targets is empty, so nothing would be adapted; say "all-linear" or name some layers')

    def _check_kinds(self) -> None:
        """Refuses words we do not know, and kinds that have no meaning together."""
        if self.bias not in BIASES:
            raise ValueError(f"bias={self.bias!r}: choose one of {', '.join(BIASES)}")
        if not re.fullmatch(r"kaiming|pissa|pissa_niter_[1-9]\d*", self.init):
            raise ValueError(f"init={self.init!r}: 'kaiming', 'pissa' or 'pissa_niter_N' with N iterations")
        if self.lora_bias and self.bias != "none":
            raise ValueError(f"bias={self.bias!r} and lora_bias were asked for; they add up to one bias: choose one")
        special = {"dora": self.dora, f"init={self.init!r}": self.init != "kaiming", "parts": bool(self.parts)}
        asked = [key for key, wanted in special.items() if wanted]
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)} were asked for; an update is one of these kinds")
        if self.parameters:
            asked += [key for key in ("dropout", "lora_bias") if getattr(self, key)]
            if asked and asked != ["parts"]:
                raise ValueError(
                    f"{asked[0]} is for linear layers, and parameters={list(self.parameters)} are adapted inside a "
                    "module; put those into an adapter of their own"
                )

    def scale(self, r: int, alpha: float) -> float:
        """What the product B A is multiplied by."""
        return alpha / (math.sqrt(r) if self.rslora else r)

    def replace(self, **changes: Any) -> "LoRAConfig":
        return dataclasses.replace(self, **changes)


def _ids(tokens: Iterable[int]) -> tuple[int, ...]:
    """Token ids, sorted. Raises ValueError where they are not, or one comes twice."""
    ids = tuple(tokens)
    wrong = [t for t in ids if isinstance(t, bool) or not isinstance(t, int) or t < 0]
    if wrong or len(set(ids)) < len(ids):
        raise ValueError(f"train_tokens={list(ids)}: token ids are whole numbers from 0 on, each once")
    return tuple(sorted(ids))
