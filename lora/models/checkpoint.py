"""Reading a folder of safetensors: config.json, and the tensors weight by weight, with what belongs to one together.

Pickles are refused: reading one can run code.  Nothing outside the folder is opened, whatever an index names.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora.files import read_json
from lora.models.stream import entries, stream

MAPPED = 2**28  # bytes read before a file is mapped anew: pages that were read count as this process's memory


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises FileNotFoundError without one, ValueError where it is no JSON object."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; it is not a model folder")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'} holds no JSON object")
    return config


def stored_dtype(config: dict[str, Any]) -> torch.dtype:
    """What the dense weights are stored in, by either dialect of config.json; float32 where it does not say."""
    name = str(config.get("dtype", config.get("torch_dtype", "float32"))).removeprefix("torch.")
    return getattr(torch, name, torch.float32) if name in ("float32", "bfloat16", "float16") else torch.float32


def weights(folder: Path, device: torch.device | None = None) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(name, its tensors by their full names) of every weight: one tensor, or all the parts of a quantized one.

    They lie on the CPU; where `device` is a GPU, there, and the next ones are read meanwhile (stream.py).
    Parts of P.weight are P.weight.absmax and its like (4 bits), P.SCB and P.weight_format (8 bits).

    Raises FileNotFoundError or ValueError, naming the file: none there, a pickle, damaged, cut short, an index that
    names a file that is not there or lies elsewhere, or a tensor that its file does not hold.
    """
    files = _files(folder)
    groups: dict[str, list[str]] = {}
    for name in sorted(files, key=lambda name: (files[name], name)):
        groups.setdefault(_whole(name), []).append(name)
    if device is not None and device.type == "cuda":
        yield from _streamed(groups, files, device)
        return
    reader = _Reader()
    for whole, names in groups.items():
        yield whole, {name: reader.read(files[name], name) for name in names}


def _streamed(
    groups: dict[str, list[str]], files: dict[str, Path], device: torch.device
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """`groups` with their tensors, read ahead onto a GPU."""
    where = {path: entries(path) for path in set(files.values())}
    tensors = stream([where[files[name]][name] for names in groups.values() for name in names], device)
    for whole, names in groups.items():
        yield whole, {name: next(tensors) for name in names}


def _whole(name: str) -> str:
    """The weight that a tensor is, or is a part of."""
    if ".weight." in name:
        return name.partition(".weight.")[0] + ".weight"
    for part in (".SCB", ".weight_format"):
        if name.endswith(part):
            return name.removesuffix(part) + ".weight"
    return name


def _files(folder: Path) -> dict[str, Path]:
    """The file of each tensor."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        table = read_json(index)
        where = table.get("weight_map") if isinstance(table, dict) else None
        if not isinstance(where, dict) or not where or not all(isinstance(f, str) for f in where.values()):
            raise ValueError(f"{index} holds no weight_map of tensor names to file names")
        for file in set(where.values()):
            if Path(file).name != file or file in ("", ".", ".."):
                raise ValueError(f"{index} names {file!r}; only files beside it are read")
            if not (folder / file).is_file():
                raise FileNotFoundError(
                    f"{folder / file} is named in {index.name} and is not there; the download is incomplete"
                )
            held = set(_names(folder / file))
            lacking = sorted(name for name, f in where.items() if f == file and name not in held)
            if lacking:
                raise ValueError(f"{folder / file} lacks {lacking[0]}, which {index.name} says it holds")
        return {name: folder / file for name, file in where.items()}
    if single.is_file():
        return dict.fromkeys(_names(single), single)
    pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))
    if pickles:
        raise ValueError(f"{pickles[0]} is a pickle, which can run code when read; convert it to safetensors first")
    raise FileNotFoundError(f"{folder} holds no model.safetensors")


def _names(path: Path) -> list[str]:
    """Names of the tensors in a file."""
    try:
        with safe_open(path, framework="pt") as f:
            return list(f.keys())
    except (SafetensorError, json.JSONDecodeError, OSError) as e:
        raise ValueError(f"{path} is damaged or cut short ({e})") from None


class _Reader:
    """Reads tensors from one mapped file at a time."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.file: Any = None
        self.size = 0

    def read(self, path: Path, name: str) -> Tensor:
        try:
            if path != self.path or self.size > MAPPED:
                self.file = None  # unmapped before the next is mapped
                self.path, self.file, self.size = path, safe_open(path, framework="pt"), 0
            tensor = self.file.get_tensor(name).clone()  # out of the map
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{path} is damaged or cut short ({e})") from None
        self.size += tensor.numel() * tensor.element_size()
        return tensor
