"""run.json: what a run was made of, so that it can be repeated and its bits compared.

Digests are SHA-256.  Of the data: token ids and what of them is learned, so that another tokenizer, template or
packing is other data.  Of the trained weights: all bytes in float32.  Of the frozen base: name, shape, dtype and up to
SAMPLES evenly spaced values of each tensor, which knows a base again in a second but is no proof against forgery.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora.batch import Example, Pack
from lora.files import read_json, write_text

NAME = "run.json"
SAMPLES = 1024
_PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "triton", "lora-torch")


def data_digest(examples: Sequence[Example | Pack]) -> str:
    h = hashlib.sha256()
    for e in examples:
        h.update(np.asarray([len(e.ids), *e.ids], dtype=np.int64).tobytes())
        h.update(np.asarray(e.learned, dtype=np.bool_).tobytes())
    return h.hexdigest()


def weights_digest(w: Tensor) -> str:
    """Of the optimizer's flat float32 buffer."""
    return hashlib.sha256(w.detach().cpu().numpy().tobytes()).hexdigest()


@torch.no_grad()
def base_digest(model: nn.Module) -> str:
    """Of everything that does not train."""
    h = hashlib.sha256()
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if t.requires_grad or not t.numel():
            continue
        flat = t.detach().reshape(-1)
        at = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
        values = flat[at.to(flat.device)].cpu().contiguous().view(torch.uint8).numpy().tobytes()
        h.update(f"{name} {tuple(t.shape)} {t.dtype}".encode() + values)
    return h.hexdigest()


def environment(device: torch.device) -> dict[str, Any]:
    """What bits may depend on besides data, weights and settings."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    versions["torch"] = torch.__version__  # with its build: +cpu, +cu128
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": versions,
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "variables": {k: os.environ[k] for k in ("LORA_KERNELS", "TRITON_INTERPRET") if k in os.environ},
    }


def write_certificate(out: Path, **fields: Any) -> None:
    """Adds `fields` to run.json, which is written whole."""
    write_text(out / NAME, json.dumps((read_certificate(out) or {}) | fields, indent=2) + "\n")


def read_certificate(out: Path) -> dict[str, Any] | None:
    return read_json(out / NAME) if (out / NAME).is_file() else None


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], free: Sequence[str] = ()) -> list[str]:
    """`key: saved value, now another`, for each key but the free ones that differs; nested by dots."""
    said = []
    for key in sorted({*saved, *now} - set(free)):
        a, b = saved.get(key), now.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            said += [f"{key}.{inner}" for inner in differences(a, b)]
        elif a != b:
            said.append(f"{key} was {_short(a)} and is {_short(b)}")
    return said


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
