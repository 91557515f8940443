"""wrap: find the layers, put adapters on them, freeze the rest; and the switches that need no file.

wrap      add a named adapter          detach    take one away, and the wrapping with the last
activate  choose which take part       disabled  none of them, for the length of a `with`
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lora.config import LoRAConfig
from lora.layer import Adapted, LoRAEmbedding, LoRALinear, TrainedModule, adapted, is_linear
from lora.match import candidates, heads, matches, select


def wrap(
    model: nn.Module,
    r: int = 16,
    alpha: float = 32.0,
    targets: str | Sequence[str] = "all-linear",
    dropout: float = 0.0,
    *,
    exclude: Sequence[str] = (),
    rslora: bool = False,
    dora: bool = False,
    train_a: bool = True,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    train_modules: Sequence[str] = (),
    name: str = "default",
    config: LoRAConfig | None = None,
) -> nn.Module:
    """Puts a fresh adapter on the model's layers, in place, freezes everything else, and returns the model.

    Works on any nn.Module, transformers' too.  The options are those of `LoRAConfig`; `config` gives them all at
    once.  A fresh adapter changes no output bit.  The new adapter is active, alone.  `lora.status(model)` shows
    what was adapted.

    Raises ValueError when a pattern matches nothing, a rank or alpha is out of range, or `name` is taken;
    RuntimeError on a merged model.
    """
    if config is None:
        config = LoRAConfig(
            r=r,
            alpha=alpha,
            targets=targets if isinstance(targets, str) else tuple(targets),
            dropout=dropout,
            exclude=tuple(exclude) if not isinstance(exclude, str) else (exclude,),
            rslora=rslora,
            dora=dora,
            train_a=train_a,
            rank_pattern=dict(rank_pattern or {}),
            alpha_pattern=dict(alpha_pattern or {}),
            train_modules=tuple(train_modules) if not isinstance(train_modules, str) else (train_modules,),
        )
    plan = find_targets(model, config)
    whole = select(candidates(model), config.train_modules, "train_modules") if config.train_modules else []
    inside = [n for n in plan if any(n == w or n.startswith(w + ".") for w in whole)]
    if inside and config.targets == "all-linear":
        plan = {n: v for n, v in plan.items() if n not in inside}
    elif inside:
        outer = next(w for w in whole if inside[0] == w or inside[0].startswith(w + "."))
        raise ValueError(f"targets means {inside[0]!r}, which train_modules trains whole as {outer!r}; leave one out")
    add_adapter(model, name, config, plan, whole)
    return model


def find_targets(model: nn.Module, config: LoRAConfig) -> dict[str, tuple[int, float]]:
    """{module name: (rank, scale)} for each layer that `config` means."""
    modules = candidates(model)
    fit = [n for n, m in modules.items() if is_linear(m) or isinstance(m, nn.Embedding | LoRAEmbedding)]
    if config.targets == "all-linear":
        left = {id(modules[name]) for name in heads(model)}
        names = [n for n in fit if is_linear(modules[n]) and id(modules[n]) not in left]
        if not names and not config.train_modules:
            raise ValueError(f'targets="all-linear" finds no linear layer in {type(model).__name__} besides its head')
    else:
        names = select(fit, config.targets, "targets", modules)
    if config.exclude:
        out = set(select(modules, config.exclude, "exclude"))
        names = [n for n in names if n not in out]
        if not names:
            raise ValueError(f"exclude={list(config.exclude)} leaves nothing of targets={config.targets!r}")
    for key, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        select(names, list(patterns), key, modules)
    return {n: _rank_and_scale(n, config) for n in names}


def _rank_and_scale(name: str, config: LoRAConfig) -> tuple[int, float]:
    r = next((v for k, v in config.rank_pattern.items() if matches(name, k)), config.r)
    alpha = next((v for k, v in config.alpha_pattern.items() if matches(name, k)), config.alpha)
    return r, config.scale(r, alpha)


def add_adapter(
    model: nn.Module, name: str, config: LoRAConfig, plan: dict[str, tuple[int, float]], whole: Sequence[str] = ()
) -> None:
    """Adds adapter `name` on the layers of `plan` and copies of the modules `whole`; freezes the rest; activates it."""
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
    kinds = {target: _kind(modules[target]) if target in plan else TrainedModule for target in (*plan, *whole)}
    for target, kind in kinds.items():
        module = modules[target]
        if config.dora and kind is LoRAEmbedding:
            raise ValueError(f"dora is for linear layers, and {target!r} is an embedding; leave it out of the targets")
        if not config.train_a and kind is LoRAEmbedding:
            raise ValueError(f"train_a=False is for linear layers, and {target!r} is an embedding, whose A begins at 0")
        if isinstance(module, Adapted) and not isinstance(module, kind):
            raise ValueError(f"{target!r} already carries {type(module).__name__}; it cannot also be {kind.__name__}")
    if not layers:
        model.requires_grad_(False)  # the base; later adapters leave earlier ones as trainable as they were
    made: dict[int, Adapted] = {}  # a module used in two places keeps one adapter for both
    for target, kind in kinds.items():
        module = modules[target]
        if id(module) not in made:
            layer: Any = module if isinstance(module, Adapted) else kind(module).train(module.training)
            if isinstance(layer, TrainedModule):
                layer.add(name)
            else:
                layer.add(name, *plan[target], config.dropout, config.dora)
                layer.adapters[name].a.requires_grad_(config.train_a)
            layer.adapters.train(module.training)
            made[id(module)] = layer
        if made[id(module)] is not module:
            parent, _, child = target.rpartition(".")
            setattr(model.get_submodule(parent), child, made[id(module)])
    activate(model, name)


def _kind(module: nn.Module) -> type[Adapted]:
    return LoRAEmbedding if isinstance(module, nn.Embedding | LoRAEmbedding) else LoRALinear


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


def is_merged(model: nn.Module) -> bool:
    return any(layer.merged is not None for _, layer in adapted(model))
