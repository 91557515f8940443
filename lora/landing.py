"""Where every tensor of an adapter file lands in a model; checked in full before anything is changed.

Every tensor has a place of its shape, and every place that the config means has its tensors.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora.config import LoRAConfig
from lora.experts import LoRAExperts, expert_shape, is_transposed
from lora.format import BASE, CONFIG, MAGNITUDE, STACKED, Contents, ends_with, rank_and_scale, version_of
from lora.layer import Adapted, LoRAEmbedding, LoRALinear, TrainedBias, TrainedModule, is_linear, linear_shape
from lora.match import candidates, heads
from lora.places import Place, parameters_of, token_places
from lora.wrap import is_merged


def land(
    model: nn.Module, config: Mapping[str, Any], content: Contents, directory: Path
) -> tuple[LoRAConfig, dict[str, Place]]:
    """What `add_adapter` needs for a file: every tensor has a place of its shape, and every place its tensors.

    Moves tensors of `content` to where `attach` looks: stacked factors to the parameter's name, in today's layout.
    """
    if is_merged(model):
        raise RuntimeError("this model is merged; call lora.unmerge(model) before attaching an adapter")
    modules = candidates(model)
    _gather_whole(modules, config, content)
    named = [*content.updates, *content.tokens, *content.biases, *content.whole]
    lost = sorted(path for path in named if path.replace(BASE, "") not in modules)
    if lost:
        raise ValueError(
            f"{directory} is for another base: {len(lost)} of its {len(content)} layers, such as "
            f"{lost[0]!r}, are not in {type(model).__name__}"
        )
    _check_tables(modules, content, directory)
    _sort_biases(modules, config, content, directory)
    places: dict[str, Place] = {}
    stacked = _stacked(modules, config, content, directory)
    for path, factors in content.updates.items():
        if path in modules:
            kind = _check_factors(modules[path], path, config, factors, directory)
            places[path] = (kind, rank_and_scale(config, path, factors, directory))
    places |= {module: (LoRAExperts, (own,)) for module, own in stacked.items()}
    places |= _tokens(model, modules, config, content, directory)
    for path in content.whole:
        _check_whole(modules[path], path, content, directory)
        places[path] = (TrainedModule, ())
    places |= {path: (TrainedBias, ()) for path in content.biases if path not in places}
    _check_all_there(model, modules, config, content, directory)
    bias = config.get("bias") or "none"
    try:
        settings = LoRAConfig(
            dropout=float(config.get("lora_dropout") or 0.0),
            dora=bool(config.get("use_dora")),
            bias="none" if config.get("lora_bias") and bias == "lora_only" and not content.biases else bias,
            lora_bias=bool(config.get("lora_bias")),
        )
    except ValueError as e:
        raise ValueError(f"{directory / CONFIG}: {e}") from None
    return settings, places


def _gather_whole(modules: Mapping[str, nn.Module], config: Mapping[str, Any], content: Contents) -> None:
    """Brings the tensors of children to the module that was trained whole, where one with children was."""
    for end in config.get("modules_to_save") or ():
        for n in (n for n in modules if n.endswith(end)):
            for path in [p for p in content.whole if p.startswith(n + ".")]:
                inner = {f"{path.removeprefix(n + '.')}.{key}": t for key, t in content.whole.pop(path).items()}
                content.whole.setdefault(n, {}).update(inner)


def _base(module: Any) -> Any:
    return module.base if isinstance(module, Adapted) else module


def _check_factors(
    module: nn.Module, path: str, config: Mapping[str, Any], factors: Mapping[str, Tensor], directory: Path
) -> type[Adapted]:
    """The kind of layer that these factors are for; raises where they do not fit this one."""
    need = {"a", "b"} | ({"m"} if config.get("use_dora") else set()) | ({"c"} if config.get("lora_bias") else set())
    missing = need - set(factors)
    if missing:
        whats = {
            "a": "its factor A",
            "b": "its factor B",
            "c": "the bias of B",
            "m": f"the lengths of its rows ({MAGNITUDE[1:]})",
        }
        raise ValueError(f"{directory}: {path} lacks {whats[min(missing)]}; the file is incomplete")
    if "m" in factors and not config.get("use_dora"):
        raise ValueError(f"{directory}: {path} has lengths of rows (DoRA), and {CONFIG} says use_dora: false")
    if "c" in factors and not config.get("lora_bias"):
        raise ValueError(f"{directory}: {path} has a bias of B, and {CONFIG} says lora_bias: false")
    table = isinstance(module, nn.Embedding | LoRAEmbedding)
    if not table and not is_linear(module):
        raise ValueError(f"{directory}: {path} is {type(module).__name__} here, neither linear nor an embedding")
    n_out, n_in = tuple(_base(module).weight.shape)[::-1] if table else linear_shape(_base(module))
    a, b = factors["a"], factors["b"]
    for key, what in (("m", "lengths"), ("c", "values of a bias")):
        if key in factors and tuple(factors[key].shape) != (n_out,):
            raise ValueError(f"{directory}: {path} has {tuple(factors[key].shape)} {what} for {n_out} rows")
    if a.dim() != 2 or b.dim() != 2 or (a.shape[1], b.shape[0]) != (n_in, n_out) or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"{directory} is for another base: {path} maps {n_in} to {n_out} here, and its factors are "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    return LoRAEmbedding if table else LoRALinear


def _stacked(
    modules: Mapping[str, nn.Module], config: Mapping[str, Any], content: Contents, directory: Path
) -> dict[str, dict[str, tuple[int, float]]]:
    """{module: {parameter: (rank, scale)}} of target_parameters; their factors move to the parameter's name."""
    meant = config.get("target_parameters") or []
    found: dict[str, list[str]] = {}
    for full in parameters_of(modules):
        if any(ends_with(full, t) for t in meant):
            module, _, key = full.rpartition(".")
            found.setdefault(module, []).append(key)
    if meant and not found:
        raise ValueError(f"{directory}: target_parameters={meant} are not in this model; it is for another base")
    out: dict[str, dict[str, tuple[int, float]]] = {}
    for module, keys in found.items():
        base = _base(modules[module])
        for i, key in enumerate(keys):  # the first lies innermost
            factors = content.updates.pop(module + BASE * (len(keys) - 1 - i), {})
            weight = base.get_parameter(key)
            full = f"{module}.{key}"
            if set(factors) != {"a", "b"}:
                raise ValueError(
                    f"{directory}: {full} has {sorted(factors)} of the factors a, b; the file is incomplete"
                )
            transposed = is_transposed(base, weight)
            E, n_out, n_in = expert_shape(weight, transposed)
            rank = rank_and_scale(config, full, factors, directory, E)
            content.updates[full] = _in_todays_layout(
                factors, E, (n_out, n_in), transposed or weight.dim() == 2, version_of(config), f"{directory}: {full}"
            )
            out.setdefault(module, {})[key] = rank
    left = next((path for path in content.updates if BASE in path), None)
    if left:
        raise ValueError(f"{directory}: {left} is of a parameter that target_parameters={meant} does not name")
    return out


def _in_todays_layout(
    factors: Mapping[str, Tensor],
    E: int,
    shape: tuple[int, int],
    same: bool,
    version: tuple[int, int] | None,
    what: str,
) -> dict[str, Tensor]:
    """Stacked factors as peft lays them since 0.19; `same`: where they lay so before."""
    a, b = factors["a"], factors["b"]
    n_out, n_in = shape
    new = a.dim() == b.dim() == 2 and (a.shape[1], b.shape[0]) == (n_in, n_out) and a.shape[0] == b.shape[1]
    old = a.dim() == b.dim() == 2 and (a.shape[1], b.shape[0]) == (n_out, n_in) and a.shape[0] == b.shape[1]
    if not same and version is None and new and old:
        raise ValueError(
            f"{what} is as wide as high, and {CONFIG} has no peft_version, so which factor is which is unknown; add "
            "the version that wrote it"
        )
    if same or version is None or version >= STACKED:
        swap = not same and version is None and old and not new
    else:
        swap = True
    if not (old if swap else new):
        raise ValueError(f"{what} maps {n_in} to {n_out}, and its factors are {tuple(a.shape)} and {tuple(b.shape)}")
    if not swap:
        return {"a": a, "b": b}
    r = a.shape[0] // E
    a, b = a.view(E, r, n_out), b.view(n_in, r, E)  # W[e] + s (B[e] A[e])ᵀ: each factor is the other, turned
    return {"a": b.permute(2, 1, 0).reshape(E * r, n_in), "b": a.permute(2, 1, 0).reshape(n_out, r * E)}


def _tokens(
    model: nn.Module, modules: Mapping[str, nn.Module], config: Mapping[str, Any], content: Contents, directory: Path
) -> dict[str, Place]:
    """Trained tokens: their ids stand in the config, their rows in the file."""
    given = config.get("trainable_token_indices")
    if not given and not content.tokens:
        return {}
    named: dict[str, tuple[int, ...]] = {}
    for path, rows in content.tokens.items():
        ids = given if isinstance(given, list) else None
        if isinstance(given, dict):
            ids = next((v for k, v in given.items() if path.endswith(k)), None)
        if not isinstance(ids, list):
            raise ValueError(f"{directory}: trainable_token_indices={given!r} names no ids for the rows of {path}")
        width = _base(modules[path]).weight.shape[-1]
        if tuple(rows.shape) != (len(ids), width):
            raise ValueError(f"{directory}: {path} has rows {tuple(rows.shape)} for {len(ids)} tokens of width {width}")
        order = sorted(range(len(ids)), key=ids.__getitem__)
        named[path], content.tokens[path] = tuple(sorted(ids)), rows[order]
    places = token_places(model, modules, named)
    wanted = list(given) if isinstance(given, dict) else []
    empty = [k for k in wanted if not any(path.endswith(k) for path in places)]
    if not named or empty:
        raise ValueError(
            f"{directory} is incomplete: trainable_token_indices={given!r}, and there are no rows for that"
        )
    return places


def _check_tables(modules: Mapping[str, nn.Module], content: Contents, directory: Path) -> None:
    """peft stores an adapted table whole beside its factors: it must be this base's."""
    for path in [p for p in content.whole if p.endswith(BASE)]:
        layer = _base(modules[path.replace(BASE, "")])
        for key, value in content.whole.pop(path).items():
            own = dict(layer.named_parameters()).get(key)
            if own is None or not torch.equal(value.to(own.dtype), own.detach().cpu()):
                raise ValueError(f"{directory}: {path}.{key} differs from this base's; it is for another base")


def _sort_biases(
    modules: Mapping[str, nn.Module], config: Mapping[str, Any], content: Contents, directory: Path
) -> None:
    """Moves biases that stand alone in the file, as bias="all" has them, from the whole modules to the biases."""
    kind = config.get("bias") or "none"
    saved = config.get("modules_to_save") or []
    for path in [p for p, own in content.whole.items() if set(own) == {"bias"}]:
        alone = set(_base(modules[path]).state_dict()) != {"bias"} and not any(ends_with(path, s) for s in saved)
        if alone and kind != "none":
            content.biases[path] = content.whole.pop(path)["bias"]
    for path, value in content.biases.items():
        base = _base(modules[path])
        own = base._parameters.get("bias") if not isinstance(modules[path], TrainedModule) else None
        if kind == "none":
            raise ValueError(f"{directory}: {path} has a trained bias, and {CONFIG} says bias: none")
        if own is None or not (is_linear(base) or isinstance(base, nn.LayerNorm)) or value.shape != own.shape:
            raise ValueError(
                f"{directory} is for another base: it has a bias {tuple(value.shape)} of {path}, which is "
                f"{type(base).__name__} here, {'without one' if own is None else f'with {tuple(own.shape)}'}"
            )
    if kind != "none":
        every = {n for n, m in modules.items() if _base(m)._parameters.get("bias") is not None}
        inside = {n for n in every if any(n == w or n.startswith(w + ".") for w in content.whole)}
        learned = every - inside if kind == "all" else every & set(content.updates)
        bare = sorted(learned - set(content.biases))
        if bare:
            raise ValueError(f"{directory} is incomplete: {CONFIG} says bias: {kind}, and {bare[0]}'s is not there")


def _check_whole(module: nn.Module, path: str, content: Contents, directory: Path) -> None:
    module = _base(module)
    want = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    got = {key: tuple(value.shape) for key, value in content.whole[path].items()}
    if want != got:
        raise ValueError(f"{directory}: {path} has {want} here, and the file has {got}")


def _check_all_there(
    model: nn.Module, modules: Mapping[str, nn.Module], config: Mapping[str, Any], content: Contents, directory: Path
) -> None:
    held = {f"{path}.{key}" for path, own in content.whole.items() for key in own}
    for end in config.get("modules_to_save") or ():
        for n in (n for n in modules if n.endswith(end)):
            lacks = [key for key in _base(modules[n]).state_dict() if f"{n}.{key}" not in held]
            if lacks:
                raise ValueError(
                    f"{directory} is incomplete: {CONFIG} has {n} trained whole, and its {lacks[0]} is not there"
                )
    means = peft_means(model, config)
    fit = {n for n, m in modules.items() if is_linear(m) or isinstance(m, nn.Embedding | LoRAEmbedding)}
    meant = {n for n in fit if means(n)}
    # as in peft, a module that is trained whole needs no factors, nor do its children
    whole = {n for n in meant if any(n == path or n.startswith(f"{path}.") for path in content.whole)}
    empty = sorted(meant - set(content.updates) - whole)
    if empty:
        raise ValueError(
            f"{directory} is incomplete: {CONFIG} means {len(meant)} layers, and {len(empty)} of them, such as "
            f"{empty[0]!r}, have no tensors"
        )


def peft_means(model: nn.Module, config: Mapping[str, Any]) -> Callable[[str], bool]:
    """peft's rule for whether target_modules means a linear layer or embedding of that name."""

    def named(target: Any, name: str) -> bool:
        if isinstance(target, str):
            return re.fullmatch(target, name) is not None
        return any(ends_with(name, t) for t in target or ())

    targets, out = config.get("target_modules"), config.get("exclude_modules")
    if config.get("layers_to_transform") is not None:
        return lambda name: False  # a choice by layer number is left to the file's own tensors
    if targets == "all-linear":
        left, modules = heads(model), candidates(model)
        return lambda name: name not in left and is_linear(modules[name]) and not (out and named(out, name))
    return lambda name: named(targets, name) and not (out and named(out, name))
