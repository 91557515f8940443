"""A model without its weights: config.json, or the header of a GGUF file, and the shapes of what is stored.

What is built here holds tensors made by torch.empty: under FakeTensorMode they have no memory, so a model of any size
stands in seconds and can be run dry (lora.train.dryrun).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from lora.kernels.code4 import NESTED
from lora.models.base import Model
from lora.models.checkpoint import read_config, stored_dtype
from lora.models.families import FAMILIES
from lora.models.gguf import GGUF
from lora.models.hub import from_hub
from lora.models.load import SKIP, dtype_of
from lora.quant.codebook import CODEBOOKS, codebook
from lora.quant.linear import Linear4bit, is_skipped
from lora.quant.linear8 import Linear8bit
from lora.quant.weight import Packed, check_block


@dataclass(frozen=True)
class Kind:
    """How a weight lies in memory: nf4 or fp4 with its block and the nesting of its scales, or int8."""

    name: str
    block: int = 64
    double: bool = True


@dataclass(frozen=True)
class Outline:
    """What a checkpoint says without being read: shapes, the dtype of dense weights, layers stored in 4 or 8 bits."""

    path: Path
    config: Any
    stored: torch.dtype
    packed: Mapping[str, Kind]  # by the layer's name


def outline(path: str | Path) -> Outline:
    """Of a model folder (config.json alone will do), a .gguf file or a hub name, of which config.json alone is fetched.

    Raises FileNotFoundError where there is none, ValueError for an architecture that is not known.
    """
    path = from_hub(path, ("config.json",))
    if path.is_file() and path.suffix == ".gguf":
        return Outline(path, GGUF(path).config(), torch.float32, {})
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} is neither a folder with config.json, a .gguf file nor a hub name; a plan needs one"
        )
    raw = read_config(path)
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"{path}: model_type {kind!r} is not known; there are {', '.join(sorted(FAMILIES))}")
    config = FAMILIES[kind].from_json(raw)
    return Outline(path, config, stored_dtype(raw), _packed(path, raw, config))


def _packed(path: Path, raw: Mapping[str, Any], config: Any) -> dict[str, Kind]:
    """The layers that the checkpoint stores in 4 or 8 bits, by their names there."""
    settings = raw.get("quantization_config") or {}
    files = sorted(path.glob("*.safetensors"))
    if not settings or settings.get("quant_method") != "bitsandbytes":
        return {}
    four = settings.get("load_in_4bit") or settings.get("_load_in_4bit")
    name = settings.get("bnb_4bit_quant_type", "fp4") if four else "int8"
    double = bool(settings.get("bnb_4bit_use_double_quant", False))
    if not files:  # before a download: what the settings say
        skip = tuple(settings.get("llm_int8_skip_modules") or ()) + SKIP
        with torch.device("meta"):
            model = config.build()
        linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        return {n: Kind(name, 64, double) for n in linear if not is_skipped(n, skip)}
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as f:
            shapes = {key: f.get_slice(key).get_shape() for key in f.keys()}  # noqa: SIM118
        for key, shape in shapes.items():
            layer = key.removesuffix(".weight.absmax").removesuffix(".SCB")
            if key.endswith(".SCB"):
                found[layer] = Kind("int8")
            elif key.endswith(".weight.absmax"):
                stored = shapes.get(f"{layer}.weight", [0])
                values = 2
                for n in stored:
                    values *= n
                block = max(32, 1 << (max(1, values // max(1, shape[0])) - 1).bit_length())
                found[layer] = Kind(name, block, f"{layer}.weight.nested_absmax" in shapes)
    return found


def skeleton(
    o: Outline,
    quantize: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    *,
    block: int = 64,
    double: bool = True,
    skip: Sequence[str] = SKIP,
) -> Model:
    """The model that `lora.load` would make with these arguments for `device`, its tensors empty and on the CPU.

    Call it under FakeTensorMode, where empty tensors take no memory.
    """
    if quantize is not None and quantize not in ("int8", *CODEBOOKS):
        codebook(quantize)  # says what there is; one that exists would be made here, without memory, and kept
    check_block(block)
    with torch.device("meta"):
        model: Model = o.config.build()
    dense = dtype_of(dtype, o.stored, torch.device(device))
    asked = None if quantize is None else Kind(quantize, block, double)
    stored = {
        (model.read(f"{n}.weight", torch.empty(0)) or (n,))[0].removesuffix(".weight"): k for n, k in o.packed.items()
    }
    tables = (torch.empty(16), torch.empty(256))  # one code and one map of scales serve all layers
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        kind = stored.get(name, asked if asked and not is_skipped(name, skip) else None)
        if kind is None:
            continue
        layer = _layer(kind, (module.out_features, module.in_features), *tables)
        layer._parameters["bias"] = module._parameters.get("bias")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    for module in model.modules():
        for leaf, p in list(module._parameters.items()):
            if p is not None and p.is_meta:
                module._parameters[leaf] = nn.Parameter(torch.empty(p.shape, dtype=dense), requires_grad=False)
        for leaf, t in list(module._buffers.items()):
            if t is not None and t.is_meta:
                module._buffers[leaf] = torch.empty(t.shape, dtype=t.dtype)
    model.tie()
    return model.eval()


def _layer(kind: Kind, shape: tuple[int, int], code: torch.Tensor, nested: torch.Tensor) -> nn.Module:
    N, K = shape
    if kind.name == "int8":
        return Linear8bit(torch.empty(N, K, dtype=torch.int8), torch.empty(N))
    blocks = -(-N * K // kind.block)
    scales: tuple[torch.Tensor, ...] = (torch.empty(blocks),)
    if kind.double:
        second = torch.empty(-(-blocks // NESTED))
        scales = (torch.empty(blocks, dtype=torch.uint8), nested, second, torch.empty(()))
    q = torch.empty((N, K // 2) if K % 2 == 0 else ((N * K + 1) // 2,), dtype=torch.uint8)
    return Linear4bit(Packed(kind.name, shape, kind.block, q, code, scales))
