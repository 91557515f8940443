"""merge: fold s B A into the weight, and take it out again.

A merged layer computes with one matrix, W + Σ s B A, summed in float32 and rounded once.  A 4- or 8-bit base is
decoded first (what the adapter was trained on) and its merged form is dense: rounding back to 4 bits would
snap every small change back to its code.  The base itself is kept beside it untouched, so `unmerge` and
`disabled` give back the same bits; `merge(model, unload=True)` lets it go and leaves plain modules.
"""

import torch
from torch import nn

from lora.layer import Adapted, LoRAEmbedding, LoRALinear, TrainedModule, adapted
from lora.match import shared_storage
from lora.quant.linear import Linear4bit, is_conv1d
from lora.quant.linear8 import Linear8bit
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
        if isinstance(layer, TrainedModule) and not unload:
            continue
        _refuse_tie(model, name, layer)
    merged = {}
    dtype = dtype or _base_dtype(model)
    for name, layer in layers.items():
        if isinstance(layer, LoRALinear | LoRAEmbedding) and any(n in layer.adapters for n in layer.active):
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


def _merged(name: str, layer: LoRALinear | LoRAEmbedding, dtype: torch.dtype) -> nn.Module:
    """A plain module that computes what the base and its active adapters do."""
    base = layer.base
    with torch.no_grad():
        if isinstance(base, Linear4bit | Linear8bit):
            weight = base.weight_as(torch.float32).add_(layer.delta()).to(dtype)
            out: nn.Module = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        else:
            if not isinstance(base, nn.Embedding) and not is_conv1d(base) and type(base) is not nn.Linear:
                raise TypeError(
                    f"{name}: cannot merge into {type(base).__name__}; only plain layers and ours of 4 or 8 bits"
                )
            weight = base.weight.float().add(layer.delta()).to(base.weight.dtype)
            out = _like(base)
        if not torch.isfinite(weight).all():
            raise ValueError(f"merging {name} gives values that are not finite; the adapter or the base is broken")
        out._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        if getattr(base, "bias", None) is not None:
            out._parameters["bias"] = nn.Parameter(base.bias.to(weight.dtype), requires_grad=False)
    return out.eval()


def _base_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's own dense weights, adapters aside."""
    own = (p.dtype for n, p in model.named_parameters() if ".adapters." not in n and p.is_floating_point())
    return next(own, torch.float32)


def _like(base: nn.Module) -> nn.Module:
    """A shallow twin of a layer: same class and settings, its own table of parameters."""
    twin = base.__class__.__new__(base.__class__)
    twin.__dict__.update(base.__dict__)
    twin._parameters = dict(base._parameters)
    return twin


def _refuse_tie(model: nn.Module, name: str, layer: Adapted) -> None:
    weight = layer.base._parameters.get("weight")
    for names in shared_storage(model).values():
        if weight is not None and f"{name}.base" in names:
            other = next(n for n in names if n != f"{name}.base")
            raise ValueError(
                f"{name!r} shares its weight with {other!r}; merging would untie them or change both: "
                "leave this layer out of the targets, or keep the adapter unmerged"
            )


def _unload(model: nn.Module) -> None:
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, Adapted):
            parent, _, child = name.rpartition(".")
            plain = module.merged or (module.on() or [module.base])[-1]
            if isinstance(module, LoRALinear | LoRAEmbedding):
                plain = module.merged or module.base
            setattr(model.get_submodule(parent), child, plain)
