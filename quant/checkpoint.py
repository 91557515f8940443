"""The published layout of a pre-quantized 4-bit weight in a safetensors file, read and written.

For a layer P (bitsandbytes' names, which transformers and vLLM read):
    P.weight                                   uint8 (bytes, 1)
    P.weight.absmax                            float32 (blocks,), or uint8 when doubly quantized
    P.weight.quant_map                         float32 (16,)
    P.weight.nested_absmax, .nested_quant_map  float32, doubly quantized only
    P.weight.quant_state.bitsandbytes__nf4     uint8: JSON of quant_type, blocksize, dtype, shape, nested_*
Source: QuantState.as_dict(packed=True) of bitsandbytes/functional.py.
"""

import json
import math

import torch
from torch import Tensor

from lora.quant.blocks import BLOCK, nested_map
from lora.quant.codebook import codebook, dynamic_map
from lora.quant.weight import Packed, check_block, code_on, pack_shape

STATE = ".quant_state.bitsandbytes__"


def to_tensors(name: str, packed: Packed, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of weight `name` ("P.weight"); `dtype` is what readers decode to."""
    state = {
        "quant_type": packed.kind,
        "blocksize": packed.block,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(packed.shape),
    }
    tensors = {
        name: packed.q.reshape(-1, 1),
        f"{name}.absmax": packed.scales[0],
        f"{name}.quant_map": packed.code.clone(),
    }
    if packed.double:
        _, levels, nested_absmax, offset = packed.scales
        tensors[f"{name}.nested_absmax"] = nested_absmax
        tensors[f"{name}.nested_quant_map"] = levels.clone()
        state |= {"nested_blocksize": BLOCK, "nested_dtype": "float32", "nested_offset": offset.item()}
    blob = json.dumps(state).encode()
    tensors[f"{name}{STATE}{packed.kind}"] = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
    return tensors


def from_tensors(name: str, tensors: dict[str, Tensor]) -> Packed:
    """The packed weight `name` out of its tensors (`tensors` holds at least them).

    Raises ValueError, naming the weight, for an unknown code book, a block size we do not have, or lengths
    that do not fit the shape.
    """
    key = next((k for k in tensors if k.startswith(name + STATE)), None)
    if key is None:
        raise ValueError(f"{name} has no tensor {name}{STATE}nf4 or ...fp4, so its shape and code are unknown")
    nested = f"{name}.nested_absmax" in tensors
    need = [name, f"{name}.absmax", f"{name}.quant_map", *([f"{name}.nested_quant_map"] if nested else [])]
    missing = [k for k in need if k not in tensors]
    if missing:
        raise ValueError(f"{name} is incomplete: the file lacks {', '.join(missing)}")
    try:
        state = json.loads(bytes(tensors[key].cpu().tolist()))
        kind, block, shape = state["quant_type"], int(state["blocksize"]), tuple(int(n) for n in state["shape"])
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{key} is not the JSON that a 4-bit weight needs ({e})") from None
    check_block(block)
    code = codebook(kind)
    if not torch.equal(tensors[f"{name}.quant_map"].float().cpu(), code):
        raise ValueError(f"{name}.quant_map is not the {kind} code book: this file was made with another code")
    q = tensors[name].contiguous().view(torch.uint8).reshape(-1)
    n = math.prod(shape)
    absmax = tensors[f"{name}.absmax"]
    want = {"bytes": (n + 1) // 2, "scales": -(-n // block)}
    got = {"bytes": q.numel(), "scales": absmax.numel()}
    if want != got:
        raise ValueError(f"{name} of shape {shape} and block {block} needs {want}, and the file has {got}")
    if nested != (absmax.dtype == torch.uint8):
        raise ValueError(f"{name}.absmax is {absmax.dtype}: bytes go with nested_absmax, floats stand alone")
    scales: tuple[Tensor, ...] = (absmax.float(),)
    if nested:
        if "nested_offset" not in state or "nested_blocksize" not in state:
            raise ValueError(f"{key} lacks nested_offset or nested_blocksize, and {name} is doubly quantized")
        blocks, want_blocks = tensors[f"{name}.nested_absmax"].numel(), -(-absmax.numel() // BLOCK)
        if blocks != want_blocks:
            raise ValueError(f"{name}.nested_absmax has {blocks} scales, and {absmax.numel()} bytes need {want_blocks}")
        levels = tensors[f"{name}.nested_quant_map"].float().cpu()
        if not torch.equal(levels, dynamic_map()) or int(state["nested_blocksize"]) != BLOCK:
            raise ValueError(f"{name}: its scales were quantized by another map or block than 256 dynamic levels")
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=absmax.device)
        scales = (absmax, nested_map(absmax.device), tensors[f"{name}.nested_absmax"].float(), offset)
    return Packed(kind, shape, block, pack_shape(shape, q), code_on(kind, q.device)[0], scales)
