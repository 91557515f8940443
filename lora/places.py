"""Where an adapter goes: what each setting of LoRAConfig means in a model, before anything is changed.

targets, parts     LoRALinear, LoRAEmbedding        parameters     LoRAExperts
train_tokens       TrainedTokens                    bias="all"     TrainedBias, on what no layer learns already
train_modules      TrainedModule
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora.config import LoRAConfig
from lora.experts import LoRAExperts
from lora.layer import (
    Adapted,
    LoRAEmbedding,
    LoRALinear,
    TrainedBias,
    TrainedModule,
    is_linear,
    linear_shape,
)
from lora.match import candidates, heads, input_table, matches, select, shared_storage
from lora.parts import parts_of
from lora.quant.linear import is_conv1d
from lora.vocab import Tokens, TrainedTokens

Place = tuple[type[Adapted], tuple[Any, ...]]  # the kind of layer, and what its `add` gets behind the config


def find_places(model: nn.Module, config: LoRAConfig) -> dict[str, Place]:
    """{module name: what goes there} for all that `config` means."""
    modules = candidates(model)
    whole = select(modules, config.train_modules, "train_modules") if config.train_modules else []
    layers = find_targets(model, modules, config)
    inside = {n: next((w for w in whole if n == w or n.startswith(w + ".")), None) for n in layers}
    clash = next(((n, w) for n, w in inside.items() if w), None)
    if clash and config.targets != "all-linear":
        raise ValueError(f"targets means {clash[0]!r}, which train_modules trains whole as {clash[1]!r}; leave one out")
    places: dict[str, Place] = {}
    fused = _parts(model, modules, [n for n in layers if not inside[n]], config)
    for n, (r, scale) in layers.items():
        if not inside[n]:
            table = isinstance(modules[n], nn.Embedding | LoRAEmbedding)
            rows = (fused[n],) if n in fused else ()
            places[n] = (LoRAEmbedding, (r, scale)) if table else (LoRALinear, (r, scale, *rows))
    more: list[dict[str, Place]] = [
        {n: (TrainedModule, ()) for n in whole},
        _tokens(model, modules, config),
        _experts(modules, config),
    ]
    for found in more:
        twice = next((n for n in found if n in places), None)
        if twice:
            raise ValueError(f"{twice!r} was asked for as {places[twice][0].__name__} and {found[twice][0].__name__}")
        places |= found
    if config.bias == "all":
        places |= _biases(modules, places)
    return places


def find_targets(
    model: nn.Module, modules: Mapping[str, nn.Module], config: LoRAConfig
) -> dict[str, tuple[int, float]]:
    """{module name: (rank, scale)} for each layer that `config.targets` means."""
    fit = [n for n, m in modules.items() if is_linear(m) or isinstance(m, nn.Embedding | LoRAEmbedding)]
    if config.targets == "all-linear":
        left = {id(modules[name]) for name in heads(model)}
        names = [n for n in fit if is_linear(modules[n]) and id(modules[n]) not in left]
        if not names and not (config.train_modules or config.parameters or config.train_tokens):
            raise ValueError(f'targets="all-linear" finds no linear layer in {type(model).__name__} besides its head')
    else:
        names = select(fit, config.targets, "targets", modules)
    if config.exclude:
        out = set(select(modules, config.exclude, "exclude"))
        names = [n for n in names if n not in out]
        if not names:
            raise ValueError(f"exclude={list(config.exclude)} leaves nothing of targets={config.targets!r}")
    adapted = [*names, *_parameters(modules, config)]
    for key, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        select(adapted, list(patterns), key, modules)
    return {n: _rank_and_scale(n, config) for n in names}


def _rank_and_scale(name: str, config: LoRAConfig) -> tuple[int, float]:
    r = next((v for k, v in config.rank_pattern.items() if matches(name, k)), config.r)
    alpha = next((v for k, v in config.alpha_pattern.items() if matches(name, k)), config.alpha)
    return r, config.scale(r, alpha)


def _parts(
    model: nn.Module, modules: Mapping[str, nn.Module], targets: Sequence[str], config: LoRAConfig
) -> dict[str, list[Tensor]]:
    """{fused projection: rows of each of its parts that gets an update}."""
    out: dict[str, list[Tensor]] = {}
    for pattern, wanted in config.parts.items():
        for n in select(targets, [pattern], "parts", modules):
            layer: Any = modules[n]
            known = parts_of(model, n, linear_shape(layer.base if isinstance(layer, Adapted) else layer)[0])
            wrong = [part for part in wanted if part not in known]
            if wrong or not wanted:
                raise ValueError(f"parts of {n!r} are {', '.join(known)}; asked for {', '.join(wanted) or 'none'}")
            out[n] = [known[part] for part in known if part in wanted]
    return out


def parameters_of(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """{name: parameter} of all that `parameters` may mean: 2 or 3 dimensions, of a module that does not share it."""
    found: dict[str, nn.Parameter] = {}
    for n, module in modules.items():
        base = module.base if isinstance(module, Adapted) else module
        found |= {f"{n}.{key}": p for key, p in base.named_parameters(recurse=False) if p.dim() in (2, 3)}
    return found


def _parameters(modules: Mapping[str, nn.Module], config: LoRAConfig) -> list[str]:
    return select(parameters_of(modules), config.parameters, "parameters", modules) if config.parameters else []


def _experts(modules: Mapping[str, nn.Module], config: LoRAConfig) -> dict[str, Place]:
    out: dict[str, dict[str, tuple[int, float]]] = {}
    for name in _parameters(modules, config):
        module, _, key = name.rpartition(".")
        out.setdefault(module, {})[key] = _rank_and_scale(name, config)
    return {module: (LoRAExperts, (places,)) for module, places in out.items()}


def _tokens(model: nn.Module, modules: Mapping[str, nn.Module], config: LoRAConfig) -> dict[str, Place]:
    if not config.train_tokens:
        return {}
    given = config.train_tokens
    if not isinstance(given, dict):
        table = input_table(model)
        if table is None:
            raise ValueError(
                f"train_tokens={list(given)}: {type(model).__name__} has no one embedding; name the module"
            )
        given = {table: given}
    fit = [n for n, m in modules.items() if is_linear(m) or isinstance(m, nn.Embedding | TrainedTokens)]
    named = {n: ids for pattern, ids in given.items() for n in select(fit, [pattern], "train_tokens", modules)}
    return token_places(model, modules, named)


def token_places(
    model: nn.Module, modules: Mapping[str, nn.Module], named: Mapping[str, Sequence[int]]
) -> dict[str, Place]:
    """Trained tokens on these modules and on those tied to them. Raises ValueError for ids out of reach."""
    ties = [[n.removesuffix(".base") for n in names] for names in shared_storage(model).values()]
    out: dict[str, Place] = {}
    shared: dict[int, Tokens] = {}
    for n, ids in named.items():
        layer: Any = modules[n]
        n_rows = layer.weight.shape[0]
        if ids[-1] >= n_rows or is_conv1d(layer) or not layer.weight.is_floating_point():
            raise ValueError(
                f"train_tokens={list(ids)} of {n!r}: it is {type(layer).__name__} with {n_rows} rows; ids are below "
                "that, of a dense table or head"
            )
        index = torch.tensor(ids)
        for tied in [n, *(t for names in ties if n in names for t in names if t != n)]:
            if tied in named and named[tied] != ids:
                raise ValueError(f"{n!r} and {tied!r} share their weight, and train_tokens names other ids for each")
            out[tied] = (TrainedTokens, (index, shared))
    return out


def _biases(modules: Mapping[str, nn.Module], places: Mapping[str, Place]) -> dict[str, Place]:
    """Every bias of the model that no layer of `places` learns already."""
    whole = tuple(n + "." for n, (kind, _) in places.items() if kind is TrainedModule)
    out: dict[str, Place] = {}
    for n, module in modules.items():
        base: Any = module.base if isinstance(module, Adapted) else module
        if base._parameters.get("bias") is None or n in places or n.startswith(whole):
            continue
        if not (is_linear(base) or isinstance(base, nn.LayerNorm)):
            raise ValueError(
                f'bias="all" means {n}.bias, of {type(base).__name__}; only linear layers and LayerNorm do'
            )
        out[n] = (TrainedBias, ())
    return out
