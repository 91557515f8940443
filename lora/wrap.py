"""wrap: find the layers, put adapters on them, freeze the rest; and the switches that need no file.

wrap      add a named adapter          detach    take one away, and the wrapping with the last
activate  choose which take part       disabled  none of them, for the length of a `with`
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, groupby
from typing import Any

from torch import nn

from lora.adapter import ByRow
from lora.config import LoRAConfig
from lora.layer import Adapted, LoRAEmbedding, LoRALinear, adapted
from lora.match import candidates
from lora.places import Place, find_places
from lora.vocab import TrainedTokens, refuse_overlap


def wrap(
    model: nn.Module,
    r: int = 16,
    alpha: float = 32.0,
    targets: str | Sequence[str] = "all-linear",
    dropout: float = 0.0,
    *,
    name: str = "default",
    config: LoRAConfig | None = None,
    **options: Any,
) -> nn.Module:
    """Puts a fresh adapter on the model's layers, in place, freezes everything else, and returns the model.

    Works on any nn.Module, transformers' too.  `options` are the other settings of `LoRAConfig` (rslora, dora, exclude,
    train_modules, ...); `config` gives them all at once.  A fresh adapter changes no output bit (one that begins by
    PiSSA: nothing beyond rounding).  The new adapter is active, alone.  `lora.status(model)` shows what was adapted.

    Raises ValueError when a pattern matches nothing, a rank or alpha is out of range, or `name` is taken; TypeError for
    an option there is not; RuntimeError on a merged model.
    """
    if config is None:
        config = LoRAConfig(r=r, alpha=alpha, targets=targets, dropout=dropout, **options)  # type: ignore[arg-type]
    add_adapter(model, name, config, find_places(model, config))
    return model


def add_adapter(
    model: nn.Module, name: str, config: LoRAConfig, places: Mapping[str, Place], *, fresh: bool = True
) -> None:
    """Adds adapter `name` at `places`, freezes the rest, and activates it. Not `fresh`: its factors are not filled."""
    if not name or "." in name:
        raise ValueError(f"name={name!r}: an adapter's name is not empty and holds no dot")
    layers = dict(adapted(model))
    if any(layer.merged is not None for layer in layers.values()):
        raise RuntimeError("this model is merged; call lora.unmerge(model) before adding an adapter")
    if name in adapter_names(model):
        raise ValueError(f"the model already has an adapter {name!r}; detach it first, or give another name")
    modules = candidates(model)
    if isinstance(model, Adapted) or not modules:
        raise TypeError(f"{type(model).__name__} is itself a layer, which cannot replace itself; put it into a module")
    for target, (kind, _) in places.items():
        module = modules[target]
        for key, wrong in (
            ("dora", config.dora), ("train_a=False", not config.train_a), ("lora_bias", config.lora_bias),
            (f"init={config.init!r}", config.init != "kaiming"),
        ):  # fmt: skip
            if wrong and kind is LoRAEmbedding:
                raise ValueError(
                    f"{key} is for linear layers, and {target!r} is an embedding; leave it out of the targets"
                )
        if isinstance(module, Adapted) and type(module) is not kind:
            raise ValueError(f"{target!r} already carries {type(module).__name__}; it cannot also be {kind.__name__}")
    made: dict[int, Adapted] = {}  # a module used in two places keeps one adapter for both
    new: dict[str, Adapted] = {}
    try:
        for target, (kind, what) in places.items():
            module = modules[target]
            if id(module) not in made:
                layer: Any = module if isinstance(module, Adapted) else kind(module).train(module.training)
                layer.add(name, config, *what, fresh=fresh)
                layer.adapters.train(module.training)
                made[id(module)] = layer
            new[target] = made[id(module)]
    except ValueError:
        for layer in made.values():  # nothing stands in the model yet but what earlier adapters had put there
            layer.adapters.pop(name)
        raise
    if not layers:  # the base; later adapters leave earlier ones as trainable as they were
        model.requires_grad_(False)
    for target, layer in new.items():
        if layer is not modules[target]:
            parent, _, child = target.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
    activate(model, name)


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the adapters on the model, in the order they came."""
    return list(dict.fromkeys(name for _, layer in adapted(model) for name in layer.adapters))


def check_name(model: nn.Module, name: str) -> None:
    known = adapter_names(model)
    if name not in known:
        raise KeyError(f"no adapter {name!r} on this model; it has {known or 'none'}")


def activate(model: nn.Module, name: str | Sequence[str]) -> None:
    """Makes these adapters, and no others, take part; several add up.

    Raises KeyError for an unknown name, RuntimeError on a merged model.
    """
    names = (name,) if isinstance(name, str) else tuple(name)
    for n in names:
        check_name(model, n)
    if len(set(names)) != len(names):
        raise ValueError(f"activate({list(names)}): each adapter once")
    if is_merged(model):
        raise RuntimeError("this model is merged; call lora.unmerge(model) before switching adapters")
    for path, layer in adapted(model):
        if isinstance(layer, TrainedTokens):
            refuse_overlap(layer, names, path)
    for _, layer in adapted(model):
        layer.active = names


def detach(model: nn.Module, name: str) -> None:
    """Takes adapter `name` off the model; with the last one the original modules are put back.

    Raises KeyError for an unknown name, RuntimeError on a merged model.
    """
    check_name(model, name)
    if is_merged(model):
        raise RuntimeError("this model is merged; call lora.unmerge(model) before detaching")
    for module_name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, Adapted):
            continue
        module.active = tuple(n for n in module.active if n != name)
        if name in module.adapters:
            del module.adapters[name]
        if not module.adapters:
            parent, _, child = module_name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base)


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """`with lora.disabled(model):` runs the base alone, bit for bit, merged or not. Nothing else changes.

    Raises RuntimeError on a model without adapters, where it would do nothing.
    """
    layers = [layer for _, layer in adapted(model)]
    if not layers:
        raise RuntimeError("this model has no adapters to disable; wrap or attach one first")
    before = [layer.off for layer in layers]
    for layer in layers:
        layer.off = True
    try:
        yield model
    finally:
        for layer, off in zip(layers, before, strict=True):
            layer.off = off


@contextmanager
def mixed(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """`with lora.mixed(model, ["a", None, "b"]):` gives each row of a batch its own adapter; None: the base's.

    Every layer must get as many rows as there are names, in their order: call the model, or `lora.generate`, on a batch
    of that size.  Adapters' dropout does not act.

    Raises KeyError for an unknown name, RuntimeError on a merged model, ValueError for an adapter that is more than
    low-rank updates of linear layers and embeddings (DoRA, trained modules, tokens, experts), which act on all rows.
    """
    chosen = list(dict.fromkeys(n for n in names if n is not None))
    for n in chosen:
        check_name(model, n)
    if not names or is_merged(model):
        raise RuntimeError("mixed wants a name for each row, and a model that is not merged")
    layers = dict(adapted(model))
    for path, layer in layers.items():
        for n in [n for n in chosen if n in layer.adapters]:
            if not isinstance(layer, LoRALinear | LoRAEmbedding) or layer.adapters[n].magnitude is not None:
                raise ValueError(
                    f"adapter {n!r} has on {path!r} what cannot act on some rows only ({type(layer).__name__}); mixed "
                    "takes low-rank updates of linear layers and embeddings"
                )
    before = {path: (layer.active, layer.by_row) for path, layer in layers.items()}
    for layer in layers.values():
        layer.active = tuple(chosen)
        if any(n in layer.adapters for n in chosen):
            rows = list(accumulate([0, *(len(list(same)) for _, same in groupby(names))]))
            there = dict(layer.adapters.items())
            own = [there.get(n) for n, _ in groupby(names)]
            layer.by_row = ByRow(list(zip(own, rows[:-1], rows[1:], strict=True)))
    try:
        yield model
    finally:
        for path, (active, by_row) in before.items():
            layers[path].active, layers[path].by_row = active, by_row


def is_merged(model: nn.Module) -> bool:
    return any(layer.merged is not None for _, layer in adapted(model))
