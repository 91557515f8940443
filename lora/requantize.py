"""merge_4bit: fold an adapter into its 4-bit base and stay in 4 bits, and say how much of it survived.

Rounding W + ΔW to nearest undoes a small update: each weight snaps back to its code.  So the merge measures, layer by
layer, and refuses to hand over a model that has forgotten what it learned:

    survival   <W' - W, ΔW> / <ΔW, ΔW>        W the base as trained on, W' the merged one; 1: all of it, 0: none
    noise      |W' - W - ΔW| / |ΔW|           what was added besides, over all weights
    KL         of the next-token distribution, adapter on top against merged, in nats a token, on given prompts

Ways to round: lora/quant/rounding.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora.layer import LoRALinear, adapted
from lora.merge import merge, unmerge
from lora.quant.linear import Linear4bit
from lora.quant.rounding import ROUNDINGS, round_tensor
from lora.wrap import is_merged

LEAST = 0.5  # of the update that must survive, unless told otherwise


@dataclass(frozen=True)
class Survival:
    """What became of an update in a 4-bit merge: per layer (survival, noise), over all layers, and the KL."""

    rounding: str
    layers: dict[str, tuple[float, float]]
    survival: float
    noise: float
    kl: float | None

    def __str__(self) -> str:
        worst = min(self.layers, key=lambda name: self.layers[name][0])
        kl = "" if self.kl is None else f", KL {self.kl:.4f} nats a token"
        return (
            f"{self.rounding} rounding: {self.survival:.1%} of the update survives (least {self.layers[worst][0]:.1%} "
            f"in {worst}), noise {self.noise:.2f} x the update{kl}"
        )


def merge_4bit(
    model: nn.Module,
    rounding: str = "stochastic",
    *,
    seed: int = 0,
    at_least: float = LEAST,
    prompts: Sequence[Tensor] = (),
) -> Survival:
    """Folds the active adapters into the 4-bit layers, in place, which stay in 4 bits; returns what survived.

    Layers that are not in 4 bits are merged as they are.  Like `lora.merge`, `lora.unmerge` undoes it.

    Args:
        rounding: "stochastic", "nearest" or "search" (quant/rounding.py); `seed` is of the draws
        at_least: the survival below which the merge is refused and undone; 0 never refuses
        prompts: token ids (1, T) each, on which the KL is measured; none, and it is not

    Raises ValueError where less survives than `at_least` (the message holds the figures), or no layer is in 4
    bits; RuntimeError where there is nothing to merge.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding={rounding!r}: choose one of {', '.join(ROUNDINGS)}")
    packed = {n: m for n, m in adapted(model) if isinstance(m, LoRALinear) and isinstance(m.base, Linear4bit)}
    if not packed:
        raise ValueError("no adapted layer is in 4 bits; use lora.merge, which writes dense weights")
    if is_merged(model):
        raise RuntimeError("this model is merged already; call lora.unmerge(model) first")
    want = [_log_p(model, ids) for ids in prompts]
    merge(model)  # checks, and merges what is dense; the 4-bit layers' dense forms are replaced below
    figures, total = {}, torch.zeros(3, dtype=torch.float64)
    draw: dict[torch.device, torch.Generator] = {}
    try:
        for name, layer in packed.items():
            if layer.merged is None:
                continue
            device = layer.base.weight.device
            generator = draw.setdefault(device, torch.Generator(device).manual_seed(seed))
            layer.merged, sums = _requantized(layer, rounding, generator)
            total += sums
            kept, delta2, noise2 = sums.tolist()
            figures[name] = (kept / delta2, (noise2 / delta2) ** 0.5) if delta2 else (1.0, 0.0)
        kept, delta2, noise2 = total.tolist()
        kl = None
        if prompts:
            kl = sum(_kl(p, _log_p(model, ids)) for p, ids in zip(want, prompts, strict=True)) / len(prompts)
        survival, noise = (kept / delta2, (noise2 / delta2) ** 0.5) if delta2 else (1.0, 0.0)
        result = Survival(rounding, figures, survival, noise, kl)
        if result.survival < at_least:
            raise ValueError(
                f"this merge would lose what was learned: {result}; at least {at_least:.0%} was asked for: round "
                "stochastically, merge into dense weights, keep the adapter on top, or allow it with at_least=0"
            )
    except BaseException:
        unmerge(model)
        raise
    return result


@torch.no_grad()
def _requantized(layer: LoRALinear, rounding: str, generator: torch.Generator) -> tuple[Linear4bit, Tensor]:
    """The merged 4-bit layer; and <W' - W, ΔW>, <ΔW, ΔW>, |W' - W - ΔW|² as float64 (3,)."""
    base: Linear4bit = layer.base
    before, delta = base.weight_as(torch.float32), layer.delta()
    packed = round_tensor(before + delta, base.kind, base.block, base.nested, rounding, generator)
    moved = packed.dequantize(torch.float32) - before
    sums = [(moved * delta).sum(dtype=torch.float64), (delta * delta).sum(dtype=torch.float64)]
    sums.append(((moved - delta) ** 2).sum(dtype=torch.float64))
    return Linear4bit(packed, layer.merged.bias).eval(), torch.stack(sums).cpu()


@torch.no_grad()
def _log_p(model: nn.Module, ids: Tensor) -> Tensor:
    """Log-probabilities (T, V) float32 of what follows each token of ids (1, T)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    out = model(ids)
    for module, mode in modes:  # not model.train(): merged layers refuse it
        module.training = mode
    return getattr(out, "logits", out)[0].float().log_softmax(dim=-1)


def _kl(p: Tensor, q: Tensor) -> float:
    return float((p.exp() * (p - q)).sum(dim=-1).mean())
