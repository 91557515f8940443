"""export: an adapter rewritten so that another program computes what we do, and what that program would have done.

Loaders read one format in different ways, mostly in silence: vLLM applies one scale to all modules and ignores
alpha_pattern, SGLang and llama.cpp do not know rsLoRA.  The exported adapter leaves nothing to read in two ways:

    B' = s B, alpha = r, so that every rule (alpha / r, alpha / rank(B), alpha / sqrt(r) switched off) gives 1
    one rank for all modules, A and B filled up with zeros; no patterns
    fused projections cut into those that the loader knows, where asked: each keeps its rows of B, and of A and B the
    ranks that its rows use; a part whose rows are zero (an update of q and v alone leaves k so) is left out

`findings` are the rules of the loaders as their sources stood in autumn 2026 (vLLM, SGLang, convert_lora_to_gguf.py).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora.files import new_directory
from lora.format import (
    BASE,
    BIAS_B,
    CONFIG,
    LINEAR,
    MAGNITUDE,
    PREFIX,
    TABLE,
    TOKENS,
    WEIGHTS,
    Contents,
    rank_and_scale,
    read_adapter,
    sort_adapter,
)

TARGETS = ("peft", "vllm", "sglang", "llama.cpp")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what its max_lora_rank may be

Parts = Mapping[str, Mapping[str, Tensor]]
# {"qkv_proj": {"q_proj": 64, "k_proj": 16, "v_proj": 16}}: names and rows in order; or the rows' numbers, as parts_of
# (parts.py) gives them
Split = Mapping[str, Mapping[str, int | Sequence[int]]]


@dataclass(frozen=True)
class Finding:
    """What a loader would do with an adapter as it is."""

    loader: str
    refuses: bool  # False: it would load it and compute something else
    why: str

    def __str__(self) -> str:
        return f"{self.loader} would {'refuse' if self.refuses else 'get it wrong'}: {self.why}"


def export(
    adapter: str | Path, out: str | Path, target: str = "peft", *, base: str | None = None, split: Split | None = None
) -> list[Finding]:
    """Writes the adapter folder `adapter` for `target` as folder `out`; returns what was wrong with it as it was.

    Args:
        adapter: a folder of `lora.save` or peft; it is not changed
        target: "peft", "vllm", "sglang" or "llama.cpp"
        base: the base model's name, where the adapter's config holds none (llama.cpp needs one)
        split: fused modules by the end of their name, with the names of their parts and how many rows each has, in
            order, or which

    Raises ValueError where the target has no way to hold it (whole trained modules, embeddings), for an unknown
    target, or a split that does not add up; FileExistsError where `out` holds something; and as `lora.attach` does.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r}: choose one of {', '.join(TARGETS)}")
    adapter = Path(adapter)
    config, tensors = read_adapter(adapter)
    content = sort_adapter(tensors, adapter)
    if str(config.get("init_lora_weights")).startswith("pissa"):
        raise ValueError(f"{adapter} stands on PiSSA's residual; attach it and save it again, as an update of the base")
    before = findings(config, content, target, base)
    after = dict(config)
    if config.get("target_parameters"):  # a loader that knows them is peft, which reads them as they are
        written = dict(tensors)
        left = [*before, Finding("split", True, "stacked parameters are not cut")] if split else before
    else:
        plain, r = _plain(config, content, split or {}, adapter, target)
        after |= {"r": r, "lora_alpha": r, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
        after["target_modules"] = _targets(config, list(plain), split or {})
        content.updates = plain
        left = findings(after, content, target, base)
        written = _written(content)
    if base:
        after["base_model_name_or_path"] = base
    if left:
        raise ValueError(f"{adapter} cannot be exported: {'; '.join(map(str, left))}")
    with new_directory(Path(out)) as folder:
        save_file({k: t.contiguous() for k, t in written.items()}, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(after, indent=2) + "\n", encoding="utf-8")
    return before


def _written(content: Contents) -> dict[str, Tensor]:
    """The tensors of an adapter by peft's names."""
    out: dict[str, Tensor] = {}
    for path, factors in content.updates.items():
        ends = TABLE if path in content.tables else LINEAR
        names = {"a": ends[0], "b": ends[1], "m": MAGNITUDE, "c": BIAS_B}
        out |= {f"{PREFIX}{path}{names[key]}": value for key, value in factors.items()}
    out |= {f"{PREFIX}{path}{TOKENS}": rows for path, rows in content.tokens.items()}
    out |= {f"{PREFIX}{path}{BASE}.bias": bias for path, bias in content.biases.items()}
    return out | {f"{PREFIX}{path}.{key}": t for path, group in content.whole.items() for key, t in group.items()}


def findings(config: Mapping[str, Any], content: Contents, target: str, base: str | None = None) -> list[Finding]:
    """What `target` would refuse or get wrong in this adapter; empty where it reads it as we do."""
    if target == "peft":
        return []
    found = []

    def note(refuses: bool, why: str) -> None:
        found.append(Finding(target, refuses, why))

    parts, whole, tables = content.updates, sorted(content.whole), sorted(content.tables)
    ranks = {path: factors["a"].shape[0] for path, factors in parts.items()}
    if whole:
        note(True, f"{whole[0]} is trained whole (modules_to_save); merge it into a base of its own instead")
    if tables and target != "llama.cpp":
        note(True, f"{tables[0]} is an embedding; leave it out of the targets, or merge")
    if content.tokens:
        note(True, f"rows of tokens are trained in {min(content.tokens)}; merge them into a base of its own")
    if (config.get("bias") or "none") != "none" or config.get("lora_bias"):
        note(True, "biases are trained; merge it into its base instead")
    if config.get("target_parameters"):
        name = min(config["target_parameters"])
        if target == "vllm":
            note(False, f"tensors of stacked experts ({name}) are not read; they would stay the base's")
        else:
            note(True, f"{name} is a stacked parameter (target_parameters); merge it into its base instead")
    if config.get("use_dora"):
        note(True, "it is a DoRA adapter; merge it into its base instead")
    if config.get("use_rslora") and target != "vllm":
        rule = "alpha / rank(B)" if target == "llama.cpp" else "alpha / r"
        note(False, f"use_rslora is not read; the scale would be {rule}")
    if config.get("alpha_pattern"):
        note(False, "alpha_pattern is not read; one alpha would serve all modules")
    if len(set(ranks.values())) > 1 and target == "vllm":
        note(False, "rank_pattern is not read; modules of another rank would get a wrong scale")
    r = max(ranks.values(), default=1)
    if target == "vllm" and r > VLLM_RANKS[-1]:
        note(True, f"rank {r} is above {VLLM_RANKS[-1]}, the largest max_lora_rank")
    if target == "llama.cpp" and not (base or config.get("base_model_name_or_path")):
        note(True, "base_model_name_or_path is empty; give base=...")
    return found


def _plain(
    config: Mapping[str, Any], content: Contents, split: Split, adapter: Path, target: str
) -> tuple[dict[str, dict[str, Tensor]], int]:
    """The updates with their scales folded into B, cut and filled up to one rank; and that rank."""
    scaled: dict[str, dict[str, Tensor]] = {}
    used = set()
    for path, factors in content.updates.items():
        _, scale = rank_and_scale(config, path, factors, adapter)
        a, b = factors["a"].float(), factors["b"].float() * scale
        own = {key: value for key, value in factors.items() if key not in "ab"}
        if "c" in own:
            own["c"] = own["c"].float() * scale
        fused = next((name for name in split if path == name or path.endswith("." + name)), None)
        if fused is None:
            scaled[path] = {"a": a, "b": b, **own}
            continue
        if own or path in content.biases:
            raise ValueError(f"{path} has DoRA's lengths or a bias, which are not cut; merge it into its base instead")
        used.add(fused)
        for name, rows in _rows(split[fused], path, b.shape[0]).items():
            piece = b[rows]
            used_ranks = (piece != 0).any(dim=0).nonzero().flatten()
            if len(used_ranks):
                scaled[path.removesuffix(fused) + name] = {"a": a[used_ranks], "b": piece[:, used_ranks]}
    if set(split) - used:
        raise ValueError(f"split names {sorted(set(split) - used)}, and no module of {adapter} ends so")
    r = max((f["a"].shape[0] for f in scaled.values()), default=1)
    if target == "vllm":
        r = next((size for size in VLLM_RANKS if size >= r), r)
    for factors in scaled.values():
        more = r - factors["a"].shape[0]
        factors["a"] = torch.nn.functional.pad(factors["a"], (0, 0, 0, more))
        factors["b"] = torch.nn.functional.pad(factors["b"], (0, more))
    return scaled, r


def _rows(parts: Mapping[str, int | Sequence[int]], path: str, n: int) -> dict[str, Tensor]:
    """{part: its rows' numbers}; raises ValueError unless each of `n` rows belongs to one part."""
    rows: dict[str, Tensor] = {}
    for name, own in parts.items():
        start = sum(map(len, rows.values()))
        rows[name] = torch.arange(start, start + own) if isinstance(own, int) else torch.as_tensor(own)
    named = torch.cat(list(rows.values()))
    if len(named) != n:
        raise ValueError(f"split of {path.rpartition('.')[2]} names {len(named)} rows, and {path} has {n}")
    if not torch.equal(named.sort().values, torch.arange(n)):
        raise ValueError(f"split of {path.rpartition('.')[2]} names a row twice or none of {path}'s")
    return rows


def _targets(config: Mapping[str, Any], paths: Sequence[str], split: Split) -> list[str]:
    """target_modules as a list, which all loaders read: the adapter's own, fused names replaced, else full names."""
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        return sorted(paths)
    made = []
    for name in targets:
        fused = next((f for f in split if name == f or name.endswith("." + f)), None)
        ends = [name] if fused is None else [name.removesuffix(fused) + part for part in split[fused]]
        made += [end for end in ends if fused is None or any(p == end or p.endswith("." + end) for p in paths)]
    return sorted(made)
