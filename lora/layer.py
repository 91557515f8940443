"""The adapted layers: a base that is never touched, and beside it one low-rank update a name.

    LoRALinear     y = base(x) + Σ over active names of s (x Aᵀ) Bᵀ        A (r, in)     B (out, r)
    LoRAEmbedding  y = base(i) + Σ s A[:, i]ᵀ Bᵀ                            A (r, vocab)  B (dim, r)
    TrainedModule  y = the active copy of a whole module, or the module itself
    TrainedBias    y = base(x) + Σ (bias learned - bias of the base)
Two more in files of their own: TrainedTokens (vocab.py), some rows of a table; LoRAExperts (experts.py), parameters of
3 dimensions.

The base is any module that maps x to y: nn.Linear, Linear4bit, GPT-2's Conv1D, bitsandbytes' layers.
It is held and called, never changed, so switching adapters off, or a merge out again, gives back the same bits.  On a
GPU in 16 bits the weight of a frozen nn.Linear or Conv1D is read instead, where nobody would see the call
(kernels/linear16.py).  The factors are float32 and enter the product in the dtype of x.
Source: LoRA, arXiv:2106.09685, section 4.1.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora.adapter import Adapter, Bias, ByRow, add_all
from lora.config import LoRAConfig
from lora.dora import contribution, weight_change
from lora.kernels.code4 import Low
from lora.kernels.dropout import Drop, Seed
from lora.kernels.linear4 import linears4
from lora.kernels.linear16 import can_linear16, linears16
from lora.quant.linear import Linear4bit, is_conv1d

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # where modules hold theirs


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
        return [] if self.off else self.chosen()

    def chosen(self) -> list[Any]:
        """The active adapters that stand on this layer, switched off or not."""
        return [self.adapters[name] for name in self.active if name in self.adapters]

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

    def add(
        self, name: str, config: LoRAConfig, r: int, scale: float, rows: Sequence[Tensor] = (), *, fresh: bool = True
    ) -> None:
        """A new adapter; `rows` are those of each part of a fused projection. Not `fresh`: factors are not filled."""
        n_out, n_in = linear_shape(self.base)
        device, bias = layer_device(self.base), getattr(self.base, "bias", None)
        adapter = Adapter(r, n_in, n_out, scale, config.dropout, device, rows)
        if fresh:
            adapter.begin(config.init, self.base)
        if config.dora:
            adapter.decompose(self.base)
        if config.lora_bias:
            adapter.bias = Bias(None, n_out, scale, device)
        elif config.bias != "none" and bias is not None:
            adapter.bias = Bias(bias, n_out, 1.0, device)
        adapter.a.requires_grad_(config.train_a)
        self.adapters[name] = adapter

    def forward(self, x: Tensor) -> Tensor:
        if self.merged is not None and not self.off:
            return self.merged(x)
        decomposed = [adapter for adapter in self.on() if adapter.magnitude is not None]
        if decomposed:
            y0 = y = self.base(x)
            for adapter in decomposed:
                y = y + contribution(adapter, self.base, x, y0, self.training)
                y = y if adapter.bias is None else y + adapter.bias.shift().to(y.dtype)
            return add_all(y, x, [a for a in self.on() if a.magnitude is None], self.training)
        low, drop, rest = self.split(x)
        if isinstance(self.base, Linear4bit):
            y = self.base(x, low, drop)
        elif low is None:
            y = self.base(x)
        else:
            (y,) = linears16(x, (dense_weight(self.base),), (self.base.bias,), (low,), (drop,))
        return add_all(y, x, rest, self.training)

    def split(self, x: Tensor, seed: Seed | None = None) -> tuple[Low | None, Drop | None, list[Any]]:
        """The adapter that x meets in the base's own pass, its dropout, and those to be added behind it.

        `seed` is that of the dropout, where layers share one.
        """
        on = self.on()
        if not on or isinstance(on[0], ByRow) or on[0].bias is not None or not takes_updates(self.base, x):
            return None, None, on
        if not (self.training and on[0].dropout):
            return on[0].low(), None, on[1:]
        if not can_linear16(x, self.base.weight):
            return None, None, on
        return on[0].low(), (seed or Seed(x.device)).drop(on[0].dropout), on[1:]

    def delta(self) -> Tensor:
        """What the active adapters add to the weight, in the base's own layout, float32."""
        delta: Any = sum(a.delta() if a.magnitude is None else weight_change(a, self.base) for a in self.chosen())
        return delta.T if is_conv1d(self.base) else delta

    def shift(self) -> Tensor | None:
        """What the active adapters add to the bias (out,), float32; None where none has one."""
        shifts = [a.bias.shift().detach() for a in self.chosen() if a.bias is not None]
        return torch.stack(shifts).sum(dim=0) if shifts else None


def together(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """[layer(x) for layer in layers]; where that can be, their updates as one product, and the bases too if in 4 bits.

    A layer with a hook is called by itself, since a hook sees calls.
    """
    wraps = [w if isinstance(w, LoRALinear) and (w.merged is None or w.off) else None for w in layers]
    bases: list[Any] = [wrapped.base if wrapped else layer for wrapped, layer in zip(wraps, layers, strict=True)]
    decomposed = any(a.magnitude is not None for wrapped in wraps if wrapped for a in wrapped.on())
    four = {isinstance(base, Linear4bit) for base in bases}
    if (
        decomposed
        or len(four) > 1
        or any(is_hooked(module) for module in (*layers, *bases))
        or not all(takes_updates(base, x) for base in bases)
    ):
        return [layer(x) for layer in layers]
    seed = Seed(x.device)
    lows, drops, rests = zip(*(w.split(x, seed) if w else (None, None, []) for w in wraps), strict=True)
    if True in four:
        ys = linears4(x, [base.weight4() for base in bases], [base.bias_as(x.dtype) for base in bases], lows, drops)
    elif any(lows):
        ys = linears16(x, [dense_weight(base) for base in bases], [base.bias for base in bases], lows, drops)
    else:
        ys = tuple(base(x) for base in bases)
    return [add_all(y, x, rest, layer.training) for y, rest, layer in zip(ys, rests, layers, strict=True)]


def takes_updates(base: Any, x: Tensor) -> bool:
    """Whether x can go through an update in the pass of a base: one in 4 bits, or a frozen dense one on a GPU.

    Not where somebody sees or has changed the calls of a dense one.
    """
    if isinstance(base, Linear4bit):
        return True
    if (type(base) is not nn.Linear and not is_conv1d(base)) or not can_linear16(x, base.weight):
        return False
    still = base.weight.dtype == x.dtype and not base.weight.requires_grad
    return still and not is_hooked(base) and "forward" not in vars(base)


def dense_weight(base: Any) -> Tensor:
    """The weight (out, in) of a linear layer or a Conv1D, the same memory."""
    return base.weight.T if is_conv1d(base) else base.weight


def is_hooked(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in HOOKS)


class LoRAEmbedding(Adapted):
    """An embedding table with low-rank updates: a row's update is B times a column of A."""

    def add(self, name: str, config: LoRAConfig, r: int, scale: float, *, fresh: bool = True) -> None:
        table = self.base.weight
        # an index has nothing to drop: config.dropout does not act, as in peft
        adapter = Adapter(r, table.shape[0], table.shape[1], scale, 0.0, table.device)
        if fresh:
            adapter.begin(config.init, self.base)
        self.adapters[name] = adapter

    def forward(self, index: Tensor) -> Tensor:
        if self.merged is not None and not self.off:
            return self.merged(index)
        y = self.base(index)
        times = embed_scale(self.base)
        for adapter in self.on():
            if isinstance(adapter, ByRow):
                adapter.check(index)
                own = [_of_table(y[i:j], index[i:j], one, times) if one else y[i:j] for one, i, j in adapter.members]
                y = torch.cat(own)
            else:
                y = _of_table(y, index, adapter, times)
        return y

    def delta(self) -> Tensor:
        """What the active adapters add to the table (vocab, dim), float32."""
        return sum(a.delta() for a in self.chosen()).T

    def shift(self) -> None:
        return None


def _of_table(y: Tensor, index: Tensor, adapter: Adapter, times: float) -> Tensor:
    low = nn.functional.embedding(index, adapter.a.T.to(y.dtype))  # (..., r)
    return y + (low @ adapter.b.T.to(y.dtype)) * (adapter.scale * times)


def embed_scale(table: Any) -> float:
    """What a table multiplies its rows by when they are looked up (transformers' Gemma does so in the layer)."""
    return float(getattr(table, "embed_scale", 1.0))


class TrainedModule(Adapted):
    """A whole module with trained copies beside it: peft's modules_to_save."""

    def add(self, name: str, config: LoRAConfig, *, fresh: bool = True) -> None:
        del config, fresh  # it begins as the module, whatever the adapter's settings
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


class TrainedBias(Adapted):
    """A module of which the bias alone is learned, beside it; one whose output ends in adding that bias."""

    def add(self, name: str, config: LoRAConfig, *, fresh: bool = True) -> None:
        del config, fresh  # it begins as the base's
        bias = self.base.bias
        self.adapters[name] = Bias(bias, len(bias), 1.0, bias.device)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged is not None and not self.off:
            return self.merged(x)
        y = self.base(x)
        for bias in self.on():
            y = y + bias.shift().to(y.dtype)
        return y

    def delta(self) -> None:
        return None

    def shift(self) -> Tensor:
        """What the active ones add to the bias (n,), float32."""
        return torch.stack([bias.shift().detach() for bias in self.chosen()]).sum(dim=0)


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


def updates(model: nn.Module) -> Iterator[tuple[str, str, Adapter]]:
    """(name of the layer or of its parameter, name of the adapter, update) of every low-rank update in the model."""
    for path, layer in adapted(model):
        for name, part in layer.adapters.items():
            if isinstance(part, Adapter):
                yield path, name, part
            elif isinstance(part, nn.ModuleDict):  # of a module's parameters, each its own
                for key, update in part.items():
                    yield f"{path}.{key}", name, update  # type: ignore[misc]
