"""The adapted layers: a base that is never touched, and beside it one low-rank update a name.

    LoRALinear     y = base(x) + Σ over active names of s (x Aᵀ) Bᵀ        A (r, in)     B (out, r)
    LoRAEmbedding  y = base(i) + Σ s A[:, i]ᵀ Bᵀ                            A (r, vocab)  B (dim, r)
    TrainedModule  y = the active copy of a whole module, or the module itself

The base is any module that maps x to y: nn.Linear, Linear4bit, GPT-2's Conv1D, bitsandbytes' layers.
It is held and called, never changed, so switching adapters off, or a merge out again, gives back the
same bits.  The factors are float32 and enter the product in the dtype of x.
Source: LoRA, arXiv:2106.09685, section 4.1.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora.dora import contribution, squared_lengths, weight_change
from lora.init import init_embedding, init_linear
from lora.kernels.linear4 import Low, linears4
from lora.kernels.lowrank import add_low_rank
from lora.quant.linear import Linear4bit, is_conv1d


class Adapter(nn.Module):
    """The two factors of one update, its scale and its dropout; for DoRA, the lengths of the rows beside."""

    parts = 1  # adapters in it: see ByRow
    magnitude: nn.Parameter | None  # (out,) float32, DoRA only
    length2: Tensor  # |W|² of the base's rows, DoRA only

    def __init__(self, r: int, n_in: int, n_out: int, scale: float, dropout: float, device: torch.device) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(r, n_in, dtype=torch.float32, device=device))
        self.b = nn.Parameter(torch.empty(n_out, r, dtype=torch.float32, device=device))
        self.scale, self.dropout = scale, dropout
        self.register_parameter("magnitude", None)

    def decompose(self, base: nn.Module) -> None:
        """Makes this a DoRA adapter of `base`."""
        self.register_buffer("length2", squared_lengths(base), persistent=False)
        self.magnitude = nn.Parameter(self.length2.clamp(min=1e-30).sqrt())

    @property
    def r(self) -> int:
        return self.a.shape[0]

    def low(self) -> Low:
        """What a base that adds the update in its own pass needs of it."""
        return self.a, self.b, self.scale

    def delta(self) -> Tensor:
        """s B A, (out, in) float32."""
        return (self.b.detach().float() @ self.a.detach().float()).mul_(self.scale)

    def extra_repr(self) -> str:
        return f"r={self.r}, scale={self.scale:g}, dropout={self.dropout:g}"


class ByRow:
    """Adapters side by side: each sees its own rows of the batch, so that several train in one pass over the base.

    `members` are (adapter, first row, row behind the last), in order and without a gap.  Where all have as many rows,
    `stack` may give their factors once more as a (k, r, in), b (k, out, r) and scales (k,) of the same memory, which
    the fused blocks take (kernels/fold.py).
    """

    magnitude, dropout = None, 0.0

    def __init__(self, members: Sequence[tuple[Adapter, int, int]], stack: tuple[Any, Any, Any] | None = None) -> None:
        self.members = tuple(members)
        self.parts, self.stack = len(self.members), stack

    def low(self) -> tuple[Any, Any, Any] | None:
        return self.stack if self.parts > 1 else self.members[0][0].low()

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """y (B, ..., out) with each row's own update on x (B, ..., in) added."""
        if x.shape[0] != self.members[-1][2]:
            raise RuntimeError(
                f"adapters by row want {self.members[-1][2]} rows first in a layer's input, not {x.shape[0]}"
            )
        return torch.cat([add_all(y[i:j], x[i:j], [adapter], False) for adapter, i, j in self.members])


class Adapted(nn.Module):
    """What the three layers share: a base, named adapters, which of them are active, an off switch."""

    base: Any  # a module that maps x to y
    adapters: Any  # nn.ModuleDict of name -> Adapter, or -> a whole module
    merged: Any  # the plain module that base and active adapters make, while merged

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.off = False
        self.merged = None
        self.by_row: ByRow | None = None  # while several adapters train side by side

    def on(self) -> list[Any]:
        """The adapters that take part in a forward now."""
        if self.by_row is not None and not self.off:
            return [self.by_row]
        return [] if self.off else [self.adapters[name] for name in self.active if name in self.adapters]

    def train(self, mode: bool = True) -> "Adapted":
        if mode and self.merged is not None:
            raise RuntimeError("this model is merged, so its adapters would not train; call lora.unmerge(model) first")
        super().train(mode)
        return self

    def __getattr__(self, name: str) -> Any:
        # Callers that look at a layer (in_features, weight.dtype, nf) see the base's
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


class LoRALinear(Adapted):
    """A linear layer of any make with low-rank updates beside it."""

    def add(self, name: str, r: int, scale: float, dropout: float, dora: bool = False) -> None:
        n_out, n_in = linear_shape(self.base)
        adapter = Adapter(r, n_in, n_out, scale, dropout, layer_device(self.base))
        init_linear(adapter.a, adapter.b)
        if dora:
            adapter.decompose(self.base)
        self.adapters[name] = adapter

    def forward(self, x: Tensor) -> Tensor:
        if self.merged is not None and not self.off:
            return self.merged(x)
        decomposed = [adapter for adapter in self.on() if adapter.magnitude is not None]
        if decomposed:
            y0 = y = self.base(x)
            for adapter in decomposed:
                y = y + contribution(adapter, self.base, x, y0, self.training)
            return add_all(y, x, [a for a in self.on() if a.magnitude is None], self.training)
        if isinstance(self.base, Linear4bit):
            low, rest = self.split()
            return add_all(self.base(x, low), x, rest, self.training)
        return add_all(self.base(x), x, self.on(), self.training)

    def split(self) -> tuple[Low | None, list[Any]]:
        """The adapter that a 4-bit base adds in its own pass, and those to be added behind it."""
        on = self.on()
        if not on or isinstance(on[0], ByRow) or (self.training and on[0].dropout):
            return None, on
        return on[0].low(), on[1:]

    def delta(self) -> Tensor:
        """What the active adapters add to the weight, in the base's own layout, float32."""
        on = [self.adapters[name] for name in self.active if name in self.adapters]
        delta: Any = sum(a.delta() if a.magnitude is None else weight_change(a, self.base) for a in on)
        return delta.T if is_conv1d(self.base) else delta


def add_all(y: Tensor, x: Tensor, adapters: Sequence[Any], training: bool) -> Tensor:
    """y with the updates of `adapters` on x added."""
    for adapter in adapters:
        if isinstance(adapter, ByRow):
            y = adapter.add(y, x)
            continue
        h = nn.functional.dropout(x, adapter.dropout, training) if adapter.dropout else x
        y = add_low_rank(y, h.to(y.dtype), adapter.a.to(y.dtype), adapter.b.to(y.dtype), adapter.scale)
    return y


def together(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """[layer(x) for layer in layers]; where all are 4-bit, as one decode and one product.

    A layer with a hook is called by itself, since a hook sees calls.
    """
    bases, lows, rests = [], [], []
    for layer in layers:
        wrapped = layer if isinstance(layer, LoRALinear) and (layer.merged is None or layer.off) else None
        base = wrapped.base if wrapped else layer
        decomposed = wrapped is not None and any(a.magnitude is not None for a in wrapped.on())
        if type(base) is not Linear4bit or decomposed or is_hooked(layer) or is_hooked(base):
            return [layer(x) for layer in layers]
        low, rest = wrapped.split() if wrapped else (None, [])
        bases.append(base)
        lows.append(low)
        rests.append(rest)
    ys = linears4(x, [base.weight4() for base in bases], [base.bias_as(x.dtype) for base in bases], lows)
    return [add_all(y, x, rest, layer.training) for y, rest, layer in zip(ys, rests, layers, strict=True)]


def is_hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


class LoRAEmbedding(Adapted):
    """An embedding table with low-rank updates: a row's update is B times a column of A."""

    def add(self, name: str, r: int, scale: float, dropout: float, dora: bool = False) -> None:
        del dropout, dora  # an index has nothing to drop; peft ignores it here as well. dora is refused before
        table = self.base.weight
        adapter = Adapter(r, table.shape[0], table.shape[1], scale, 0.0, table.device)
        init_embedding(adapter.a, adapter.b)
        self.adapters[name] = adapter

    def forward(self, index: Tensor) -> Tensor:
        if self.merged is not None and not self.off:
            return self.merged(index)
        y = self.base(index)
        for adapter in self.on():
            low = nn.functional.embedding(index, adapter.a.T.to(y.dtype))  # (..., r)
            y = y + (low @ adapter.b.T.to(y.dtype)) * adapter.scale
        return y

    def delta(self) -> Tensor:
        """What the active adapters add to the table (vocab, dim), float32."""
        return sum(self.adapters[name].delta() for name in self.active if name in self.adapters).T


class TrainedModule(Adapted):
    """A whole module with trained copies beside it: peft's modules_to_save."""

    def add(self, name: str) -> None:
        trained = copy.deepcopy(self.base)
        for p in trained.parameters():
            p.data = p.data.float() if p.is_floating_point() else p.data
        self.adapters[name] = trained.requires_grad_(True)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        on = self.on()
        if not on:
            return self.base(x, *args, **kwargs)
        dtype = next((p.dtype for p in self.base.parameters() if p.is_floating_point()), torch.float32)
        p = next(iter(on[-1].parameters()), None)
        if p is None or not x.is_floating_point() or p.dtype == x.dtype:
            return on[-1](x, *args, **kwargs)
        return on[-1](x.to(p.dtype), *args, **kwargs).to(dtype)  # the copy is float32 beside a 16-bit base


def linear_shape(layer: Any) -> tuple[int, int]:
    """(out, in) of the function that a linear layer computes, whatever its weight looks like."""
    if is_conv1d(layer):
        n_in, n_out = layer.weight.shape
        return n_out, n_in
    return layer.out_features, layer.in_features


def is_linear(layer: nn.Module) -> bool:
    """nn.Linear and its kin: anything with in_features, out_features and a weight, and GPT-2's Conv1D."""
    if isinstance(layer, Adapted):
        return isinstance(layer, LoRALinear)
    known = all(hasattr(layer, key) for key in ("in_features", "out_features", "weight"))
    # a Bilinear has in1_features; attention's out-projection is read as a weight, never called
    return is_conv1d(layer) or (known and type(layer).__name__ != "NonDynamicallyQuantizableLinear")


def layer_device(layer: Any) -> torch.device:
    return layer.weight.device


def adapted(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """(dotted name, layer) of every adapted layer in the model, each once."""
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            yield name, module
