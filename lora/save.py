"""save: one adapter as a folder in peft's format (format.py), which peft, vLLM and `attach` read.

What is written is the plain LoRA that each update is (adapter.py): a PiSSA adapter as one of twice its rank against
the unchanged base, an update of parts of a fused projection as one of the ranks' sum.  Attached again, it is that
plain LoRA, and trained further it trains all of it.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora.experts import LoRAExperts
from lora.files import new_directory, sort_metadata
from lora.fingerprint import KEY, fingerprint
from lora.format import BASE, BIAS_B, CONFIG, LINEAR, MAGNITUDE, PREFIX, STACKED, TABLE, TOKENS, WEIGHTS, ends_with
from lora.layer import Adapted, LoRAEmbedding, TrainedBias, TrainedModule, adapted, updates
from lora.match import candidates, output_head, shared_storage
from lora.places import parameters_of
from lora.vocab import TrainedTokens
from lora.wrap import adapter_names, check_name


def save(model: nn.Module, directory: str | Path, name: str | None = None, *, base: str | None = None) -> Path:
    """Writes one adapter as a folder that peft, vLLM and we can load; returns the folder.

    `name` may be left out when the model has one adapter; `base` is what the config names as the base model.

    Raises FileExistsError where the folder holds something, KeyError for an unknown name, ValueError when the
    adapter holds NaN or inf or there is more than one and no name was given.
    """
    names = adapter_names(model)
    if not names:
        raise ValueError("this model has no adapter to save; call lora.wrap or lora.attach first")
    if name is None:
        if len(names) > 1:
            raise ValueError(f"this model has adapters {names}; say which one to save with name=...")
        name = names[0]
    check_name(model, name)
    layers = {n: layer for n, layer in adapted(model) if name in layer.adapters}
    tensors = {key: value.detach().contiguous().cpu() for key, value in _tensors(model, layers, name).items()}
    for key, value in tensors.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"adapter {name!r} is broken: {key} holds NaN or inf; nothing was written")
    config = _config(model, layers, name, base)
    with new_directory(Path(directory)) as folder:
        # "format" is what peft itself writes; loaders refuse a file without it
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", KEY: fingerprint(layers)})
        sort_metadata(folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Path(directory)


def _tensors(model: nn.Module, layers: Mapping[str, Adapted], name: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    tied = _followers(model)
    for path, layer in layers.items():
        part, at = layer.adapters[name], PREFIX + path
        if isinstance(layer, TrainedModule):
            tensors |= {f"{at}.{key}": value for key, value in part.state_dict().items()}
        elif isinstance(layer, TrainedTokens):
            if path not in tied:
                tensors[at + TOKENS] = part.rows
        elif isinstance(layer, TrainedBias):
            tensors[f"{at}.bias"] = part.value
        elif isinstance(layer, LoRAExperts):
            # as peft nests them: the module's first adapted parameter lies innermost
            order = [key for key, _ in layer.base.named_parameters(recurse=False) if key in part]
            for depth, key in enumerate(reversed(order)):
                tensors |= {at + BASE * depth + end: t for end, t in zip(LINEAR, part[key].factors(), strict=True)}
        else:
            ends = TABLE if isinstance(layer, LoRAEmbedding) else LINEAR
            tensors |= {at + end: t for end, t in zip(ends, part.factors(), strict=True)}
            if part.magnitude is not None:
                tensors[at + MAGNITUDE] = part.magnitude
            if part.bias is not None:
                tensors[at + (BIAS_B if part.bias.start is None else BASE + ".bias")] = part.bias.value
    return tensors


def _followers(model: nn.Module) -> set[str]:
    """Layers of trained tokens whose rows are stored under a layer that they are tied to."""
    groups = [[n.removesuffix(".base") for n in names] for names in shared_storage(model).values()]
    kinds = dict(adapted(model))
    ours = [[n for n in names if isinstance(kinds.get(n), TrainedTokens)] for names in groups]
    return {n for names in ours for n in sorted(names, key=lambda n: not isinstance(kinds[n].base, nn.Embedding))[1:]}


def _config(model: nn.Module, layers: Mapping[str, Adapted], name: str, base: str | None) -> dict[str, Any]:
    """peft's config. Scales are written as alpha / r, which every loader reads alike (rsLoRA is not)."""
    modules = candidates(model)
    parts = {path: part for path, adapter, part in updates(model) if adapter == name}
    stacked = [path for path in parts if path not in layers]
    linear = [path for path in parts if path in layers]
    tied = _followers(model)
    tokens = {
        _suffix(path, modules): layer.adapters[name].index.tolist()
        for path, layer in layers.items()
        if isinstance(layer, TrainedTokens) and path not in tied
    }
    whole = [path for path, layer in layers.items() if isinstance(layer, TrainedModule)]
    ranks = [part.rank for part in parts.values()]
    r = max(set(ranks), key=ranks.count) if ranks else 1
    alphas = {path: _plain(part.scale * part.rank) for path, part in parts.items()}
    alpha = max(set(alphas.values()), key=list(alphas.values()).count) if alphas else 1
    biases = [part.bias for part in parts.values() if part.bias is not None]
    every = any(isinstance(layer, TrainedBias) for layer in layers.values())
    known = [*modules, *stacked]
    from_transformers = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    return {
        "peft_type": "LORA",
        "peft_version": "{}.{}.0".format(*STACKED),
        "task_type": getattr(model, "peft_task", None) or ("CAUSAL_LM" if output_head(model) else None),
        "base_model_name_or_path": base or from_transformers,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": max((part.dropout for part in parts.values()), default=0.0),
        "target_modules": target_suffixes(modules, linear),
        "target_parameters": target_suffixes(parameters_of(modules), stacked) or None,
        "rank_pattern": {_pattern_key(path, known): part.rank for path, part in parts.items() if part.rank != r},
        "alpha_pattern": {_pattern_key(path, known): a for path, a in alphas.items() if a != alpha},
        "use_rslora": False,
        "use_dora": any(part.magnitude is not None for part in parts.values()),
        "modules_to_save": sorted({_suffix(path, modules) for path in whole}) or None,
        "trainable_token_indices": tokens or None,
        "bias": "all" if every else "lora_only" if any(b.start is not None for b in biases) else "none",
        "lora_bias": any(b.start is None for b in biases),
        "fan_in_fan_out": any(hasattr(layer.base, "nf") for layer in layers.values()),
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _plain(x: float) -> float | int:
    """64.0 as 64, and a product that missed a whole number by rounding put back on it."""
    return round(x) if abs(x - round(x)) < 1e-9 * max(1.0, abs(x)) else x


def _pattern_key(path: str, names: Iterable[str]) -> str:
    """A key of rank_pattern or alpha_pattern that means `path` alone; peft takes it as a regex on the name's end."""
    also = any(name.endswith("." + path) for name in names)
    return f"^{re.escape(path)}" if also else path


def _suffix(path: str, names: Iterable[str]) -> str:
    """The shortest last parts of a module's name that mean it alone where any ending does, as in peft's lists of these.

    ("norm" would mean input_layernorm too.)
    """
    parts = path.split(".")
    names = list(names)
    for k in range(1, len(parts) + 1):
        suffix = ".".join(parts[-k:])
        if [n for n in names if n.endswith(suffix)] == [path]:
            return suffix
    return path


def target_suffixes(names: Iterable[str], paths: Sequence[str]) -> list[str] | str:
    """The shortest list of last parts that means exactly `paths` of all `names` under peft's rule, else the full names.

    Where a full name is also the end of another, the list would mean both; then a regex, which peft matches whole.
    """
    names = list(names)

    def exact(ends: Sequence[str]) -> bool:
        return {n for n in names if any(ends_with(n, s) for s in ends)} == set(paths)

    short = sorted({path.rpartition(".")[2] for path in paths})
    if exact(short):
        return short
    return sorted(paths) if exact(paths) else "|".join(re.escape(path) for path in sorted(paths))
