"""The fingerprint of a base: a few hundred of its weights, kept beside an adapter, to know the base again.

An adapter on another base than its own runs without an error and answers nonsense, so `save` puts a sketch of the
base into the file's metadata and `attach` compares.  Up to LAYERS of the adapted layers give RUN neighbouring
weights each, at a place drawn from the layer's name, as the layer computes with them, and how far each may lie from
the weight that it was rounded from.  Two bases are
    the same                             where all values are equal,
    the same in another precision        where they lie within what the two roundings allow,
    other models                         where more than STRAY of the values lie further apart.
A whole hash would call a base in 4 bits another model than itself in 16.
"""

import base64
import json
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora.layer import Adapted
from lora.quant.linear import Linear4bit, is_conv1d
from lora.quant.linear8 import Linear8bit

KEY = "lora_base"  # of the safetensors metadata; peft and vLLM ignore it
LAYERS, RUN, STRAY = 8, 128, 0.01
DENSE = (2.0**-8, 2.0**-24)  # bfloat16's rounding, float16's least step: a dense weight may have been through either


def fingerprint(layers: Mapping[str, Adapted]) -> str:
    """The sketch of these adapted layers' bases, as text for a file's metadata; "" where none can be read."""
    chosen = sorted(layers, key=lambda name: zlib.crc32(name.encode()))
    out: dict[str, Any] = {}
    for name in chosen:
        got = _sample(name, layers[name].base)
        if got is not None and len(out) < LAYERS:
            out[name] = {"format": got[2], "value": _text(got[0]), "reach": _text(got[1])}
    return json.dumps(out, separators=(",", ":")) if out else ""


def check(layers: Mapping[str, Adapted], text: str, source: str) -> str | None:
    """Compares these layers' bases with a fingerprint: None where equal, else a sentence on the other precision.

    Raises ValueError where it is the fingerprint of another model, or unreadable.
    """
    try:
        saved = json.loads(text)
        kept = {name: (_values(s["value"]), _values(s["reach"]), str(s["format"])) for name, s in saved.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{source}: its fingerprint of the base is damaged ({e})") from None
    total, far, same, formats = 0, 0, True, set()
    for name, (value, reach, form) in kept.items():
        got = _sample(name, layers[name].base) if name in layers else None
        if got is None:
            continue
        if got[0].shape != value.shape or reach.shape != value.shape:
            raise ValueError(f"{source}: its fingerprint of {name} has {value.numel()} values, not {got[0].numel()}")
        gap = (got[0] - value).abs()
        far += int((gap > got[1] + reach + 1e-30).sum())
        total += value.numel()
        same = same and bool((gap == 0).all())
        formats.add((form, got[2]))
    if total and far > STRAY * total:
        raise ValueError(
            f"{source} was trained on another base: {far} of {total} weights compared lie further from this model's "
            "than rounding explains; attach it to its own base, or pass any_base=True if you mean this one"
        )
    if same:
        return None
    before, now = sorted(formats)[0]
    return (
        f"{source} was trained on this base as {before}, and here it is {now}: the same model in another precision; "
        "expect slightly other answers"
    )


def same_base(one: str, other: str) -> bool:
    """Whether two fingerprints may be of one base, in whatever precision; yes where they share no layer.

    Raises ValueError where one is damaged.
    """
    try:
        return _agree(json.loads(one), json.loads(other))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"a fingerprint of the base is damaged ({e})") from None


def _agree(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    total, far = 0, 0
    for name in a.keys() & b.keys():
        x, y = _values(a[name]["value"]), _values(b[name]["value"])
        if x.shape != y.shape:
            return False
        reach = _values(a[name]["reach"]) + _values(b[name]["reach"])
        far += int(((x - y).abs() > reach + 1e-30).sum())
        total += x.numel()
    return far <= STRAY * total


def _sample(name: str, layer: nn.Module) -> tuple[Tensor, Tensor, str] | None:
    """Weights at this layer's place, how far each may be from what it was rounded from, and the format's name."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    with torch.no_grad():
        if isinstance(layer, Linear4bit):
            return _sample4(name, layer)
        if weight.dim() != 2 or not (weight.is_floating_point() or isinstance(layer, Linear8bit)):
            return None
        rows, columns = weight.shape[::-1] if is_conv1d(layer) else weight.shape
        i = _place(name, rows * columns)
        row, column = torch.div(i, columns, rounding_mode="floor"), i % columns
        picked = weight[column, row] if is_conv1d(layer) else weight[row, column]
        if isinstance(layer, Linear8bit):
            step = (layer.SCB / 127)[row].float()
            return (picked.float() * step).cpu(), (0.501 * step).cpu(), "int8"
        form = str(weight.dtype).removeprefix("torch.")
        value = picked.float().cpu()
        return value, value.abs() * DENSE[0] + DENSE[1], form


def _sample4(name: str, layer: Linear4bit) -> tuple[Tensor, Tensor, str]:
    packed = layer.packed()
    i = _place(name, layer.out_features * layer.in_features).to(packed.q.device)
    byte = packed.q.reshape(-1)[i // 2].long()
    index = torch.where(i % 2 == 0, byte >> 4, byte & 15)
    scale = packed.absmax()[i // packed.block]
    levels, order = torch.sort(packed.code, stable=True)
    half = (levels[1:] - levels[:-1]) / 2
    zero = half.new_zeros(1)
    reach = torch.empty_like(levels)
    reach[order] = torch.maximum(torch.cat((zero, half)), torch.cat((half, zero)))
    value = packed.code[index] * scale
    slack = 0.02 * value.abs() if packed.double else 0.0  # the scale itself was rounded to 8 bits
    form = f"{packed.kind} in blocks of {packed.block}{', doubly quantized' if packed.double else ''}"
    return value.cpu(), (1.001 * reach[index] * scale + slack).cpu(), form


def _place(name: str, n: int) -> Tensor:
    """Flat indices of the weights that are compared, by the layer's name."""
    start = zlib.crc32(b"at" + name.encode()) % max(1, n - RUN + 1)
    return torch.arange(start, min(start + RUN, n))


def _text(values: Tensor) -> str:
    return base64.b64encode(values.float().contiguous().numpy().tobytes()).decode()


def _values(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.float32)
