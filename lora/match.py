"""Which modules a pattern means: names, last parts of names, globs, and "all-linear" by structure."""

import difflib
import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from lora.layer import Adapted, is_linear


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by dotted name, shared ones under each of their names, insides of adapted layers left out."""
    inside: list[str] = []
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, Adapted):
            inside.append(name + ".")
        if name:
            found[name] = module
    return found


def matches(name: str, pattern: str) -> bool:
    """A pattern is a full name, the last parts of one, or a glob over the full name."""
    return name == pattern or name.endswith("." + pattern) or fnmatch.fnmatchcase(name, pattern)


def select(names: Iterable[str], patterns: Sequence[str], what: str, everything: Iterable[str] = ()) -> list[str]:
    """The names that any pattern means, in order. Every pattern must mean at least one.

    Raises ValueError with the nearest names, or, where the pattern means a module of another kind (one of
    `everything`), with that.
    """
    names = list(names)
    for pattern in patterns:
        if any(matches(name, pattern) for name in names):
            continue
        other = [name for name in everything if matches(name, pattern)]
        if other:
            raise ValueError(
                f"{what}={pattern!r} means {len(other)} modules such as {other[0]!r}, but none that can be adapted: "
                "an adapter goes on a linear layer or an embedding"
            )
        parts = sorted({name.rpartition(".")[2] for name in names})
        near = difflib.get_close_matches(pattern.rpartition(".")[2], parts, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(parts[:12])}"
        raise ValueError(f"{what}={pattern!r} matches no module; {hint}")
    return [name for name in names if any(matches(name, pattern) for pattern in patterns)]


def shared_storage(model: nn.Module) -> dict[int, list[str]]:
    """Names of modules by the address of their weight, for weights that more than one module holds (ties)."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.device.type != "meta":
            users.setdefault(weight.data_ptr(), []).append(name)
    return {address: names for address, names in users.items() if len(names) > 1}


def input_table(model: nn.Module) -> str | None:
    """The name of the embedding that reads token ids: by the model's word, else the only one, or that of vocab_size."""
    modules: dict[str, Any] = {n: m.base if isinstance(m, Adapted) else m for n, m in candidates(model).items()}
    ask: Any = getattr(model, "get_input_embeddings", None) or getattr(model, "embedding", None)
    table = ask() if callable(ask) else None
    table = table.base if isinstance(table, Adapted) else table
    tables = {n: m for n, m in modules.items() if isinstance(m, nn.Embedding)}
    if not any(m is table for m in tables.values()):
        size = getattr(getattr(model, "config", None), "vocab_size", None)
        fit = list(tables) if len(tables) == 1 else [n for n, m in tables.items() if m.num_embeddings == size]
        return fit[0] if len(fit) == 1 else None
    return next(n for n, m in tables.items() if m is table)


def heads(model: nn.Module) -> set[str]:
    """Names of the layers that "all-linear" leaves out: all in the heads of an encoder of ours, or the output head."""
    named = getattr(model, "class_heads", None)
    if named is None:
        return {head} if (head := output_head(model)) else set()
    return {name for name in candidates(model) if any(part in named for part in name.split("."))}


def output_head(model: nn.Module) -> str | None:
    """The name of the layer that makes logits, by structure; None where there is no such thing.

    It is what a transformers model names in get_output_embeddings, or the linear layer that shares its weight
    with an embedding, or one with as many outputs as an embedding has rows.
    """
    if getattr(model, "class_heads", None) is not None:  # one of our encoders
        return None
    modules: dict[str, Any] = {name: m.base if isinstance(m, Adapted) else m for name, m in candidates(model).items()}
    ask: Any = getattr(model, "get_output_embeddings", None)
    try:
        head = ask() if callable(ask) else None
    except NotImplementedError:  # transformers' answer for a model without one
        head = None
    if isinstance(head, Adapted):
        head = head.base
    tables = [m for m in modules.values() if isinstance(m, nn.Embedding)]
    linears: list[tuple[str, Any]] = [(name, m) for name, m in modules.items() if is_linear(m)]
    for name, m in linears:
        if m is head:
            return name
    for name, m in linears:
        if any(m.weight.data_ptr() == t.weight.data_ptr() and m.weight.device.type != "meta" for t in tables):
            return name
    for name, m in reversed(linears):
        if any(getattr(m, "out_features", 0) == t.num_embeddings for t in tables):
            return name
    return None
