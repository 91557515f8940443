"""Adapters in files: peft's format, written and read. The only place that knows peft's names.

    adapter_config.json            r, lora_alpha, target_modules, ...
    adapter_model.safetensors      base_model.model.<module>.lora_A.weight (r, in), .lora_B.weight (out, r);
                                   .lora_embedding_A (r, vocab), .lora_embedding_B (dim, r);
                                   <module>.<parameter> of whole trained modules

Reading is a bijection check: every tensor in the file finds its place, and every layer that the config means
finds its tensors, or nothing is attached.  Source: peft 0.21, utils/save_and_load.py and tuners/lora.
"""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora.config import LoRAConfig
from lora.files import new_directory, read_json, sort_metadata
from lora.fingerprint import KEY, check, fingerprint
from lora.layer import Adapted, LoRAEmbedding, TrainedModule, adapted, is_linear, linear_shape
from lora.match import candidates, heads, output_head
from lora.wrap import adapter_names, add_adapter, check_name, detach, is_merged

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
MAGNITUDE = ".lora_magnitude_vector"
_KINDS = {
    MAGNITUDE: "m",
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
}


# ---- save ----
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
    tensors = {key: value.detach().contiguous().cpu() for key, value in _tensors(layers, name).items()}
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


def _tensors(layers: Mapping[str, Adapted], name: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        part = layer.adapters[name]
        if isinstance(layer, TrainedModule):
            tensors |= {f"{PREFIX}{path}.{key}": value for key, value in part.state_dict().items()}
        elif isinstance(layer, LoRAEmbedding):
            tensors |= {f"{PREFIX}{path}.lora_embedding_A": part.a, f"{PREFIX}{path}.lora_embedding_B": part.b}
        else:
            tensors |= {f"{PREFIX}{path}.lora_A.weight": part.a, f"{PREFIX}{path}.lora_B.weight": part.b}
            if part.magnitude is not None:
                tensors[f"{PREFIX}{path}{MAGNITUDE}"] = part.magnitude
    return tensors


def _config(model: nn.Module, layers: Mapping[str, Adapted], name: str, base: str | None) -> dict[str, Any]:
    """peft's config. Scales are written as alpha / r, which every loader reads alike (rsLoRA is not)."""
    low_rank = {path: layer.adapters[name] for path, layer in layers.items() if not isinstance(layer, TrainedModule)}
    whole = [path for path, layer in layers.items() if isinstance(layer, TrainedModule)]
    ranks = [part.r for part in low_rank.values()]
    r = max(set(ranks), key=ranks.count) if ranks else 1
    alphas = {path: _plain(part.scale * part.r) for path, part in low_rank.items()}
    alpha = max(set(alphas.values()), key=list(alphas.values()).count) if alphas else 1
    dropouts = {part.dropout for part in low_rank.values()}
    from_transformers = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    conv = any(hasattr(layer.base, "nf") for layer in layers.values())
    return {
        "peft_type": "LORA",
        "task_type": getattr(model, "peft_task", None) or ("CAUSAL_LM" if output_head(model) else None),
        "base_model_name_or_path": base or from_transformers,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": max(dropouts, default=0.0),
        "target_modules": target_suffixes(model, list(low_rank)),
        "rank_pattern": {_pattern_key(path, model): part.r for path, part in low_rank.items() if part.r != r},
        "alpha_pattern": {_pattern_key(path, model): a for path, a in alphas.items() if a != alpha},
        "use_rslora": False,
        "use_dora": any(part.magnitude is not None for part in low_rank.values()),
        "modules_to_save": sorted({_suffix(path, model) for path in whole}) or None,
        "bias": "none",
        "fan_in_fan_out": conv,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _plain(x: float) -> float | int:
    """64.0 as 64, and a product that missed a whole number by rounding put back on it."""
    return round(x) if abs(x - round(x)) < 1e-9 * max(1.0, abs(x)) else x


def _pattern_key(path: str, model: nn.Module) -> str:
    """A key of rank_pattern or alpha_pattern that means `path` alone; peft takes it as a regex on the name's end."""
    also = any(name.endswith("." + path) for name in candidates(model))
    return f"^{re.escape(path)}" if also else path


def _suffix(path: str, model: nn.Module) -> str:
    """The shortest last part of a module's name that means this module alone, as peft matches (by ending)."""
    parts = path.split(".")
    names = list(candidates(model))
    for k in range(1, len(parts) + 1):
        suffix = ".".join(parts[-k:])
        if [n for n in names if n == suffix or n.endswith("." + suffix)] == [path]:
            return suffix
    return path


def target_suffixes(model: nn.Module, paths: Sequence[str]) -> list[str] | str:
    """The shortest list of last parts that means exactly `paths` under peft's rule, else the full names.

    Where a full name is also the end of another, the list would mean both; then a regex, which peft matches whole.
    """
    modules = candidates(model)

    def exact(ends: Sequence[str]) -> bool:
        return {n for n in modules if any(n == s or n.endswith("." + s) for s in ends)} == set(paths)

    short = sorted({path.rpartition(".")[2] for path in paths})
    if exact(short):
        return short
    return sorted(paths) if exact(paths) else "|".join(re.escape(path) for path in sorted(paths))


# ---- attach ----
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
    model in another precision is said in a warning.

    Raises FileNotFoundError, or ValueError naming the culprit: a pickled file, a damaged file, a kind of adapter
    we do not have, tensors that fit no layer (an adapter for another base, a wrong prefix), layers without their
    tensors, other shapes.  On an error the model is as before.
    """
    directory, name = Path(directory), name or "default"
    config, tensors = read_adapter(directory)
    parts, whole = sort_adapter(tensors, directory)
    modules = candidates(model)
    _check_places(model, modules, config, parts, whole, directory)
    plan = {path: rank_and_scale(config, path, factors, directory) for path, factors in parts.items()}
    settings = LoRAConfig(dropout=float(config.get("lora_dropout") or 0.0), dora=bool(config.get("use_dora")))
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    add_adapter(model, name, settings, plan, list(whole))
    try:
        for path, layer in adapted(model):
            if name not in layer.adapters:
                continue
            part = layer.adapters[name]
            if isinstance(layer, TrainedModule):
                part.load_state_dict(whole[path])
            else:
                with torch.no_grad():
                    part.a.copy_(parts[path]["a"])
                    part.b.copy_(parts[path]["b"])
                    if part.magnitude is not None:
                        part.magnitude.copy_(parts[path]["m"])
            part.requires_grad_(trainable)
        sketch = metadata_of(directory).get(KEY)
        if sketch and not any_base:
            told = check({n: layer for n, layer in adapted(model) if name in layer.adapters}, sketch, str(directory))
            if told:
                warnings.warn(told, stacklevel=2)
    except Exception:
        detach(model, name)
        for p in model.parameters():
            p.requires_grad_(id(p) not in frozen)
        raise
    return model


def read_adapter(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of an adapter folder; raises as `attach` says."""
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a folder; an adapter is a folder with {CONFIG} and {WEIGHTS}")
    if not (directory / WEIGHTS).is_file():
        if (directory / "adapter_model.bin").is_file():
            raise ValueError(
                f"{directory}/adapter_model.bin is a pickle, which can run code when read; load and save it once with "
                f"peft's safe_serialization=True to get {WEIGHTS}"
            )
        raise FileNotFoundError(f"{directory} holds no {WEIGHTS}")
    if not (directory / CONFIG).is_file():
        raise FileNotFoundError(f"{directory} holds no {CONFIG}, so rank and scale are unknown")
    config = read_json(directory / CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{directory / CONFIG}: peft_type is {kind!r}; only 'LORA' can be attached")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float):
            raise ValueError(f"{directory / CONFIG}: {key} is {config.get(key)!r}, which must be a number")
    for key, fine in (("bias", ("none", None)), ("lora_bias", (False, None))):
        if config.get(key) not in fine:
            raise ValueError(f"{directory / CONFIG}: {key}={config[key]!r} is not supported yet; only plain LoRA is")
    try:
        tensors = load_file(directory / WEIGHTS)
    except SafetensorError as e:
        raise ValueError(f"{directory / WEIGHTS} is damaged or cut short ({e})") from None
    if not tensors:
        raise ValueError(f"{directory / WEIGHTS} holds no tensors")
    for key, value in tensors.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{directory / WEIGHTS}: {key} holds NaN or inf")
    return config, tensors


def metadata_of(directory: Path) -> dict[str, str]:
    """What an adapter's tensor file says about itself."""
    with safe_open(directory / WEIGHTS, framework="pt") as f:
        return f.metadata() or {}


def sort_adapter(
    tensors: dict[str, Tensor], directory: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """Tensors of an adapter file by module: the two factors of each update, and the tensors of whole modules."""
    parts: dict[str, dict[str, Tensor]] = {}
    loose: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if not key.startswith(PREFIX):
            raise ValueError(
                f"{directory / WEIGHTS}: {key!r} does not start with {PREFIX!r}; this is not a peft adapter"
            )
        path = key.removeprefix(PREFIX)
        kind = next((k for k in _KINDS if path.endswith(k)), None)
        if kind:
            parts.setdefault(path.removesuffix(kind), {})[_KINDS[kind]] = value
        elif "lora_" in path or "token_adapter" in path:
            raise ValueError(f"{directory / WEIGHTS}: {key!r} is a kind of adapter tensor that is not supported yet")
        else:
            module, _, parameter = path.rpartition(".")
            loose.setdefault(module, {})[parameter] = value
    return parts, loose


def _check_places(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    config: Mapping[str, Any],
    parts: Mapping[str, dict[str, Tensor]],
    whole: dict[str, dict[str, Tensor]],
    directory: Path,
) -> None:
    """Every tensor has a place of its shape, and every place that the config means has its tensors."""
    if is_merged(model):
        raise RuntimeError("this model is merged; call lora.unmerge(model) before attaching an adapter")
    lost = sorted(path for path in (*parts, *whole) if path.removesuffix(".base_layer") not in modules)
    if lost:
        raise ValueError(
            f"{directory} is for another base: {len(lost)} of its {len(parts) + len(whole)} layers, such as "
            f"{lost[0]!r}, are not in {type(model).__name__}"
        )
    for path, factors in parts.items():
        module = modules[path]
        missing = ({"a", "b", "m"} if config.get("use_dora") else {"a", "b"}) - set(factors)
        if missing:
            what = {"a": "its factor A", "b": "its factor B", "m": f"the lengths of its rows ({MAGNITUDE[1:]})"}
            raise ValueError(f"{directory}: {path} lacks {what[min(missing)]}; the file is incomplete")
        if "m" in factors and not config.get("use_dora"):
            raise ValueError(f"{directory}: {path} has lengths of rows (DoRA), and {CONFIG} says use_dora: false")
        table = isinstance(module, nn.Embedding | LoRAEmbedding)
        if not table and not is_linear(module):
            raise ValueError(f"{directory}: {path} is {type(module).__name__} here, neither linear nor an embedding")
        layer: Any = module.base if isinstance(module, Adapted) else module
        n_out, n_in = tuple(layer.weight.shape)[::-1] if table else linear_shape(layer)
        a, b = factors["a"], factors["b"]
        if "m" in factors and tuple(factors["m"].shape) != (n_out,):
            raise ValueError(f"{directory}: {path} has {tuple(factors['m'].shape)} lengths for {n_out} rows")
        if (a.shape[1], b.shape[0]) != (n_in, n_out) or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"{directory} is for another base: {path} maps {n_in} to {n_out} here, and its factors are "
                f"{tuple(a.shape)} and {tuple(b.shape)}"
            )
    for path in [
        p for p in whole if p.endswith(".base_layer")
    ]:  # peft stores an adapted table whole beside its factors
        layer = modules[path.removesuffix(".base_layer")]
        layer = layer.base if isinstance(layer, Adapted) else layer
        for key, value in whole.pop(path).items():
            if not torch.equal(value.to(layer.get_parameter(key).dtype), layer.get_parameter(key).detach().cpu()):
                raise ValueError(f"{directory}: {path}.{key} differs from this base's; it is for another base")
    for path in whole:
        module = modules[path]
        module = module.base if isinstance(module, TrainedModule) else module
        want = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        got = {key: tuple(value.shape) for key, value in whole[path].items()}
        if want != got:
            raise ValueError(f"{directory}: {path} has {want} here, and the file has {got}")
    meant = {
        n
        for n, m in modules.items()
        if (is_linear(m) or isinstance(m, nn.Embedding | LoRAEmbedding)) and _peft_means(model, config, n)
    }
    empty = sorted(meant - set(parts) - set(whole))  # as in peft, a module that is trained whole needs no factors
    if empty:
        raise ValueError(
            f"{directory} is incomplete: {CONFIG} means {len(meant)} layers, and {len(empty)} of them, such as "
            f"{empty[0]!r}, have no tensors"
        )


def _peft_means(model: nn.Module, config: Mapping[str, Any], name: str) -> bool:
    """peft's rule for whether target_modules means module `name`."""

    def means(target: Any) -> bool:
        if isinstance(target, str):
            return re.fullmatch(target, name) is not None
        return any(name == t or name.endswith("." + t) for t in target or ())

    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if layers is not None or config.get("exclude_modules") and means(config["exclude_modules"]):
        return False  # a choice by layer number is left to the file's own tensors
    if targets == "all-linear":
        return name not in heads(model) and is_linear(candidates(model)[name])
    return means(targets)


def rank_and_scale(
    config: Mapping[str, Any], path: str, factors: Mapping[str, Tensor], directory: Path
) -> tuple[int, float]:
    """Rank and scale of one update by peft's config. Raises ValueError where the factors have another rank."""
    r = factors["a"].shape[0]
    want = pattern_of(config.get("rank_pattern"), path, config["r"])
    if r != want:
        raise ValueError(f"{directory}: {path} has factors of rank {r}, and {CONFIG} says {want}")
    alpha = float(pattern_of(config.get("alpha_pattern"), path, config["lora_alpha"]))
    return r, LoRAConfig(r=r, alpha=alpha, rslora=bool(config.get("use_rslora"))).scale(r, alpha)


def pattern_of(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """peft's rule for rank_pattern and alpha_pattern: the first key that ends the name."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default
