"""LoRAExperts: low-rank updates of a module's own parameters, such as the stacked weights of a mixture's experts.

    W[e] + s B[e] A[e]      for each expert e of a weight (E, out, in), as most mixtures store it
    W[e] + s (B[e] A[e])ᵀ   of a weight (E, in, out), where the module says is_transposed (gpt-oss)

A (E r, in) expert after expert; B (out, r E), the experts of each rank beside each other: peft's layout of
target_parameters since 0.19.  Files of older versions have in and out changed over (format.py).  The module runs as it
is, with the sums in its parameters' places for the length of the call, so no file of a mixture is needed here.
Source: peft 0.21, tuners/lora/layer.py, ParamWrapper.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lora.adapter import Adapter
from lora.config import LoRAConfig
from lora.layer import Adapted


class ExpertAdapter(Adapter):
    """An update of a parameter of 2 (one expert) or 3 dimensions."""

    def __init__(self, r: int, weight: Tensor, transposed: bool, scale: float) -> None:
        E, n_out, n_in = expert_shape(weight, transposed)
        super().__init__(r * E, n_in, n_out, scale, 0.0, weight.device)
        self.stacked, self.transposed, self.shape = E, transposed, tuple(weight.shape)

    def stacks(self) -> tuple[Tensor, Tensor]:
        """B (E, out, r) and A (E, r, in)."""
        E = self.stacked
        a = self.a.view(E, -1, self.a.shape[1])
        return self.b.view(self.b.shape[0], -1, E).permute(2, 0, 1), a

    def added_to(self, weight: Tensor) -> Tensor:
        """The weight with this update, in the weight's shape and dtype."""
        left, right = (t.to(weight.dtype) for t in self.stacks())
        if self.transposed:
            left, right = right.transpose(1, 2), left.transpose(1, 2)
        w = weight if weight.dim() == 3 else weight[None]
        return torch.baddbmm(w, left, right, alpha=self.scale).view(weight.shape)


class LoRAExperts(Adapted):
    """A module with updates of some of its parameters; an adapter here is {parameter: ExpertAdapter}."""

    def add(self, name: str, config: LoRAConfig, places: dict[str, tuple[int, float]], *, fresh: bool = True) -> None:
        """`places`: rank and scale for each parameter."""
        made = {}
        for parameter, (r, scale) in places.items():
            weight = self.base.get_parameter(parameter)
            made[parameter] = ExpertAdapter(r, weight, is_transposed(self.base, weight), scale)
            if fresh:
                made[parameter].begin("kaiming", self.base)
            made[parameter].a.requires_grad_(config.train_a)
        self.adapters[name] = nn.ModuleDict(made)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.merged is not None and not self.off:
            return self.merged(*args, **kwargs)
        on = self.on()
        if not on:
            return self.base(*args, **kwargs)
        return torch.func.functional_call(self.base, self.sums(on), args, kwargs)

    def sums(self, on: list[Any]) -> dict[str, Tensor]:
        """Each adapted parameter with the updates of these adapters."""
        sums: dict[str, Tensor] = {}
        for updates in on:
            for parameter, update in updates.items():
                sums[parameter] = update.added_to(sums.get(parameter, self.base.get_parameter(parameter)))
        return sums

    def weights(self) -> dict[str, Tensor]:
        """The adapted parameters with the active adapters' updates, summed in float32 and rounded once."""
        dtypes = {p: self.base.get_parameter(p).dtype for updates in self.chosen() for p in updates}
        wide = {p: self.base.get_parameter(p).detach().float() for p in dtypes}
        for updates in self.chosen():
            for p, update in updates.items():
                wide[p] = update.added_to(wide[p]).detach()
        return {p: w.to(dtypes[p]) for p, w in wide.items()}


def is_transposed(module: nn.Module, weight: Tensor) -> bool:
    """Whether experts lie (E, in, out); as peft, by the module's word."""
    return weight.dim() == 3 and bool(getattr(module, "is_transposed", False))


def expert_shape(weight: Tensor, transposed: bool) -> tuple[int, int, int]:
    """(experts, out, in) of a parameter."""
    if weight.dim() == 2:
        return 1, weight.shape[0], weight.shape[1]
    E, one, two = weight.shape
    return (E, two, one) if transposed else (E, one, two)
