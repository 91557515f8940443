"""peft's adapter files: their names, and what their settings mean. The only place that knows either.

    adapter_config.json            r, lora_alpha, target_modules, ...
    adapter_model.safetensors      base_model.model.<module> and
        .lora_A.weight (r, in), .lora_B.weight (out, r)         of a linear layer; .lora_B.bias (out,) with lora_bias
        .lora_embedding_A (r, vocab), .lora_embedding_B (dim, r)   of an embedding
        .lora_magnitude_vector (out,)                           DoRA's lengths
        .lora_A.weight (E r, in), .lora_B.weight (out, r E)     of a stacked parameter of the module; where there are
                                                                more, one .base_layer for each that follows it
        .token_adapter.trainable_tokens_delta (n, dim)          rows of tokens (the rows, whatever the name says)
        .base_layer.bias, .bias (out,)                          biases that were trained
        .<parameter>                                            of a whole trained module

Source: peft 0.21, utils/save_and_load.py and tuners/lora.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from lora.config import BIASES, LoRAConfig
from lora.files import read_json

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
BASE = ".base_layer"
LINEAR, TABLE = (".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")
MAGNITUDE, BIAS_B, TOKENS = ".lora_magnitude_vector", ".lora_B.bias", ".token_adapter.trainable_tokens_delta"
STACKED = (0, 19)  # the version of peft from which on factors of stacked parameters are (E r, in), (out, r E)
_KINDS = {MAGNITUDE: "m", LINEAR[0]: "a", LINEAR[1]: "b", TABLE[0]: "a", TABLE[1]: "b", BIAS_B: "c"}
# Settings that change what a file computes, and the values under which they do not
_FINE: dict[str, tuple[Any, ...]] = {
    "bias": (*BIASES, None),
    "alora_invocation_tokens": (None,),
    "layer_replication": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "arrow_config": (None,),
}
_MOVED = ("olora", "corda", "lora_ga", "loftq", "pissa_niter")  # ways to begin that change the base


@dataclass
class Contents:
    """The tensors of an adapter file by module name."""

    updates: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # "a", "b", and where there are "m", "c"
    tables: set[str] = field(default_factory=set)  # those of the updates that are of embeddings
    tokens: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len({*self.updates, *self.tokens, *self.biases, *self.whole})


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
    _check_settings(config, directory / CONFIG)
    for key, fine in _FINE.items():
        if config.get(key) not in fine:
            raise ValueError(f"{directory / CONFIG}: {key}={config[key]!r} is a kind of adapter that there is not here")
    begun = str(config.get("init_lora_weights"))
    if begun.startswith(_MOVED):
        raise ValueError(
            f"{directory / CONFIG}: init_lora_weights={begun!r} stands on a changed base; save it with peft's "
            "path_initial_model_for_weight_conversion, which makes it an adapter of the base"
        )
    try:
        tensors = load_file(directory / WEIGHTS)
    except SafetensorError as e:
        raise ValueError(f"{directory / WEIGHTS} is damaged or cut short ({e})") from None
    if not tensors:
        raise ValueError(f"{directory / WEIGHTS} holds no tensors")
    for key, value in tensors.items():
        if not value.is_floating_point():
            raise ValueError(f"{directory / WEIGHTS}: {key} holds {value.dtype}, and factors are floating numbers")
        if not torch.isfinite(value).all():
            raise ValueError(f"{directory / WEIGHTS}: {key} holds NaN or inf")
    return config, tensors


def _check_settings(config: Mapping[str, Any], file: Path) -> None:
    """Raises ValueError for a setting that is of no kind that it may be."""

    def names(value: Any) -> bool:
        return value is None or isinstance(value, str) or _is_list(value, str)

    def numbers(value: Any) -> bool:
        fine = isinstance(value, dict) and all(_is_regex(k) and _is_number(v) for k, v in value.items())
        return value is None or fine

    def tokens(value: Any) -> bool:
        ids = value.values() if isinstance(value, dict) else [value]
        return value is None or all(_is_list(i, int) and all(t >= 0 for t in i) and len(set(i)) == len(i) for i in ids)

    for keys, fine, what in (
        (("r", "lora_alpha"), _is_number, "a number"),
        (("lora_dropout",), lambda v: v is None or _is_number(v), "a number"),
        (("use_rslora", "use_dora", "lora_bias"), lambda v: v is None or isinstance(v, bool), "true or false"),
        (("target_modules", "exclude_modules"), lambda v: names(v) and (type(v) is not str or _is_regex(v)), "names"),
        (("modules_to_save", "target_parameters"), lambda v: v is None or _is_list(v, str), "a list of names"),
        (("rank_pattern", "alpha_pattern"), numbers, "numbers by pattern (regex)"),
        (("trainable_token_indices",), tokens, "lists of token ids, each once"),
        (("peft_version",), lambda v: v is None or isinstance(v, str), "text"),
    ):
        for key in keys:
            if not fine(config.get(key)):  # type: ignore[no-untyped-call]
                raise ValueError(f"{file}: {key} is {config.get(key)!r}, which must be {what}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _is_regex(value: str) -> bool:
    try:
        re.compile(value)
    except re.error:
        return False
    return True


def metadata_of(directory: Path) -> dict[str, str]:
    """What an adapter's tensor file says about itself."""
    with safe_open(directory / WEIGHTS, framework="pt") as f:
        return f.metadata() or {}


def sort_adapter(tensors: Mapping[str, Tensor], directory: Path) -> Contents:
    """Tensors of an adapter file by module. Raises ValueError for a key that is none of peft's."""
    out = Contents()
    for key, value in tensors.items():
        if not key.startswith(PREFIX):
            raise ValueError(
                f"{directory / WEIGHTS}: {key!r} does not start with {PREFIX!r}; this is not a peft adapter"
            )
        path = key.removeprefix(PREFIX)
        if ".original_module." in path or ".modules_to_save." in path:
            continue  # with bias="all", peft writes biases of a whole module twice more
        kind = next((k for k in _KINDS if path.endswith(k)), None)
        if kind:
            out.updates.setdefault(path.removesuffix(kind), {})[_KINDS[kind]] = value
            if kind in TABLE:
                out.tables.add(path.removesuffix(kind))
        elif path.endswith(TOKENS):
            out.tokens[path.removesuffix(TOKENS)] = value
        elif "lora_" in path or "token_adapter" in path:
            raise ValueError(f"{directory / WEIGHTS}: {key!r} is a kind of adapter tensor that there is not here")
        elif path.endswith(BASE + ".bias"):
            out.biases[path.removesuffix(BASE + ".bias")] = value
        else:
            module, _, parameter = path.rpartition(".")
            out.whole.setdefault(module, {})[parameter] = value
    return out


def version_of(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """peft's version that wrote a config, None where it does not say."""
    found = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or ""))
    return (int(found[1]), int(found[2])) if found else None


def ends_with(name: str, end: str) -> bool:
    """peft's rule for names in lists."""
    return name == end or name.endswith("." + end)


def rank_and_scale(
    config: Mapping[str, Any], path: str, factors: Mapping[str, Tensor], directory: Path, experts: int = 1
) -> tuple[int, float]:
    """Rank and scale of one update by peft's config. Raises ValueError where the factors have another rank."""
    want = pattern_of(config.get("rank_pattern"), path, config["r"])
    n = factors["a"].shape[0]
    r = n // experts if n % experts == 0 else n
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
