"""load: a model and its tokenizer from a Hugging Face folder or a GGUF file, quantized on the way in.

Tensors come one at a time.  A linear layer that is to be quantized is packed as soon as its weight is read, so
the peak is the finished model plus one tensor.  Pickled checkpoints are refused: reading them can run code.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora.models.base import CausalLM, Model
from lora.models.checkpoint import read_config, stored_dtype, weights
from lora.models.families import FAMILIES
from lora.models.gguf import GGUF
from lora.models.hub import from_hub, watched
from lora.models.tokenizer import Tokenizer
from lora.quant.checkpoint import from_tensors
from lora.quant.codebook import codebook
from lora.quant.linear import Linear4bit, is_skipped
from lora.quant.linear8 import Linear8bit, quantize8
from lora.quant.weight import check_block, quantize_tensor

# Written by some tools, and computed here: not missed, not loaded
_DERIVED = ("rotary_emb.inv_freq", "position_ids")
# Heads: they stay dense unless told otherwise
SKIP = ("lm_head", "classifier", "classifier.*", "pooler.dense", "score")


def load(
    path: str | Path,
    quantize: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    *,
    block: int = 64,
    double: bool = True,
    skip: Sequence[str] = SKIP,
    labels: int | None = None,
) -> tuple[Any, Tokenizer]:
    """The model, in eval mode with every weight frozen, and its tokenizer.

    Args:
        path: a folder with config.json, safetensors and tokenizer.json (also one with weights in 4 or 8 bits, in
            bitsandbytes' layouts), a .gguf file, or the name of a repository on the Hugging Face hub
        quantize: None, "nf4" or "fp4": pack the linear layers while loading, in blocks of `block`, block scales
            in 8 bits where `double`; "int8": a byte a weight; `skip` names layers to leave dense
        dtype: of the dense weights; "auto" is the checkpoint's on a GPU and float32 on a CPU (faster there)
        device: "auto" is the GPU when there is one
        labels: for an encoder (BERT, RoBERTa), classes of its head; where the file has none for so many, one is drawn
            from a fixed seed, to be trained: lora.wrap(model, train_modules=["classifier"])

    Raises FileNotFoundError or ValueError, naming the file: an unknown architecture, a damaged or cut file, tensors
    that are missing, extra or of another shape.
    """
    path = from_hub(path)
    groups: Iterator[tuple[str, dict[str, Tensor]]]
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if quantize not in (None, "int8"):
        codebook(quantize)
        check_block(block)
    if path.is_file() and path.suffix == ".gguf":
        file = GGUF(path)
        config, stored = file.config(), torch.float32
        groups = ((name, {name: tensor}) for name, tensor in file.tensors(config))
        beside = path.parent / "tokenizer.json"
        tokenizer = Tokenizer.from_directory(path.parent) if beside.is_file() else file.tokenizer()
    elif path.is_dir():
        raw = read_config(path)
        kind = raw.get("model_type")
        if kind not in FAMILIES:
            raise ValueError(f"{path}: model_type {kind!r} is not known; there are {', '.join(sorted(FAMILIES))}")
        config, stored = FAMILIES[kind].from_json(raw), stored_dtype(raw)
        tokenizer = Tokenizer.from_directory(path)
        groups = weights(path, device)
    elif not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a folder with config.json, a .gguf file or a hub name")
    else:
        raise ValueError(f"{path} is neither a folder with config.json nor a .gguf file")
    if config.num_layers > 1000:  # damaged, perhaps: to build them before a tensor is missed would take hours
        files = [path] if path.is_file() else path.glob("*.safetensors")
        size = sum(f.stat().st_size for f in files)
        if size < config.num_layers * config.hidden_size:
            raise ValueError(
                f"{path} asks for {config.num_layers:,} layers of width {config.hidden_size:,}, which {size:,} bytes "
                "of weights cannot be"
            )
    if labels is not None:
        if not hasattr(config, "with_labels"):
            raise ValueError(f"{path}: labels={labels} asks for a head of classes, which only encoders have here")
        config = config.with_labels(labels)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens and the model {config.vocab_size} rows for them"
        )

    def pack(name: str, weight: Tensor) -> nn.Module:
        if quantize == "int8":
            return Linear8bit(*quantize8(weight, name))
        assert quantize is not None
        return Linear4bit(quantize_tensor(weight, quantize, block, double, name=name))

    groups = watched(groups, path)
    made = _fill(config, groups, dtype_of(dtype, stored, device), device, path, pack if quantize else None, skip)
    return made, tokenizer


def dtype_of(asked: str | torch.dtype, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Of the dense weights of a checkpoint stored in `stored`, on a device."""
    if isinstance(asked, torch.dtype):
        return asked
    if asked == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16 if stored == torch.float32 else stored
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if asked not in known:
        raise ValueError(f"dtype={asked!r}: choose one of 'auto', {', '.join(map(repr, known))}")
    return known[asked]


def _fill(
    config: Any,
    groups: Iterator[tuple[str, dict[str, Tensor]]],
    dtype: torch.dtype,
    device: torch.device,
    path: Path,
    pack: Callable[[str, Tensor], nn.Module] | None,
    skip: Sequence[str],
) -> Model:
    """The model of `config` with the weights of `groups` (checkpoint.weights), linear layers made by `pack`."""
    with torch.device("meta"):
        model: Model = config.build()
    want = dict(model.named_parameters())
    tied, head = model.tied_name(), None
    got: set[str] = set()
    extra: list[str] = []
    shapes: list[str] = []  # what is wrong with them
    for there, tensors in groups:
        tensor = tensors[there] if len(tensors) == 1 and there in tensors else None
        ours = model.read(there, torch.empty(0) if tensor is None else tensor)
        if ours is None or there.endswith(_DERIVED):
            continue
        name, value = ours
        if name == tied:
            head = value
            continue
        owner, _, leaf = name.rpartition(".")
        if name not in want or (tensor is None and leaf != "weight"):
            extra += list(tensors)
            continue
        layer: nn.Module | None = None
        if tensor is None:
            layer = _quantized(there, {key: part.to(device) for key, part in tensors.items()})
        shape = tuple(value.shape) if layer is None else (layer.out_features, layer.in_features)
        if shape != tuple(want[name].shape):
            shapes.append(f"{there} has shape {shape}, and config.json asks for {tuple(want[name].shape)}")
            continue
        if layer is None and not value.is_floating_point():  # a header may be wrong in no length at all
            shapes.append(f"{there} holds {str(value.dtype).removeprefix('torch.')}, and weights are floating numbers")
            continue
        place = model.get_submodule(owner)
        if layer is None and pack and isinstance(place, nn.Linear) and leaf == "weight" and not is_skipped(owner, skip):
            layer = pack(name, value.to(device))
        if layer is None:
            place._parameters[leaf] = nn.Parameter(value.to(device=device, dtype=dtype), requires_grad=False)
        else:  # a bias that came or comes on its own is kept
            layer._parameters["bias"] = place._parameters.get("bias")
            parent, _, child = owner.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
        got.add(name)
        del tensors, tensor, value, ours  # before the next is read: two would be the peak
    missing = model.without(sorted(set(want) - got))
    if shapes:
        raise ValueError(f"{path} does not fit its config.json: {_some(shapes, '; ')}")
    fresh = [name for name in missing if name.startswith(model.new)] if model.new else []
    missing = [name for name in missing if name not in fresh]
    if missing or extra:
        raise ValueError(
            f"{path} does not fit its config.json: {len(missing)} tensors are missing{_in_brackets(missing)}, "
            f"{len(extra)} have no place{_in_brackets(extra)}"
        )
    seed = torch.Generator().manual_seed(0)
    for name in fresh:
        owner, _, leaf = name.rpartition(".")
        drawn = torch.zeros(want[name].shape)
        if leaf != "bias":
            drawn.normal_(std=model.new_std, generator=seed)
        model.get_submodule(owner)._parameters[leaf] = nn.Parameter(drawn.to(device, dtype), requires_grad=False)
    if fresh:
        names = ", ".join(fresh)
        warnings.warn(f"{path} holds no {names} that fits: new ones were drawn at random; train them", stacklevel=3)
    model.tie()
    if head is not None and isinstance(model, CausalLM):
        embedding = model.embedding().weight
        assert isinstance(embedding, Tensor)
        if not torch.equal(head.to(embedding), embedding):
            raise ValueError(f"{path}: config.json ties the head to the embedding, and the file holds two that differ")
    return model.eval()


def _quantized(name: str, tensors: dict[str, Tensor]) -> Any:
    """The layer of a weight that was stored in 4 or 8 bits."""
    scale = name.removesuffix(".weight") + ".SCB"
    if scale not in tensors:
        return Linear4bit(from_tensors(name, tensors))
    order = tensors.get(name + "_format", torch.zeros((), dtype=torch.uint8))
    if name not in tensors or tensors[name].dtype != torch.int8 or int(order.reshape(-1)[0]) != 0:
        raise ValueError(f"{name} is no int8 matrix stored row by row, which is the one 8-bit layout that is read")
    return Linear8bit(tensors[name], tensors[scale])


def _some(what: Sequence[str], between: str = ", ") -> str:
    return between.join(what[:3]) + (f"{between}... ({len(what)} in all)" if len(what) > 3 else "")


def _in_brackets(names: Sequence[str]) -> str:
    return f" ({_some(names)})" if names else ""


def load_tokenizer(path: str | Path) -> tuple[Tokenizer, int | None]:
    """A model's tokenizer without the model, and the longest row that the model takes; None where no config.json
    lies beside the tokenizer. Raises as `load` does."""
    path = from_hub(path)
    if path.suffix == ".gguf" and path.is_file():
        file, beside = GGUF(path), path.parent / "tokenizer.json"
        tokenizer = Tokenizer.from_directory(path.parent) if beside.is_file() else file.tokenizer()
        return tokenizer, file.config().max_length
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; give a folder with tokenizer.json, a .gguf file or a hub name")
    tokenizer = Tokenizer.from_directory(path)
    if not (path / "config.json").is_file():
        return tokenizer, None
    raw = read_config(path)
    kind = raw.get("model_type")
    return tokenizer, FAMILIES[kind].from_json(raw).max_length if kind in FAMILIES else None
