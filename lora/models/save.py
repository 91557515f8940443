"""save_pretrained: a model as a Hugging Face folder, dense or with its 4-bit weights in bitsandbytes' layout."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora.files import new_directory
from lora.layer import Adapted, TrainedModule
from lora.models.base import Model
from lora.models.load import load
from lora.models.tokenizer import Tokenizer
from lora.quant.checkpoint import to_tensors
from lora.quant.linear import Linear4bit
from lora.quant.linear8 import Linear8bit
from lora.wrap import is_merged

SHARD = 5 * 10**9  # bytes of one file
DRIFT = 0.1  # of the logits' norm: what rounding weights to bfloat16 may move


def save_pretrained(
    model: Model,
    tokenizer: Tokenizer,
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shard: int = SHARD,
    verify: bool = True,
) -> Path:
    """Writes config.json, safetensors (more than one above `shard` bytes) and the tokenizer; returns the folder.

    Dense weights are written in `dtype`.  A merged model is written merged.  With `verify` the files are loaded
    again (a second model in memory) and must give the model's own logits, as near as `dtype` allows, before the
    folder gets its name.

    Raises FileExistsError where the folder holds something; ValueError on a model with unmerged adapters, which
    this format has no place for, and where what was written computes something else; nothing is left then.
    """
    directory = Path(directory)
    merged = is_merged(model)
    for name, layer in model.named_modules():
        whole = isinstance(layer, TrainedModule) and merged  # there is nothing to fold: its copy is written
        if isinstance(layer, Adapted) and layer.merged is None and not whole:
            raise ValueError(
                f"{name} carries an unmerged adapter; call lora.merge(model) first, or lora.save for it alone"
            )
    config = model.config.to_json() | {"torch_dtype": str(dtype).removeprefix("torch.")}
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    config |= {key: value for key, value in ids.items() if value is not None}
    packed = [m for m in model.modules() if isinstance(m, Linear4bit | Linear8bit)]
    if len({type(m) for m in packed}) > 1:
        raise ValueError("this model mixes layers of 4 and of 8 bits, which the format has no way to say")
    if packed:
        config["quantization_config"] = _quantization_config(packed[0], dtype)
    with new_directory(directory) as folder:
        files: list[dict[str, Tensor]] = [{}]
        size = 0
        where: dict[str, int] = {}
        for group in _weights(model, dtype):
            n_bytes = sum(t.numel() * t.element_size() for t in group.values())
            if files[-1] and size + n_bytes > shard:
                _write(files, folder)
                files.append({})
                size = 0
            size += n_bytes
            files[-1] |= group
            where |= dict.fromkeys(group, len(files))
        _write(files, folder)
        count = len(files)
        names = {k: _shard_name(k, count) for k in range(1, count + 1)}
        for k, name in names.items():
            (folder / f"part-{k}").rename(folder / name)
        if count > 1:
            index = {"metadata": {}, "weight_map": {key: names[k] for key, k in where.items()}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tokenizer.save(folder)
        if verify:
            _verify(model, folder, directory)
    return directory


@torch.no_grad()
def _verify(model: Model, folder: Path, directory: Path) -> None:
    """Raises ValueError unless the model in `folder` gives the logits of `model` on a fixed probe."""
    place = next(model.parameters())
    again, _ = load(folder, dtype=place.dtype, device=place.device)
    length = min(16, model.config.max_length)
    ids = (torch.arange(length, device=place.device)[None] * 7919 + 5) % model.config.vocab_size
    training = model.training
    want, got = model.eval()(ids).float(), again(ids).float()
    model.train(training) if training else None
    gap = (got - want).norm() / want.norm().clamp(min=1e-30)
    if again.config != model.config or not bool(gap <= DRIFT):
        raise ValueError(
            f"{directory} was not written: loaded again, it gives logits {float(gap):.1%} away from the model's "
            f"(at most {DRIFT:.0%} is rounding); this is a mistake of ours or of the disk, please report it"
        )


def _shard_name(k: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{k:05d}-of-{count:05d}.safetensors"


def _write(files: list[dict[str, Tensor]], folder: Path) -> None:
    """Writes the last shard and forgets its tensors."""
    save_file(files[-1], folder / f"part-{len(files)}", metadata={"format": "pt"})
    files[-1] = {}


def _weights(model: Model, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """The tensors of each parameter by their published names; a tied head is left out."""
    for name, layer in _plain_layers(model):
        if isinstance(layer, Linear4bit):
            there, _ = model.write(f"{name}.weight", torch.empty(0))
            yield {k: v.cpu() for k, v in to_tensors(there, layer.packed(), dtype).items()}
        if isinstance(layer, Linear8bit):
            there, _ = model.write(f"{name}.weight", torch.empty(0))
            scale, order = there.removesuffix(".weight") + ".SCB", torch.zeros((), dtype=torch.uint8)  # 0: by rows
            yield {there: layer.weight.cpu(), scale: layer.SCB.cpu(), f"{there}_format": order}
        for leaf, p in layer.named_parameters(recurse=False):
            if f"{name}.{leaf}" == model.tied_name():
                continue
            there, value = model.write(f"{name}.{leaf}", p.detach())
            yield {there: value.to(device="cpu", dtype=dtype, copy=True).contiguous()}


def _plain_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside: tuple[str, ...] = ()
    for name, layer in model.named_modules():
        if name.startswith(inside) and inside:
            continue
        if isinstance(layer, Adapted):
            inside = (*inside, name + ".")
            plain = layer.merged or layer.base
            if isinstance(layer, TrainedModule):
                plain = (layer.on() or [layer.base])[-1]
            for inner, module in plain.named_modules():
                yield f"{name}.{inner}".removesuffix("."), module
        else:
            yield name, layer


def _quantization_config(layer: Linear4bit | Linear8bit, dtype: torch.dtype) -> dict:
    heads = ["lm_head", "classifier", "pooler.dense", "score"]
    if isinstance(layer, Linear8bit):
        return {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True} | {
            "llm_int8_threshold": 6.0,
            "llm_int8_skip_modules": heads,
        }
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": layer.kind,
        "bnb_4bit_use_double_quant": layer.nested,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": heads,
    }
