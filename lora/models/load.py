"""load: a model and its tokenizer from a Hugging Face folder or a GGUF file, quantized on the way in.

Tensors come one at a time.  A linear layer that is to be quantized is packed as soon as its weight is read, so
the peak is the finished model plus one tensor.  Pickled checkpoints are refused: reading them can run code.
"""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lora.files import read_json
from lora.models.base import CausalLM, Model
from lora.models.families import FAMILIES
from lora.models.gguf import GGUF
from lora.models.tokenizer import Tokenizer
from lora.quant.checkpoint import STATE, from_tensors
from lora.quant.codebook import codebook
from lora.quant.linear import Linear4bit, is_skipped
from lora.quant.weight import Packed, check_block, quantize_tensor

# Written by some tools, and computed here: not missed, not loaded
_DERIVED = ("rotary_emb.inv_freq", "position_ids")
SKIP = ("lm_head", "classifier", "score")  # heads: they stay dense unless told otherwise


def load(
    path: str | Path,
    quantize: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    *,
    block: int = 64,
    double: bool = True,
    skip: Sequence[str] = SKIP,
) -> tuple[Any, Tokenizer]:
    """The model, in eval mode with every weight frozen, and its tokenizer.

    Args:
        path: a folder with config.json, safetensors and tokenizer.json (also one with pre-quantized 4-bit weights
            in bitsandbytes' layout), or a .gguf file
        quantize: None, "nf4" or "fp4": pack the linear layers while loading, in blocks of `block`, block scales
            in 8 bits where `double`; `skip` names layers to leave dense
        dtype: of the dense weights; "auto" is the checkpoint's on a GPU and float32 on a CPU (faster there)
        device: "auto" is the GPU when there is one

    Raises FileNotFoundError or ValueError, naming the file: an unknown architecture, a damaged or cut file, tensors
    that are missing, extra or of another shape.
    """
    path = Path(path)
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if quantize is not None:
        codebook(quantize)
        check_block(block)
    if path.is_file() and path.suffix == ".gguf":
        file = GGUF(path)
        config, stored = file.config(), torch.float32
        tensors = file.tensors(config)
        beside = path.parent / "tokenizer.json"
        tokenizer = Tokenizer.from_directory(path.parent) if beside.is_file() else file.tokenizer()
    elif path.is_dir():
        raw = _config(path)
        config, stored = FAMILIES[raw["model_type"]].from_json(raw), _stored_dtype(raw)
        tokenizer = Tokenizer.from_directory(path)
        tensors = _safetensors(path)
    elif not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a folder with config.json, or a .gguf file")
    else:
        raise ValueError(f"{path} is neither a folder with config.json nor a .gguf file")
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens and the model {config.vocab_size} rows for them"
        )
    model = _fill(config, tensors, _dtype(dtype, stored, device), device, path, quantize, block, double, skip)
    return model, tokenizer


def _dtype(asked: str | torch.dtype, stored: torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(asked, torch.dtype):
        return asked
    if asked == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16 if stored == torch.float32 else stored
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if asked not in known:
        raise ValueError(f"dtype={asked!r}: choose one of 'auto', {', '.join(map(repr, known))}")
    return known[asked]


def _config(folder: Path) -> dict:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; it is not a model folder")
    config = read_json(folder / "config.json")
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in FAMILIES:
        raise ValueError(f"{folder}: model_type {kind!r} is not known; there are {', '.join(sorted(FAMILIES))}")
    return config


def _stored_dtype(config: dict) -> torch.dtype:
    name = str(config.get("dtype", config.get("torch_dtype", "float32"))).removeprefix("torch.")
    return getattr(torch, name, torch.float32) if name in ("float32", "bfloat16", "float16") else torch.float32


def _safetensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a checkpoint in one file or many; what belongs to one 4-bit weight comes together."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict) or not where:
            raise ValueError(f"{index} holds no weight_map")
        files = {name: folder / file for name, file in where.items()}
    elif (folder / "model.safetensors").is_file():
        files = None
    else:
        pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))
        if pickles:
            raise ValueError(f"{pickles[0]} is a pickle, which can run code when read; convert it to safetensors first")
        raise FileNotFoundError(f"{folder} holds no model.safetensors")
    paths = sorted(set(files.values())) if files else [folder / "model.safetensors"]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is named in {index.name} and is not there; the download is incomplete")
        try:
            with safe_open(path, framework="pt") as f:
                for name in f.keys():  # noqa: SIM118  (not a dict)
                    if files is None or files.get(name) == path:
                        yield name, f.get_tensor(name).clone()  # out of the memory map, which closes with the file
        except SafetensorError as e:
            raise ValueError(f"{path} is damaged or cut short ({e})") from None


def _fill(
    config: Any,
    tensors: Iterator[tuple[str, Tensor]],
    dtype: torch.dtype,
    device: torch.device,
    path: Path,
    quantize: str | None,
    block: int,
    double: bool,
    skip: Sequence[str],
) -> Model:
    with torch.device("meta"):
        model: Model = config.build()
    want = dict(model.named_parameters())
    tied = model.tied_name()
    got: set[str] = set()
    extra: list[str] = []
    parts: dict[str, dict[str, Tensor]] = {}  # tensors of pre-quantized weights, until the last has come
    tied_head = None
    for name, tensor in tensors:
        if ".weight." in name or tensor.dtype == torch.uint8:  # a part of a 4-bit weight, which lies as ours do
            whole, dot, part = name.partition(".weight.")
            ours = model.read(whole if not dot else whole + ".weight", tensor.new_empty(0))
            owner = name if ours is None else ours[0]
            parts.setdefault(owner, {})[f"{owner}.{part}" if dot else owner] = tensor
            continue
        there, ours = name, model.read(name, tensor)
        if ours is None or there.endswith(_DERIVED):
            continue
        name, tensor = ours
        if name == tied:
            tied_head = tensor
            continue
        if name not in want:
            extra.append(there)
            continue
        if tuple(tensor.shape) != tuple(want[name].shape):
            raise ValueError(
                f"{path}: {there} has shape {tuple(tensor.shape)}, and config.json asks for {tuple(want[name].shape)}"
            )
        owner, _, leaf = name.rpartition(".")
        layer = model.get_submodule(owner)
        dense = not isinstance(layer, nn.Linear) or is_skipped(owner, skip) or leaf != "weight"
        if quantize is None or dense:
            value = nn.Parameter(tensor.to(device=device, dtype=dtype), requires_grad=False)
            layer._parameters[leaf] = value
        else:
            _place(model, owner, quantize_tensor(tensor.to(device), quantize, block, double, name=name))
        got.add(name)
        del tensor  # before the next is read: two would be the peak
    for weight, group in parts.items():
        if weight not in want or not any(STATE in key for key in group):
            extra += list(group)
            continue
        packed = from_tensors(weight, {key: value.to(device) for key, value in group.items()})
        if packed.shape != tuple(want[weight].shape):
            raise ValueError(
                f"{path}: {weight} is {packed.shape}, and config.json asks for {tuple(want[weight].shape)}"
            )
        _place(model, weight.removesuffix(".weight"), packed)
        got.add(weight)
    missing = sorted(set(want) - got)
    fresh = [name for name in missing if name.startswith(model.new)] if model.new else []
    missing = [name for name in missing if name not in fresh]
    if missing or extra:
        raise ValueError(
            f"{path} does not fit its config.json: {len(missing)} tensors are missing{_some(missing)}, "
            f"{len(extra)} have no place{_some(extra)}"
        )
    for name in fresh:
        owner, _, leaf = name.rpartition(".")
        value = torch.zeros(want[name].shape) if leaf == "bias" else 0.02 * torch.randn(want[name].shape)
        model.get_submodule(owner)._parameters[leaf] = nn.Parameter(value.to(device, dtype), requires_grad=False)
    if fresh:
        warnings.warn(f"{path} holds no {', '.join(fresh)}: new ones were drawn at random; train them", stacklevel=3)
    model.tie()
    if tied_head is not None and isinstance(model, CausalLM):
        embedding = model.embedding().weight
        assert isinstance(embedding, Tensor)
        if not torch.equal(tied_head.to(embedding), embedding):
            raise ValueError(f"{path}: config.json ties the head to the embedding, and the file holds two that differ")
    return model.eval()


def _place(model: Model, owner: str, packed: Packed) -> None:
    """Puts a 4-bit layer where a linear one is; a bias that came or comes on its own is kept."""
    parent, _, child = owner.rpartition(".")
    layer = Linear4bit(packed)
    layer._parameters["bias"] = model.get_submodule(owner)._parameters.get("bias")
    setattr(model.get_submodule(parent), child, layer)


def _some(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
