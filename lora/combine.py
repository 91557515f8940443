"""combine: one adapter whose update is a weighted sum of other adapters' updates.

    cat    ΔW = Σ w_i s_i B_i A_i  =  [w_1 s_1 B_1 | w_2 s_2 B_2 | ..] [A_1 ; A_2 ; ..]      exact; the ranks add up
    svd    the best update of rank r to that sum: B = Q_b, A = R_b R_aᵀ Q_aᵀ cut at r singular values, by QR of the
           stacked factors, so that no dense matrix is ever made

One adapter with method "svd" is that adapter at a lower rank.  What peft calls "linear" adds A to A and B to B, and its
product holds terms B_1 A_2 that belong to no adapter: it is not the sum of the updates, and not offered here.
Source: Eckart and Young, 1936; peft's add_weighted_adapter for the names.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora.files import new_directory, sort_metadata
from lora.fingerprint import KEY, same_base
from lora.format import (
    CONFIG,
    LINEAR,
    PREFIX,
    TABLE,
    WEIGHTS,
    Contents,
    metadata_of,
    rank_and_scale,
    read_adapter,
    sort_adapter,
)

METHODS = ("cat", "svd")


@dataclass(frozen=True)
class Combined:
    """What a combination left out: `errors[module]` = |update - sum| / |sum| in Frobenius norm, and that of all."""

    out: Path
    r: int
    errors: dict[str, float]
    error: float

    def __str__(self) -> str:
        if not self.errors:
            return f"{self.out}: a copy, rank {self.r}"
        worst = max(self.errors, key=lambda name: self.errors[name])
        return (
            f"{self.out}: rank {self.r}, {len(self.errors)} modules; of the sum {self.error:.2%} is lost "
            f"(most in {worst}: {self.errors[worst]:.2%})"
        )


def combine(
    adapters: Sequence[str | Path],
    out: str | Path,
    weights: Sequence[float] | None = None,
    method: str = "cat",
    rank: int | None = None,
) -> Combined:
    """Writes the weighted sum of adapter folders as the adapter folder `out`; needs no base model.

    Args:
        adapters: folders of `lora.save` or peft, all of one base; they are not changed
        out: the folder to write
        weights: one for each adapter; None takes 1 for each, the sum itself
        method: "cat" (exact) or "svd" (of rank `rank`; the largest of the adapters' where it is None)
        rank: of the result, for "svd"

    A module that some adapters lack counts as an update of 0 there.  One adapter with weight 1 and "cat" is copied as
    it is, of whatever kind.

    Raises ValueError for adapters of different bases, of kinds whose updates do not add up (DoRA, whole trained
    modules), or of different shapes; FileExistsError where `out` holds something; and as `lora.attach` does.
    """
    folders = [Path(a) for a in adapters]
    weights = [1.0] * len(folders) if weights is None else list(weights)
    if not folders or len(weights) != len(folders):
        raise ValueError(f"{len(folders)} adapters, {len(weights)} weights; give at least one adapter, a weight each")
    if not all(torch.isfinite(torch.tensor(w)) for w in weights) or not any(weights):
        raise ValueError(f"weights={weights}: finite numbers, not all 0")
    if method not in METHODS:
        raise ValueError(f"method={method!r}: one of {', '.join(METHODS)}")
    if rank is not None and (method != "svd" or rank < 1):
        raise ValueError(f"rank={rank} with method={method!r}: a rank of at least 1 is chosen for 'svd' only")
    if method == "cat" and weights == [1.0]:  # of whatever kind: the sum of one is that one
        config, _ = read_adapter(folders[0])
        with new_directory(Path(out)) as folder:
            for file in (CONFIG, WEIGHTS):
                shutil.copyfile(folders[0] / file, folder / file)
        return Combined(Path(out), int(config["r"]), {}, 0.0)
    configs, stacks, tables = [], {}, set()  # type: ignore[var-annotated]
    for folder, weight in zip(folders, weights, strict=True):
        config, tensors = read_adapter(folder)
        configs.append(config)
        content = sort_adapter(tensors, folder)
        _refuse_whole(folder, config, content)
        tables |= content.tables
        for path, factors in content.updates.items():
            if "m" in factors:
                raise ValueError(f"{folder}: {path} is a DoRA update, which changes lengths too and does not add up")
            _, scale = rank_and_scale(config, path, factors, folder)
            stacks.setdefault(path, []).append((factors["a"].float(), factors["b"].float() * (scale * weight)))
    base = _one_base(folders, configs)
    if not stacks:
        raise ValueError(f"{folders[0]} holds no low-rank updates, and those alone are added up")
    largest = max(a.shape[0] for parts in stacks.values() for a, _ in parts)
    made, errors, lost, size = {}, {}, 0.0, 0.0
    for path, parts in sorted(stacks.items()):
        shapes = {(b.shape[0], a.shape[1]) for a, b in parts}
        if len(shapes) > 1:
            raise ValueError(f"{path} is {' and '.join(map(str, sorted(shapes)))} in these adapters: other models")
        a, b = torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], dim=1)
        a, b, missing, total = _cut(a, b, (rank or largest) if method == "svd" else a.shape[0])
        made[path] = a, b
        errors[path] = (missing / total) ** 0.5 if total else 0.0
        lost, size = lost + missing, size + total
    r = max(a.shape[0] for a, _ in made.values())
    written = {}
    for path, (a, b) in made.items():
        more = r - a.shape[0]  # one rank for all: what every loader reads alike
        keys = TABLE if path in tables else LINEAR
        written[f"{PREFIX}{path}{keys[0]}"] = torch.nn.functional.pad(a, (0, 0, 0, more)).contiguous()
        written[f"{PREFIX}{path}{keys[1]}"] = torch.nn.functional.pad(b, (0, more)).contiguous()
    config = dict(configs[0]) | {"r": r, "lora_alpha": r, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    config |= {"target_modules": _targets(configs, sorted(made)), "lora_dropout": 0.0}
    with new_directory(Path(out)) as folder:
        save_file(written, folder / WEIGHTS, metadata={"format": "pt"} | ({KEY: base} if base else {}))
        sort_metadata(folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Combined(Path(out), r, errors, (lost / size) ** 0.5 if size else 0.0)


def _refuse_whole(folder: Path, config: Mapping[str, Any], content: Contents) -> None:
    """Raises ValueError for what replaces something of the base, or is stacked, and so does not add up here."""
    if content.whole:
        raise ValueError(f"{folder} trains {min(content.whole)} whole; there is no sum of two whole modules")
    if content.tokens or content.biases or config.get("lora_bias"):
        what = "rows of tokens" if content.tokens else "biases"
        raise ValueError(f"{folder} trains {what}, which add up only with the base at hand; merge it instead")
    if config.get("target_parameters"):
        raise ValueError(f"{folder} has updates of stacked parameters, which are not added up")
    if str(config.get("init_lora_weights")) == "pissa":
        raise ValueError(f"{folder} stands on PiSSA's residual; attach it and save it again, as an update of the base")


def _cut(a: Tensor, b: Tensor, r: int) -> tuple[Tensor, Tensor, float, float]:
    """a (r, in), b (out, r) of the best rank-r approximation of b a; what it misses and the whole, squared norms."""
    qa, ra = torch.linalg.qr(a.double().T)  # a = ra.T qa.T
    qb, rb = torch.linalg.qr(b.double())
    u, s, vt = torch.linalg.svd(rb @ ra.T)  # of at most R x R, R the stacked rank
    total = float(s.square().sum())
    if r >= a.shape[0]:
        return a, b, 0.0, total
    root = s[:r].sqrt()
    missing = float(s[r:].square().sum())
    return ((root[:, None] * vt[:r]) @ qa.T).float(), ((qb @ u[:, :r]) * root).float(), missing, total


def _one_base(folders: Sequence[Path], configs: Sequence[Mapping[str, Any]]) -> str:
    """The fingerprint that the result keeps, "" where none has one. Raises ValueError where two bases differ."""
    known = [(folder, metadata_of(folder).get(KEY, "")) for folder in folders]
    known = [(folder, text) for folder, text in known if text]
    for folder, text in known[1:]:
        if not same_base(known[0][1], text):
            raise ValueError(f"{known[0][0]} and {folder} were trained on different bases; their updates do not add up")
    layouts = {bool(c.get("fan_in_fan_out")) for c in configs}
    if len(layouts) > 1:
        raise ValueError("fan_in_fan_out differs between these adapters, so their bases differ too; they do not add up")
    return known[0][1] if known else ""


def _targets(configs: Sequence[Mapping[str, Any]], paths: Sequence[str]) -> list[str]:
    """Names as all of them write it where they agree, else the full names."""
    lists = [sorted(t) for t in (c.get("target_modules") for c in configs) if isinstance(t, list)]
    same = len(lists) == len(configs) and all(t == lists[0] for t in lists)
    return lists[0] if same else list(paths)
