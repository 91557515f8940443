"""merge: fold s B A into the weight, and take it out again.

A merged layer computes with one matrix, W + Σ s B A, summed in float32 and rounded once.  A 4- or 8-bit base is
decoded first (what the adapter was trained on) and its merged form is dense: rounding back to 4 bits would
snap every small change back to its code.  The base itself is kept beside it untouched, so `unmerge` and
`disabled` give back the same bits; `merge(model, unload=True)` lets it go and leaves plain modules.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora.experts import LoRAExperts
from lora.layer import Adapted, TrainedBias, TrainedModule, adapted
from lora.match import shared_storage
from lora.quant.linear import Linear4bit, is_conv1d
from lora.quant.linear8 import Linear8bit
from lora.vocab import TrainedTokens
from lora.wrap import is_merged


def merge(model: nn.Module, *, unload: bool = False, dtype: torch.dtype | None = None) -> nn.Module:
    """Folds the active adapters into the weights, in place, and returns the model.

    `unload` replaces every adapted layer by a plain one: the model is then as if never wrapped, and cannot be
    unmerged.  `dtype` is what a quantized base is decoded to (default: that of the model's other weights).

    Raises RuntimeError on a model without adapters or merged already; ValueError when the result is not finite
    or a merged weight is tied to one that is not adapted (the tie would carry the change over).  On an error the
    model is as before.
    """
    layers = dict(adapted(model))
    if not layers:
        raise RuntimeError("this model has no adapters to merge; wrap or attach one first")
    if is_merged(model):
        if not unload:
            raise RuntimeError("this model is merged already; call lora.unmerge(model) first")
        _unload(model)
        return model
    for name, layer in layers.items():
        if (isinstance(layer, TrainedModule) and not unload) or isinstance(layer, TrainedBias):
            continue
        _refuse_tie(model, layers, name)
    merged = {}
    dtype = dtype or _base_dtype(model)
    tables: dict[int, nn.Parameter] = {}  # of trained tokens: layers of one weight are merged into one weight
    for name, layer in layers.items():
        if not layer.chosen() or isinstance(layer, TrainedModule):
            continue
        if isinstance(layer, TrainedTokens):
            weight = tables.setdefault(layer.base.weight.data_ptr(), _frozen(name, layer.table()))
            merged[name] = _plain(layer.base, {"weight": weight})
        elif isinstance(layer, LoRAExperts):
            merged[name] = _plain(layer.base, {key: _frozen(name, w) for key, w in layer.weights().items()})
        else:
            merged[name] = _merged(name, layer, dtype)
    for name, module in merged.items():
        layers[name].eval()  # a merged layer cannot train
        layers[name].merged = module
    if unload:
        _unload(model)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Takes the adapters out of the weights again; the base has the bytes it had before.

    Raises RuntimeError on a model that is not merged.
    """
    if not is_merged(model):
        raise RuntimeError("this model is not merged")
    for _, layer in adapted(model):
        layer.merged = None
        layer.train(model.training)  # merging had put it into eval mode
    return model


def _merged(name: str, layer: Any, dtype: torch.dtype) -> nn.Module:
    """A plain module that computes what the base and its active adapters do."""
    base, delta, shift = layer.base, layer.delta(), layer.shift()
    with torch.no_grad():
        if isinstance(base, Linear4bit | Linear8bit):
            weight = base.weight_as(torch.float32)
            weight = (weight if delta is None else weight.add_(delta)).to(dtype)
            out: nn.Module = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        else:
            if not (isinstance(base, nn.Embedding | nn.LayerNorm) or is_conv1d(base) or _is_dense(base)):
                raise TypeError(
                    f"{name}: cannot merge into {type(base).__name__}; only plain layers and ours of 4 or 8 bits"
                )
            weight = base.weight if delta is None else base.weight.float().add(delta).to(base.weight.dtype)
            out = base
        own = {"weight": _frozen(name, weight)}
        bias = getattr(base, "bias", None)
        if bias is not None or shift is not None:
            total = torch.zeros_like(shift) if bias is None else bias.float() if shift is not None else bias
            own["bias"] = _frozen(name, (total if shift is None else total + shift).to(weight.dtype))
    return _plain(out, own)


def _is_dense(base: Any) -> bool:
    """nn.Linear or a class of its kind (Falcon's in transformers) that holds its weight as it is, not packed."""
    whole = isinstance(base, nn.Linear) and tuple(base.weight.shape) == (base.out_features, base.in_features)
    return whole and base.weight.is_floating_point()


def _frozen(name: str, weight: Tensor) -> nn.Parameter:
    if not torch.isfinite(weight).all():
        raise ValueError(f"merging {name} gives values that are not finite; the adapter or the base is broken")
    return nn.Parameter(weight.detach(), requires_grad=False)


def _base_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's own dense weights, adapters aside."""
    own = (p.dtype for n, p in model.named_parameters() if ".adapters." not in n and p.is_floating_point())
    return next(own, torch.float32)


def _plain(base: nn.Module, own: Mapping[str, nn.Parameter]) -> nn.Module:
    """A shallow twin of a layer: same class and settings, its own table of parameters, of which `own` are new."""
    twin = base.__class__.__new__(base.__class__)
    twin.__dict__.update(base.__dict__)
    twin._parameters = dict(base._parameters) | dict(own)
    twin._modules = dict(base._modules)  # so that `eval` is of the twin
    return twin.eval()


def _refuse_tie(model: nn.Module, layers: Mapping[str, Adapted], name: str) -> None:
    """Raises ValueError where a layer's weight is another's too, unless both train the same tokens of it."""
    for parameter, weight in layers[name].base._parameters.items():
        if weight is None or not (parameter == "weight" or isinstance(layers[name], LoRAExperts)):
            continue
        for names in shared_storage(model).values():
            if f"{name}.base" not in names:
                continue
            both = all(isinstance(layers.get(n.removesuffix(".base")), TrainedTokens) for n in names)
            if not both:
                other = next(n for n in names if n != f"{name}.base")
                raise ValueError(
                    f"{name!r} shares its weight with {other!r}; merging would untie them or change both: "
                    "leave this layer out of the targets, or keep the adapter unmerged"
                )


def _unload(model: nn.Module) -> None:
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, Adapted):
            parent, _, child = name.rpartition(".")
            plain = module.merged or module.base
            if isinstance(module, TrainedModule):
                plain = (module.on() or [module.base])[-1]
            setattr(model.get_submodule(parent), child, plain)
