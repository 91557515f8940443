"""attach: an adapter folder, peft's or ours, onto a model; swap: into an adapter that stands there already.

Reading is a bijection check (landing.py): every tensor in the file finds its place, and every layer that the config
means finds its tensors, or nothing is attached.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora.experts import LoRAExperts
from lora.fingerprint import KEY, check
from lora.format import Contents, metadata_of, rank_and_scale, read_adapter, sort_adapter
from lora.init import init_pissa
from lora.landing import land
from lora.layer import Adapted, LoRAEmbedding, LoRALinear, TrainedBias, TrainedModule, adapted
from lora.vocab import TrainedTokens
from lora.wrap import add_adapter, check_name, detach, is_merged


def attach(
    model: nn.Module,
    directory: str | Path,
    name: str | None = None,
    trainable: bool = False,
    *,
    any_base: bool = False,
) -> nn.Module:
    """Loads an adapter folder, peft's or ours, onto the model, in place; it becomes the active one.

    `name` is what it will be called here ("default" when left out).  With `trainable` it can be trained further.
    An adapter saved by us knows its base (fingerprint.py): another model is refused unless `any_base`; the same
    model in another precision is said in a warning.  No random number is drawn.

    Raises FileNotFoundError, or ValueError naming the culprit: a pickled file, a damaged file, a kind of adapter
    we do not have, tensors that fit no layer (an adapter for another base, a wrong prefix), layers without their
    tensors, other shapes.  On an error the model is as before.
    """
    directory, name = Path(directory), name or "default"
    config, tensors = read_adapter(directory)
    content = sort_adapter(tensors, directory)
    settings, places = land(model, config, content, directory)
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    add_adapter(model, name, settings, places, fresh=False)
    try:
        for path, layer in adapted(model):
            if name in layer.adapters:
                _fill(layer, layer.adapters[name], path, content)
                layer.adapters[name].requires_grad_(trainable)
        if config.get("init_lora_weights") == "pissa":
            _begin_as_pissa(model, name)
        _check_base(model, name, directory, any_base)
    except Exception:
        detach(model, name)
        for p in model.parameters():
            p.requires_grad_(id(p) not in frozen)
        raise
    return model


@torch.no_grad()
def _fill(layer: Adapted, part: Any, path: str, content: Contents) -> None:
    """Copies the file's tensors into an adapter of one layer."""
    if isinstance(layer, TrainedModule):
        part.load_state_dict(content.whole[path])
    elif isinstance(layer, TrainedTokens):
        if path in content.tokens:  # a tied layer's rows are stored once
            part.rows.copy_(content.tokens[path])
    elif isinstance(layer, TrainedBias):
        part.value.copy_(content.biases[path])
    elif isinstance(layer, LoRAExperts):
        for key, update in part.items():
            update.a.copy_(content.updates[f"{path}.{key}"]["a"])
            update.b.copy_(content.updates[f"{path}.{key}"]["b"])
    else:
        factors = content.updates[path]
        part.a.copy_(factors["a"])
        part.b.copy_(factors["b"])
        if part.magnitude is not None:
            part.magnitude.copy_(factors["m"])
        if part.bias is not None:
            part.bias.value.copy_(factors["c"] if part.bias.start is None else content.biases[path])


def _begin_as_pissa(model: nn.Module, name: str) -> None:
    """peft's own PiSSA files hold A and B against the residual, which their loader makes from the base: so do we."""
    for path, layer in adapted(model):
        if name not in layer.adapters:
            continue
        part = layer.adapters[name]
        if isinstance(layer, LoRALinear):
            part.a0, part.b0 = torch.empty_like(part.a), torch.empty_like(part.b)
            init_pissa(part.a0, part.b0, part.scale, layer.base, "pissa")
        elif not isinstance(layer, TrainedModule | TrainedBias | TrainedTokens):
            raise ValueError(f"{path} is {type(layer).__name__}, and PiSSA is for linear layers")


def _check_base(model: nn.Module, name: str, directory: Path, any_base: bool) -> None:
    sketch = metadata_of(directory).get(KEY)
    if sketch and not any_base:
        told = check({n: layer for n, layer in adapted(model) if name in layer.adapters}, sketch, str(directory))
        if told:
            warnings.warn(told, stacklevel=3)


@torch.no_grad()
def swap(model: nn.Module, directory: str | Path, name: str = "default", *, any_base: bool = False) -> nn.Module:
    """Puts the adapter of a folder into the tensors of adapter `name`, in place: what was compiled or recorded stays.

    The new one may have a lower rank (the rest is zero) and any scale (its ratio goes into B), and may lack layers that
    `name` is on (their update is zero there).

    Raises ValueError, with the model as before, for a rank or a layer that `name` has not, other shapes, and kinds
    that are more than low-rank updates of linear layers and embeddings; KeyError and RuntimeError as `activate` does.
    """
    directory = Path(directory)
    check_name(model, name)
    if is_merged(model):
        raise RuntimeError("this model is merged; call lora.unmerge(model) before swapping an adapter")
    config, tensors = read_adapter(directory)
    content = sort_adapter(tensors, directory)
    layers = {path: layer for path, layer in adapted(model) if name in layer.adapters}
    here = [layer.adapters[name] for layer in layers.values() if isinstance(layer, LoRALinear | LoRAEmbedding)]
    plain = all(set(f) == {"a", "b"} for f in content.updates.values()) and len(content) == len(content.updates)
    own = len(here) == len(layers) and all(part.is_plain() for part in here)
    if not plain or not own or config.get("target_parameters") or config.get("init_lora_weights") == "pissa":
        which = f"adapter {name!r}" if not own else str(directory)
        raise ValueError(f"{which} is more than plain low-rank updates, which alone can be swapped; detach and attach")
    made: dict[str, tuple[Tensor, Tensor]] = {}
    for path, factors in content.updates.items():
        if path not in layers:
            raise ValueError(f"{directory} has an update of {path!r}, and adapter {name!r} none; attach it beside")
        part, (a, b) = layers[path].adapters[name], (factors["a"], factors["b"])
        r, scale = rank_and_scale(config, path, factors, directory)
        if (a.shape[1:], b.shape[0]) != (part.a.shape[1:], part.b.shape[0]) or b.shape[1] != r or r > part.r:
            raise ValueError(
                f"{directory}: {path} has factors {tuple(a.shape)} and {tuple(b.shape)}, which do not fit into "
                f"{tuple(part.a.shape)} and {tuple(part.b.shape)} of adapter {name!r}"
            )
        pad = nn.functional.pad
        made[path] = pad(a.float(), (0, 0, 0, part.r - r)), pad(b.float() * (scale / part.scale), (0, part.r - r))
    _check_base(model, name, directory, any_base)
    for path, layer in layers.items():
        part = layer.adapters[name]
        a, b = made.get(path, (part.a, torch.zeros_like(part.b)))
        part.a.copy_(a)
        part.b.copy_(b)
    return model
